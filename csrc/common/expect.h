// Host-side checks: the message names the argument, what was expected and what came. Python sees a ValueError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace recattn {

template <class... Words>
void expect(bool holds, const Words&... words) {
    if (!holds) {
        std::ostringstream message;
        (message << ... << words);
        throw std::invalid_argument(message.str());
    }
}

}  // namespace recattn

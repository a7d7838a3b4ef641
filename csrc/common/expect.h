// expect(condition, words...): raises std::invalid_argument, a ValueError in Python. The message names the argument,
// what was expected and what was given.
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

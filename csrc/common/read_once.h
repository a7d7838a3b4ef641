// Reads memory that another thread may write during the call.
#pragma once

#include <cstdint>

namespace recattn {

// Reads the entry exactly once. Otherwise the compiler may read it again after its check and use another value.
template <class I>
I read_once(const I& entry) {
    return __atomic_load_n(&entry, __ATOMIC_RELAXED);
}

}  // namespace recattn

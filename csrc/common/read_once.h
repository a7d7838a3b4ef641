// Reads memory that another thread may write during the call.
#pragma once

#include <cstdint>

namespace recattn {

// Reads the entry exactly once. Otherwise the compiler may read it again after its check and use another value.
inline int64_t read_once(const int64_t& entry) { return __atomic_load_n(&entry, __ATOMIC_RELAXED); }

}  // namespace recattn

// What another thread may write during a call.
#pragma once

#include <cstdint>

namespace recattn {

// A compiler that read an entry anew after it was checked would use another value than the one checked.
inline int64_t read_once(const int64_t& entry) { return __atomic_load_n(&entry, __ATOMIC_RELAXED); }

}  // namespace recattn

// Rows of a matrix, of a history or of candidates, that may be given by their indices in a table.
#pragma once

#include <cstdint>

#include "cpu/common.h"

namespace recattn {

// Rows of a matrix whose last axis is contiguous. With indices row i is data[indices[i]], or zeros if that index is out
// of range; without indices it is data[i].
template <class T>
struct Rows {
    const T* data;
    int64_t row_stride;
    const int64_t* indices;
    int64_t size;
    const T* zeros;

    const T* at(int64_t i) const {
        if (indices == nullptr) return data + i * row_stride;
        const int64_t index = read_once(indices[i]);
        return is_row(index, size) ? data + index * row_stride : zeros;
    }
};

}  // namespace recattn

// Tokens of a batch, [B, H, N, columns] or packed [T, H, columns], as the CPU kernels read them.
#pragma once

#include <cstdint>

#include "cpu/common.h"

namespace recattn {

// The last axis is contiguous. Packed tokens have batch_stride 0: the sequence's start is part of the position.
template <class T>
struct Tokens {
    T* data;
    int64_t batch_stride, head_stride, row_stride;

    T* at(int64_t batch, int64_t head, int64_t position) const {
        return data + batch * batch_stride + head * head_stride + position * row_stride;
    }
};

template <class T>
Tokens<T> with_strides(T* data, const Tensor& t) {
    return t.dim() == 3 ? Tokens<T>{data, 0, t.stride(1), t.stride(0)}
                        : Tokens<T>{data, t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
Tokens<const T> tokens(const Tensor& t) {
    return with_strides(t.const_data_ptr<T>(), t);
}

template <class T>
Tokens<T> mutable_tokens(const Tensor& t) {
    return with_strides(t.mutable_data_ptr<T>(), t);
}

}  // namespace recattn

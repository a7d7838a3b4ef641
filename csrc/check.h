// Host-side checks: the message names the argument, what was expected and what came. Python sees a ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
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

inline void expect_size(const char* name, const torch::stable::Tensor& tensor, int64_t axis, int64_t size) {
    expect(tensor.size(axis) == size, name, " must have size ", size, " along axis ", axis, ", got ",
           tensor.size(axis));
}

inline void expect_dim(const char* name, const torch::stable::Tensor& tensor, int64_t dim) {
    expect(tensor.dim() == dim, name, " must have ", dim, " axes, got ", tensor.dim());
}

inline void expect_dtype(const char* name, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
    expect(tensor.scalar_type() == dtype, name, " must be ", dtype, ", got ", tensor.scalar_type());
}

inline void expect_integer(const char* name, const torch::stable::Tensor& tensor) {
    const auto dtype = tensor.scalar_type();
    expect(dtype == torch::headeronly::ScalarType::Long || dtype == torch::headeronly::ScalarType::Int, name,
           " must be int64 or int32, got ", dtype);
}

}  // namespace recattn

// Checks of tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "common/expect.h"

namespace recattn {

// As PyTorch writes it in Python.
inline const char* dtype_name(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    switch (dtype) {
        case ScalarType::Double:
            return "float64";
        case ScalarType::Float:
            return "float32";
        case ScalarType::BFloat16:
            return "bfloat16";
        case ScalarType::Half:
            return "float16";
        case ScalarType::Long:
            return "int64";
        case ScalarType::Int:
            return "int32";
        case ScalarType::Char:
            return "int8";
        default:
            return torch::headeronly::toString(dtype);
    }
}

inline std::string list_of(const std::vector<std::string>& words) {
    std::string list = "[";
    for (const std::string& word : words) list += (list.size() > 1 ? ", " : "") + word;
    return list + "]";
}

// An axis by its symbol; kAnySize takes any size.
inline constexpr int64_t kAnySize = -1;
struct Axis {
    const char* symbol;
    int64_t size = kAnySize;
};

inline void expect_shape(const char* name, const torch::stable::Tensor& tensor, std::initializer_list<Axis> axes) {
    const bool as_many = tensor.dim() == static_cast<int64_t>(axes.size());
    bool fits = as_many;
    for (int64_t i = 0; fits && i < tensor.dim(); ++i) {
        const int64_t size = axes.begin()[i].size;
        fits = size == kAnySize || size == tensor.size(i);
    }
    if (fits) return;
    std::vector<std::string> symbols, expected, got;
    for (int64_t i = 0; i < tensor.dim(); ++i) got.push_back(std::to_string(tensor.size(i)));
    for (const Axis& axis : axes) {
        const std::string any = as_many ? got[expected.size()] : axis.symbol;
        symbols.push_back(axis.symbol);
        expected.push_back(axis.size == kAnySize ? any : std::to_string(axis.size));
    }
    expect(false, name, " must be ", list_of(symbols), " = ", list_of(expected), ", got ", list_of(got));
}

inline void expect_dtype_of(const char* like_name, const torch::stable::Tensor& like, const char* name,
                            const torch::stable::Tensor& tensor) {
    expect(tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of ", like_name, ", ",
           dtype_name(like.scalar_type()), ", got ", dtype_name(tensor.scalar_type()));
}

inline void expect_dtype(const char* name, const torch::stable::Tensor& tensor, torch::headeronly::ScalarType dtype) {
    expect(tensor.scalar_type() == dtype, name, " must be ", dtype_name(dtype), ", got ",
           dtype_name(tensor.scalar_type()));
}

inline void expect_integer(const char* name, const torch::stable::Tensor& tensor) {
    const auto dtype = tensor.scalar_type();
    expect(dtype == torch::headeronly::ScalarType::Long || dtype == torch::headeronly::ScalarType::Int, name,
           " must be int64 or int32, got ", dtype_name(dtype));
}

}  // namespace recattn

// Checks of tensor arguments: shape and dtype. Messages name the argument and are worded as in Python.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "common/expect.h"

namespace recattn {

// The dtype as PyTorch names it in Python.
inline const char* dtype_name(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    constexpr std::pair<ScalarType, const char*> names[] = {
        {ScalarType::Double, "float64"}, {ScalarType::Float, "float32"}, {ScalarType::BFloat16, "bfloat16"},
        {ScalarType::Half, "float16"},   {ScalarType::Long, "int64"},    {ScalarType::Int, "int32"},
        {ScalarType::Char, "int8"},
    };
    for (const auto& [type, name] : names) {
        if (type == dtype) return name;
    }
    return torch::headeronly::toString(dtype);
}

inline std::string format_list(const std::vector<std::string>& words) {
    std::string list = "[";
    for (const std::string& word : words) list += (list.size() > 1 ? ", " : "") + word;
    return list + "]";
}

// An axis: its symbol in messages, and the size it must have.
inline constexpr int64_t kAnySize = -1;
struct Axis {
    const char* symbol;
    int64_t size = kAnySize;
};

inline void expect_shape(const char* name, const torch::stable::Tensor& tensor, std::initializer_list<Axis> axes) {
    const bool same_dim = tensor.dim() == static_cast<int64_t>(axes.size());
    bool fits = same_dim;
    for (int64_t i = 0; fits && i < tensor.dim(); ++i) {
        const int64_t size = axes.begin()[i].size;
        fits = size == kAnySize || size == tensor.size(i);
    }
    if (fits) return;
    std::vector<std::string> symbols, expected, got;
    for (int64_t i = 0; i < tensor.dim(); ++i) got.push_back(std::to_string(tensor.size(i)));
    for (const Axis& axis : axes) {
        const std::string any = same_dim ? got[expected.size()] : axis.symbol;
        symbols.push_back(axis.symbol);
        expected.push_back(axis.size == kAnySize ? any : std::to_string(axis.size));
    }
    const std::string sizes = symbols == expected ? "" : " = " + format_list(expected);
    expect(false, name, " must be ", format_list(symbols), sizes, ", got ", format_list(got));
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

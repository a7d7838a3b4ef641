// Shared by the CPU operators: scratch memory, work per thread, dispatch by dtype, and reading tensor arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "common/read_once.h"

namespace recattn {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Zeroed memory, aligned to a cache line.
template <class A>
class Scratch {
  public:
    explicit Scratch(int64_t size) : lines_(size / per_line + 1) {}
    A* data() { return lines_.data()->values; }
    const A* data() const { return lines_.data()->values; }

  private:
    static constexpr int64_t per_line = 64 / sizeof(A);
    struct alignas(64) Line {
        A values[per_line];
    };
    std::vector<Line> lines_;
};

// The type in which sums are computed.
template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Multiply-adds that make one more thread worth its start, whatever the shape.
inline constexpr int64_t kMultiplyAddsPerThread = 1 << 18;

inline int64_t grain(int64_t multiply_adds) {
    return std::max<int64_t>(1, kMultiplyAddsPerThread / std::max<int64_t>(1, multiply_adds));
}

template <class T>
inline constexpr ScalarType scalar_type_v = std::is_same_v<T, double>     ? ScalarType::Double
                                            : std::is_same_v<T, float>    ? ScalarType::Float
                                            : std::is_same_v<T, BFloat16> ? ScalarType::BFloat16
                                                                          : ScalarType::Half;

// Calls function(T{}) with the type T of the tensor, or raises if it is none of Ts.
template <class... Ts, class Function>
void dispatch_dtype(const char* name, const Tensor& tensor, const Function& function) {
    const ScalarType dtype = tensor.scalar_type();
    if (((dtype == scalar_type_v<Ts> ? (function(Ts{}), true) : false) || ...)) return;
    std::string names;
    ((names += (names.empty() ? "" : " or ") + std::string(dtype_name(scalar_type_v<Ts>))), ...);
    expect(false, name, " must be ", names, ", got ", dtype_name(dtype));
}

// An uninitialised tensor. Without the look-up of an operator by its name, which torch::stable::new_empty does.
inline Tensor new_empty_strided(torch::headeronly::IntHeaderOnlyArrayRef sizes, const int64_t* strides,
                                ScalarType dtype) {
    const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    AtenTensorHandle tensor;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(sizes.size(), sizes.data(), strides, code, aoti_torch_device_type_cpu(), 0, &tensor));
    return Tensor(tensor);
}

// A contiguous one.
inline Tensor new_empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
    std::array<int64_t, 8> strides{};
    const int64_t dim = sizes.size();
    expect(dim <= 8, "new_empty makes tensors of up to 8 axes");
    for (int64_t axis = dim - 1, stride = 1; axis >= 0; --axis) {
        strides[axis] = stride;
        stride *= std::max<int64_t>(1, sizes[axis]);
    }
    return new_empty_strided(sizes, strides.data(), dtype);
}

inline Tensor new_contiguous(const Tensor& tensor) { return new_empty(tensor.sizes(), tensor.scalar_type()); }

inline Tensor with_contiguous_rows(const Tensor& tensor) {
    return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline std::vector<int64_t> to_vector(const Tensor& tensor) {
    const Tensor contiguous = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    const auto copy = [&](const auto* data) {
        std::vector<int64_t> entries(contiguous.numel());
        for (size_t i = 0; i < entries.size(); ++i) entries[i] = read_once(data[i]);
        return entries;
    };
    return contiguous.scalar_type() == ScalarType::Int ? copy(contiguous.const_data_ptr<int32_t>())
                                                       : copy(contiguous.const_data_ptr<int64_t>());
}

inline void expect_lengths(const char* name, const std::vector<int64_t>& lengths, int64_t longest) {
    for (size_t i = 0; i < lengths.size(); ++i) {
        expect(lengths[i] >= 0 && lengths[i] <= longest, name, " must be between 0 and ", longest, ", got ", lengths[i],
               " at index [", i, "]");
    }
}

// The lengths of a batch, read once; without seq_lens all are `longest`.
inline std::vector<int64_t> checked_lengths(const std::optional<Tensor>& seq_lens, int64_t batch, int64_t longest) {
    if (!seq_lens) return std::vector<int64_t>(batch, longest);
    expect_shape("seq_lens", *seq_lens, {{"B", batch}});
    expect_integer("seq_lens", *seq_lens);
    auto lengths = to_vector(*seq_lens);
    expect_lengths("seq_lens", lengths, longest);
    return lengths;
}

inline void expect_offsets(const char* name, const std::vector<int64_t>& offsets, int64_t total) {
    expect(offsets.front() == 0 && offsets.back() == total, name, " must be offsets from 0 to ", total,
           ", got offsets from ", offsets.front(), " to ", offsets.back());
    for (size_t i = 1; i < offsets.size(); ++i) {
        expect(offsets[i - 1] <= offsets[i], name, " must be ascending, got ", offsets[i], " at index [", i, "]");
    }
}

inline bool is_row(int64_t index, int64_t table_size) {
    return static_cast<uint64_t>(index) < static_cast<uint64_t>(table_size);
}

// Position of the first index outside 0 .. size-1; `count` if there is none.
inline int64_t find_invalid(const int64_t* indices, int64_t count, int64_t size) {
    uint64_t signs = 0;  // sign bits of i and of size - 1 - i: without a branch, so that it vectorizes
    for (int64_t i = 0; i < count; ++i) signs |= indices[i] | (static_cast<uint64_t>(size) - 1 - indices[i]);
    if (static_cast<int64_t>(signs) >= 0) return count;
    return std::find_if(indices, indices + count, [&](int64_t i) { return i < 0 || i >= size; }) - indices;
}

// The entries of an integer tensor as int64: a view if the tensor is contiguous int64, else a copy. Another thread may
// write to a viewed tensor during the call, so each entry is checked when it is used.
class Indices {
  public:
    explicit Indices(const Tensor& tensor)
        : is_view_(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous()),
          copy_(is_view_ ? std::vector<int64_t>{} : to_vector(tensor)),
          data_(is_view_ ? tensor.const_data_ptr<int64_t>() : copy_.data()),
          size_(tensor.numel()) {}
    Indices(const Indices&) = delete;

    const int64_t* data() const { return data_; }
    int64_t size() const { return size_; }
    int64_t operator[](int64_t i) const { return data_[i]; }

  private:
    bool is_view_;
    std::vector<int64_t> copy_;
    const int64_t* data_;
    int64_t size_;
};

}  // namespace recattn

// What the host sides of the CPU kernels share.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "common/check.h"
#include "common/read_once.h"

namespace recattn {

// Zeroed memory that begins on a cache line.
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

// The same work, whatever the shape, before another thread is worth waking.
inline constexpr int64_t kMultiplyAddsPerThread = 1 << 18;

inline int64_t grain(int64_t multiply_adds) {
    return std::max<int64_t>(1, kMultiplyAddsPerThread / std::max<int64_t>(1, multiply_adds));
}

inline torch::stable::Tensor with_contiguous_rows(const torch::stable::Tensor& tensor) {
    return tensor.stride(tensor.dim() - 1) == 1 ? tensor : torch::stable::contiguous(tensor);
}

inline std::vector<int64_t> to_vector(const torch::stable::Tensor& tensor) {
    const torch::stable::Tensor contiguous = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    const auto copy = [&](const auto* data) { return std::vector<int64_t>(data, data + contiguous.numel()); };
    return contiguous.scalar_type() == torch::headeronly::ScalarType::Int ? copy(contiguous.const_data_ptr<int32_t>())
                                                                          : copy(contiguous.const_data_ptr<int64_t>());
}

inline void expect_lengths(const char* name, const std::vector<int64_t>& lengths, int64_t longest) {
    for (size_t i = 0; i < lengths.size(); ++i) {
        expect(lengths[i] >= 0 && lengths[i] <= longest, name, " must be between 0 and ", longest, ", got ", lengths[i],
               " at index [", i, "]");
    }
}

inline bool is_row(int64_t index, int64_t table_size) {
    return static_cast<uint64_t>(index) < static_cast<uint64_t>(table_size);
}

// The entries of an integer tensor as int64: where they lie if they can be, else copied. Where they lie another thread
// may write them meanwhile, so they are checked when they are used.
class Indices {
  public:
    explicit Indices(const torch::stable::Tensor& tensor)
        : lie_there_(tensor.scalar_type() == torch::headeronly::ScalarType::Long && tensor.is_contiguous()),
          copy_(lie_there_ ? std::vector<int64_t>{} : to_vector(tensor)),
          data_(lie_there_ ? tensor.const_data_ptr<int64_t>() : copy_.data()),
          size_(tensor.numel()) {}
    Indices(const Indices&) = delete;

    const int64_t* data() const { return data_; }
    int64_t size() const { return size_; }
    int64_t operator[](int64_t i) const { return data_[i]; }

  private:
    bool lie_there_;
    std::vector<int64_t> copy_;
    const int64_t* data_;
    int64_t size_;
};

}  // namespace recattn

// The matrices of refined_attention: as the caller gives them, as the kernels read them, and their gradients.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "cpu/common.h"
#include "cpu/sequences.h"

namespace recattn {

enum WeightPart { kQueries, kKeys, kValues };

// A matrix of all heads, [N, columns], or one of each head, [H, N, columns]: its first N rows.
struct WeightMatrix {
    Tensor tensor;
    bool per_head;
    int64_t columns;

    WeightMatrix(const Tensor& tensor, int64_t columns)
        : tensor(tensor), per_head(tensor.dim() == 3), columns(columns) {}

    // Calls function(i, j, entry) for the first `rows` rows of a head.
    template <class T, class Function>
    void for_each_entry(int64_t head, int64_t rows, const Function& function) const {
        const int64_t row_stride = tensor.stride(per_head), column_stride = tensor.stride(1 + per_head);
        const T* entries = tensor.const_data_ptr<T>() + (per_head ? head * tensor.stride(0) : 0);
        for (int64_t i = 0; i < rows; ++i) {
            for (int64_t j = 0; j < columns; ++j) {
                function(i, j, static_cast<float>(entries[i * row_stride + j * column_stride]));
            }
        }
    }
};

inline void expect_matrix(const char* name, const Tensor& w, int64_t heads, Axis rows, Axis columns) {
    if (w.dim() == 3) {
        expect_shape(name, w, {{"H", heads}, rows, columns});
    } else {
        expect_shape(name, w, {rows, columns});
    }
}

// The sequences of a call.
struct Batch {
    std::vector<Span> spans;
    int64_t heads;
    int64_t padded_length;  // N; 0 where packed
    int64_t positions;      // N, or the length of the longest packed sequence: the rows of W that are used

    int64_t size() const { return static_cast<int64_t>(spans.size()); }

    void expect_rows(int64_t rows) const {
        expect(rows >= positions, "Nmax of w_q and w_k must be at least ",
               padded_length > 0 ? "N = " : "the longest sequence, ", positions, ", got ", rows);
    }
};

// A tensor [B, H, N, columns], or packed [T, H, columns], like q.
inline void expect_tokens_like_q(const char* name, const Tensor& x, const Tensor& q, Axis columns) {
    if (q.dim() == 3) {
        expect_shape(name, x, {{"T", q.size(0)}, {"H", q.size(1)}, columns});
    } else {
        expect_shape(name, x, {{"B", q.size(0)}, {"H", q.size(1)}, {"N", q.size(2)}, columns});
    }
}

inline Batch checked_batch(const Tensor& q, const Tensor& k, const LengthTensors& lengths) {
    const bool packed = lengths.packed();
    if (packed) {
        expect_shape("q", q, {{"T"}, {"H"}, {"D"}});
    } else {
        expect_shape("q", q, {{"B"}, {"H"}, {"N"}, {"D"}});
    }
    const int64_t dim = q.size(q.dim() - 1);
    expect_tokens_like_q("k", k, q, {"D", dim});
    expect(dim > 0, "D of q and k must be at least 1, got 0");
    const int64_t total = q.size(packed ? 0 : 2);
    Batch batch{checked_spans(lengths, packed ? lengths.packed_batch() : q.size(0), total), q.size(1),
                packed ? 0 : total, packed ? 0 : total};
    for (const Span& span : batch.spans) batch.positions = std::max(batch.positions, span.length);
    return batch;
}

// The matrices of a call.
struct Weights {
    WeightMatrix w_q, w_k;
    std::optional<WeightMatrix> w_v;
    int64_t heads, n;  // one head if no matrix is per head

    int64_t rank() const { return w_q.columns; }
    bool folded() const { return rank() >= n; }
    // W_q takes the 1/√R of the scores.
    float scale() const { return static_cast<float>(1 / std::sqrt(static_cast<double>(rank()))); }
};

// [W_q | W_k | W_v] of each head, or [W_q W_kᵀ | W_v] if folded, as the kernels read it: rows padded to whole
// registers, and a transposed copy. The columns of W_v and of W_q W_kᵀ are positions, like the rows. W_q is divided by
// √R.
class PackedWeights {
  public:
    explicit PackedWeights(const Weights& weights)
        : heads_(weights.heads), n_(weights.n), rank_(weights.rank()), folded_(weights.folded()) {
        const int64_t values = weights.w_v ? n_ : 0;
        columns_ = folded_ ? std::array{n_, int64_t{0}, values} : std::array{rank_, rank_, values};
        for (int part = 0; part < 3; ++part) {
            first_[part] = row_stride;
            row_stride += padded(columns_[part]);
        }
        transposed_row_stride = padded(n_);
        rows_ = Scratch<float>(heads_ * n_ * row_stride);
        transposed_ = Scratch<float>(heads_ * row_stride * transposed_row_stride);
        if (folded_) {
            w_q_ = Scratch<float>(heads_ * n_ * rank_);
            w_k_ = Scratch<float>(heads_ * n_ * rank_);
        }
    }

    template <class T>
    void pack(const Weights& weights);

    int64_t row_stride = 0, transposed_row_stride = 0;

    int64_t columns(int part) const { return columns_[part]; }
    int64_t all_columns() const { return columns_[kQueries] + columns_[kKeys] + columns_[kValues]; }
    int64_t size() const { return heads_ * n_ * row_stride; }

    // Offset of the entry at position `start`: its row, and its column where columns are positions.
    int64_t offset(int64_t head, int part, int64_t start) const {
        return (matrix(head) * n_ + start) * row_stride + first_column(part, start);
    }
    const float* at(int64_t head, int part, int64_t start) const { return rows_.data() + offset(head, part, start); }
    const float* transposed_at(int64_t head, int part, int64_t start) const {
        return transposed_.data() + (matrix(head) * row_stride + first_column(part, start)) * transposed_row_stride +
               start;
    }

    // The gradients of the matrices from the sum of `count` partial gradients packed like W. Overwrites the partials.
    template <class T>
    void unpack_gradients(float* partials, int64_t count, const Weights& weights, const Tensor& dw_q,
                          const Tensor& dw_k, const std::optional<Tensor>& dw_v) const;

  private:
    static int64_t padded(int64_t columns) { return columns == 0 ? 0 : (columns + 31) / 16 * 16; }
    int64_t matrix(int64_t head) const { return heads_ == 1 ? 0 : head; }
    int64_t first_column(int part, int64_t start) const {
        return first_[part] + (part == kValues || folded_ ? start : 0);
    }
    float* row(int64_t head, int64_t i, int part) { return rows_.data() + (head * n_ + i) * row_stride + first_[part]; }

    int64_t heads_, n_, rank_;
    bool folded_;
    std::array<int64_t, 3> columns_{}, first_{};
    Scratch<float> rows_{0}, transposed_{0};
    Scratch<float> w_q_{0}, w_k_{0};  // [heads, N, R], if folded
};

// A gradient [N, columns] of each head or of all, summed over the heads in the last case.
class WeightGradient {
  public:
    WeightGradient(const WeightMatrix& matrix, int64_t heads, int64_t n)
        : per_head_(matrix.per_head), n_(n), columns_(matrix.columns), sums_((per_head_ ? heads : 1) * n * columns_) {}

    template <class A>
    void add(int64_t head, const A* gradient, int64_t row_stride, A scale) {
        float* sum = sums_.data() + (per_head_ ? head * n_ * columns_ : 0);
        for (int64_t i = 0; i < n_; ++i) {
            for (int64_t j = 0; j < columns_; ++j) {
                sum[i * columns_ + j] += static_cast<float>(gradient[i * row_stride + j] * scale);
            }
        }
    }

    // Into the contiguous gradient of the whole matrix; what no position uses is zero.
    template <class T>
    void store(const Tensor& gradient) const {
        T* out = gradient.mutable_data_ptr<T>();
        const int64_t matrices = per_head_ ? gradient.size(0) : 1, rows = gradient.size(per_head_),
                      columns = gradient.size(1 + per_head_);
        for (int64_t row = 0; row < matrices * rows; ++row, out += columns) {
            const int64_t matrix = row / rows, i = row % rows, used = i < n_ ? columns_ : 0;
            const float* sum = sums_.data() + (matrix * n_ + i) * columns_;
            for (int64_t j = 0; j < used; ++j) out[j] = static_cast<T>(sum[j]);
            std::fill(out + used, out + columns, T(0));
        }
    }

  private:
    bool per_head_;
    int64_t n_, columns_;
    Scratch<float> sums_;
};

}  // namespace recattn

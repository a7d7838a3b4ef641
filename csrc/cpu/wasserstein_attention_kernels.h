// wasserstein_attention and its gradients in float32, for one instruction set (see foreach_isa.h).
//
//   q, k = [mean, std] of Gaussians, less the mean key                                                 [n, 2 dim]
//   refined:
//     A = -scale * W²(q, k), or its softmax; without covariances A = scale * q k^T, or its softmax     masked, [n, n]
//     x_q, x_k = A W_q, A W_k                                                                          [n, 2 R]
//     q, k = [mean, std] of x, less the mean key
//   p = softmax(mask(-scale * W²)) = softmax(mask(2 scale * (q k^T - |k|²/2)))                         [n, n]
//   out_mean, out_cov = p mean_v, (p∘p) cov_v
//
// One task is a group of (batch, head) indices, computed one after another, a block of rows of [n, n] at a time. The
// backward recomputes the forward.

#include "cpu/simd/matmul.h"
// They need matmul.h.
#include "cpu/simd/dropout.h"
#include "cpu/simd/matmul_triangular.h"
#include "cpu/simd/matrix.h"
#include "cpu/simd/softmax.h"
// They need all above.
#include "cpu/simd/gaussians.h"
#include "cpu/wasserstein_attention_vectors.h"

namespace recattn::RECATTN_ISA {
namespace {

// --- One (batch, head) ---

// Its n tokens begin at `start` of the N or T axis; the first is counted as `first_position`.
template <class T>
struct BatchHead {
    const WassersteinAttention<T>& op;
    int64_t index, batch, head, n, start, first_position;

    RECATTN_TARGET BatchHead(const WassersteinAttention<T>& op, int64_t index)
        : op(op),
          index(index),
          batch(index / op.heads),
          head(index % op.heads),
          n(op.spans[batch].length),
          start(op.spans[batch].start),
          first_position(op.spans[batch].first_position) {}

    RECATTN_TARGET const T* tokens(const Tokens<const T>& tensor) const { return tensor.at(batch, head, start); }
    RECATTN_TARGET Rhs<float> rows(const Tokens<const T>& tensor, int64_t columns, Matrix scratch) const {
        return as_rhs(tokens(tensor), tensor.row_stride, n, columns, scratch.data);
    }
    RECATTN_TARGET void store_rows(const Tokens<T>& tensor, Matrix values, int64_t first, int64_t count,
                                   int64_t columns) const {
        for (int64_t i = 0; i < count; ++i) {
            copy_row(values.row(i), columns, tensor.at(batch, head, start + first + i));
        }
    }
    RECATTN_TARGET void store_zeros_at_padding(const Tokens<T>& tensor, int64_t columns) const {
        for (int64_t i = 0; i < op.padded_length; ++i) {
            if (i < start || i >= start + n) std::fill_n(tensor.at(batch, head, i), columns, T(0));
        }
    }
    // A whole tensor.
    RECATTN_TARGET void store_tokens(const Tokens<T>& tensor, Matrix values, int64_t columns) const {
        store_rows(tensor, values, 0, n, columns);
        store_zeros_at_padding(tensor, columns);
    }

    // W_q or W_k: a row is a position.
    RECATTN_TARGET Rhs<float> w(int64_t part) const {
        return {op.matrices->at(head, part, first_position), op.matrices->stride};
    }
    RECATTN_TARGET Rhs<float> w_t(int64_t part) const {
        return {op.matrices->transposed_at(head, part, first_position), op.matrices->transposed_stride};
    }
    RECATTN_TARGET Out<float> dw(float* partial, int64_t part) const {
        return {partial + op.matrices->offset(head, part, first_position), op.matrices->stride, true};
    }
};

RECATTN_INLINE Lhs<float> lhs_from(Rhs<float> rows, int64_t first) {
    return {rows.data + first * rows.row_stride, rows.row_stride, 1};
}
RECATTN_INLINE Rhs<float> rhs_from(Rhs<float> rows, int64_t first) {
    return {rows.data + first * rows.row_stride, rows.row_stride};
}

template <class T>
struct ForwardMatrices {
    Vectors x, source;
    Matrix a, p, squares, kept, mean_v, cov_v, out;

    RECATTN_TARGET ForwardMatrices(const WassersteinAttention<T>& op, int64_t n, bool backward, Arena& arena)
        : x(n, op.width(), backward, arena),
          source(op.matrices == nullptr ? x : Vectors(n, op.source_width(), backward, arena)),
          p(arena, rows_per_block(n), n),
          mean_v(arena, n, op.value_dim),
          out(arena, n, op.value_dim) {
        if (op.matrices != nullptr) a = Matrix(arena, rows_per_block(n), n);
        if (op.has_cov) {
            squares = Matrix(arena, rows_per_block(n), n);
            cov_v = Matrix(arena, n, op.value_dim);
        }
        if (op.dropout) kept = Matrix(arena, 1, (n + 8 * Vector<float>::lanes) / 8 * 8 + 8 * Vector<float>::lanes);
    }
};

// Queries and keys of the first attention matrix: the vectors of the Gaussians, or q and k as they are.
struct Source {
    Rhs<float> q, k;
    int64_t depth;
};

template <class T>
RECATTN_TARGET Source load_source(const BatchHead<T>& bh, const Vectors& x) {
    const WassersteinAttention<T>& op = bh.op;
    if (!op.has_cov) {
        const Source source{bh.rows(op.mean_q, op.dim, x.q), bh.rows(op.mean_k, op.dim, x.k), op.dim};
        transpose(lhs_from(source.k, 0), bh.n, op.dim, x.kt.data, x.kt.row_stride);
        return source;
    }
    const T *mean_q = bh.tokens(op.mean_q), *cov_q = bh.tokens(op.cov_q);
    const T *mean_k = bh.tokens(op.mean_k), *cov_k = bh.tokens(op.cov_k);
    for (int64_t i = 0; i < bh.n; ++i) {
        copy_row(mean_q + i * op.mean_q.row_stride, op.dim, x.q.row(i));
        copy_row(cov_q + i * op.cov_q.row_stride, op.dim, x.q.row(i) + op.dim);
        copy_row(mean_k + i * op.mean_k.row_stride, op.dim, x.k.row(i));
        copy_row(cov_k + i * op.cov_k.row_stride, op.dim, x.k.row(i) + op.dim);
    }
    make_vectors(x, false);
    return {x.q, x.k, x.width + 2};
}

// Rows of A.
template <class T>
RECATTN_TARGET void make_source_block(const WassersteinAttention<T>& op, const Block& block, const Source& source,
                                      const Vectors& x, Matrix a) {
    const float factor = op.has_cov ? 2 * op.scale : op.scale;
    const int64_t columns = round_up_to_lanes<float>(block.kv_end());
    multiply_keys(block, lhs_from(source.q, block.begin), x.kt, a, source.depth);
    for (int64_t i = 0; i < block.rows; ++i) {
        if (op.softmax_source) {
            softmax_row(a.row(i), block.num_visible(i), columns, factor);
        } else {
            scale_row(a.row(i), block.num_visible(i), columns, factor);
        }
    }
}

// x from A W_q and A W_k.
template <class T>
RECATTN_TARGET void refine(const BatchHead<T>& bh, const Source& source, const ForwardMatrices<T>& f) {
    for_each_block(bh.n, bh.op.causal, [&](const Block& block) RECATTN_TARGET {
        make_source_block(bh.op, block, source, f.source, f.a);
        multiply_values(block, f.a, bh.w(kQueries), f.x.q.from(block.begin, 0), f.x.width);
        multiply_values(block, f.a, bh.w(kKeys), f.x.k.from(block.begin, 0), f.x.width);
    });
    make_vectors(f.x, true);
}

// Rows of p, before dropout.
RECATTN_TARGET inline void make_p_block(const Block& block, const Vectors& x, float scale, Matrix p) {
    multiply_keys(block, x.q.from(block.begin, 0), x.kt, p, x.width + 1);
    const int64_t columns = round_up_to_lanes<float>(block.kv_end());
    for (int64_t i = 0; i < block.rows; ++i) softmax_row(p.row(i), block.num_visible(i), columns, 2 * scale);
}

// Calls function(true or false for dropout, and for covariances), constants of their types.
template <class T, class Function>
RECATTN_INLINE void with_constants(const WassersteinAttention<T>& op, const Function& function) {
    if (op.dropout) {
        op.has_cov ? function(std::true_type{}, std::true_type{}) : function(std::true_type{}, std::false_type{});
    } else {
        op.has_cov ? function(std::false_type{}, std::true_type{}) : function(std::false_type{}, std::false_type{});
    }
}

template <class T>
RECATTN_TARGET void forward_batch_head(const BatchHead<T>& bh, float* memory) {
    const WassersteinAttention<T>& op = bh.op;
    Arena arena(memory);
    const ForwardMatrices<T> f(op, bh.n, false, arena);
    const Source source = load_source(bh, f.source);
    if (op.matrices != nullptr) refine(bh, source, f);
    const Rhs<float> mean_v = bh.rows(op.mean_v, op.value_dim, f.mean_v);
    const Rhs<float> cov_v = op.has_cov ? bh.rows(op.cov_v, op.value_dim, f.cov_v) : Rhs<float>{};
    for_each_block(bh.n, op.causal, [&](const Block& block) RECATTN_TARGET {
        make_p_block(block, f.x, op.p_scale(), f.p);
        const int64_t columns = round_up_to_lanes<float>(block.kv_end());
        with_constants(op, [&](auto dropout, auto squares) RECATTN_TARGET {
            for (int64_t i = 0; i < block.rows && (dropout || squares); ++i) {
                if (dropout) {
                    dropout_row(op.dropout, bh.index, kPerToken, block.begin + i, 0, block.num_visible(i), f.kept.data);
                }
                float* squares_row = squares ? f.squares.row(i) : nullptr;
                drop_and_square_row<dropout, squares>(f.p.row(i), f.kept.data, squares_row, columns);
            }
        });
        multiply_values(block, f.p, mean_v, f.out, op.value_dim);
        bh.store_rows(op.mean, f.out, block.begin, block.rows, op.value_dim);
        if (op.has_cov) {
            multiply_values(block, f.squares, cov_v, f.out, op.value_dim);
            bh.store_rows(op.cov, f.out, block.begin, block.rows, op.value_dim);
        }
    });
    bh.store_zeros_at_padding(op.mean, op.value_dim);
    if (op.has_cov) bh.store_zeros_at_padding(op.cov, op.value_dim);
}

// Gradients, named d + the matrix.
template <class T>
struct BackwardMatrices {
    Matrix mean_v_t, cov_v_t, dmean, dcov, dp, dq, dk, dmean_v, dcov_v, row_sums, column_sums, dsource_q, dsource_k;

    RECATTN_TARGET BackwardMatrices(const WassersteinAttention<T>& op, int64_t n, Arena& arena)
        : mean_v_t(arena, op.value_dim, n),
          dmean(arena, n, op.value_dim),
          dp(arena, rows_per_block(n), n),
          dq(arena, n, op.width()),
          dk(arena, n, op.width()),
          dmean_v(arena, n, op.value_dim),
          row_sums(arena, 1, n),
          column_sums(arena, 1, n) {
        if (op.has_cov) {
            cov_v_t = Matrix(arena, op.value_dim, n);
            dcov = Matrix(arena, n, op.value_dim);
            dcov_v = Matrix(arena, n, op.value_dim);
        }
        if (op.matrices != nullptr) {
            dsource_q = Matrix(arena, n, op.source_width());
            dsource_k = Matrix(arena, n, op.source_width());
        }
    }
};

// From dout to the gradients of the values, stored, and of x.q and x.k.
template <class T>
RECATTN_TARGET void attend_backward(const BatchHead<T>& bh, const ForwardMatrices<T>& f, const BackwardMatrices<T>& b) {
    const WassersteinAttention<T>& op = bh.op;
    const int64_t n = bh.n, value_dim = op.value_dim;
    transpose(lhs_from(bh.rows(op.mean_v, value_dim, f.mean_v), 0), n, value_dim, b.mean_v_t.data,
              b.mean_v_t.row_stride);
    const Rhs<float> dmean = bh.rows(op.dmean, value_dim, b.dmean);
    Rhs<float> dcov{};
    if (op.has_cov) {
        transpose(lhs_from(bh.rows(op.cov_v, value_dim, f.cov_v), 0), n, value_dim, b.cov_v_t.data,
                  b.cov_v_t.row_stride);
        dcov = bh.rows(op.dcov, value_dim, b.dcov);
    }
    std::fill_n(b.column_sums.data, b.column_sums.row_stride, 0.0f);
    for_each_block(n, op.causal, [&](const Block& block) RECATTN_TARGET {
        const int64_t columns = round_up_to_lanes<float>(block.kv_end());
        make_p_block(block, f.x, op.p_scale(), f.p);
        multiply_keys(block, lhs_from(dmean, block.begin), b.mean_v_t, b.dp, value_dim);
        if (op.has_cov) multiply_keys(block, lhs_from(dcov, block.begin), b.cov_v_t, f.squares, value_dim);
        with_constants(op, [&](auto dropout, auto squares) RECATTN_TARGET {
            for (int64_t i = 0; i < block.rows; ++i) {
                const int64_t count = block.num_visible(i);
                if (dropout) dropout_row(op.dropout, bh.index, kPerToken, block.begin + i, 0, count, f.kept.data);
                float* squares_row = squares ? f.squares.row(i) : nullptr;
                softmax_and_square_backward_row<dropout, squares>(f.p.row(i), f.kept.data, b.dp.row(i), squares_row,
                                                                  b.column_sums.data, count, columns);
            }
        });
        add_transposed(block, f.p, rhs_from(dmean, block.begin), b.dmean_v, value_dim);
        if (op.has_cov) add_transposed(block, f.squares, rhs_from(dcov, block.begin), b.dcov_v, value_dim);
        multiply_values(block, b.dp, f.x.k, b.dq.from(block.begin, 0), f.x.width);
        add_transposed(block, b.dp, f.x.q.from(block.begin, 0), b.dk, f.x.width);
    });
    bh.store_tokens(op.dmean_v, b.dmean_v, value_dim);
    if (op.has_cov) bh.store_tokens(op.dcov_v, b.dcov_v, value_dim);
    make_vectors_backward(f.x, b.dq, b.dk, nullptr, b.column_sums.data, op.p_scale());
}

// From the gradients of x to those of the source's queries and keys, and of the matrices, added to `dmatrices`.
template <class T>
RECATTN_TARGET void refine_backward(const BatchHead<T>& bh, const Source& source, const ForwardMatrices<T>& f,
                                    const BackwardMatrices<T>& b, float* dmatrices) {
    const WassersteinAttention<T>& op = bh.op;
    const int64_t width = op.width(), source_width = op.source_width();
    // The gradient of a distance's factor comes last, in make_vectors_backward.
    const float factor = op.has_cov ? 1 : op.scale;
    std::fill_n(b.column_sums.data, b.column_sums.row_stride, 0.0f);
    for_each_block(bh.n, op.causal, [&](const Block& block) RECATTN_TARGET {
        const int64_t columns = round_up_to_lanes<float>(block.kv_end());
        if (block.rows < bh.n) make_source_block(op, block, source, f.source, f.a);
        const Matrix dq = b.dq.from(block.begin, 0), dk = b.dk.from(block.begin, 0);
        multiply_keys(block, dq, bh.w_t(kQueries), b.dp, width);
        multiply_keys(block, dk, bh.w_t(kKeys), b.dp.accumulated(), width);
        add_transposed(block, f.a, dq, bh.dw(dmatrices, kQueries), width, true);
        add_transposed(block, f.a, dk, bh.dw(dmatrices, kKeys), width, true);
        for (int64_t i = 0; i < block.rows; ++i) {
            float* row = b.dp.row(i);
            if (op.softmax_source) {
                softmax_backward_row(row, f.a.row(i), block.num_visible(i), columns, factor);
            } else {
                scale_row(row, block.num_visible(i), columns, factor);
            }
            if (op.has_cov) b.row_sums.data[block.begin + i] = add_to_sums(row, columns, b.column_sums.data);
        }
        multiply_values(block, b.dp, source.k, b.dsource_q.from(block.begin, 0), source_width);
        add_transposed(block, b.dp, rhs_from(source.q, block.begin), b.dsource_k, source_width);
    });
    if (op.has_cov) {
        make_vectors_backward(f.source, b.dsource_q, b.dsource_k, b.row_sums.data, b.column_sums.data, op.scale);
    }
}

template <class T>
RECATTN_TARGET void backward_batch_head(const BatchHead<T>& bh, float* memory, float* dmatrices) {
    const WassersteinAttention<T>& op = bh.op;
    Arena arena(memory);
    const ForwardMatrices<T> f(op, bh.n, true, arena);
    const BackwardMatrices<T> b(op, bh.n, arena);
    const Source source = load_source(bh, f.source);
    const bool refined = op.matrices != nullptr;
    if (refined) refine(bh, source, f);
    attend_backward(bh, f, b);
    if (refined) refine_backward(bh, source, f, b, dmatrices);
    const Matrix dq = refined ? b.dsource_q : b.dq, dk = refined ? b.dsource_k : b.dk;
    bh.store_tokens(op.dmean_q, dq, op.dim);
    bh.store_tokens(op.dmean_k, dk, op.dim);
    if (op.has_cov) {
        bh.store_tokens(op.dcov_q, dq.from(0, op.dim), op.dim);
        bh.store_tokens(op.dcov_k, dk.from(0, op.dim), op.dim);
    }
}

// --- Tasks ---

// Of any number of tokens up to op.longest: one block may be larger than a block of a longer sequence.
template <class T>
RECATTN_TARGET int64_t scratch_size(const WassersteinAttention<T>& op, bool backward) {
    int64_t size = 0;
    for (const int64_t n : {op.longest, std::min(op.longest, kLongestBlock)}) {
        Arena sizes(nullptr);
        const ForwardMatrices<T> forward_matrices(op, n, backward, sizes);
        if (backward) const BackwardMatrices<T> backward_matrices(op, n, sizes);
        size = std::max(size, sizes.used());
    }
    return size + Vector<float>::lanes;  // rows are read in whole registers from any column on
}

// Outputs of the (batch, head) indices begin..end.
template <class T>
RECATTN_TARGET void forward(const WassersteinAttention<T>& op, int64_t begin, int64_t end) {
    Scratch<float> memory(scratch_size(op, false));
    for (int64_t index = begin; index < end; ++index) forward_batch_head(BatchHead<T>(op, index), memory.data());
}

// Groups begin..end. Each group sums the gradients of the matrices in its own part of `dmatrices`, so that the bits do
// not depend on the threads.
template <class T>
RECATTN_TARGET void backward(const WassersteinAttention<T>& op, const Groups& groups, int64_t begin, int64_t end,
                             float* dmatrices) {
    Scratch<float> memory(scratch_size(op, true));
    const int64_t size = op.matrices == nullptr ? 0 : op.matrices->size();
    for (int64_t group = begin; group < end; ++group) {
        float* partial = size == 0 ? nullptr : dmatrices + group * size;
        std::fill_n(partial, size, 0.0f);
        for (int64_t index = groups.start(group); index < groups.start(group + 1); ++index) {
            backward_batch_head(BatchHead<T>(op, index), memory.data(), partial);
        }
    }
}

}  // namespace
}  // namespace recattn::RECATTN_ISA

// refined_attention and its gradients in float32, for one instruction set (see foreach_isa.h).
//
//   A = scale * q k^T (source "logits") or softmax(scale * q k^T) (source "weights")      masked, [n, n]
//   queries, keys, values = A W_q, A W_k, A W_v                                           [n, r], [n, r], [n, n]
//   M = queries keys^T, or softmax(mask(queries keys^T)) values (+ A) with values
//   p = softmax(mask(M))
//   out = p v, with dropout (keep * p) v
//
// W_q comes already divided by sqrt(r). Folded weights are W_q W_k^T in place of W_q, and then keys = A. One task is a
// group of (batch, head) indices, computed one after another: all matrices of a (batch, head) of n tokens stay in the
// core's cache. The backward recomputes the forward. Register tiles: RECATTN_TILE_ROWS rows by RECATTN_TILE_VECTORS
// registers.

#include "cpu/simd/matmul.h"
#include "cpu/simd/matmul_triangular.h"
#include "cpu/simd/matrix.h"
#include "cpu/simd/softmax.h"
// After matmul.h, which it needs.
#include "cpu/simd/dropout.h"

namespace recattn::RECATTN_ISA {
namespace {

// --- Matrices of one (batch, head) ---

// Matrices of n tokens, named as in the equation; _t is transposed. `out` is also used for other [n, dim] results.
// `keep` is one row of dropout.
struct ForwardMatrices {
    Matrix q, kt, a, queries, keys, keys_t, p, values, p_values, v, out, keep;

    template <class T>
    RECATTN_TARGET ForwardMatrices(const RefinedAttention<T>& op, int64_t n, Arena& arena)
        : q(arena, n, op.dim),
          kt(arena, op.dim, n),
          a(arena, n, n),
          queries(arena, n, op.rank(n)),
          keys(op.folded ? a : Matrix(arena, n, op.rank(n))),
          keys_t(arena, op.rank(n), n),
          p(arena, n, n),
          v(arena, n, op.value_dim),
          out(arena, n, std::max(op.dim, op.value_dim)) {
        if (op.has_values) {
            values = Matrix(arena, n, n);
            p_values = Matrix(arena, n, n);
        }
        if (op.dropout) keep = Matrix(arena, 1, n + 8 * Vector<float>::lanes);
    }
};

// Gradients, named d + the matrix.
struct BackwardMatrices {
    Matrix k, vt, dout, dp, dqueries, dkeys, da, values_t, dvalues, dp_values;

    template <class T>
    RECATTN_TARGET BackwardMatrices(const RefinedAttention<T>& op, int64_t n, Arena& arena)
        : k(arena, n, op.dim),
          vt(arena, op.value_dim, n),
          dout(arena, n, op.value_dim),
          dp(arena, n, n),
          dqueries(arena, n, op.rank(n)),
          da(arena, n, n) {
        if (!op.folded) dkeys = Matrix(arena, n, op.rank(n));
        if (op.has_values) {
            values_t = Matrix(arena, n, n);
            dvalues = Matrix(arena, n, n);
            dp_values = Matrix(arena, n, n);
        }
    }
};

// One (batch, head): its n tokens begin at `start` of the N or T axis, the first at position `first_position` of W;
// causal matrices are triangular.
template <class T>
struct BatchHead {
    const RefinedAttention<T>& op;
    int64_t batch, head, n, start, first_position;
    Triangle lower, upper;

    RECATTN_TARGET BatchHead(const RefinedAttention<T>& op, int64_t index)
        : op(op),
          batch(index / op.heads),
          head(index % op.heads),
          n(op.spans[batch].length),
          start(op.spans[batch].start),
          first_position(op.spans[batch].first_position),
          lower(op.causal ? Triangle::lower : Triangle::full),
          upper(op.causal ? Triangle::upper : Triangle::full) {}

    RECATTN_TARGET int64_t num_visible(int64_t row) const { return op.causal ? row + 1 : n; }
    RECATTN_TARGET const T* tokens(const Tokens<const T>& tensor) const { return tensor.at(batch, head, start); }
    RECATTN_TARGET Rhs<float> weights(int64_t part) const {
        return {op.weights.at(head, part, first_position), op.weights.row_stride};
    }
    RECATTN_TARGET Rhs<float> weights_t(int64_t part) const {
        return {op.weights.transposed_at(head, part, first_position), op.weights.transposed_row_stride};
    }
    RECATTN_TARGET Out<float> dweights(float* partial, int64_t part) const {
        return {partial + op.weights.offset(head, part, first_position), op.weights.row_stride, true};
    }

    // Stores the rows of `values` as tokens of `tensor`, zeros at padded positions.
    RECATTN_TARGET void store_tokens(const Tokens<T>& tensor, Matrix values, int64_t columns) const {
        for (int64_t i = 0; i < n; ++i) {
            copy_row(values.data + i * values.row_stride, columns, tensor.at(batch, head, start + i));
        }
        for (int64_t i = 0; i < op.padded_length; ++i) {
            if (i < start || i >= start + n) std::fill_n(tensor.at(batch, head, i), columns, T(0));
        }
    }

    RECATTN_TARGET void softmax(Matrix qk, float scale) const {
        for (int64_t i = 0; i < n; ++i) softmax_row(qk.data + i * qk.row_stride, num_visible(i), qk.row_stride, scale);
    }

    RECATTN_TARGET void softmax_backward(Matrix dp, Matrix p, float scale) const {
        for (int64_t i = 0; i < n; ++i) {
            softmax_backward_row(dp.data + i * dp.row_stride, p.data + i * p.row_stride, num_visible(i), dp.row_stride,
                                 scale);
        }
    }

    RECATTN_TARGET void scale_and_mask(Matrix x, float scale) const {
        for (int64_t i = 0; i < n; ++i) scale_row(x.data + i * x.row_stride, num_visible(i), x.row_stride, scale);
    }

    RECATTN_TARGET void add(Matrix x, Matrix y) const {
        for (int64_t i = 0; i < n * x.row_stride; ++i) x.data[i] += y.data[i];
    }

    // out = keep * p, and dp = keep * dp if there is a dp. `out` may be p.
    RECATTN_TARGET void drop(Matrix p, Matrix dp, Matrix keep, Matrix out) const {
        for (int64_t i = 0; i < n; ++i) {
            const int64_t columns = round_up_to_lanes<float>(num_visible(i));
            dropout_row(op.dropout, batch * op.heads + head, kPerToken, i, 0, columns, keep.data);
            const float* p_row = p.data + i * p.row_stride;
            float* out_row = out.data + i * out.row_stride;
            for (int64_t j = 0; j < columns; ++j) out_row[j] = keep.data[j] * p_row[j];
            std::fill(out_row + columns, out_row + out.row_stride, 0.0f);
            if (dp.data == nullptr) continue;
            for (int64_t j = 0; j < columns; ++j) dp.data[i * dp.row_stride + j] *= keep.data[j];
        }
    }
};

// p = softmax(mask(M)) and all matrices before it.
template <class T>
RECATTN_TARGET void refine(const BatchHead<T>& bh, Lhs<float> q, Lhs<float> k, const ForwardMatrices& f) {
    const RefinedAttention<T>& op = bh.op;
    const int64_t n = bh.n, rank = op.rank(n);
    const Triangle lower = bh.lower, upper = bh.upper;
    const Triangle queries_triangle = op.folded ? lower : Triangle::full,
                   keys_t_triangle = op.folded ? upper : Triangle::full;

    transpose(k, n, op.dim, f.kt.data, f.kt.row_stride);
    multiply_triangular(q, f.kt, f.a, {n, op.dim, n}, {.out = lower});
    if (op.softmax_source) {
        bh.softmax(f.a, op.scale);
    } else {
        bh.scale_and_mask(f.a, op.scale);
    }
    multiply_triangular(f.a, bh.weights(kQueries), f.queries, {n, n, rank}, {.lhs = lower, .out = queries_triangle});
    if (!op.folded) multiply_triangular(f.a, bh.weights(kKeys), f.keys, {n, n, rank}, {.lhs = lower});
    transpose<float>(f.keys, n, rank, f.keys_t.data, f.keys_t.row_stride);
    const Matrix qk = op.has_values ? f.p_values : f.p;  // overwritten by its softmax
    multiply_triangular(f.queries, f.keys_t, qk, {n, rank, n},
                        {.lhs = queries_triangle, .rhs = keys_t_triangle, .out = lower});
    bh.softmax(qk, 1);
    if (op.has_values) {
        multiply_triangular(f.a, bh.weights(kValues), f.values, {n, n, n}, {.lhs = lower});
        multiply_triangular(f.p_values, f.values, f.p, {n, n, n}, {.lhs = lower, .out = lower});
        if (op.adds_source) bh.add(f.p, f.a);
        bh.softmax(f.p, 1);
    }
}

// From dp = b.dp to dq, dk (stored) and dW (added to `dweights`).
template <class T>
RECATTN_TARGET void refine_backward(const BatchHead<T>& bh, Rhs<float> q, Rhs<float> k, const ForwardMatrices& f,
                                    const BackwardMatrices& b, float* dweights) {
    const RefinedAttention<T>& op = bh.op;
    const int64_t n = bh.n, rank = op.rank(n);
    const Triangle lower = bh.lower, upper = bh.upper;
    const Triangle keys_triangle = op.folded ? lower : Triangle::full;

    bh.softmax_backward(b.dp, f.p, 1);
    if (op.has_values) {
        transpose<float>(f.values, n, n, b.values_t.data, b.values_t.row_stride);
        multiply_triangular(b.dp, b.values_t, b.dp_values, {n, n, n}, {.lhs = lower, .out = lower});
        multiply_triangular(f.p_values.transposed(), b.dp, b.dvalues, {n, n, n}, {.lhs = upper, .rhs = lower});
        bh.softmax_backward(b.dp_values, f.p_values, 1);
    }
    const Matrix ds = op.has_values ? b.dp_values : b.dp;
    multiply_triangular(ds, f.keys, b.dqueries, {n, n, rank},
                        {.lhs = lower, .rhs = keys_triangle, .out = keys_triangle});
    if (op.folded) {
        multiply_triangular(ds.transposed(), f.queries, b.da, {n, n, n}, {.lhs = upper, .out = lower});
    } else {
        multiply_triangular(ds.transposed(), f.queries, b.dkeys, {n, n, rank}, {.lhs = upper});
        multiply_triangular(b.dkeys, bh.weights_t(kKeys), b.da, {n, rank, n}, {.out = lower});
        multiply_triangular(f.a.transposed(), b.dkeys, bh.dweights(dweights, kKeys), {n, n, rank}, {.lhs = upper});
    }
    multiply_triangular(b.dqueries, bh.weights_t(kQueries), b.da.accumulated(), {n, rank, n},
                        {.lhs = keys_triangle, .out = lower});
    multiply_triangular(f.a.transposed(), b.dqueries, bh.dweights(dweights, kQueries), {n, n, rank},
                        {.lhs = upper, .rhs = keys_triangle});
    if (op.has_values) {
        multiply_triangular(b.dvalues, bh.weights_t(kValues), b.da.accumulated(), {n, n, n}, {.out = lower});
        multiply_triangular(f.a.transposed(), b.dvalues, bh.dweights(dweights, kValues), {n, n, n}, {.lhs = upper});
    }
    if (op.adds_source) bh.add(b.da, b.dp);
    if (op.softmax_source) {
        bh.softmax_backward(b.da, f.a, op.scale);
    } else {
        bh.scale_and_mask(b.da, op.scale);
    }
    multiply_triangular(b.da, k, f.out, {n, n, op.dim}, {.lhs = lower});
    bh.store_tokens(op.dq, f.out, op.dim);
    multiply_triangular(b.da.transposed(), q, f.out, {n, n, op.dim}, {.lhs = upper});
    bh.store_tokens(op.dk, f.out, op.dim);
}

template <class T>
RECATTN_TARGET void forward_batch_head(const BatchHead<T>& bh, float* memory) {
    const RefinedAttention<T>& op = bh.op;
    const int64_t n = bh.n;
    Arena arena(memory);
    const ForwardMatrices f(op, n, arena);
    const Lhs<float> q = as_lhs(bh.tokens(op.q), op.q.row_stride, n, op.dim, f.q.data);
    refine(bh, q, as_lhs(bh.tokens(op.k), op.k.row_stride, n, op.dim, f.out.data), f);
    const Rhs<float> v = as_rhs(bh.tokens(op.v), op.v.row_stride, n, op.value_dim, f.v.data);
    if (op.dropout) bh.drop(f.p, {}, f.keep, f.p);
    multiply_triangular(f.p, v, f.out, {n, n, op.value_dim}, {.lhs = bh.lower});
    bh.store_tokens(op.out, f.out, op.value_dim);
}

template <class T>
RECATTN_TARGET void backward_batch_head(const BatchHead<T>& bh, float* memory, float* dweights) {
    const RefinedAttention<T>& op = bh.op;
    const int64_t n = bh.n;
    Arena arena(memory);
    const ForwardMatrices f(op, n, arena);
    const BackwardMatrices b(op, n, arena);
    const Rhs<float> q = as_rhs(bh.tokens(op.q), op.q.row_stride, n, op.dim, f.q.data);
    const Rhs<float> k = as_rhs(bh.tokens(op.k), op.k.row_stride, n, op.dim, b.k.data);
    const Rhs<float> dout = as_rhs(bh.tokens(op.dout), op.dout.row_stride, n, op.value_dim, b.dout.data);
    refine(bh, {q.data, q.row_stride, 1}, {k.data, k.row_stride, 1}, f);
    transpose(as_lhs(bh.tokens(op.v), op.v.row_stride, n, op.value_dim, f.v.data), n, op.value_dim, b.vt.data,
              b.vt.row_stride);
    multiply_triangular({dout.data, dout.row_stride, 1}, b.vt, b.dp, {n, op.value_dim, n}, {.out = bh.lower});
    Matrix p = f.p;
    if (op.dropout) {
        p = b.da;  // not in use yet
        bh.drop(f.p, b.dp, f.keep, p);
    }
    multiply_triangular(p.transposed(), dout, f.out, {n, n, op.value_dim}, {.lhs = bh.upper});
    bh.store_tokens(op.dv, f.out, op.value_dim);
    refine_backward(bh, q, k, f, b, dweights);
}

// --- W_q W_kᵀ ---

// Rows begin..end of out [n, n] = w_q w_kᵀ, with w_q and w_k [n, rank]. Columns up to whole registers become zero.
inline RECATTN_TARGET void fold(const float* w_q, const float* w_k, int64_t n, int64_t rank, int64_t begin, int64_t end,
                                float* out, int64_t out_row_stride) {
    const int64_t width = round_up_to_lanes<float>(n);
    Scratch<float> w_k_t(rank * width);
    transpose(Lhs<float>{w_k, rank, 1}, n, rank, w_k_t.data(), width);
    multiply_in_blocks(Lhs<float>{w_q + begin * rank, rank, 1}, Rhs<float>{w_k_t.data(), width},
                       {out + begin * out_row_stride, out_row_stride, false}, end - begin, rank, width);
}

// Rows begin..end of out [n, rank] = dproduct w, with dproduct[i * row_stride + j * column_stride] and w [n, rank]. In
// float64: the terms are larger than their sums, and in float32 this would be the largest error of all.
inline RECATTN_TARGET void unfold(const float* dproduct, int64_t row_stride, int64_t column_stride, const float* w,
                                  int64_t n, int64_t rank, int64_t begin, int64_t end, double* out) {
    const int64_t width = unfolded_row_stride(rank);
    Scratch<double> lhs((end - begin) * n), rhs(n * width);
    for (int64_t i = begin; i < end; ++i) {
        for (int64_t j = 0; j < n; ++j) lhs.data()[(i - begin) * n + j] = dproduct[i * row_stride + j * column_stride];
    }
    for (int64_t j = 0; j < n; ++j) copy_row(w + j * rank, rank, rhs.data() + j * width);
    multiply_in_blocks(Lhs<double>{lhs.data(), n, 1}, Rhs<double>{rhs.data(), width},
                       {out + begin * width, width, false}, end - begin, n, width);
}

// --- Tasks ---

// out of the (batch, head) indices begin..end.
template <class T>
RECATTN_TARGET void refined_forward(const RefinedAttention<T>& op, int64_t begin, int64_t end) {
    Arena sizes(nullptr);
    ForwardMatrices(op, op.positions, sizes);
    Scratch<float> memory(sizes.used());
    for (int64_t index = begin; index < end; ++index) forward_batch_head(BatchHead<T>(op, index), memory.data());
}

// Groups begin..end. Each group sums dW in its own part of `dweights`, so that the bits do not depend on the threads.
template <class T>
RECATTN_TARGET void refined_backward(const RefinedAttention<T>& op, const Groups& groups, int64_t begin, int64_t end,
                                     float* dweights) {
    Arena sizes(nullptr);
    ForwardMatrices(op, op.positions, sizes);
    BackwardMatrices(op, op.positions, sizes);
    Scratch<float> memory(sizes.used());
    for (int64_t group = begin; group < end; ++group) {
        float* partial = dweights + group * op.weights.size();
        std::fill_n(partial, op.weights.size(), 0.0f);
        for (int64_t index = groups.start(group); index < groups.start(group + 1); ++index) {
            backward_batch_head(BatchHead<T>(op, index), memory.data(), partial);
        }
    }
}

}  // namespace
}  // namespace recattn::RECATTN_ISA

// The middle factor of LREA and its gradients, for one instruction set (see foreach_isa.h).
//
//   y  = leaky_relu(z W) W^T             z, y [R, r], W [r, L]; row i uses its first lengths[i] columns
//   ds = (dy W) * leaky_relu'(z W)       [R, L]
//   dz = ds W^T
//   dW = z^T ds + dy^T leaky_relu(z W)
//
// A block is kBlockRows rows of z by kBlockColumns columns of W; its scores stay in the L1 cache. One task of the
// forward is a range of row blocks. One task of the backward is every kGroups-th row block, with its own sum of dW.

#include "cpu/simd/matmul.h"

namespace recattn::RECATTN_ISA {

// Memory for one block.
template <class A>
struct MiddleFactorScratch {
    Scratch<A> z, dy, scores, gradients, sum;

    RECATTN_TARGET MiddleFactorScratch(int64_t rank, int64_t width)
        : z(kBlockRows * rank),
          dy(kBlockRows * rank),
          scores(kBlockRows * kBlockColumns),
          gradients(kBlockRows * kBlockColumns),
          sum(kBlockRows * width) {}
};

template <class A>
RECATTN_INLINE void gather_rows(const A* in, const int64_t* rows, int64_t count, int64_t rank, A* out) {
    for (int64_t m = 0; m < count; ++m) std::copy_n(in + rows[m] * rank, rank, out + m * rank);
}

template <class A>
RECATTN_INLINE void scatter_rows(const A* in, int64_t in_row_stride, const int64_t* rows, int64_t count, int64_t rank,
                                 A* out) {
    for (int64_t m = 0; m < count; ++m) std::copy_n(in + m * in_row_stride, rank, out + rows[m] * rank);
}

// Zeros the scores at and after each row's length. The scores begin at column `first` of W.
template <class A>
RECATTN_INLINE void mask_columns(A* scores, const int64_t* lengths, int64_t count, int64_t first) {
    for (int64_t m = count - 1; m >= 0 && lengths[m] < first + kBlockColumns; --m) {  // lengths descend
        const int64_t seen = std::max<int64_t>(0, lengths[m] - first);
        std::fill(scores + m * kBlockColumns + seen, scores + (m + 1) * kBlockColumns, A(0));
    }
}

// y of the row blocks begin..end.
template <class A>
RECATTN_TARGET void middle_factor_forward(const MiddleFactor<A>& op, int64_t begin, int64_t end) {
    MiddleFactorScratch<A> scratch(op.rank, op.width);
    const int64_t width = op.width;
    const A slope = op.negative_slope;
    A *z = scratch.z.data(), *scores = scratch.scores.data(), *y = scratch.sum.data();
    for (int64_t block = begin; block < end; ++block) {
        const int64_t *rows = op.order + block * kBlockRows, *lengths = op.lengths + block * kBlockRows;
        const int64_t count = std::min(kBlockRows, op.rows - block * kBlockRows);
        gather_rows(op.z, rows, count, op.rank, z);
        std::fill_n(y, count * width, A(0));
        for (int64_t c = 0; c < lengths[0]; c += kBlockColumns) {
            multiply<RECATTN_TILE_ROWS>(Lhs<A>{z, op.rank, 1}, Rhs<A>{op.w + c, op.w_row_stride},
                                        {scores, kBlockColumns, false}, count, op.rank, kBlockColumns);
            for (int64_t i = 0; i < count * kBlockColumns; ++i) {
                scores[i] = scores[i] > A(0) ? scores[i] : scores[i] * slope;
            }
            mask_columns(scores, lengths, count, c);
            multiply<RECATTN_TILE_ROWS>(Lhs<A>{scores, kBlockColumns, 1}, Rhs<A>{op.w_transposed + c * width, width},
                                        {y, width, true}, count, kBlockColumns, width);
        }
        scatter_rows(y, width, rows, count, op.rank, op.y);
    }
}

// dz of the row blocks begin, begin + stride, ... and their sum of dW [r, w_row_stride].
template <class A>
RECATTN_TARGET void middle_factor_backward(const MiddleFactor<A>& op, int64_t begin, int64_t stride, A* dw) {
    MiddleFactorScratch<A> scratch(op.rank, op.width);
    const int64_t width = op.width;
    const A slope = op.negative_slope;
    A *z = scratch.z.data(), *dy = scratch.dy.data(), *dz = scratch.sum.data();
    A *weights = scratch.scores.data(), *ds = scratch.gradients.data();
    for (int64_t block = begin; block * kBlockRows < op.rows; block += stride) {
        const int64_t *rows = op.order + block * kBlockRows, *lengths = op.lengths + block * kBlockRows;
        const int64_t count = std::min(kBlockRows, op.rows - block * kBlockRows);
        gather_rows(op.z, rows, count, op.rank, z);
        gather_rows(op.dy, rows, count, op.rank, dy);
        std::fill_n(dz, count * width, A(0));
        for (int64_t c = 0; c < lengths[0]; c += kBlockColumns) {
            const Rhs<A> w{op.w + c, op.w_row_stride};
            multiply<RECATTN_TILE_ROWS>(Lhs<A>{z, op.rank, 1}, w, {weights, kBlockColumns, false}, count, op.rank,
                                        kBlockColumns);
            multiply<RECATTN_TILE_ROWS>(Lhs<A>{dy, op.rank, 1}, w, {ds, kBlockColumns, false}, count, op.rank,
                                        kBlockColumns);
            for (int64_t i = 0; i < count * kBlockColumns; ++i) {
                const A derivative = weights[i] > A(0) ? A(1) : slope;
                weights[i] *= derivative;
                ds[i] *= derivative;
            }
            mask_columns(weights, lengths, count, c);
            mask_columns(ds, lengths, count, c);
            multiply<RECATTN_TILE_ROWS>(Lhs<A>{ds, kBlockColumns, 1}, Rhs<A>{op.w_transposed + c * width, width},
                                        {dz, width, true}, count, kBlockColumns, width);
            const Out<A> dw_columns{dw + c, op.w_row_stride, true};
            multiply<RECATTN_TILE_ROWS>(Lhs<A>{z, 1, op.rank}, Rhs<A>{ds, kBlockColumns}, dw_columns, op.rank, count,
                                        kBlockColumns);
            multiply<RECATTN_TILE_ROWS>(Lhs<A>{dy, 1, op.rank}, Rhs<A>{weights, kBlockColumns}, dw_columns, op.rank,
                                        count, kBlockColumns);
        }
        scatter_rows(dz, width, rows, count, op.rank, op.dz);
    }
}

}  // namespace recattn::RECATTN_ISA

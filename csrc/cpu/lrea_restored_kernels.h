// lrea_attention (the restored form of LREA) and its gradients, for one instruction set (see foreach_isa.h).
//
//   z   = scale * q keys^T               q [R, d], keys [r, d] of the row's user and head
//   y   = leaky_relu(z W) W^T            W [r, L]; row i uses its first length_i columns
//   out = y values                       values [r, dv]
//
//   dy = dout values^T
//   ds = (dy W) * leaky_relu'(z W)       [R, L]
//   dz = scale * ds W^T
//   dq = dz keys,  dkeys = dz^T q,  dvalues = y^T dout
//   dW = z^T ds + dy^T leaky_relu(z W)
//
// Rows are the targets of each head, users with the longest history first. A block is kBlockRows rows by kBlockColumns
// columns of W; its scores stay in the L1 cache. One task of the forward is a range of row blocks. The backward has two
// kinds of task: every kGroups-th row block, with its own sum of dW; then a range of users and heads, for dkeys and
// dvalues.

#include "cpu/simd/leaky_relu.h"
#include "cpu/simd/matmul.h"

namespace recattn::RECATTN_ISA {

// Memory for one block of rows. The rows of z, y, dy and dz are `width` wide, zero beyond r.
template <class A>
struct RestoredScratch {
    Scratch<A> z, y, scores, gradients, rows, matrix, transposed, output;
    int64_t lengths[kBlockRows];  // columns of W that each row sees, descending

    RECATTN_TARGET RestoredScratch(int64_t rank, int64_t width, int64_t columns)
        : z(kBlockRows * width),
          y(kBlockRows * width),
          scores(kBlockRows * kBlockColumns),
          gradients(kBlockRows * kBlockColumns),
          rows(std::max(kBlockRows, rank) * columns),
          matrix(rank * round_up_to_lanes<A>(columns)),
          transposed(columns * width),
          output(kBlockRows * round_up_to_lanes<A>(columns)) {}
};

// Zeros the scores at and after each row's length. The scores begin at column `first` of W.
template <class A>
RECATTN_INLINE void mask_columns(A* scores, const int64_t* lengths, int64_t count, int64_t first) {
    for (int64_t m = count - 1; m >= 0 && lengths[m] < first + kBlockColumns; --m) {  // lengths descend
        const int64_t seen = std::max<int64_t>(0, lengths[m] - first);
        std::fill(scores + m * kBlockColumns + seen, scores + (m + 1) * kBlockColumns, A(0));
    }
}

// Calls function(segment, target, m, count) for each run of rows of one segment: `count` rows from the segment's
// `target` on, which are rows m, m + 1, ... of begin..end.
template <class T, class Function>
RECATTN_INLINE void for_each_run(const RestoredAttention<T>& op, int64_t begin, int64_t end, const Function& function) {
    int64_t index = std::upper_bound(op.starts, op.starts + op.num_segments, begin) - op.starts - 1;
    for (int64_t row = begin; row < end; ++index) {
        const int64_t stop = std::min(end, op.starts[index + 1]);
        const Segment& segment = op.segments[index];
        if (row < stop) function(segment, segment.first_target + row - op.starts[index], row - begin, stop - row);
        row = std::max(row, stop);
    }
}

// out[m] = rows[m] matrix^T, `width` wide: rows of [T, H, columns], matrix [r, columns] of their user and head.
template <class T, class A>
RECATTN_TARGET void multiply_transposed(const RestoredAttention<T>& op, const TargetRows<const T>& rows,
                                        const UserMatrices<const T>& matrices, int64_t columns, int64_t begin,
                                        int64_t end, RestoredScratch<A>& scratch, A* out) {
    const int64_t width = op.width;
    for_each_run(op, begin, end, [&](const Segment& segment, int64_t target, int64_t m, int64_t count) RECATTN_TARGET {
        const T* matrix = matrices.at(segment.user, segment.head);
        A* transposed = scratch.transposed.data();
        transpose(as_lhs(matrix, matrices.row_stride, op.rank, columns, scratch.rows.data()), op.rank, columns,
                  transposed, width);
        const Lhs<A> lhs =
            as_lhs(rows.at(target, segment.head), rows.target_stride, count, columns, scratch.rows.data());
        multiply_in_blocks(lhs, Rhs<A>{transposed, width}, {out + m * width, width, false}, count, columns, width);
    });
}

// out[m] = in[m] matrix, with `in` as multiply_transposed writes it; stored as rows of [T, H, columns].
template <class T, class A>
RECATTN_TARGET void multiply_and_store(const RestoredAttention<T>& op, const A* in,
                                       const UserMatrices<const T>& matrices, int64_t columns, int64_t begin,
                                       int64_t end, RestoredScratch<A>& scratch, const TargetRows<T>& out) {
    const int64_t padded = round_up_to_lanes<A>(columns);
    A* output = scratch.output.data();
    for_each_run(op, begin, end, [&](const Segment& segment, int64_t target, int64_t m, int64_t count) RECATTN_TARGET {
        const Rhs<A> rhs = as_rhs(matrices.at(segment.user, segment.head), matrices.row_stride, op.rank, columns,
                                  scratch.matrix.data());
        multiply_in_blocks(Lhs<A>{in + m * op.width, op.width, 1}, rhs, {output, padded, false}, count, op.rank,
                           padded);
        for (int64_t i = 0; i < count; ++i) {
            copy_row(output + i * padded, columns, out.at(target + i, segment.head));
        }
    });
}

template <class T, class A>
RECATTN_TARGET void load_rows(const RestoredAttention<T>& op, const TargetRows<A>& in, int64_t begin, int64_t end,
                              A* out) {
    for_each_run(op, begin, end, [&](const Segment& segment, int64_t target, int64_t m, int64_t count) RECATTN_TARGET {
        for (int64_t i = 0; i < count; ++i) {
            copy_row(in.at(target + i, segment.head), op.rank, out + (m + i) * op.width);
        }
    });
}

template <class T, class A>
RECATTN_TARGET void store_rows(const RestoredAttention<T>& op, const A* in, int64_t begin, int64_t end,
                               const TargetRows<A>& out) {
    for_each_run(op, begin, end, [&](const Segment& segment, int64_t target, int64_t m, int64_t count) RECATTN_TARGET {
        for (int64_t i = 0; i < count; ++i) {
            copy_row(in + (m + i) * op.width, op.rank, out.at(target + i, segment.head));
        }
    });
}

template <class T, class A>
RECATTN_TARGET void load_lengths(const RestoredAttention<T>& op, int64_t begin, int64_t end,
                                 RestoredScratch<A>& scratch) {
    for_each_run(op, begin, end, [&](const Segment& segment, int64_t, int64_t m, int64_t count) RECATTN_TARGET {
        std::fill_n(scratch.lengths + m, count, segment.length);
    });
}

// y = leaky_relu(z W) W^T of `count` rows.
template <class T, class A>
RECATTN_TARGET void middle_factor(const RestoredAttention<T>& op, RestoredScratch<A>& scratch, int64_t count) {
    const int64_t width = op.width, *lengths = scratch.lengths;
    const A slope = op.negative_slope;
    A *z = scratch.z.data(), *scores = scratch.scores.data(), *y = scratch.y.data();
    std::fill_n(y, count * width, A(0));
    for (int64_t c = 0; c < lengths[0]; c += kBlockColumns) {
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{z, width, 1}, Rhs<A>{op.w + c, op.w_row_stride},
                                    {scores, kBlockColumns, false}, count, op.rank, kBlockColumns);
        for (int64_t i = 0; i < count * kBlockColumns; i += Vector<A>::lanes) {
            auto* score = reinterpret_cast<typename Vector<A>::type*>(scores + i);
            *score = leaky_relu(*score, slope);
        }
        mask_columns(scores, lengths, count, c);
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{scores, kBlockColumns, 1}, Rhs<A>{op.w_transposed + c * width, width},
                                    {y, width, true}, count, kBlockColumns, width);
    }
}

// dz of `count` rows and their part of dW [r, w_row_stride], from z and dy.
template <class T, class A>
RECATTN_TARGET void middle_factor_backward(const RestoredAttention<T>& op, RestoredScratch<A>& scratch, const A* dy,
                                           A* dz, int64_t count, A* dw) {
    const int64_t width = op.width, *lengths = scratch.lengths;
    const A slope = op.negative_slope;
    A *z = scratch.z.data(), *weights = scratch.scores.data(), *ds = scratch.gradients.data();
    std::fill_n(dz, count * width, A(0));
    for (int64_t c = 0; c < lengths[0]; c += kBlockColumns) {
        const Rhs<A> w{op.w + c, op.w_row_stride};
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{z, width, 1}, w, {weights, kBlockColumns, false}, count, op.rank,
                                    kBlockColumns);
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{dy, width, 1}, w, {ds, kBlockColumns, false}, count, op.rank, kBlockColumns);
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
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{z, 1, width}, Rhs<A>{ds, kBlockColumns}, dw_columns, op.rank, count,
                                    kBlockColumns);
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{dy, 1, width}, Rhs<A>{weights, kBlockColumns}, dw_columns, op.rank, count,
                                    kBlockColumns);
    }
}

// out, z and y of the row blocks begin..end.
template <class T>
RECATTN_TARGET void restored_forward(const RestoredAttention<T>& op, int64_t begin, int64_t end) {
    using A = accumulate_t<T>;
    RestoredScratch<A> scratch(op.rank, op.width, std::max(op.dim, op.value_dim));
    A *z = scratch.z.data(), *y = scratch.y.data();
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kBlockRows, last = std::min(first + kBlockRows, op.rows);
        load_lengths(op, first, last, scratch);
        multiply_transposed(op, op.targets, op.keys, op.dim, first, last, scratch, z);
        for (int64_t i = 0; i < (last - first) * op.width; ++i) z[i] *= op.scale;
        store_rows(op, z, first, last, op.z);
        middle_factor(op, scratch, last - first);
        store_rows(op, y, first, last, op.y);
        multiply_and_store(op, y, op.values, op.value_dim, first, last, scratch, op.out);
    }
}

// dtargets and dz of the row blocks begin, begin + stride, ... and their sum of dW [r, w_row_stride].
template <class T>
RECATTN_TARGET void restored_backward_rows(const RestoredAttention<T>& op, int64_t begin, int64_t stride,
                                           accumulate_t<T>* dw) {
    using A = accumulate_t<T>;
    RestoredScratch<A> scratch(op.rank, op.width, std::max(op.dim, op.value_dim));
    Scratch<A> dz_rows(kBlockRows * op.width);
    A *dy = scratch.y.data(), *dz = dz_rows.data();
    for (int64_t block = begin; block * kBlockRows < op.rows; block += stride) {
        const int64_t first = block * kBlockRows, last = std::min(first + kBlockRows, op.rows);
        load_lengths(op, first, last, scratch);
        load_rows(op, op.z, first, last, scratch.z.data());
        multiply_transposed(op, op.dout, op.values, op.value_dim, first, last, scratch, dy);
        middle_factor_backward(op, scratch, dy, dz, last - first, dw);
        for (int64_t i = 0; i < (last - first) * op.width; ++i) dz[i] *= op.scale;
        store_rows(op, dz, first, last, op.dz);
        multiply_and_store(op, dz, op.keys, op.dim, first, last, scratch, op.dtargets);
    }
}

// out = sum over the segment's targets of weights [r] x rows [columns], in blocks of kSumBlock terms.
template <class T, class A>
RECATTN_TARGET void sum_outer_products(const RestoredAttention<T>& op, const Segment& segment, int64_t count,
                                       const TargetRows<A>& weights, const TargetRows<const T>& rows, int64_t columns,
                                       A* scratch, A* sum, const UserMatrices<T>& out) {
    const int64_t padded = round_up_to_lanes<A>(columns), last = segment.first_target + count;
    std::fill_n(sum, op.rank * padded, A(0));
    for (int64_t target = segment.first_target; target < last; target += kSumBlock) {
        const int64_t terms = std::min(kSumBlock, last - target);
        const Rhs<A> rhs = as_rhs(rows.at(target, segment.head), rows.target_stride, terms, columns, scratch);
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{weights.at(target, segment.head), 1, weights.target_stride}, rhs,
                                    {sum, padded, true}, op.rank, terms, padded);
    }
    for (int64_t k = 0; k < op.rank; ++k) {
        copy_row(sum + k * padded, columns, out.at(segment.user, segment.head) + k * out.row_stride);
    }
}

// dkeys and dvalues of the segments begin..end.
template <class T>
RECATTN_TARGET void restored_backward_users(const RestoredAttention<T>& op, int64_t begin, int64_t end) {
    using A = accumulate_t<T>;
    const int64_t padded = round_up_to_lanes<A>(std::max(op.dim, op.value_dim));
    Scratch<A> rows(kSumBlock * padded), sum(op.rank * padded);
    for (int64_t index = begin; index < end; ++index) {
        const Segment& segment = op.segments[index];
        const int64_t count = op.starts[index + 1] - op.starts[index];
        sum_outer_products(op, segment, count, op.dz, op.targets, op.dim, rows.data(), sum.data(), op.dkeys);
        sum_outer_products(op, segment, count, op.y, op.dout, op.value_dim, rows.data(), sum.data(), op.dvalues);
    }
}

}  // namespace recattn::RECATTN_ISA

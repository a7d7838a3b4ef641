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
// Rows are the targets of each head, users with the longest history first. A row block is whole segments (all targets
// of a user and head) of up to kBlockRows rows, or a part of one longer segment. One task is a row block in the
// forward; in the backward every num_groups-th row block, with its own sum of dW. Scores come in tiles of kBlockColumns
// columns, which stay in the L1 cache. W and dW are stored tile by tile. dkeys and dvalues of segments that no row
// block holds whole are summed afterwards, a segment a task.

#include "cpu/simd/leaky_relu.h"
#include "cpu/simd/matmul.h"
#include "cpu/simd/rows.h"

namespace recattn::RECATTN_ISA {
namespace {

// W as tiles [r, kBlockColumns], and as their transposes [kBlockColumns, width]: zero beyond L and r. The memory comes
// zeroed.
template <class T>
RECATTN_TARGET void pack_w(const T* w, int64_t row_stride, int64_t column_stride, int64_t rank, int64_t columns,
                           accumulate_t<T>* tiles, accumulate_t<T>* transposed, int64_t width) {
    for (int64_t c = 0; c < columns; c += kBlockColumns) {
        const int64_t count = std::min(kBlockColumns, columns - c);
        accumulate_t<T>* tile = tiles + c * rank;
        for (int64_t k = 0; k < rank; ++k) {
            const T* in = w + k * row_stride + c * column_stride;
            accumulate_t<T>* row = tile + k * kBlockColumns;
            if (column_stride == 1) {
                copy_row(in, count, row);
            } else {
                for (int64_t i = 0; i < count; ++i) row[i] = static_cast<accumulate_t<T>>(in[i * column_stride]);
            }
        }
        transpose(Lhs<accumulate_t<T>>{tile, kBlockColumns, 1}, rank, kBlockColumns, transposed + c * width, width);
    }
}

// Memory for one row block. The rows of z, y, dy and dz are `width` wide, zero beyond r.
template <class A>
struct RestoredScratch {
    Scratch<A> z, y, dz, scores, gradients, rows, matrix, transposed, output;
    int64_t lengths[kBlockRows];  // columns of W that each row sees, descending

    RECATTN_TARGET RestoredScratch(int64_t rank, int64_t width, int64_t columns, int64_t max_rows = kBlockRows)
        : z(kBlockRows * width),
          y(kBlockRows * width),
          dz(kBlockRows * width),
          scores(kBlockRows * kBlockColumns),
          gradients(kBlockRows * kBlockColumns),
          rows(std::max(max_rows, rank) * round_up_to_lanes<A>(columns)),
          matrix(rank * round_up_to_lanes<A>(columns)),
          transposed(columns * width),
          output(std::max(kBlockRows, rank) * round_up_to_lanes<A>(columns)) {}
};

// Calls function(segment, target, m, count) for each segment of a row block: `count` rows from the segment's `target`
// on, which are rows m, m + 1, ... of the block.
template <class T, class Function>
RECATTN_INLINE void for_each_run(const RestoredAttention<T>& op, const RowBlock& block, const Function& function) {
    int64_t m = 0;
    for (int64_t index = block.first_segment; index < block.end_segment; ++index) {
        const Segment& segment = op.segments[index];
        const int64_t count = std::min(segment.count - block.skipped, block.rows - m);
        function(segment, segment.first_target + block.skipped, m, count);
        m += count;
    }
}

// out[m] = rows[m] matrix^T, `width` wide: rows of [T, H, columns], matrix [r, columns] of their user and head.
template <class T, class A>
RECATTN_TARGET void multiply_transposed(const RestoredAttention<T>& op, const TargetRows<const T>& rows,
                                        const UserMatrices<const T>& matrices, int64_t columns, const RowBlock& block,
                                        RestoredScratch<A>& scratch, A* out) {
    const int64_t width = op.width;
    for_each_run(op, block, [&](const Segment& segment, int64_t target, int64_t m, int64_t count) RECATTN_TARGET {
        if (count == 0) return;
        const T* matrix = matrices.at(segment.user, segment.head);
        A* transposed = scratch.transposed.data();
        transpose(as_lhs(matrix, matrices.row_stride, op.rank, columns, scratch.rows.data()), op.rank, columns,
                  transposed, width);
        const Lhs<A> lhs =
            as_lhs(rows.at(target, segment.head), rows.target_stride, count, columns, scratch.rows.data());
        multiply_in_blocks(lhs, Rhs<A>{transposed, width}, {out + m * width, width, false}, count, columns,
                           round_up_to_lanes<A>(op.rank));
    });
}

// out[m] = in[m] matrix, with `in` as multiply_transposed writes it; stored as rows of [T, H, columns].
template <class T, class A>
RECATTN_TARGET void multiply_and_store(const RestoredAttention<T>& op, const A* in,
                                       const UserMatrices<const T>& matrices, int64_t columns, const RowBlock& block,
                                       RestoredScratch<A>& scratch, const TargetRows<T>& out) {
    for_each_run(op, block, [&](const Segment& segment, int64_t target, int64_t m, int64_t count) RECATTN_TARGET {
        const Rhs<A> rhs = as_rhs(matrices.at(segment.user, segment.head), matrices.row_stride, op.rank, columns,
                                  scratch.matrix.data());
        multiply_to(Lhs<A>{in + m * op.width, op.width, 1}, rhs, out.at(target, segment.head), out.target_stride, count,
                    op.rank, columns, scratch.output.data());
    });
}

template <class T, class A>
RECATTN_TARGET void load_rows(const RestoredAttention<T>& op, const TargetRows<A>& in, const RowBlock& block, A* out) {
    for_each_run(op, block, [&](const Segment& segment, int64_t target, int64_t m, int64_t count) RECATTN_TARGET {
        for (int64_t i = 0; i < count; ++i) {
            copy_row(in.at(target + i, segment.head), op.rank, out + (m + i) * op.width);
        }
    });
}

template <class T, class A>
RECATTN_TARGET void store_rows(const RestoredAttention<T>& op, const A* in, const RowBlock& block,
                               const TargetRows<A>& out) {
    for_each_run(op, block, [&](const Segment& segment, int64_t target, int64_t m, int64_t count) RECATTN_TARGET {
        for (int64_t i = 0; i < count; ++i) {
            copy_row(in + (m + i) * op.width, op.rank, out.at(target + i, segment.head));
        }
    });
}

template <class T, class A>
RECATTN_TARGET void load_lengths(const RestoredAttention<T>& op, const RowBlock& block, RestoredScratch<A>& scratch) {
    for_each_run(op, block, [&](const Segment& segment, int64_t, int64_t m, int64_t count) RECATTN_TARGET {
        std::fill_n(scratch.lengths + m, count, segment.length);
    });
}

template <class A>
RECATTN_INLINE void scale_rows(A* rows, int64_t size, A scale) {
    for (int64_t i = 0; i < size; ++i) rows[i] *= scale;
}

// Zeros the scores of a tile at and after each row's length, up to `end`. The tile begins at column `first` of W.
template <class A>
RECATTN_INLINE void mask_columns(A* scores, const int64_t* lengths, int64_t count, int64_t first, int64_t end) {
    for (int64_t m = count - 1; m >= 0 && lengths[m] < first + end; --m) {  // lengths descend
        const int64_t seen = std::max<int64_t>(0, lengths[m] - first);
        std::fill(scores + m * kBlockColumns + seen, scores + m * kBlockColumns + end, A(0));
    }
}

// Calls function(tile, transposed, c, seen, columns) for each tile of W that the longest row sees: its first column c,
// the number of columns seen, and that number in whole registers.
template <class T, class A, class Function>
RECATTN_INLINE void for_each_tile(const RestoredAttention<T>& op, const RestoredScratch<A>& scratch, int64_t count,
                                  const Function& function) {
    const int64_t longest = count > 0 ? scratch.lengths[0] : 0;
    for (int64_t c = 0; c < longest; c += kBlockColumns) {
        const int64_t seen = std::min(kBlockColumns, longest - c);
        function(Rhs<A>{op.w + c * op.rank, kBlockColumns}, Rhs<A>{op.w_transposed + c * op.width, op.width}, c, seen,
                 round_up_to_lanes<A>(seen));
    }
}

// y = leaky_relu(z W) W^T of `count` rows.
template <class T, class A>
RECATTN_TARGET void middle_factor(const RestoredAttention<T>& op, RestoredScratch<A>& scratch, int64_t count) {
    using Vec = typename Vector<A>::type;
    const int64_t width = op.width;
    const A slope = op.negative_slope;
    A *z = scratch.z.data(), *scores = scratch.scores.data(), *y = scratch.y.data();
    std::fill_n(y, count * width, A(0));
    const auto multiply_tile_of_w = [&](Rhs<A> w, Rhs<A> w_transposed, int64_t c, int64_t seen,
                                        int64_t columns) RECATTN_TARGET {
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{z, width, 1}, w, {scores, kBlockColumns, false}, count, op.rank, columns);
        for (int64_t m = 0; m < count; ++m) {
            for (int64_t i = 0; i < columns; i += Vector<A>::lanes) {
                Vec* score = reinterpret_cast<Vec*>(scores + m * kBlockColumns + i);
                *score = leaky_relu(*score, slope);
            }
        }
        mask_columns(scores, scratch.lengths, count, c, columns);
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{scores, kBlockColumns, 1}, w_transposed, {y, width, true}, count, seen,
                                    round_up_to_lanes<A>(op.rank));
    };
    for_each_tile(op, scratch, count, multiply_tile_of_w);
}

// dz of `count` rows and their part of dW, from z and dy.
template <class T, class A>
RECATTN_TARGET void middle_factor_backward(const RestoredAttention<T>& op, RestoredScratch<A>& scratch, const A* dy,
                                           int64_t count, A* dw) {
    using Vec = typename Vector<A>::type;
    const int64_t width = op.width;
    const Vec one = Vec{} + A(1), slope = Vec{} + op.negative_slope;
    A *z = scratch.z.data(), *dz = scratch.dz.data(), *weights = scratch.scores.data(), *ds = scratch.gradients.data();
    std::fill_n(dz, count * width, A(0));
    const auto differentiate_tile = [&](Rhs<A> w, Rhs<A> w_transposed, int64_t c, int64_t seen,
                                        int64_t columns) RECATTN_TARGET {
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{z, width, 1}, w, {weights, kBlockColumns, false}, count, op.rank, columns);
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{dy, width, 1}, w, {ds, kBlockColumns, false}, count, op.rank, columns);
        for (int64_t m = 0; m < count; ++m) {
            for (int64_t i = 0; i < columns; i += Vector<A>::lanes) {
                Vec* weight = reinterpret_cast<Vec*>(weights + m * kBlockColumns + i);
                Vec* gradient = reinterpret_cast<Vec*>(ds + m * kBlockColumns + i);
                const Vec derivative = *weight > A(0) ? one : slope;
                *weight *= derivative;
                *gradient *= derivative;
            }
        }
        mask_columns(weights, scratch.lengths, count, c, columns);
        mask_columns(ds, scratch.lengths, count, c, columns);
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{ds, kBlockColumns, 1}, w_transposed, {dz, width, true}, count, seen,
                                    round_up_to_lanes<A>(op.rank));
        const Out<A> dw_tile{dw + c * op.rank, kBlockColumns, true};
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{z, 1, width}, Rhs<A>{ds, kBlockColumns}, dw_tile, op.rank, count, columns);
        multiply<RECATTN_TILE_ROWS>(Lhs<A>{dy, 1, width}, Rhs<A>{weights, kBlockColumns}, dw_tile, op.rank, count,
                                    columns);
    };
    for_each_tile(op, scratch, count, differentiate_tile);
}

// out, z and y of one row block after another, as the threads take them.
template <class T>
RECATTN_TARGET void restored_forward(const RestoredAttention<T>& op, std::atomic<int64_t>& next) {
    using A = accumulate_t<T>;
    RestoredScratch<A> scratch(op.rank, op.width, std::max(op.dim, op.value_dim));
    A *z = scratch.z.data(), *y = scratch.y.data();
    for (int64_t index; (index = next++) < op.num_blocks;) {
        const RowBlock& block = op.blocks[index];
        load_lengths(op, block, scratch);
        multiply_transposed(op, op.targets, op.keys, op.dim, block, scratch, z);
        scale_rows(z, block.rows * op.width, op.scale);
        store_rows(op, z, block, op.z);
        middle_factor(op, scratch, block.rows);
        store_rows(op, y, block, op.y);
        multiply_and_store(op, y, op.values, op.value_dim, block, scratch, op.out);
    }
}

// out [r, columns] = sum over `count` targets of weights[target] x rows[target], in blocks of kSumBlock terms.
template <class T, class A>
RECATTN_TARGET void sum_outer_products(const RestoredAttention<T>& op, const Segment& segment, Lhs<A> weights,
                                       const TargetRows<const T>& rows, int64_t columns, RestoredScratch<A>& scratch,
                                       const UserMatrices<T>& out) {
    const Rhs<A> rhs = as_rhs(rows.at(segment.first_target, segment.head), rows.target_stride, segment.count, columns,
                              scratch.rows.data());
    multiply_to(weights, rhs, out.at(segment.user, segment.head), out.row_stride, op.rank, segment.count, columns,
                scratch.output.data());
}

// dtargets of the row blocks begin, begin + num_groups, ..., their sum of dW, and dkeys and dvalues of whole segments;
// dz of the others.
template <class T>
RECATTN_TARGET void restored_backward_rows(const RestoredAttention<T>& op, int64_t begin, accumulate_t<T>* dw) {
    using A = accumulate_t<T>;
    RestoredScratch<A> scratch(op.rank, op.width, std::max(op.dim, op.value_dim));
    A *dy = scratch.y.data(), *dz = scratch.dz.data();
    std::fill_n(dw, op.dw_size(begin), A(0));
    for (int64_t index = begin; index < op.num_blocks; index += op.num_groups) {
        const RowBlock& block = op.blocks[index];
        load_lengths(op, block, scratch);
        load_rows(op, op.z, block, scratch.z.data());
        multiply_transposed(op, op.dout, op.values, op.value_dim, block, scratch, dy);
        middle_factor_backward(op, scratch, dy, block.rows, dw);
        scale_rows(dz, block.rows * op.width, op.scale);
        multiply_and_store(op, dz, op.keys, op.dim, block, scratch, op.dtargets);
        if (!block.is_whole) {
            store_rows(op, dz, block, op.dz);
            continue;
        }
        for_each_run(op, block, [&](const Segment& segment, int64_t target, int64_t m, int64_t) RECATTN_TARGET {
            const Lhs<A> y{op.y.at(target, segment.head), 1, op.y.target_stride};
            sum_outer_products(op, segment, Lhs<A>{dz + m * op.width, 1, op.width}, op.targets, op.dim, scratch,
                               op.dkeys);
            sum_outer_products(op, segment, y, op.dout, op.value_dim, scratch, op.dvalues);
        });
    }
}

// dkeys and dvalues of one segment that no row block holds whole.
template <class T>
RECATTN_TARGET void restored_backward_segment(const RestoredAttention<T>& op, const Segment& segment) {
    using A = accumulate_t<T>;
    RestoredScratch<A> scratch(op.rank, op.width, std::max(op.dim, op.value_dim), segment.count);
    const Lhs<A> dz{op.dz.at(segment.first_target, segment.head), 1, op.dz.target_stride};
    const Lhs<A> y{op.y.at(segment.first_target, segment.head), 1, op.y.target_stride};
    sum_outer_products(op, segment, dz, op.targets, op.dim, scratch, op.dkeys);
    sum_outer_products(op, segment, y, op.dout, op.value_dim, scratch, op.dvalues);
}

}  // namespace
}  // namespace recattn::RECATTN_ISA

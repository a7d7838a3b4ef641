// Matrix products that skip the zero triangle of a causal matrix, for one instruction set (see foreach_isa.h).
//
//   out[m, n] (+)= sum_k lhs[m, k] rhs[k, n]
//
// For each register tile of `out`, the sum runs only over the k for which both operands may differ from zero. Needs
// matmul.h. No include guard.

namespace recattn::RECATTN_ISA {

// Where an operand may differ from zero, or where the result is needed: everywhere, up to the diagonal, or from it on.
enum class Triangle { full, lower, upper };

struct Triangles {
    Triangle lhs = Triangle::full, rhs = Triangle::full, out = Triangle::full;
};

struct Sizes {
    int64_t rows, depth, columns;
};

// One register tile, its sum in blocks of kSumBlock terms.
template <int M, int V>
RECATTN_INLINE void multiply_tile_in_blocks(Lhs<float> lhs, Rhs<float> rhs, Out<float> out, int64_t depth) {
    for_each_sum_block(lhs, rhs, out, depth,
                       [](Lhs<float> lhs_block, Rhs<float> rhs_block, Out<float> sum, int64_t terms)
                           RECATTN_TARGET { multiply_tile<M, V>(lhs_block, rhs_block, sum, terms); });
}

// M rows of `out` from `row` on, columns column..end, terms first..last of the sum.
template <int M, int V>
RECATTN_INLINE void multiply_triangular_columns(Lhs<float> lhs, Rhs<float> rhs, Out<float> out, int64_t row,
                                                int64_t column, int64_t end, int64_t first, int64_t last,
                                                Triangles triangles) {
    constexpr int64_t step = V * Vector<float>::lanes;
    // A column of a causal p has its smallest numbers at the end: adding from there loses less to rounding.
    const bool backwards = triangles.lhs == Triangle::upper;
    for (; column + step <= end; column += step) {
        const int64_t from = triangles.rhs == Triangle::lower ? std::max(first, column) : first;
        const int64_t to = triangles.rhs == Triangle::upper ? std::min(last, column + step) : last;
        const int64_t start = backwards ? to - 1 : from, step_k = backwards ? -1 : 1;
        multiply_tile_in_blocks<M, V>(
            {lhs.data + row * lhs.row_stride + start * lhs.column_stride, lhs.row_stride, step_k * lhs.column_stride},
            {rhs.data + start * rhs.row_stride + column, step_k * rhs.row_stride},
            {out.data + row * out.row_stride + column, out.row_stride, out.accumulate}, to - from);
    }
    if constexpr (V > 1) {
        multiply_triangular_columns<M, V - 1>(lhs, rhs, out, row, column, end, first, last, triangles);
    }
}

template <int M>
RECATTN_TARGET void multiply_triangular_rows(Lhs<float> lhs, Rhs<float> rhs, Out<float> out, int64_t row, Sizes size,
                                             Triangles triangles) {
    for (; row + M <= size.rows; row += M) {
        const int64_t first = triangles.lhs == Triangle::upper ? row : 0;
        const int64_t last = triangles.lhs == Triangle::lower ? std::min(size.depth, row + M) : size.depth;
        const int64_t columns = round_up_to_lanes<float>(size.columns);
        const int64_t end =
            triangles.out == Triangle::lower ? std::min(columns, round_up_to_lanes<float>(row + M)) : columns;
        multiply_triangular_columns<M, RECATTN_TILE_VECTORS>(lhs, rhs, out, row, 0, end, first, last, triangles);
        for (int64_t m = row; m < row + M && !out.accumulate; ++m) {
            std::fill(out.data + m * out.row_stride + end, out.data + m * out.row_stride + columns, 0.0f);
        }
    }
    if constexpr (M > 1) multiply_triangular_rows<M == 6 ? 4 : M / 2>(lhs, rhs, out, row, size, triangles);
}

// out (+)= lhs rhs, in whole registers: `columns` is rounded up to the lanes. Entries of `out` outside its triangle
// hold any finite number.
RECATTN_TARGET inline void multiply_triangular(Lhs<float> lhs, Rhs<float> rhs, Out<float> out, Sizes size,
                                               Triangles triangles) {
    multiply_triangular_rows<RECATTN_TILE_ROWS>(lhs, rhs, out, 0, size, triangles);
}

}  // namespace recattn::RECATTN_ISA

// Products and transposes of small matrices for one instruction set (see foreach_isa.h). No include guard. Matrices are
// row-major; a "row stride" counts elements.

namespace recattn::RECATTN_ISA {

template <class A>
struct Vector {
    typedef A type __attribute__((vector_size(RECATTN_VECTOR_BYTES), aligned(alignof(A)), may_alias));
    static constexpr int64_t lanes = RECATTN_VECTOR_BYTES / sizeof(A);
};

template <class A>
RECATTN_INLINE int64_t round_up_to_lanes(int64_t size) {
    return (size + Vector<A>::lanes - 1) / Vector<A>::lanes * Vector<A>::lanes;
}

// a[m, k] = data[m * row + k * column]: read by scalars, so any layout will do.
template <class A>
struct Left {
    const A* data;
    int64_t row, column;
};

template <class A>
struct Right {
    const A* data;
    int64_t row;
};

template <class A>
struct Product {
    A* data;
    int64_t row;
    bool accumulate;
};

// out[m, n] (+)= sum_k a[m, k] b[k, n] for M rows and V registers of columns.
template <int M, int V, class A>
RECATTN_INLINE void multiply_tile(Left<A> a, Right<A> b, Product<A> out, int64_t depth) {
    using Vec = typename Vector<A>::type;
    constexpr int64_t lanes = Vector<A>::lanes;
    Vec acc[M][V];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            acc[m][v] = out.accumulate ? *reinterpret_cast<const Vec*>(out.data + m * out.row + v * lanes) : Vec{};
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vec row[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) row[v] = *reinterpret_cast<const Vec*>(b.data + k * b.row + v * lanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const A scalar = a.data[m * a.row + k * a.column];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[m][v] += scalar * row[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) *reinterpret_cast<Vec*>(out.data + m * out.row + v * lanes) = acc[m][v];
    }
}

// The same for any number of columns, a multiple of the lanes.
template <int M, int V, class A>
RECATTN_INLINE void multiply_columns(Left<A> a, Right<A> b, Product<A> out, int64_t depth, int64_t columns) {
    constexpr int64_t step = V * Vector<A>::lanes;
    for (; columns >= step; columns -= step, b.data += step, out.data += step) multiply_tile<M, V>(a, b, out, depth);
    if constexpr (V > 1) multiply_columns<M, V / 2>(a, b, out, depth, columns);
}

// The same for any number of rows too.
template <int M, class A>
RECATTN_TARGET void multiply(Left<A> a, Right<A> b, Product<A> out, int64_t rows, int64_t depth, int64_t columns) {
    for (; rows >= M; rows -= M, a.data += M * a.row, out.data += M * out.row) {
        multiply_columns<M, RECATTN_TILE_VECTORS>(a, b, out, depth, columns);
    }
    if constexpr (M > 1) multiply<M / 2>(a, b, out, rows, depth, columns);
}

// out[n, m] = in[m, n] for a block of 4 x 4, by two rounds of pairwise interleaving.
template <class A>
RECATTN_INLINE void transpose_block(const A* in, int64_t in_row, A* out, int64_t out_row) {
    typedef A Quad __attribute__((vector_size(4 * sizeof(A)), aligned(alignof(A)), may_alias));
    const Quad a = *reinterpret_cast<const Quad*>(in), b = *reinterpret_cast<const Quad*>(in + in_row);
    const Quad c = *reinterpret_cast<const Quad*>(in + 2 * in_row), d = *reinterpret_cast<const Quad*>(in + 3 * in_row);
    const Quad ab_low = {a[0], b[0], a[1], b[1]}, ab_high = {a[2], b[2], a[3], b[3]};
    const Quad cd_low = {c[0], d[0], c[1], d[1]}, cd_high = {c[2], d[2], c[3], d[3]};
    *reinterpret_cast<Quad*>(out) = Quad{ab_low[0], ab_low[1], cd_low[0], cd_low[1]};
    *reinterpret_cast<Quad*>(out + out_row) = Quad{ab_low[2], ab_low[3], cd_low[2], cd_low[3]};
    *reinterpret_cast<Quad*>(out + 2 * out_row) = Quad{ab_high[0], ab_high[1], cd_high[0], cd_high[1]};
    *reinterpret_cast<Quad*>(out + 3 * out_row) = Quad{ab_high[2], ab_high[3], cd_high[2], cd_high[3]};
}

// out[n, m] = in[m, n]
template <class A>
RECATTN_TARGET void transpose(Left<A> in, int64_t rows, int64_t columns, A* out, int64_t out_row) {
    const int64_t block_rows = rows / 4 * 4, block_columns = columns / 4 * 4;
    for (int64_t n = 0; n < block_columns; n += 4) {
        for (int64_t m = 0; m < block_rows; m += 4) {
            transpose_block(in.data + m * in.row + n, in.row, out + n * out_row + m, out_row);
        }
    }
    for (int64_t m = 0; m < rows; ++m) {
        for (int64_t n = m < block_rows ? block_columns : 0; n < columns; ++n)
            out[n * out_row + m] = in.data[m * in.row + n];
    }
}

template <class To, class From>
RECATTN_INLINE void copy_row(const From* in, int64_t size, To* out) {
    for (int64_t i = 0; i < size; ++i) out[i] = static_cast<To>(in[i]);
}

// `rows` rows to read by scalars: where they lie if the type is the accumulator's, else converted.
template <class T, class A>
RECATTN_TARGET Left<A> as_left(const T* in, int64_t in_row, int64_t rows, int64_t columns, A* scratch) {
    if constexpr (std::is_same_v<T, A>) {
        return {in, in_row, 1};
    } else {
        for (int64_t m = 0; m < rows; ++m) copy_row(in + m * in_row, columns, scratch + m * columns);
        return {scratch, columns, 1};
    }
}

// `rows` rows that registers may read whole: where they lie if that is so, else copied and padded with zeros.
template <class T, class A>
RECATTN_TARGET Right<A> as_right(const T* in, int64_t in_row, int64_t rows, int64_t columns, A* scratch) {
    const int64_t padded = round_up_to_lanes<A>(columns);
    if constexpr (std::is_same_v<T, A>) {
        if (columns == padded) return {in, in_row};
    }
    for (int64_t m = 0; m < rows; ++m) {
        copy_row(in + m * in_row, columns, scratch + m * padded);
        std::fill(scratch + m * padded + columns, scratch + (m + 1) * padded, A(0));
    }
    return {scratch, padded};
}

}  // namespace recattn::RECATTN_ISA

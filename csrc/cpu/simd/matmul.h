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

// What the factors of a product consist of: here of numbers of its own type.
template <class E>
struct Element {
    using Sum = E;
    static constexpr int64_t numbers = 1;

    RECATTN_INLINE static typename Vector<E>::type multiply_add(E scalar, typename Vector<E>::type row,
                                                                typename Vector<E>::type sum) {
        return sum + scalar * row;
    }
};

template <class E>
using sum_t = typename Element<E>::Sum;

// a[m, k] = data[m * row + k * column]: read by scalars, so any layout will do.
template <class E>
struct Left {
    const E* data;
    int64_t row, column;
};

template <class E>
struct Right {
    const E* data;
    int64_t row;
};

template <class A>
struct Product {
    A* data;
    int64_t row;
    bool accumulate;
};

// Longer sums are added up in parts of so many terms: each rounds at its own size, not at that of all before it.
constexpr int64_t kSumPart = 64;

// out[m, n] (+)= sum_k a[m, k] b[k, n] for M rows and V registers of columns.
template <int M, int V, class E>
RECATTN_INLINE void multiply_tile(Left<E> a, Right<E> b, Product<sum_t<E>> out, int64_t depth) {
    using Row = typename Vector<E>::type;
    using Vec = typename Vector<sum_t<E>>::type;
    constexpr int64_t lanes = Vector<E>::lanes;
    Vec acc[M][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Row row[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) row[v] = *reinterpret_cast<const Row*>(b.data + k * b.row + v * lanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const E scalar = a.data[m * a.row + k * a.column];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[m][v] = Element<E>::multiply_add(scalar, row[v], acc[m][v]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            Vec* sum = reinterpret_cast<Vec*>(out.data + m * out.row + v * lanes);
            *sum = out.accumulate ? *sum + acc[m][v] : acc[m][v];  // at the end, as kSumPart asks
        }
    }
}

// The same for any number of columns, a multiple of the lanes.
template <int M, int V, class E>
RECATTN_INLINE void multiply_columns(Left<E> a, Right<E> b, Product<sum_t<E>> out, int64_t depth, int64_t columns) {
    constexpr int64_t step = V * Vector<E>::lanes;
    for (; columns >= step; columns -= step, b.data += step, out.data += step) multiply_tile<M, V>(a, b, out, depth);
    if constexpr (V > 1) multiply_columns<M, V / 2>(a, b, out, depth, columns);
}

// The same for any number of rows too.
template <int M, class E>
RECATTN_TARGET void multiply(Left<E> a, Right<E> b, Product<sum_t<E>> out, int64_t rows, int64_t depth,
                             int64_t columns) {
    for (; rows >= M; rows -= M, a.data += M * a.row, out.data += M * out.row) {
        multiply_columns<M, RECATTN_TILE_VECTORS>(a, b, out, depth, columns);
    }
    if constexpr (M > 1) multiply<M / 2>(a, b, out, rows, depth, columns);
}

// The lanes of a and b in turn: those of their first halves, or of their second.
template <bool kSecond, class Vec, int... kLane>
RECATTN_INLINE Vec interleave(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
    constexpr int lanes = sizeof...(kLane), first = kSecond ? lanes / 2 : 0;
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, (first + kLane / 2 + kLane % 2 * lanes)...);
#else
    return Vec{(kLane % 2 ? b : a)[first + kLane / 2]...};
#endif
}

// out[n, m] = in[m, n] for `rows` rows of as many columns as there are lanes; whole registers, zeros past the rows.
template <class E>
RECATTN_INLINE void transpose_block(const E* in, int64_t in_row, int64_t rows, E* out, int64_t out_row) {
    using Vec = typename Vector<E>::type;
    constexpr int lanes = Vector<E>::lanes;
    using Lanes = std::make_integer_sequence<int, lanes>;
    Vec block[lanes], shuffled[lanes];
#pragma GCC unroll 16
    for (int m = 0; m < lanes; ++m) block[m] = m < rows ? *reinterpret_cast<const Vec*>(in + m * in_row) : Vec{};
#pragma GCC unroll 4
    for (int distance = 1; distance < lanes; distance *= 2) {  // each round moves one bit of m to one of n
#pragma GCC unroll 8
        for (int m = 0; m < lanes / 2; ++m) {
            shuffled[2 * m] = interleave<false>(block[m], block[m + lanes / 2], Lanes{});
            shuffled[2 * m + 1] = interleave<true>(block[m], block[m + lanes / 2], Lanes{});
        }
#pragma GCC unroll 16
        for (int m = 0; m < lanes; ++m) block[m] = shuffled[m];
    }
#pragma GCC unroll 16
    for (int n = 0; n < lanes; ++n) *reinterpret_cast<Vec*>(out + n * out_row) = block[n];
}

// out[n, m] = in[m, n]; rows of `out` are written in whole registers.
template <class E>
RECATTN_TARGET void transpose(Left<E> in, int64_t rows, int64_t columns, E* out, int64_t out_row) {
    constexpr int64_t lanes = Vector<E>::lanes;
    for (int64_t m = 0; m < rows; m += lanes) {
        const E* block = in.data + m * in.row;
        const int64_t block_rows = std::min(lanes, rows - m);
        if (columns < lanes) {
            for (int64_t n = 0; n < columns; ++n) {
                for (int64_t i = 0; i < lanes; ++i)
                    out[n * out_row + m + i] = i < block_rows ? block[i * in.row + n] : E{};
            }
        }
        for (int64_t n = 0; n < columns && columns >= lanes; n += lanes) {
            const int64_t first = std::min(n, columns - lanes);  // the last block overlaps the one before
            transpose_block(block + first, in.row, block_rows, out + first * out_row + m, out_row);
        }
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

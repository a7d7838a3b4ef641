// Products and transposes of small matrices, for one instruction set (see foreach_isa.h).
//
//   out[m, n] (+)= sum_k lhs[m, k] rhs[k, n]
//
// A register tile holds RECATTN_TILE_ROWS rows of `out` and RECATTN_TILE_VECTORS registers of columns. Strides count
// elements. No include guard: the header is compiled once for each instruction set.

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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

// The element type of a product's operands. By default a single number; PairOf<> in matmul_16bit.h is two.
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

// lhs[m, k] = data[m * row_stride + k * column_stride]. Read one number at a time, so any strides will do.
template <class E>
struct Lhs {
    const E* data;
    int64_t row_stride, column_stride;
};

// rhs[k, n] = data[k * row_stride + n]. Read in whole registers.
template <class E>
struct Rhs {
    const E* data;
    int64_t row_stride;
};

// out[m, n] = data[m * row_stride + n]. Written in whole registers; `accumulate` adds to what is there.
template <class A>
struct Out {
    A* data;
    int64_t row_stride;
    bool accumulate;
};

// A long sum is split into blocks of this many terms, so that the rounding error grows with the size of a block's sum.
constexpr int64_t kSumBlock = 64;

// Calls step(lhs, rhs, out, depth) for each block of kSumBlock terms of out (+)= lhs rhs.
template <class E, class Step>
RECATTN_INLINE void for_each_sum_block(Lhs<E> lhs, Rhs<E> rhs, Out<sum_t<E>> out, int64_t depth, const Step& step) {
    do {
        step(lhs, rhs, out, std::min(kSumBlock, depth));
        lhs.data += kSumBlock * lhs.column_stride;
        rhs.data += kSumBlock * rhs.row_stride;
        out.accumulate = true;
        depth -= kSumBlock;
    } while (depth > 0);
}

// out[m, n] (+)= sum_k lhs[m, k] rhs[k, n] for one register tile: M rows, V registers of columns.
template <int M, int V, class E>
RECATTN_INLINE void multiply_tile(Lhs<E> lhs, Rhs<E> rhs, Out<sum_t<E>> out, int64_t depth) {
    using Row = typename Vector<E>::type;
    using Vec = typename Vector<sum_t<E>>::type;
    constexpr int64_t lanes = Vector<E>::lanes;
    Vec acc[M][V] = {};
    for (int64_t k = 0; k < depth; ++k) {
        Row row[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) row[v] = *reinterpret_cast<const Row*>(rhs.data + k * rhs.row_stride + v * lanes);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const E scalar = lhs.data[m * lhs.row_stride + k * lhs.column_stride];
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) acc[m][v] = Element<E>::multiply_add(scalar, row[v], acc[m][v]);
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
            Vec* sum = reinterpret_cast<Vec*>(out.data + m * out.row_stride + v * lanes);
            *sum = out.accumulate ? *sum + acc[m][v] : acc[m][v];  // added last: acc is rounded by itself (kSumBlock)
        }
    }
}

// As multiply_tile, for any number of columns that is a multiple of the lanes.
template <int M, int V, class E>
RECATTN_INLINE void multiply_columns(Lhs<E> lhs, Rhs<E> rhs, Out<sum_t<E>> out, int64_t depth, int64_t columns) {
    constexpr int64_t step = V * Vector<E>::lanes;
    for (; columns >= step; columns -= step, rhs.data += step, out.data += step) {
        multiply_tile<M, V>(lhs, rhs, out, depth);
    }
    if constexpr (V > 1) multiply_columns<M, V / 2>(lhs, rhs, out, depth, columns);
}

// As multiply_columns, for any number of rows: tiles of 6 rows, then of 4, 2 and 1.
template <int M, class E>
RECATTN_TARGET void multiply(Lhs<E> lhs, Rhs<E> rhs, Out<sum_t<E>> out, int64_t rows, int64_t depth, int64_t columns) {
    for (; rows >= M; rows -= M, lhs.data += M * lhs.row_stride, out.data += M * out.row_stride) {
        multiply_columns<M, RECATTN_TILE_VECTORS>(lhs, rhs, out, depth, columns);
    }
    if constexpr (M > 1) multiply<M == 6 ? 4 : M / 2>(lhs, rhs, out, rows, depth, columns);
}

// out = lhs rhs, its sum in blocks of kSumBlock terms.
template <class E>
RECATTN_TARGET void multiply_in_blocks(Lhs<E> lhs, Rhs<E> rhs, Out<sum_t<E>> out, int64_t rows, int64_t depth,
                                       int64_t columns) {
    for_each_sum_block(lhs, rhs, out, depth,
                       [=](Lhs<E> lhs_block, Rhs<E> rhs_block, Out<sum_t<E>> sum, int64_t terms) RECATTN_TARGET {
                           multiply<RECATTN_TILE_ROWS>(lhs_block, rhs_block, sum, rows, terms, columns);
                       });
}

// a[i], b[i], a[i+1], b[i+1], ... from the first halves of a and b, or from their second halves.
template <bool kSecond, class Vec, int... kLane>
RECATTN_INLINE Vec interleave(Vec a, Vec b, std::integer_sequence<int, kLane...>) {
    constexpr int lanes = sizeof...(kLane), first = kSecond ? lanes / 2 : 0;
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(a, b, (first + kLane / 2 + kLane % 2 * lanes)...);
#else
    return Vec{(kLane % 2 ? b : a)[first + kLane / 2]...};
#endif
}

// out[n, m] = row(m)[n] for one block of `lanes` rows and columns: row(m) is a register.
template <class E, class Row>
RECATTN_INLINE void transpose_registers(const Row& row, E* out, int64_t out_row_stride) {
    using Vec = typename Vector<E>::type;
    constexpr int lanes = Vector<E>::lanes;
    using Lanes = std::make_integer_sequence<int, lanes>;
    Vec block[lanes], shuffled[lanes];
#pragma GCC unroll 16
    for (int m = 0; m < lanes; ++m) block[m] = row(m);
#pragma GCC unroll 4
    for (int distance = 1; distance < lanes; distance *= 2) {  // each round exchanges one bit of m and n
#pragma GCC unroll 8
        for (int m = 0; m < lanes / 2; ++m) {
            shuffled[2 * m] = interleave<false>(block[m], block[m + lanes / 2], Lanes{});
            shuffled[2 * m + 1] = interleave<true>(block[m], block[m + lanes / 2], Lanes{});
        }
#pragma GCC unroll 16
        for (int m = 0; m < lanes; ++m) block[m] = shuffled[m];
    }
#pragma GCC unroll 16
    for (int n = 0; n < lanes; ++n) *reinterpret_cast<Vec*>(out + n * out_row_stride) = block[n];
}

// out[n, m] = in[m, n] for one block: at most `lanes` rows, exactly `lanes` columns. Writes zeros for missing rows.
template <class E>
RECATTN_INLINE void transpose_block(const E* in, int64_t in_row_stride, int64_t rows, E* out, int64_t out_row_stride) {
    using Vec = typename Vector<E>::type;
    const auto row = [=](int m) RECATTN_TARGET __attribute__((always_inline)) {
        return m < rows ? *reinterpret_cast<const Vec*>(in + m * in_row_stride) : Vec{};
    };
    transpose_registers(row, out, out_row_stride);
}

// out[n, m] = in[m, n]. Rows of `out` are written in whole registers.
template <class E>
RECATTN_TARGET void transpose(Lhs<E> in, int64_t rows, int64_t columns, E* out, int64_t out_row_stride) {
    constexpr int64_t lanes = Vector<E>::lanes;
    for (int64_t m = 0; m < rows; m += lanes) {
        const E* block = in.data + m * in.row_stride;
        const int64_t block_rows = std::min(lanes, rows - m);
        if (columns < lanes) {
            for (int64_t n = 0; n < columns; ++n) {
                for (int64_t i = 0; i < lanes; ++i)
                    out[n * out_row_stride + m + i] = i < block_rows ? block[i * in.row_stride + n] : E{};
            }
        }
        for (int64_t n = 0; n < columns && columns >= lanes; n += lanes) {
            const int64_t first = std::min(n, columns - lanes);  // the last block overlaps the one before
            transpose_block(block + first, in.row_stride, block_rows, out + first * out_row_stride + m, out_row_stride);
        }
    }
}

// A register of numbers as float32.
template <class T>
RECATTN_INLINE Vector<float>::type load_as_float(const T* in) {
    using Floats = Vector<float>::type;
    if constexpr (std::is_same_v<T, float>) {
        return *reinterpret_cast<const Floats*>(in);
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        using Bits = typename Vector<uint32_t>::type;
        typedef uint16_t Halves __attribute__((vector_size(RECATTN_VECTOR_BYTES / 2), aligned(2), may_alias));
        return reinterpret_cast<Floats>(__builtin_convertvector(*reinterpret_cast<const Halves*>(in), Bits) << 16);
    } else {
#if defined(RECATTN_HAS_AVX512)
        return reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in))));
#elif defined(__x86_64__) && RECATTN_VECTOR_BYTES == 32
        return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
#else
        Floats values;
        for (int i = 0; i < Vector<float>::lanes; ++i) values[i] = static_cast<float>(in[i]);
        return values;
#endif
    }
}

// The same back, rounded to the nearest.
template <class T>
RECATTN_INLINE void store_as(Vector<float>::type values, T* out) {
    using Floats = Vector<float>::type;
    if constexpr (std::is_same_v<T, float>) {
        *reinterpret_cast<Floats*>(out) = values;
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        using Bits = typename Vector<uint32_t>::type;
        typedef uint16_t Halves __attribute__((vector_size(RECATTN_VECTOR_BYTES / 2), aligned(2), may_alias));
        const Bits bits = reinterpret_cast<Bits>(values);
        const Bits rounded = (bits + (((bits >> 16) & 1) + 0x7fff)) >> 16;  // ties to even
        *reinterpret_cast<Halves*>(out) = __builtin_convertvector(values == values ? rounded : Bits{} + 0x7fc0, Halves);
    } else {
#if defined(RECATTN_HAS_AVX512)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                            _mm512_cvtps_ph(reinterpret_cast<__m512>(values), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__x86_64__) && RECATTN_VECTOR_BYTES == 32
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                         _mm256_cvtps_ph(reinterpret_cast<__m256>(values), _MM_FROUND_TO_NEAREST_INT));
#else
        for (int i = 0; i < Vector<float>::lanes; ++i) out[i] = static_cast<T>(values[i]);
#endif
    }
}

template <class T>
constexpr bool is_16bit_v = std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>;

template <class To, class From>
RECATTN_INLINE void copy_row(const From* in, int64_t size, To* out) {
    constexpr int64_t lanes = Vector<float>::lanes;
    int64_t i = 0;
    if constexpr ((is_16bit_v<From> && std::is_same_v<To, float>) || (is_16bit_v<To> && std::is_same_v<From, float>)) {
        for (; i + lanes <= size; i += lanes) store_as(load_as_float(in + i), out + i);
    }
    for (; i < size; ++i) out[i] = static_cast<To>(in[i]);
}

// Rows of `in` as an Lhs: `in` itself if it has the accumulator's type, else a converted copy in `scratch`.
template <class T, class A>
RECATTN_TARGET Lhs<A> as_lhs(const T* in, int64_t in_row_stride, int64_t rows, int64_t columns, A* scratch) {
    if constexpr (std::is_same_v<T, A>) {
        return {in, in_row_stride, 1};
    } else {
        for (int64_t m = 0; m < rows; ++m) copy_row(in + m * in_row_stride, columns, scratch + m * columns);
        return {scratch, columns, 1};
    }
}

// Rows of `in` as an Rhs: `in` itself if it has the accumulator's type and fills whole registers, else a copy in
// `scratch`, padded with zeros.
template <class T, class A>
RECATTN_TARGET Rhs<A> as_rhs(const T* in, int64_t in_row_stride, int64_t rows, int64_t columns, A* scratch) {
    const int64_t padded = round_up_to_lanes<A>(columns);
    if constexpr (std::is_same_v<T, A>) {
        if (columns == padded) return {in, in_row_stride};
    }
    for (int64_t m = 0; m < rows; ++m) {
        copy_row(in + m * in_row_stride, columns, scratch + m * padded);
        std::fill(scratch + m * padded + columns, scratch + (m + 1) * padded, A(0));
    }
    return {scratch, padded};
}

}  // namespace recattn::RECATTN_ISA

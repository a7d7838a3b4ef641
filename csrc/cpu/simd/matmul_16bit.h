// Operands of matmul.h whose elements are two adjacent 16-bit numbers, for AVX512-BF16 and VNNI (see foreach_isa.h):
//   bfloat16, summed in float32    VDPBF16PS
//   int16, summed in int32         VPDPWSSD
// One instruction adds lhs[m, 2k] rhs[2k, n] + lhs[m, 2k+1] rhs[2k+1, n]. No include guard.

namespace recattn::RECATTN_ISA {

template <class N>
struct PairOf {
    N numbers[2];
};

template <class N>
struct Vector<PairOf<N>> {
    typedef uint32_t type __attribute__((vector_size(RECATTN_VECTOR_BYTES), aligned(alignof(N)), may_alias));
    static constexpr int64_t lanes = RECATTN_VECTOR_BYTES / sizeof(PairOf<N>);
};

template <class N>
RECATTN_INLINE __m512i in_every_lane(PairOf<N> pair) {
    int bits;
    __builtin_memcpy(&bits, &pair, sizeof(bits));
    return _mm512_set1_epi32(bits);
}

template <>
struct Element<PairOf<BFloat16>> {
    using Sum = float;
    static constexpr int64_t numbers = 2;

    RECATTN_INLINE static __m512 multiply_add(PairOf<BFloat16> pair, Vector<PairOf<BFloat16>>::type row, __m512 sum) {
        return _mm512_dpbf16_ps(sum, (__m512bh)in_every_lane(pair), (__m512bh)row);
    }
};

template <>
struct Element<PairOf<int16_t>> {
    using Sum = int32_t;
    static constexpr int64_t numbers = 2;

    RECATTN_INLINE static Vector<int32_t>::type multiply_add(PairOf<int16_t> pair, Vector<PairOf<int16_t>>::type row,
                                                             Vector<int32_t>::type sum) {
        return (Vector<int32_t>::type)_mm512_dpwssd_epi32((__m512i)sum, in_every_lane(pair), (__m512i)row);
    }
};

// --- Loads of up to 32 numbers as 16 bits each: the first `count` from memory, zeros after ---

RECATTN_INLINE __mmask32 first_numbers(int64_t count) {
    return count >= 32 ? ~__mmask32(0) : count <= 0 ? 0 : (__mmask32(1) << count) - 1;
}

template <class N>
RECATTN_INLINE __m512i load(const N* in, int64_t count) {
    return _mm512_maskz_loadu_epi16(first_numbers(count), in);
}

RECATTN_INLINE void load_32(const float* in, int64_t count, __m512& low, __m512& high) {
    const __mmask32 mask = first_numbers(count);
    low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), in);
    high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask >> 16), in + 16);
}

template <class N>
RECATTN_INLINE __m512i load(const float* in, int64_t count) {
    __m512 low, high;
    load_32(in, count, low, high);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// Exact: bfloat16 has 8 bits of precision.
template <class N>
RECATTN_INLINE __m512i load(const int8_t* in, int64_t count) {
    const __m256i bytes = _mm256_maskz_loadu_epi8(first_numbers(count), in);
    if constexpr (std::is_same_v<N, int16_t>) return _mm512_cvtepi8_epi16(bytes);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1)));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// --- Rows as matmul.h reads them ---

RECATTN_INLINE void copy_row(const float* in, int64_t size, BFloat16* out) {
    for (int64_t i = 0; i < size; i += 32) {
        _mm512_mask_storeu_epi16(out + i, first_numbers(size - i), load<BFloat16>(in + i, size - i));
    }
}

// An odd row gets a zero after its last number.
template <class T, class N>
RECATTN_INLINE void copy_row(const T* in, int64_t size, PairOf<N>* out) {
    for (int64_t i = 0; i < size; i += 32) {
        _mm512_mask_storeu_epi16(out + i / 2, first_numbers((size + 1) / 2 * 2 - i), load<N>(in + i, size - i));
    }
}

// An element holds lhs[m, 2k] and lhs[m, 2k+1].
template <class T, class N>
RECATTN_TARGET Lhs<PairOf<N>> as_lhs(const T* in, int64_t in_row_stride, int64_t rows, int64_t columns,
                                     PairOf<N>* scratch) {
    if constexpr (std::is_same_v<T, N>) {
        if (columns % 2 == 0 && in_row_stride % 2 == 0)
            return {reinterpret_cast<const PairOf<N>*>(in), in_row_stride / 2, 1};
    }
    const int64_t row = (columns + 1) / 2;
    for (int64_t m = 0; m < rows; ++m) copy_row(in + m * in_row_stride, columns, scratch + m * row);
    return {scratch, row, 1};
}

// An element holds rhs[2k, n] and rhs[2k+1, n].
template <class T, class N>
RECATTN_TARGET Rhs<PairOf<N>> as_rhs(const T* in, int64_t in_row_stride, int64_t rows, int64_t columns,
                                     PairOf<N>* scratch) {
    const int64_t padded = round_up_to_lanes<PairOf<N>>(columns);
    // Interleaves two loaded rows.
    const __m512i low =
        _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007, 0x280008,
                          0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t m = 0; m < rows; m += 2) {
        PairOf<N>* out = scratch + m / 2 * padded;
        const T *first = in + m * in_row_stride, *second = first + in_row_stride;
        for (int64_t n = 0; n < columns; n += 32) {
            const __m512i a = load<N>(first + n, columns - n);
            const __m512i b = m + 1 < rows ? load<N>(second + n, columns - n) : _mm512_setzero_si512();
            _mm512_storeu_si512(out + n, _mm512_permutex2var_epi16(a, low, b));
            if (n + 16 < columns) _mm512_storeu_si512(out + n + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
    return {scratch, padded};
}

}  // namespace recattn::RECATTN_ISA

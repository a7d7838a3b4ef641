// lrea_absorbed_attention over int8 states with VNNI (see foreach_isa.h).
//
//   h = (leaky_relu(q keys^T * key_scales) * value_scales) values
//
// q, and later the left operand of the second product, are rounded per row to int16 multiples of step = max|row| /
// 32767. The rounding error is half a step, 1/258 of the rounding error of int8 states at the same scale. The integer
// products are exact. Overloads the steps of lrea_attention_kernels.h. No include guard.

namespace recattn::RECATTN_ISA {
namespace {

using Int16Scratch = AttendScratch<PairOf<int16_t>>;

// The largest int16 value to use: a sum of that many products with int8 must not overflow int32.
RECATTN_INLINE float max_rounded(int64_t products) {
    return static_cast<float>(std::min<int64_t>(INT16_MAX, INT32_MAX / (128 * std::max<int64_t>(products, 1))));
}

// |x| as integers: they compare like the floats, and NaN is the largest.
RECATTN_INLINE __m512i magnitudes(__m512 x) { return _mm512_castps_si512(_mm512_abs_ps(x)); }

RECATTN_INLINE float largest(__m512i magnitudes) {
    const int bits = _mm512_reduce_max_epi32(magnitudes);
    float number;
    __builtin_memcpy(&number, &bits, sizeof(number));
    return number;
}

// Calls step(i, count) for every 32 numbers of a row; count < 32 only at its end.
template <class Step>
RECATTN_INLINE void for_each_32(int64_t size, const Step& step) {
    int64_t i = 0;
    for (; i + 32 <= size; i += 32) step(i, 32);
    if (i < size) step(i, size - i);
}

// Rounds a row whose largest magnitude is `largest`. Returns the step: NaN or infinity if the row has one.
RECATTN_INLINE float round_row(const float* in, int64_t size, float limit, float largest, PairOf<int16_t>* out) {
    // Below 1e-30 the inverse step would overflow; rounding to zero is as accurate.
    const __m512 inverse_step = _mm512_set1_ps(largest > 1e-30f ? limit / largest : 0.0f);
    // Takes the lower 16 bits of each lane of two registers; the rounded numbers fit in them.
    const __m512i halves = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                            24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    for_each_32(size, [&](int64_t i, int64_t count) RECATTN_TARGET {
        __m512 low, high;
        load_32(in + i, count, low, high);
        const __m512i rounded = _mm512_permutex2var_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse_step)), halves,
                                                          _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse_step)));
        _mm512_mask_storeu_epi16(out + i / 2, first_numbers((count + 1) / 2 * 2), rounded);
    });
    return largest / limit;
}

template <class T>
RECATTN_INLINE Lhs<PairOf<int16_t>> load_targets(Int16Scratch& scratch, const Rows<T>& targets, int64_t begin,
                                                 int64_t end, int64_t columns) {
    const int64_t row_stride = elements<PairOf<int16_t>>(columns);
    const float limit = max_rounded(columns);
    for (int64_t m = 0; m < end - begin; ++m) {
        const float* q = as_lhs(targets.at(begin + m), 0, 1, columns, scratch.target.data()).data;
        __m512i most = _mm512_setzero_si512();
        for_each_32(columns, [&](int64_t i, int64_t count) RECATTN_TARGET {
            __m512 low, high;
            load_32(q + i, count, low, high);
            most = _mm512_max_epi32(most, _mm512_max_epi32(magnitudes(low), magnitudes(high)));
        });
        scratch.steps.data()[m] = round_row(q, columns, limit, largest(most), scratch.rows.data() + m * row_stride);
    }
    return {scratch.rows.data(), row_stride, 1};
}

// 16 integer sums times the step of their row.
RECATTN_INLINE __m512 scaled(const int32_t* sums, __m512 step) {
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums)), step);
}

template <bool kQuantized>
RECATTN_INLINE Lhs<PairOf<int16_t>> activate(Int16Scratch& scratch, int64_t rows, int64_t rank, double slope) {
    static_assert(kQuantized);
    const float limit = max_rounded(rank);
    const __m512 slopes = _mm512_set1_ps(static_cast<float>(slope));
    auto* weights = reinterpret_cast<PairOf<int16_t>*>(scratch.scores.data());
    for (int64_t m = 0; m < rows; ++m) {
        int32_t* sums = scratch.scores.data() + m * rank;
        float* row = reinterpret_cast<float*>(sums);
        const __m512 step = _mm512_set1_ps(scratch.steps.data()[m]);
        __m512i most = _mm512_setzero_si512();
        for (int64_t k = 0; k < rank; k += 16) {
            const __m512 score = _mm512_mul_ps(scaled(sums + k, step), _mm512_loadu_ps(scratch.key_scales.data() + k));
            const __mmask16 negative = _mm512_cmp_ps_mask(score, _mm512_setzero_ps(), _CMP_NGT_UQ);
            const __m512 weight = _mm512_mul_ps(_mm512_mask_mul_ps(score, negative, score, slopes),
                                                _mm512_loadu_ps(scratch.value_scales.data() + k));
            _mm512_storeu_ps(row + k, weight);
            most = _mm512_max_epi32(most, magnitudes(weight));
        }
        scratch.steps.data()[m] = round_row(row, rank, limit, largest(most), weights + m * rank);
    }
    return {weights, rank, 1};
}

template <class T>
RECATTN_INLINE void store_output(Int16Scratch& scratch, int64_t rows, int64_t columns, T* out, int64_t out_row) {
    const int64_t width = round_up_to_lanes<float>(columns);
    for (int64_t m = 0; m < rows; ++m) {
        const int32_t* sums = scratch.output.data() + m * width;
        const __m512 step = _mm512_set1_ps(scratch.steps.data()[m]);
        for (int64_t n = 0; n < columns; n += 16) {
            const __m512 h = scaled(sums + n, step);
            T* to = out + m * out_row + n;
            if constexpr (std::is_same_v<T, float>) {
                _mm512_mask_storeu_ps(to, static_cast<__mmask16>(first_numbers(columns - n)), h);
            } else {
                float numbers[16];
                _mm512_storeu_ps(numbers, h);
                copy_row(numbers, std::min<int64_t>(16, columns - n), to);
            }
        }
    }
}

}  // namespace
}  // namespace recattn::RECATTN_ISA

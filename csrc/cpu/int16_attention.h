// Absorbed attention over int8 states by VNNI (see foreach_isa.h). A candidate's q, and then its weights of the values'
// rows, are rounded to int16 multiples of a step, the largest of them / 32767: an entry is off by half a step, 1/258 of
// what the states' own entries are off by at the same scale. The products of what was rounded are exact. No include
// guard.

namespace recattn::RECATTN_ISA {

using Int16Scratch = AttendScratch<PairOf<int16_t>>;

// The largest rounded number: sums of so many products with int8 must not overflow int32.
RECATTN_INLINE float largest_rounded(int64_t products) {
    return static_cast<float>(std::min<int64_t>(INT16_MAX, INT32_MAX / (128 * std::max<int64_t>(products, 1))));
}

// Rounds a row and returns its step: NaN or infinity if an entry is.
RECATTN_INLINE float round_row(const float* in, int64_t size, float limit, PairOf<int16_t>* out) {
    __m512i bits = _mm512_setzero_si512();  // of magnitudes: they are ordered as the numbers, with NaN at the end
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_numbers(size - i)), in + i);
        bits = _mm512_max_epi32(bits, _mm512_castps_si512(_mm512_abs_ps(x)));
    }
    const int largest_bits = _mm512_reduce_max_epi32(bits);
    float largest;
    __builtin_memcpy(&largest, &largest_bits, sizeof(largest));
    // Below the least, whose inverse is no number, zeros are as close.
    const __m512 inverse_step = _mm512_set1_ps(largest > 1e-30f ? limit / largest : 0.0f);
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 x = _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_numbers(size - i)), in + i);
        const __mmask16 mask = static_cast<__mmask16>(first_numbers((size + 1) / 2 * 2 - i));
        _mm512_mask_cvtepi32_storeu_epi16(out + i / 2, mask, _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse_step)));
    }
    return largest / limit;
}

// A row of sums, in place, times the step of what was summed.
RECATTN_INLINE float* scale_row(int32_t* sums, int64_t size, float step) {
    float* row = reinterpret_cast<float*>(sums);
    for (int64_t i = 0; i < size; i += 16) {
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(sums + i)), _mm512_set1_ps(step));
        _mm512_storeu_ps(row + i, scaled);
    }
    return row;
}

template <class T>
RECATTN_INLINE Left<PairOf<int16_t>> load_targets(Int16Scratch& scratch, const Rows<T>& targets, int64_t begin,
                                                  int64_t end, int64_t columns) {
    const int64_t row = elements<PairOf<int16_t>>(columns);
    const float limit = largest_rounded(columns);
    for (int64_t m = 0; m < end - begin; ++m) {
        const float* q = as_left(targets.at(begin + m), 0, 1, columns, scratch.target.data()).data;
        scratch.steps.data()[m] = round_row(q, columns, limit, scratch.rows.data() + m * row);
    }
    return {scratch.rows.data(), row, 1};
}

template <bool kQuantized>
RECATTN_INLINE Left<PairOf<int16_t>> activate(Int16Scratch& scratch, int64_t rows, int64_t rank, double slope) {
    const float limit = largest_rounded(rank);
    auto* weights = reinterpret_cast<PairOf<int16_t>*>(scratch.scores.data());
    for (int64_t m = 0; m < rows; ++m) {
        float* row = scale_row(scratch.scores.data() + m * rank, rank, scratch.steps.data()[m]);
        activate_row<kQuantized>(row, rank, static_cast<float>(slope), scratch.key_scales.data(),
                                 scratch.value_scales.data());
        scratch.steps.data()[m] = round_row(row, rank, limit, weights + m * rank);
    }
    return {weights, rank, 1};
}

template <class T>
RECATTN_INLINE void store_output(Int16Scratch& scratch, int64_t rows, int64_t columns, T* out, int64_t out_row) {
    const int64_t width = round_up_to_lanes<float>(columns);
    for (int64_t m = 0; m < rows; ++m) {
        copy_row(scale_row(scratch.output.data() + m * width, width, scratch.steps.data()[m]), columns,
                 out + m * out_row);
    }
}

}  // namespace recattn::RECATTN_ISA

// Dropout of rows (cpu/dropout.h), for one instruction set (see foreach_isa.h). Needs matmul.h. No include guard.

namespace recattn::RECATTN_ISA {

// 32-bit numbers in the low halves of 64-bit lanes. The high halves hold anything.
typedef uint64_t Words __attribute__((vector_size(RECATTN_VECTOR_BYTES), may_alias));

// x * factor, 64 bits a lane. (GCC multiplies vectors of 64-bit numbers in three times the instructions.)
RECATTN_INLINE Words multiply_wide(Words x, uint32_t factor) {
#if defined(RECATTN_HAS_AVX512)
    return reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(factor)));
#elif defined(__x86_64__) && RECATTN_VECTOR_BYTES == 32
    return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(x), _mm256_set1_epi64x(factor)));
#elif defined(__x86_64__) && RECATTN_VECTOR_BYTES == 16
    return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(x), _mm_set1_epi64x(factor)));
#else
    return (x & 0xffffffffu) * uint64_t{factor};
#endif
}

// The four numbers of each counter (a, b, c, d).
struct Counters {
    Words a, b, c, d;
};

// Philox-4x32-10: random numbers in the place of the counters.
template <int count>
RECATTN_INLINE void philox(uint64_t seed, Counters (&counters)[count]) {
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 8
        for (auto& [a, b, c, d] : counters) {
            const Words from_a = multiply_wide(a, 0xD2511F53), from_c = multiply_wide(c, 0xCD9E8D57);
            a = (from_c >> 32) ^ (b ^ key[0]);
            b = from_c;
            c = (from_a >> 32) ^ (d ^ key[1]);
            d = from_a;
        }
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
}

// The weights of columns first_column .. first_column + columns - 1 of a row: 0 where dropped, else dropout.scale.
// first_column is a multiple of 8. `out` has room for the columns rounded up to 8 · lanes.
RECATTN_INLINE void dropout_row(const Dropout& dropout, uint32_t bh, uint32_t stream, uint32_t row,
                                int64_t first_column, int64_t columns, float* out) {
    typedef uint16_t Bits __attribute__((vector_size(RECATTN_VECTOR_BYTES), may_alias));
    typedef int32_t Weights __attribute__((vector_size(RECATTN_VECTOR_BYTES), aligned(4), may_alias));
    // A counter makes 8 columns, so a register of random bits counters_per_vector / 2 times as many.
    constexpr int counters_per_vector = RECATTN_VECTOR_BYTES / 8, chains = 2;
    using Sequence = std::make_integer_sequence<int, counters_per_vector>;
    using Halves = std::make_integer_sequence<int, RECATTN_VECTOR_BYTES / 2>;
    Words lane{};
    for (int i = 0; i < counters_per_vector; ++i) lane[i] = i;
    const uint16_t threshold = dropout.threshold;
    const int32_t kept = __builtin_bit_cast(int32_t, dropout.scale);
    for (int64_t column = 0; column < columns; column += 8 * chains * counters_per_vector) {
        const uint64_t first = (first_column + column) / 8;
        Counters counters[chains];
        for (int i = 0; i < chains; ++i) {
            counters[i] = {lane + (first + i * counters_per_vector), Words{} + row, Words{} + bh, Words{} + stream};
        }
        philox(dropout.seed, counters);
        // Columns 0 .. 7 of a counter take the low and high halves of a, c, b and d.
        for (int i = 0; i < chains; ++i) {
            const auto& [a, b, c, d] = counters[i];
            const Words ac = (a & 0xffffffffu) | (c << 32), bd = (b & 0xffffffffu) | (d << 32);
            const Words bits[2] = {interleave<false>(ac, bd, Sequence{}), interleave<true>(ac, bd, Sequence{})};
            for (int j = 0; j < 2; ++j) {
                const auto keep = reinterpret_cast<Bits>(reinterpret_cast<Bits>(bits[j]) >= threshold);
                auto* weights = reinterpret_cast<Weights*>(out + column + (2 * i + j) * 2 * Vector<float>::lanes);
                weights[0] = reinterpret_cast<Weights>(interleave<false>(keep, keep, Halves{})) & kept;
                weights[1] = reinterpret_cast<Weights>(interleave<true>(keep, keep, Halves{})) & kept;
            }
        }
    }
}

}  // namespace recattn::RECATTN_ISA

// Dropout of rows (cpu/dropout.h), for one instruction set (see foreach_isa.h). Needs matmul.h. No include guard.

namespace recattn::RECATTN_ISA {

// One random number a lane.
typedef uint32_t Words __attribute__((vector_size(RECATTN_VECTOR_BYTES), may_alias));
typedef uint64_t DoubleWords __attribute__((vector_size(RECATTN_VECTOR_BYTES), may_alias));

// The high and the low 32 bits of x * factor.
RECATTN_INLINE void multiply_wide(Words x, uint32_t factor, Words& high, Words& low) {
    const DoubleWords even = (reinterpret_cast<DoubleWords>(x) & 0xffffffffu) * uint64_t{factor};
    const DoubleWords odd = (reinterpret_cast<DoubleWords>(x) >> 32) * uint64_t{factor};
    high = reinterpret_cast<Words>((even >> 32) | (odd & 0xffffffff00000000u));
    low = x * factor;
}

// Philox-4x32-10: four random numbers for each counter (a, b, c, d), in their place.
RECATTN_INLINE void philox(uint64_t seed, Words& a, Words& b, Words& c, Words& d) {
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    for (int round = 0; round < 10; ++round) {
        Words high_a, low_a, high_c, low_c;
        multiply_wide(a, 0xD2511F53, high_a, low_a);
        multiply_wide(c, 0xCD9E8D57, high_c, low_c);
        a = high_c ^ b ^ key[0];
        b = low_c;
        c = high_a ^ d ^ key[1];
        d = low_a;
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
}

// The weights of columns first_column .. first_column + columns - 1 of a row: 0 where dropped, else dropout.scale.
// first_column is a multiple of 8. `out` has room for the columns rounded up to 8 · lanes, and another lanes.
RECATTN_INLINE void dropout_row(const Dropout& dropout, uint32_t bh, uint32_t stream, uint32_t row,
                                int64_t first_column, int64_t columns, float* out) {
    constexpr int64_t lanes = Vector<float>::lanes;
    Words lane{};
    for (int i = 0; i < lanes; ++i) lane[i] = i;
    const uint32_t threshold = dropout.threshold, kept = __builtin_bit_cast(uint32_t, dropout.scale);
    for (int64_t column = 0; column < columns; column += 8 * lanes) {
        Words a = lane + static_cast<uint32_t>((first_column + column) / 8), b = Words{} + row, c = Words{} + bh,
              d = Words{} + stream;
        philox(dropout.seed, a, b, c, d);
        // Columns 0 .. 7 of a block take the low and high halves of a, c, b and d.
        alignas(64) Words by_column[8];
        const Words words[4] = {a, c, b, d};
        for (int w = 0; w < 4; ++w) {
            by_column[2 * w] = (words[w] & 0xffffu) >= threshold ? Words{} + kept : Words{};
            by_column[2 * w + 1] = (words[w] >> 16) >= threshold ? Words{} + kept : Words{};
        }
        transpose(Lhs<float>{reinterpret_cast<const float*>(by_column), lanes, 1}, 8, lanes, out + column, 8);
    }
}

}  // namespace recattn::RECATTN_ISA

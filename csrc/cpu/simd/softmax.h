// Softmax of rows and its gradient in float32, for one instruction set (see foreach_isa.h).
//
//   p  = exp(scale * qk - row_max) / row_sum
//   ds = scale * p * (dp - delta),  delta = sum(p * dp)
//
// A row is read and written in whole registers. Needs matmul.h. No include guard.

namespace recattn::RECATTN_ISA {

using Floats = Vector<float>::type;
typedef int32_t Integers __attribute__((vector_size(RECATTN_VECTOR_BYTES)));
using Lanes = std::make_integer_sequence<int, Vector<float>::lanes>;

RECATTN_INLINE Floats load(const float* data) { return *reinterpret_cast<const Floats*>(data); }
RECATTN_INLINE void store(float* data, Floats values) { *reinterpret_cast<Floats*>(data) = values; }

template <int... kLane>
RECATTN_INLINE Integers lane_numbers(std::integer_sequence<int, kLane...>) {
    return Integers{kLane...};
}

// Exchanges the lanes i and i ^ kDistance.
template <int kDistance, int... kLane>
RECATTN_INLINE Floats swap_lanes(Floats values, std::integer_sequence<int, kLane...>) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(values, values, (kLane ^ kDistance)...);
#else
    return __builtin_shuffle(values, Integers{(kLane ^ kDistance)...});
#endif
}

// The first `count` lanes of `values`; `other` in the lanes after.
RECATTN_INLINE Floats first_lanes(Floats values, int64_t count, float other) {
    return lane_numbers(Lanes{}) < static_cast<int32_t>(count) ? values : other + Floats{};
}

template <int kDistance = Vector<float>::lanes / 2>
RECATTN_INLINE float sum_of_lanes(Floats values) {
    if constexpr (kDistance == 0) {
        return values[0];
    } else {
        return sum_of_lanes<kDistance / 2>(values + swap_lanes<kDistance>(values, Lanes{}));
    }
}

template <int kDistance = Vector<float>::lanes / 2>
RECATTN_INLINE float max_of_lanes(Floats values) {
    if constexpr (kDistance == 0) {
        return values[0];
    } else {
        const Floats other = swap_lanes<kDistance>(values, Lanes{});
        return max_of_lanes<kDistance / 2>(other > values ? other : values);
    }
}

// exp(x) for x <= 0, within 2 units in the last place; 0 where the result would be subnormal.
// exp(x) = 2^k exp(r) with x = k ln 2 + r, |r| <= ln 2 / 2.
RECATTN_INLINE Floats exp_nonpositive(Floats x) {
    constexpr float round = 12582912.0f;  // 1.5 · 2^23: adding and subtracting it rounds to an integer
    const Floats k = (x * 1.44269504f + round) - round;
    const Floats r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    Floats p = 1.0f / 5040 + Floats{};  // Taylor series; the terms left out are below 0.1 units in the last place
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    const Integers exponent = (__builtin_convertvector(k, Integers) + 127) << 23;
    return x < -87.3f ? Floats{} : p * reinterpret_cast<Floats>(exponent);
}

// Multiplies the first `count` entries by `scale`; zeros up to `columns`.
RECATTN_INLINE void scale_row(float* row, int64_t count, int64_t columns, float scale) {
    for (int64_t j = 0; j < columns; j += Vector<float>::lanes) {
        store(row + j, first_lanes(load(row + j) * scale, count - j, 0));
    }
}

// p = softmax(scale * qk) of the first `count` entries, in place; zeros up to `columns`.
RECATTN_INLINE void softmax_row(float* row, int64_t count, int64_t columns, float scale) {
    constexpr int64_t lanes = Vector<float>::lanes;
    constexpr float infinity = std::numeric_limits<float>::infinity();
    Floats row_maxes = Floats{} - infinity;
    for (int64_t j = 0; j < count; j += lanes) {
        const Floats x = first_lanes(load(row + j) * scale, count - j, -infinity);
        store(row + j, x);
        row_maxes = x > row_maxes ? x : row_maxes;
    }
    const float row_max = max_of_lanes(row_maxes);
    Floats row_sums{};
    for (int64_t j = 0; j < count; j += lanes) {
        const Floats x = exp_nonpositive(load(row + j) - row_max);
        store(row + j, x);
        row_sums += x;
    }
    const float row_sum = sum_of_lanes(row_sums);
    int64_t j = 0;
    for (; j < count; j += lanes) store(row + j, load(row + j) / row_sum);
    std::fill(row + j, row + columns, 0.0f);
}

// ds = scale * p * (dp - delta) with delta = sum(p * dp), in place of dp. Only the first `count` entries of p differ
// from zero. Returns delta.
RECATTN_INLINE float softmax_backward_row(float* dp, const float* p, int64_t count, int64_t columns, float scale) {
    constexpr int64_t lanes = Vector<float>::lanes;
    Floats deltas{};
    for (int64_t j = 0; j < columns; j += lanes) {
        const Floats x = first_lanes(load(dp + j), count - j, 0);
        store(dp + j, x);
        deltas += x * load(p + j);
    }
    const float delta = sum_of_lanes(deltas);
    for (int64_t j = 0; j < columns; j += lanes) store(dp + j, load(p + j) * (load(dp + j) - delta) * scale);
    return delta;
}

}  // namespace recattn::RECATTN_ISA

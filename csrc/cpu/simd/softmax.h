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

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

RECATTN_INLINE bool any(Integers mask) { return max_of_lanes(mask ? Floats{} + 1.0f : Floats{}) > 0; }

// The larger of both; the second if one is NaN.
RECATTN_INLINE Floats max_or_second(Floats a, Floats b) {
#if defined(__x86_64__) && RECATTN_VECTOR_BYTES == 32  // GCC compares and blends where `a` is a constant
    return reinterpret_cast<Floats>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
    return a > b ? a : b;
#endif
}

// 2^x for x <= 100, within 1.2 units in the last place; 0 below 2^-126. NaN stays NaN.
// 2^x = 2^k 2^r with an integer k and |r| <= 1/2.
RECATTN_INLINE Floats exp2_of(Floats x) {
    constexpr float round = 12582912.0f + 127;  // 1.5 · 2^23: the lowest bits of its sum with x hold k + 127
    x = max_or_second(Floats{} - 127.0f, x);
    const Floats shifted = x + round;
    const Floats r = x - (shifted - round), r2 = r * r;
    // Minimax polynomial of a relative error below 2^-28, in an order that leaves few steps one after another.
    const Floats last = (r * 1.5345812e-4f + 1.3399931e-3f) * r + 9.6184891e-3f;
    const Floats p = (last * r2 + (r * 5.5503286e-2f + 2.4022646e-1f)) * r2 + (r * 6.9314718e-1f + 1.0f);
    return p * reinterpret_cast<Floats>(reinterpret_cast<Integers>(shifted) << 23);
}

// exp(x) for x <= 0, or little more: 2^y of the rounded y = x log2(e).
RECATTN_INLINE Floats exp_nonpositive(Floats x) { return exp2_of(x * kLog2e); }

// Multiplies the first `count` entries by `scale`; zeros up to `columns`.
RECATTN_INLINE void scale_row(float* row, int64_t count, int64_t columns, float scale) {
    for (int64_t j = 0; j < columns; j += Vector<float>::lanes) {
        store(row + j, first_lanes(load(row + j) * scale, count - j, 0));
    }
}

// p = softmax(scale * qk) of the first `count` entries, in place; zeros up to `columns`. In units of log 2.
RECATTN_INLINE void softmax_row(float* row, int64_t count, int64_t columns, float scale) {
    constexpr int64_t lanes = Vector<float>::lanes;
    constexpr float infinity = std::numeric_limits<float>::infinity();
    Floats row_maxes = Floats{} - infinity;
    for (int64_t j = 0; j < count; j += lanes) {
        const Floats x = first_lanes(load(row + j) * (scale * kLog2e), count - j, -infinity);
        store(row + j, x);
        row_maxes = x > row_maxes ? x : row_maxes;
    }
    const float row_max = max_of_lanes(row_maxes);
    Floats row_sums{};
    for (int64_t j = 0; j < count; j += lanes) {
        const Floats x = exp2_of(load(row + j) - row_max);
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

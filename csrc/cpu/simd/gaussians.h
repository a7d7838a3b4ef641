// Gaussians as vectors [mean, standard deviation], row by row in float32, for one instruction set (see foreach_isa.h).
//
//   std = sqrt(cov)                                  of a covariance; or less 1, of cov = elu(x) + 1:
//   std = sqrt(1 + x) - 1 or exp(x / 2) - 1          which changes no distance, and near 0 products do not cancel
//
// Needs matmul.h and softmax.h. No include guard.

namespace recattn::RECATTN_ISA {

RECATTN_INLINE Floats square_root(Floats x) {
#if defined(__x86_64__) && RECATTN_VECTOR_BYTES == 16
    return (Floats)_mm_sqrt_ps((__m128)x);
#elif defined(__x86_64__) && RECATTN_VECTOR_BYTES == 32
    return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)  // no slower than a root of all 64 bytes
    __m256 halves[2];
    std::memcpy(halves, &x, sizeof(x));
    for (__m256& half : halves) half = _mm256_sqrt_ps(half);
    std::memcpy(&x, halves, sizeof(x));
    return x;
#else
    for (int i = 0; i < Vector<float>::lanes; ++i) x[i] = std::sqrt(x[i]);
    return x;
#endif
}

// exp(x) - 1 for x <= 0, within 2 units in the last place.
// exp(x) - 1 = 2^k (exp(r) - 1) + (2^k - 1) with x = k ln 2 + r, |r| <= ln 2 / 2.
RECATTN_INLINE Floats expm1_nonpositive(Floats x) {
    constexpr float round = 12582912.0f;  // as in exp_nonpositive, and so are the terms
    const Floats k = (x * 1.44269504f + round) - round;
    const Floats r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    Floats p = 1.0f / 5040 + Floats{};
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r;
    const Floats power = reinterpret_cast<Floats>((__builtin_convertvector(k, Integers) + 127) << 23);
    return x < -87.3f ? Floats{} - 1.0f : power * p + (power - 1.0f);
}

// The standard deviation of cov, or of elu(x) + 1 less 1, and its derivative.
template <bool kElu>
RECATTN_INLINE Floats standard_deviation(Floats x, Floats& slope) {
    if constexpr (kElu) {
        const Floats positive = x > 0 ? x : Floats{}, root = square_root(positive + 1.0f);
        const Floats negative = expm1_nonpositive((x > 0 ? Floats{} : x) * 0.5f);
        slope = x > 0 ? 0.5f / root : (negative + 1.0f) * 0.5f;
        return x > 0 ? positive / (root + 1.0f) : negative;
    } else {
        constexpr float smallest = std::numeric_limits<float>::min();
        const Floats root = square_root(x < smallest ? Floats{} + smallest : x);
        slope = x < smallest ? Floats{} : 0.5f / root;
        return root;
    }
}

// The first `count` entries of `values`, and what is in memory after them.
RECATTN_INLINE void store_first(float* data, Floats values, int64_t count) {
    store(data, lane_numbers(Lanes{}) < static_cast<int32_t>(count) ? values : load(data));
}

// Replaces `count` covariances, or x if kElu, by standard deviations. The derivatives go to `slopes` if kSlopes, in
// whole registers.
template <bool kElu, bool kSlopes>
RECATTN_INLINE void standard_deviations_row(float* row, float* slopes, int64_t count) {
    for (int64_t j = 0; j < count; j += Vector<float>::lanes) {
        Floats slope;
        store_first(row + j, standard_deviation<kElu>(load(row + j), slope), count - j);
        if constexpr (kSlopes) store(slopes + j, slope);
    }
}

RECATTN_INLINE float sum_of_squares(const float* row, int64_t count) {
    Floats sums{};
    for (int64_t j = 0; j < count; j += Vector<float>::lanes) {
        const Floats x = first_lanes(load(row + j), count - j, 0);
        sums += x * x;
    }
    return sum_of_lanes(sums);
}

// column_sums += row. Returns the sum of the row.
RECATTN_INLINE float add_to_sums(const float* row, int64_t columns, float* column_sums) {
    Floats sums{};
    for (int64_t j = 0; j < columns; j += Vector<float>::lanes) {
        const Floats x = load(row + j);
        store(column_sums + j, load(column_sums + j) + x);
        sums += x;
    }
    return sum_of_lanes(sums);
}

// p *= kept (if kDropout) and squares = p² (if kSquares), `columns` entries.
template <bool kDropout, bool kSquares>
RECATTN_INLINE void drop_and_square_row(float* p, const float* kept, float* squares, int64_t columns) {
    for (int64_t j = 0; j < columns; j += Vector<float>::lanes) {
        Floats x = load(p + j);
        if constexpr (kDropout) {
            x *= load(kept + j);
            store(p + j, x);
        }
        if constexpr (kSquares) store(squares + j, x * x);
    }
}

// ds of the first `count` entries in place of dp, zeros up to `columns`; column_sums += ds; and what
// drop_and_square_row does, the squares in place of dp_squares. The loss's gradient of kept * p is dp + 2 kept p
// dp_squares.
template <bool kDropout, bool kSquares>
RECATTN_INLINE void softmax_and_square_backward_row(float* p, const float* kept, float* dp, float* dp_squares,
                                                    float* column_sums, int64_t count, int64_t columns) {
    constexpr int64_t lanes = Vector<float>::lanes;
    Floats deltas{};
    for (int64_t j = 0; j < count; j += lanes) {
        Floats x = load(p + j), gradient = load(dp + j);
        if constexpr (kDropout) x *= load(kept + j);
        if constexpr (kSquares) {
            gradient += 2.0f * x * load(dp_squares + j);
            store(dp_squares + j, x * x);
        }
        gradient = first_lanes(gradient, count - j, 0);
        store(dp + j, kDropout ? gradient * x : gradient);
        deltas += gradient * x;
    }
    const float delta = sum_of_lanes(deltas);
    int64_t j = 0;
    for (; j < count; j += lanes) {
        const Floats x = load(p + j), gradient = load(dp + j);
        const Floats ds = kDropout ? gradient - x * delta : x * (gradient - delta);
        store(dp + j, ds);
        store(column_sums + j, load(column_sums + j) + ds);
        if constexpr (kDropout) store(p + j, x * load(kept + j));
    }
    std::fill(dp + j, dp + columns, 0.0f);
    if constexpr (kSquares) std::fill(dp_squares + j, dp_squares + columns, 0.0f);
}

// dx = factor * (dx - sum * x), `columns` entries in whole registers.
RECATTN_INLINE void distance_gradient_row(float* dx, const float* x, float sum, float factor, int64_t columns) {
    for (int64_t j = 0; j < columns; j += Vector<float>::lanes) {
        store(dx + j, (load(dx + j) - sum * load(x + j)) * factor);
    }
}

RECATTN_INLINE void multiply_row(float* row, const float* factors, int64_t count) {
    for (int64_t j = 0; j < count; j += Vector<float>::lanes) {
        store_first(row + j, load(row + j) * load(factors + j), count - j);
    }
}

}  // namespace recattn::RECATTN_ISA

// Products by blocks of rows, and Gaussians as vectors, of wasserstein_attention_kernels.h, which includes what this
// needs. For one instruction set (see foreach_isa.h). No include guard.

namespace recattn::RECATTN_ISA {
namespace {

// --- Blocks of rows ---

// Rows begin .. begin + rows of [n, n]. They see the keys 0 .. past, and those of `past .. past + seen` in the
// triangle.
struct Block {
    int64_t begin, rows, past, seen;
    bool causal;

    RECATTN_TARGET int64_t kv_end() const { return past + seen; }
    RECATTN_TARGET int64_t num_visible(int64_t i) const { return causal ? begin + i + 1 : seen; }
    RECATTN_TARGET Triangle lower() const { return causal ? Triangle::lower : Triangle::full; }
    RECATTN_TARGET Triangle upper() const { return causal ? Triangle::upper : Triangle::full; }
};

// Up to kLongestBlock tokens make one block. A block fits the L2 cache.
constexpr int64_t kLongestBlock = 128, kBlockRows = 96;

RECATTN_INLINE int64_t rows_per_block(int64_t n) { return n <= kLongestBlock ? n : kBlockRows; }

template <class Function>
RECATTN_INLINE void for_each_block(int64_t n, bool causal, const Function& function) {
    const int64_t step = std::max<int64_t>(1, rows_per_block(n));
    for (int64_t begin = 0; begin < n; begin += step) {
        const int64_t rows = std::min(step, n - begin), past = causal ? begin : 0;
        function(Block{begin, rows, past, causal ? rows : n, causal});
    }
}

// out[i, j] (+)= lhs[i] keys_t[:, j] for the keys that row i sees; any finite number elsewhere.
RECATTN_TARGET inline void multiply_keys(const Block& block, Lhs<float> lhs, Rhs<float> keys_t, Out<float> out,
                                         int64_t depth) {
    if (block.past > 0) multiply_triangular(lhs, keys_t, out, {block.rows, depth, block.past}, {});
    keys_t.data += block.past;
    out.data += block.past;
    multiply_triangular(lhs, keys_t, out, {block.rows, depth, block.seen}, {.out = block.lower()});
}

// out[i] = sum_j p[i, j] values[j]
RECATTN_TARGET inline void multiply_values(const Block& block, Matrix p, Rhs<float> values, Out<float> out,
                                           int64_t columns) {
    if (block.past > 0) multiply_triangular(p, values, out, {block.rows, block.past, columns}, {});
    values.data += block.past * values.row_stride;
    out.accumulate = block.past > 0;
    multiply_triangular(p.from(0, block.past), values, out, {block.rows, block.seen, columns}, {.lhs = block.lower()});
}

// out[j] += sum_i p[i, j] rows[i]. Keys that no block before has seen are written unless `accumulate`.
RECATTN_TARGET inline void add_transposed(const Block& block, Matrix p, Rhs<float> rows, Out<float> out,
                                          int64_t columns, bool accumulate = false) {
    out.accumulate = true;
    if (block.past > 0) multiply_triangular(p.transposed(), rows, out, {block.past, block.rows, columns}, {});
    out.data += block.past * out.row_stride;
    out.accumulate = accumulate || (!block.causal && block.begin > 0);
    multiply_triangular(p.from(0, block.past).transposed(), rows, out, {block.seen, block.rows, columns},
                        {.lhs = block.upper()});
}

// --- Gaussians as vectors ---

// Vectors of n tokens, with two more columns that make the products q k^T - |k|²/2 and, with both, -W²/2:
// q = [.., 1, -|q|²/2], k = [.., -|k|²/2, 1]
struct Vectors {
    int64_t n, width;  // `width` without the two columns; the first half of it are means
    Matrix q, k, kt, q_slopes, k_slopes;

    RECATTN_TARGET Vectors(int64_t n, int64_t width, bool backward, Arena& arena)
        : n(n), width(width), q(arena, n, width + 2), k(arena, n, width + 2), kt(arena, width + 2, n) {
        if (!backward) return;
        q_slopes = Matrix(arena, n, half());
        k_slopes = Matrix(arena, n, half());
    }

    RECATTN_TARGET int64_t half() const { return width / 2; }
};

template <bool kElu, bool kSlopes>
RECATTN_TARGET void make_standard_deviations(const Vectors& x) {
    for (int64_t i = 0; i < x.n; ++i) {
        float *q_slopes = kSlopes ? x.q_slopes.row(i) : nullptr, *k_slopes = kSlopes ? x.k_slopes.row(i) : nullptr;
        standard_deviations_row<kElu, kSlopes>(x.q.row(i) + x.half(), q_slopes, x.half());
        standard_deviations_row<kElu, kSlopes>(x.k.row(i) + x.half(), k_slopes, x.half());
    }
}

// Subtracts the mean key, which changes no distance: without, |q|² + |k|² - 2 q k cancels where all vectors share a
// large offset. Any finite offset is right: NaN or infinity would carry over from one key to queries that do not see
// it.
RECATTN_TARGET inline void subtract_mean_key(const Vectors& x) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (int64_t j = 0; j < x.width; j += Vector<float>::lanes) {
        Floats mean{};
        for (int64_t i = 0; i < x.n; ++i) mean += load(x.k.row(i) + j);
        mean /= static_cast<float>(x.n);
        mean = mean < infinity && mean > -infinity ? mean : Floats{};
        for (int64_t i = 0; i < x.n; ++i) {
            store(x.q.row(i) + j, load(x.q.row(i) + j) - mean);
            store(x.k.row(i) + j, load(x.k.row(i) + j) - mean);
        }
    }
}

// From [mean, cov] (`elu`: [mean, x]) in q and k to the vectors.
RECATTN_TARGET inline void make_vectors(const Vectors& x, bool elu) {
    const bool backward = x.q_slopes.data != nullptr;
    if (elu) {
        backward ? make_standard_deviations<true, true>(x) : make_standard_deviations<true, false>(x);
    } else {
        backward ? make_standard_deviations<false, true>(x) : make_standard_deviations<false, false>(x);
    }
    subtract_mean_key(x);
    for (int64_t i = 0; i < x.n; ++i) {
        float *q = x.q.row(i), *k = x.k.row(i);
        q[x.width + 1] = sum_of_squares(q, x.width) * -0.5f;
        k[x.width] = sum_of_squares(k, x.width) * -0.5f;
        q[x.width] = k[x.width + 1] = 1;
    }
    transpose<float>(x.k, x.n, x.width + 2, x.kt.data, x.kt.row_stride);
}

// The gradients of [mean, cov] in place of dq and dk, sums of ds and q or k.
RECATTN_TARGET inline void make_vectors_backward(const Vectors& x, Matrix dq, Matrix dk, const float* row_sums,
                                                 const float* column_sums, float scale) {
    for (int64_t i = 0; i < x.n; ++i) {
        distance_gradient_row(dq.row(i), x.q.row(i), row_sums == nullptr ? 0 : row_sums[i], 2 * scale, dq.row_stride);
        distance_gradient_row(dk.row(i), x.k.row(i), column_sums[i], 2 * scale, dk.row_stride);
        multiply_row(dq.row(i) + x.half(), x.q_slopes.row(i), x.half());
        multiply_row(dk.row(i) + x.half(), x.k_slopes.row(i), x.half());
    }
}

}  // namespace
}  // namespace recattn::RECATTN_ISA

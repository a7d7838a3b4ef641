// The kernels of refined attention for one instruction set (see foreach_isa.h): a (batch, head) pair at a time.

#include "cpu/simd/matmul.h"

namespace recattn::RECATTN_ISA {

// --- Products that skip what is zero or not wanted ---

// Where a matrix may differ from zero (of a product's result: where it is wanted): everywhere, up to the diagonal or
// from it on.
enum class Part { all, lower, upper };

struct Parts {
    Part left = Part::all, right = Part::all, out = Part::all;
};

struct Sizes {
    int64_t rows, depth, columns;
};

// out (+)= a b for M rows and V registers of columns, summed in parts.
template <int M, int V>
RECATTN_INLINE void multiply_tile_in_parts(Left<float> a, Right<float> b, Product<float> out, int64_t depth) {
    do {
        multiply_tile<M, V>(a, b, out, std::min(kSumPart, depth));
        a.data += kSumPart * a.column;
        b.data += kSumPart * b.row;
        out.accumulate = true;
        depth -= kSumPart;
    } while (depth > 0);
}

// M rows from `row` on and the columns from `column` to `end`, over the depths from `first` to `last`.
template <int M, int V>
RECATTN_INLINE void multiply_part_columns(Left<float> a, Right<float> b, Product<float> out, int64_t row,
                                          int64_t column, int64_t end, int64_t first, int64_t last, Parts parts) {
    constexpr int64_t step = V * Vector<float>::lanes;
    for (; column + step <= end; column += step) {
        const int64_t from = parts.right == Part::lower ? std::max(first, column) : first;
        const int64_t to = parts.right == Part::upper ? std::min(last, column + step) : last;
        // Down a column of weights, the later rows have more keys to share among: the smallest terms are added first.
        const int64_t start = parts.left == Part::upper ? to - 1 : from, step_k = parts.left == Part::upper ? -1 : 1;
        multiply_tile_in_parts<M, V>({a.data + row * a.row + start * a.column, a.row, step_k * a.column},
                                     {b.data + start * b.row + column, step_k * b.row},
                                     {out.data + row * out.row + column, out.row, out.accumulate}, to - from);
    }
    if constexpr (V > 1) multiply_part_columns<M, V - 1>(a, b, out, row, column, end, first, last, parts);
}

template <int M>
RECATTN_TARGET void multiply_part_rows(Left<float> a, Right<float> b, Product<float> out, int64_t row, Sizes size,
                                       Parts parts) {
    for (; row + M <= size.rows; row += M) {
        const int64_t first = parts.left == Part::upper ? row : 0;
        const int64_t last = parts.left == Part::lower ? std::min(size.depth, row + M) : size.depth;
        const int64_t columns = round_up_to_lanes<float>(size.columns);
        const int64_t end = parts.out == Part::lower ? std::min(columns, round_up_to_lanes<float>(row + M)) : columns;
        multiply_part_columns<M, RECATTN_TILE_VECTORS>(a, b, out, row, 0, end, first, last, parts);
        for (int64_t m = row; m < row + M && !out.accumulate; ++m) {
            std::fill(out.data + m * out.row + end, out.data + m * out.row + columns, 0.0f);
        }
    }
    if constexpr (M > 1) multiply_part_rows<M == 6 ? 4 : M / 2>(a, b, out, row, size, parts);
}

// out (+)= a b in whole registers: of `columns` rounded up to the lanes. Unwanted entries become anything finite.
RECATTN_TARGET inline void multiply_parts(Left<float> a, Right<float> b, Product<float> out, Sizes size, Parts parts) {
    multiply_part_rows<RECATTN_TILE_ROWS>(a, b, out, 0, size, parts);
}

// --- Rows ---

using Floats = Vector<float>::type;
typedef int32_t Integers __attribute__((vector_size(RECATTN_VECTOR_BYTES)));
using Lanes = std::make_integer_sequence<int, Vector<float>::lanes>;

RECATTN_INLINE Floats load(const float* data) { return *reinterpret_cast<const Floats*>(data); }
RECATTN_INLINE void store(float* data, Floats values) { *reinterpret_cast<Floats*>(data) = values; }

template <int... kLane>
RECATTN_INLINE Integers lane_numbers(std::integer_sequence<int, kLane...>) {
    return Integers{kLane...};
}

// Each lane with the one kDistance away, a power of two.
template <int kDistance, int... kLane>
RECATTN_INLINE Floats swap_lanes(Floats values, std::integer_sequence<int, kLane...>) {
#if __has_builtin(__builtin_shufflevector)
    return __builtin_shufflevector(values, values, (kLane ^ kDistance)...);
#else
    return __builtin_shuffle(values, Integers{(kLane ^ kDistance)...});
#endif
}

// The first `count` lanes of `values`, `other` in those after.
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
RECATTN_INLINE float largest_of_lanes(Floats values) {
    if constexpr (kDistance == 0) {
        return values[0];
    } else {
        const Floats others = swap_lanes<kDistance>(values, Lanes{});
        return largest_of_lanes<kDistance / 2>(others > values ? others : values);
    }
}

// e^x for x <= 0 within 2 units in the last place; below the least normal number, 0. x = k ln 2 + r, |r| <= ln 2 / 2.
RECATTN_INLINE Floats exp_nonpositive(Floats x) {
    constexpr float round = 12582912.0f;  // 1.5 · 2^23: adding it leaves no fraction
    const Floats k = (x * 1.44269504f + round) - round;
    const Floats r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
    Floats p = 1.0f / 5040 + Floats{};  // Taylor's series: what it leaves out is below a tenth of a unit
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    const Integers exponent = (__builtin_convertvector(k, Integers) + 127) << 23;
    return x < -87.3f ? Floats{} : p * reinterpret_cast<Floats>(exponent);
}

// The first `count` entries times `scale`, zeros in the rest of `columns`.
RECATTN_INLINE void scale_row(float* row, int64_t count, int64_t columns, float scale) {
    for (int64_t j = 0; j < columns; j += Vector<float>::lanes) {
        store(row + j, first_lanes(load(row + j) * scale, count - j, 0));
    }
}

// The softmax of the first `count` entries times `scale`, zeros in the rest of `columns`.
RECATTN_INLINE void softmax_row(float* row, int64_t count, int64_t columns, float scale) {
    constexpr int64_t lanes = Vector<float>::lanes;
    constexpr float infinity = std::numeric_limits<float>::infinity();
    Floats largest = Floats{} - infinity;
    for (int64_t j = 0; j < count; j += lanes) {
        const Floats x = first_lanes(load(row + j) * scale, count - j, -infinity);
        store(row + j, x);
        largest = x > largest ? x : largest;
    }
    const float top = largest_of_lanes(largest);
    Floats sums{};
    for (int64_t j = 0; j < count; j += lanes) {
        const Floats x = exp_nonpositive(load(row + j) - top);
        store(row + j, x);
        sums += x;
    }
    const float sum = sum_of_lanes(sums);
    int64_t j = 0;
    for (; j < count; j += lanes) store(row + j, load(row + j) / sum);
    std::fill(row + j, row + columns, 0.0f);
}

// The gradient of the scores times `scale`, in place of that of their softmax p, whose first `count` entries may differ
// from zero.
RECATTN_INLINE void softmax_backward_row(float* dp, const float* p, int64_t count, int64_t columns, float scale) {
    constexpr int64_t lanes = Vector<float>::lanes;
    Floats products{};
    for (int64_t j = 0; j < columns; j += lanes) {
        const Floats x = first_lanes(load(dp + j), count - j, 0);
        store(dp + j, x);
        products += x * load(p + j);
    }
    const float mean = sum_of_lanes(products);
    for (int64_t j = 0; j < columns; j += lanes) store(dp + j, load(p + j) * (load(dp + j) - mean) * scale);
}

// --- One pair ---

// Hands out matrices whose rows are whole registers. Without memory it only counts.
class Arena {
  public:
    RECATTN_TARGET explicit Arena(float* memory) : memory_(memory) {}
    RECATTN_TARGET int64_t used() const { return used_; }

    RECATTN_TARGET float* take(int64_t rows, int64_t columns) {
        float* start = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += rows * round_up_to_lanes<float>(columns);
        return start;
    }

  private:
    float* memory_;
    int64_t used_ = 0;
};

struct Matrix {
    float* data = nullptr;
    int64_t row = 0;

    Matrix() = default;
    RECATTN_TARGET Matrix(Arena& arena, int64_t rows, int64_t columns)
        : data(arena.take(rows, columns)), row(round_up_to_lanes<float>(columns)) {}

    RECATTN_TARGET operator Left<float>() const { return {data, row, 1}; }
    RECATTN_TARGET operator Right<float>() const { return {data, row}; }
    RECATTN_TARGET operator Product<float>() const { return {data, row, false}; }
    RECATTN_TARGET Left<float> transposed() const { return {data, 1, row}; }
    RECATTN_TARGET Product<float> plus() const { return {data, row, true}; }
};

// What a pair of n tokens works in. Names are those of the equation, d for gradients; [rows, columns] behind them.
struct ForwardMatrices {
    Matrix q, kt, a, queries, keys, keys_t, p, values, p_values, v, out;

    template <class T>
    RECATTN_TARGET ForwardMatrices(const RefinedAttention<T>& op, int64_t n, Arena& arena)
        : q(arena, n, op.dim),
          kt(arena, op.dim, n),
          a(arena, n, n),
          queries(arena, n, op.rank(n)),
          keys(op.folded ? a : Matrix(arena, n, op.rank(n))),
          keys_t(arena, op.rank(n), n),
          p(arena, n, n),
          v(arena, n, op.value_dim),
          out(arena, n, std::max(op.dim, op.value_dim)) {
        if (op.has_values) {
            values = Matrix(arena, n, n);
            p_values = Matrix(arena, n, n);
        }
    }
};

struct BackwardMatrices {
    Matrix k, vt, dout, dp, dqueries, dkeys, da, values_t, dvalues, dp_values;

    template <class T>
    RECATTN_TARGET BackwardMatrices(const RefinedAttention<T>& op, int64_t n, Arena& arena)
        : k(arena, n, op.dim),
          vt(arena, op.value_dim, n),
          dout(arena, n, op.value_dim),
          dp(arena, n, n),
          dqueries(arena, n, op.rank(n)),
          da(arena, n, n) {
        if (!op.folded) dkeys = Matrix(arena, n, op.rank(n));
        if (op.has_values) {
            values_t = Matrix(arena, n, n);
            dvalues = Matrix(arena, n, n);
            dp_values = Matrix(arena, n, n);
        }
    }
};

// One pair: where its tokens are and what is triangular in it.
template <class T>
struct Pair {
    const RefinedAttention<T>& op;
    int64_t batch, head, n, start;
    Part lower, upper;

    RECATTN_TARGET Pair(const RefinedAttention<T>& op, int64_t index)
        : op(op),
          batch(index / op.heads),
          head(index % op.heads),
          n(op.lengths[batch]),
          start(op.left_padded ? op.n - n : 0),
          lower(op.causal ? Part::lower : Part::all),
          upper(op.causal ? Part::upper : Part::all) {}

    RECATTN_TARGET int64_t visible(int64_t row) const { return op.causal ? row + 1 : n; }
    RECATTN_TARGET const T* tokens(const Tokens<const T>& tensor) const { return tensor.at(batch, head, start); }
    RECATTN_TARGET Right<float> weights(int64_t part) const {
        return {op.weights.at(head, part, start), op.weights.row};
    }
    RECATTN_TARGET Right<float> weights_t(int64_t part) const {
        return {op.weights.transposed_at(head, part, start), op.weights.transposed_row};
    }
    RECATTN_TARGET Product<float> dweights(float* partial, int64_t part) const {
        return {partial + op.weights.offset(head, part, start), op.weights.row, true};
    }

    // Tokens of a tensor whose rows are `columns` long; zeros at padding.
    RECATTN_TARGET void store_tokens(const Tokens<T>& tensor, Matrix values, int64_t columns) const {
        for (int64_t i = 0; i < op.n; ++i) {
            T* row = tensor.at(batch, head, i);
            if (i < start || i >= start + n) {
                std::fill(row, row + columns, T(0));
            } else {
                copy_row(values.data + (i - start) * values.row, columns, row);
            }
        }
    }

    RECATTN_TARGET void softmax(Matrix scores, float scale) const {
        for (int64_t i = 0; i < n; ++i) softmax_row(scores.data + i * scores.row, visible(i), scores.row, scale);
    }

    RECATTN_TARGET void softmax_backward(Matrix dp, Matrix p, float scale) const {
        for (int64_t i = 0; i < n; ++i) {
            softmax_backward_row(dp.data + i * dp.row, p.data + i * p.row, visible(i), dp.row, scale);
        }
    }

    RECATTN_TARGET void scale_visible(Matrix x, float scale) const {
        for (int64_t i = 0; i < n; ++i) scale_row(x.data + i * x.row, visible(i), x.row, scale);
    }

    RECATTN_TARGET void add(Matrix x, Matrix y) const {
        for (int64_t i = 0; i < n * x.row; ++i) x.data[i] += y.data[i];
    }
};

// P = softmax(mask(M)), and everything that it is made of.
template <class T>
RECATTN_TARGET void refine(const Pair<T>& pair, Left<float> q, Left<float> k, const ForwardMatrices& f) {
    const RefinedAttention<T>& op = pair.op;
    const int64_t n = pair.n, rank = op.rank(n);
    const Part lower = pair.lower, upper = pair.upper;
    const Part queries_part = op.folded ? lower : Part::all, keys_t_part = op.folded ? upper : Part::all;

    transpose(k, n, op.dim, f.kt.data, f.kt.row);
    multiply_parts(q, f.kt, f.a, {n, op.dim, n}, {.out = lower});
    if (op.softmax_source) {
        pair.softmax(f.a, op.scale);
    } else {
        pair.scale_visible(f.a, op.scale);
    }
    multiply_parts(f.a, pair.weights(kQueries), f.queries, {n, n, rank}, {.left = lower, .out = queries_part});
    if (!op.folded) multiply_parts(f.a, pair.weights(kKeys), f.keys, {n, n, rank}, {.left = lower});
    transpose<float>(f.keys, n, rank, f.keys_t.data, f.keys_t.row);
    const Matrix scores = op.has_values ? f.p_values : f.p;
    multiply_parts(f.queries, f.keys_t, scores, {n, rank, n},
                   {.left = queries_part, .right = keys_t_part, .out = lower});
    pair.softmax(scores, 1);
    if (op.has_values) {
        multiply_parts(f.a, pair.weights(kValues), f.values, {n, n, n}, {.left = lower});
        multiply_parts(f.p_values, f.values, f.p, {n, n, n}, {.left = lower, .out = lower});
        if (op.adds_source) pair.add(f.p, f.a);
        pair.softmax(f.p, 1);
    }
}

// Gradients of everything up to that of P, f.dp.
template <class T>
RECATTN_TARGET void refine_backward(const Pair<T>& pair, Right<float> q, Right<float> k, const ForwardMatrices& f,
                                    const BackwardMatrices& b, float* dweights) {
    const RefinedAttention<T>& op = pair.op;
    const int64_t n = pair.n, rank = op.rank(n);
    const Part lower = pair.lower, upper = pair.upper;
    const Part keys_part = op.folded ? lower : Part::all;

    pair.softmax_backward(b.dp, f.p, 1);
    if (op.has_values) {
        transpose<float>(f.values, n, n, b.values_t.data, b.values_t.row);
        multiply_parts(b.dp, b.values_t, b.dp_values, {n, n, n}, {.left = lower, .out = lower});
        multiply_parts(f.p_values.transposed(), b.dp, b.dvalues, {n, n, n}, {.left = upper, .right = lower});
        pair.softmax_backward(b.dp_values, f.p_values, 1);
    }
    const Matrix dscores = op.has_values ? b.dp_values : b.dp;
    multiply_parts(dscores, f.keys, b.dqueries, {n, n, rank}, {.left = lower, .right = keys_part, .out = keys_part});
    if (op.folded) {
        multiply_parts(dscores.transposed(), f.queries, b.da, {n, n, n}, {.left = upper, .out = lower});
    } else {
        multiply_parts(dscores.transposed(), f.queries, b.dkeys, {n, n, rank}, {.left = upper});
        multiply_parts(b.dkeys, pair.weights_t(kKeys), b.da, {n, rank, n}, {.out = lower});
        multiply_parts(f.a.transposed(), b.dkeys, pair.dweights(dweights, kKeys), {n, n, rank}, {.left = upper});
    }
    multiply_parts(b.dqueries, pair.weights_t(kQueries), b.da.plus(), {n, rank, n}, {.left = keys_part, .out = lower});
    multiply_parts(f.a.transposed(), b.dqueries, pair.dweights(dweights, kQueries), {n, n, rank},
                   {.left = upper, .right = keys_part});
    if (op.has_values) {
        multiply_parts(b.dvalues, pair.weights_t(kValues), b.da.plus(), {n, n, n}, {.out = lower});
        multiply_parts(f.a.transposed(), b.dvalues, pair.dweights(dweights, kValues), {n, n, n}, {.left = upper});
    }
    if (op.adds_source) pair.add(b.da, b.dp);
    if (op.softmax_source) {
        pair.softmax_backward(b.da, f.a, op.scale);
    } else {
        pair.scale_visible(b.da, op.scale);
    }
    multiply_parts(b.da, k, f.out, {n, n, op.dim}, {.left = lower});
    pair.store_tokens(op.dq, f.out, op.dim);
    multiply_parts(b.da.transposed(), q, f.out, {n, n, op.dim}, {.left = upper});
    pair.store_tokens(op.dk, f.out, op.dim);
}

template <class T>
RECATTN_TARGET void forward_pair(const Pair<T>& pair, float* memory) {
    const RefinedAttention<T>& op = pair.op;
    const int64_t n = pair.n;
    Arena arena(memory);
    const ForwardMatrices f(op, n, arena);
    const Left<float> q = as_left(pair.tokens(op.q), op.q.row, n, op.dim, f.q.data);
    refine(pair, q, as_left(pair.tokens(op.k), op.k.row, n, op.dim, f.out.data), f);
    const Right<float> v = as_right(pair.tokens(op.v), op.v.row, n, op.value_dim, f.v.data);
    multiply_parts(f.p, v, f.out, {n, n, op.value_dim}, {.left = pair.lower});
    pair.store_tokens(op.out, f.out, op.value_dim);
}

template <class T>
RECATTN_TARGET void backward_pair(const Pair<T>& pair, float* memory, float* dweights) {
    const RefinedAttention<T>& op = pair.op;
    const int64_t n = pair.n;
    Arena arena(memory);
    const ForwardMatrices f(op, n, arena);
    const BackwardMatrices b(op, n, arena);
    const Right<float> q = as_right(pair.tokens(op.q), op.q.row, n, op.dim, f.q.data);
    const Right<float> k = as_right(pair.tokens(op.k), op.k.row, n, op.dim, b.k.data);
    const Right<float> dout = as_right(pair.tokens(op.dout), op.dout.row, n, op.value_dim, b.dout.data);
    refine(pair, {q.data, q.row, 1}, {k.data, k.row, 1}, f);
    transpose(as_left(pair.tokens(op.v), op.v.row, n, op.value_dim, f.v.data), n, op.value_dim, b.vt.data, b.vt.row);
    multiply_parts({dout.data, dout.row, 1}, b.vt, b.dp, {n, op.value_dim, n}, {.out = pair.lower});
    multiply_parts(f.p.transposed(), dout, f.out, {n, n, op.value_dim}, {.left = pair.upper});
    pair.store_tokens(op.dv, f.out, op.value_dim);
    refine_backward(pair, q, k, f, b, dweights);
}

// --- All pairs ---

template <class T>
RECATTN_TARGET void refined_forward(const RefinedAttention<T>& op, int64_t begin, int64_t end) {
    Arena sizes(nullptr);
    ForwardMatrices(op, op.n, sizes);
    Scratch<float> memory(sizes.used());
    for (int64_t index = begin; index < end; ++index) forward_pair(Pair<T>(op, index), memory.data());
}

// The groups begin..end; each sums the gradients of the weights up in a place of its own.
template <class T>
RECATTN_TARGET void refined_backward(const RefinedAttention<T>& op, const Groups& groups, int64_t begin, int64_t end,
                                     float* dweights) {
    Arena sizes(nullptr);
    ForwardMatrices(op, op.n, sizes);
    BackwardMatrices(op, op.n, sizes);
    Scratch<float> memory(sizes.used());
    for (int64_t group = begin; group < end; ++group) {
        float* partial = dweights + group * op.weights.size();
        std::fill_n(partial, op.weights.size(), 0.0f);
        for (int64_t index = groups.start(group); index < groups.start(group + 1); ++index) {
            backward_pair(Pair<T>(op, index), memory.data(), partial);
        }
    }
}

}  // namespace recattn::RECATTN_ISA

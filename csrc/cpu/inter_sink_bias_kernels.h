// inter_sink_bias and its gradients in float32, for one instruction set (see foreach_isa.h).
//
//   p[h] = softmax(scale * q[h] k[h]^T)                 over the visible sinks
//   out = factor * sum_h dropout(p[h])                  factor includes bias_scale / H
//
//   dp = dropout(dout),  delta = sum_j p dp             bias_scale's gradient is the sum of all delta
//   ds = scale * factor * p (dp - delta)
//   dq = ds k,  dk = ds^T q
//
// Masked sinks are left out of every product: a matrix has a row and a column for each valid sink. A task of the
// forward is kRows rows of a sequence's bias, all heads; a task of the backward is one (batch, head), kRows rows at a
// time. Register tiles: RECATTN_TILE_ROWS rows by RECATTN_TILE_VECTORS registers.

#include "cpu/simd/matmul.h"
// They need matmul.h.
#include "cpu/simd/dropout.h"
#include "cpu/simd/rows.h"
#include "cpu/simd/softmax.h"

namespace recattn::RECATTN_ISA {
namespace {

// The valid sinks of one sequence.
template <class T>
struct BiasSequence {
    const InterSinkBias<T>& op;
    int64_t batch, n;
    const int64_t* sinks;  // [n] ascending

    RECATTN_TARGET BiasSequence(const InterSinkBias<T>& op, int64_t batch)
        : op(op), batch(batch), n(op.valid.count(batch)), sinks(op.valid.of(batch)) {}

    // How many sinks the row `i` sees: the first of them.
    RECATTN_TARGET int64_t num_visible(int64_t i) const { return op.causal ? i + 1 : n; }

    // Without gaps between the sinks their rows are read in place.
    RECATTN_TARGET Rows<T> rows(const Tokens<const T>& x, int64_t head) const {
        const bool gaps = n > 0 && sinks[n - 1] - sinks[0] != n - 1;
        const int64_t first = n == 0 || gaps ? 0 : sinks[0];
        return {x.at(batch, head, first), x.row_stride, gaps ? sinks : nullptr, op.num_sinks, nullptr};
    }

    // Multiplies row `i` of this head's weights, or of their gradients, by 0 or 1 / (1 - p).
    RECATTN_TARGET void apply_dropout(int64_t head, int64_t i, int64_t count, float* row, float* weights) const {
        const auto bh = static_cast<uint32_t>(batch * op.heads + head);
        const auto index = static_cast<uint32_t>(sinks[i]);
        dropout_row(op.dropout, bh, kInterSinkBias, index, 0, sinks[count - 1] + 1, weights);
        for (int64_t j = 0; j < count; ++j) row[j] *= weights[sinks[j]];
    }

    // Rows of zeros for the masked sinks between valid sink i - 1 and valid sink i.
    template <class A>
    RECATTN_TARGET void store_zeros_before(int64_t i, int64_t columns, A* x, int64_t row_stride) const {
        const int64_t begin = i == 0 ? 0 : sinks[i - 1] + 1, end = i == n ? op.num_sinks : sinks[i];
        for (int64_t m = begin; m < end; ++m) std::fill_n(x + m * row_stride, columns, A(0));
    }

    // Stores a gradient, [n, D], zeros at masked sinks.
    RECATTN_TARGET void store_gradient(const Tokens<T>& to, int64_t head, int64_t begin, int64_t end,
                                       const float* values, int64_t width) const {
        T* x = to.at(batch, head, 0);
        for (int64_t i = begin; i < end; ++i) {
            store_zeros_before(i, op.dim, x, to.row_stride);
            copy_row(values + (i - begin) * width, op.dim, x + sinks[i] * to.row_stride);
        }
        if (end == n) store_zeros_before(n, op.dim, x, to.row_stride);
    }
};

// Scratch of a task. Rows are whole registers.
struct BiasScratch {
    int64_t columns, width;  // of a matrix over the sinks, of a row of D numbers
    Scratch<float> q, k, kt, p, acc, weights, dq, dk;

    template <class T>
    RECATTN_TARGET BiasScratch(const InterSinkBias<T>& op, bool backward)
        : columns(round_up_to_lanes<float>(op.valid.most())),
          width(round_up_to_lanes<float>(op.dim)),
          q(kRows * width),
          k(columns * width),
          kt(op.dim * columns),
          p(kRows * columns),
          acc(kRows * columns),
          weights(op.dropout ? op.num_sinks + 9 * Vector<float>::lanes : 0),
          dq(backward ? kRows * width : 0),
          dk(backward ? columns * width : 0) {}
};

// p = softmax(scale * q k^T) of rows begin..end. The first `columns` keys, transposed, are in s.kt.
template <class T>
RECATTN_TARGET void bias_weights(const BiasSequence<T>& sequence, Lhs<float> q, int64_t begin, int64_t end,
                                 int64_t width, BiasScratch& s) {
    multiply_in_blocks(q, Rhs<float>{s.kt.data(), s.columns}, {s.p.data(), s.columns, false}, end - begin,
                       sequence.op.dim, width);
    for (int64_t i = begin; i < end; ++i) {
        softmax_row(s.p.data() + (i - begin) * s.columns, sequence.num_visible(i), width, sequence.op.scale);
    }
}

// Rows begin..end of a sequence's bias, and the rows of the masked sinks before them (after the last, too).
template <class T>
RECATTN_TARGET void bias_rows(const BiasSequence<T>& sequence, int64_t begin, int64_t end, BiasScratch& s) {
    const InterSinkBias<T>& op = sequence.op;
    const int64_t keys = op.causal ? end : sequence.n, width = round_up_to_lanes<float>(keys);
    std::fill_n(s.acc.data(), (end - begin) * s.columns, 0.0f);
    for (int64_t head = 0; head < op.heads && begin < end; ++head) {
        const Lhs<float> q = as_lhs(sequence.rows(op.q, head), begin, end, op.dim, s.q.data());
        const Lhs<float> k = as_lhs(sequence.rows(op.k, head), 0, keys, op.dim, s.k.data());
        transpose(k, keys, op.dim, s.kt.data(), s.columns);
        bias_weights(sequence, q, begin, end, width, s);
        for (int64_t i = begin; i < end; ++i) {
            float *p = s.p.data() + (i - begin) * s.columns, *acc = s.acc.data() + (i - begin) * s.columns;
            if (op.dropout) sequence.apply_dropout(head, i, sequence.num_visible(i), p, s.weights.data());
            for (int64_t j = 0; j < width; j += Vector<float>::lanes) store(acc + j, load(acc + j) + load(p + j));
        }
    }
    float* out = op.out + sequence.batch * op.num_sinks * op.num_sinks;
    for (int64_t i = begin; i < end; ++i) {
        sequence.store_zeros_before(i, op.num_sinks, out, op.num_sinks);
        float* row = out + sequence.sinks[i] * op.num_sinks;
        std::fill_n(row, op.num_sinks, 0.0f);
        const float* acc = s.acc.data() + (i - begin) * s.columns;
        for (int64_t j = 0; j < sequence.num_visible(i); ++j) row[sequence.sinks[j]] = op.factor * acc[j];
    }
    if (end == sequence.n) sequence.store_zeros_before(end, op.num_sinks, out, op.num_sinks);
}

// dq_s and dk_s of one (batch, head). Returns the sum of delta.
template <class T>
RECATTN_TARGET double bias_gradients(const BiasSequence<T>& sequence, int64_t head, BiasScratch& s) {
    const InterSinkBias<T>& op = sequence.op;
    const int64_t n = sequence.n;
    const Rows<T> q_rows = sequence.rows(op.q, head);
    const Rhs<float> k = as_rhs(sequence.rows(op.k, head), 0, n, op.dim, s.k.data());
    transpose(Lhs<float>{k.data, k.row_stride, 1}, n, op.dim, s.kt.data(), s.columns);
    double sum_of_delta = 0;
    for (int64_t begin = 0; begin < n; begin += kRows) {
        const int64_t end = std::min(n, begin + kRows), keys = op.causal ? end : n;
        const int64_t width = round_up_to_lanes<float>(keys);
        const Rhs<float> q = as_rhs(q_rows, begin, end, op.dim, s.q.data());
        bias_weights(sequence, {q.data, q.row_stride, 1}, begin, end, width, s);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t count = sequence.num_visible(i);
            float* dp = s.acc.data() + (i - begin) * s.columns;
            const float* dout =
                op.dout + sequence.batch * op.dout_batch_stride + sequence.sinks[i] * op.dout_row_stride;
            for (int64_t j = 0; j < count; ++j) dp[j] = dout[sequence.sinks[j]];
            if (op.dropout) sequence.apply_dropout(head, i, count, dp, s.weights.data());
            const float* p = s.p.data() + (i - begin) * s.columns;
            sum_of_delta += softmax_backward_row(dp, p, count, width, op.scale * op.factor);
            std::fill(dp + count, dp + width, 0.0f);  // NaN if delta is
        }
        const float* ds = s.acc.data();
        multiply_in_blocks(Lhs<float>{ds, s.columns, 1}, k, {s.dq.data(), s.width, false}, end - begin, keys, s.width);
        multiply_in_blocks(Lhs<float>{ds, 1, s.columns}, q, {s.dk.data(), s.width, begin > 0}, keys, end - begin,
                           s.width);
        sequence.store_gradient(op.dq, head, begin, end, s.dq.data(), s.width);
        // The next rows see more keys.
        if (op.causal && end < n) std::fill_n(s.dk.data() + end * s.width, std::min(kRows, n - end) * s.width, 0.0f);
    }
    if (n == 0) sequence.store_gradient(op.dq, head, 0, 0, nullptr, s.width);
    sequence.store_gradient(op.dk, head, 0, n, s.dk.data(), s.width);
    return sum_of_delta;
}

// --- Tasks, which threads take one after another ---

template <class T>
RECATTN_TARGET void bias_forward(const InterSinkBias<T>& op, const BiasTasks& tasks, std::atomic<int64_t>& next) {
    BiasScratch scratch(op, false);
    for (int64_t task = next++; task < tasks.count(); task = next++) {
        const auto [batch, begin] = tasks[task];
        const BiasSequence<T> sequence(op, batch);
        bias_rows(sequence, begin, std::min(sequence.n, begin + kRows), scratch);
    }
}

template <class T>
RECATTN_TARGET void bias_backward(const InterSinkBias<T>& op, int64_t batch_heads, std::atomic<int64_t>& next) {
    BiasScratch scratch(op, true);
    for (int64_t bh = next++; bh < batch_heads; bh = next++) {
        op.delta_sums[bh] = bias_gradients(BiasSequence<T>(op, bh / op.heads), bh % op.heads, scratch);
    }
}

}  // namespace
}  // namespace recattn::RECATTN_ISA

// sink_attention in float32, for one instruction set (see foreach_isa.h).
//
//   qk  = scale * q k^T                  masked; in units of log 2, so that exp is exp2
//   qk += bias[sink(i), sink(j)]         only where query i and key j are both sinks
//   out = softmax(qk) v                  online: row_max, row_sum, acc
//
// One task: a block of queries of the heads that share a key head, and all keys that they see, block by block. Queries
// come in panels of kPanelRows, which are the columns of transposed scores: qk^T[j, i] = k[j] q[i]. So k is read as it
// lies in memory, the softmax runs down the columns without sums across lanes, and a panel stays in the L1 cache from
// its scores to its product with v.

#include "cpu/simd/matmul.h"
// It needs matmul.h.
#include "cpu/simd/dropout.h"
#include "cpu/simd/softmax.h"

namespace recattn::RECATTN_ISA {

constexpr int kPanelVectors = 3;
constexpr int64_t kPanelRows = kPanelVectors * Vector<float>::lanes;
constexpr int kTileKeys = RECATTN_TILE_VECTORS == 4 ? 8 : 4;  // by kPanelVectors registers: a tile of qk^T
constexpr int64_t kBlockKeys = 64;

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// 2^x for x <= 0, within 1 unit in the last place; 0 below 2^-127. NaN stays NaN.
// 2^x = 2^k 2^r with integer k, |r| <= 1/2.
RECATTN_INLINE Floats exp2_nonpositive(Floats x) {
    constexpr float round = 12582912.0f;  // 1.5 · 2^23: its sum with x holds k in the lowest bits
    x = -127.0f > x ? Floats{} - 127.0f : x;
    const Floats shifted = x + round;
    const Floats r = x - (shifted - round);
    Floats p = 0.00015345812f + Floats{};  // minimax polynomial of relative error 2^-29
    p = p * r + 0.0013399931f;
    p = p * r + 0.009618489f;
    p = p * r + 0.055503286f;
    p = p * r + 0.24022646f;
    p = p * r + 0.69314718f;
    p = p * r + 1.0f;
    const Integers exponent = (reinterpret_cast<Integers>(shifted) + 127) << 23;
    return p * reinterpret_cast<Floats>(exponent);
}

// log x for positive, normal x; NaN stays NaN.
RECATTN_INLINE Floats log_positive(Floats x) {
    const Integers bits = reinterpret_cast<Integers>(x);
    const Integers exponent = (bits - 0x3f3504f3) >> 23;  // x = 2^exponent m, m in [sqrt(1/2), sqrt(2))
    const Floats m = reinterpret_cast<Floats>(bits - (exponent << 23));
    const Floats t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
    const Floats series = (((t2 / 9.0f + 1.0f / 7) * t2 + 0.2f) * t2 + 1.0f / 3) * t2 + 1.0f;
    const Floats log_x = __builtin_convertvector(exponent, Floats) * kLn2 + 2.0f * t * series;
    return x == x ? log_x : x;
}

// --- One task ---

template <class T>
class Forward {
  public:
    RECATTN_TARGET Forward(const SinkAttention<T>& op, int64_t max_rows)
        : op_(op),
          width_(round_up_to_lanes<float>(op.value_dim)),
          max_rows_((max_rows + kPanelRows - 1) / kPanelRows * kPanelRows),
          q_t_(max_rows_ * op.dim),
          acc_(max_rows_ * width_),
          row_max_(max_rows_),
          row_sum_(max_rows_),
          positions_(max_rows_),
          sinks_(max_rows_),
          heads_(max_rows_),
          qk_t_(kBlockKeys * kPanelRows),
          keys_(kBlockKeys * op.dim),
          values_(kBlockKeys * width_) {}

    RECATTN_TARGET void run(const QueryBlock& task) {
        const Sequence& sequence = *task.sequence;
        if (task.first == 0) write_padding(task);
        rows_ = op_.group() * task.count;
        if (rows_ == 0) return;
        load_queries(task);
        const int64_t end = op_.causal ? task.first + task.count : sequence.length;
        int64_t first_sink = 0, last_sink = 0;
        for (int64_t first = 0; first < end; first += kBlockKeys) {
            const int64_t count = std::min(kBlockKeys, end - first);
            while (first_sink < sequence.num_sinks && sequence.sinks[first_sink] < first) ++first_sink;
            last_sink = std::max(first_sink, last_sink);
            while (last_sink < sequence.num_sinks && sequence.sinks[last_sink] < first + count) ++last_sink;
            add_keys(task, first, count, first_sink, last_sink);
        }
        store_rows(task);
    }

  private:
    static constexpr int64_t lanes = Vector<float>::lanes;
    static constexpr float infinity = std::numeric_limits<float>::infinity();

    RECATTN_TARGET void write_padding(const QueryBlock& task) const {
        const Sequence& sequence = *task.sequence;
        if (op_.packed || sequence.length == op_.n) return;
        for (int64_t g = 0; g < op_.group(); ++g) {
            const int64_t head = task.kv_head * op_.group() + g;
            for (int64_t i = 0; i < op_.n; ++i) {
                if (i >= sequence.start && i < sequence.start + sequence.length) continue;
                T* row = op_.new_out.at(sequence.batch, head, i);
                std::fill(row, row + op_.value_dim, T(0));
                *op_.lse.at(sequence.batch, head, i) = -infinity;
            }
        }
    }

    // Fills q_t and the tables of the rows.
    RECATTN_TARGET void load_queries(const QueryBlock& task) {
        const Sequence& sequence = *task.sequence;
        const float scale = op_.scale * kLog2e;
        int64_t row = 0;
        for (int64_t g = 0; g < op_.group(); ++g) {
            const int64_t head = task.kv_head * op_.group() + g;
            const float logit = op_.sink_logits ? op_.sink_logits[head] * kLog2e : -infinity;
            const int64_t* sink = std::lower_bound(sequence.sinks, sequence.sinks + sequence.num_sinks, task.first);
            for (int64_t i = 0; i < task.count; ++i, ++row) {
                const bool is_sink = sink < sequence.sinks + sequence.num_sinks && *sink == task.first + i;
                positions_.data()[row] = static_cast<int32_t>(task.first + i);
                sinks_.data()[row] = is_sink ? static_cast<int32_t>(sink - sequence.sinks) : -1;
                heads_.data()[row] = static_cast<int32_t>(head);
                sink += is_sink;
                row_max_.data()[row] = logit;
                row_sum_.data()[row] = logit == -infinity ? 0 : 1 + (logit - logit);  // NaN for +inf, as its softmax is
            }
        }
        for (; row % kPanelRows != 0; ++row) {
            positions_.data()[row] = positions_.data()[rows_ - 1];
            sinks_.data()[row] = -1;
            heads_.data()[row] = heads_.data()[rows_ - 1];
            row_max_.data()[row] = -infinity;
            row_sum_.data()[row] = 0;
        }
        std::fill_n(acc_.data(), row * width_, 0.0f);
        for (int64_t r = 0; r < row; ++r) {
            float* out = q_t_.data() + r / kPanelRows * kPanelRows * op_.dim + r % kPanelRows;
            const T* q =
                r < rows_ ? op_.q.at(sequence.batch, heads_.data()[r], sequence.start + positions_.data()[r]) : nullptr;
            for (int64_t d = 0; d < op_.dim; ++d) out[d * kPanelRows] = q ? static_cast<float>(q[d]) * scale : 0.0f;
        }
    }

    // Keys first .. first + count - 1, of which first_sink .. last_sink - 1 are the sinks.
    RECATTN_TARGET void add_keys(const QueryBlock& task, int64_t first, int64_t count, int64_t first_sink,
                                 int64_t last_sink) {
        const Sequence& sequence = *task.sequence;
        const int64_t position = sequence.start + first;
        const Lhs<float> k =
            as_lhs(op_.k.at(sequence.batch, task.kv_head, position), op_.k.row_stride, count, op_.dim, keys_.data());
        const Rhs<float> v = as_rhs(op_.v.at(sequence.batch, task.kv_head, position), op_.v.row_stride, count,
                                    op_.value_dim, values_.data());
        for (int64_t row = 0; row < rows_; row += kPanelRows) {
            const int64_t panel_rows = std::min(kPanelRows, rows_ - row);
            int64_t visible = count;
            if (op_.causal) {
                int64_t last = 0;
                for (int64_t r = row; r < row + panel_rows; ++r) last = std::max<int64_t>(last, positions_.data()[r]);
                visible = std::min(count, last + 1 - first);
            }
            if (visible <= 0) continue;
            float* qk_t = qk_t_.data();
            multiply_keys<kTileKeys>(k, {q_t_.data() + row * op_.dim, kPanelRows}, {qk_t, kPanelRows, false}, visible,
                                     op_.dim);
            if (last_sink > first_sink) add_bias(task, row, first, visible, first_sink, last_sink);
            if (op_.causal) mask(row, first, visible);
            softmax(row, visible);
            if (op_.dropout) drop(task, row, first, visible);
            float* acc = acc_.data() + row * width_;
            for_each_sum_block(Lhs<float>{qk_t, 1, kPanelRows}, v, Out<float>{acc, width_, true}, visible,
                               [&](Lhs<float> lhs, Rhs<float> rhs, Out<float> out, int64_t terms) RECATTN_TARGET {
                                   multiply<RECATTN_TILE_ROWS>(lhs, rhs, out, kPanelRows, terms, width_);
                               });
        }
    }

    template <int M>
    RECATTN_TARGET static void multiply_keys(Lhs<float> k, Rhs<float> q_t, Out<float> qk_t, int64_t count,
                                             int64_t dim) {
        for (; count >= M; count -= M, k.data += M * k.row_stride, qk_t.data += M * qk_t.row_stride) {
            for_each_sum_block(k, q_t, qk_t, dim,
                               [](Lhs<float> lhs, Rhs<float> rhs, Out<float> out, int64_t terms)
                                   RECATTN_TARGET { multiply_tile<M, kPanelVectors>(lhs, rhs, out, terms); });
        }
        if constexpr (M > 1) multiply_keys<M / 2>(k, q_t, qk_t, count, dim);
    }

    RECATTN_TARGET void add_bias(const QueryBlock& task, int64_t row, int64_t first, int64_t count, int64_t first_sink,
                                 int64_t last_sink) {
        const Sequence& sequence = *task.sequence;
        for (int64_t r = 0; r < kPanelRows; ++r) {
            const int64_t sink = sinks_.data()[row + r];
            if (sink < 0) continue;
            const float* bias = op_.bias_of(sequence, heads_.data()[row + r]) + sink * op_.num_sinks;
            for (int64_t s = first_sink; s < last_sink && sequence.sinks[s] < first + count; ++s) {
                qk_t_.data()[(sequence.sinks[s] - first) * kPanelRows + r] += bias[s] * kLog2e;
            }
        }
    }

    RECATTN_TARGET void mask(int64_t row, int64_t first, int64_t count) {
        for (int64_t v = 0; v < kPanelRows; v += lanes) {
            for (int64_t j = 0; j < count; ++j) {
                float* qk_t = qk_t_.data() + j * kPanelRows + v;
                for (int64_t lane = 0; lane < lanes; ++lane) {
                    if (first + j > positions_.data()[row + v + lane]) qk_t[lane] = -infinity;
                }
            }
        }
    }

    // p in place of qk. Updates row_max and row_sum, and multiplies acc by the change of scale.
    RECATTN_TARGET void softmax(int64_t row, int64_t count) {
        for (int64_t v = 0; v < kPanelRows; v += lanes) {
            float *qk_t = qk_t_.data() + v, *row_max = row_max_.data() + row + v, *row_sum = row_sum_.data() + row + v;
            const Floats old_max = load(row_max);
            Floats new_max = old_max;
            for (int64_t j = 0; j < count; ++j) {
                const Floats x = load(qk_t + j * kPanelRows);
                new_max = new_max > x ? new_max : x;
            }
            store(row_max, new_max);
            const Floats safe_max = new_max == -infinity ? Floats{} : new_max;
            const Floats change = exp2_nonpositive(old_max - safe_max);
            Floats sum = load(row_sum) * change;
            Floats sums{};
            for (int64_t j = 0; j < count; ++j) {
                const Floats p = exp2_nonpositive(load(qk_t + j * kPanelRows) - safe_max);
                store(qk_t + j * kPanelRows, p);
                sums += p;
            }
            store(row_sum, sum + sums);
            for (int64_t lane = 0; lane < lanes; ++lane) {
                if (change[lane] == 1) continue;
                float* acc = acc_.data() + (row + v + lane) * width_;
                for (int64_t d = 0; d < width_; d += lanes) store(acc + d, load(acc + d) * change[lane]);
            }
        }
    }

    RECATTN_TARGET void drop(const QueryBlock& task, int64_t row, int64_t first, int64_t count) {
        alignas(64) float weights[kBlockKeys + 16 * lanes];
        for (int64_t r = 0; r < std::min(kPanelRows, rows_ - row); ++r) {
            const uint32_t bh = static_cast<uint32_t>(task.sequence->index * op_.heads + heads_.data()[row + r]);
            dropout_row(op_.dropout, bh, kPerToken, positions_.data()[row + r], first, count, weights);
            for (int64_t j = 0; j < count; ++j) qk_t_.data()[j * kPanelRows + r] *= weights[j];
        }
    }

    RECATTN_TARGET void store_rows(const QueryBlock& task) {
        const Sequence& sequence = *task.sequence;
        for (int64_t v = 0; v < rows_; v += lanes) {
            const Floats sum = load(row_sum_.data() + v);
            const Floats lse = load(row_max_.data() + v) * kLn2 + log_positive(sum);
            store(row_max_.data() + v, sum == 0.0f ? Floats{} - infinity : lse);
            store(row_sum_.data() + v, sum == 0.0f ? Floats{} : 1.0f / sum);
        }
        for (int64_t r = 0; r < rows_; ++r) {
            const int64_t head = heads_.data()[r], position = sequence.start + positions_.data()[r];
            *op_.lse.at(sequence.batch, head, position) = row_max_.data()[r];
            const float *acc = acc_.data() + r * width_, inverse = row_sum_.data()[r];
            T* out = op_.new_out.at(sequence.batch, head, position);
            for (int64_t d = 0; d < op_.value_dim; ++d) out[d] = static_cast<T>(acc[d] * inverse);
        }
    }

    const SinkAttention<T>& op_;
    int64_t width_, max_rows_, rows_ = 0;
    Scratch<float> q_t_, acc_, row_max_, row_sum_;
    Scratch<int32_t> positions_, sinks_, heads_;
    Scratch<float> qk_t_, keys_, values_;
};

// Tasks next, next + 1, ... until none is left.
template <class T>
RECATTN_TARGET void sink_forward(const SinkAttention<T>& op, const QueryBlock* tasks, int64_t num_tasks,
                                 std::atomic<int64_t>& next) {
    int64_t max_rows = 0;
    for (int64_t i = 0; i < num_tasks; ++i) max_rows = std::max(max_rows, tasks[i].count * op.group());
    Forward<T> forward(op, max_rows);
    for (int64_t i = next++; i < num_tasks; i = next++) forward.run(tasks[i]);
}

}  // namespace recattn::RECATTN_ISA

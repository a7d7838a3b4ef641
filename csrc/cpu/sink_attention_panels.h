// The forward of sink_attention in float32, for one instruction set (see foreach_isa.h). No include guard.
//
//   qk  = scale * q k^T                  masked; in units of log 2
//   qk += bias[sink(i), sink(j)]         only where query i and key j are both sinks
//   out = softmax(qk) v                  online: row_max, row_sum, acc
//
// One task: a block of queries of the heads that share a key head, and all keys that they see, kBlockKeys at a time.
// Queries come in panels of a few registers, the columns of transposed scores: qk_t[j, i] = k[j] q[i]. So keys are read
// as they lie in memory, the softmax runs down the columns without sums across lanes, and the scores of a panel stay in
// the L1 cache until their product with v.

#include "cpu/simd/matmul.h"
// It needs matmul.h.
#include "cpu/simd/dropout.h"
#include "cpu/simd/softmax.h"

namespace recattn::RECATTN_ISA {
namespace {

constexpr int kPanelVectors = 3;
constexpr int64_t kPanelRows = kPanelVectors * Vector<float>::lanes;
constexpr int64_t kBlockKeys = 64;
// Keys in a register tile of qk_t that is `vectors` registers wide.
constexpr int tile_keys(int vectors) { return (RECATTN_TILE_VECTORS == 4 ? 24 : 12) / vectors; }

// log(x) for positive, normal x. NaN stays NaN.
RECATTN_INLINE Floats log_positive(Floats x) {
    const Integers bits = reinterpret_cast<Integers>(x);
    const Integers exponent = (bits - 0x3f3504f3) >> 23;  // x = 2^exponent m with m in [sqrt(1/2), sqrt(2))
    const Floats m = reinterpret_cast<Floats>(bits - (exponent << 23));
    const Floats t = (m - 1.0f) / (m + 1.0f), t2 = t * t;
    const Floats atanh = ((((t2 * (1.0f / 9) + 1.0f / 7) * t2 + 0.2f) * t2 + 1.0f / 3) * t2 + 1.0f) * t;
    return x == x ? __builtin_convertvector(exponent, Floats) * kLn2 + 2.0f * atanh : x;
}

// Rows that are read or written soon, which go to the L2 cache a few at a time.
struct Prefetch {
    struct Rows {
        const char* data;
        int64_t stride, count;
    };
    Rows rows[4];
    int64_t row_bytes, rows_per_step;

    template <class T>
    RECATTN_TARGET void add(const T* data, int64_t row_stride, int64_t count, int i) {
        rows[i] = {reinterpret_cast<const char*>(data), row_stride * static_cast<int64_t>(sizeof(T)), count};
    }

    RECATTN_INLINE void step() {
        int64_t left = rows_per_step;
        for (Rows& range : rows) {
            for (; left > 0 && range.count > 0; --left, --range.count, range.data += range.stride) {
                for (int64_t byte = 0; byte < row_bytes; byte += 64) __builtin_prefetch(range.data + byte, 0, 2);
            }
        }
    }
};

// qk_t = k q_t: `count` rows of V registers.
template <int V, int M = tile_keys(V)>
RECATTN_INLINE void multiply_keys(Lhs<float> k, Rhs<float> q_t, Out<float> qk_t, int64_t count, int64_t dim,
                                  Prefetch& prefetch) {
    for (; count >= M; count -= M, k.data += M * k.row_stride, qk_t.data += M * qk_t.row_stride) {
        prefetch.step();
        for_each_sum_block(k, q_t, qk_t, dim,
                           [](Lhs<float> lhs, Rhs<float> rhs, Out<float> out, int64_t terms)
                               RECATTN_TARGET { multiply_tile<M, V>(lhs, rhs, out, terms); });
    }
    if constexpr (M > 1) multiply_keys<V, (M > 6 ? (M + 1) / 2 : M - 1)>(k, q_t, qk_t, count, dim, prefetch);
}

// acc (+)= p v. The number of rows is even.
template <int M = RECATTN_TILE_ROWS>
RECATTN_INLINE void multiply_values(Lhs<float> p, Rhs<float> v, Out<float> acc, int64_t rows, int64_t count,
                                    int64_t columns) {
    for (; rows >= M; rows -= M, p.data += M * p.row_stride, acc.data += M * acc.row_stride) {
        multiply_columns<M, RECATTN_TILE_VECTORS>(p, v, acc, count, columns);
    }
    if constexpr (M > 2) multiply_values<M - 2>(p, v, acc, rows, count, columns);
}

// The queries of a task and their online softmax, in float32.
class Panels {
  public:
    RECATTN_TARGET Panels(const SinkOptions& op, int64_t max_rows)
        : width_(round_up_to_lanes<float>(op.value_dim)),
          q_t_(round_up_to_lanes<float>(max_rows) * op.dim),
          acc_(round_up_to_lanes<float>(max_rows) * width_),
          row_max_(round_up_to_lanes<float>(max_rows)),
          row_sum_(round_up_to_lanes<float>(max_rows)),
          lse_(round_up_to_lanes<float>(max_rows)),
          positions_(round_up_to_lanes<float>(max_rows)),
          sinks_(round_up_to_lanes<float>(max_rows)),
          heads_(round_up_to_lanes<float>(max_rows)),
          options_(op),
          qk_t_(kBlockKeys * kPanelRows) {}

  protected:
    static constexpr int64_t lanes = Vector<float>::lanes;
    static constexpr float infinity = std::numeric_limits<float>::infinity();

    // Row g * count + i of a task is query first + i of head g of the group. Rows of a panel: `row` and after.
    template <int V>
    struct Panel {
        static constexpr int vectors = V;
        static constexpr int64_t width = V * lanes;
        int64_t row, rows;
    };

    // Keys first .. first + count - 1 of the sequence, and the sinks among them.
    struct Keys {
        int64_t first, count;
        const int64_t *first_sink, *last_sink;
        Lhs<float> k;
        Rhs<float> v;
    };

    // Panels of three registers; the last two of two, rather than three and one.
    template <class Function>
    RECATTN_INLINE void for_each_panel(const Function& function) {
        for (int64_t row = 0, rows = options_.group() * task_.count; row < rows;) {
            const int64_t left = rows - row;
            if (left > 4 * lanes || (left > 2 * lanes && left <= 3 * lanes)) {
                function(Panel<3>{row, std::min(left, 3 * lanes)});
                row += 3 * lanes;
            } else if (left > lanes) {
                function(Panel<2>{row, std::min(left, 2 * lanes)});
                row += 2 * lanes;
            } else {
                function(Panel<1>{row, left});
                row += lanes;
            }
        }
    }

    // Tables of the rows; rows that fill up a register repeat the last.
    RECATTN_TARGET void load_rows() {
        const Sequence& sequence = *task_.sequence;
        const int64_t *first_sink = sequence.sinks, *last_sink = first_sink + sequence.num_sinks;
        int64_t row = 0;
        for (int64_t g = 0; g < options_.group(); ++g) {
            const int64_t head = task_.kv_head * options_.group() + g;
            const float logit = options_.sink_logits ? options_.sink_logits[head] * kLog2e : -infinity;
            const float row_sum = logit == -infinity ? 0 : 1 + (logit - logit);  // +inf gives NaN, as softmax does
            for (int64_t i = 0; i < task_.count; ++i) {
                positions_.data()[row + i] = static_cast<int32_t>(task_.first + i);
                sinks_.data()[row + i] = -1;
                heads_.data()[row + i] = static_cast<int32_t>(head);
                row_max_.data()[row + i] = logit;
                row_sum_.data()[row + i] = row_sum;
            }
            const int64_t* sink = std::lower_bound(first_sink, last_sink, task_.first);
            for (; sink < last_sink && *sink < task_.first + task_.count; ++sink) {
                sinks_.data()[row + *sink - task_.first] = static_cast<int32_t>(sink - first_sink);
            }
            row += task_.count;
        }
        for (; row % lanes != 0; ++row) {
            positions_.data()[row] = positions_.data()[row - 1];
            sinks_.data()[row] = -1;
            heads_.data()[row] = heads_.data()[row - 1];
            row_max_.data()[row] = row_max_.data()[row - 1];
            row_sum_.data()[row] = row_sum_.data()[row - 1];
        }
    }

    template <int V>
    RECATTN_TARGET void add_keys(Panel<V> panel, const Keys& keys) {
        int64_t count = keys.count;
        bool masked = false;
        if (options_.causal) {
            const int32_t* positions = positions_.data() + panel.row;
            const auto [first, last] = std::minmax_element(positions, positions + panel.rows);
            count = std::min(count, *last + 1 - keys.first);
            if (count <= 0) return;
            masked = keys.first + count - 1 > *first;
        }
        multiply_keys<V>(keys.k, q_t(panel), qk_t(panel), count, options_.dim, prefetch_);
        add_bias(panel, keys, count);
        if (masked) mask(panel, keys, count);
        softmax(panel, keys, count);
        if (options_.dropout) drop(panel, keys, count);
        // Every panel sees the first block, which overwrites acc.
        const Out<float> acc{acc_.data() + panel.row * width_, width_, keys.first > 0};
        multiply_values(Lhs<float>{qk_t_.data(), 1, panel.width}, keys.v, acc, panel.rows + (panel.rows & 1), count,
                        width_);
    }

    template <int V>
    RECATTN_INLINE Rhs<float> q_t(Panel<V> panel) const {
        return {q_t_.data() + panel.row * options_.dim, panel.width};
    }

    template <int V>
    RECATTN_INLINE Out<float> qk_t(Panel<V> panel) {
        return {qk_t_.data(), panel.width, false};
    }

    // qk + bias * log2(e) is one fused multiply-add wherever it is computed: the backward needs the same scores.
    template <int V>
    RECATTN_TARGET void add_bias(Panel<V> panel, const Keys& keys, int64_t count) {
        const int64_t* last_sink = std::lower_bound(keys.first_sink, keys.last_sink, keys.first + count);
        for (int64_t v = 0; v < panel.width && keys.first_sink < last_sink; v += lanes) {
            const float* bias[lanes];  // of the rows that are sinks
            int64_t sinks = 0;
            for (int64_t m = 0; m < lanes; ++m) {
                const int64_t row = panel.row + v + m, sink = sinks_.data()[row];
                bias[m] = sink < 0 ? nullptr
                                   : options_.bias_of(*task_.sequence, heads_.data()[row]) + sink * options_.num_sinks;
                sinks += sink >= 0;
            }
            if (sinks == 0) continue;
            float* qk_t = qk_t_.data() + v - keys.first * panel.width;
            const int64_t *all = task_.sequence->sinks, first = keys.first_sink - all, last = last_sink - all;
            if (sinks * (last - first) < lanes || options_.num_sinks < lanes) {
                for (int64_t m = 0; m < lanes; ++m) {
                    for (int64_t i = first; bias[m] != nullptr && i < last; ++i) {
                        qk_t[all[i] * panel.width + m] += bias[m][i] * kLog2e;
                    }
                }
                continue;
            }
            alignas(64) float columns[lanes * lanes];
            const int64_t last_start = options_.num_sinks - task_.sequence->first_sink - lanes;
            for (int64_t i = first; i < last; i += lanes) {
                const int64_t start = std::min(i, last_start);  // a whole register of the bias, some of it added before
                const auto row = [&](int m) RECATTN_TARGET
                    __attribute__((always_inline)) { return bias[m] == nullptr ? Floats{} : load(bias[m] + start); };
                transpose_registers(row, columns, lanes);
                for (int64_t j = i; j < std::min(last, i + lanes); ++j) {
                    float* scores = qk_t + all[j] * panel.width;
                    store(scores, load(scores) + load(columns + (j - start) * lanes) * kLog2e);
                }
            }
        }
    }

    template <int V>
    RECATTN_TARGET void mask(Panel<V> panel, const Keys& keys, int64_t count) {
        using Positions = Vector<int32_t>::type;
        for (int64_t v = 0; v < panel.width; v += lanes) {
            const auto positions = *reinterpret_cast<const Positions*>(positions_.data() + panel.row + v);
            for (int64_t j = 0; j < count; ++j) {
                float* qk_t = qk_t_.data() + j * panel.width + v;
                store(qk_t, positions < static_cast<int32_t>(keys.first + j) ? Floats{} - infinity : load(qk_t));
            }
        }
    }

    // p in place of qk. row_max stays as it is until a score exceeds it by more than kMaxLag, so that acc is rarely
    // multiplied by a change of scale.
    template <int V>
    RECATTN_TARGET void softmax(Panel<V> panel, const Keys& keys, int64_t count) {
        float *qk_t = qk_t_.data(), *row_max = row_max_.data() + panel.row, *row_sum = row_sum_.data() + panel.row;
        Floats maxes[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) maxes[v] = Floats{} - infinity;
        for (int64_t j = 0; j < count; ++j) {
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) {
                const Floats x = load(qk_t + j * panel.width + v * lanes);
                maxes[v] = maxes[v] > x ? maxes[v] : x;
            }
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            const Floats old_max = load(row_max + v * lanes);
            const Floats new_max = maxes[v] > old_max + kMaxLag ? maxes[v] : old_max;
            const Floats max = new_max == -infinity ? Floats{} : new_max;  // no key yet
            Floats old_sum = load(row_sum + v * lanes), sum{}, sums{};     // a block's sum is rounded by itself
            if (any(new_max > old_max)) {
                store(row_max + v * lanes, new_max);
                const Floats change = exp2_of(old_max - max);
                old_sum *= change;
                if (keys.first > 0) multiply_rows(panel.row + v * lanes, change);
            }
            float* p = qk_t + v * lanes;
            int64_t j = 0;
            for (; j + 1 < count; j += 2, p += 2 * panel.width) {
                const Floats first = exp2_of(load(p) - max), second = exp2_of(load(p + panel.width) - max);
                store(p, first);
                store(p + panel.width, second);
                sum += first;
                sums += second;
            }
            if (j < count) {
                const Floats last = exp2_of(load(p) - max);
                store(p, last);
                sum += last;
            }
            store(row_sum + v * lanes, old_sum + (sum + sums));
        }
    }

    RECATTN_TARGET void multiply_rows(int64_t row, Floats factors) {
        for (int64_t m = 0; m < lanes; ++m) {
            if (factors[m] == 1) continue;
            float* acc = acc_.data() + (row + m) * width_;
            for (int64_t d = 0; d < width_; d += lanes) store(acc + d, load(acc + d) * factors[m]);
        }
    }

    template <int V>
    RECATTN_TARGET void drop(Panel<V> panel, const Keys& keys, int64_t count) {
        constexpr int64_t row_stride = std::max(kBlockKeys, 8 * lanes);  // what dropout_row writes
        alignas(64) float weights[lanes * row_stride], transposed[lanes * lanes];
        for (int64_t v = 0; v < panel.width; v += lanes) {
            for (int64_t m = 0; m < lanes; ++m) {
                const int64_t row = panel.row + v + m;
                const uint32_t bh = static_cast<uint32_t>(task_.sequence->index * options_.heads + heads_.data()[row]);
                dropout_row(options_.dropout, bh, kPerToken, positions_.data()[row], keys.first, count,
                            weights + m * row_stride);
            }
            for (int64_t j = 0; j < count; j += lanes) {
                transpose_block(weights + j, row_stride, lanes, transposed, lanes);
                for (int64_t i = 0; i < std::min(lanes, count - j); ++i) {
                    float* p = qk_t_.data() + (j + i) * panel.width + v;
                    store(p, load(p) * load(transposed + i * lanes));
                }
            }
        }
    }

    // lse, and 1 / row_sum in place of row_sum. Of rows that see no key row_max is made +inf: their p is then 0.
    RECATTN_TARGET void finish_rows() {
        for (int64_t row = 0; row < options_.group() * task_.count; row += lanes) {
            const Floats sum = load(row_sum_.data() + row);
            const Floats row_max = load(row_max_.data() + row);
            store(lse_.data() + row, sum == 0.0f ? Floats{} - infinity : row_max * kLn2 + log_positive(sum));
            store(row_max_.data() + row, sum == 0.0f ? Floats{} + infinity : row_max);
            store(row_sum_.data() + row, sum == 0.0f ? Floats{} : 1.0f / sum);
        }
    }

    QueryBlock task_{};
    Prefetch prefetch_{};
    int64_t width_;
    Scratch<float> q_t_, acc_;                    // panels of q_t [D, width]; acc [rows, width_]
    Scratch<float> row_max_, row_sum_, lse_;      // [rows]
    Scratch<int32_t> positions_, sinks_, heads_;  // [rows]; sinks: index of the sink in the sequence, or -1

  private:
    static constexpr float kMaxLag = 8;

    const SinkOptions& options_;
    Scratch<float> qk_t_;
};

}  // namespace
}  // namespace recattn::RECATTN_ISA

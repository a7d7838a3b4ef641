// The forward of sink_attention in float32, for one instruction set (see foreach_isa.h).
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
        if (options_.causal) {
            const auto [first, last] =
                std::minmax_element(positions_.data() + panel.row, positions_.data() + panel.row + panel.rows);
            count = std::min(count, *last + 1 - keys.first);
            if (count <= 0) return;
            multiply_keys<V>(keys.k, q_t(panel), qk_t(panel), count, options_.dim, prefetch_);
            add_bias(panel, keys, count);
            if (keys.first + count - 1 > *first) mask(panel, keys, count);
        } else {
            multiply_keys<V>(keys.k, q_t(panel), qk_t(panel), count, options_.dim, prefetch_);
            add_bias(panel, keys, count);
        }
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
            Floats sum = load(row_sum + v * lanes), sums{};
            if (any(new_max > old_max)) {
                store(row_max + v * lanes, new_max);
                const Floats change = exp2_of(old_max - max);
                sum *= change;
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
            store(row_sum + v * lanes, sum + sums);
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
        alignas(64) float weights[lanes * kBlockKeys], transposed[lanes * lanes];
        for (int64_t v = 0; v < panel.width; v += lanes) {
            for (int64_t m = 0; m < lanes; ++m) {
                const int64_t row = panel.row + v + m;
                const uint32_t bh = static_cast<uint32_t>(task_.sequence->index * options_.heads + heads_.data()[row]);
                dropout_row(options_.dropout, bh, kPerToken, positions_.data()[row], keys.first, kBlockKeys,
                            weights + m * kBlockKeys);
            }
            for (int64_t j = 0; j < count; j += lanes) {
                transpose_block(weights + j, kBlockKeys, lanes, transposed, lanes);
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

// Computes tasks, one after another, in its scratch memory.
template <class T>
class Forward : Panels {
  public:
    RECATTN_TARGET Forward(const SinkAttention<T>& op, int64_t max_rows)
        : Panels(op, max_rows),
          op_(op),
          // Rows that lie a multiple of 1 KB apart share few sets of the L1 cache.
          copies_keys_(!std::is_same_v<T, float> || op.k.row_stride % 256 == 0),
          copies_values_(!std::is_same_v<T, float> || width_ != op.value_dim || op.v.row_stride % 256 == 0),
          keys_(copies_keys_ ? kBlockKeys * op.dim : 0),
          values_(copies_values_ ? kBlockKeys * width_ : 0) {}

    // `next` is the thread's next task, or null.
    RECATTN_TARGET void run(const QueryBlock& task, const QueryBlock* next) {
        task_ = task;
        if (task.first == 0) write_padding();
        if (task.count == 0) return;
        load_rows();
        for_each_panel([&](const auto& panel) RECATTN_TARGET { load_queries(panel); });
        const Sequence& sequence = *task.sequence;
        const int64_t end = op_.causal ? task.first + task.count : sequence.length;
        const int64_t *sink = sequence.sinks, *last_sink = sink + sequence.num_sinks;
        // Blocks of about the same size, at multiples of 8 as dropout needs.
        const int64_t num_blocks = (end + kBlockKeys - 1) / kBlockKeys, block = ((end - 1) / num_blocks + 8) / 8 * 8;
        for (Keys keys{}; keys.first < end; keys.first += block) {
            keys.count = std::min(block, end - keys.first);
            keys.first_sink = std::lower_bound(sink, last_sink, keys.first);
            keys.last_sink = sink = std::lower_bound(keys.first_sink, last_sink, keys.first + keys.count);
            load_keys(keys);
            prefetch_after(keys, block, end, next);
            for_each_panel([&](const auto& panel) RECATTN_TARGET { add_keys(panel, keys); });
        }
        finish_rows();
        store_rows();
    }

  private:
    RECATTN_TARGET void write_padding() const {
        const Sequence& sequence = *task_.sequence;
        if (op_.packed || sequence.length == op_.n) return;
        for (int64_t g = 0; g < op_.group(); ++g) {
            const int64_t head = task_.kv_head * op_.group() + g;
            for (int64_t i = 0; i < op_.n; ++i) {
                if (i >= sequence.start && i < sequence.start + sequence.length) continue;
                T* row = op_.new_out.at(sequence.batch, head, i);
                std::fill(row, row + op_.value_dim, T(0));
                *op_.lse.at(sequence.batch, head, i) = -infinity;
                *op_.row_max.at(sequence.batch, head, i) = infinity;
                *op_.inverse_sum.at(sequence.batch, head, i) = 0;
            }
        }
    }

    // q_t [D, width]: the panel's queries as columns, multiplied by the scale.
    template <int V>
    RECATTN_TARGET void load_queries(Panel<V> panel) {
        const Sequence& sequence = *task_.sequence;
        const float scale = op_.scale * kLog2e;
        for (int64_t v = 0; v < panel.width; v += lanes) {
            const T* rows[lanes];
            for (int64_t m = 0; m < lanes; ++m) {
                const int64_t row = panel.row + v + m;
                rows[m] = op_.q.at(sequence.batch, heads_.data()[row], sequence.start + positions_.data()[row]);
            }
            float* out = q_t_.data() + panel.row * op_.dim + v;
            if (op_.dim < lanes) {
                for (int64_t d = 0; d < op_.dim; ++d) {
                    for (int64_t m = 0; m < lanes; ++m) {
                        out[d * panel.width + m] = static_cast<float>(rows[m][d]) * scale;
                    }
                }
                continue;
            }
            for (int64_t d = 0; d < op_.dim; d += lanes) {
                const int64_t first = std::min(d, op_.dim - lanes);  // the last block overlaps the one before
                const auto row = [&](int m) RECATTN_TARGET
                    __attribute__((always_inline)) { return load_as_float(rows[m] + first) * scale; };
                transpose_registers(row, out + first * panel.width, panel.width);
            }
        }
    }

    RECATTN_TARGET void load_keys(Keys& keys) {
        const int64_t batch = task_.sequence->batch, position = task_.sequence->start + keys.first;
        const T *k = op_.k.at(batch, task_.kv_head, position), *v = op_.v.at(batch, task_.kv_head, position);
        if constexpr (std::is_same_v<T, float>) {
            keys.k = {k, op_.k.row_stride, 1};
            keys.v = {v, op_.v.row_stride};
        }
        if (copies_keys_) {
            for (int64_t j = 0; j < keys.count; ++j) {
                copy_row(k + j * op_.k.row_stride, op_.dim, keys_.data() + j * op_.dim);
            }
            keys.k = {keys_.data(), op_.dim, 1};
        }
        if (copies_values_) {
            for (int64_t j = 0; j < keys.count; ++j) {
                float* row = values_.data() + j * width_;
                copy_row(v + j * op_.v.row_stride, op_.value_dim, row);
                std::fill(row + op_.value_dim, row + width_, 0.0f);
            }
            keys.v = {values_.data(), width_};
        }
    }

    // The next block of keys, or the first of the next task.
    RECATTN_TARGET void prefetch_after(const Keys& keys, int64_t block, int64_t end, const QueryBlock* next) {
        const int64_t first = keys.first + block;
        const bool ends = first >= end;
        prefetch_ = {.row_bytes = std::min(op_.dim, op_.value_dim) * static_cast<int64_t>(sizeof(T)),
                     .rows_per_step = 1};
        if (ends) {
            const Sequence& sequence = *task_.sequence;
            T* out = op_.new_out.at(sequence.batch, task_.kv_head * op_.group(), sequence.start + task_.first);
            prefetch_.add(out, op_.new_out.row_stride, task_.count, 0);
            if (next == nullptr) return;
        }
        const QueryBlock& task = ends ? *next : task_;
        const Sequence& sequence = *task.sequence;
        const int64_t position = sequence.start + (ends ? 0 : first);
        const int64_t count = std::min(kBlockKeys, ends ? sequence.length : end - first);
        prefetch_.add(op_.k.at(sequence.batch, task.kv_head, position), op_.k.row_stride, count, 1);
        prefetch_.add(op_.v.at(sequence.batch, task.kv_head, position), op_.v.row_stride, count, 2);
        if (ends) {
            const int64_t head = task.kv_head * op_.group();
            prefetch_.add(op_.q.at(sequence.batch, head, sequence.start + task.first), op_.q.row_stride, task.count, 3);
        }
        const int64_t tiles = op_.group() * task_.count * keys.count / (kPanelRows * tile_keys(kPanelVectors)) + 1;
        prefetch_.rows_per_step = (prefetch_.rows[0].count + prefetch_.rows[3].count + 2 * count) / tiles + 1;
    }

    RECATTN_TARGET void store_rows() const {
        const Sequence& sequence = *task_.sequence;
        for (int64_t row = 0; row < op_.group() * task_.count; ++row) {
            const int64_t head = heads_.data()[row], position = sequence.start + positions_.data()[row];
            *op_.lse.at(sequence.batch, head, position) = lse_.data()[row];
            *op_.row_max.at(sequence.batch, head, position) = row_max_.data()[row];
            *op_.inverse_sum.at(sequence.batch, head, position) = row_sum_.data()[row];
            const float *acc = acc_.data() + row * width_, inverse = row_sum_.data()[row];
            T* out = op_.new_out.at(sequence.batch, head, position);
            int64_t d = 0;
            for (; d + lanes <= op_.value_dim; d += lanes) store_as(load(acc + d) * inverse, out + d);
            for (; d < op_.value_dim; ++d) out[d] = static_cast<T>(acc[d] * inverse);
        }
    }

    const SinkAttention<T>& op_;
    bool copies_keys_, copies_values_;
    Scratch<float> keys_, values_;
};

// Tasks next, next + 1, ... until none is left.
template <class T>
RECATTN_TARGET void sink_forward(const SinkAttention<T>& op, const QueryBlock* tasks, int64_t num_tasks,
                                 std::atomic<int64_t>& next) {
    int64_t max_rows = 0;
    for (int64_t i = 0; i < num_tasks; ++i) max_rows = std::max(max_rows, tasks[i].count * op.group());
    Forward<T> forward(op, max_rows);
    for (int64_t i = next++; i < num_tasks;) {
        const int64_t after = next++;
        forward.run(tasks[i], after < num_tasks ? &tasks[after] : nullptr);
        i = after;
    }
}

}  // namespace recattn::RECATTN_ISA

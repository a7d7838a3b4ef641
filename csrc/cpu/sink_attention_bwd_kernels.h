// Gradients of sink_attention in float32, for one instruction set (see foreach_isa.h).
//
//   s  = scale * q k^T + bias at the pairs of sinks           [queries, keys], in units of log 2
//   p  = exp2(s - row_max) * inverse_sum                      the forward's, to the last bit but one
//   dp = dout v^T
//   ds = p * (dp - delta),  delta = sum(dout * out)           with dropout z: p * (z * dp - delta)
//   dv = (z * p)^T dout,  dk = scale * ds^T q,  dq = scale * ds k,  dbias = ds at the pairs of sinks
//
// A tile is kTile queries by kTile keys; its matrices stay in the core's L2 cache, each operand of a product in L1.

#include "cpu/simd/matmul.h"
// They need matmul.h.
#include "cpu/simd/dropout.h"
#include "cpu/simd/matmul_triangular.h"
#include "cpu/simd/softmax.h"

namespace recattn::RECATTN_ISA {
namespace {

// --- Products of a tile ---

// As multiply_tile, for any number of rows.
template <int M, int V>
RECATTN_INLINE void multiply_panel(Lhs<float> lhs, Rhs<float> rhs, Out<float> out, int64_t rows, int64_t depth) {
    for (; rows >= M; rows -= M, lhs.data += M * lhs.row_stride, out.data += M * out.row_stride) {
        multiply_tile<M, V>(lhs, rhs, out, depth);
    }
    if constexpr (M > 1) multiply_panel<M == 6 ? 4 : M / 2, V>(lhs, rhs, out, rows, depth);
}

// out (+)= lhs rhs, one panel of V registers of columns after another: a panel of rhs stays in the L1 cache.
template <int V>
RECATTN_TARGET void multiply_panels(Lhs<float> lhs, Rhs<float> rhs, Out<float> out, Sizes size) {
    constexpr int64_t step = V * Vector<float>::lanes;
    for (; size.columns >= step; size.columns -= step, rhs.data += step, out.data += step) {
        multiply_panel<RECATTN_TILE_ROWS, V>(lhs, rhs, out, size.rows, size.depth);
    }
    if constexpr (V > 1) multiply_panels<V - 1>(lhs, rhs, out, size);
}

// out (+)= lhs rhs in whole registers, its sum in blocks of kSumBlock terms. Triangles are those of a causal tile on
// the diagonal.
RECATTN_TARGET inline void multiply(Lhs<float> lhs, Rhs<float> rhs, Out<float> out, Sizes size, Triangles triangles) {
    if (triangles.lhs != Triangle::full || triangles.out != Triangle::full) {
        multiply_triangular(lhs, rhs, out, size, triangles);
        return;
    }
    size.columns = round_up_to_lanes<float>(size.columns);
    for_each_sum_block(lhs, rhs, out, size.depth,
                       [=](Lhs<float> lhs_block, Rhs<float> rhs_block, Out<float> sum, int64_t terms) RECATTN_TARGET {
                           multiply_panels<RECATTN_TILE_VECTORS>(lhs_block, rhs_block, sum,
                                                                 {size.rows, terms, size.columns});
                       });
}

// --- Rows ---

// scale * in, zeros up to whole registers. Rows of `out` are row_stride apart.
template <class T>
RECATTN_TARGET void copy_scaled(const T* in, int64_t in_row_stride, int64_t rows, int64_t columns, float scale,
                                float* out, int64_t row_stride) {
    constexpr int64_t lanes = Vector<float>::lanes;
    for (int64_t i = 0; i < rows; ++i, in += in_row_stride, out += row_stride) {
        int64_t n = 0;
        for (; n + lanes <= columns; n += lanes) store(out + n, load_as_float(in + n) * scale);
        for (; n < columns; ++n) out[n] = static_cast<float>(in[n]) * scale;
        std::fill(out + columns, out + row_stride, 0.0f);
    }
}

// out (+)= scale * in.
template <class T>
RECATTN_TARGET void store_rows(const float* in, int64_t in_row_stride, int64_t rows, int64_t columns, float scale,
                               bool accumulate, T* out, int64_t row_stride) {
    constexpr int64_t lanes = Vector<float>::lanes;
    for (int64_t i = 0; i < rows; ++i, in += in_row_stride, out += row_stride) {
        int64_t n = 0;
        for (; n + lanes <= columns; n += lanes) {
            const Floats values = scale * load(in + n);
            store_as(accumulate ? load_as_float(out + n) + values : values, out + n);
        }
        for (; n < columns; ++n) {
            out[n] = static_cast<T>((accumulate ? static_cast<float>(out[n]) : 0.0f) + scale * in[n]);
        }
    }
}

template <class T>
RECATTN_INLINE float dot(const T* a, const T* b, int64_t size) {
    constexpr int64_t lanes = Vector<float>::lanes;
    Floats sums{};
    int64_t n = 0;
    for (; n + lanes <= size; n += lanes) sums += load_as_float(a + n) * load_as_float(b + n);
    float sum = sum_of_lanes(sums);
    for (; n < size; ++n) sum += static_cast<float>(a[n]) * static_cast<float>(b[n]);
    return sum;
}

// --- One thread's buffers ---

struct BackwardBuffers {
    int64_t tile, dim, value_dim, tile_stride;  // in whole registers
    Scratch<float> memory;
    float *k_t, *v_t, *k, *q, *dout, *p, *ds, *dk, *dv, *z, *dq;

    template <class T>
    RECATTN_TARGET explicit BackwardBuffers(const SinkBackward<T>& backward)
        : tile(round_up_to_lanes<float>(std::min(kTile, backward.longest))),
          dim(round_up_to_lanes<float>(backward.op.dim)),
          value_dim(round_up_to_lanes<float>(backward.op.value_dim)),
          tile_stride(tile + 16),  // so that the rows of a column lie in different sets of the L1 cache
          memory(tile * (4 * dim + 3 * value_dim + 2 * tile_stride) + kDropoutRow + backward.max_dq_rows * dim) {
        float* next = memory.data();
        const auto take = [&](int64_t size) RECATTN_TARGET { return std::exchange(next, next + size); };
        k_t = take(tile * dim);
        v_t = take(tile * value_dim);
        k = take(tile * dim);
        q = take(tile * dim);
        dout = take(tile * value_dim);
        p = take(tile * tile_stride);
        ds = take(tile * tile_stride);
        dk = take(tile * dim);
        dv = take(tile * value_dim);
        z = take(kDropoutRow);
        dq = take(backward.max_dq_rows * dim);
    }

  private:
    static constexpr int64_t kDropoutRow = kTile + 8 * Vector<float>::lanes;
};

// --- One task ---

template <class T>
class BackwardTask {
  public:
    RECATTN_TARGET BackwardTask(const SinkBackward<T>& backward, const KeyTask& task, BackwardBuffers& buffers)
        : backward_(backward), op_(backward.op), task_(task), sequence_(*task.sequence), b_(buffers) {}

    RECATTN_TARGET void run() {
        for (kv_head_ = task_.first_kv_head; kv_head_ < task_.last_kv_head; ++kv_head_) {
            if (task_.step == 0 && task_.first_key == 0) write_padding();
            for (int64_t key = task_.first_key; key < task_.last_key; key += kTile) add_keys(key);
            for (int64_t g = 0; g < op_.group(); ++g) {
                store_gradient(op_.dq, kv_head_ * op_.group() + g, task_.first_query, num_queries(), op_.dim,
                               task_.ends_queries, g, {dq_rows(g, task_.first_query), b_.dim, op_.scale});
            }
        }
    }

  private:
    static constexpr bool kIsFloat = std::is_same_v<T, float>;
    using Range = std::pair<int64_t, int64_t>;

    RECATTN_TARGET void write_padding() const {
        if (op_.packed || sequence_.length == op_.n) return;
        const auto clear = [&](const Tokens<T>& tensor, int64_t head, int64_t columns) RECATTN_TARGET {
            for (int64_t i = 0; i < op_.n; ++i) {
                if (i == sequence_.start) i += sequence_.length;
                if (i == op_.n) break;
                T* row = tensor.at(sequence_.batch, head, i);
                std::fill(row, row + columns, T(0));
            }
        };
        for (int64_t g = 0; g < op_.group(); ++g) clear(op_.dq, kv_head_ * op_.group() + g, op_.dim);
        clear(op_.dk, kv_head_, op_.dim);
        clear(op_.dv, kv_head_, op_.value_dim);
    }

    // The keys from `first` on, against the queries of the task.
    RECATTN_TARGET void add_keys(int64_t first) const {
        const int64_t keys = std::min(kTile, task_.last_key - first), head = kv_head_;
        const Rhs<float> k = rows_of(op_.k, head, first, keys, op_.dim, b_.k);
        transpose(as_lhs(k), keys, op_.dim, b_.k_t, b_.tile);
        transpose(as_lhs(rows_of(op_.v, head, first, keys, op_.value_dim, b_.dv)), keys, op_.value_dim, b_.v_t,
                  b_.tile);
        const Range sinks = sinks_in(first, keys);
        const int64_t first_query = op_.causal ? std::max(task_.first_query, first) : task_.first_query;
        bool is_first = true;
        for (int64_t g = 0; g < op_.group(); ++g) {
            for (int64_t query = first_query; query < task_.last_query; query += kTile) {
                add_tile(g, query, first, k, keys, sinks, is_first);
                is_first = false;
            }
        }
        store_gradient(op_.dk, head, first, keys, op_.dim, task_.ends_keys, op_.group(), {b_.dk, b_.dim, kLn2});
        store_gradient(op_.dv, head, first, keys, op_.value_dim, task_.ends_keys, op_.group() + 1,
                       {b_.dv, b_.value_dim, 1});
    }

    struct Gradient {
        const float* data;
        int64_t row_stride;
        float scale;
    };

    // Adds the gradient of `count` tokens to `tensor`: in float32, in the part `part` of the sums, until the task that
    // ends the sum. The parts are dq of each head, dk and dv.
    RECATTN_TARGET void store_gradient(const Tokens<T>& tensor, int64_t head, int64_t first, int64_t count,
                                       int64_t columns, bool ends, int64_t part, Gradient gradient) const {
        T* out = tensor.at(sequence_.batch, head, sequence_.start + first);
        const bool accumulate = task_.step > 0;
        if (task_.sums < 0) {
            store_rows(gradient.data, gradient.row_stride, count, columns, gradient.scale, accumulate, out,
                       tensor.row_stride);
            return;
        }
        const int64_t width = sum_columns(columns);
        float* sums =
            backward_.sums + task_.sums + (kv_head_ - task_.first_kv_head) * size_of_sums(op_, sequence_.length);
        float* sum = sums + part * sequence_.length * sum_columns(op_.dim) + first * width;
        store_rows(gradient.data, gradient.row_stride, count, columns, gradient.scale, accumulate, sum, width);
        if (ends) store_rows(sum, width, count, columns, 1, false, out, tensor.row_stride);
    }

    RECATTN_TARGET int64_t num_queries() const { return task_.last_query - task_.first_query; }
    RECATTN_TARGET float* dq_rows(int64_t g, int64_t query) const {
        return b_.dq + (g * num_queries() + query - task_.first_query) * b_.dim;
    }

    // One tile of the g-th head: adds to dq, dk, dv and dbias. The first tile of the keys starts dk and dv, that of the
    // queries dq.
    RECATTN_TARGET void add_tile(int64_t g, int64_t query, int64_t key, Rhs<float> k, int64_t keys, Range key_sinks,
                                 bool starts_keys) const {
        const int64_t head = kv_head_ * op_.group() + g, rows = std::min(kTile, task_.last_query - query);
        const bool starts_queries = key == task_.first_key;
        if (task_.step == 0 && starts_queries) compute_delta(head, query, rows);
        // Rounded as in the forward, so that the scores are the same.
        copy_scaled(op_.q.at(sequence_.batch, head, sequence_.start + query), op_.q.row_stride, rows, op_.dim,
                    op_.scale * kLog2e, b_.q, b_.dim);
        const Rhs<float> q{b_.q, b_.dim};
        const Rhs<float> dout = rows_of(op_.dout, head, query, rows, op_.value_dim, b_.dout);
        const bool diagonal = op_.causal && query == key;
        const Triangle lower = diagonal ? Triangle::lower : Triangle::full,
                       upper = diagonal ? Triangle::upper : Triangle::full;

        multiply(as_lhs(q), {b_.k_t, b_.tile}, {b_.p, b_.tile_stride, false}, {rows, op_.dim, keys}, {.out = lower});
        multiply(as_lhs(dout), {b_.v_t, b_.tile}, {b_.ds, b_.tile_stride, false}, {rows, op_.value_dim, keys},
                 {.out = lower});
        const Range query_sinks = key_sinks.first < key_sinks.second ? sinks_in(query, rows) : key_sinks;
        if (op_.dropout) {
            compute_p_and_ds<true>(head, query, key, rows, keys, query_sinks, key_sinks);
        } else {
            compute_p_and_ds<false>(head, query, key, rows, keys, query_sinks, key_sinks);
        }
        add_dbias(head, query, key, query_sinks, key_sinks);

        const Lhs<float> p_t{b_.p, 1, b_.tile_stride}, ds_t{b_.ds, 1, b_.tile_stride};
        multiply(p_t, dout, {b_.dv, b_.value_dim, !starts_keys}, {keys, rows, b_.value_dim}, {.lhs = upper});
        multiply(ds_t, q, {b_.dk, b_.dim, !starts_keys}, {keys, rows, b_.dim}, {.lhs = upper});
        multiply(Lhs<float>{b_.ds, b_.tile_stride, 1}, k, {dq_rows(g, query), b_.dim, !starts_queries},
                 {rows, keys, b_.dim}, {.lhs = lower});
    }

    // Rows of a head as an Rhs: in place if they are float32, contiguous and whole registers.
    RECATTN_TARGET Rhs<float> rows_of(const Tokens<const T>& tensor, int64_t head, int64_t first, int64_t rows,
                                      int64_t columns, float* scratch) const {
        const T* data = tensor.at(sequence_.batch, head, sequence_.start + first);
        const int64_t width = round_up_to_lanes<float>(columns);
        if constexpr (kIsFloat) {
            if (columns == width && tensor.row_stride == columns) return {data, columns};
        }
        copy_scaled(data, tensor.row_stride, rows, columns, 1, scratch, width);
        return {scratch, width};
    }

    RECATTN_INLINE static Lhs<float> as_lhs(Rhs<float> rows) { return {rows.data, rows.row_stride, 1}; }

    // The sinks among positions first .. first + count - 1, as a range of sequence.sinks.
    RECATTN_TARGET Range sinks_in(int64_t first, int64_t count) const {
        const int64_t *begin = sequence_.sinks, *end = begin + sequence_.num_sinks;
        const int64_t* low = std::lower_bound(begin, end, first);
        return {low - begin, std::lower_bound(low, end, first + count) - begin};
    }

    RECATTN_TARGET void add_dbias(int64_t head, int64_t query, int64_t key, Range query_sinks, Range key_sinks) const {
        const int64_t *sinks = sequence_.sinks, first = sequence_.first_sink;
        const int64_t matrix = sequence_.index * op_.dbias_heads + head * op_.dbias_heads / op_.heads;
        float* dbias = op_.dbias + matrix * op_.num_sinks * op_.num_sinks;
        for (int64_t i = query_sinks.first; i < query_sinks.second; ++i) {
            const float* ds = b_.ds + (sinks[i] - query) * b_.tile_stride;
            float* row = dbias + (first + i) * op_.num_sinks + first;
            for (int64_t j = key_sinks.first; j < key_sinks.second; ++j) row[j] += ds[sinks[j] - key];
        }
    }

    RECATTN_TARGET void compute_delta(int64_t head, int64_t query, int64_t rows) const {
        const int64_t first = sequence_.start + query;
        for (int64_t i = first; i < first + rows; ++i) {
            *backward_.delta.at(sequence_.batch, head, i) =
                dot(op_.dout.at(sequence_.batch, head, i), op_.out.at(sequence_.batch, head, i), op_.value_dim);
        }
    }

    // p of a row, in the place of q k^T. Returns delta as the sum of p * dp: dout * out rounds otherwise than dp, which
    // shows in rows of few keys.
    RECATTN_TARGET static float compute_p(float* p, const float* dp, int64_t visible, float row_max,
                                          float inverse_sum) {
        Floats sums{};
        for (int64_t j = 0; j < visible; j += Vector<float>::lanes) {
            const Floats x = exp2_of(load(p + j) - row_max) * inverse_sum;
            store(p + j, x);
            sums += first_lanes(x * load(dp + j), visible - j, 0);
        }
        return sum_of_lanes(sums);
    }

    // p and ds from q k^T and dp, in their place. Zeros at keys that a query does not see.
    template <bool kDropout>
    RECATTN_TARGET void compute_p_and_ds(int64_t head, int64_t query, int64_t key, int64_t rows, int64_t keys,
                                         Range query_sinks, Range key_sinks) const {
        constexpr int64_t lanes = Vector<float>::lanes;
        const int64_t columns = round_up_to_lanes<float>(keys);
        const float* bias = op_.bias_of(sequence_, head);
        for (int64_t i = 0, sink = query_sinks.first; i < rows; ++i) {
            float *p = b_.p + i * b_.tile_stride, *ds = b_.ds + i * b_.tile_stride;
            const int64_t position = sequence_.start + query + i;
            const float row_max = *op_.row_max.at(sequence_.batch, head, position);
            const float inverse_sum = *op_.inverse_sum.at(sequence_.batch, head, position);
            const int64_t visible = op_.causal ? std::min(keys, query + i - key + 1) : keys;
            if constexpr (kDropout) {
                dropout_row(op_.dropout, static_cast<uint32_t>(sequence_.index * op_.heads + head), kPerToken,
                            static_cast<uint32_t>(query + i), key, columns, b_.z);
            }
            if (sink < query_sinks.second && sequence_.sinks[sink] == query + i) {
                for (int64_t s = key_sinks.first; s < key_sinks.second; ++s) {
                    p[sequence_.sinks[s] - key] += bias[sink * op_.num_sinks + s] * kLog2e;
                }
                ++sink;
            }
            // Where all keys of a row are here, p is computed first, for delta.
            const bool has_p = !kDropout && visible == (op_.causal ? query + i + 1 : sequence_.length);
            const float delta = has_p ? compute_p(p, ds, visible, row_max, inverse_sum)
                                      : *backward_.delta.at(sequence_.batch, head, position);
            int64_t j = 0;
            // A key with all the weight has dp = delta, but for rounding.
            const auto step = [&](auto is_last) RECATTN_TARGET {
                Floats x = has_p ? load(p + j) : exp2_of(load(p + j) - row_max) * inverse_sum;
                if constexpr (is_last) x = first_lanes(x, visible - j, 0);
                if constexpr (kDropout) {
                    const Floats z = load(b_.z + j);
                    store(p + j, x * z);
                    store(ds + j, x == 1.0f ? Floats{} : x * (load(ds + j) * z - delta));
                } else {
                    store(p + j, x);
                    store(ds + j, x == 1.0f ? Floats{} : x * (load(ds + j) - delta));
                }
            };
            for (; j + lanes <= visible; j += lanes) step(std::false_type{});
            if (j < visible) {
                step(std::true_type{});
                j += lanes;
            }
            if (j < columns) {
                std::fill(p + j, p + columns, 0.0f);
                std::fill(ds + j, ds + columns, 0.0f);
            }
        }
    }

    const SinkBackward<T>& backward_;
    const SinkAttention<T>& op_;
    const KeyTask& task_;
    const Sequence& sequence_;
    BackwardBuffers& b_;
    int64_t kv_head_ = 0;
};

// Tasks next, next + 1, ... until none is left before `end`.
template <class T>
RECATTN_TARGET void sink_backward_tasks(const SinkBackward<T>& backward, const KeyTask* tasks, int64_t end,
                                        std::atomic<int64_t>& next) {
    BackwardBuffers buffers(backward);
    for (int64_t i = next++; i < end; i = next++) BackwardTask<T>(backward, tasks[i], buffers).run();
}

// dsink_logits = -sum of p(sink) * delta over the queries, of the (sequence, head) indices begin..end.
template <class T>
RECATTN_TARGET void sink_logit_gradients(const SinkBackward<T>& backward, int64_t begin, int64_t end) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    const SinkAttention<T>& op = backward.op;
    constexpr int64_t lanes = Vector<float>::lanes;
    for (int64_t index = begin; index < end; ++index) {
        const Sequence& sequence = op.sequences[index / op.heads];
        const int64_t head = index % op.heads;
        Floats sum{};
        for (int64_t i = 0; i < sequence.length; i += lanes) {
            float row_max[lanes], inverse_sum[lanes] = {}, delta[lanes] = {};
            std::fill(row_max, row_max + lanes, infinity);
            for (int64_t lane = 0; lane < std::min(lanes, sequence.length - i); ++lane) {
                const int64_t position = sequence.start + i + lane;
                row_max[lane] = *op.row_max.at(sequence.batch, head, position);
                inverse_sum[lane] = *op.inverse_sum.at(sequence.batch, head, position);
                delta[lane] = *backward.delta.at(sequence.batch, head, position);
            }
            sum += exp2_of(op.sink_logits[head] * kLog2e - load(row_max)) * load(inverse_sum) * load(delta);
        }
        op.dsink_logits[sequence.index * op.heads + head] = -sum_of_lanes(sum);
    }
}

}  // namespace
}  // namespace recattn::RECATTN_ISA

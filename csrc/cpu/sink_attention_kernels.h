// Tasks of sink_attention's forward, for one instruction set (see foreach_isa.h): tokens in, tokens out. The equations
// are in sink_attention_panels.h.

#include "cpu/sink_attention_panels.h"

namespace recattn::RECATTN_ISA {
namespace {

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

}  // namespace
}  // namespace recattn::RECATTN_ISA

// Backward of the CPU operator sink_attention: its tasks. The equations are in sink_attention_bwd_kernels.h.
#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/common.h"
#include "cpu/simd/isa.h"
#include "cpu/sink_attention.h"

namespace recattn {
namespace {

constexpr int64_t kTile = 64;  // queries and keys of a tile

// Keys against queries, of one sequence and some key heads, one after another. A long sequence is split into blocks and
// its tasks into steps: in step s, key block j meets query block (j + s) mod blocks. So the tasks of a step write to
// different tokens, and the terms of a gradient are added up in one order.
struct KeyTask {
    const Sequence* sequence;
    int64_t first_kv_head, last_kv_head, step, first_query, last_query, first_key, last_key;
    bool ends_queries, ends_keys;  // no later step has these queries, these keys
    int64_t sums;                  // offset of dq, dk and dv in float32 if steps add up another dtype, else -1

    int64_t cost() const { return (last_query - first_query) * (last_key - first_key); }
};

// Columns of sums: whole registers of any instruction set.
int64_t sum_columns(int64_t columns) { return (columns + 15) / 16 * 16; }

// dq, dk and dv of one key head.
template <class T>
int64_t size_of_sums(const SinkAttention<T>& op, int64_t length) {
    return length * ((op.group() + 1) * sum_columns(op.dim) + sum_columns(op.value_dim));
}

template <class T>
struct SinkBackward {
    const SinkAttention<T>& op;
    Tokens<float> delta;  // columns = 1
    float* sums;          // of the sequences that are split
    int64_t longest;      // sequence
    int64_t max_dq_rows;  // of a task
};

// Tasks wanted in a step. Fewer where a split sequence needs sums in float32.
template <class T>
constexpr int64_t min_tasks = std::is_same_v<T, float> ? 64 : 8;

// The tasks of all sequences, step by step, in each step those that cost most first. They do not depend on the number
// of threads.
struct KeyTasks {
    std::vector<KeyTask> tasks;
    int64_t sums = 0, longest = 0, max_dq_rows = 0;

    template <class T>
    explicit KeyTasks(const SinkAttention<T>& op) {
        const int64_t parts = std::min(op.dbias_heads, op.kv_heads), kv_heads = op.kv_heads / parts;  // of a task
        int64_t cost = 1;
        for (int64_t s = 0; s < op.num_sequences; ++s) {
            const int64_t length = op.sequences[s].length;
            cost += length * length * parts;
            longest = std::max(longest, length);
        }
        for (int64_t s = 0; s < op.num_sequences; ++s) {
            const Sequence& sequence = op.sequences[s];
            const int64_t length = sequence.length;
            const int64_t wanted = (min_tasks<T> * length * length + cost - 1) / cost;
            const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, length / kMinBlock));
            const int64_t block = std::max<int64_t>(1, ((length + splits - 1) / splits + kTile - 1) / kTile) * kTile;
            const int64_t blocks = std::max<int64_t>(1, (length + block - 1) / block);
            const bool has_sums = blocks > 1 && !std::is_same_v<T, float>;
            max_dq_rows = std::max(max_dq_rows, op.group() * std::min(block, length));
            for (int64_t kv_head = 0; kv_head < op.kv_heads; kv_head += kv_heads) {
                add({.sequence = &sequence,
                     .first_kv_head = kv_head,
                     .last_kv_head = kv_head + kv_heads,
                     .sums = has_sums ? sums : -1},
                    block, blocks, op.causal);
                if (has_sums) sums += kv_heads * size_of_sums(op, length);
            }
        }
        const auto is_before = [](const KeyTask& a, const KeyTask& b) {
            return a.step != b.step ? a.step < b.step : a.cost() > b.cost();
        };
        if (!std::is_sorted(tasks.begin(), tasks.end(), is_before)) {
            std::stable_sort(tasks.begin(), tasks.end(), is_before);
        }
    }

  private:
    static constexpr int64_t kMinBlock = 128;

    void add(KeyTask task, int64_t block, int64_t blocks, bool causal) {
        const int64_t length = task.sequence->length;
        for (task.step = 0; task.step < blocks; ++task.step) {
            for (int64_t j = 0; j < blocks; ++j) {
                const int64_t i = (j + task.step) % blocks;
                if (causal && i < j) continue;
                task.first_query = i * block;
                task.last_query = std::min(length, (i + 1) * block);
                task.first_key = j * block;
                task.last_key = std::min(length, (j + 1) * block);
                task.ends_queries = task.step == (causal ? i : blocks - 1);
                task.ends_keys = task.step == blocks - 1 - (causal ? j : 0);
                tasks.push_back(task);
            }
        }
    }
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/sink_attention_bwd_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {

template <class T>
int64_t count_dbias_heads(const SinkAttention<T>& op) {
    if (op.bias_heads > 1) return op.heads;
    int64_t tokens = 0;
    for (int64_t s = 0; s < op.num_sequences; ++s) tokens += op.sequences[s].length;
    const int64_t matrices = std::max<int64_t>(1, op.num_sequences * op.num_sinks * op.num_sinks);
    int64_t count = tokens * op.heads * op.dim / (4 * matrices);
    if (!std::is_same_v<T, float>) count = std::max(count, min_tasks<T> / std::max<int64_t>(1, op.num_sequences));
    count = std::clamp<int64_t>(count, 1, op.kv_heads);
    while (op.kv_heads % count != 0) --count;
    return count;
}

template <class T>
void sink_backward(const SinkAttention<T>& op) {
    const KeyTasks plan(op);
    const int64_t num_tasks = static_cast<int64_t>(plan.tasks.size());
    const auto sums = std::make_unique_for_overwrite<float[]>(plan.sums);
    int64_t rows = op.n * op.heads;
    for (int64_t s = 0; s < op.num_sequences && !op.packed; ++s) {
        rows = std::max(rows, (op.sequences[s].batch + 1) * op.n * op.heads);
    }
    const auto deltas = std::make_unique_for_overwrite<float[]>(rows);
    const SinkBackward<T> backward{.op = op,
                                   .delta = {deltas.get(), op.packed ? 0 : op.heads * op.n, op.n, 1},
                                   .sums = sums.get(),
                                   .longest = plan.longest,
                                   .max_dq_rows = plan.max_dq_rows};
    const auto kernel = RECATTN_PICK(sink_backward_tasks<T>);
    for (int64_t begin = 0, end; begin < num_tasks; begin = end) {
        int64_t cost = 0;
        for (end = begin; end < num_tasks && plan.tasks[end].step == plan.tasks[begin].step; ++end) {
            cost += plan.tasks[end].cost() * (op.heads / std::min(op.dbias_heads, op.kv_heads)) *
                    (3 * op.dim + 2 * op.value_dim);
        }
        std::atomic<int64_t> next{begin};
        const int64_t threads = std::clamp<int64_t>(cost / kMultiplyAddsPerThread, 1, torch::stable::get_num_threads());
        torch::stable::parallel_for(0, threads, 1,
                                    [&](int64_t, int64_t) { kernel(backward, plan.tasks.data(), end, next); });
    }
    if (op.sink_logits != nullptr) {
        const auto dsink_logits = RECATTN_PICK(sink_logit_gradients<T>);
        torch::stable::parallel_for(0, op.num_sequences * op.heads, grain(8 * op.n),
                                    [&](int64_t begin, int64_t end) { dsink_logits(backward, begin, end); });
    }
}

template int64_t count_dbias_heads(const SinkAttention<float>&);
template void sink_backward(const SinkAttention<float>&);
template int64_t count_dbias_heads(const SinkAttention<BFloat16>&);
template void sink_backward(const SinkAttention<BFloat16>&);
template int64_t count_dbias_heads(const SinkAttention<Half>&);
template void sink_backward(const SinkAttention<Half>&);

}  // namespace recattn

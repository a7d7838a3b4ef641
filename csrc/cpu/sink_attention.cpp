// CPU operators sink_attention: checks, preparation, and the tasks of the forward. Its equations are in
// sink_attention_panels.h; the backward is in sink_attention_bwd.cpp.
#include "cpu/sink_attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/check.h"
#include "cpu/common.h"
#include "cpu/index_checks.h"
#include "cpu/sequences.h"
#include "cpu/simd/isa.h"

namespace recattn {

// One task of the forward: the queries first .. first + count - 1 of the heads that share a key head.
struct QueryBlock {
    const Sequence* sequence;
    int64_t kv_head, first, count;
};

}  // namespace recattn

#define RECATTN_KERNELS "cpu/sink_attention_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

// --- Checks and preparation ---

struct Options {
    bool causal;
    double scale, dropout_p;
};

// The optional arguments of both operators.
struct SinkTensors {
    const Tensor &sink_positions, &inter_sink_bias;
    const std::optional<Tensor>& sink_logits;
    LengthTensors lengths;
    const std::optional<Tensor>& dropout_seed;
};

// The float32 entries of a floating tensor: itself if it is float32 and contiguous, else a copy.
class Floats {
  public:
    explicit Floats(const char* name, const Tensor& tensor) {
        if (tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous()) {
            data_ = tensor.const_data_ptr<float>();
            return;
        }
        dispatch_dtype<double, float, BFloat16, Half>(name, tensor, [&](auto zero) {
            copy_.resize(tensor.numel());
            data_ = copy_.data();
            float* out = copy_.data();
            copy(tensor, tensor.const_data_ptr<decltype(zero)>(), 0, out);
        });
    }
    Floats(const Floats&) = delete;

    const float* data() const { return data_; }

  private:
    template <class T>
    static void copy(const Tensor& tensor, const T* entries, int64_t axis, float*& out) {
        if (axis == tensor.dim()) {
            *out++ = static_cast<float>(*entries);
            return;
        }
        const int64_t size = tensor.size(axis), stride = tensor.stride(axis);
        for (int64_t i = 0; i < size; ++i) copy(tensor, entries + i * stride, axis + 1, out);
    }

    std::vector<float> copy_;
    const float* data_;
};

// The sequences of a batch, from copies of the index tensors that are read once and checked.
class Sequences {
  public:
    Sequences(const Tensor& q, const SinkTensors& tensors) : sequences_(tensors.sink_positions.size(0)) {
        const int64_t batch = tensors.sink_positions.size(0), count = tensors.sink_positions.size(1);
        const bool packed = tensors.lengths.packed();
        const int64_t total = packed ? q.size(0) : q.size(2);
        const std::vector<Span> spans = checked_spans(tensors.lengths, batch, total);
        for (int64_t b = 0; b < batch; ++b) {
            sequences_[b] = {.index = b, .batch = packed ? 0 : b, .start = spans[b].start, .length = spans[b].length};
        }
        sinks_ = to_vector(tensors.sink_positions);
        const auto limit = [&](int64_t b) { return packed ? sequences_[b].length : total; };
        expect_sink_positions(sinks_.data(), batch, count, packed ? std::nullopt : std::optional(total), limit);
        for (int64_t b = 0; b < batch; ++b) {
            add_sinks(sequences_[b], sinks_.data() + b * count, count, spans[b].first_position);
        }
    }
    Sequences(const Sequences&) = delete;

    const Sequence* data() const { return sequences_.data(); }
    int64_t size() const { return static_cast<int64_t>(sequences_.size()); }
    auto begin() const { return sequences_.begin(); }
    auto end() const { return sequences_.end(); }

  private:
    // The live sinks are a range, because positions ascend.
    static void add_sinks(Sequence& sequence, int64_t* positions, int64_t count, int64_t first_position) {
        int64_t first = 0, last = 0;
        for (int64_t m = 0; m < count && positions[m] >= 0; ++m) {
            positions[m] -= first_position;
            first += positions[m] < 0;
            last += positions[m] < sequence.length;
            if (positions[m] >= sequence.length) break;
        }
        sequence.sinks = positions + first;
        sequence.first_sink = first;
        sequence.num_sinks = last - first;
    }

    std::vector<Sequence> sequences_;
    std::vector<int64_t> sinks_;
};

// Checked inputs of the forward and the backward, as the kernels read them.
struct Inputs {
    Inputs(const Tensor& q, const Tensor& k, const Tensor& v, const SinkTensors& tensors, const Options& options)
        : packed(tensors.lengths.packed()),
          q(checked(q, k, v, tensors)),
          k(with_contiguous_rows(k)),
          v(with_contiguous_rows(v)),
          sequences(q, tensors),
          bias("inter_sink_bias", tensors.inter_sink_bias),
          dropout(tensors.dropout_seed, options.dropout_p),
          options(options) {
        if (tensors.sink_logits) sink_logits.emplace("sink_logits", *tensors.sink_logits);
        bias_heads = tensors.inter_sink_bias.size(1);
        num_sinks = tensors.sink_positions.size(1);
    }

    bool packed;
    Tensor q, k, v;
    Sequences sequences;
    Floats bias;
    std::optional<Floats> sink_logits;
    int64_t bias_heads, num_sinks;
    Dropout dropout;
    Options options;

  private:
    static Tensor checked(const Tensor& q, const Tensor& k, const Tensor& v, const SinkTensors& tensors) {
        const bool packed = tensors.lengths.packed();
        if (packed) {
            expect_shape("q", q, {{"T"}, {"Hq"}, {"D"}});
            expect_shape("k", k, {{"T", q.size(0)}, {"Hkv"}, {"D", q.size(2)}});
            expect_shape("v", v, {{"T", q.size(0)}, {"Hkv", k.size(1)}, {"Dv"}});
        } else {
            expect_shape("q", q, {{"B"}, {"Hq"}, {"N"}, {"D"}});
            expect_shape("k", k, {{"B", q.size(0)}, {"Hkv"}, {"N", q.size(2)}, {"D", q.size(3)}});
            expect_shape("v", v, {{"B", q.size(0)}, {"Hkv", k.size(1)}, {"N", q.size(2)}, {"Dv"}});
        }
        const int64_t heads = q.size(1), kv_heads = k.size(1);
        expect(kv_heads > 0 && heads % kv_heads == 0, "Hq of q must be a multiple of Hkv of k and v, got ", heads,
               " and ", kv_heads);
        expect(q.size(q.dim() - 1) > 0 && v.size(v.dim() - 1) > 0, "D and Dv of q, k and v must be at least 1");
        expect_dtype_of("q", q, "k", k);
        expect_dtype_of("q", q, "v", v);
        const Tensor &positions = tensors.sink_positions, &bias = tensors.inter_sink_bias;
        if (packed) {
            expect_shape("sink_positions", positions, {{"B"}, {"M"}});
        } else {
            expect_shape("sink_positions", positions, {{"B", q.size(0)}, {"M"}});
        }
        expect_integer("sink_positions", positions);
        const int64_t batch = positions.size(0), num_sinks = positions.size(1);
        expect_shape("inter_sink_bias", bias, {{"B", batch}, {"1 or Hq"}, {"M", num_sinks}, {"M", num_sinks}});
        expect(bias.size(1) == 1 || bias.size(1) == heads, "inter_sink_bias must have 1 or Hq = ", heads,
               " heads, got ", bias.size(1));
        if (tensors.sink_logits) expect_shape("sink_logits", *tensors.sink_logits, {{"Hq", heads}});
        return with_contiguous_rows(q);
    }
};

template <class T>
SinkAttention<T> make_arguments(const Inputs& inputs) {
    SinkAttention<T> op{};
    op.q = tokens<T>(inputs.q);
    op.k = tokens<T>(inputs.k);
    op.v = tokens<T>(inputs.v);
    op.sequences = inputs.sequences.data();
    op.bias = inputs.bias.data();
    op.sink_logits = inputs.sink_logits ? inputs.sink_logits->data() : nullptr;
    op.num_sequences = inputs.sequences.size();
    op.n = inputs.packed ? inputs.q.size(0) : inputs.q.size(2);
    op.heads = inputs.q.size(1);
    op.kv_heads = inputs.k.size(1);
    op.dim = inputs.q.size(inputs.q.dim() - 1);
    op.value_dim = inputs.v.size(inputs.v.dim() - 1);
    op.bias_heads = inputs.bias_heads;
    op.num_sinks = inputs.num_sinks;
    op.packed = inputs.packed;
    op.causal = inputs.options.causal;
    op.scale = static_cast<float>(inputs.options.scale);
    op.dropout = inputs.dropout;
    return op;
}

// --- Layouts ---

bool is_contiguous_token_major(const Tensor& t) {
    if (t.numel() == 0) return true;
    int64_t stride = 1;
    for (const int64_t axis : {3, 1, 2, 0}) {
        if (t.size(axis) != 1 && t.stride(axis) != stride) return false;
        stride *= t.size(axis);
    }
    return true;
}

// Uninitialised, [B, H, N, D] in the memory layout of [B, N, H, D].
Tensor new_token_major(const Tensor& like, int64_t dim) {
    const int64_t heads = like.size(1), n = like.size(2), row = std::max<int64_t>(1, heads) * dim;
    const int64_t strides[] = {std::max<int64_t>(1, n) * row, dim, row, 1};
    return new_empty_strided({like.size(0), heads, n, dim}, strides, like.scalar_type());
}

Tensor new_gradient(const Tensor& like) {
    return like.dim() == 3 ? new_empty(like.sizes(), like.scalar_type()) : new_token_major(like, like.size(3));
}

Tensor new_out(const Tensor& q, int64_t dim) {
    if (q.dim() == 3) return new_empty({q.size(0), q.size(1), dim}, q.scalar_type());
    if (is_contiguous_token_major(q)) return new_token_major(q, dim);
    return new_empty({q.size(0), q.size(1), q.size(2), dim}, q.scalar_type());
}

// [B, Hq, N], packed [T, Hq].
Tensor new_lse(const Tensor& q) {
    if (q.dim() == 3) return new_empty({q.size(0), q.size(1)}, ScalarType::Float);
    return new_empty({q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
}

// row_max and inverse_sum: [2, B, Hq, N], packed [2, T, Hq].
Tensor new_row_stats(const Tensor& q) {
    if (q.dim() == 3) return new_empty({2, q.size(0), q.size(1)}, ScalarType::Float);
    return new_empty({2, q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
}

// The first or second of row_stats.
Tokens<float> row_stats_tokens(const Tensor& stats, int64_t index) {
    float* data = stats.mutable_data_ptr<float>() + index * stats.stride(0);
    return stats.dim() == 3 ? Tokens<float>{data, 0, stats.stride(2), stats.stride(1)}
                            : Tokens<float>{data, stats.stride(1), stats.stride(2), stats.stride(3)};
}

Tokens<float> lse_tokens(const Tensor& lse) {
    float* data = lse.mutable_data_ptr<float>();
    return lse.dim() == 2 ? Tokens<float>{data, 0, lse.stride(1), lse.stride(0)}
                          : Tokens<float>{data, lse.stride(0), lse.stride(1), lse.stride(2)};
}

// --- Tasks of the forward ---

// Query blocks of all sequences, those that cost most first. They do not depend on the number of threads.
std::vector<QueryBlock> query_blocks(const Sequences& sequences, int64_t heads, int64_t kv_heads, bool causal) {
    constexpr int64_t kMinRows = 48, kMaxRows = 192, kMinTasks = 16;
    const int64_t group = heads / kv_heads;
    int64_t rows = 0;
    for (const Sequence& sequence : sequences) rows += sequence.length * heads;
    const int64_t rows_per_task = std::clamp(rows / kMinTasks / kMinRows * kMinRows, kMinRows, kMaxRows);
    const int64_t block = std::max<int64_t>(1, rows_per_task / group);
    std::vector<QueryBlock> blocks;
    blocks.reserve(rows / (block * group) + sequences.size() * kv_heads);
    for (const Sequence& sequence : sequences) {
        for (int64_t kv_head = 0; kv_head < kv_heads; ++kv_head) {
            int64_t first = 0;
            do {  // also once for an empty sequence, whose padding is written
                blocks.push_back({&sequence, kv_head, first, std::min(block, sequence.length - first)});
                first += block;
            } while (first < sequence.length);
        }
    }
    const auto cost = [&](const QueryBlock& task) {
        return task.count * (causal ? task.first + task.count : task.sequence->length);
    };
    const auto costs_more = [&](const QueryBlock& a, const QueryBlock& b) { return cost(a) > cost(b); };
    if (!std::is_sorted(blocks.begin(), blocks.end(), costs_more)) {
        std::stable_sort(blocks.begin(), blocks.end(), costs_more);
    }
    return blocks;
}

// out, lse and row_stats.
std::tuple<Tensor, Tensor, Tensor> sink_attention_cpu_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& sink_positions, const Tensor& inter_sink_bias,
    const std::optional<Tensor>& sink_logits, const std::optional<Tensor>& seq_lens,
    const std::optional<Tensor>& seq_starts, const std::optional<Tensor>& cu_seqlens,
    const std::optional<Tensor>& dropout_seed, bool causal, double scale, double dropout_p) {
    const LengthTensors lengths{seq_lens, seq_starts, cu_seqlens};
    const Inputs inputs(q, k, v, {sink_positions, inter_sink_bias, sink_logits, lengths, dropout_seed},
                        {causal, scale, dropout_p});
    const Tensor out = new_out(q, v.size(v.dim() - 1)), lse = new_lse(q), row_stats = new_row_stats(q);
    const std::vector<QueryBlock> blocks = query_blocks(inputs.sequences, q.size(1), k.size(1), causal);
    dispatch_dtype<float, BFloat16, Half>("q", q, [&](auto zero) {
        using T = decltype(zero);
        auto op = make_arguments<T>(inputs);
        op.new_out = mutable_tokens<T>(out);
        op.lse = lse_tokens(lse);
        op.row_max = row_stats_tokens(row_stats, 0);
        op.inverse_sum = row_stats_tokens(row_stats, 1);
        const auto kernel = RECATTN_PICK(sink_forward<T>);
        const int64_t tasks = static_cast<int64_t>(blocks.size());
        int64_t pairs = 0;
        for (const QueryBlock& task : blocks) pairs += task.count * task.sequence->length;
        const int64_t cost = pairs * op.group() * (op.dim + op.value_dim);
        const int64_t threads = std::clamp<int64_t>(cost / kMultiplyAddsPerThread, 1, torch::stable::get_num_threads());
        std::atomic<int64_t> next{0};
        const auto work = [&](int64_t, int64_t) { kernel(op, blocks.data(), tasks, next); };
        torch::stable::parallel_for(0, threads, 1, work);
    });
    return {out, lse, row_stats};
}

// dq, dk, dv, dbias, and dsink_logits, empty without sink_logits.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> sink_attention_cpu_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& row_stats,
    const Tensor& sink_positions, const Tensor& inter_sink_bias, const std::optional<Tensor>& sink_logits,
    const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& seq_starts,
    const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& dropout_seed, bool causal, double scale,
    double dropout_p) {
    const LengthTensors lengths{seq_lens, seq_starts, cu_seqlens};
    const Inputs inputs(q, k, v, {sink_positions, inter_sink_bias, sink_logits, lengths, dropout_seed},
                        {causal, scale, dropout_p});
    for (const auto& [name, tensor] : {std::pair{"dout", &dout}, std::pair{"out", &out}}) {
        if (inputs.packed) {
            expect_shape(name, *tensor, {{"T", q.size(0)}, {"Hq", q.size(1)}, {"Dv", v.size(2)}});
        } else {
            expect_shape(name, *tensor, {{"B", q.size(0)}, {"Hq", q.size(1)}, {"N", q.size(2)}, {"Dv", v.size(3)}});
        }
        expect_dtype_of("q", q, name, *tensor);
    }
    if (inputs.packed) {
        expect_shape("row_stats", row_stats, {{"2", 2}, {"T", q.size(0)}, {"Hq", q.size(1)}});
    } else {
        expect_shape("row_stats", row_stats, {{"2", 2}, {"B", q.size(0)}, {"Hq", q.size(1)}, {"N", q.size(2)}});
    }
    expect_dtype("row_stats", row_stats, ScalarType::Float);
    const Tensor dout_rows = with_contiguous_rows(dout), out_rows = with_contiguous_rows(out);
    const Tensor dq = new_gradient(q), dk = new_gradient(k), dv = new_gradient(v);
    const Tensor dbias = new_empty(inter_sink_bias.sizes(), inter_sink_bias.scalar_type());
    const Tensor dsink_logits =
        sink_logits ? new_empty(sink_logits->sizes(), sink_logits->scalar_type()) : new_empty({0}, q.scalar_type());
    const int64_t batch = inputs.sequences.size(), heads = q.size(1), bias_size = inputs.num_sinks * inputs.num_sinks;
    bool in_place = false;
    int64_t dbias_heads = 0;
    std::vector<float> partial_dbias, sequence_dlogits(sink_logits ? batch * heads : 0);
    dispatch_dtype<float, BFloat16, Half>("q", q, [&](auto zero) {
        using T = decltype(zero);
        auto op = make_arguments<T>(inputs);
        op.dout = tokens<T>(dout_rows);
        op.out = tokens<T>(out_rows);
        op.dq = mutable_tokens<T>(dq);
        op.dk = mutable_tokens<T>(dk);
        op.dv = mutable_tokens<T>(dv);
        op.row_max = row_stats_tokens(row_stats, 0);
        op.inverse_sum = row_stats_tokens(row_stats, 1);
        op.dbias_heads = dbias_heads = count_dbias_heads(op);
        in_place = dbias_heads == inputs.bias_heads && inter_sink_bias.scalar_type() == ScalarType::Float;
        if (in_place) {
            op.dbias = dbias.mutable_data_ptr<float>();
            std::fill_n(op.dbias, batch * dbias_heads * bias_size, 0.0f);
        } else {
            partial_dbias.resize(batch * dbias_heads * bias_size);
            op.dbias = partial_dbias.data();
        }
        op.dsink_logits = sequence_dlogits.data();
        sink_backward(op);
    });
    if (!in_place) {
        const int64_t repeats = dbias_heads / inputs.bias_heads;
        dispatch_dtype<double, float, BFloat16, Half>("inter_sink_bias", inter_sink_bias, [&](auto zero) {
            using T = decltype(zero);
            T* sums = dbias.mutable_data_ptr<T>();
            for (int64_t matrix = 0; matrix < batch * inputs.bias_heads; ++matrix) {
                const float* terms = partial_dbias.data() + matrix * repeats * bias_size;
                for (int64_t i = 0; i < bias_size; ++i) {
                    float sum = 0;
                    for (int64_t head = 0; head < repeats; ++head) sum += terms[head * bias_size + i];
                    sums[matrix * bias_size + i] = static_cast<T>(sum);
                }
            }
        });
    }
    if (sink_logits) {
        dispatch_dtype<double, float, BFloat16, Half>("sink_logits", *sink_logits, [&](auto zero) {
            using T = decltype(zero);
            for (int64_t head = 0; head < heads; ++head) {
                double sum = 0;
                for (int64_t b = 0; b < batch; ++b) sum += sequence_dlogits.data()[b * heads + head];
                dsink_logits.mutable_data_ptr<T>()[head] = static_cast<T>(sum);
            }
        });
    }
    return {dq, dk, dv, dbias, dsink_logits};
}

#define RECATTN_OPTIONS                                                                                          \
    "Tensor sink_positions, Tensor inter_sink_bias, Tensor? sink_logits, Tensor? seq_lens, Tensor? seq_starts, " \
    "Tensor? cu_seqlens, Tensor? dropout_seed, bool causal, float scale, float dropout_p"

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("sink_attention_cpu_fwd(Tensor q, Tensor k, Tensor v, " RECATTN_OPTIONS ") -> (Tensor, Tensor, Tensor)");
    m.def(
        "sink_attention_cpu_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor "
        "row_stats, " RECATTN_OPTIONS ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("sink_attention_cpu_fwd", TORCH_BOX(&sink_attention_cpu_fwd));
    m.impl("sink_attention_cpu_bwd", TORCH_BOX(&sink_attention_cpu_bwd));
}

}  // namespace
}  // namespace recattn

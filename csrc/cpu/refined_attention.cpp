// CPU operator refined_attention for short sequences: one thread computes one (batch, head) at a time, in its cache.
// The equations are in refined_attention_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/check.h"
#include "cpu/common.h"
#include "cpu/dropout.h"
#include "cpu/groups.h"
#include "cpu/refined_weights.h"
#include "cpu/simd/isa.h"
#include "cpu/tokens.h"

namespace recattn {
namespace {

template <class T>
struct RefinedAttention {
    Tokens<const T> q, k, v, dout;
    Tokens<T> out, dq, dk, dv;
    const PackedWeights& weights;
    const Span* spans;
    int64_t heads, padded_length, positions, dim, value_dim, r;  // padded_length and positions: see Batch
    bool folded, has_values, adds_source, softmax_source, causal;
    float scale;
    Dropout dropout;  // of p; rows and columns count from a sequence's first token

    // Width of queries and keys for `tokens` tokens; if folded, keys are the rows of A.
    int64_t rank(int64_t tokens) const { return folded ? tokens : r; }
};

// Row stride of the gradients that `unfold` computes in float64.
int64_t unfolded_row_stride(int64_t rank) { return (rank + 7) / 8 * 8; }

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/refined_attention_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {

template <class T>
void PackedWeights::pack(const Weights& weights) {
    for (int64_t head = 0; head < heads_; ++head) {
        const auto store = [&](int part, float scale) {
            return [=, this](int64_t i, int64_t j, float entry) { row(head, i, part)[j] = entry * scale; };
        };
        if (folded_) {
            const auto copy = [&](Scratch<float>& to, float scale) {
                return [=, this, data = to.data() + head * n_ * rank_](int64_t i, int64_t j, float entry) {
                    data[i * rank_ + j] = entry * scale;
                };
            };
            weights.w_q.for_each_entry<T>(head, n_, copy(w_q_, weights.scale()));
            weights.w_k.for_each_entry<T>(head, n_, copy(w_k_, 1));
            const float *w_q = w_q_.data() + head * n_ * rank_, *w_k = w_k_.data() + head * n_ * rank_;
            const auto kernel = RECATTN_PICK(fold);
            torch::stable::parallel_for(0, n_, grain(n_ * rank_), [&](int64_t begin, int64_t end) {
                kernel(w_q, w_k, n_, rank_, begin, end, row(head, 0, kQueries), row_stride);
            });
        } else {
            weights.w_q.for_each_entry<T>(head, n_, store(kQueries, weights.scale()));
            weights.w_k.for_each_entry<T>(head, n_, store(kKeys, 1));
        }
        if (weights.w_v) weights.w_v->for_each_entry<T>(head, n_, store(kValues, 1));
        for (int part = 0; part < 3; ++part) {
            float* transposed = transposed_.data() + (head * row_stride + first_[part]) * transposed_row_stride;
            for (int64_t i = 0; i < n_; ++i) {
                const float* entries = row(head, i, part);
                for (int64_t j = 0; j < columns_[part]; ++j) transposed[j * transposed_row_stride + i] = entries[j];
            }
        }
    }
}

template <class T>
void PackedWeights::unpack_gradients(float* partials, int64_t count, const Weights& weights, const Tensor& dw_q,
                                     const Tensor& dw_k, const std::optional<Tensor>& dw_v) const {
    for (int64_t p = 1; p < count; ++p) {
        for (int64_t i = 0; i < size(); ++i) partials[i] += partials[p * size() + i];
    }
    WeightGradient of_w_q(weights.w_q, heads_, n_), of_w_k(weights.w_k, heads_, n_);
    std::optional<WeightGradient> of_w_v;
    if (dw_v) of_w_v.emplace(*weights.w_v, heads_, n_);
    Scratch<double> unfolded(folded_ ? 2 * n_ * unfolded_row_stride(rank_) : 0);
    for (int64_t head = 0; head < heads_; ++head) {
        const float* packed = partials + head * n_ * row_stride;
        if (folded_) {
            double *from_w_k = unfolded.data(), *from_w_q = from_w_k + n_ * unfolded_row_stride(rank_);
            const float *w_q = w_q_.data() + head * n_ * rank_, *w_k = w_k_.data() + head * n_ * rank_;
            const auto kernel = RECATTN_PICK(unfold);
            torch::stable::parallel_for(0, n_, grain(4 * n_ * rank_), [&](int64_t begin, int64_t end) {
                kernel(packed, row_stride, 1, w_k, n_, rank_, begin, end, from_w_k);
                kernel(packed, 1, row_stride, w_q, n_, rank_, begin, end, from_w_q);
            });
            of_w_q.add<double>(head, from_w_k, unfolded_row_stride(rank_), weights.scale());
            of_w_k.add<double>(head, from_w_q, unfolded_row_stride(rank_), 1);
        } else {
            of_w_q.add(head, packed + first_[kQueries], row_stride, weights.scale());
            of_w_k.add(head, packed + first_[kKeys], row_stride, 1.0f);
        }
        if (of_w_v) of_w_v->add(head, packed + first_[kValues], row_stride, 1.0f);
    }
    of_w_q.store<T>(dw_q);
    of_w_k.store<T>(dw_k);
    if (of_w_v) of_w_v->store<T>(*dw_v);
}

namespace {

struct Options {
    bool adds_source, softmax_source, causal;
    std::optional<double> scale;
    Dropout dropout;
};

Weights checked_weights(const Batch& batch, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w_q,
                        const Tensor& w_k, const std::optional<Tensor>& w_v) {
    const int64_t heads = batch.heads, n = batch.positions;
    expect_tokens_like_q("v", v, q, {"Dv"});
    expect_matrix("w_q", w_q, heads, {"Nmax"}, {"R"});
    const int64_t rows = w_q.size(w_q.dim() - 2), rank = w_q.size(w_q.dim() - 1);
    expect_matrix("w_k", w_k, heads, {"Nmax", rows}, {"R", rank});
    batch.expect_rows(rows);
    expect(rank > 0, "R of w_q and w_k must be at least 1, got 0");
    if (w_v) expect_matrix("w_v", *w_v, heads, {"Nmax", rows}, {"Nmax", rows});
    expect_dtype_of("q", q, "k", k);
    expect_dtype_of("q", q, "v", v);
    expect_dtype_of("q", q, "w_q", w_q);
    expect_dtype_of("q", q, "w_k", w_k);
    if (w_v) expect_dtype_of("q", q, "w_v", *w_v);
    const bool per_head = w_q.dim() == 3 || w_k.dim() == 3 || (w_v && w_v->dim() == 3);
    std::optional<WeightMatrix> values;
    if (w_v) values.emplace(*w_v, n);
    return {{w_q, rank}, {w_k, rank}, values, per_head ? heads : 1, n};
}

// Checked inputs of the forward and the backward, as the kernels read them.
struct Inputs {
    Inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w_q, const Tensor& w_k,
           const std::optional<Tensor>& w_v, const LengthTensors& lengths, const Options& options)
        : batch(checked_batch(q, k, lengths)),
          weights(checked_weights(batch, q, k, v, w_q, w_k, w_v)),
          options(options),
          q(with_contiguous_rows(q)),
          k(with_contiguous_rows(k)),
          v(with_contiguous_rows(v)),
          packed(weights),
          groups(batch.spans, batch.heads, dim() + value_dim() + packed.all_columns()) {}

    int64_t dim() const { return q.size(q.dim() - 1); }
    int64_t value_dim() const { return v.size(v.dim() - 1); }

    Batch batch;
    Weights weights;
    Options options;
    Tensor q, k, v;
    PackedWeights packed;
    Groups groups;
};

template <class T>
RefinedAttention<T> make_arguments(Inputs& inputs) {
    const Options& options = inputs.options;
    inputs.packed.pack<T>(inputs.weights);
    return {.q = tokens<T>(inputs.q),
            .k = tokens<T>(inputs.k),
            .v = tokens<T>(inputs.v),
            .dout = {},
            .out = {},
            .dq = {},
            .dk = {},
            .dv = {},
            .weights = inputs.packed,
            .spans = inputs.batch.spans.data(),
            .heads = inputs.batch.heads,
            .padded_length = inputs.batch.padded_length,
            .positions = inputs.batch.positions,
            .dim = inputs.dim(),
            .value_dim = inputs.value_dim(),
            .r = inputs.packed.columns(kQueries),
            .folded = inputs.weights.folded(),
            .has_values = inputs.weights.w_v.has_value(),
            .adds_source = options.adds_source,
            .softmax_source = options.softmax_source,
            .causal = options.causal,
            .scale = static_cast<float>(options.scale.value_or(1 / std::sqrt(static_cast<double>(inputs.dim())))),
            .dropout = options.dropout};
}

Tensor refined_attention_pairs_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w_q,
                                   const Tensor& w_k, const std::optional<Tensor>& w_v,
                                   const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& seq_starts,
                                   const std::optional<Tensor>& cu_seqlens, bool adds_source, bool softmax_source,
                                   bool causal, std::optional<double> scale, const std::optional<Tensor>& dropout_seed,
                                   double dropout_p) {
    Inputs inputs(q, k, v, w_q, w_k, w_v, {seq_lens, seq_starts, cu_seqlens},
                  {adds_source, softmax_source, causal, scale, {dropout_seed, dropout_p}});
    const Groups& groups = inputs.groups;
    const Tensor out = new_contiguous(v);
    dispatch_dtype<float, BFloat16, Half>("q", q, [&](auto zero) {
        using T = decltype(zero);
        auto op = make_arguments<T>(inputs);
        op.out = mutable_tokens<T>(out);
        const auto kernel = RECATTN_PICK(refined_forward<T>);
        groups.parallel_for([&](int64_t begin, int64_t end) { kernel(op, groups.start(begin), groups.start(end)); });
    });
    return out;
}

// dq, dk, dv and the gradients of the matrices; that of w_v is empty without w_v.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> refined_attention_pairs_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& w_q, const Tensor& w_k,
    const std::optional<Tensor>& w_v, const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& seq_starts,
    const std::optional<Tensor>& cu_seqlens, bool adds_source, bool softmax_source, bool causal,
    std::optional<double> scale, const std::optional<Tensor>& dropout_seed, double dropout_p) {
    Inputs inputs(q, k, v, w_q, w_k, w_v, {seq_lens, seq_starts, cu_seqlens},
                  {adds_source, softmax_source, causal, scale, {dropout_seed, dropout_p}});
    expect_tokens_like_q("dout", dout, q, {"Dv", inputs.value_dim()});
    expect_dtype_of("q", q, "dout", dout);
    const PackedWeights& packed = inputs.packed;
    const Groups& groups = inputs.groups;
    const Tensor dout_rows = with_contiguous_rows(dout);
    const Tensor dq = new_contiguous(q), dk = new_contiguous(k), dv = new_contiguous(v);
    const Tensor dw_q = new_contiguous(w_q), dw_k = new_contiguous(w_k);
    std::optional<Tensor> dw_v;
    if (w_v) dw_v = new_contiguous(*w_v);
    const Tensor partials = new_empty({groups.count() * packed.size()}, ScalarType::Float);
    dispatch_dtype<float, BFloat16, Half>("q", q, [&](auto zero) {
        using T = decltype(zero);
        auto op = make_arguments<T>(inputs);
        op.dout = tokens<T>(dout_rows);
        op.dq = mutable_tokens<T>(dq);
        op.dk = mutable_tokens<T>(dk);
        op.dv = mutable_tokens<T>(dv);
        const auto kernel = RECATTN_PICK(refined_backward<T>);
        float* sums = partials.mutable_data_ptr<float>();
        groups.parallel_for([&](int64_t begin, int64_t end) { kernel(op, groups, begin, end, sums); });
        packed.unpack_gradients<T>(sums, groups.count(), inputs.weights, dw_q, dw_k, dw_v);
    });
    return {dq, dk, dv, dw_q, dw_k, dw_v ? *dw_v : new_empty({0}, q.scalar_type())};
}

#define RECATTN_OPTIONS                                                                                            \
    "Tensor q, Tensor k, Tensor v, Tensor w_q, Tensor w_k, Tensor? w_v, Tensor? seq_lens, Tensor? seq_starts, "    \
    "Tensor? cu_seqlens, bool adds_source, bool softmax_source, bool causal, float? scale, Tensor? dropout_seed, " \
    "float dropout_p"

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("refined_attention_pairs_fwd(" RECATTN_OPTIONS ") -> Tensor");
    m.def("refined_attention_pairs_bwd(Tensor dout, " RECATTN_OPTIONS
          ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("refined_attention_pairs_fwd", TORCH_BOX(&refined_attention_pairs_fwd));
    m.impl("refined_attention_pairs_bwd", TORCH_BOX(&refined_attention_pairs_bwd));
}

}  // namespace
}  // namespace recattn

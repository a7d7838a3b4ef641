// CPU operator refined_projection: A W_q and A W_k in float32, for refined_attention of long sequences with source
// "logits". One thread computes one (batch, head) at a time. The equations are in refined_projection_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "cpu/common.h"
#include "cpu/groups.h"
#include "cpu/refined_weights.h"
#include "cpu/simd/isa.h"
#include "cpu/tokens.h"

namespace recattn {
namespace {

template <class T>
struct RefinedProjection {
    Tokens<const T> q, k;
    Tokens<float> queries, keys;
    Tokens<const float> dqueries, dkeys;
    Tokens<T> dq, dk;
    const float* w;  // [W_q | W_k], [N, width] of each head or of all
    const Span* spans;
    int64_t heads, padded_length, positions, dim, rank, width, w_row_stride, w_size;  // the first: see Batch
    bool per_head, causal, backward;
    float scale;
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/refined_projection_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

// Checked inputs of the forward and the backward.
struct Inputs {
    Inputs(const Tensor& q, const Tensor& k, const Tensor& w_q, const Tensor& w_k, const LengthTensors& lengths)
        : batch(checked_inputs(q, k, w_q, w_k, lengths)),
          q(with_contiguous_rows(q)),
          k(with_contiguous_rows(k)),
          matrices{WeightMatrix(w_q, w_q.size(w_q.dim() - 1)), WeightMatrix(w_k, w_k.size(w_k.dim() - 1))},
          per_head(w_q.dim() == 3 || w_k.dim() == 3),
          n(batch.positions),
          part((matrices[0].columns + 15) / 16 * 16),
          row_stride(2 * part + 16),
          size((per_head ? q.size(1) : 1) * n * row_stride),
          w(size),
          groups(batch.spans, batch.heads, 1) {}

    static Batch checked_inputs(const Tensor& q, const Tensor& k, const Tensor& w_q, const Tensor& w_k,
                                const LengthTensors& lengths) {
        Batch batch = checked_batch(q, k, lengths);
        expect_matrix("w_q", w_q, batch.heads, {"Nmax"}, {"R"});
        const int64_t rows = w_q.size(w_q.dim() - 2);
        expect_matrix("w_k", w_k, batch.heads, {"Nmax", rows}, {"R", w_q.size(w_q.dim() - 1)});
        batch.expect_rows(rows);
        expect_dtype_of("q", q, "k", k);
        expect_dtype_of("q", q, "w_q", w_q);
        expect_dtype_of("q", q, "w_k", w_k);
        return batch;
    }

    int64_t dim() const { return q.size(q.dim() - 1); }
    int64_t heads() const { return per_head ? batch.heads : 1; }  // of W

    template <class T>
    void pack_weights() {
        for (int64_t head = 0; head < heads(); ++head) {
            for (int i = 0; i < 2; ++i) {
                float* to = w.data() + head * n * row_stride + i * part;
                matrices[i].for_each_entry<T>(
                    head, n, [&](int64_t row, int64_t column, float entry) { to[row * row_stride + column] = entry; });
            }
        }
    }

    Batch batch;
    Tensor q, k;
    WeightMatrix matrices[2];
    bool per_head;
    int64_t n, part, row_stride, size;  // of W: `part` columns each of W_q and W_k, in whole registers
    Scratch<float> w;
    Groups groups;
};

struct Options {
    bool causal;
    std::optional<double> scale;
};

template <class T>
RefinedProjection<T> make_arguments(Inputs& inputs, const Options& options) {
    inputs.pack_weights<T>();
    return {.q = tokens<T>(inputs.q),
            .k = tokens<T>(inputs.k),
            .queries = {},
            .keys = {},
            .dqueries = {},
            .dkeys = {},
            .dq = {},
            .dk = {},
            .w = inputs.w.data(),
            .spans = inputs.batch.spans.data(),
            .heads = inputs.batch.heads,
            .padded_length = inputs.batch.padded_length,
            .positions = inputs.n,
            .dim = inputs.dim(),
            .rank = inputs.matrices[0].columns,
            .width = 2 * inputs.part,
            .w_row_stride = inputs.row_stride,
            .w_size = inputs.size,
            .per_head = inputs.per_head,
            .causal = options.causal,
            .backward = false,
            .scale = static_cast<float>(options.scale.value_or(1 / std::sqrt(static_cast<double>(inputs.dim()))))};
}

// A W_q and A W_k, [B, H, N, R] or packed [T, H, R], float32; any numbers at padding.
std::tuple<Tensor, Tensor> refined_projection_cpu_fwd(const Tensor& q, const Tensor& k, const Tensor& w_q,
                                                      const Tensor& w_k, const std::optional<Tensor>& seq_lens,
                                                      const std::optional<Tensor>& seq_starts,
                                                      const std::optional<Tensor>& cu_seqlens, bool causal,
                                                      std::optional<double> scale) {
    Inputs inputs(q, k, w_q, w_k, {seq_lens, seq_starts, cu_seqlens});
    std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
    sizes.back() = inputs.matrices[0].columns;
    const Tensor queries = new_empty(sizes, ScalarType::Float), keys = new_empty(sizes, ScalarType::Float);
    dispatch_dtype<float, BFloat16, Half>("q", q, [&](auto zero) {
        using T = decltype(zero);
        auto op = make_arguments<T>(inputs, {causal, scale});
        op.queries = mutable_tokens<float>(queries);
        op.keys = mutable_tokens<float>(keys);
        const auto kernel = RECATTN_PICK(projection_forward<T>);
        torch::stable::parallel_for(0, inputs.batch.size() * op.heads, grain(inputs.n * op.dim * op.width),
                                    [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
    });
    return {queries, keys};
}

// dq, dk, dw_q and dw_k.
std::tuple<Tensor, Tensor, Tensor, Tensor> refined_projection_cpu_bwd(
    const Tensor& dqueries, const Tensor& dkeys, const Tensor& q, const Tensor& k, const Tensor& w_q, const Tensor& w_k,
    const std::optional<Tensor>& seq_lens, const std::optional<Tensor>& seq_starts,
    const std::optional<Tensor>& cu_seqlens, bool causal, std::optional<double> scale) {
    Inputs inputs(q, k, w_q, w_k, {seq_lens, seq_starts, cu_seqlens});
    for (const auto& [name, gradient] : {std::pair("dqueries", &dqueries), std::pair("dkeys", &dkeys)}) {
        expect_tokens_like_q(name, *gradient, q, {"R", inputs.matrices[0].columns});
        expect(gradient->scalar_type() == ScalarType::Float, name, " must be float32, got ",
               dtype_name(gradient->scalar_type()));
    }
    const Tensor dqueries_rows = with_contiguous_rows(dqueries), dkeys_rows = with_contiguous_rows(dkeys);
    const Tensor dq = new_contiguous(q), dk = new_contiguous(k), dw_q = new_contiguous(w_q), dw_k = new_contiguous(w_k);
    const Groups& groups = inputs.groups;
    const Tensor partials = new_empty({groups.count() * inputs.size}, ScalarType::Float);
    dispatch_dtype<float, BFloat16, Half>("q", q, [&](auto zero) {
        using T = decltype(zero);
        auto op = make_arguments<T>(inputs, {causal, scale});
        op.backward = true;
        op.dqueries = tokens<float>(dqueries_rows);
        op.dkeys = tokens<float>(dkeys_rows);
        op.dq = mutable_tokens<T>(dq);
        op.dk = mutable_tokens<T>(dk);
        const auto kernel = RECATTN_PICK(projection_backward<T>);
        float* sums = partials.mutable_data_ptr<float>();
        groups.parallel_for([&](int64_t begin, int64_t end) { kernel(op, groups, begin, end, sums); });
        torch::stable::parallel_for(0, inputs.size, 1 << 14, [&](int64_t begin, int64_t end) {
            for (int64_t group = 1; group < groups.count(); ++group) {
                const float* partial = sums + group * inputs.size;
                for (int64_t i = begin; i < end; ++i) sums[i] += partial[i];
            }
        });
        for (int i = 0; i < 2; ++i) {
            WeightGradient gradient(inputs.matrices[i], inputs.heads(), inputs.n);
            for (int64_t head = 0; head < inputs.heads(); ++head) {
                gradient.add(head, sums + head * inputs.n * inputs.row_stride + i * inputs.part, inputs.row_stride,
                             1.0f);
            }
            gradient.store<T>(i == 0 ? dw_q : dw_k);
        }
    });
    return {dq, dk, dw_q, dw_k};
}

#define RECATTN_OPTIONS                                                                                           \
    "Tensor q, Tensor k, Tensor w_q, Tensor w_k, Tensor? seq_lens, Tensor? seq_starts, Tensor? cu_seqlens, bool " \
    "causal, float? scale"

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("refined_projection_cpu_fwd(" RECATTN_OPTIONS ") -> (Tensor, Tensor)");
    m.def("refined_projection_cpu_bwd(Tensor dqueries, Tensor dkeys, " RECATTN_OPTIONS
          ") -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("refined_projection_cpu_fwd", TORCH_BOX(&refined_projection_cpu_fwd));
    m.impl("refined_projection_cpu_bwd", TORCH_BOX(&refined_projection_cpu_bwd));
}

}  // namespace
}  // namespace recattn

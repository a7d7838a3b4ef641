// CPU operator wasserstein_attention, and refined_attention's stochastic mechanism: one thread computes one
// (batch, head) at a time, in its cache. The equations are in wasserstein_attention_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/check.h"
#include "cpu/common.h"
#include "cpu/dropout.h"
#include "cpu/groups.h"
#include "cpu/refined_weights.h"
#include "cpu/sequences.h"
#include "cpu/simd/isa.h"
#include "cpu/tokens.h"

namespace recattn {
namespace {

// [W_q | W_k] of each head as the kernels read it: rows padded to whole registers, and a transposed copy.
class PackedMatrices {
  public:
    PackedMatrices(int64_t heads, int64_t n, int64_t columns)
        : columns(columns),
          stride(2 * padded(columns)),
          transposed_stride(padded(n) + 16),  // a register may begin at any row
          heads_(heads),
          n_(n),
          rows_(heads * n * stride),
          transposed_(heads * stride * transposed_stride) {}

    int64_t columns, stride, transposed_stride;

    int64_t size() const { return heads_ * n_ * stride; }
    int64_t offset(int64_t head, int64_t part, int64_t row) const {
        return (matrix(head) * n_ + row) * stride + part * padded(columns);
    }
    const float* at(int64_t head, int64_t part, int64_t row) const { return rows_.data() + offset(head, part, row); }
    const float* transposed_at(int64_t head, int64_t part, int64_t row) const {
        return transposed_.data() + (matrix(head) * stride + part * padded(columns)) * transposed_stride + row;
    }

    template <class T>
    void pack(const WeightMatrix& w, int64_t part) {
        for (int64_t head = 0; head < heads_; ++head) {
            float* rows = rows_.data() + offset(head, part, 0);
            float* transposed = transposed_.data() + (head * stride + part * padded(columns)) * transposed_stride;
            w.for_each_entry<T>(head, n_, [&](int64_t i, int64_t j, float entry) {
                rows[i * stride + j] = entry;
                transposed[j * transposed_stride + i] = entry;
            });
        }
    }

    // The gradient of w from the sum of gradients packed like it.
    template <class T>
    void unpack_gradient(const float* sums, const WeightMatrix& w, int64_t part, const Tensor& dw) const {
        WeightGradient gradient(w, heads_, n_);
        for (int64_t head = 0; head < heads_; ++head) gradient.add(head, sums + offset(head, part, 0), stride, 1.0f);
        gradient.store<T>(dw);
    }

  private:
    static int64_t padded(int64_t size) { return (size + 15) / 16 * 16; }
    int64_t matrix(int64_t head) const { return heads_ == 1 ? 0 : head; }

    int64_t heads_, n_;
    Scratch<float> rows_, transposed_;
};

// One call, forward or backward. Without covariances mean_q and mean_k are vectors, with matrices.
template <class T>
struct WassersteinAttention {
    Tokens<const T> mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, dmean, dcov;
    Tokens<T> mean, cov, dmean_q, dcov_q, dmean_k, dcov_k, dmean_v, dcov_v;
    const PackedMatrices* matrices;  // null: not refined
    const Span* spans;
    int64_t heads, padded_length, longest, dim, value_dim;  // padded_length is N, 0 where packed
    bool has_cov, softmax_source, causal;
    float scale;
    Dropout dropout;

    // Columns of the queries and keys of A, and of p.
    int64_t source_width() const { return has_cov ? 2 * dim : dim; }
    int64_t width() const { return matrices == nullptr ? source_width() : matrices->columns; }
    // Of the distances in p: 1/√R if refined.
    float p_scale() const {
        return matrices == nullptr ? scale : static_cast<float>(1 / std::sqrt(matrices->columns / 2.0));
    }
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/wasserstein_attention_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

using OptionalTensor = std::optional<Tensor>;

struct Options {
    bool softmax_source, causal;
    std::optional<double> scale;
    double dropout_p;
};

// [B, H, N, columns], or packed [T, H, columns], like mean_q.
void expect_tokens(const char* name, const Tensor& x, const Tensor& mean_q, Axis columns) {
    if (mean_q.dim() == 3) {
        expect_shape(name, x, {{"T", mean_q.size(0)}, {"H", mean_q.size(1)}, columns});
    } else {
        expect_shape(name, x, {{"B", mean_q.size(0)}, {"H", mean_q.size(1)}, {"N", mean_q.size(2)}, columns});
    }
    expect_dtype_of("mean_q", mean_q, name, x);
}

OptionalTensor with_contiguous_rows(const OptionalTensor& x) {
    return x ? OptionalTensor(recattn::with_contiguous_rows(*x)) : x;
}

// Checked inputs of the forward and the backward, as the kernels read them.
struct Inputs {
    Inputs(const Tensor& mean_q, const OptionalTensor& cov_q, const Tensor& mean_k, const OptionalTensor& cov_k,
           const Tensor& mean_v, const OptionalTensor& cov_v, const OptionalTensor& w_q, const OptionalTensor& w_k,
           const LengthTensors& length_tensors, const OptionalTensor& dropout_seed, const Options& options)
        : options(options), dropout(dropout_seed, options.dropout_p) {
        const bool is_packed = length_tensors.packed();
        if (is_packed) {
            expect_shape("mean_q", mean_q, {{"T"}, {"H"}, {"D"}});
        } else {
            expect_shape("mean_q", mean_q, {{"B"}, {"H"}, {"N"}, {"D"}});
        }
        const Axis dim{"D", mean_q.size(mean_q.dim() - 1)};
        expect(dim.size > 0, "D of mean_q and mean_k must be at least 1, got 0");
        expect_tokens("mean_k", mean_k, mean_q, dim);
        expect_tokens("mean_v", mean_v, mean_q, {"Dv"});
        expect(cov_q.has_value() == cov_k.has_value() && cov_q.has_value() == cov_v.has_value(),
               "cov_q, cov_k and cov_v must be given together");
        expect(cov_q || w_q, "w_q must be a tensor without cov_q");
        if (cov_q) {
            expect_tokens("cov_q", *cov_q, mean_q, dim);
            expect_tokens("cov_k", *cov_k, mean_q, dim);
            expect_tokens("cov_v", *cov_v, mean_q, {"Dv", mean_v.size(mean_v.dim() - 1)});
        }
        const int64_t batch = is_packed ? length_tensors.packed_batch() : mean_q.size(0);
        spans = checked_spans(length_tensors, batch, mean_q.size(is_packed ? 0 : 2));
        for (const Span& span : spans) longest = std::max(longest, span.length);
        expect(w_q.has_value() == w_k.has_value(), "w_q and w_k must be given together");
        if (w_q) add_matrices(mean_q, *w_q, *w_k);
        this->mean_q = recattn::with_contiguous_rows(mean_q);
        this->mean_k = recattn::with_contiguous_rows(mean_k);
        this->mean_v = recattn::with_contiguous_rows(mean_v);
        this->cov_q = with_contiguous_rows(cov_q);
        this->cov_k = with_contiguous_rows(cov_k);
        this->cov_v = with_contiguous_rows(cov_v);
        const int64_t value_dim = mean_v.size(mean_v.dim() - 1);
        const int64_t columns = 2 * dim.size + 2 * value_dim + (matrices ? 3 * matrices->columns : 0);
        groups.emplace(spans, mean_q.size(1), columns);
    }

    void add_matrices(const Tensor& mean_q, const Tensor& q, const Tensor& k) {
        const int64_t heads = mean_q.size(1), n = mean_q.dim() == 3 ? longest : mean_q.size(2);
        expect_matrix("w_q", q, heads, {"Nmax"}, {"2R"});
        const int64_t rows = q.size(q.dim() - 2), columns = q.size(q.dim() - 1);
        expect_matrix("w_k", k, heads, {"Nmax", rows}, {"2R", columns});
        const char* needed = mean_q.dim() == 3 ? "the longest sequence, " : "N = ";
        expect(rows >= n, "Nmax of w_q and w_k must be at least ", needed, n, ", got ", rows);
        expect(columns > 0 && columns % 2 == 0, "2R of w_q and w_k must be even and at least 2, got ", columns);
        expect_dtype_of("mean_q", mean_q, "w_q", q);
        expect_dtype_of("mean_q", mean_q, "w_k", k);
        w_q.emplace(q, columns);
        w_k.emplace(k, columns);
        matrices.emplace(q.dim() == 3 || k.dim() == 3 ? heads : 1, n, columns);
    }

    template <class T>
    WassersteinAttention<T> arguments() {
        if (matrices) {
            matrices->pack<T>(*w_q, kQueries);
            matrices->pack<T>(*w_k, kKeys);
        }
        WassersteinAttention<T> op{};
        op.mean_q = tokens<T>(mean_q);
        op.mean_k = tokens<T>(mean_k);
        op.mean_v = tokens<T>(mean_v);
        op.has_cov = cov_q.has_value();
        if (op.has_cov) {
            op.cov_q = tokens<T>(*cov_q);
            op.cov_k = tokens<T>(*cov_k);
            op.cov_v = tokens<T>(*cov_v);
        }
        op.matrices = matrices ? &*matrices : nullptr;
        op.spans = spans.data();
        op.heads = mean_q.size(1);
        op.padded_length = mean_q.dim() == 3 ? 0 : mean_q.size(2);
        op.longest = longest;
        op.dim = mean_q.size(mean_q.dim() - 1);
        op.value_dim = mean_v.size(mean_v.dim() - 1);
        op.softmax_source = options.softmax_source;
        op.causal = options.causal;
        op.scale = static_cast<float>(options.scale.value_or(1 / std::sqrt(static_cast<double>(op.dim))));
        op.dropout = dropout;
        return op;
    }

    Options options;
    Dropout dropout;
    Tensor mean_q, mean_k, mean_v;
    OptionalTensor cov_q, cov_k, cov_v;
    std::vector<Span> spans;
    int64_t longest = 0;  // of the sequences
    std::optional<WeightMatrix> w_q, w_k;
    std::optional<PackedMatrices> matrices;
    std::optional<Groups> groups;
};

// An empty tensor in place of none.
Tensor new_like(const Tensor& like, const OptionalTensor& x) {
    return x ? new_contiguous(*x) : new_empty({0}, like.scalar_type());
}

#define RECATTN_PARAMETERS                                                                                       \
    const Tensor &mean_q, const OptionalTensor &cov_q, const Tensor &mean_k, const OptionalTensor &cov_k,        \
        const Tensor &mean_v, const OptionalTensor &cov_v, const OptionalTensor &w_q, const OptionalTensor &w_k, \
        const OptionalTensor &seq_lens, const OptionalTensor &seq_starts, const OptionalTensor &cu_seqlens,      \
        const OptionalTensor &dropout_seed, bool softmax_source, bool causal, std::optional<double> scale,       \
        double dropout_p
#define RECATTN_INPUTS                                                                                             \
    {                                                                                                              \
        mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, w_q, w_k, {seq_lens, seq_starts, cu_seqlens}, dropout_seed, { \
            softmax_source, causal, scale, dropout_p                                                               \
        }                                                                                                          \
    }

// Mean and covariance; that is empty without covariances.
std::tuple<Tensor, Tensor> wasserstein_attention_pairs_fwd(RECATTN_PARAMETERS) {
    Inputs inputs RECATTN_INPUTS;
    const Groups& groups = *inputs.groups;
    const Tensor mean = new_contiguous(mean_v), cov = new_like(mean_v, cov_v);
    dispatch_dtype<float, BFloat16, Half>("mean_q", mean_q, [&](auto zero) {
        using T = decltype(zero);
        auto op = inputs.arguments<T>();
        op.mean = mutable_tokens<T>(mean);
        if (cov_v) op.cov = mutable_tokens<T>(cov);
        const auto kernel = RECATTN_PICK(forward<T>);
        groups.parallel_for([&](int64_t begin, int64_t end) { kernel(op, groups.start(begin), groups.start(end)); });
    });
    return {mean, cov};
}

// The gradients of all tensors up to w_k; empty for those that are not given.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wasserstein_attention_pairs_bwd(
    const Tensor& dmean, const OptionalTensor& dcov, RECATTN_PARAMETERS) {
    Inputs inputs RECATTN_INPUTS;
    const Axis value_dim{"Dv", mean_v.size(mean_v.dim() - 1)};
    expect_tokens("dmean", dmean, mean_q, value_dim);
    expect(dcov.has_value() == cov_v.has_value(), "dcov and cov_v must be given together");
    if (dcov) expect_tokens("dcov", *dcov, mean_q, value_dim);
    const Groups& groups = *inputs.groups;
    const Tensor dmean_rows = recattn::with_contiguous_rows(dmean);
    const OptionalTensor dcov_rows = with_contiguous_rows(dcov);
    const Tensor dmean_q = new_contiguous(mean_q), dmean_k = new_contiguous(mean_k), dmean_v = new_contiguous(mean_v);
    const Tensor dcov_q = new_like(mean_q, cov_q), dcov_k = new_like(mean_q, cov_k), dcov_v = new_like(mean_q, cov_v);
    const Tensor dw_q = new_like(mean_q, w_q), dw_k = new_like(mean_q, w_k);
    const int64_t size = inputs.matrices ? inputs.matrices->size() : 0;
    const Tensor partials = new_empty({groups.count() * size}, ScalarType::Float);
    dispatch_dtype<float, BFloat16, Half>("mean_q", mean_q, [&](auto zero) {
        using T = decltype(zero);
        auto op = inputs.arguments<T>();
        op.dmean = tokens<T>(dmean_rows);
        op.dmean_q = mutable_tokens<T>(dmean_q);
        op.dmean_k = mutable_tokens<T>(dmean_k);
        op.dmean_v = mutable_tokens<T>(dmean_v);
        if (dcov) {
            op.dcov = tokens<T>(*dcov_rows);
            op.dcov_q = mutable_tokens<T>(dcov_q);
            op.dcov_k = mutable_tokens<T>(dcov_k);
            op.dcov_v = mutable_tokens<T>(dcov_v);
        }
        const auto kernel = RECATTN_PICK(backward<T>);
        float* sums = partials.mutable_data_ptr<float>();
        groups.parallel_for([&](int64_t begin, int64_t end) { kernel(op, groups, begin, end, sums); });
        if (!w_q) return;
        for (int64_t group = 1; group < groups.count(); ++group) {
            for (int64_t i = 0; i < size; ++i) sums[i] += sums[group * size + i];
        }
        inputs.matrices->unpack_gradient<T>(sums, *inputs.w_q, kQueries, dw_q);
        inputs.matrices->unpack_gradient<T>(sums, *inputs.w_k, kKeys, dw_k);
    });
    return {dmean_q, dcov_q, dmean_k, dcov_k, dmean_v, dcov_v, dw_q, dw_k};
}

#define RECATTN_SCHEMA                                                                                                \
    "Tensor mean_q, Tensor? cov_q, Tensor mean_k, Tensor? cov_k, Tensor mean_v, Tensor? cov_v, Tensor? w_q, Tensor? " \
    "w_k, Tensor? seq_lens, Tensor? seq_starts, Tensor? cu_seqlens, Tensor? dropout_seed, bool softmax_source, bool " \
    "causal, float? scale, float dropout_p"

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("wasserstein_attention_pairs_fwd(" RECATTN_SCHEMA ") -> (Tensor, Tensor)");
    m.def("wasserstein_attention_pairs_bwd(Tensor dmean, Tensor? dcov, " RECATTN_SCHEMA
          ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("wasserstein_attention_pairs_fwd", TORCH_BOX(&wasserstein_attention_pairs_fwd));
    m.impl("wasserstein_attention_pairs_bwd", TORCH_BOX(&wasserstein_attention_pairs_bwd));
}

}  // namespace
}  // namespace recattn

// CPU operator refined_attention for short sequences: one thread computes one (batch, head) at a time, in its cache.
// The equations are in refined_attention_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/check.h"
#include "cpu/common.h"
#include "cpu/simd/isa.h"

namespace recattn {
namespace {

// A tensor [B, H, N, columns] whose last axis is contiguous.
template <class T>
struct Tokens {
    T* data;
    int64_t batch_stride, head_stride, row_stride;

    T* at(int64_t batch, int64_t head, int64_t position) const {
        return data + batch * batch_stride + head * head_stride + position * row_stride;
    }
};

enum WeightPart { kQueries, kKeys, kValues };

// W [heads or 1, N, P] = [W_q | W_k | W_v], or [W_q W_kᵀ | W_v] if folded, as the kernels read it: rows padded to whole
// registers, and a transposed copy. The columns of W_v and of W_q W_kᵀ are positions, like the rows.
class PackedWeights {
  public:
    PackedWeights(const Tensor& weights, bool folded, bool has_values)
        : heads_(weights.size(0)), n_(weights.size(1)), folded_(folded) {
        const int64_t values = has_values ? n_ : 0, rank = weights.size(2) - values;
        columns_ = folded ? std::array{rank, int64_t{0}, values} : std::array{rank / 2, rank / 2, values};
        for (int part = 0; part < 3; ++part) {
            first_[part] = row_stride;
            row_stride += padded(columns_[part]);
        }
        transposed_row_stride = padded(n_);
        rows_ = Scratch<float>(heads_ * n_ * row_stride);
        transposed_ = Scratch<float>(heads_ * row_stride * transposed_row_stride);
        const float* entries = weights.const_data_ptr<float>();
        for_each_entry([&](int64_t head, int64_t i, int64_t column, int64_t entry) {
            const float value = entries[entry];
            rows_.data()[(head * n_ + i) * row_stride + column] = value;
            transposed_.data()[(head * row_stride + column) * transposed_row_stride + i] = value;
        });
    }

    int64_t row_stride = 0, transposed_row_stride = 0;

    int64_t columns(int part) const { return columns_[part]; }
    int64_t size() const { return heads_ * n_ * row_stride; }

    // Offset of the entry at position `start`: its row, and its column where columns are positions.
    int64_t offset(int64_t head, int part, int64_t start) const {
        return (matrix(head) * n_ + start) * row_stride + first_column(part, start);
    }
    const float* at(int64_t head, int part, int64_t start) const { return rows_.data() + offset(head, part, start); }
    const float* transposed_at(int64_t head, int part, int64_t start) const {
        return transposed_.data() + (matrix(head) * row_stride + first_column(part, start)) * transposed_row_stride +
               start;
    }

    // dweights = the sum of `count` partial gradients packed like W. Overwrites the first partial.
    void sum(float* partials, int64_t count, float* dweights) const {
        for (int64_t p = 1; p < count; ++p) {
            for (int64_t i = 0; i < size(); ++i) partials[i] += partials[p * size() + i];
        }
        for_each_entry([&](int64_t head, int64_t i, int64_t column, int64_t entry) {
            dweights[entry] = partials[(head * n_ + i) * row_stride + column];
        });
    }

  private:
    static int64_t padded(int64_t columns) { return columns == 0 ? 0 : (columns + 31) / 16 * 16; }
    int64_t matrix(int64_t head) const { return heads_ == 1 ? 0 : head; }
    int64_t first_column(int part, int64_t start) const {
        return first_[part] + (part == kValues || folded_ ? start : 0);
    }

    template <class Function>
    void for_each_entry(const Function& function) const {
        int64_t entry = 0;
        for (int64_t head = 0; head < heads_; ++head) {
            for (int64_t i = 0; i < n_; ++i) {
                for (int part = 0; part < 3; ++part) {
                    for (int64_t j = 0; j < columns_[part]; ++j) function(head, i, first_[part] + j, entry++);
                }
            }
        }
    }

    int64_t heads_, n_;
    bool folded_;
    std::array<int64_t, 3> columns_{}, first_{};
    Scratch<float> rows_{0}, transposed_{0};
};

template <class T>
struct RefinedAttention {
    Tokens<const T> q, k, v, dout;
    Tokens<T> out, dq, dk, dv;
    const PackedWeights& weights;
    const int64_t* lengths;
    int64_t heads, n, dim, value_dim, r;
    bool folded, has_values, adds_source, softmax_source, causal, left_padded;
    float scale;

    // Width of queries and keys for `tokens` tokens; if folded, keys are the rows of A.
    int64_t rank(int64_t tokens) const { return folded ? tokens : r; }
};

// Splits all (batch, head) indices into groups of about equal cost. The groups do not depend on the number of threads.
class Groups {
  public:
    Groups(const std::vector<int64_t>& lengths, int64_t heads, int64_t columns) {
        const int64_t batch_heads = static_cast<int64_t>(lengths.size()) * heads;
        std::vector<int64_t> costs{0};  // running sum of multiply-adds
        for (const int64_t length : lengths) {
            for (int64_t head = 0; head < heads; ++head) costs.push_back(costs.back() + length * length * columns + 1);
        }
        const int64_t wanted = std::clamp<int64_t>(batch_heads / kBatchHeadsPerGroup, kMinGroups, kMaxGroups);
        const int64_t count = std::clamp<int64_t>(batch_heads, 1, wanted);
        for (int64_t group = 0; group <= count; ++group) {
            const double cost = static_cast<double>(costs.back()) * group / count;
            starts_.push_back(std::lower_bound(costs.begin(), costs.end() - 1, cost) - costs.begin());
        }
        cost_ = costs.back() / count;
    }

    int64_t count() const { return static_cast<int64_t>(starts_.size()) - 1; }
    int64_t start(int64_t group) const { return starts_[group]; }

    template <class Function>
    void parallel_for(const Function& function) const {
        torch::stable::parallel_for(0, count(), grain(cost_), function);
    }

  private:
    // Each group has its own sum of dW; few groups keep that memory below that of the tokens.
    static constexpr int64_t kBatchHeadsPerGroup = 8, kMinGroups = 16, kMaxGroups = 64;
    std::vector<int64_t> starts_;
    int64_t cost_;
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/refined_attention_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

struct Options {
    bool folded, has_values, adds_source, softmax_source, causal, left_padded;
    double scale;
};

std::vector<int64_t> checked_lengths(const std::optional<Tensor>& seq_lens, int64_t batch, int64_t longest) {
    if (!seq_lens) return std::vector<int64_t>(batch, longest);
    expect_shape("seq_lens", *seq_lens, {{"B", batch}});
    expect_integer("seq_lens", *seq_lens);
    auto lengths = to_vector(*seq_lens);
    expect_lengths("seq_lens", lengths, longest);
    return lengths;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weights, const Options& options) {
    expect_shape("q", q, {{"B"}, {"H"}, {"N"}, {"D"}});
    const int64_t batch = q.size(0), heads = q.size(1), n = q.size(2);
    expect_shape("k", k, {{"B", batch}, {"H", heads}, {"N", n}, {"D", q.size(3)}});
    expect_shape("v", v, {{"B", batch}, {"H", heads}, {"N", n}, {"Dv"}});
    expect_dtype_of("q", q, "k", k);
    expect_dtype_of("q", q, "v", v);
    expect_shape("weights", weights, {{"1 or H"}, {"N", n}, {"C"}});
    expect_dtype("weights", weights, ScalarType::Float);
    expect(weights.size(0) == 1 || weights.size(0) == heads, "weights must be of 1 or ", heads, " heads, got ",
           weights.size(0));
    const int64_t rank = weights.size(2) - (options.has_values ? q.size(2) : 0);
    if (options.folded) {
        expect(rank == q.size(2), "folded weights must have ", q.size(2), " columns, got ", rank);
    } else {
        expect(rank > 0 && rank % 2 == 0, "weights must have an even number of columns besides those of values, got ",
               rank);
    }
}

template <class T>
Tokens<const T> tokens(const Tensor& t) {
    return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
Tokens<T> mutable_tokens(const Tensor& t) {
    return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

// Checked inputs of the forward and the backward, as the kernels read them.
struct Inputs {
    Inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weights,
           const std::optional<Tensor>& seq_lens, const Options& options)
        : options((check(q, k, v, weights, options), options)),
          lengths(checked_lengths(seq_lens, q.size(0), q.size(2))),
          q(with_contiguous_rows(q)),
          k(with_contiguous_rows(k)),
          v(with_contiguous_rows(v)),
          packed(torch::stable::contiguous(weights), options.folded, options.has_values),
          groups(lengths, q.size(1), q.size(3) + v.size(3) + weights.size(2)) {}

    Options options;
    std::vector<int64_t> lengths;
    Tensor q, k, v;
    PackedWeights packed;
    Groups groups;
};

template <class T>
RefinedAttention<T> make_arguments(const Inputs& inputs) {
    const Options& options = inputs.options;
    return {.q = tokens<T>(inputs.q),
            .k = tokens<T>(inputs.k),
            .v = tokens<T>(inputs.v),
            .dout = {},
            .out = {},
            .dq = {},
            .dk = {},
            .dv = {},
            .weights = inputs.packed,
            .lengths = inputs.lengths.data(),
            .heads = inputs.q.size(1),
            .n = inputs.q.size(2),
            .dim = inputs.q.size(3),
            .value_dim = inputs.v.size(3),
            .r = inputs.packed.columns(kQueries),
            .folded = options.folded,
            .has_values = options.has_values,
            .adds_source = options.adds_source,
            .softmax_source = options.softmax_source,
            .causal = options.causal,
            .left_padded = options.left_padded,
            .scale = static_cast<float>(options.scale)};
}

Tensor new_contiguous(const Tensor& tensor) {
    return torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)});
}

Tensor refined_attention_pairs_fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weights,
                                   const std::optional<Tensor>& seq_lens, bool folded, bool has_values,
                                   bool adds_source, bool softmax_source, bool causal, bool left_padded, double scale) {
    const Options options{folded, has_values, adds_source, softmax_source, causal, left_padded, scale};
    const Inputs inputs(q, k, v, weights, seq_lens, options);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> refined_attention_pairs_bwd(
    const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& weights,
    const std::optional<Tensor>& seq_lens, bool folded, bool has_values, bool adds_source, bool softmax_source,
    bool causal, bool left_padded, double scale) {
    const Options options{folded, has_values, adds_source, softmax_source, causal, left_padded, scale};
    const Inputs inputs(q, k, v, weights, seq_lens, options);
    check(q, k, dout, weights, options);
    expect_shape("dout", dout, {{"B"}, {"H"}, {"N"}, {"Dv", v.size(3)}});
    const PackedWeights& packed = inputs.packed;
    const Groups& groups = inputs.groups;
    const Tensor dout_rows = with_contiguous_rows(dout);
    const Tensor dq = new_contiguous(q), dk = new_contiguous(k), dv = new_contiguous(v);
    const Tensor partials = torch::stable::new_empty(weights, {groups.count(), packed.size()});
    const Tensor dweights = torch::stable::new_empty(weights, {weights.size(0), weights.size(1), weights.size(2)});
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
    });
    packed.sum(partials.mutable_data_ptr<float>(), groups.count(), dweights.mutable_data_ptr<float>());
    return {dq, dk, dv, dweights};
}

#define RECATTN_OPTIONS                                                                                                \
    "Tensor q, Tensor k, Tensor v, Tensor weights, Tensor? seq_lens, bool folded, bool has_values, bool adds_source, " \
    "bool softmax_source, bool causal, bool left_padded, float scale"

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("refined_attention_pairs_fwd(" RECATTN_OPTIONS ") -> Tensor");
    m.def("refined_attention_pairs_bwd(Tensor dout, " RECATTN_OPTIONS ") -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("refined_attention_pairs_fwd", TORCH_BOX(&refined_attention_pairs_fwd));
    m.impl("refined_attention_pairs_bwd", TORCH_BOX(&refined_attention_pairs_bwd));
}

}  // namespace
}  // namespace recattn

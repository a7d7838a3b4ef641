// CPU operator inter_sink_bias: the valid sinks of a sequence attend to each other, averaged over the heads.
// The equations are in inter_sink_bias_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "cpu/common.h"
#include "cpu/dropout.h"
#include "cpu/rows.h"
#include "cpu/simd/isa.h"
#include "cpu/tokens.h"

namespace recattn {
namespace {

constexpr int64_t kRows = 48;  // rows of the bias that are computed together: a multiple of the register tile's

// The valid sinks of each sequence, ascending. Another thread may write to the mask: it is read once, here.
class ValidSinks {
  public:
    ValidSinks(const std::optional<Tensor>& sink_mask, int64_t batch, int64_t num_sinks) : all_valid_(!sink_mask) {
        if (all_valid_) {
            sinks_.resize(num_sinks);
            std::iota(sinks_.begin(), sinks_.end(), 0);
            most_ = num_sinks;
            return;
        }
        const bool* mask = sink_mask->const_data_ptr<bool>();
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t m = 0; m < num_sinks; ++m) {
                if (read_once(mask[b * sink_mask->stride(0) + m * sink_mask->stride(1)])) sinks_.push_back(m);
            }
            starts_.push_back(static_cast<int64_t>(sinks_.size()));
            most_ = std::max(most_, count(b));
        }
    }

    int64_t count(int64_t batch) const { return all_valid_ ? most_ : starts_[batch + 1] - starts_[batch]; }
    const int64_t* of(int64_t batch) const { return sinks_.data() + (all_valid_ ? 0 : starts_[batch]); }
    int64_t most() const { return most_; }

  private:
    bool all_valid_;
    std::vector<int64_t> sinks_, starts_{0};
    int64_t most_ = 0;
};

// Blocks of kRows valid sinks of a sequence; at least one for each sequence.
class BiasTasks {
  public:
    BiasTasks(const ValidSinks& valid, int64_t batch) {
        for (int64_t b = 0; b < batch; ++b) {
            int64_t begin = 0;
            do {
                tasks_.emplace_back(b, begin);
                begin += kRows;
            } while (begin < valid.count(b));
        }
    }

    int64_t count() const { return static_cast<int64_t>(tasks_.size()); }
    std::pair<int64_t, int64_t> operator[](int64_t task) const { return tasks_[task]; }

  private:
    std::vector<std::pair<int64_t, int64_t>> tasks_;
};

template <class T>
struct InterSinkBias {
    Tokens<const T> q, k;
    Tokens<T> dq, dk;
    const ValidSinks& valid;
    int64_t heads, num_sinks, dim;
    bool causal;
    float scale, factor;
    Dropout dropout;
    float* out;         // [B, 1, M, M]
    const float* dout;  // the same, with these strides
    int64_t dout_batch_stride, dout_row_stride;
    double* delta_sums;  // [B, H]
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/inter_sink_bias_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

struct Options {
    double factor;
    bool causal;
    double dropout_p;
    std::optional<double> scale;
};

double value_of(const Tensor& number) {
    double value = 0;
    dispatch_dtype<double, float, BFloat16, Half>("bias_scale", number, [&](auto zero) {
        value = static_cast<double>(*number.const_data_ptr<decltype(zero)>());
    });
    return value;
}

// Checked inputs of the forward and the backward, as the kernels read them.
struct Inputs {
    Inputs(const Tensor& q_s, const Tensor& k_s, const std::optional<Tensor>& sink_mask,
           const std::optional<Tensor>& bias_scale, const std::optional<Tensor>& dropout_seed, const Options& options)
        : q(with_contiguous_rows(checked(q_s, k_s, sink_mask, bias_scale))),
          k(with_contiguous_rows(k_s)),
          valid(sink_mask, q.size(0), q.size(2)),
          dropout(dropout_seed, options.dropout_p),
          causal(options.causal),
          scale(options.scale.value_or(1 / std::sqrt(static_cast<double>(q.size(3))))),
          mean_factor(options.factor / q.size(1)),
          factor(mean_factor * (bias_scale ? value_of(*bias_scale) : 1)) {}

    template <class T>
    InterSinkBias<T> arguments() const {
        InterSinkBias<T> op{.valid = valid};
        op.q = tokens<T>(q), op.k = tokens<T>(k);
        op.heads = q.size(1), op.num_sinks = q.size(2), op.dim = q.size(3);
        op.causal = causal;
        op.scale = static_cast<float>(scale), op.factor = static_cast<float>(factor);
        op.dropout = dropout;
        return op;
    }

    // Calls work(next) on as many threads as the products of all heads are worth.
    template <class Work>
    void for_each_task(int64_t tasks, int64_t products, const Work& work) const {
        double multiply_adds = 0;
        for (int64_t b = 0; b < q.size(0); ++b) {
            multiply_adds += static_cast<double>(valid.count(b)) * valid.count(b) * q.size(1) * q.size(3) * products;
        }
        const auto worthwhile = static_cast<int64_t>(multiply_adds / kMultiplyAddsPerThread) + 1;
        const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
        std::atomic<int64_t> next = 0;
        torch::stable::parallel_for(0, std::min({threads, worthwhile, tasks}), 1,
                                    [&](int64_t, int64_t) { work(next); });
    }

    Tensor q, k;
    ValidSinks valid;
    Dropout dropout;
    bool causal;
    double scale, mean_factor, factor;  // mean_factor: without a bias_scale that is a tensor

  private:
    static const Tensor& checked(const Tensor& q_s, const Tensor& k_s, const std::optional<Tensor>& sink_mask,
                                 const std::optional<Tensor>& bias_scale) {
        expect_shape("q_s", q_s, {{"B"}, {"H"}, {"M"}, {"D"}});
        expect_shape("k_s", k_s, {{"B", q_s.size(0)}, {"H", q_s.size(1)}, {"M", q_s.size(2)}, {"D", q_s.size(3)}});
        expect(q_s.size(1) > 0, "H of q_s and k_s must be at least 1, got 0");
        expect(q_s.size(3) > 0, "D of q_s and k_s must be at least 1, got 0");
        expect_dtype_of("q_s", q_s, "k_s", k_s);
        if (sink_mask) {
            expect_shape("sink_mask", *sink_mask, {{"B", q_s.size(0)}, {"M", q_s.size(2)}});
            expect_dtype("sink_mask", *sink_mask, ScalarType::Bool);
        }
        if (bias_scale) expect(bias_scale->numel() == 1, "bias_scale must have one element, got ", bias_scale->numel());
        return q_s;
    }
};

Tensor inter_sink_bias_cpu_fwd(const Tensor& q_s, const Tensor& k_s, const std::optional<Tensor>& sink_mask,
                               const std::optional<Tensor>& bias_scale, const std::optional<Tensor>& dropout_seed,
                               double factor, bool causal, double dropout_p, std::optional<double> scale) {
    const Inputs inputs(q_s, k_s, sink_mask, bias_scale, dropout_seed, {factor, causal, dropout_p, scale});
    const int64_t batch = q_s.size(0), num_sinks = q_s.size(2);
    const Tensor out = new_empty({batch, 1, num_sinks, num_sinks}, ScalarType::Float);
    const BiasTasks tasks(inputs.valid, batch);
    dispatch_dtype<float, BFloat16, Half>("q_s", q_s, [&](auto zero) {
        using T = decltype(zero);
        auto op = inputs.arguments<T>();
        op.out = out.mutable_data_ptr<float>();
        const auto kernel = RECATTN_PICK(bias_forward<T>);
        inputs.for_each_task(tasks.count(), 1, [&](std::atomic<int64_t>& next) { kernel(op, tasks, next); });
    });
    return out;
}

// Writes dq_s and dk_s, and returns the gradient of bias_scale: empty without it.
Tensor inter_sink_bias_cpu_bwd(const Tensor& dout, const Tensor& q_s, const Tensor& k_s,
                               const std::optional<Tensor>& sink_mask, const std::optional<Tensor>& bias_scale,
                               const std::optional<Tensor>& dropout_seed, double factor, bool causal, double dropout_p,
                               std::optional<double> scale, const Tensor& dq_s, const Tensor& dk_s) {
    const Inputs inputs(q_s, k_s, sink_mask, bias_scale, dropout_seed, {factor, causal, dropout_p, scale});
    const int64_t batch_heads = q_s.size(0) * q_s.size(1), num_sinks = q_s.size(2);
    expect_shape("dout", dout, {{"B", q_s.size(0)}, {"1", 1}, {"M", num_sinks}, {"M", num_sinks}});
    expect_dtype("dout", dout, ScalarType::Float);
    const Tensor dout_rows = with_contiguous_rows(dout);
    std::vector<double> delta_sums(batch_heads);
    dispatch_dtype<float, BFloat16, Half>("q_s", q_s, [&](auto zero) {
        using T = decltype(zero);
        auto op = inputs.arguments<T>();
        op.dq = mutable_tokens<T>(dq_s), op.dk = mutable_tokens<T>(dk_s);
        op.dout = dout_rows.const_data_ptr<float>();
        op.dout_batch_stride = dout_rows.stride(0), op.dout_row_stride = dout_rows.stride(2);
        op.delta_sums = delta_sums.data();
        const auto kernel = RECATTN_PICK(bias_backward<T>);
        inputs.for_each_task(batch_heads, 3, [&](std::atomic<int64_t>& next) { kernel(op, batch_heads, next); });
    });
    if (!bias_scale) return new_empty({0}, ScalarType::Float);
    const Tensor dbias_scale = new_empty(bias_scale->sizes(), bias_scale->scalar_type());
    const double sum = inputs.mean_factor * std::accumulate(delta_sums.begin(), delta_sums.end(), 0.0);
    dispatch_dtype<double, float, BFloat16, Half>("bias_scale", *bias_scale, [&](auto zero) {
        using T = decltype(zero);
        *dbias_scale.mutable_data_ptr<T>() = static_cast<T>(sum);
    });
    return dbias_scale;
}

#define RECATTN_OPTIONS                                                                                        \
    "Tensor q_s, Tensor k_s, Tensor? sink_mask, Tensor? bias_scale, Tensor? dropout_seed, float factor, bool " \
    "causal, float dropout_p, float? scale"

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("inter_sink_bias_cpu_fwd(" RECATTN_OPTIONS ") -> Tensor");
    m.def("inter_sink_bias_cpu_bwd(Tensor dout, " RECATTN_OPTIONS ", Tensor(a!) dq_s, Tensor(b!) dk_s) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("inter_sink_bias_cpu_fwd", TORCH_BOX(&inter_sink_bias_cpu_fwd));
    m.impl("inter_sink_bias_cpu_bwd", TORCH_BOX(&inter_sink_bias_cpu_bwd));
}

}  // namespace
}  // namespace recattn

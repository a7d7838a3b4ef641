// CPU operator of LREA's middle factor: y = leaky_relu(z W) W^T, row i over its own number of columns.
// The equations are in lrea_middle_factor_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/common.h"
#include "cpu/simd/isa.h"

namespace recattn {
namespace {

constexpr int64_t kBlockRows = 48, kBlockColumns = 64;
// dW is summed in this many groups for any number of threads, so that its bits do not depend on the threads.
constexpr int64_t kGroups = 8;

template <class A>
struct MiddleFactor {
    const A *z, *dy;                 // [R, r]
    const A* w;                      // [r, w_row_stride], zero beyond L
    const A* w_transposed;           // [w_row_stride, width], zero beyond L and r
    const int64_t *order, *lengths;  // rows of z sorted by descending length, and their lengths in that order
    A *y, *dz;                       // [R, r]
    int64_t rows, rank, w_row_stride, width;
    A negative_slope;
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/lrea_middle_factor_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// W padded to whole registers, its transpose, and the rows in the order in which they are computed.
template <class A>
class PackedInputs {
  public:
    PackedInputs(const Tensor& w, const std::optional<Tensor>& lengths, int64_t rows)
        : rank_(w.size(0)),
          columns_(w.size(1)),
          w_row_stride_(round_up(columns_, kBlockColumns)),
          width_(round_up(rank_, 64 / sizeof(A))),
          w_(rank_ * w_row_stride_),
          w_transposed_(w_row_stride_ * width_),
          order_(rows),
          lengths_(rows, columns_) {
        const A* in = w.const_data_ptr<A>();
        for (int64_t k = 0; k < rank_; ++k) {
            std::copy_n(in + k * columns_, columns_, w_.data() + k * w_row_stride_);
            for (int64_t c = 0; c < columns_; ++c) w_transposed_.data()[c * width_ + k] = in[k * columns_ + c];
        }
        std::iota(order_.begin(), order_.end(), 0);
        if (lengths) sort_rows(to_vector(*lengths));
    }

    MiddleFactor<A> operation(const Tensor& z, double negative_slope) const {
        return {z.const_data_ptr<A>(),
                nullptr,
                w_.data(),
                w_transposed_.data(),
                order_.data(),
                lengths_.data(),
                nullptr,
                nullptr,
                static_cast<int64_t>(order_.size()),
                rank_,
                w_row_stride_,
                width_,
                static_cast<A>(negative_slope)};
    }

    int64_t size() const { return rank_ * w_row_stride_; }
    // Average multiply-adds of one product of a row block with W.
    int64_t block_cost() const {
        const int64_t seen = std::accumulate(lengths_.begin(), lengths_.end(), int64_t{0});
        return kBlockRows * rank_ * seen / std::max<int64_t>(1, lengths_.size());
    }

    // dW [r, L] = sum of the groups' partial sums.
    void sum(const A* partials, A* dw) const {
        for (int64_t k = 0; k < rank_; ++k) {
            std::copy_n(partials + k * w_row_stride_, columns_, dw + k * columns_);
            for (int64_t group = 1; group < kGroups; ++group) {
                const A* partial = partials + group * size() + k * w_row_stride_;
                for (int64_t c = 0; c < columns_; ++c) dw[k * columns_ + c] += partial[c];
            }
        }
    }

  private:
    void sort_rows(const std::vector<int64_t>& lengths) {
        expect_lengths("lengths", lengths, columns_);
        std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
        std::transform(order_.begin(), order_.end(), lengths_.begin(), [&](int64_t row) { return lengths[row]; });
    }

    int64_t rank_, columns_, w_row_stride_, width_;  // width: rank rounded up to 64 bytes
    Scratch<A> w_, w_transposed_;
    std::vector<int64_t> order_, lengths_;
};

void check(const Tensor& z, const Tensor& w_decomp, const std::optional<Tensor>& lengths) {
    expect_shape("z", z, {{"R"}, {"r"}});
    expect_shape("w_decomp", w_decomp, {{"r", z.size(1)}, {"L"}});
    expect_dtype_of("z", z, "w_decomp", w_decomp);
    if (lengths) {
        expect_shape("lengths", *lengths, {{"R", z.size(0)}});
        expect_integer("lengths", *lengths);
    }
}

Tensor new_like(const Tensor& tensor) { return torch::stable::new_empty(tensor, {tensor.size(0), tensor.size(1)}); }

Tensor lrea_middle_factor_rows_fwd(const Tensor& z, const Tensor& w_decomp, const std::optional<Tensor>& lengths,
                                   double negative_slope) {
    check(z, w_decomp, lengths);
    const Tensor z_rows = torch::stable::contiguous(z), w = torch::stable::contiguous(w_decomp), y = new_like(z);
    dispatch_dtype<float, double>("z", z, [&](auto zero) {
        using A = decltype(zero);
        const PackedInputs<A> inputs(w, lengths, z.size(0));
        auto op = inputs.operation(z_rows, negative_slope);
        op.y = y.mutable_data_ptr<A>();
        const auto kernel = RECATTN_PICK(middle_factor_forward<A>);
        torch::stable::parallel_for(0, round_up(op.rows, kBlockRows) / kBlockRows, grain(2 * inputs.block_cost()),
                                    [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
    });
    return y;
}

std::tuple<Tensor, Tensor> lrea_middle_factor_rows_bwd(const Tensor& dy, const Tensor& z, const Tensor& w_decomp,
                                                       const std::optional<Tensor>& lengths, double negative_slope) {
    check(z, w_decomp, lengths);
    expect_shape("dy", dy, {{"R", z.size(0)}, {"r", z.size(1)}});
    expect_dtype_of("z", z, "dy", dy);
    const Tensor z_rows = torch::stable::contiguous(z), dy_rows = torch::stable::contiguous(dy),
                 w = torch::stable::contiguous(w_decomp), dz = new_like(z), dw = new_like(w);
    dispatch_dtype<float, double>("z", z, [&](auto zero) {
        using A = decltype(zero);
        const PackedInputs<A> inputs(w, lengths, z.size(0));
        auto op = inputs.operation(z_rows, negative_slope);
        op.dy = dy_rows.const_data_ptr<A>();
        op.dz = dz.mutable_data_ptr<A>();
        Scratch<A> partials(kGroups * inputs.size());
        const auto kernel = RECATTN_PICK(middle_factor_backward<A>);
        const int64_t blocks = round_up(op.rows, kBlockRows) / kBlockRows;
        torch::stable::parallel_for(0, kGroups, grain(5 * inputs.block_cost() * blocks / kGroups),
                                    [&](int64_t begin, int64_t end) {
                                        for (int64_t group = begin; group < end; ++group) {
                                            kernel(op, group, kGroups, partials.data() + group * inputs.size());
                                        }
                                    });
        inputs.sum(partials.data(), dw.mutable_data_ptr<A>());
    });
    return {dz, dw};
}

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("lrea_middle_factor_rows_fwd(Tensor z, Tensor w_decomp, Tensor? lengths, float negative_slope) -> Tensor");
    m.def(
        "lrea_middle_factor_rows_bwd(Tensor dy, Tensor z, Tensor w_decomp, Tensor? lengths, float negative_slope) -> "
        "(Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("lrea_middle_factor_rows_fwd", TORCH_BOX(&lrea_middle_factor_rows_fwd));
    m.impl("lrea_middle_factor_rows_bwd", TORCH_BOX(&lrea_middle_factor_rows_bwd));
}

}  // namespace
}  // namespace recattn

// CPU operator lrea_attention (LREA's restored form): y = leaky_relu(z W) W^T between two products with each user's
// compressed history. The equations are in lrea_restored_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
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

// Tensor [T, H, columns] whose last axis is contiguous.
template <class T>
struct TargetRows {
    T* data;
    int64_t target_stride, head_stride;

    T* at(int64_t target, int64_t head) const { return data + target * target_stride + head * head_stride; }
};

// Tensor [U, H, r, columns] whose last axis is contiguous.
template <class T>
struct UserMatrices {
    T* data;
    int64_t user_stride, head_stride, row_stride;

    T* at(int64_t user, int64_t head) const { return data + user * user_stride + head * head_stride; }
};

// The targets of one user in one head, and how many columns of W they see.
struct Segment {
    int64_t user, head, first_target, length;
};

template <class T>
struct RestoredAttention {
    using A = accumulate_t<T>;
    TargetRows<const T> targets, dout;
    UserMatrices<const T> keys, values;
    TargetRows<T> out, dtargets;
    UserMatrices<T> dkeys, dvalues;
    TargetRows<A> z, y, dz;        // [T, H, r]
    const A* w;                    // [r, w_row_stride], zero beyond L
    const A* w_transposed;         // [w_row_stride, width], zero beyond L and r
    const Segment* segments;       // by descending length
    const int64_t* starts;         // first row of each segment; the rows are computed in this order
    int64_t num_segments, rows;    // rows: T * H
    int64_t rank, dim, value_dim;  // r, d, dv
    int64_t w_row_stride, width;   // width: r rounded up to 64 bytes
    A negative_slope, scale;
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/lrea_restored_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// W padded to whole registers, and its transpose.
template <class A>
class PackedMatrix {
  public:
    template <class T>
    PackedMatrix(const Tensor& w, T)
        : rank(w.size(0)),
          columns(w.size(1)),
          row_stride(round_up(columns, kBlockColumns)),
          width(round_up(rank, 64 / sizeof(A))),
          w_(rank * row_stride),
          transposed_(row_stride * width) {
        const T* in = w.const_data_ptr<T>();
        const int64_t stride = w.stride(0), column_stride = w.stride(1);
        for (int64_t k = 0; k < rank; ++k) {
            A* row = w_.data() + k * row_stride;
            for (int64_t c = 0; c < columns; ++c) row[c] = static_cast<A>(in[k * stride + c * column_stride]);
            for (int64_t c = 0; c < columns; ++c) transposed_.data()[c * width + k] = row[c];
        }
    }

    int64_t rank, columns, row_stride, width;

    const A* data() const { return w_.data(); }
    const A* transposed() const { return transposed_.data(); }
    int64_t size() const { return rank * row_stride; }

    // dW [r, L] = sum of the groups' partial sums, which it overwrites.
    template <class T>
    void sum(A* partials, T* dw) const {
        for (int64_t group = 1; group < kGroups; ++group) {
            for (int64_t i = 0; i < size(); ++i) partials[i] += partials[group * size() + i];
        }
        for (int64_t k = 0; k < rank; ++k) {
            for (int64_t c = 0; c < columns; ++c) dw[k * columns + c] = static_cast<T>(partials[k * row_stride + c]);
        }
    }

  private:
    Scratch<A> w_, transposed_;
};

// Checked inputs of the forward and the backward.
struct Inputs {
    Inputs(const Tensor& targets, const Tensor& keys, const Tensor& values, const Tensor& w_decomp,
           const Tensor& target_offsets, const std::optional<Tensor>& seq_lens)
        : targets((check(targets, keys, values, w_decomp, target_offsets, seq_lens), with_contiguous_rows(targets))),
          keys(with_contiguous_rows(keys)),
          values(with_contiguous_rows(values)),
          w_decomp(w_decomp),
          num_targets(targets.size(0)),
          users(keys.size(0)),
          heads(targets.size(1)),
          rank(w_decomp.size(0)),
          dim(targets.size(2)),
          value_dim(values.size(3)) {
        const int64_t longest = w_decomp.size(1);
        const auto lengths = seq_lens ? to_vector(*seq_lens) : std::vector<int64_t>(users, longest);
        expect_lengths("seq_lens", lengths, longest);
        const auto offsets = to_vector(target_offsets);
        expect_offsets("target_offsets", offsets, num_targets);
        std::vector<int64_t> order(users);
        std::iota(order.begin(), order.end(), 0);
        if (seq_lens) {
            std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
        }
        segments.reserve(users * heads);
        starts.reserve(users * heads + 1);
        starts.push_back(0);
        for (const int64_t user : order) {
            const int64_t count = offsets[user + 1] - offsets[user];
            for (int64_t head = 0; head < heads; ++head) {
                segments.push_back({user, head, offsets[user], lengths[user]});
                starts.push_back(starts.back() + count);
            }
            seen += count * heads * lengths[user];
        }
    }

    int64_t rows() const { return starts.back(); }
    int64_t blocks() const { return round_up(rows(), kBlockRows) / kBlockRows; }
    // Average multiply-adds of a block of rows, for `products` products with W and as many with the user's matrices.
    int64_t block_cost(int64_t products) const {
        const int64_t columns = seen / std::max<int64_t>(1, rows()) + std::max(dim, value_dim);
        return products * kBlockRows * rank * columns;
    }

    template <class T>
    RestoredAttention<T> operation(const PackedMatrix<accumulate_t<T>>& w, double negative_slope,
                                   std::optional<double> scale) const;

    Tensor targets, keys, values, w_decomp;
    int64_t num_targets, users, heads, rank, dim, value_dim;
    std::vector<Segment> segments;
    std::vector<int64_t> starts;
    int64_t seen = 0;  // columns of W that all rows see together

  private:
    static void check(const Tensor& targets, const Tensor& keys, const Tensor& values, const Tensor& w_decomp,
                      const Tensor& target_offsets, const std::optional<Tensor>& seq_lens) {
        expect_shape("targets", targets, {{"T"}, {"H"}, {"d"}});
        const int64_t heads = targets.size(1), dim = targets.size(2);
        expect(dim > 0, "d of targets and keys must be at least 1, got 0");
        expect_shape("keys", keys, {{"U"}, {"H", heads}, {"r"}, {"d", dim}});
        const int64_t users = keys.size(0), rank = keys.size(2);
        expect_shape("values", values, {{"U", users}, {"H", heads}, {"r", rank}, {"dv"}});
        expect_shape("w_decomp", w_decomp, {{"r", rank}, {"Lmax"}});
        expect_dtype_of("targets", targets, "keys", keys);
        expect_dtype_of("targets", targets, "values", values);
        expect_dtype_of("targets", targets, "w_decomp", w_decomp);
        expect_shape("target_offsets", target_offsets, {{"U+1", users + 1}});
        expect_integer("target_offsets", target_offsets);
        if (seq_lens) {
            expect_shape("seq_lens", *seq_lens, {{"U", users}});
            expect_integer("seq_lens", *seq_lens);
        }
    }
};

template <class T>
TargetRows<const T> target_rows(const Tensor& t) {
    return {t.const_data_ptr<T>(), t.stride(0), t.stride(1)};
}

template <class T>
TargetRows<T> new_rows(const Tensor& t) {
    return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1)};
}

template <class T>
UserMatrices<const T> user_matrices(const Tensor& t) {
    return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
UserMatrices<T> new_matrices(const Tensor& t) {
    return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
RestoredAttention<T> Inputs::operation(const PackedMatrix<accumulate_t<T>>& w, double negative_slope,
                                       std::optional<double> scale) const {
    using A = accumulate_t<T>;
    return {.targets = target_rows<T>(targets),
            .dout = {},
            .keys = user_matrices<T>(keys),
            .values = user_matrices<T>(values),
            .out = {},
            .dtargets = {},
            .dkeys = {},
            .dvalues = {},
            .z = {},
            .y = {},
            .dz = {},
            .w = w.data(),
            .w_transposed = w.transposed(),
            .segments = segments.data(),
            .starts = starts.data(),
            .num_segments = static_cast<int64_t>(segments.size()),
            .rows = rows(),
            .rank = rank,
            .dim = dim,
            .value_dim = value_dim,
            .w_row_stride = w.row_stride,
            .width = w.width,
            .negative_slope = static_cast<A>(negative_slope),
            .scale = static_cast<A>(scale.value_or(1 / std::sqrt(static_cast<double>(dim))))};
}

template <class A>
inline constexpr ScalarType accumulate_dtype_v = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

// The output, and for the backward z and y [T, H, r] in float32 (float64 for float64).
std::tuple<Tensor, Tensor, Tensor> lrea_restored_fwd(const Tensor& targets, const Tensor& keys, const Tensor& values,
                                                     const Tensor& w_decomp, const Tensor& target_offsets,
                                                     const std::optional<Tensor>& seq_lens, double negative_slope,
                                                     std::optional<double> scale) {
    const Inputs inputs(targets, keys, values, w_decomp, target_offsets, seq_lens);
    const Tensor out = new_empty({inputs.num_targets, inputs.heads, inputs.value_dim}, targets.scalar_type());
    std::optional<Tensor> z, y;
    dispatch_dtype<double, float, BFloat16, Half>("targets", targets, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        z = new_empty({inputs.num_targets, inputs.heads, inputs.rank}, accumulate_dtype_v<A>);
        y = new_empty(z->sizes(), accumulate_dtype_v<A>);
        const PackedMatrix<A> w(w_decomp, zero);
        auto op = inputs.operation<T>(w, negative_slope, scale);
        op.out = new_rows<T>(out);
        op.z = new_rows<A>(*z);
        op.y = new_rows<A>(*y);
        const auto kernel = RECATTN_PICK(restored_forward<T>);
        torch::stable::parallel_for(0, inputs.blocks(), grain(inputs.block_cost(2)),
                                    [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
    });
    return {out, *z, *y};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lrea_restored_bwd(const Tensor& dout, const Tensor& targets,
                                                             const Tensor& keys, const Tensor& values,
                                                             const Tensor& w_decomp, const Tensor& target_offsets,
                                                             const std::optional<Tensor>& seq_lens, const Tensor& z,
                                                             const Tensor& y, double negative_slope,
                                                             std::optional<double> scale) {
    const Inputs inputs(targets, keys, values, w_decomp, target_offsets, seq_lens);
    const int64_t heads = inputs.heads, rank = inputs.rank;
    expect_shape("dout", dout, {{"T", inputs.num_targets}, {"H", heads}, {"dv", inputs.value_dim}});
    expect_dtype_of("targets", targets, "dout", dout);
    const Tensor dout_rows = with_contiguous_rows(dout);
    const Tensor dtargets = new_empty(targets.sizes(), targets.scalar_type()),
                 dkeys = new_empty(keys.sizes(), keys.scalar_type()),
                 dvalues = new_empty(values.sizes(), values.scalar_type()),
                 dw = new_empty(w_decomp.sizes(), w_decomp.scalar_type());
    dispatch_dtype<double, float, BFloat16, Half>("targets", targets, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        for (const auto& [name, saved] : {std::pair<const char*, const Tensor&>{"z", z}, {"y", y}}) {
            expect_shape(name, saved, {{"T", inputs.num_targets}, {"H", heads}, {"r", rank}});
            expect_dtype(name, saved, accumulate_dtype_v<A>);
        }
        const Tensor z_rows = torch::stable::contiguous(z), y_rows = torch::stable::contiguous(y);
        const PackedMatrix<A> w(w_decomp, zero);
        auto op = inputs.operation<T>(w, negative_slope, scale);
        Scratch<A> dz(inputs.rows() * rank), partials(kGroups * w.size());
        op.dout = target_rows<T>(dout_rows);
        op.z = {const_cast<A*>(z_rows.const_data_ptr<A>()), heads * rank, rank};
        op.y = {const_cast<A*>(y_rows.const_data_ptr<A>()), heads * rank, rank};
        op.dz = {dz.data(), heads * rank, rank};
        op.dtargets = new_rows<T>(dtargets);
        op.dkeys = new_matrices<T>(dkeys);
        op.dvalues = new_matrices<T>(dvalues);
        const auto by_rows = RECATTN_PICK(restored_backward_rows<T>);
        torch::stable::parallel_for(0, kGroups, grain(inputs.block_cost(5) * inputs.blocks() / kGroups),
                                    [&](int64_t begin, int64_t end) {
                                        for (int64_t group = begin; group < end; ++group) {
                                            by_rows(op, group, kGroups, partials.data() + group * w.size());
                                        }
                                    });
        w.sum(partials.data(), dw.mutable_data_ptr<T>());
        const auto by_users = RECATTN_PICK(restored_backward_users<T>);
        const int64_t cost = rank * (inputs.dim + inputs.value_dim);
        // Split by rows + segments, so that threads get equal work; a thread takes the segments that start in its
        // range.
        const auto segment = [&](int64_t position) {
            int64_t low = 0, high = op.num_segments;
            while (low < high) {
                const int64_t middle = (low + high) / 2;
                op.starts[middle] + middle < position ? low = middle + 1 : high = middle;
            }
            return low;
        };
        torch::stable::parallel_for(0, inputs.rows() + op.num_segments, grain(cost),
                                    [&](int64_t begin, int64_t end) { by_users(op, segment(begin), segment(end)); });
    });
    return {dtargets, dkeys, dvalues, dw};
}

#define RECATTN_ARGUMENTS \
    "Tensor targets, Tensor keys, Tensor values, Tensor w_decomp, Tensor target_offsets, Tensor? seq_lens"

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("lrea_restored_fwd(" RECATTN_ARGUMENTS ", float negative_slope, float? scale) -> (Tensor, Tensor, Tensor)");
    m.def("lrea_restored_bwd(Tensor dout, " RECATTN_ARGUMENTS
          ", Tensor z, Tensor y, float negative_slope, float? scale) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("lrea_restored_fwd", TORCH_BOX(&lrea_restored_fwd));
    m.impl("lrea_restored_bwd", TORCH_BOX(&lrea_restored_bwd));
}

}  // namespace
}  // namespace recattn

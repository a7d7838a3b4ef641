// CPU operator lrea_attention (LREA's restored form): y = leaky_relu(z W) W^T between two products with each user's
// compressed history. The equations are in lrea_restored_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/common.h"
#include "cpu/rows.h"
#include "cpu/simd/isa.h"

namespace recattn {
namespace {

constexpr int64_t kBlockRows = 48, kBlockColumns = 64;
// dW is summed in up to this many groups for any number of threads, so that its bits do not depend on the threads.
constexpr int64_t kMaxGroups = 8;
// A row block has no more segments, of which any number may be without a target.
constexpr int64_t kMaxSegments = 64;

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
    int64_t user, head, first_target, count, length;
};

// Rows computed together: those of the segments first_segment..end_segment, or `rows` of one longer segment, whose
// first `skipped` rows belong to other blocks.
struct RowBlock {
    int64_t first_segment, end_segment, skipped, rows;
    bool is_whole;
};

template <class T>
struct RestoredAttention {
    using A = accumulate_t<T>;
    TargetRows<const T> targets, dout;
    UserMatrices<const T> keys, values;
    TargetRows<T> out, dtargets;
    UserMatrices<T> dkeys, dvalues;
    TargetRows<A> z, y, dz;   // [T, H, r]
    const A* w;               // tiles [r, kBlockColumns], zero beyond L
    const A* w_transposed;    // tiles [kBlockColumns, width], zero beyond L and r
    const Segment* segments;  // by descending length
    const RowBlock* blocks;   // of the segments in this order
    int64_t num_blocks, num_groups;
    int64_t rank, dim, value_dim;  // r, d, dv
    int64_t width;                 // r rounded up to 64 bytes
    A negative_slope, scale;

    // Numbers of dW, tile by tile, that a group of blocks sums: the columns that its first block sees.
    int64_t dw_size(int64_t group) const {
        const int64_t columns = segments[blocks[group].first_segment].length;
        return (columns + kBlockColumns - 1) / kBlockColumns * kBlockColumns * rank;
    }
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/lrea_restored_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The first `columns` columns of W, packed as the kernels read them.
template <class T>
class PackedMatrix {
  public:
    using A = accumulate_t<T>;

    PackedMatrix(const Tensor& w, int64_t columns)
        : rank_(w.size(0)),
          columns_(w.size(1)),
          width(round_up(rank_, 64 / sizeof(A))),
          tiles_(rank_ * round_up(columns, kBlockColumns)),
          transposed_(width * round_up(columns, kBlockColumns)) {
        const auto pack = RECATTN_PICK(pack_w<T>);
        pack(w.const_data_ptr<T>(), w.stride(0), w.stride(1), rank_, columns, tiles_.data(), transposed_.data(), width);
    }

    const A* tiles() const { return tiles_.data(); }
    const A* transposed() const { return transposed_.data(); }

    // dW [r, L] = sum of the groups' partial sums, which lie `stride` apart.
    void sum(const RestoredAttention<T>& op, A* partials, int64_t stride, T* dw) const {
        for (int64_t group = 1; group < op.num_groups; ++group) {
            const A* partial = partials + group * stride;
            for (int64_t i = 0; i < op.dw_size(group); ++i) partials[i] += partial[i];
        }
        const int64_t summed = op.num_groups > 0 ? op.dw_size(0) / std::max<int64_t>(1, rank_) : 0;
        for (int64_t c = 0; c < columns_; c += kBlockColumns) {
            const int64_t count = std::min(kBlockColumns, columns_ - c);
            for (int64_t k = 0; k < rank_; ++k) {
                const A* row = partials + c * rank_ + k * kBlockColumns;
                for (int64_t i = 0; i < count; ++i)
                    dw[k * columns_ + c + i] = static_cast<T>(c < summed ? row[i] : A(0));
            }
        }
    }

  private:
    int64_t rank_, columns_;

  public:
    const int64_t width;

  private:
    Scratch<A> tiles_, transposed_;
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
        for (const int64_t user : order) {
            if (lengths[user] == 0) {  // nor do the others see a column
                all_see_columns = false;
                break;
            }
            const int64_t count = offsets[user + 1] - offsets[user];
            for (int64_t head = 0; head < heads; ++head) {
                add_segment({user, head, offsets[user], count, lengths[user]});
            }
            longest_seen = std::max(longest_seen, lengths[user]);
            seen += count * heads * lengths[user];
        }
    }

    int64_t num_blocks() const { return blocks.size(); }
    // Whether a segment is longer than a row block.
    bool has_parts() const {
        return std::any_of(blocks.begin(), blocks.end(), [](const RowBlock& block) { return !block.is_whole; });
    }
    // Average multiply-adds of a block of rows, for `products` products with W and as many with the user's matrices.
    int64_t block_cost(int64_t products) const {
        const int64_t columns = seen / std::max<int64_t>(1, num_targets * heads) + std::max(dim, value_dim);
        return products * kBlockRows * rank * columns;
    }

    // A result. Users without history have no segment: theirs are zeros, whatever their numbers are.
    template <class T>
    Tensor new_result(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) const {
        const Tensor result = new_empty(sizes, dtype);
        if (!all_see_columns) std::fill_n(result.mutable_data_ptr<T>(), result.numel(), T(0));
        return result;
    }

    template <class T>
    RestoredAttention<T> operation(const PackedMatrix<T>& w, double negative_slope, std::optional<double> scale) const;

    Tensor targets, keys, values, w_decomp;
    int64_t num_targets, users, heads, rank, dim, value_dim;
    std::vector<Segment> segments;
    std::vector<RowBlock> blocks;
    int64_t longest_seen = 0, seen = 0;  // columns of W that a row, and that all rows together, see
    bool all_see_columns = true;

  private:
    void add_segment(const Segment& segment) {
        const int64_t index = segments.size();
        segments.push_back(segment);
        if (segment.count > kBlockRows) {
            for (int64_t row = 0; row < segment.count; row += kBlockRows) {
                blocks.push_back({index, index + 1, row, std::min(kBlockRows, segment.count - row), false});
            }
            return;
        }
        const bool fits = !blocks.empty() && blocks.back().is_whole &&
                          blocks.back().rows + segment.count <= kBlockRows &&
                          index - blocks.back().first_segment < kMaxSegments;
        if (!fits) blocks.push_back({index, index, 0, 0, true});
        blocks.back().end_segment = index + 1;
        blocks.back().rows += segment.count;
    }

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
RestoredAttention<T> Inputs::operation(const PackedMatrix<T>& w, double negative_slope,
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
            .w = w.tiles(),
            .w_transposed = w.transposed(),
            .segments = segments.data(),
            .blocks = blocks.data(),
            .num_blocks = num_blocks(),
            .num_groups = std::min(kMaxGroups, num_blocks()),
            .rank = rank,
            .dim = dim,
            .value_dim = value_dim,
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
    std::optional<Tensor> out, z, y;
    dispatch_dtype<double, float, BFloat16, Half>("targets", targets, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        out = inputs.new_result<T>({inputs.num_targets, inputs.heads, inputs.value_dim}, targets.scalar_type());
        z = inputs.new_result<A>({inputs.num_targets, inputs.heads, inputs.rank}, accumulate_dtype_v<A>);
        y = inputs.new_result<A>(z->sizes(), accumulate_dtype_v<A>);
        const PackedMatrix<T> w(w_decomp, inputs.longest_seen);
        auto op = inputs.operation<T>(w, negative_slope, scale);
        op.out = new_rows<T>(*out);
        op.z = new_rows<A>(*z);
        op.y = new_rows<A>(*y);
        const auto kernel = RECATTN_PICK(restored_forward<T>);
        std::atomic<int64_t> next = 0;
        torch::stable::parallel_for(0, op.num_blocks, grain(inputs.block_cost(2)),
                                    [&](int64_t, int64_t) { kernel(op, next); });
    });
    return {*out, *z, *y};
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
    std::optional<Tensor> dtargets, dkeys, dvalues;
    const Tensor dw = new_empty(w_decomp.sizes(), w_decomp.scalar_type());
    dispatch_dtype<double, float, BFloat16, Half>("targets", targets, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        for (const auto& [name, saved] : {std::pair<const char*, const Tensor&>{"z", z}, {"y", y}}) {
            expect_shape(name, saved, {{"T", inputs.num_targets}, {"H", heads}, {"r", rank}});
            expect_dtype(name, saved, accumulate_dtype_v<A>);
        }
        const Tensor z_rows = torch::stable::contiguous(z), y_rows = torch::stable::contiguous(y);
        const PackedMatrix<T> w(w_decomp, inputs.longest_seen);
        auto op = inputs.operation<T>(w, negative_slope, scale);
        const int64_t dw_size = op.num_groups > 0 ? op.dw_size(0) : 0;
        const std::unique_ptr<A[]> partials(new A[op.num_groups * dw_size]);
        std::unique_ptr<A[]> dz;  // of segments that no block holds whole
        if (inputs.has_parts()) dz.reset(new A[inputs.num_targets * heads * rank]);
        op.dout = target_rows<T>(dout_rows);
        op.z = {const_cast<A*>(z_rows.const_data_ptr<A>()), heads * rank, rank};
        op.y = {const_cast<A*>(y_rows.const_data_ptr<A>()), heads * rank, rank};
        op.dz = {dz.get(), heads * rank, rank};
        dtargets = inputs.new_result<T>(targets.sizes(), targets.scalar_type());
        dkeys = inputs.new_result<T>(keys.sizes(), keys.scalar_type());
        dvalues = inputs.new_result<T>(values.sizes(), values.scalar_type());
        op.dtargets = new_rows<T>(*dtargets);
        op.dkeys = new_matrices<T>(*dkeys);
        op.dvalues = new_matrices<T>(*dvalues);
        const auto by_rows = RECATTN_PICK(restored_backward_rows<T>);
        const auto by_segment = RECATTN_PICK(restored_backward_segment<T>);
        std::atomic<int64_t> next = 0, next_segment = 0;
        const int64_t cost = inputs.block_cost(7) * op.num_blocks / std::max<int64_t>(1, op.num_groups);
        torch::stable::parallel_for(0, op.num_groups, grain(cost), [&](int64_t, int64_t) {
            for (int64_t group; (group = next++) < op.num_groups;) by_rows(op, group, partials.get() + group * dw_size);
        });
        w.sum(op, partials.get(), dw_size, dw.mutable_data_ptr<T>());
        if (!dz) return;
        const int64_t num_segments = inputs.segments.size();
        torch::stable::parallel_for(0, num_segments, grain(kBlockRows * rank * (inputs.dim + inputs.value_dim)),
                                    [&](int64_t, int64_t) {
                                        for (int64_t index; (index = next_segment++) < num_segments;) {
                                            const Segment& segment = inputs.segments[index];
                                            if (segment.count > kBlockRows) by_segment(op, segment);
                                        }
                                    });
    });
    return {*dtargets, *dkeys, *dvalues, dw};
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

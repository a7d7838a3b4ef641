// CPU operator lrea_compress and its gradients. The equations are in lrea_compress_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/common.h"
#include "cpu/rows.h"
#include "cpu/simd/isa.h"

namespace recattn {
namespace {

// Arguments of lrea_compress.
template <class T>
struct Compress {
    Rows<T> behaviors;             // of the first user, or the item table and item ids [U, L]
    int64_t behavior_user_stride;  // 0 with item ids
    int64_t longest;
    const accumulate_t<T>* w_comp;  // [Lmax, r]
    const int64_t* starts;          // running sum over the users of length + 1
    T* out;                         // [U, r, d]
    int64_t rank, dim;

    Rows<T> history(int64_t user) const {
        Rows<T> rows = behaviors;
        rows.data += user * behavior_user_stride;
        if (rows.indices != nullptr) rows.indices += user * longest;
        return rows;
    }
};

// Arguments of the backward of lrea_compress. A gradient that is not wanted is nullptr.
template <class T>
struct CompressBackward {
    using A = accumulate_t<T>;
    Rows<T> behaviors, dcompressed;  // of the first user
    int64_t behavior_user_stride, dcompressed_user_stride, longest;
    const A* w_comp;        // [Lmax, r]
    const int64_t* starts;  // running sum over the users of length + 1
    T* dbehaviors;          // [U, L, d]
    int64_t rank, dim;

    int64_t length(int64_t user) const { return starts[user + 1] - starts[user] - 1; }
};

// Users and positions of one task of the backward.
struct CompressTask {
    int64_t first_user, end_user, first_position, end_position;
};

constexpr int64_t kPositionBlock = 64;
// Tasks of the backward, for any number of threads, so that the bits of dW do not depend on the threads. Up to this
// many groups of users have each their own sum of dW; the tasks of fewer groups are ranges of positions.
constexpr int64_t kCompressTasks = 16;

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/lrea_compress_kernels.h"
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

// Running sum of (length + 1) over the users, from 0.
std::vector<int64_t> checked_starts(const std::optional<Tensor>& seq_lens, int64_t users, int64_t longest) {
    const auto lengths = seq_lens ? to_vector(*seq_lens) : std::vector<int64_t>(users, longest);
    std::vector<int64_t> starts{0};
    expect_lengths("seq_lens", lengths, longest);
    for (const int64_t length : lengths) starts.push_back(starts.back() + length + 1);
    return starts;
}

// Checks item_ids [U, longest] except at padded positions.
void expect_items(const Indices& item_ids, const std::vector<int64_t>& starts, int64_t longest, int64_t size) {
    for (size_t user = 0; user + 1 < starts.size(); ++user) {
        const int64_t* ids = item_ids.data() + user * longest;
        const int64_t length = starts[user + 1] - starts[user] - 1, i = find_invalid(ids, length, size);
        if (i == length) continue;
        expect(false, "item_ids must be rows of a table of ", size, ", got ", ids[i], " at index [", user, ", ", i,
               "]");
    }
}

void check_compress(const Tensor& behaviors, const Tensor& w_comp, const std::optional<Tensor>& seq_lens,
                    const std::optional<Tensor>& item_ids) {
    if (item_ids) {
        expect_shape("behaviors", behaviors, {{"I"}, {"d"}});
        expect_shape("item_ids", *item_ids, {{"U"}, {"L"}});
        expect_integer("item_ids", *item_ids);
    } else {
        expect_shape("behaviors", behaviors, {{"U"}, {"L"}, {"d"}});
    }
    expect_shape("w_comp", w_comp, {{"Lmax"}, {"r"}});
    const Tensor& histories = item_ids ? *item_ids : behaviors;
    const int64_t users = histories.size(0), longest = histories.size(1);
    expect(w_comp.size(0) >= longest, "Lmax of w_comp must be at least L = ", longest, ", got ", w_comp.size(0));
    expect_dtype_of("behaviors", behaviors, "w_comp", w_comp);
    if (seq_lens) {
        expect_shape("seq_lens", *seq_lens, {{"U", users}});
        expect_integer("seq_lens", *seq_lens);
    }
}

// W contiguous, in the type of the sums.
template <class A>
Tensor in_accumulate_dtype(const Tensor& w) {
    const auto dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor converted = w.scalar_type() == dtype ? w : torch::stable::to(w, dtype);
    return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

Tensor lrea_compress(const Tensor& behaviors, const Tensor& w_comp, const std::optional<Tensor>& seq_lens,
                     const std::optional<Tensor>& item_ids) {
    check_compress(behaviors, w_comp, seq_lens, item_ids);
    const Tensor& histories = item_ids ? *item_ids : behaviors;
    const int64_t users = histories.size(0), longest = histories.size(1), dim = behaviors.size(behaviors.dim() - 1),
                  rank = w_comp.size(1);
    const auto starts = checked_starts(seq_lens, users, longest);
    std::optional<Indices> ids;
    if (item_ids) expect_items(ids.emplace(*item_ids), starts, longest, behaviors.size(0));
    const Tensor e = with_contiguous_rows(behaviors);
    const Tensor out = new_empty({users, rank, dim}, behaviors.scalar_type());
    dispatch_dtype<double, float, BFloat16, Half>("behaviors", behaviors, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        const Tensor w = in_accumulate_dtype<A>(w_comp);
        const std::vector<T> zeros(ids ? dim : 0, T(0));
        const Compress<T> op{.behaviors = {e.const_data_ptr<T>(), e.stride(e.dim() - 2), ids ? ids->data() : nullptr,
                                           behaviors.size(0), zeros.data()},
                             .behavior_user_stride = ids ? 0 : e.stride(0),
                             .longest = longest,
                             .w_comp = w.const_data_ptr<A>(),
                             .starts = starts.data(),
                             .out = out.mutable_data_ptr<T>(),
                             .rank = rank,
                             .dim = dim};
        const auto kernel = RECATTN_PICK(compress<T>);
        // Split by the running sum of lengths, so that threads get equal work; a thread takes the users that start in
        // its range.
        torch::stable::parallel_for(0, starts.back(), grain(rank * dim), [&](int64_t begin, int64_t end) {
            const auto user = [&](int64_t start) {
                return std::lower_bound(starts.begin(), starts.end() - 1, start) - starts.begin();
            };
            kernel(op, user(begin), user(end));
        });
    });
    return out;
}

// dbehaviors and dw_comp; one that is not wanted is empty.
std::tuple<Tensor, Tensor> lrea_compress_bwd(const Tensor& dcompressed, const Tensor& behaviors, const Tensor& w_comp,
                                             const std::optional<Tensor>& seq_lens, bool wants_dbehaviors,
                                             bool wants_dw_comp) {
    check_compress(behaviors, w_comp, seq_lens, std::nullopt);
    const int64_t users = behaviors.size(0), longest = behaviors.size(1), dim = behaviors.size(2),
                  rank = w_comp.size(1);
    expect_shape("dcompressed", dcompressed, {{"U", users}, {"r", rank}, {"d", dim}});
    expect_dtype_of("behaviors", behaviors, "dcompressed", dcompressed);
    const auto starts = checked_starts(seq_lens, users, longest);
    const Tensor e = with_contiguous_rows(behaviors), dc = with_contiguous_rows(dcompressed);
    const auto empty = [&] { return new_empty({0}, behaviors.scalar_type()); };
    const Tensor dbehaviors = wants_dbehaviors ? new_empty(behaviors.sizes(), behaviors.scalar_type()) : empty();
    const Tensor dw_comp = wants_dw_comp ? new_empty(w_comp.sizes(), w_comp.scalar_type()) : empty();
    dispatch_dtype<double, float, BFloat16, Half>("behaviors", behaviors, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        const Tensor w = in_accumulate_dtype<A>(w_comp);
        const int64_t groups = std::max<int64_t>(1, std::min(users, kCompressTasks));
        const int64_t parts = (kCompressTasks + groups - 1) / groups;
        const int64_t positions =
            std::max<int64_t>(1, (longest + parts * kPositionBlock - 1) / (parts * kPositionBlock)) * kPositionBlock;
        const int64_t width = (rank + 15) / 16 * 16, size = longest * width;
        const std::unique_ptr<A[]> partials(wants_dw_comp ? new A[groups * size] : nullptr);
        const CompressBackward<T> op{.behaviors = {e.const_data_ptr<T>(), e.stride(1), nullptr, 0, nullptr},
                                     .dcompressed = {dc.const_data_ptr<T>(), dc.stride(1), nullptr, 0, nullptr},
                                     .behavior_user_stride = e.stride(0),
                                     .dcompressed_user_stride = dc.stride(0),
                                     .longest = longest,
                                     .w_comp = w.const_data_ptr<A>(),
                                     .starts = starts.data(),
                                     .dbehaviors = wants_dbehaviors ? dbehaviors.mutable_data_ptr<T>() : nullptr,
                                     .rank = rank,
                                     .dim = dim};
        const auto kernel = RECATTN_PICK(compress_backward<T>);
        const auto first_user = [&](int64_t group) {
            const int64_t start = starts.back() * group / groups;
            return std::lower_bound(starts.begin(), starts.end() - 1, start) - starts.begin();
        };
        const int64_t tasks = groups * parts, cost = 2 * rank * dim * starts.back() / tasks;
        torch::stable::parallel_for(0, tasks, grain(cost), [&](int64_t begin, int64_t end) {
            for (int64_t index = begin; index < end; ++index) {
                const int64_t group = index / parts, first = index % parts * positions;
                const CompressTask task{first_user(group), first_user(group + 1), std::min(first, longest),
                                        std::min(first + positions, longest)};
                kernel(op, task, wants_dw_comp ? partials.get() + group * size : nullptr, width);
            }
        });
        if (!wants_dw_comp) return;
        T* out = dw_comp.mutable_data_ptr<T>();
        torch::stable::parallel_for(0, longest, grain(groups * rank), [&](int64_t begin, int64_t end) {
            for (int64_t l = begin; l < end; ++l) {
                A* sum = partials.get() + l * width;
                for (int64_t group = 1; group < groups; ++group) {
                    for (int64_t k = 0; k < rank; ++k) sum[k] += partials[group * size + l * width + k];
                }
                for (int64_t k = 0; k < rank; ++k) out[l * rank + k] = static_cast<T>(sum[k]);
            }
        });
        out += longest * rank;
        std::fill_n(out, (w_comp.size(0) - longest) * rank, T(0));
    });
    return {dbehaviors, dw_comp};
}

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def("lrea_compress(Tensor behaviors, Tensor w_comp, Tensor? seq_lens, Tensor? item_ids) -> Tensor");
    m.def(
        "lrea_compress_bwd(Tensor dcompressed, Tensor behaviors, Tensor w_comp, Tensor? seq_lens, "
        "bool wants_dbehaviors, bool wants_dw_comp) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("lrea_compress", TORCH_BOX(&lrea_compress));
    m.impl("lrea_compress_bwd", TORCH_BOX(&lrea_compress_bwd));
}

}  // namespace
}  // namespace recattn

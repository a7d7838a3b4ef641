// CPU operator lrea_compress and its gradients. The equations are in lrea_compress_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/common.h"
#include "cpu/rows.h"
#include "cpu/sequences.h"
#include "cpu/simd/isa.h"

namespace recattn {
namespace {

// The users of a call: where their behaviours lie, and how many those are.
struct Users {
    std::vector<Span> spans;
    std::vector<int64_t> starts;  // running sum of length + 1, by which threads get equal work
    int64_t longest;              // L where padded, the longest length where packed
    bool packed;

    int64_t count() const { return static_cast<int64_t>(spans.size()); }
};

// Arguments of lrea_compress.
template <class T>
struct Compress {
    Rows<T> behaviors;                             // or the item table and item ids
    int64_t behavior_user_stride, id_user_stride;  // 0 where packed
    const Span* spans;
    const accumulate_t<T>* w_comp;  // [Lmax, r]
    T* out;                         // [U, r, d]
    int64_t rank, dim;

    Rows<T> history(int64_t user) const {
        Rows<T> rows = behaviors;
        if (rows.indices != nullptr) {
            rows.indices += user * id_user_stride + spans[user].start;
        } else {
            rows.data += user * behavior_user_stride + spans[user].start * rows.row_stride;
        }
        return rows;
    }
};

// Arguments of the backward of lrea_compress. A gradient that is not wanted is nullptr.
template <class T>
struct CompressBackward {
    using A = accumulate_t<T>;
    Rows<T> behaviors, dcompressed;  // of the first user
    int64_t behavior_user_stride, dcompressed_user_stride;
    int64_t padded_length;  // L; 0 where packed
    const A* w_comp;        // [Lmax, r]
    const Span* spans;
    T* dbehaviors;  // [U, L, d], or [T, d] where packed
    int64_t rank, dim;
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

// Checks item_ids [U, L] except at padded positions, or [T].
void expect_items(const Indices& item_ids, const Users& users, int64_t size) {
    for (int64_t user = 0; user < users.count(); ++user) {
        const Span& span = users.spans[user];
        const int64_t first = users.packed ? span.start : user * users.longest;
        const int64_t i = find_invalid(item_ids.data() + first, span.length, size);
        if (i == span.length) continue;
        const std::string index =
            users.packed ? std::to_string(first + i) : std::to_string(user) + ", " + std::to_string(i);
        expect(false, "item_ids must be rows of a table of ", size, ", got ", item_ids.data()[first + i], " at index [",
               index, "]");
    }
}

// The users of a call whose tensors fit.
Users checked_users(const Tensor& behaviors, const Tensor& w_comp, const LengthTensors& lengths,
                    const std::optional<Tensor>& item_ids) {
    const bool packed = lengths.packed();
    if (item_ids) {
        expect_shape("behaviors", behaviors, {{"I"}, {"d"}});
        if (packed) {
            expect_shape("item_ids", *item_ids, {{"T"}});
        } else {
            expect_shape("item_ids", *item_ids, {{"U"}, {"L"}});
        }
        expect_integer("item_ids", *item_ids);
    } else if (packed) {
        expect_shape("behaviors", behaviors, {{"T"}, {"d"}});
    } else {
        expect_shape("behaviors", behaviors, {{"U"}, {"L"}, {"d"}});
    }
    expect_shape("w_comp", w_comp, {{"Lmax"}, {"r"}});
    const int64_t longest = w_comp.size(0);
    const Tensor& histories = item_ids ? *item_ids : behaviors;
    if (!packed) {
        expect(longest >= histories.size(1), "Lmax of w_comp must be at least L = ", histories.size(1), ", got ",
               longest);
    }
    expect_dtype_of("behaviors", behaviors, "w_comp", w_comp);
    if (lengths.seq_lens && !packed) {
        expect_shape("seq_lens", *lengths.seq_lens, {{"U", histories.size(0)}});
        expect_integer("seq_lens", *lengths.seq_lens);
    }
    const int64_t count = packed ? lengths.packed_batch() : histories.size(0);
    Users users{.spans = checked_spans(lengths, count, histories.size(packed ? 0 : 1)),
                .starts = {0},
                .longest = 0,
                .packed = packed};
    for (int64_t user = 0; user < count; ++user) {
        const int64_t length = users.spans[user].length;
        expect(length <= longest, "cu_seqlens must have at most Lmax of w_comp behaviours per user, got ", length,
               " at index [", user, "] and Lmax = ", longest);
        users.starts.push_back(users.starts.back() + length + 1);
        users.longest = std::max(users.longest, length);
    }
    if (!packed) users.longest = histories.size(1);
    return users;
}

// W contiguous, in the type of the sums.
template <class A>
Tensor in_accumulate_dtype(const Tensor& w) {
    const auto dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
    const Tensor converted = w.scalar_type() == dtype ? w : torch::stable::to(w, dtype);
    return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

Tensor lrea_compress(const Tensor& behaviors, const Tensor& w_comp, const std::optional<Tensor>& seq_lens,
                     const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& item_ids) {
    const Users users = checked_users(behaviors, w_comp, {seq_lens, std::nullopt, cu_seqlens}, item_ids);
    const int64_t dim = behaviors.size(behaviors.dim() - 1), rank = w_comp.size(1);
    std::optional<Indices> ids;
    if (item_ids) expect_items(ids.emplace(*item_ids), users, behaviors.size(0));
    const Tensor e = with_contiguous_rows(behaviors);
    const Tensor out = new_empty({users.count(), rank, dim}, behaviors.scalar_type());
    dispatch_dtype<double, float, BFloat16, Half>("behaviors", behaviors, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        const Tensor w = in_accumulate_dtype<A>(w_comp);
        const std::vector<T> zeros(ids ? dim : 0, T(0));
        const Compress<T> op{.behaviors = {e.const_data_ptr<T>(), e.stride(e.dim() - 2), ids ? ids->data() : nullptr,
                                           behaviors.size(0), zeros.data()},
                             .behavior_user_stride = users.packed ? 0 : e.stride(0),
                             .id_user_stride = users.packed ? 0 : users.longest,
                             .spans = users.spans.data(),
                             .w_comp = w.const_data_ptr<A>(),
                             .out = out.mutable_data_ptr<T>(),
                             .rank = rank,
                             .dim = dim};
        const auto kernel = RECATTN_PICK(compress<T>);
        // Split by the running sum of lengths, so that threads get equal work; a thread takes the users that start in
        // its range.
        const auto& starts = users.starts;
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
                                             const std::optional<Tensor>& seq_lens,
                                             const std::optional<Tensor>& cu_seqlens, bool wants_dbehaviors,
                                             bool wants_dw_comp) {
    const Users users = checked_users(behaviors, w_comp, {seq_lens, std::nullopt, cu_seqlens}, std::nullopt);
    const int64_t longest = users.longest, dim = behaviors.size(behaviors.dim() - 1), rank = w_comp.size(1);
    const auto& starts = users.starts;
    expect_shape("dcompressed", dcompressed, {{"U", users.count()}, {"r", rank}, {"d", dim}});
    expect_dtype_of("behaviors", behaviors, "dcompressed", dcompressed);
    const Tensor e = with_contiguous_rows(behaviors), dc = with_contiguous_rows(dcompressed);
    const auto empty = [&] { return new_empty({0}, behaviors.scalar_type()); };
    const Tensor dbehaviors = wants_dbehaviors ? new_empty(behaviors.sizes(), behaviors.scalar_type()) : empty();
    const Tensor dw_comp = wants_dw_comp ? new_empty(w_comp.sizes(), w_comp.scalar_type()) : empty();
    dispatch_dtype<double, float, BFloat16, Half>("behaviors", behaviors, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        const Tensor w = in_accumulate_dtype<A>(w_comp);
        const int64_t groups = std::max<int64_t>(1, std::min(users.count(), kCompressTasks));
        const int64_t parts = (kCompressTasks + groups - 1) / groups;
        const int64_t positions =
            std::max<int64_t>(1, (longest + parts * kPositionBlock - 1) / (parts * kPositionBlock)) * kPositionBlock;
        const int64_t width = (rank + 15) / 16 * 16, size = longest * width;
        const std::unique_ptr<A[]> partials(wants_dw_comp ? new A[groups * size] : nullptr);
        const CompressBackward<T> op{.behaviors = {e.const_data_ptr<T>(), e.stride(e.dim() - 2), nullptr, 0, nullptr},
                                     .dcompressed = {dc.const_data_ptr<T>(), dc.stride(1), nullptr, 0, nullptr},
                                     .behavior_user_stride = users.packed ? 0 : e.stride(0),
                                     .dcompressed_user_stride = dc.stride(0),
                                     .padded_length = users.packed ? 0 : longest,
                                     .w_comp = w.const_data_ptr<A>(),
                                     .spans = users.spans.data(),
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
    m.def(
        "lrea_compress(Tensor behaviors, Tensor w_comp, Tensor? seq_lens, Tensor? cu_seqlens, Tensor? item_ids) -> "
        "Tensor");
    m.def(
        "lrea_compress_bwd(Tensor dcompressed, Tensor behaviors, Tensor w_comp, Tensor? seq_lens, Tensor? cu_seqlens, "
        "bool wants_dbehaviors, bool wants_dw_comp) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("lrea_compress", TORCH_BOX(&lrea_compress));
    m.impl("lrea_compress_bwd", TORCH_BOX(&lrea_compress_bwd));
}

}  // namespace
}  // namespace recattn

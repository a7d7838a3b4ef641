// CPU kernels of LREA: compression of behaviours, and absorbed attention over states gathered in place.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/lrea_absorbed_attention.h"
#include "cpu/common.h"
#include "cpu/simd/isa.h"

namespace recattn {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Rows of a matrix whose last axis is contiguous: those at the indices, zeros for an index that is no row; or where
// there are no indices one after another.
template <class T>
struct Rows {
    const T* data;
    int64_t row;
    const int64_t* indices;
    int64_t size;
    const T* zeros;

    const T* at(int64_t i) const {
        if (indices == nullptr) return data + i * row;
        const int64_t index = read_once(indices[i]);
        return is_row(index, size) ? data + index * row : zeros;
    }
};

// One state table [S, H, r, columns] whose last axis is contiguous, and the scales of its rows if it is quantised.
template <class S>
struct StateTable {
    const S* data;
    int64_t slot, head, row;
    const float* scales;
    int64_t scale_slot, scale_head;

    const S* at(int64_t slot_index, int64_t head_index) const { return data + slot_index * slot + head_index * head; }
    const float* scales_at(int64_t slot_index, int64_t head_index) const {
        return scales + slot_index * scale_slot + head_index * scale_head;
    }
};

// Of targets of type T and states of type S.
template <class T, class S>
struct AbsorbedAttention {
    Rows<T> targets;  // of the first head
    int64_t target_head;
    StateTable<S> keys, values;
    const int64_t *slots, *offsets;
    T* out;  // [T, H, dv]
    int64_t candidates, users, table_size, heads, rank, query_dim, value_dim;
    double negative_slope;

    Rows<T> targets_of(int64_t head) const {
        Rows<T> rows = targets;
        rows.data += head * target_head;
        return rows;
    }
    void store_zeros(int64_t begin, int64_t end) const {
        const int64_t row = heads * value_dim;
        std::fill(out + begin * row, out + end * row, T(0));
    }
    // -1 for what is no row of the tables.
    int64_t slot_of(int64_t user) const {
        const int64_t slot = read_once(slots[user]);
        return is_row(slot, table_size) ? slot : -1;
    }
};

template <class T>
struct Compress {
    Rows<T> behaviors;      // of the first user, with the item ids [U, L] if there are any
    int64_t behavior_user;  // 0 with item ids
    int64_t longest;
    const accumulate_t<T>* w_comp;  // [Lmax, r]
    const int64_t* starts;          // where each user begins when a user of n behaviours takes n + 1 places
    T* out;                         // [U, r, d]
    int64_t rank, dim;

    Rows<T> history(int64_t user) const {
        Rows<T> rows = behaviors;
        rows.data += user * behavior_user;
        if (rows.indices != nullptr) rows.indices += user * longest;
        return rows;
    }
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/lrea_attention_kernels.h"
#define RECATTN_WITH_BF16
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

// The place of the first index that is no row of a table of `size`, `count` if there is none.
int64_t first_outside(const int64_t* indices, int64_t count, int64_t size) {
    uint64_t signs = 0;  // of the indices and of what is left from them to the last row: no branch, so it vectorises
    for (int64_t i = 0; i < count; ++i) signs |= indices[i] | (static_cast<uint64_t>(size) - 1 - indices[i]);
    if (static_cast<int64_t>(signs) >= 0) return count;
    return std::find_if(indices, indices + count, [&](int64_t i) { return i < 0 || i >= size; }) - indices;
}

void expect_rows(const char* name, const Indices& indices, int64_t size) {
    const int64_t i = first_outside(indices.data(), indices.size(), size);
    if (i == indices.size()) return;
    expect(false, name, " must be rows of a table of ", size, ", got ", indices[i], " at index [", i, "]");
}

void expect_offsets(const std::vector<int64_t>& offsets, int64_t rows) {
    const int64_t last = offsets.size() - 1;
    expect(offsets[0] == 0 && offsets[last] == rows, "target_offsets must be offsets from 0 to ", rows,
           ", got offsets from ", offsets[0], " to ", offsets[last]);
    for (int64_t i = 0; i < last; ++i) {
        expect(offsets[i] <= offsets[i + 1], "target_offsets must be ascending, got ", offsets[i + 1], " at index [",
               i + 1, "]");
    }
}

int64_t count_outside(const Indices& indices, int64_t size) {
    return std::count_if(indices.data(), indices.data() + indices.size(), [&](int64_t i) { return !is_row(i, size); });
}

// Offsets that descend or leave 0 .. rows become the nearest that do not; returns how many users they were wrong for.
int64_t put_in_order(std::vector<int64_t>& offsets, int64_t rows) {
    const int64_t users = offsets.size() - 1;
    int64_t count = 0, last = 0;
    for (int64_t user = 0; user < users; ++user) {
        const int64_t begin = offsets[user], end = offsets[user + 1];
        count += begin > end || (user == 0 && begin != 0) || (user == users - 1 && end != rows);
    }
    for (int64_t& offset : offsets) offset = last = std::min(std::max(offset, last), rows);
    return count;
}

// Running sum of (length + 1) over the users, from 0.
std::vector<int64_t> checked_starts(const std::optional<Tensor>& seq_lens, int64_t users, int64_t longest) {
    const auto lengths = seq_lens ? to_vector(*seq_lens) : std::vector<int64_t>(users, longest);
    std::vector<int64_t> starts{0};
    expect_lengths("seq_lens", lengths, longest);
    for (const int64_t length : lengths) starts.push_back(starts.back() + length + 1);
    return starts;
}

// Of item_ids [U, longest] those that are no padding.
void expect_items(const Indices& item_ids, const std::vector<int64_t>& starts, int64_t longest, int64_t size) {
    for (size_t user = 0; user + 1 < starts.size(); ++user) {
        const int64_t* ids = item_ids.data() + user * longest;
        const int64_t length = starts[user + 1] - starts[user] - 1, i = first_outside(ids, length, size);
        if (i == length) continue;
        expect(false, "item_ids must be rows of a table of ", size, ", got ", ids[i], " at index [", user, ", ", i,
               "]");
    }
}

template <class Function>
void dispatch(const char* name, const Tensor& tensor, const Function& function) {
    switch (tensor.scalar_type()) {
        case ScalarType::Double:
            return function(double{});
        case ScalarType::Float:
            return function(float{});
        case ScalarType::BFloat16:
            return function(BFloat16{});
        case ScalarType::Half:
            return function(Half{});
        default:
            expect(false, name, " must be float64 or float32 or bfloat16 or float16, got ",
                   dtype_name(tensor.scalar_type()));
    }
}

// A state table and its scales, kept while its rows are read.
template <class S>
class StateRows {
  public:
    StateRows(const Tensor& state, const std::optional<Tensor>& scales) : state_(with_contiguous_rows(state)) {
        if (scales) scales_ = with_contiguous_rows(*scales);
    }

    StateTable<S> table() const {
        StateTable<S> table{
            state_.const_data_ptr<S>(), state_.stride(0), state_.stride(1), state_.stride(2), nullptr, 0, 0};
        if (scales_) {
            table.scales = scales_->const_data_ptr<float>();
            table.scale_slot = scales_->stride(0);
            table.scale_head = scales_->stride(1);
        }
        return table;
    }

  private:
    Tensor state_;
    std::optional<Tensor> scales_;
};

template <class T, class S>
auto absorbed_kernel() {
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (bf16_products_pay()) return avx512_bf16::attend<T, S, avx512_bf16::PairOf<BFloat16>>;
    }
    if constexpr (std::is_same_v<S, int8_t> && !std::is_same_v<T, double>) {
        if (isa() == Isa::avx512_bf16) return avx512_bf16::attend<T, S, avx512_bf16::PairOf<int16_t>>;
    }
#endif
    return RECATTN_PICK(attend<T, S, accumulate_t<T>>);
}

Tensor absorbed_attention(const Tensor& targets, const Tensor& state_keys, const Tensor& state_values,
                          const Tensor& slots, const Tensor& target_offsets, double negative_slope,
                          const std::optional<Tensor>& item_ids, const std::optional<Tensor>& key_scales,
                          const std::optional<Tensor>& value_scales, const std::optional<Tensor>& invalid) {
    const AbsorbedSizes sizes = check_absorbed(targets, state_keys, state_values, slots, target_offsets, item_ids,
                                               key_scales, value_scales, invalid);
    expect(std::isfinite(negative_slope), "negative_slope must be finite, got ", negative_slope);
    const Indices user_slots(slots);
    std::vector<int64_t> offsets = to_vector(target_offsets);
    std::optional<Indices> ids;
    if (item_ids) ids.emplace(*item_ids);
    if (invalid) {
        std::atomic_ref<int64_t> counter(*static_cast<int64_t*>(invalid->mutable_data_ptr()));
        counter += count_outside(user_slots, sizes.slots) + put_in_order(offsets, sizes.rows) +
                   (ids ? count_outside(*ids, sizes.items) : 0);
    } else {
        expect_rows("slots", user_slots, sizes.slots);
        expect_offsets(offsets, sizes.rows);
        if (ids) expect_rows("item_ids", *ids, sizes.items);
    }
    const Tensor q = with_contiguous_rows(targets);
    const Tensor out = torch::stable::new_empty(targets, {sizes.rows, sizes.heads, sizes.value_dim});
    const auto run = [&](auto target, auto state) {
        using T = decltype(target);
        using S = decltype(state);
        const StateRows<S> keys(state_keys, key_scales), values(state_values, value_scales);
        const std::vector<T> zeros(ids ? sizes.query_dim : 0, T(0));
        const AbsorbedAttention<T, S> op{
            .targets = {q.const_data_ptr<T>(), q.stride(0), ids ? ids->data() : nullptr, sizes.items, zeros.data()},
            .target_head = q.stride(1),
            .keys = keys.table(),
            .values = values.table(),
            .slots = user_slots.data(),
            .offsets = offsets.data(),
            .out = out.mutable_data_ptr<T>(),
            .candidates = sizes.rows,
            .users = sizes.users,
            .table_size = sizes.slots,
            .heads = sizes.heads,
            .rank = sizes.rank,
            .query_dim = sizes.query_dim,
            .value_dim = sizes.value_dim,
            .negative_slope = negative_slope};
        const auto kernel = absorbed_kernel<T, S>();
        const int64_t cost = sizes.heads * sizes.rank * (sizes.query_dim + sizes.value_dim);
        const int64_t first = offsets.front(), last = offsets.back();  // before and behind are nobody's candidates
        op.store_zeros(0, first);
        op.store_zeros(last, sizes.rows);
        torch::stable::parallel_for(first, last, grain(cost),
                                    [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
    };
    dispatch("targets", targets, [&](auto zero) { sizes.quantized ? run(zero, int8_t{}) : run(zero, zero); });
    return out;
}

Tensor lrea_absorbed_attention(const Tensor& targets, const Tensor& state_keys, const Tensor& state_values,
                               const Tensor& slots, const Tensor& target_offsets, double negative_slope,
                               const std::optional<Tensor>& item_ids, const std::optional<Tensor>& key_scales,
                               const std::optional<Tensor>& value_scales) {
    return absorbed_attention(targets, state_keys, state_values, slots, target_offsets, negative_slope, item_ids,
                              key_scales, value_scales, std::nullopt);
}

Tensor lrea_absorbed_attention_counting(const Tensor& targets, const Tensor& state_keys, const Tensor& state_values,
                                        const Tensor& slots, const Tensor& target_offsets, double negative_slope,
                                        const std::optional<Tensor>& item_ids, const std::optional<Tensor>& key_scales,
                                        const std::optional<Tensor>& value_scales, const Tensor& invalid) {
    return absorbed_attention(targets, state_keys, state_values, slots, target_offsets, negative_slope, item_ids,
                              key_scales, value_scales, invalid);
}

Tensor lrea_compress(const Tensor& behaviors, const Tensor& w_comp, const std::optional<Tensor>& seq_lens,
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
    const int64_t users = histories.size(0), longest = histories.size(1), dim = behaviors.size(behaviors.dim() - 1),
                  rank = w_comp.size(1);
    expect(w_comp.size(0) >= longest, "Lmax of w_comp must be at least L = ", longest, ", got ", w_comp.size(0));
    expect_dtype_of("behaviors", behaviors, "w_comp", w_comp);
    if (seq_lens) {
        expect_shape("seq_lens", *seq_lens, {{"U", users}});
        expect_integer("seq_lens", *seq_lens);
    }
    const auto starts = checked_starts(seq_lens, users, longest);
    std::optional<Indices> ids;
    if (item_ids) expect_items(ids.emplace(*item_ids), starts, longest, behaviors.size(0));
    const Tensor e = with_contiguous_rows(behaviors);
    const Tensor out = torch::stable::new_empty(behaviors, {users, rank, dim});
    dispatch("behaviors", behaviors, [&](auto zero) {
        using T = decltype(zero);
        using A = accumulate_t<T>;
        const auto dtype = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
        const Tensor w = torch::stable::contiguous(torch::stable::to(w_comp, dtype));
        const std::vector<T> zeros(ids ? dim : 0, T(0));
        const Compress<T> op{.behaviors = {e.const_data_ptr<T>(), e.stride(e.dim() - 2), ids ? ids->data() : nullptr,
                                           behaviors.size(0), zeros.data()},
                             .behavior_user = ids ? 0 : e.stride(0),
                             .longest = longest,
                             .w_comp = w.const_data_ptr<A>(),
                             .starts = starts.data(),
                             .out = out.mutable_data_ptr<T>(),
                             .rank = rank,
                             .dim = dim};
        const auto kernel = RECATTN_PICK(compress<T>);
        // A thread takes the users that begin in its share, so long and short histories balance.
        torch::stable::parallel_for(0, starts.back(), grain(rank * dim), [&](int64_t begin, int64_t end) {
            const auto user = [&](int64_t start) {
                return std::lower_bound(starts.begin(), starts.end() - 1, start) - starts.begin();
            };
            kernel(op, user(begin), user(end));
        });
    });
    return out;
}

std::string cpu_capability() { return isa_name(isa()); }

STABLE_TORCH_LIBRARY_FRAGMENT(recattn, m) {
    m.def(
        "lrea_absorbed_attention(Tensor targets, Tensor state_keys, Tensor state_values, Tensor slots, "
        "Tensor target_offsets, float negative_slope, Tensor? item_ids, Tensor? key_scales, Tensor? value_scales) "
        "-> Tensor");
    m.def(
        "lrea_absorbed_attention.counting(Tensor targets, Tensor state_keys, Tensor state_values, Tensor slots, "
        "Tensor target_offsets, float negative_slope, Tensor? item_ids, Tensor? key_scales, Tensor? value_scales, "
        "Tensor(a!) invalid) -> Tensor");
    m.def("lrea_compress(Tensor behaviors, Tensor w_comp, Tensor? seq_lens, Tensor? item_ids) -> Tensor");
    m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("lrea_absorbed_attention", TORCH_BOX(&lrea_absorbed_attention));
    m.impl("lrea_absorbed_attention.counting", TORCH_BOX(&lrea_absorbed_attention_counting));
    m.impl("lrea_compress", TORCH_BOX(&lrea_compress));
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CompositeExplicitAutograd, m) {
    m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace
}  // namespace recattn

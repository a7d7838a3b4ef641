// CPU operator lrea_absorbed_attention over states read in place from the tables.
// The equations are in lrea_attention_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

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
#include "cpu/rows.h"
#include "cpu/simd/isa.h"

namespace recattn {
namespace {

// A state table [S, H, r, columns] whose last axis is contiguous. An int8 table has scales [S, H, r], contiguous in r.
template <class S>
struct StateTable {
    const S* data;
    int64_t slot_stride, head_stride, row_stride;
    const float* scales;
    int64_t scale_slot_stride, scale_head_stride;

    const S* at(int64_t slot, int64_t head) const { return data + slot * slot_stride + head * head_stride; }
    const float* scales_at(int64_t slot, int64_t head) const {
        return scales + slot * scale_slot_stride + head * scale_head_stride;
    }
};

// Arguments of lrea_absorbed_attention: targets of type T, states of type S (T, int8, or half precision beside float).
template <class T, class S>
struct AbsorbedAttention {
    Rows<T> targets;  // of the first head
    int64_t target_head_stride;
    StateTable<S> keys, values;
    const int64_t *slots, *offsets;
    T* out;  // [T, H, dv]
    int64_t candidates, users, table_size, heads, rank, query_dim, value_dim;
    double negative_slope;

    Rows<T> targets_of(int64_t head) const {
        Rows<T> rows = targets;
        rows.data += head * target_head_stride;
        return rows;
    }
    void store_zeros(int64_t begin, int64_t end) const {
        const int64_t row_stride = heads * value_dim;
        std::fill(out + begin * row_stride, out + end * row_stride, T(0));
    }
    // -1 if the user's slot is not a row of the tables.
    int64_t slot_of(int64_t user) const {
        const int64_t slot = read_once(slots[user]);
        return is_row(slot, table_size) ? slot : -1;
    }
};

}  // namespace
}  // namespace recattn

#define RECATTN_KERNELS "cpu/lrea_attention_kernels.h"
#define RECATTN_WITH_BF16
#include "cpu/simd/foreach_isa.h"

namespace recattn {
namespace {

void expect_rows(const char* name, const Indices& indices, int64_t size) {
    const int64_t i = find_invalid(indices.data(), indices.size(), size);
    if (i == indices.size()) return;
    expect(false, name, " must be rows of a table of ", size, ", got ", indices[i], " at index [", i, "]");
}

int64_t count_invalid(const Indices& indices, int64_t size) {
    return std::count_if(indices.data(), indices.data() + indices.size(), [&](int64_t i) { return !is_row(i, size); });
}

// Makes offsets ascending and within 0 .. rows. Returns the number of users whose offsets were invalid.
int64_t clamp_offsets(std::vector<int64_t>& offsets, int64_t rows) {
    const int64_t users = offsets.size() - 1;
    int64_t count = 0, last = 0;
    for (int64_t user = 0; user < users; ++user) {
        const int64_t begin = offsets[user], end = offsets[user + 1];
        count += begin > end || (user == 0 && begin != 0) || (user == users - 1 && end != rows);
    }
    for (int64_t& offset : offsets) offset = last = std::min(std::max(offset, last), rows);
    return count;
}

// Owns a state table and its scales, with contiguous rows.
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
            table.scale_slot_stride = scales_->stride(0);
            table.scale_head_stride = scales_->stride(1);
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
        if (bf16_products_are_faster()) return avx512_bf16::attend<T, S, avx512_bf16::PairOf<BFloat16>>;
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
        counter += count_invalid(user_slots, sizes.slots) + clamp_offsets(offsets, sizes.rows) +
                   (ids ? count_invalid(*ids, sizes.items) : 0);
    } else {
        expect_rows("slots", user_slots, sizes.slots);
        expect_offsets("target_offsets", offsets, sizes.rows);
        if (ids) expect_rows("item_ids", *ids, sizes.items);
    }
    const Tensor q = with_contiguous_rows(targets);
    const Tensor out = new_empty({sizes.rows, sizes.heads, sizes.value_dim}, targets.scalar_type());
    const auto run = [&](auto target, auto state) {
        using T = decltype(target);
        using S = decltype(state);
        const StateRows<S> keys(state_keys, key_scales), values(state_values, value_scales);
        const std::vector<T> zeros(ids ? sizes.query_dim : 0, T(0));
        const AbsorbedAttention<T, S> op{
            .targets = {q.const_data_ptr<T>(), q.stride(0), ids ? ids->data() : nullptr, sizes.items, zeros.data()},
            .target_head_stride = q.stride(1),
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
        const int64_t first = offsets.front(), last = offsets.back();  // rows outside belong to no user
        op.store_zeros(0, first);
        op.store_zeros(last, sizes.rows);
        torch::stable::parallel_for(first, last, grain(cost),
                                    [&](int64_t begin, int64_t end) { kernel(op, begin, end); });
    };
    dispatch_dtype<double, float, BFloat16, Half>("targets", targets, [&](auto zero) {
        if (sizes.quantized) return run(zero, int8_t{});
        if constexpr (std::is_same_v<decltype(zero), float>) {
            if (state_keys.scalar_type() == ScalarType::BFloat16) return run(zero, BFloat16{});
            if (state_keys.scalar_type() == ScalarType::Half) return run(zero, Half{});
        }
        run(zero, zero);
    });
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
    m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CPU, m) {
    m.impl("lrea_absorbed_attention", TORCH_BOX(&lrea_absorbed_attention));
    m.impl("lrea_absorbed_attention.counting", TORCH_BOX(&lrea_absorbed_attention_counting));
}

STABLE_TORCH_LIBRARY_IMPL(recattn, CompositeExplicitAutograd, m) {
    m.impl("cpu_capability", TORCH_BOX(&cpu_capability));
}

}  // namespace
}  // namespace recattn

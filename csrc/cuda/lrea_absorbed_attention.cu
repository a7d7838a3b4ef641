// CUDA operator lrea_absorbed_attention: h = leaky_relu(q keys^T) values for a ragged batch of candidates. Each user's
// state is read in place from the tables. One launch, on tensor cores if the operands fit.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "absorbed_launch.h"
#include "common/lrea_absorbed_attention.h"
#include "cuda/device.h"

namespace recattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxWidth = 65535;  // so that no count of columns exceeds an int

// Checks first, because calling an operator costs about as much as launching a kernel.
Tensor make_contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Indices indices(const Tensor& tensor) { return {tensor.const_data_ptr(), tensor.scalar_type() == ScalarType::Long}; }

StateTable table(const Tensor& state, const OptionalTensor& scales) {
    StateTable table{state.const_data_ptr(), state.stride(0), state.stride(1), state.stride(2), state.stride(3)};
    if (scales) {
        table.scales = static_cast<const float*>(scales->const_data_ptr());
        table.scale_slot = scales->stride(0);
        table.scale_head = scales->stride(1);
        table.scale_row = scales->stride(2);
    }
    return table;
}

// Whether the last axis can be read in aligned pieces of so many numbers.
bool is_readable_in_pieces(const Tensor& tensor, int piece) {
    const int64_t last = tensor.dim() - 1;
    if (tensor.size(last) % piece != 0 || tensor.stride(last) != 1) return false;
    for (int64_t axis = 0; axis < last; ++axis) {
        if (tensor.size(axis) > 1 && tensor.stride(axis) % piece != 0) return false;
    }
    const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
    return address % (piece * tensor.element_size()) == 0;
}

Access access_of(const Tensor& targets, const Tensor& keys, const Tensor& values, const AbsorbedSizes& sizes) {
    const auto in_pieces = [&](int piece) {
        return is_readable_in_pieces(targets, piece) && is_readable_in_pieces(keys, piece) &&
               is_readable_in_pieces(values, piece);
    };
    if (sizes.rank > 0 && sizes.query_dim > 0 && sizes.rank <= mma::kMaxRank &&
        std::max(sizes.query_dim, sizes.value_dim) <= mma::kMaxWidth && in_pieces(mma::kPiece)) {
        return Access::kTensorCores;
    }
    return in_pieces(fma::kQuad) ? Access::kQuads : Access::kNumbers;
}

void expect_on_device(const char* name, const Tensor& tensor, const Tensor& targets) {
    expect(is_on_device(tensor) && tensor.get_device_index() == targets.get_device_index(), name,
           " must be on targets' device");
}

Tensor absorbed_attention(const Tensor& targets, const Tensor& state_keys, const Tensor& state_values,
                          const Tensor& slots, const Tensor& target_offsets, double negative_slope,
                          const OptionalTensor& item_ids, const OptionalTensor& key_scales,
                          const OptionalTensor& value_scales, const OptionalTensor& invalid) {
    const AbsorbedSizes sizes = check_absorbed(targets, state_keys, state_values, slots, target_offsets, item_ids,
                                               key_scales, value_scales, invalid);
    expect_on_device("state_keys", state_keys, targets);
    expect_on_device("state_values", state_values, targets);
    expect_on_device("slots", slots, targets);
    expect_on_device("target_offsets", target_offsets, targets);
    if (item_ids) expect_on_device("item_ids", *item_ids, targets);
    if (key_scales) expect_on_device("key_scales", *key_scales, targets);
    if (value_scales) expect_on_device("value_scales", *value_scales, targets);
    if (invalid) expect_on_device("invalid", *invalid, targets);
    expect(std::max({sizes.rank, sizes.query_dim, sizes.value_dim}) <= kMaxWidth, "rank and widths must be at most ",
           kMaxWidth, ", got r = ", sizes.rank, ", d = ", sizes.query_dim, ", dv = ", sizes.value_dim);
    const DeviceGuard guard(targets.get_device_index());
    const Tensor out = torch::stable::new_empty(targets, {sizes.rows, sizes.heads, sizes.value_dim});
    if (out.numel() == 0) return out;
    const Tensor slots_row = make_contiguous(slots), offsets_row = make_contiguous(target_offsets);
    const OptionalTensor ids_row = item_ids ? OptionalTensor(make_contiguous(*item_ids)) : std::nullopt;
    const cudaStream_t stream = current_stream(targets.get_device_index());
    auto* counter = invalid ? static_cast<unsigned long long*>(invalid->mutable_data_ptr()) : nullptr;
    const auto run_as = [&](auto target, auto state) {
        using T = decltype(target);
        const Operands<T> op{.targets = static_cast<const T*>(targets.const_data_ptr()),
                             .target_row = targets.stride(0),
                             .target_head = targets.stride(1),
                             .target_column = targets.stride(2),
                             .item_ids = ids_row ? indices(*ids_row) : Indices{},
                             .keys = table(state_keys, key_scales),
                             .values = table(state_values, value_scales),
                             .slots = indices(slots_row),
                             .offsets = indices(offsets_row),
                             .out = static_cast<T*>(out.mutable_data_ptr()),
                             .invalid = counter,
                             .rows = sizes.rows,
                             .items = sizes.items,
                             .users = sizes.users,
                             .heads = sizes.heads,
                             .table_size = sizes.slots,
                             .rank = static_cast<int>(sizes.rank),
                             .query_dim = static_cast<int>(sizes.query_dim),
                             .value_dim = static_cast<int>(sizes.value_dim),
                             .negative_slope = static_cast<float>(negative_slope)};
        launch_absorbed_attention<T, decltype(state)>(op, access_of(targets, state_keys, state_values, sizes), stream);
    };
    const ScalarType state_dtype = state_keys.scalar_type();
    switch (targets.scalar_type()) {
        case ScalarType::Float:
            if (state_dtype == ScalarType::Half) {
                run_as(float{}, __half{});
            } else if (state_dtype == ScalarType::BFloat16) {
                run_as(float{}, __nv_bfloat16{});
            } else {
                run_as(float{}, float{});
            }
            break;
        case ScalarType::Half:
            run_as(__half{}, __half{});
            break;
        case ScalarType::BFloat16:
            run_as(__nv_bfloat16{}, __nv_bfloat16{});
            break;
        default:
            expect(false, "targets must be float32 or bfloat16 or float16, got ", dtype_name(targets.scalar_type()));
    }
    return out;
}

Tensor lrea_absorbed_attention(const Tensor& targets, const Tensor& state_keys, const Tensor& state_values,
                               const Tensor& slots, const Tensor& target_offsets, double negative_slope,
                               const OptionalTensor& item_ids, const OptionalTensor& key_scales,
                               const OptionalTensor& value_scales) {
    return absorbed_attention(targets, state_keys, state_values, slots, target_offsets, negative_slope, item_ids,
                              key_scales, value_scales, std::nullopt);
}

Tensor lrea_absorbed_attention_counting(const Tensor& targets, const Tensor& state_keys, const Tensor& state_values,
                                        const Tensor& slots, const Tensor& target_offsets, double negative_slope,
                                        const OptionalTensor& item_ids, const OptionalTensor& key_scales,
                                        const OptionalTensor& value_scales, const Tensor& invalid) {
    return absorbed_attention(targets, state_keys, state_values, slots, target_offsets, negative_slope, item_ids,
                              key_scales, value_scales, invalid);
}

RECATTN_CUDA_LIBRARY(m) {
    m.impl("lrea_absorbed_attention", TORCH_BOX(&lrea_absorbed_attention));
    m.impl("lrea_absorbed_attention.counting", TORCH_BOX(&lrea_absorbed_attention_counting));
}

}  // namespace
}  // namespace recattn

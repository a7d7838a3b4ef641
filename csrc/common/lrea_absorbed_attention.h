// Argument checks of lrea_absorbed_attention, for the CPU and the CUDA operator.
#pragma once

#include <optional>

#include "common/check.h"

namespace recattn {

struct AbsorbedSizes {
    int64_t rows, items, users, slots, heads, rank, query_dim, value_dim;
    bool quantized;  // int8 states, each row with a scale
};

// targets [T, H, d] (with item_ids [T] a table [I, H, d]), state_keys [S, H, r, d], state_values [S, H, r, dv],
// slots [U], target_offsets [U+1]; int8 states have key_scales and value_scales [S, H, r]. invalid [1] counts indices
// out of range.
inline AbsorbedSizes check_absorbed(const torch::stable::Tensor& targets, const torch::stable::Tensor& state_keys,
                                    const torch::stable::Tensor& state_values, const torch::stable::Tensor& slots,
                                    const torch::stable::Tensor& target_offsets,
                                    const std::optional<torch::stable::Tensor>& item_ids,
                                    const std::optional<torch::stable::Tensor>& key_scales,
                                    const std::optional<torch::stable::Tensor>& value_scales,
                                    const std::optional<torch::stable::Tensor>& invalid) {
    using torch::headeronly::ScalarType;
    expect_shape("targets", targets, {{item_ids ? "I" : "T"}, {"H"}, {"d"}});
    if (item_ids) {
        expect_shape("item_ids", *item_ids, {{"T"}});
        expect_integer("item_ids", *item_ids);
    }
    const int64_t heads = targets.size(1), query_dim = targets.size(2);
    expect_shape("state_keys", state_keys, {{"S"}, {"H", heads}, {"r"}, {"d", query_dim}});
    const int64_t table_size = state_keys.size(0), rank = state_keys.size(2);
    expect_shape("state_values", state_values, {{"S", table_size}, {"H", heads}, {"r", rank}, {"dv"}});
    const ScalarType state_dtype = state_keys.scalar_type();
    const bool quantized = state_dtype == ScalarType::Char;
    const bool is_half = state_dtype == ScalarType::BFloat16 || state_dtype == ScalarType::Half;
    if (!quantized && !(is_half && targets.scalar_type() == ScalarType::Float)) {
        expect_dtype_of("targets", targets, "state_keys", state_keys);
    }
    expect_dtype_of("state_keys", state_keys, "state_values", state_values);
    const int given = key_scales.has_value() + value_scales.has_value();
    expect(given == (quantized ? 2 : 0),
           "key_scales and value_scales must be both given with int8 states, neither with others, got ",
           dtype_name(state_keys.scalar_type()), " states and ", given, " of them");
    if (quantized) {
        expect_shape("key_scales", *key_scales, {{"S", table_size}, {"H", heads}, {"r", rank}});
        expect_shape("value_scales", *value_scales, {{"S", table_size}, {"H", heads}, {"r", rank}});
        expect_dtype("key_scales", *key_scales, ScalarType::Float);
        expect_dtype("value_scales", *value_scales, ScalarType::Float);
    }
    expect_shape("slots", slots, {{"U"}});
    expect_integer("slots", slots);
    expect_shape("target_offsets", target_offsets, {{"U+1", slots.size(0) + 1}});
    expect_integer("target_offsets", target_offsets);
    const int64_t rows = (item_ids ? *item_ids : targets).size(0);
    expect(slots.size(0) > 0 || rows == 0, "target_offsets must be offsets from 0 to ", rows,
           ", got offsets of no user");
    if (invalid) {
        expect_shape("invalid", *invalid, {{"1", 1}});
        expect_dtype("invalid", *invalid, ScalarType::Long);
    }
    return {rows, targets.size(0), slots.size(0), table_size, heads, rank, query_dim, state_values.size(3), quantized};
}

}  // namespace recattn

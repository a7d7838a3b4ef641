// What the CPU and the CUDA kernel of lrea_absorbed_attention share: sizes and their checks.
#pragma once

#include "check.h"

namespace recattn {

struct AbsorbedSizes {
    int64_t rows, users, slots, heads, rank, query_dim, value_dim;
};

// targets [T, H, d], state_keys [S, H, r, d], state_values [S, H, r, dv], slots [U], target_offsets [U+1]
inline AbsorbedSizes check_absorbed(const torch::stable::Tensor& targets, const torch::stable::Tensor& state_keys,
                                    const torch::stable::Tensor& state_values, const torch::stable::Tensor& slots,
                                    const torch::stable::Tensor& target_offsets) {
    expect_dim("targets", targets, 3);
    expect_dim("state_keys", state_keys, 4);
    expect_dim("state_values", state_values, 4);
    expect_dim("slots", slots, 1);
    expect_dim("target_offsets", target_offsets, 1);
    const AbsorbedSizes sizes{targets.size(0),    slots.size(0),   state_keys.size(0),  targets.size(1),
                              state_keys.size(2), targets.size(2), state_values.size(3)};
    expect_size("state_keys", state_keys, 1, sizes.heads);
    expect_size("state_keys", state_keys, 3, sizes.query_dim);
    expect_size("state_values", state_values, 0, sizes.slots);
    expect_size("state_values", state_values, 1, sizes.heads);
    expect_size("state_values", state_values, 2, sizes.rank);
    expect_size("target_offsets", target_offsets, 0, sizes.users + 1);
    expect_dtype("state_keys", state_keys, targets.scalar_type());
    expect_dtype("state_values", state_values, targets.scalar_type());
    expect_integer("slots", slots);
    expect_integer("target_offsets", target_offsets);
    return sizes;
}

}  // namespace recattn

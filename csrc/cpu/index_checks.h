// Checks of index values that several CPU operators make. Messages are worded as in python/recattn/_check.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"

namespace recattn {

// Raises an error unless each row of positions [B, M] ascends below limit(b) and ends in -1. `seq_len` is the limit of
// every row, or none.
template <class I, class Limit>
void expect_sink_positions(const I* positions, int64_t batch, int64_t count, std::optional<int64_t> seq_len,
                           const Limit& limit) {
    const auto ascends = [&](int64_t b, int64_t m) {
        const int64_t position = positions[b * count + m], previous = m == 0 ? -1 : positions[b * count + m - 1];
        return m == 0 || position == -1 || (position > previous && previous >= 0);
    };
    const auto expect_all = [&](const auto& holds, const auto&... expected) {
        for (int64_t b = 0; b < batch; ++b) {
            for (int64_t m = 0; m < count; ++m) {
                if (holds(b, m)) continue;
                expect(false, "sink_positions must be ", expected..., ", got ", positions[b * count + m], " at index [",
                       b, ", ", m, "]");
            }
        }
    };
    const auto is_below = [&](int64_t b, int64_t m) { return positions[b * count + m] < limit(b); };
    const auto is_position = [&](int64_t b, int64_t m) { return positions[b * count + m] >= -1; };
    expect_all(is_below, "below the sequence length ", seq_len ? std::to_string(*seq_len) : "of each sequence");
    expect_all(is_position, "token positions, or -1 for padding");
    expect_all(ascends, "strictly ascending, padded with -1 at the end");
}

}  // namespace recattn

// Where the sequences of a batch lie: each a window of the N axis of [B, H, N, D], or one after another in [T, H, D].
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/check.h"
#include "cpu/common.h"

namespace recattn {

struct Span {
    int64_t start;           // of its first token, on the N or T axis
    int64_t length;          // in tokens
    int64_t first_position;  // of its first token: `start` on the N axis, 0 where packed
};

// The index tensors of a call; all absent: every sequence has all N tokens.
struct LengthTensors {
    const std::optional<Tensor>&seq_lens, &seq_starts, &cu_seqlens;

    bool packed() const { return cu_seqlens.has_value(); }

    // B of a packed call, from cu_seqlens [B + 1].
    int64_t packed_batch() const {
        expect(cu_seqlens->dim() == 1 && cu_seqlens->numel() > 0, "cu_seqlens must be [B + 1]");
        return cu_seqlens->numel() - 1;
    }
};

// The spans of a batch, from copies of the index tensors that are read once and checked. `total` is N, or T if packed.
inline std::vector<Span> checked_spans(const LengthTensors& tensors, int64_t batch, int64_t total) {
    const auto& [seq_lens, seq_starts, cu_seqlens] = tensors;
    std::vector<Span> spans(batch);
    if (cu_seqlens) {
        expect(!seq_lens && !seq_starts, "seq_lens must be None beside cu_seqlens (packed sequences have no padding)");
        expect_shape("cu_seqlens", *cu_seqlens, {{"B+1", batch + 1}});
        expect_integer("cu_seqlens", *cu_seqlens);
        const auto offsets = to_vector(*cu_seqlens);
        expect_offsets("cu_seqlens", offsets, total);
        for (int64_t b = 0; b < batch; ++b) spans[b] = {offsets[b], offsets[b + 1] - offsets[b], 0};
        return spans;
    }
    expect(seq_lens || !seq_starts, "seq_starts must be None without seq_lens");
    const auto lengths = checked_lengths(seq_lens, batch, total);
    std::vector<int64_t> starts(batch, 0);
    if (seq_starts) {
        expect_shape("seq_starts", *seq_starts, {{"B", batch}});
        expect_integer("seq_starts", *seq_starts);
        starts = to_vector(*seq_starts);
    }
    for (int64_t b = 0; b < batch; ++b) {
        const int64_t latest = total - lengths[b];
        expect(starts[b] >= 0 && starts[b] <= latest, "seq_starts must be between 0 and N - seq_lens = ", latest,
               ", got ", starts[b], " at index [", b, "]");
        spans[b] = {starts[b], lengths[b], starts[b]};
    }
    return spans;
}

}  // namespace recattn

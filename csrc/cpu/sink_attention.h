// What the kernels of sink_attention read and write.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dropout.h"
#include "cpu/tokens.h"

namespace recattn {

// The tokens of one sequence: positions start .. start + length - 1 of batch `batch` (packed: of batch 0). Its sinks
// are first_sink .. first_sink + num_sinks - 1 of the M in bias row `index`; their positions count from `start`.
struct Sequence {
    int64_t index, batch, start, length;
    const int64_t* sinks;  // [num_sinks] ascending
    int64_t first_sink, num_sinks;
};

// One call, forward or backward. Group: Hq / Hkv query heads that share one key head.
template <class T>
struct SinkAttention {
    Tokens<const T> q, k, v, out, dout;
    Tokens<T> new_out, dq, dk, dv;
    Tokens<float> lse;          // columns = 1: written by the forward, read by the backward
    const Sequence* sequences;  // [num_sequences]
    const float* bias;          // [B, bias_heads, M, M]
    float* dbias;               // [B, heads, M, M]
    const float* sink_logits;   // [heads], or null
    int64_t num_sequences, n, heads, kv_heads, dim, value_dim, bias_heads, num_sinks;
    bool causal;
    float scale;
    Dropout dropout;
};

}  // namespace recattn

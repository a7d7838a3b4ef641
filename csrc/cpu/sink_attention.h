// What the kernels of sink_attention read and write.
#pragma once

#include <cstdint>

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

// What does not depend on the dtype of the tokens. Group: heads / kv_heads query heads that share one key head.
struct SinkOptions {
    // Columns = 1. The forward writes them, the backward reads the last two: p = exp2(qk - row_max) * inverse_sum is
    // then what the forward's was. That of exp(qk - lse) would not add up to 1 where lse is large and rounds.
    Tokens<float> lse, row_max, inverse_sum;
    const Sequence* sequences;  // [num_sequences]
    const float* bias;          // [num_sequences, bias_heads, M, M]
    const float* sink_logits;   // [heads], or null
    float* dbias;               // [num_sequences, dbias_heads, M, M], zeroed
    float* dsink_logits;        // [num_sequences, heads], zeroed: added up by the caller
    int64_t num_sequences, n, heads, kv_heads, dim, value_dim, bias_heads, num_sinks;
    int64_t dbias_heads;  // count_dbias_heads
    bool packed, causal;  // packed: there is no padding
    float scale;
    Dropout dropout;

    int64_t group() const { return heads / kv_heads; }
    const float* bias_of(const Sequence& sequence, int64_t head) const {
        return bias +
               ((sequence.index * bias_heads + (bias_heads == 1 ? 0 : head)) * num_sinks + sequence.first_sink) *
                   num_sinks +
               sequence.first_sink;
    }
};

// One call, forward or backward. Padding of the results is theirs to write too: the kernels write every token of out,
// lse, dq, dk and dv.
template <class T>
struct SinkAttention : SinkOptions {
    Tokens<const T> q, k, v, out, dout;
    Tokens<T> new_out, dq, dk, dv;
};

// Matrices of dbias for a sequence: one for each head, or fewer for a bias that the heads share, each the sum of heads
// that are computed one after another. As many as take little memory beside dq.
template <class T>
int64_t count_dbias_heads(const SinkAttention<T>& op);

// Computes dq, dk, dv, dbias and dsink_logits (sink_attention_bwd.cpp).
template <class T>
void sink_backward(const SinkAttention<T>& op);

}  // namespace recattn

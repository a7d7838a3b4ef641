"""Dropout of attention weights: a mask from Philox, the same in the forward and in the backward."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Philox streams: one seed gives each of these weights random numbers of its own.
PER_TOKEN: tl.constexpr = tl.constexpr(0)  # rows and columns numbered by token
PER_SINK: tl.constexpr = tl.constexpr(1)  # numbered by sink
INTER_SINK_BIAS: tl.constexpr = tl.constexpr(2)


class Dropout(NamedTuple):
    """Dropout of a launch."""

    seed: Tensor | None  # int64 [1]; None for no dropout
    threshold: int  # a weight is dropped if its 16 random bits are below this: probability · 65536


NO_DROPOUT = Dropout(None, 0)


@triton.jit
def dropout_weights(seed, bh, philox_stream, rows, first_column, threshold, BLOCK_N: tl.constexpr):
    """[rows, BLOCK_N]: 0 where a weight is dropped, else 1 / (1 - dropout probability).

    A weight has 16 bits of Philox, which depend on the seed, its batch and head, the stream, its row and its column.
    Eight columns share a counter, so `first_column` is a multiple of eight.
    """
    groups = first_column // 8 + tl.arange(0, BLOCK_N // 8)
    counter = (rows[:, None] * 0 + groups[None, :]).to(tl.int32)  # [BM, BN / 8]
    a, b, c, d = tl.philox(seed, counter, counter * 0 + rows[:, None], counter * 0 + bh, counter * 0 + philox_stream)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (rows.shape[0], BLOCK_N // 2))
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (rows.shape[0], BLOCK_N)).to(tl.int32)
    return tl.where(bits < threshold, 0.0, 65536.0 / (65536 - threshold))

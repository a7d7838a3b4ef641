"""Splits the tokens of every sequence into two streams, sinks and non-sinks, so that a tile holds only one of them.

The fused kernels take tiles of BLOCK_M queries from one stream. The bias of a tile of sinks is then a dense tile of
inter_sink_bias, and every other tile is plain flash attention.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.launch import launch
from recattn.triton_kernels.common.ragged import (
    Lengths,
    Sinks,
    count_sinks_before,
    load_sinks,
    locate_sequence,
    number_of_tiles,
    sequence_of_tile,
)
from recattn.triton_kernels.sink_attention.common import DO_NOT_SPECIALIZE, first_token, number_of_tokens

# Tokens a program splits.
STREAM_BLOCK = 1024


class Streams(NamedTuple):
    """Which tokens are sinks. Tokens count from the sequence's first. Packed, tensors over N are over T."""

    is_sink: Tensor  # [B, N] int8
    non_sinks: Tensor  # [B, N] int32, the tokens that are not sinks, in order
    sink_bounds: Tensor  # [B, 2] int32, the first sink that is not ignored, and how many are not


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def sink_attention_streams_kernel(
    sink_positions, streams, lengths, stride_positions_b, stride_positions_m,
    B, N, M, search_steps, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens of one sequence, and one token past its end.

    sinks_before[i] = number of sinks before token i       [BLOCK], by binary search in sink_positions
    is_sink[i]      = sink_positions[sinks_before[i]] == i
    non_sinks[i - (sinks_before[i] - first_sink)] = i      where token i is not a sink
    sink_bounds     = first_sink, sinks_before[length] - first_sink
    """
    batch, tile = sequence_of_tile(tl.program_id(0), B, N, lengths.cu_seqlens, BLOCK, 1)
    start, length, first_position = locate_sequence(batch, N, lengths)
    tile_start = tile * BLOCK
    if tile_start > length:
        return
    tokens = tile_start + tl.arange(0, BLOCK)
    sinks = Sinks(sink_positions + batch * stride_positions_b, stride_positions_m, M, first_position, length)
    sinks_before = count_sinks_before(sinks, tokens, search_steps)
    token_is_sink = load_sinks(sinks, sinks_before).positions == tokens
    first_sink = tl.min(count_sinks_before(sinks, tokens * 0, search_steps), 0)
    first = first_token(batch, N, start, lengths.cu_seqlens)
    inside = tokens < length
    tl.store(streams.is_sink + first + tokens, token_is_sink.to(tl.int8), mask=inside)
    non_sinks = streams.non_sinks + first + tokens - (sinks_before - first_sink)
    tl.store(non_sinks, tokens, mask=inside & (token_is_sink == 0))
    sink_bounds = streams.sink_bounds + 2 * batch + tokens * 0
    tl.store(sink_bounds, first_sink, mask=tokens == length)
    tl.store(sink_bounds + 1, sinks_before - first_sink, mask=tokens == length)


def launch_sink_attention_streams(q: Tensor, sink_positions: Tensor, lengths: Lengths) -> Streams:
    """Split the tokens of every sequence into sinks and non-sinks. q is [B, Hq, N, D] or packed [T, Hq, D]."""
    B, M = sink_positions.shape
    N = number_of_tokens(q, lengths)
    shape = (B, N) if lengths.cu_seqlens is None else (N,)
    non_sinks = q.new_empty(shape, dtype=torch.int32)
    streams = Streams(q.new_empty(shape, dtype=torch.int8), non_sinks, non_sinks.new_empty((B, 2)))
    grid = (number_of_tiles(B, N, lengths.cu_seqlens, STREAM_BLOCK, 1),)
    launch(
        sink_attention_streams_kernel, grid,
        sink_positions, streams, lengths,
        *sink_positions.stride(),
        B, N, M,
        M.bit_length(),  # search_steps
        BLOCK=STREAM_BLOCK, num_warps=4,
    )  # fmt: skip
    return streams

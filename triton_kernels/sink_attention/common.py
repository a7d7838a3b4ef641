"""What the fused forward and backward share: their arguments, the tokens of a tile, and its qk.

The inter-sink bias β is added in `softmax_block` of forward.py, to the tiles of qk that `sink_qk_block` makes here.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.ragged import Lengths, load_sinks
from recattn.triton_kernels.common.softmax import log2e_scale
from recattn.triton_kernels.common.tiles import BHND, Matrix, Tokens, load_bias, offset

# Integers that change with B, N and M, or from call to call: their values must not compile a kernel anew. They are
# arguments of their own, for Triton specializes every integer of a tuple.
DO_NOT_SPECIALIZE = [
    *("stride_lse_b", "stride_lse_h", "stride_lse_n", "stride_tokens_b", "stride_positions_b"),
    *("stride_bias_b", "stride_bias_h", "stride_bias_m"),
    *("B", "N", "M", "scale", "causal", "dropout_threshold", "search_steps"),
]


class SinkTensors(NamedTuple):
    """The sinks as one kernel argument, made by `SinkInputs.as_arguments`."""

    positions: Tensor
    stride_m: int
    bias: Tensor
    stride_n: int
    logits: Tensor | None
    stride_h: int


class SinkInputs(NamedTuple):
    """The sinks as a launcher takes them."""

    positions: Tensor  # [B, M] ascending, padded at the end with -1
    bias: Tensor  # [B, 1 or Hq, M, M]
    logits: Tensor | None = None  # [Hq]

    def as_arguments(self) -> tuple[SinkTensors, tuple[int, ...]]:
        """A kernel's `sink_tensors`, and its stride_positions_b, stride_bias_b, stride_bias_h and stride_bias_m."""
        stride_b, stride_m = self.positions.stride()
        bias_b, bias_h, bias_m, bias_n = self.bias.stride()
        if self.bias.shape[1] == 1:
            bias_h = 0
        stride_h = 0 if self.logits is None else self.logits.stride(0)
        tensors = SinkTensors(self.positions, stride_m, self.bias, bias_n, self.logits, stride_h)
        return tensors, (stride_b, bias_b, bias_h, bias_m)


class RowStats(NamedTuple):
    """What is known of each query row, float32, as one kernel argument."""

    lse: Tensor  # [B, Hq, N] log-sum-exp
    stride_n: int  # of lse
    # [B, Hq, N, 4], packed [Hq, T, 4], from dQ for dK and dV: `scaled_lse`; the same, +inf for sinks; sum of dO · O; -
    lse_and_delta: Tensor | None
    sink_stats: Tensor | None  # [2, B, Hq, M] row_max, times `log2e_scale`, and row_sum of the sink rows
    sink_delta: Tensor | None  # [B, Hq, M] delta of the sink rows


def needs_int64_offsets(k: BHND, v: BHND) -> bool:
    """Whether a tile of up to 128 tokens reaches beyond 2**31 elements."""
    return max(128 * x.stride_n + x.ptr.shape[-1] * x.stride_d for x in (k, v)) >= 2**31


def number_of_tokens(q: Tensor, lengths: Lengths) -> int:
    """N of q [B, Hq, N, D], or T of q [T, Hq, D]."""
    return q.shape[2] if lengths.cu_seqlens is None else q.shape[0]


def row_strides(lse: Tensor, lengths: Lengths) -> tuple[int, int, int]:
    """The strides of lse [B, Hq, N], or of [T, Hq], where every batch begins at token 0."""
    if lengths.cu_seqlens is None:
        return lse.stride()
    stride_t, stride_h = lse.stride()
    return 0, stride_h, stride_t


# --- In a kernel ---


class HeadDropout(NamedTuple):
    """The dropout of one batch and head."""

    seed: tl.tensor  # None for no dropout
    bh: tl.tensor
    threshold: tl.tensor


class QueryTile(NamedTuple):
    """BLOCK_M queries of one batch and head: all of them sinks, or none."""

    is_sink_tile: tl.tensor
    index: tl.tensor  # [BM] among the sequence's sinks, or among its other tokens
    tokens: Tokens  # [BM]
    last_key: tl.tensor  # [BM] the last key that each query sees; -1 for none


class Keys(NamedTuple):
    """The keys of one batch and head."""

    k: Matrix
    v: Matrix
    is_sink: tl.tensor  # pointer to [length] int8
    length: tl.tensor


@triton.jit
def first_token(batch, N, start, cu_seqlens):
    """Where a sequence begins in a contiguous tensor [B, N], or packed [T]."""
    return batch * N + start if cu_seqlens is None else start


@triton.jit
def first_row_of(batch, head, num_q_heads, N, start, cu_seqlens):
    """Where the rows of a sequence and head begin in a contiguous tensor [B, Hq, N], or packed [Hq, T]."""
    return (batch * num_q_heads + head) * N + start if cu_seqlens is None else head * N + start


@triton.jit
def query_tile(tile, sinks, non_sinks, sink_bounds, BLOCK_M: tl.constexpr):
    """The queries of one tile: (is_sink_tile, index and tokens as in `QueryTile`, first row, first sink, end of the
    sinks). The first row is the position of the first query, 0 in a tile of sinks, -1 in a tile without queries.

    Tiles of sinks come first. Those of the other tokens follow from the last to the first: where the mask is causal,
    the longest run first.
    """
    first_sink = tl.load(sink_bounds)
    num_sinks = tl.load(sink_bounds + 1)
    num_non_sinks = sinks.length - num_sinks
    sink_tiles = tl.cdiv(num_sinks, BLOCK_M)
    is_sink_tile = tile < sink_tiles
    tile_of_stream = tl.where(is_sink_tile, tile, sink_tiles + tl.cdiv(num_non_sinks, BLOCK_M) - 1 - tile)
    first = tile_of_stream * BLOCK_M
    has_non_sinks = (is_sink_tile == 0) & (first >= 0) & (first < num_non_sinks)
    # Loaded, for where a loop starts at the result of a reduction Triton 3.7 does not pipeline it.
    first_row = tl.load(non_sinks + first, mask=has_non_sinks, other=tl.where(is_sink_tile, 0, -1))
    index = first + tl.arange(0, BLOCK_M)
    if is_sink_tile:
        valid = index < num_sinks
        index += first_sink
        positions = load_sinks(sinks, index).positions
    else:
        valid = (index >= 0) & (index < num_non_sinks)
        positions = tl.load(non_sinks + index, mask=valid, other=0)
    return is_sink_tile, index, Tokens(positions, valid), first_row, first_sink, first_sink + num_sinks


@triton.jit
def key_range(rows, first_row, is_sink_tile, causal, length, BLOCK_N: tl.constexpr):
    """The keys that a query tile sees: (last key of each row, first block that needs a mask, end of the last block)."""
    last_key = tl.where(rows.valid, tl.where(causal != 0, rows.positions, length - 1), -1)
    end = tl.max(last_key, 0) + 1
    # Rows that are not valid may see anything: they are not stored.
    seen_by_all = tl.where(causal != 0, first_row + 1, length)
    return last_key, tl.where(is_sink_tile, 0, seen_by_all // BLOCK_N * BLOCK_N), end


@triton.jit
def wide_strides(x):
    """A Matrix with int64 strides, for tiles that reach beyond 2**31 elements. Elsewhere int32 saves registers."""
    return Matrix(x.base, tl.cast(x.row_stride, tl.int64), tl.cast(x.column_stride, tl.int64))


@triton.jit
def load_block(x, first, offsets, length, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows first + offsets of a Matrix. With MASKED the last row stands for those past the end, which weigh nothing."""
    if MASKED:
        offsets = tl.minimum(offsets, length - 1 - first)
    columns = tl.arange(0, BLOCK_WIDTH)
    base = x.base + offset(first, x.row_stride)
    addresses = base + offsets[:, None] * x.row_stride + columns[None, :] * x.column_stride
    if WIDTH == BLOCK_WIDTH:
        return tl.load(addresses)
    return tl.load(addresses, mask=columns[None, :] < WIDTH, other=0.0)


@triton.jit
def qk_block(q_tile, k_tile, qk_scale, start, queries, keys, MASKED: tl.constexpr):
    """[BM, BN] scaled qk with the keys from start, in memory order. For a sink tile the sinks are masked out:
    `sink_qk_block` makes theirs."""
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * qk_scale
    if MASKED:
        positions = start + tl.arange(0, k_tile.shape[0])  # [BN]
        masked_out = tl.load(keys.is_sink + positions, mask=(positions < keys.length) & queries.is_sink_tile, other=0)
        visible = (positions[None, :] <= queries.last_key[:, None]) & (masked_out == 0)[None, :]
        qk = tl.where(visible, qk, -float("inf"))
    return qk


@triton.jit
def sink_qk_block(q_tile, k_tile, qk_scale, queries, key_sinks, key_positions, bias):
    """[BM, BS] scaled qk of a sink tile with the given sinks, and the inter-sink bias β that `exp_biased` adds."""
    visible = key_positions[None, :] <= queries.last_key[:, None]
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * qk_scale
    bias_tile = scaled_bias(load_bias(bias, queries.index, key_sinks, visible), q_tile)
    return tl.where(visible, qk, -float("inf")), bias_tile


@triton.jit
def scaled_bias(bias, x):
    """β times `log2e_scale(x)`."""
    # By fma: a sum may fuse a product into it, here and not there, which rounds a large β in two ways.
    return bias if x.dtype == tl.float32 else tl.fma(bias, log2e_scale(x), 0.0)


@triton.jit
def mark_recomputed(row_sum):
    """A row_sum as sink_stats stores it for a row that was computed over all its keys: the sign is the mark."""
    return -row_sum


@triton.jit
def is_recomputed(row_sum):
    """True where `mark_recomputed` marked a row of sink_stats: a correction's backward then does all of its keys."""
    return row_sum < 0

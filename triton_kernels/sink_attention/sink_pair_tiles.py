"""Tiles of pairs of sinks, for sink_pairs.py: the rows and keys of one sequence, their p, w and dp - delta."""

from typing import NamedTuple

import triton
import triton.language as tl

from recattn.triton_kernels.common.dropout import PER_SINK, dropout_weights
from recattn.triton_kernels.common.ragged import Sinks, is_sink, load_sinks
from recattn.triton_kernels.common.softmax import exp_biased, exp_increase, log2e_scale
from recattn.triton_kernels.common.tiles import (
    Matrix,
    Tokens,
    block_width,
    dot_tokens,
    load_tokens,
    offset,
    store_tokens,
)
from recattn.triton_kernels.sink_attention.common import is_recomputed, scaled_bias


class HeadMatrices(NamedTuple):
    """A matrix of one sequence per head."""

    base: tl.tensor
    head_stride: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor


class SinkStats(NamedTuple):
    """Pointers to the row_max, row_sum and delta of one sequence's sink rows, [Hq, M]."""

    row_max: tl.tensor
    row_sum: tl.tensor
    delta: tl.tensor


class SequenceDropout(NamedTuple):
    """The dropout of one sequence; first_bh is the number of its first (batch, head)."""

    seed: tl.tensor
    first_bh: tl.tensor
    threshold: tl.tensor


class Sequence(NamedTuple):
    """One sequence of the batch, and how it is attended to."""

    q: HeadMatrices
    k: HeadMatrices
    v: HeadMatrices
    dout: HeadMatrices
    bias: HeadMatrices
    sinks: Sinks
    stats: SinkStats
    dropout: SequenceDropout
    group_size: tl.tensor
    scale: tl.tensor
    causal: tl.tensor
    search_steps: tl.tensor


class SinkRows(NamedTuple):
    """A block of sinks as queries of one head."""

    first: tl.tensor
    sinks: tl.tensor
    positions: tl.tensor
    valid: tl.tensor
    last_key: tl.tensor  # the last key that each row sees
    last_sink: tl.tensor  # and the last sink, where none before it is ignored
    row_max: tl.tensor
    row_weight: tl.tensor  # 1 / row_sum
    recomputed: tl.tensor
    delta: tl.tensor
    q: Matrix
    dout: Matrix
    q_tile: tl.tensor
    dout_tile: tl.tensor


class KeyTile(NamedTuple):
    """A block of tokens as keys of one key head."""

    positions: tl.tensor
    valid: tl.tensor
    k: Matrix
    v: Matrix
    k_tile: tl.tensor
    v_tile: tl.tensor


@triton.jit
def sequence_heads(x, batch, start):
    """The matrices [N, D] of one sequence of a BHND, from the token `start` on."""
    return HeadMatrices(x.ptr + batch * x.stride_b + start * x.stride_n, x.stride_h, x.stride_n, x.stride_d)


@triton.jit
def one_head(x, head):
    return Matrix(x.base + tl.cast(head, tl.int64) * x.head_stride, x.row_stride, x.column_stride)


@triton.jit
def add_tokens(x, values, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Add to rows of a Matrix that no other program writes."""
    sums = load_tokens(x, tokens, WIDTH, BLOCK_WIDTH).to(tl.float32) + values
    store_tokens(x, sums, tokens, WIDTH, BLOCK_WIDTH)


@triton.jit
def load_sink_rows(sequence, head, first_row, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    sinks, stats = sequence.sinks, sequence.stats
    indices = first_row + tl.arange(0, BLOCK_M)
    tokens = load_sinks(sinks, indices)
    # One comparison with the last key covers the causal mask, padding and ignored sinks.
    last_key = tl.where(sequence.causal != 0, tokens.positions, sinks.length - 1)
    offsets = tl.cast(head, tl.int64) * sinks.count + indices
    row_sum = tl.load(stats.row_sum + offsets, mask=tokens.valid, other=1.0)
    q, dout = one_head(sequence.q, head), one_head(sequence.dout, head)
    return SinkRows(
        first_row,
        indices,
        tokens.positions,
        tokens.valid,
        tl.where(tokens.valid, last_key, -1),
        tl.where(tokens.valid, tl.where(sequence.causal != 0, indices, sinks.count - 1), -1),
        tl.load(stats.row_max + offsets, mask=tokens.valid, other=0.0),
        1.0 / tl.abs(row_sum),
        is_recomputed(row_sum),
        tl.load(stats.delta + offsets, mask=tokens.valid, other=0.0),
        q,
        dout,
        load_tokens(q, tokens, HEAD_DIM, block_width(HEAD_DIM)),
        load_tokens(dout, tokens, V_HEAD_DIM, block_width(V_HEAD_DIM)),
    )


@triton.jit
def load_keys(sequence, kv_head, tokens, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr):
    k, v = one_head(sequence.k, kv_head), one_head(sequence.v, kv_head)
    k_tile = load_tokens(k, tokens, HEAD_DIM, block_width(HEAD_DIM))
    v_tile = load_tokens(v, tokens, V_HEAD_DIM, block_width(V_HEAD_DIM))
    return KeyTile(tokens.positions, tokens.valid, k, v, k_tile, v_tile)


@triton.jit
def non_sinks(sequence, first_key, BLOCK_N: tl.constexpr):
    """A block of the sequence's tokens; only non-sinks are valid."""
    positions = first_key + tl.arange(0, BLOCK_N)
    sinks = is_sink(sequence.sinks, positions, sequence.search_steps)
    return Tokens(positions, (positions < sequence.sinks.length) & (sinks == 0))


@triton.jit
def last_key_of_recomputed(rows):
    """The last key that each recomputed row sees; -1 for other rows."""
    return tl.where(rows.recomputed, rows.last_key, -1)


@triton.jit
def products(a, a_tokens, a_tile, b, b_tokens, b_tile, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """a @ b.T of two tiles. Float32 is summed in float64, BLOCK_K columns at a time: see `dot_tokens`."""
    if a_tile.dtype == tl.float32:
        result = dot_tokens(a, a_tokens, b, b_tokens, WIDTH, BLOCK_K)
    else:
        result = tl.dot(a_tile, tl.trans(b_tile))
    return result


@triton.jit
def scaled_qk(sequence, rows, keys, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """scale * q @ k.T, times `log2e_scale`."""
    qk = products(rows.q, rows, rows.q_tile, keys.k, keys, keys.k_tile, HEAD_DIM, BLOCK_K)
    return qk * (sequence.scale * log2e_scale(rows.q_tile))


@triton.jit
def dp_less_delta(rows, keys, dropout, V_HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """dp - delta. `dropout` are the dropout weights of the tile."""
    dp = products(rows.dout, rows, rows.dout_tile, keys.v, keys, keys.v_tile, V_HEAD_DIM, BLOCK_K)
    return dropout * dp - rows.delta[:, None]


@triton.jit
def visible_weights(exponentials, visible, rows):
    """Exponentials divided by row_sum; 0 where a row does not see the key."""
    # |qk| of 1e8 and more rounds by more than 1, and not as it did in row_max: hence the limit, which keeps NaN.
    w = tl.minimum(exponentials * rows.row_weight[:, None], 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(visible, w, 0.0)


@triton.jit
def load_pair_bias(sequence, head, rows, first_key, BLOCK_N: tl.constexpr):
    """[rows, BLOCK_N] `scaled_bias` of the rows with the sinks from first_key on; beyond M it is anything."""
    bias, last_sink = one_head(sequence.bias, head), sequence.sinks.count - 1
    first = bias.base + offset(rows.first, bias.row_stride) + offset(first_key, bias.column_stride)
    row_offsets = tl.minimum(tl.arange(0, rows.sinks.shape[0]), last_sink - rows.first)
    keys = tl.arange(0, BLOCK_N)
    addresses = (first + offset(row_offsets, bias.row_stride))[:, None] + offset(keys, bias.column_stride)[None, :]
    bias_tile = tl.load(addresses, mask=(keys <= last_sink - first_key)[None, :], other=0.0).to(tl.float32)
    return scaled_bias(bias_tile, rows.q_tile)


@triton.jit
def sink_pair_weights(
    sequence, head, rows, first_key, keys, visible,
    CORRECTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w of the pairs with the sinks from first_key on, without CORRECTS p, and their dropout weights."""
    bias = load_pair_bias(sequence, head, rows, first_key, BLOCK_N)
    qk = scaled_qk(sequence, rows, keys, HEAD_DIM, BLOCK_K)
    exponentials = exp_biased(qk, bias, rows.row_max[:, None], rows.q_tile)
    if CORRECTS:
        increase = exp_increase(qk, bias, rows.row_max[:, None], rows.q_tile)
        exponentials = tl.where(rows.recomputed[:, None], exponentials, increase)
    w = visible_weights(exponentials, visible, rows)
    dropout = 1.0
    if sequence.dropout.seed is not None:
        seed, bh = tl.load(sequence.dropout.seed), (sequence.dropout.first_bh + head).to(tl.int32)
        dropout = dropout_weights(seed, bh, PER_SINK, rows.sinks, first_key, sequence.dropout.threshold, BLOCK_N)
    return w, dropout


@triton.jit
def non_sink_pair_weights(sequence, rows, keys, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """w of the pairs with keys that are not sinks: p in recomputed rows, 0 in others."""
    qk = scaled_qk(sequence, rows, keys, HEAD_DIM, BLOCK_K)
    visible = keys.valid[None, :] & (keys.positions[None, :] <= last_key_of_recomputed(rows)[:, None])
    return visible_weights(exp_biased(qk, 0.0, rows.row_max[:, None], rows.q_tile), visible, rows)

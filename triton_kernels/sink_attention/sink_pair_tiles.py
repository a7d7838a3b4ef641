"""Tiles of pairs of sinks, for sink_pairs.py: the rows and keys of one sequence, their p, w and dp - delta."""

from typing import NamedTuple

import triton
import triton.language as tl

from recattn.triton_kernels.common.dropout import PER_SINK, dropout_weights
from recattn.triton_kernels.common.ragged import Sinks, is_sink, load_sinks
from recattn.triton_kernels.common.softmax import exp_increase
from recattn.triton_kernels.common.tiles import Matrix, Tokens, dot_tokens, load_bias, load_tokens, store_tokens
from recattn.triton_kernels.sink_attention.common import is_recomputed


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

    sinks: tl.tensor
    positions: tl.tensor
    valid: tl.tensor
    last_key: tl.tensor  # the last key that each row sees
    row_max: tl.tensor
    row_sum: tl.tensor
    delta: tl.tensor


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
def load_sink_rows(sequence, head, first_row, BLOCK_M: tl.constexpr):
    sinks, stats = sequence.sinks, sequence.stats
    indices = first_row + tl.arange(0, BLOCK_M)
    tokens = load_sinks(sinks, indices)
    # One comparison with the last key covers the causal mask, padding and ignored sinks.
    last_key = tl.where(sequence.causal != 0, tokens.positions, sinks.length - 1)
    offsets = tl.cast(head, tl.int64) * sinks.count + indices
    return SinkRows(
        indices,
        tokens.positions,
        tokens.valid,
        tl.where(tokens.valid, last_key, -1),
        tl.load(stats.row_max + offsets, mask=tokens.valid, other=0.0),
        tl.load(stats.row_sum + offsets, mask=tokens.valid, other=1.0),
        tl.load(stats.delta + offsets, mask=tokens.valid, other=0.0),
    )


@triton.jit
def load_non_sink_keys(sequence, first_key, BLOCK_N: tl.constexpr):
    """A block of the sequence's tokens; only non-sinks are valid."""
    positions = first_key + tl.arange(0, BLOCK_N)
    sinks = is_sink(sequence.sinks, positions, sequence.search_steps)
    return Tokens(positions, (positions < sequence.sinks.length) & (sinks == 0))


@triton.jit
def last_key_of_recomputed(rows):
    """The last key that each recomputed row sees; -1 for other rows."""
    return tl.where(is_recomputed(rows.row_sum), rows.last_key, -1)


@triton.jit
def masked_qk(sequence, head, rows, keys, visible, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """scale * q @ k.T, -inf where a row does not see the key."""
    q, k = one_head(sequence.q, head), one_head(sequence.k, head // sequence.group_size)
    return tl.where(visible, sequence.scale * dot_tokens(q, rows, k, keys, HEAD_DIM, BLOCK_K), -float("inf"))


@triton.jit
def probabilities(qk, bias, rows):
    # A large bias is close to row_max: their difference is exact, where qk + bias would round.
    p = tl.exp(qk + (bias - rows.row_max[:, None])) / tl.abs(rows.row_sum)[:, None]
    # |qk| of 1e8 and more rounds by more than 1, and not as it did in row_max. NaN stays.
    return tl.where(p > 1.0, 1.0, p)


@triton.jit
def dp_less_delta(sequence, head, rows, keys, dropout, V_HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """dp - delta. `dropout` are the dropout weights of the tile."""
    dout, v = one_head(sequence.dout, head), one_head(sequence.v, head // sequence.group_size)
    return dropout * dot_tokens(dout, rows, v, keys, V_HEAD_DIM, BLOCK_K) - rows.delta[:, None]


@triton.jit
def sink_pair_weights(
    sequence, head, rows, first_key, keys,
    CORRECTS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """p and w of the pairs with the sinks from first_key on, and their dropout weights."""
    key_sinks = first_key + tl.arange(0, BLOCK_N)
    visible = keys.positions[None, :] <= rows.last_key[:, None]
    qk = masked_qk(sequence, head, rows, keys, visible, HEAD_DIM, BLOCK_K)
    bias = load_bias(one_head(sequence.bias, head), rows.sinks, key_sinks, visible)
    p = probabilities(qk, bias, rows)
    w = p
    if CORRECTS:
        increase = exp_increase(qk, bias, rows.row_max[:, None]) / tl.abs(rows.row_sum)[:, None]
        w = tl.where(is_recomputed(rows.row_sum)[:, None], p, increase)
    dropout = 1.0
    if sequence.dropout.seed is not None:
        seed, bh = tl.load(sequence.dropout.seed), (sequence.dropout.first_bh + head).to(tl.int32)
        dropout = dropout_weights(seed, bh, PER_SINK, rows.sinks, first_key, sequence.dropout.threshold, BLOCK_N)
    return p, w, dropout


@triton.jit
def non_sink_pair_weights(sequence, head, rows, keys, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """w of the pairs with keys that are not sinks: p in recomputed rows, 0 in others."""
    visible = keys.valid[None, :] & (keys.positions[None, :] <= last_key_of_recomputed(rows)[:, None])
    return probabilities(masked_qk(sequence, head, rows, keys, visible, HEAD_DIM, BLOCK_K), 0.0, rows)

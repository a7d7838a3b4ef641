"""sink_attention in one flash kernel, forward and backward: the fused path.

The tokens of a sequence are two streams, sinks and others. A tile of queries belongs to one stream, gathered once; its
loop over the keys walks them as they lie in memory. Tiles of sinks leave the sinks out of that walk and visit them in a
loop of their own, where the bias is a dense tile. Every other tile is plain flash attention.
"""

import functools
import itertools
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.compilation import Compilation
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import ARCHITECTURES, architecture_of, launch_kernel, strides
from recattn.triton_kernels.common.ragged import Sinks, as_dense, count_sinks_before, load_sinks, locate_sequence
from recattn.triton_kernels.common.softmax import exp_scaled, log2e_scale
from recattn.triton_kernels.common.tiles import (
    Matrix,
    Tokens,
    block_width,
    load_bias,
    load_tokens,
    offset,
    store_tokens,
)
from recattn.triton_kernels.sink_attention.config import SinkAttentionConfig, TileConfig, candidates, kind_of

# Programs of the kernel that splits the streams take so many tokens each.
STREAM_BLOCK = 1024


class Streams(NamedTuple):
    """Which tokens are sinks. Tokens count from the sequence's first; packed, the tensors over N are over T."""

    is_sink: Tensor  # [B, N] int8
    others: Tensor  # [B, N] int32, the tokens that are no sinks, in order
    sink_bounds: Tensor  # [B, 2] int32, the first sink that counts, and how many count


# --- Tiles of a grid ---


@triton.jit
def sequence_of_tile(tile, B, N, cu_seqlens, BLOCK: tl.constexpr, SPARE: tl.constexpr):
    """The sequence that a tile belongs to, and which of its tiles it is.

    Packed, sequence b owns the tiles from cu_seqlens[b] // BLOCK + b · SPARE: at least its length // BLOCK + SPARE of
    them, known without reading every length. A search looks at 128 sequences at a time.
    """
    if cu_seqlens is None:
        tiles = N // BLOCK + SPARE
        batch = tile // tiles
        first = batch * tiles
    else:
        batch = tile * 0
        step = batch + B
        while step > 1:  # the tile belongs to one of `step` sequences from `batch` on
            step = tl.cdiv(step, 128)
            b = batch + tl.arange(0, 128) * step
            first_tiles = tl.load(cu_seqlens + b, mask=b < B, other=0).to(tl.int32) // BLOCK + b * SPARE
            batch += tl.maximum(tl.sum(((b < B) & (first_tiles <= tile)).to(tl.int32), 0) - 1, 0) * step
        first = tl.load(cu_seqlens + batch).to(tl.int32) // BLOCK + batch * SPARE
        # Before the first sequence may lie tokens of none: theirs are tiles beyond its last.
        tile = tl.where(tile < first, first + N // BLOCK + SPARE, tile)
    return batch.to(tl.int64), tile - first


def number_of_tiles(B: int, N: int, cu_seqlens: Tensor | None, block: int, spare: int) -> int:
    """The tiles of all sequences, of which `sequence_of_tile` knows one; packed, N is T."""
    return B * (N // block + spare) if cu_seqlens is None else N // block + spare * B


# --- The streams ---


@triton.jit(do_not_specialize=["stride_pb", "stride_tb", "B", "N", "M", "left_padded", "search_steps"])
def sink_attention_streams_kernel(
    sink_positions,
    is_sink,
    others,
    sink_bounds,
    seq_lens,
    cu_seqlens,
    stride_pb,
    stride_pm,
    stride_tb,
    B,
    N,
    M,
    left_padded,
    search_steps,
    BLOCK: tl.constexpr,
):
    batch, tile = sequence_of_tile(tl.program_id(0), B, N, cu_seqlens, BLOCK, 1)
    start, length, first_position = locate_sequence(batch, N, seq_lens, cu_seqlens, left_padded)
    first_token = tile * BLOCK
    if first_token > length:
        return
    # One token past the end: before it stand all the sinks that count.
    tokens = first_token + tl.arange(0, BLOCK)
    sinks = Sinks(sink_positions + batch * stride_pb, stride_pm, M, first_position, length)
    before = count_sinks_before(sinks, tokens, search_steps)
    token_is_sink = load_sinks(sinks, before).positions == tokens
    first_sink = tl.min(count_sinks_before(sinks, tokens * 0, search_steps), 0)
    own_tokens = batch * stride_tb + start
    inside = tokens < length
    tl.store(is_sink + own_tokens + tokens, token_is_sink.to(tl.int8), mask=inside)
    tl.store(others + own_tokens + tokens - (before - first_sink), tokens, mask=inside & (token_is_sink == 0))
    bounds = sink_bounds + 2 * batch + tokens * 0
    tl.store(bounds, first_sink, mask=tokens == length)
    tl.store(bounds + 1, before - first_sink, mask=tokens == length)


def launch_sink_attention_streams(
    q: Tensor, sink_positions: Tensor, seq_lens: Tensor | None, cu_seqlens: Tensor | None, *, left_padded: bool
) -> Streams:
    """Split the tokens of every sequence into sinks and others. q [B, Hq, N, D] or packed [T, Hq, D] tells N or T."""
    B = sink_positions.shape[0]
    N = q.shape[2] if cu_seqlens is None else q.shape[0]
    tokens = (B, N) if cu_seqlens is None else (N,)
    streams = Streams(
        is_sink=q.new_empty(tokens, dtype=torch.int8),
        others=q.new_empty(tokens, dtype=torch.int32),
        sink_bounds=q.new_empty((B, 2), dtype=torch.int32),
    )
    arguments = _stream_arguments(streams, sink_positions, seq_lens, cu_seqlens, left_padded, N)
    grid = (number_of_tiles(B, N, cu_seqlens, STREAM_BLOCK, 1),)
    with torch.cuda.device_of(q):
        launch_kernel(sink_attention_streams_kernel, grid, arguments, num_warps=4)
    return streams


def _stream_arguments(streams, sink_positions, seq_lens, cu_seqlens, left_padded, N) -> dict[str, object]:
    B, M = sink_positions.shape
    return {
        "sink_positions": sink_positions,
        **streams._asdict(),
        "seq_lens": seq_lens,
        "cu_seqlens": cu_seqlens,
        **strides("p", sink_positions, "bm"),
        "stride_tb": N if cu_seqlens is None else 0,
        "B": B,
        "N": N,
        "M": M,
        "left_padded": int(left_padded),
        "search_steps": M.bit_length(),
        "BLOCK": STREAM_BLOCK,
    }


# --- What the flash kernels share ---


class DropoutOfPlane(NamedTuple):
    """The dropout of one batch entry and head; `seed` is None where nothing is dropped."""

    seed: tl.tensor
    plane: tl.tensor
    threshold: tl.tensor


@triton.jit
def load_block(x, first, offsets, valid, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows first + offsets of a Matrix; without a mask where all are there."""
    base = x.base + offset(first, x.row_stride)
    if MASKED or WIDTH != BLOCK_WIDTH:
        block = load_tokens(Matrix(base, x.row_stride, x.column_stride), Tokens(offsets, valid), WIDTH, BLOCK_WIDTH)
    else:
        block = tl.load(base + offsets[:, None] * x.row_stride + tl.arange(0, BLOCK_WIDTH)[None, :] * x.column_stride)
    return block


@triton.jit
def widened(x):
    """A Matrix of which a tile reaches beyond 2**31 elements: offsets inside a block are int32 to save registers."""
    return Matrix(x.base, tl.cast(x.row_stride, tl.int64), tl.cast(x.column_stride, tl.int64))


@triton.jit
def query_tile(tile, sinks, others, bounds, BLOCK_M: tl.constexpr):
    """Of one tile: whether it holds sinks, which (or which others), their tokens, and the first and last sink to see.

    Tiles of sinks come first, then those of the others from the last: where the mask is causal, the long ones first.
    """
    first_sink = tl.load(bounds)
    num_sinks = tl.load(bounds + 1)
    num_others = sinks.length - num_sinks
    sink_tiles = tl.cdiv(num_sinks, BLOCK_M)
    holds_sinks = tile < sink_tiles
    tile_of_stream = tl.where(holds_sinks, tile, sink_tiles + tl.cdiv(num_others, BLOCK_M) - 1 - tile)
    index = tile_of_stream * BLOCK_M + tl.arange(0, BLOCK_M)
    if holds_sinks:
        valid = index < num_sinks
        index += first_sink
        positions = load_sinks(sinks, index).positions
    else:
        valid = (index >= 0) & (index < num_others)
        positions = tl.load(others + index, mask=valid, other=0)
    return holds_sinks, index, Tokens(positions, valid), first_sink, first_sink + num_sinks


@triton.jit
def key_bounds(rows, holds_sinks, causal, length, BLOCK_N: tl.constexpr):
    """Of a tile: the last key that each row sees, where the blocks begin that need a mask, and where all end."""
    last_visible = tl.where(rows.valid, tl.where(causal != 0, rows.positions, length - 1), -1)
    end = tl.max(last_visible, 0) + 1
    # Rows that are not there see nothing, and nothing of theirs is stored.
    seen_by_all = tl.min(tl.where(rows.valid, last_visible, length - 1), 0) + 1
    first_masked = tl.where(holds_sinks, 0, seen_by_all // BLOCK_N * BLOCK_N)
    return last_visible, tl.minimum(first_masked, end), end


@triton.jit
def walk_scores(q_tile, k_tile, score_scale, start, last_visible, holds_sinks, length, is_sink, MASKED: tl.constexpr):
    """[BM, BN] scores with the keys that lie at start, in their unit; a tile of sinks leaves the sinks out."""
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * score_scale
    if MASKED:
        keys = start + tl.arange(0, k_tile.shape[0])  # [BN]
        left_out = tl.load(is_sink + keys, mask=(keys < length) & holds_sinks, other=0)
        visible = (keys[None, :] <= last_visible[:, None]) & (left_out == 0)[None, :]
        scores = tl.where(visible, scores, -float("inf"))
    return scores


@triton.jit
def sink_scores(q_tile, k_tile, score_scale, row_sinks, key_sinks, keys, last_visible, bias):
    """[BM, BN] scores with the given sinks, and their bias, in their unit."""
    visible = keys.positions[None, :] <= last_visible[:, None]
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * score_scale
    bias_tile = load_bias(bias, row_sinks, key_sinks, visible) * log2e_scale(q_tile)
    return tl.where(visible, scores, -float("inf")), bias_tile


# --- Forward ---


@triton.jit
def softmax_step(acc, shift, mass, scores, bias, values, dropout, kind, rows, first_column, MASKED: tl.constexpr):
    """Add a block of keys to acc / mass, both scaled by the exponential of -shift."""
    new_shift = tl.maximum(shift, tl.max(scores if bias is None else scores + bias, 1))
    reference = new_shift
    if MASKED:  # before a row's first key its shift is -inf, and -inf minus itself NaN
        reference = tl.where(new_shift == -float("inf"), 0.0, new_shift)
    if bias is None:
        weights = exp_scaled(scores - reference[:, None], values)
    else:  # a large bias is close to the reference: their difference is exact, where scores + bias would round
        weights = exp_scaled(scores + (bias - reference[:, None]), values)
    rescale = exp_scaled(shift - reference, values)
    mass = mass * rescale + tl.sum(weights, 1)
    if dropout.seed is not None:
        weights *= dropout_weights(
            tl.load(dropout.seed), dropout.plane, kind, rows, first_column, dropout.threshold, weights.shape[1]
        )
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision="ieee")
    return acc, new_shift, mass


@triton.jit
def attend_keys(
    acc,
    shift,
    mass,
    q_tile,
    rows,
    last_visible,
    holds_sinks,
    first,
    end,
    length,
    k,
    v,
    is_sink,
    score_scale,
    dropout,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The keys first..end as they lie in memory; a tile of sinks leaves the sinks out."""
    columns = tl.arange(0, BLOCK_N)
    for start in range(first, end, BLOCK_N):
        there = start + columns < length
        k_tile = load_block(k, start, columns, there, HEAD_DIM, q_tile.shape[1], MASKED)
        scores = walk_scores(q_tile, k_tile, score_scale, start, last_visible, holds_sinks, length, is_sink, MASKED)
        v_tile = load_block(v, start, columns, there, V_HEAD_DIM, acc.shape[1], MASKED)
        acc, shift, mass = softmax_step(acc, shift, mass, scores, None, v_tile, dropout, 0, rows, start, MASKED)
    return acc, shift, mass


# What changes with N, M and B, or from call to call, must not compile anew.
CHANGING = ["B", "N", "M", "scale", "causal", "left_padded", "dropped"]
CHANGING += [f"stride_{axis}" for axis in ("tb", "lb", "lh", "pb", "bb", "bh", "bm")]


@triton.jit(do_not_specialize=CHANGING)
def sink_attention_fwd_kernel(
    q,
    k,
    v,
    out,
    lse,
    sink_state,
    sink_positions,
    inter_sink_bias,
    sink_logits,
    is_sink,
    others,
    sink_bounds,
    seq_lens,
    cu_seqlens,
    dropout_seed,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_pb,
    stride_pm,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_tb,
    B,
    num_q_heads,
    group_size,
    N,
    M,
    scale,
    causal,
    left_padded,
    dropped,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDE: tl.constexpr,
):
    batch, tile = sequence_of_tile(tl.program_id(0), B, N, cu_seqlens, BLOCK_M, 2)
    start, length, first_position = locate_sequence(batch, N, seq_lens, cu_seqlens, left_padded)
    head = tl.program_id(1).to(tl.int64)
    plane = batch * num_q_heads + head
    own_tokens = batch * stride_tb + start
    sinks = Sinks(sink_positions + batch * stride_pb, stride_pm, M, first_position, length)
    holds_sinks, index, rows, first_sink, end_sink = query_tile(
        tile, sinks, others + own_tokens, sink_bounds + 2 * batch, BLOCK_M
    )
    if tl.max(rows.valid.to(tl.int32), 0) == 0:
        return
    kv_head = head // group_size
    q = Matrix(q + batch * stride_qb + head * stride_qh + start * stride_qn, stride_qn, stride_qd)
    k = Matrix(k + batch * stride_kb + kv_head * stride_kh + start * stride_kn, stride_kn, stride_kd)
    v = Matrix(v + batch * stride_vb + kv_head * stride_vh + start * stride_vn, stride_vn, stride_vd)
    if WIDE:
        k, v = widened(k), widened(v)
    out = Matrix(out + batch * stride_ob + head * stride_oh + start * stride_on, stride_on, stride_od)
    bias = Matrix(inter_sink_bias + batch * stride_bb + head * stride_bh, stride_bm, stride_bn)
    dropout = DropoutOfPlane(dropout_seed, plane.to(tl.int32), dropped)
    is_sink += own_tokens

    last_visible, first_masked, end = key_bounds(rows, holds_sinks, causal, length, BLOCK_N)
    q_tile = load_tokens(q, rows, HEAD_DIM, BLOCK_D)  # [BM, D]
    score_scale = scale * log2e_scale(q_tile)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    shift = tl.full([BLOCK_M], -float("inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    if holds_sinks:
        for first in range(first_sink // BLOCK_S * BLOCK_S, end_sink, BLOCK_S):
            key_sinks = first + tl.arange(0, BLOCK_S)  # [BS]
            keys = load_sinks(sinks, key_sinks)
            k_tile = load_tokens(k, keys, HEAD_DIM, BLOCK_D)
            scores, bias_tile = sink_scores(q_tile, k_tile, score_scale, index, key_sinks, keys, last_visible, bias)
            v_tile = load_tokens(v, keys, V_HEAD_DIM, BLOCK_DV)
            acc, shift, mass = softmax_step(acc, shift, mass, scores, bias_tile, v_tile, dropout, 1, index, first, True)
    for MASKED in tl.static_range(2):
        acc, shift, mass = attend_keys(
            acc,
            shift,
            mass,
            q_tile,
            rows.positions,
            last_visible,
            holds_sinks,
            first_masked if MASKED else tl.zeros_like(end),
            end if MASKED else first_masked,
            length,
            k,
            v,
            is_sink,
            score_scale,
            dropout,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_N,
            MASKED,
        )

    if sink_logits is not None:
        logit = tl.load(sink_logits + head).to(tl.float32) * log2e_scale(q_tile)
        new_shift = tl.maximum(shift, logit)
        reference = tl.where(new_shift == -float("inf"), 0.0, new_shift)
        rescale = exp_scaled(shift - reference, q_tile)
        acc *= rescale[:, None]
        mass = mass * rescale + exp_scaled(logit - reference, q_tile)
        shift = new_shift
    # A row all of whose keys are suppressed has no mass: zeros, and a log-sum-exp of -inf.
    no_mass = mass == 0
    mass = tl.where(no_mass, 1.0, mass)
    store_tokens(out, acc / mass[:, None], rows, V_HEAD_DIM, BLOCK_DV)
    shift = shift / log2e_scale(q_tile)
    lse += batch * stride_lb + head * stride_lh + start * stride_ln
    tl.store(lse + rows.positions.to(tl.int64) * stride_ln, shift + tl.log(mass), mask=rows.valid)
    if holds_sinks:
        state = sink_state + plane * M + index
        # Negative, for every row has been over all its keys: a correction's backward may take over.
        tl.store(state, tl.where(no_mass, float("inf"), shift), mask=rows.valid)
        tl.store(state + B.to(tl.int64) * num_q_heads * M, -mass, mask=rows.valid)


# --- Backward: dQ, a tile of queries at a time ---


@triton.jit
def weights_and_score_gradient(
    scores, row_shift, dweights, delta, operand, dropout, kind, rows, first_column, TRANSPOSED: tl.constexpr
):
    """Weights with dropout, and the gradient of the scores, of one tile; both 0 in rows of shift = +inf.

    row_shift has the shape of a row or column of the tile, or where a bias is taken off it that of the tile.
    """
    weights = exp_scaled(scores - row_shift, operand)
    dropped_weights = weights
    if dropout.seed is not None:
        BLOCK_N: tl.constexpr = weights.shape[0] if TRANSPOSED else weights.shape[1]
        factors = dropout_weights(
            tl.load(dropout.seed), dropout.plane, kind, rows, first_column, dropout.threshold, BLOCK_N
        )
        if TRANSPOSED:
            factors = tl.trans(factors)
        dropped_weights *= factors
        dweights *= factors
    return dropped_weights, weights * (dweights - delta)


@triton.jit
def lse_of_weights(lse, operand):
    """In units of a score, +inf for rows without mass: a weight is then 0 and not NaN."""
    return tl.where(lse == -float("inf"), float("inf"), lse * log2e_scale(operand))


@triton.jit
def differentiate_keys(
    dq,
    q_tile,
    dout_tile,
    row_shift,
    delta,
    rows,
    last_visible,
    holds_sinks,
    first,
    end,
    length,
    k,
    v,
    is_sink,
    score_scale,
    dropout,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add dS K of the keys first..end as they lie in memory; a tile of sinks leaves the sinks out."""
    columns = tl.arange(0, BLOCK_N)
    for start in range(first, end, BLOCK_N):
        there = start + columns < length
        k_tile = load_block(k, start, columns, there, HEAD_DIM, q_tile.shape[1], MASKED)
        v_tile = load_block(v, start, columns, there, V_HEAD_DIM, dout_tile.shape[1], MASKED)
        scores = walk_scores(q_tile, k_tile, score_scale, start, last_visible, holds_sinks, length, is_sink, MASKED)
        dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        _, dscores = weights_and_score_gradient(
            scores, row_shift[:, None], dweights, delta[:, None], q_tile, dropout, 0, rows, start, False
        )
        dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=CHANGING)
def sink_attention_bwd_dq_kernel(
    q,
    k,
    v,
    out,
    dout,
    lse,
    sink_state,
    dq,
    delta,
    sink_delta,
    sink_positions,
    inter_sink_bias,
    is_sink,
    others,
    sink_bounds,
    seq_lens,
    cu_seqlens,
    dropout_seed,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_gd,
    stride_dqb,
    stride_dqh,
    stride_dqn,
    stride_dqd,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_pb,
    stride_pm,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_tb,
    B,
    num_q_heads,
    group_size,
    N,
    M,
    scale,
    causal,
    left_padded,
    dropped,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    WIDE: tl.constexpr,
):
    batch, tile = sequence_of_tile(tl.program_id(0), B, N, cu_seqlens, BLOCK_M, 2)
    start, length, first_position = locate_sequence(batch, N, seq_lens, cu_seqlens, left_padded)
    head = tl.program_id(1).to(tl.int64)
    plane = batch * num_q_heads + head
    own_tokens = batch * stride_tb + start
    sinks = Sinks(sink_positions + batch * stride_pb, stride_pm, M, first_position, length)
    holds_sinks, index, rows, first_sink, end_sink = query_tile(
        tile, sinks, others + own_tokens, sink_bounds + 2 * batch, BLOCK_M
    )
    if tl.max(rows.valid.to(tl.int32), 0) == 0:
        return
    kv_head = head // group_size
    q = Matrix(q + batch * stride_qb + head * stride_qh + start * stride_qn, stride_qn, stride_qd)
    k = Matrix(k + batch * stride_kb + kv_head * stride_kh + start * stride_kn, stride_kn, stride_kd)
    v = Matrix(v + batch * stride_vb + kv_head * stride_vh + start * stride_vn, stride_vn, stride_vd)
    if WIDE:
        k, v = widened(k), widened(v)
    out = Matrix(out + batch * stride_ob + head * stride_oh + start * stride_on, stride_on, stride_od)
    bias = Matrix(inter_sink_bias + batch * stride_bb + head * stride_bh, stride_bm, stride_bn)
    dout = Matrix(dout + batch * stride_gb + head * stride_gh + start * stride_gn, stride_gn, stride_gd)
    dq = Matrix(dq + batch * stride_dqb + head * stride_dqh + start * stride_dqn, stride_dqn, stride_dqd)
    lse_rows = batch * stride_lb + head * stride_lh + (start + rows.positions) * stride_ln
    dropout = DropoutOfPlane(dropout_seed, plane.to(tl.int32), dropped)
    is_sink += own_tokens

    last_visible, first_masked, end = key_bounds(rows, holds_sinks, causal, length, BLOCK_N)
    q_tile = load_tokens(q, rows, HEAD_DIM, BLOCK_D)  # [BM, D]
    score_scale = scale * log2e_scale(q_tile)
    dout_tile = load_tokens(dout, rows, V_HEAD_DIM, BLOCK_DV)  # [BM, Dv]
    out_tile = load_tokens(out, rows, V_HEAD_DIM, BLOCK_DV)
    # The kernel of the pairs sums dout · v of float32 in float64: where one key holds a row, the two are equal.
    SUM: tl.constexpr = tl.float64 if out_tile.dtype == tl.float32 else tl.float32
    row_delta = tl.sum(dout_tile.to(SUM) * out_tile.to(SUM), 1).to(tl.float32)  # [BM]
    tl.store(delta + lse_rows, row_delta, mask=rows.valid)
    row_shift = lse_of_weights(tl.load(lse + lse_rows, mask=rows.valid, other=float("inf")), q_tile)
    divisor = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if holds_sinks:
        tl.store(sink_delta + plane * M + index, row_delta, mask=rows.valid)
        # A large bias makes a large log-sum-exp, which rounds more than the bound allows; these two do not.
        state = sink_state + plane * M + index
        row_shift = tl.load(state, mask=rows.valid, other=float("inf")) * log2e_scale(q_tile)
        divisor = tl.abs(tl.load(state + B.to(tl.int64) * num_q_heads * M, mask=rows.valid, other=1.0))
        for first in range(first_sink // BLOCK_S * BLOCK_S, end_sink, BLOCK_S):
            key_sinks = first + tl.arange(0, BLOCK_S)  # [BS]
            keys = load_sinks(sinks, key_sinks)
            k_tile = load_tokens(k, keys, HEAD_DIM, BLOCK_D)
            v_tile = load_tokens(v, keys, V_HEAD_DIM, BLOCK_DV)
            scores, bias_tile = sink_scores(q_tile, k_tile, score_scale, index, key_sinks, keys, last_visible, bias)
            dweights = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            _, dscores = weights_and_score_gradient(
                scores,
                row_shift[:, None] - bias_tile,
                dweights,
                row_delta[:, None],
                q_tile,
                dropout,
                1,
                index,
                first,
                False,
            )
            acc = tl.dot(dscores.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    for MASKED in tl.static_range(2):
        acc = differentiate_keys(
            acc,
            q_tile,
            dout_tile,
            row_shift,
            row_delta,
            rows.positions,
            last_visible,
            holds_sinks,
            first_masked if MASKED else tl.zeros_like(end),
            end if MASKED else first_masked,
            length,
            k,
            v,
            is_sink,
            score_scale,
            dropout,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_N,
            MASKED,
        )
    acc *= (scale / divisor)[:, None]
    store_tokens(dq, acc, rows, HEAD_DIM, BLOCK_D)


# --- Backward: dK and dV, a block of keys at a time ---


@triton.jit(do_not_specialize=CHANGING)
def sink_attention_bwd_dkdv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
    is_sink,
    seq_lens,
    cu_seqlens,
    dropout_seed,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_gb,
    stride_gh,
    stride_gn,
    stride_gd,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dkd,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_dvd,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_tb,
    B,
    num_q_heads,
    group_size,
    N,
    scale,
    causal,
    left_padded,
    dropped,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch, block = sequence_of_tile(tl.program_id(0), B, N, cu_seqlens, BLOCK_N, 1)
    start, length, _ = locate_sequence(batch, N, seq_lens, cu_seqlens, left_padded)
    first_key = block * BLOCK_N
    if first_key >= length:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    k = Matrix(k + batch * stride_kb + kv_head * stride_kh + start * stride_kn, stride_kn, stride_kd)
    v = Matrix(v + batch * stride_vb + kv_head * stride_vh + start * stride_vn, stride_vn, stride_vd)
    dk = Matrix(dk + batch * stride_dkb + kv_head * stride_dkh + start * stride_dkn, stride_dkn, stride_dkd)
    dv = Matrix(dv + batch * stride_dvb + kv_head * stride_dvh + start * stride_dvn, stride_dvn, stride_dvd)
    is_sink += batch * stride_tb + start

    positions = first_key + tl.arange(0, BLOCK_N)
    keys = Tokens(positions, positions < length)
    key_is_sink = tl.load(is_sink + positions, mask=keys.valid, other=0)
    k_tile = load_tokens(k, keys, HEAD_DIM, BLOCK_D)  # [BN, D]
    score_scale = scale * log2e_scale(k_tile)
    v_tile = load_tokens(v, keys, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
    first_row = tl.where(causal != 0, first_key // BLOCK_M * BLOCK_M, 0)
    num_blocks = tl.cdiv(length - first_row, BLOCK_M)
    # [BN] the first row that sees each key
    first_seeing = tl.where(keys.valid, tl.where(causal != 0, positions, 0), length)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # One loop over the heads that share the keys, and their blocks of rows, keeps the loads of the next ahead.
    for step in range(0, group_size * num_blocks):
        head = kv_head * group_size + step // num_blocks
        offsets = first_row + step % num_blocks * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
        rows = Tokens(offsets, offsets < length)
        q_matrix = Matrix(q + batch * stride_qb + head * stride_qh + start * stride_qn, stride_qn, stride_qd)
        dout_matrix = Matrix(dout + batch * stride_gb + head * stride_gh + start * stride_gn, stride_gn, stride_gd)
        q_tile = load_tokens(q_matrix, rows, HEAD_DIM, BLOCK_D)  # [BM, D]
        dout_tile = load_tokens(dout_matrix, rows, V_HEAD_DIM, BLOCK_DV)  # [BM, Dv]
        lse_rows = batch * stride_lb + head * stride_lh + (start + offsets) * stride_ln
        # Rows past the end have an lse of +inf: no weight.
        row_lse = lse_of_weights(tl.load(lse + lse_rows, mask=rows.valid, other=float("inf")), q_tile)
        row_delta = tl.load(delta + lse_rows, mask=rows.valid, other=0.0)
        row_is_sink = tl.load(is_sink + offsets, mask=rows.valid, other=0)
        # Pairs of sinks are left to the kernel that knows their bias.
        visible = (first_seeing[:, None] <= offsets[None, :]) & (key_is_sink[:, None] + row_is_sink[None, :] < 2)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee") * score_scale
        scores = tl.where(visible, scores, -float("inf"))  # [BN, BM]
        dweights = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
        dropout = DropoutOfPlane(dropout_seed, (batch * num_q_heads + head).to(tl.int32), dropped)
        weights, dscores = weights_and_score_gradient(
            scores, row_lse[None, :], dweights, row_delta[None, :], q_tile, dropout, 0, offsets, first_key, True
        )
        dv_acc = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv_acc, input_precision="ieee")
        dk_acc = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    store_tokens(dk, dk_acc * scale, keys, HEAD_DIM, BLOCK_D)
    store_tokens(dv, dv_acc, keys, V_HEAD_DIM, BLOCK_DV)


# --- Launchers ---


def launch_sink_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_state: Tensor,
    sink_positions: Tensor,
    inter_sink_bias: Tensor,
    sink_logits: Tensor | None,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    streams: Streams,
    dropout: Dropout = NO_DROPOUT,
    *,
    causal: bool,
    left_padded: bool,
    scale: float,
    config: TileConfig | None = None,
) -> None:
    """Write `out`, `lse` and `sink_state` of

        O = softmax(scale · Q Kᵀ + mask + β) V
        β[b, h, i, j] = inter_sink_bias[b, h, s(i), s(j)] when tokens i and j are both sinks, else 0

    q [B, Hq, N, D]; k [B, Hkv, N, D]; v [B, Hkv, N, Dv]; out [B, Hq, N, Dv]; lse [B, Hq, N] float32, natural logarithm;
    sink_state [2, B, Hq, M] float32, contiguous: of each sink row the shift and the mass such that its weights are
    exp(s + β - shift) / |mass|. Packed: [T, H, ...] and cu_seqlens. What lies in padding is not written.
    """
    tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "sink_state": sink_state, "sink_logits": sink_logits}
    sinks = {"sink_positions": sink_positions, "inter_sink_bias": inter_sink_bias, "streams": streams}
    _launch(
        sink_attention_fwd_kernel,
        {**tensors, **sinks, "seq_lens": seq_lens, "cu_seqlens": cu_seqlens, "dropout": dropout},
        {"causal": causal, "left_padded": left_padded, "scale": scale},
        config or _heuristic(q, v, dropout).fwd,
    )


def launch_sink_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    sink_state: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    sink_positions: Tensor,
    inter_sink_bias: Tensor,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    streams: Streams,
    dropout: Dropout = NO_DROPOUT,
    *,
    causal: bool,
    left_padded: bool,
    scale: float,
    config: SinkAttentionConfig | None = None,
) -> Tensor:
    """Write dq whole, and dk and dv but for the pairs of sinks; returns D = Σ dO·O at the sinks, [B, Hq, M]."""
    config = config or _heuristic(q, v, dropout)
    B, M = sink_positions.shape
    sink_delta = lse.new_empty(B, q.shape[1], M)
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    tensors |= {"sink_state": sink_state, "delta": torch.empty_like(lse), "sink_delta": sink_delta}
    sinks = {"sink_positions": sink_positions, "inter_sink_bias": inter_sink_bias, "streams": streams}
    tensors |= {**sinks, "seq_lens": seq_lens, "cu_seqlens": cu_seqlens, "dropout": dropout}
    options = {"causal": causal, "left_padded": left_padded, "scale": scale}
    _launch(sink_attention_bwd_dq_kernel, tensors, options, config.bwd_dq)
    _launch(sink_attention_bwd_dkdv_kernel, tensors, options, config.bwd_dkdv)
    return sink_delta


def _launch(kernel, tensors: dict[str, object], options: dict[str, object], config: TileConfig) -> None:
    if tensors["q"].numel() == 0:
        return
    arguments = _arguments(kernel, tensors, options, config)
    by_query = kernel is not sink_attention_bwd_dkdv_kernel
    B, N = arguments["B"], arguments["N"]

    def grid(launched: dict[str, object]) -> tuple[int, int]:
        block, spare = (launched["BLOCK_M"], 2) if by_query else (launched["BLOCK_N"], 1)
        tiles = number_of_tiles(B, N, tensors["cu_seqlens"], block, spare)
        return tiles, tensors["q" if by_query else "k"].shape[1]

    launch_options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if os.environ.get("RECATTN_AUTOTUNE") == "1":
        kind = kind_of(tensors["q"].dtype, tensors["dropout"].seed is not None)
        kernel, launch_options = _autotuned(kernel, kind), {}
        arguments = {name: x for name, x in arguments.items() if name not in _TUNED}
    with torch.cuda.device_of(tensors["q"]):
        launch_kernel(kernel, grid, arguments, **launch_options)


# What autotuning chooses.
_TUNED = ("BLOCK_M", "BLOCK_N", "BLOCK_S")


@functools.cache
def _autotuned(kernel, kind: str):
    """The kernel, timing its candidates at the first call of a head dim and dtype."""
    name = {sink_attention_fwd_kernel: "fwd", sink_attention_bwd_dq_kernel: "bwd_dq"}.get(kernel, "bwd_dkdv")
    configs = []
    for tile in candidates(name, kind):
        blocks = dict(zip(_TUNED, (tile.block_m, tile.block_n, tile.block_s), strict=True))
        own = {name: size for name, size in blocks.items() if name in kernel.arg_names}
        configs.append(triton.Config(own, num_warps=tile.num_warps, num_stages=tile.num_stages))
    return triton.autotune(configs, key=["HEAD_DIM", "V_HEAD_DIM"])(kernel)


# The letters of each tensor's strides.
_STRIDES = {"q": "q", "k": "k", "v": "v", "out": "o", "dout": "g", "dq": "dq", "dk": "dk", "dv": "dv"}


def _arguments(kernel, tensors: dict[str, object], options: dict[str, object], config: TileConfig) -> dict[str, object]:
    """The arguments of one of the flash kernels by name."""
    cu_seqlens, streams, dropout = tensors["cu_seqlens"], tensors["streams"], tensors["dropout"]
    bias, positions = tensors["inter_sink_bias"], tensors["sink_positions"]
    B, M = positions.shape
    dense = {name: as_dense(tensors[name], cu_seqlens) for name in (*_STRIDES, "lse") if name in tensors}
    num_q_heads, N = dense["q"].shape[1:3]
    head_dim, value_dim = dense["k"].shape[3], dense["v"].shape[3]
    bias = bias.expand(B, num_q_heads, M, M)
    everything = {
        **tensors,
        **streams._asdict(),
        "inter_sink_bias": bias,
        "dropout_seed": dropout.seed,
        "dropped": dropout.threshold,
        **{
            key: value
            for name, x in _STRIDES.items()
            if name in dense
            for key, value in strides(x, dense[name], "bhnd").items()
        },
        **strides("l", dense["lse"], "bhn"),
        **strides("p", positions, "bm"),
        **strides("b", bias, "bhmn"),
        "stride_tb": N if cu_seqlens is None else 0,
        "B": B,
        "num_q_heads": num_q_heads,
        "group_size": num_q_heads // dense["k"].shape[1],
        "N": N,
        "M": M,
        "scale": options["scale"],
        "causal": int(options["causal"]),
        "left_padded": int(options["left_padded"]),
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": value_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(value_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_S": config.block_s,
        # Blocks have up to 128 keys.
        "WIDE": any(128 * x.stride(2) + x.shape[3] * x.stride(3) >= 2**31 for x in (dense["k"], dense["v"])),
    }
    return {name: everything[name] for name in kernel.arg_names}


def _heuristic(q: Tensor, v: Tensor, dropout: Dropout) -> SinkAttentionConfig:
    width = max(q.shape[-1], v.shape[-1])
    return SinkAttentionConfig.heuristic(width, q.dtype, architecture_of(q), dropout=dropout.seed is not None)


def shipped_configurations() -> Iterator[Compilation]:
    """What is launched for the head dims and dtypes in use; the lengths are of no help to alignment."""
    positions = torch.empty(2, 49, dtype=torch.int64, device="meta")
    bias = torch.empty(2, 1, 49, 49, device="meta")
    lse = torch.empty(2, 8, 500, device="meta")
    streams = Streams(
        *(torch.empty(2, 500, dtype=dtype, device="meta") for dtype in (torch.int8, torch.int32)),
        torch.empty(2, 2, dtype=torch.int32, device="meta"),
    )
    arguments = _stream_arguments(streams, positions, None, None, False, 500)
    for architecture in ARCHITECTURES:
        yield Compilation.of(sink_attention_streams_kernel, "", architecture, arguments, 4, 3)
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    for architecture, dtype, head_dim, dropout in itertools.product(
        ARCHITECTURES, (torch.float32, torch.bfloat16), (32, 64, 128, 256), (NO_DROPOUT, Dropout(seed, 6554))
    ):
        q, kv = (torch.empty(2, heads, 500, head_dim, dtype=dtype, device="meta") for heads in (8, 4))
        tensors = {"q": q, "k": kv, "v": kv, "out": q, "dout": q, "dq": q, "dk": kv, "dv": kv, "lse": lse}
        tensors |= {"delta": lse, "sink_delta": lse, "sink_state": lse, "sink_logits": None, "streams": streams}
        tensors |= {"sink_positions": positions, "inter_sink_bias": bias, "dropout": dropout}
        tensors |= {"seq_lens": None, "cu_seqlens": None}
        options = {"causal": True, "left_padded": False, "scale": 0.125}
        config = SinkAttentionConfig.heuristic(head_dim, dtype, architecture, dropout=dropout is not NO_DROPOUT)
        for kernel, tile in (
            (sink_attention_fwd_kernel, config.fwd),
            (sink_attention_bwd_dq_kernel, config.bwd_dq),
            (sink_attention_bwd_dkdv_kernel, config.bwd_dkdv),
        ):
            label = f"{str(dtype).removeprefix('torch.')} D={head_dim} {tile.block_m}x{tile.block_n}"
            label += " dropout" if dropout is not NO_DROPOUT else ""
            yield Compilation.of(
                kernel, label, architecture, _arguments(kernel, tensors, options, tile), tile.num_warps, tile.num_stages
            )

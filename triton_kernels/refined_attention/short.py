"""refined_attention of short sequences: everything of one (batch, head) pair in one program.

The weight matrix A [N, N] and what is made of it stay in registers. W_q and W_k come in as one matrix,

    Q'K'ᵀ / √R = A G Aᵀ,        G = W_q W_kᵀ / √R,

which saves a product and makes R a matter of G alone; dW_q and dW_k follow from dG. Above 64 tokens a program takes a
block of the rows, from A in full.

The backward recomputes the forward. Its launches take one share of the pairs after another, so that those of a share
can each have their own sum of dG and dW_v, and, where one program cannot hold it all, their own [N, N] in memory.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn.triton_kernels.common.compilation import Compilation
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import ARCHITECTURES, architecture_of, launch_kernel, strides
from recattn.triton_kernels.common.ragged import locate_sequence
from recattn.triton_kernels.common.tiles import (
    Matrix,
    Tokens,
    block_width,
    load_rows,
    load_tokens,
    offset,
    store_tokens,
)
from recattn.triton_kernels.refined_attention.config import RefinedAttentionConfig, largest_n

# --- One pair ---


class Pair(NamedTuple):
    """One (batch, head)."""

    batch: tl.tensor
    head: tl.tensor
    plane: tl.tensor  # which of all pairs
    size: tl.tensor  # N
    first: tl.tensor  # position that holds a token
    end: tl.tensor
    causal: tl.tensor


class Weights(NamedTuple):
    """What rows of A are refined to."""

    queries: tl.tensor  # A G
    inner: tl.tensor  # softmax(mask(A G Aᵀ)); unused by the simple mechanism
    final: tl.tensor  # softmax(mask(M)), float32, negative where dropout drops a weight


@triton.jit
def load_pair(batch, head, num_heads, N, seq_lens, left_padded, causal):
    _, length, first = locate_sequence(batch, N, seq_lens, None, left_padded)
    return Pair(batch, head, batch * num_heads + head, N, first, first + length, causal)


@triton.jit
def tokens_at(pair, positions):
    return Tokens(positions, (positions >= pair.first) & (positions < pair.end))


@triton.jit
def positions_at(pair, positions):
    """The same with padding, where zeros are stored."""
    return Tokens(positions, positions < pair.size)


@triton.jit
def visible_pairs(pair, rows, keys):
    """[rows, keys], True where a row sees a key."""
    past = (pair.causal == 0) | (keys.positions[None, :] <= rows.positions[:, None])
    return rows.valid[:, None] & keys.valid[None, :] & past


@triton.jit
def matrix_of(pair, base, stride_b, stride_h, stride_n, stride_d):
    """A pair's [N, D] of a tensor [B, H, N, D]."""
    return Matrix(base + pair.batch * stride_b + pair.head * stride_h, stride_n, stride_d)


@triton.jit
def contiguous_of(pair, base, WIDTH: tl.constexpr):
    """The same where the tensor is contiguous."""
    return Matrix(base + pair.plane * (pair.size * WIDTH), WIDTH, 1)


@triton.jit
def columns_from(x, start):
    """A Matrix without its first columns."""
    return Matrix(x.base + offset(start, x.column_stride), x.row_stride, x.column_stride)


@triton.jit
def load_square(pair, x, BLOCK_N: tl.constexpr):
    """The leading N rows and columns of a Matrix."""
    rows = positions_at(pair, tl.arange(0, BLOCK_N))
    return load_rows(x.base, rows.positions, rows.valid, x.row_stride, x.column_stride, pair.size, BLOCK_N)


@triton.jit
def softmax_of_visible(scores, visible):
    """The softmax of each row over what it sees; 0 where it sees nothing."""
    scores = tl.where(visible, scores, -float("inf"))
    shift = tl.max(scores, 1)
    shift = tl.where(shift == -float("inf"), 0.0, shift)
    weights = tl.exp(scores - shift[:, None])
    mass = tl.sum(weights, 1)
    return weights / tl.where(mass == 0.0, 1.0, mass)[:, None]  # NaN stays


@triton.jit
def softmax_backward(weights, dweights):
    return weights * (dweights - tl.sum(weights * dweights, 1)[:, None])


@triton.jit
def dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def source_rows(
    pair, rows, keys, q, k, scale, HEAD_DIM: tl.constexpr, FROM_WEIGHTS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of A."""
    logits = tl.zeros([rows.positions.shape[0], keys.positions.shape[0]], tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        q_block = load_tokens(columns_from(q, start), rows, HEAD_DIM - start, BLOCK_D)
        k_block = load_tokens(columns_from(k, start), keys, HEAD_DIM - start, BLOCK_D)
        logits = dot(q_block, tl.trans(k_block), logits)
    logits *= scale
    if FROM_WEIGHTS:
        a = softmax_of_visible(logits, visible_pairs(pair, rows, keys))
    else:
        a = tl.where(visible_pairs(pair, rows, keys), logits, 0.0)
    return a.to(q.base.dtype.element_ty)


@triton.jit
def refine(pair, rows, keys, a_rows, a, inner_values, g, dropout, ADDS_SOURCE: tl.constexpr):
    """Rows of the final weights, from the same rows of A and all of A."""
    BLOCK_N: tl.constexpr = keys.positions.shape[0]
    visible = visible_pairs(pair, rows, keys)
    queries = dot(a_rows, load_square(pair, g, BLOCK_N)).to(a.dtype)
    m = dot(queries, tl.trans(a))
    inner = queries  # Triton 3.5 and 3.6 take no None in a tuple that is returned
    if inner_values is not None:
        inner = softmax_of_visible(m, visible).to(a.dtype)
        m = dot(inner, inner_values)
    if ADDS_SOURCE:
        m += a_rows
    final = softmax_of_visible(m, visible)
    if dropout.seed is not None:
        plane = pair.plane.to(tl.int32)
        keep = dropout_weights(tl.load(dropout.seed), plane, 0, rows.positions, 0, dropout.threshold, BLOCK_N)
        final = tl.where(keep > 0.0, final, -final)
    return Weights(queries, inner, final)


@triton.jit
def after_dropout(final, dropout):
    """The final weights that multiply V."""
    if dropout.seed is not None:
        # By itself a GPU's maximum of NaN and 0 is 0.
        final = tl.maximum(final, 0.0, propagate_nan=tl.PropagateNan.ALL) * (65536.0 / (65536 - dropout.threshold))
    return final


@triton.jit(do_not_specialize=["stride_wh", "stride_wn", "num_heads", "N", "causal", "left_padded", "dropped"])
def refined_attention_fwd_kernel(
    q,
    k,
    v,
    out,
    g,
    w_v,
    seq_lens,
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
    stride_gh,
    stride_wh,
    stride_wn,
    stride_wk,
    num_heads,
    N,
    scale,
    causal,
    left_padded,
    dropped,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    ADDS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (i, j) takes the j-th block of rows of the i-th pair."""
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    pair = load_pair(batch, head, num_heads, N, seq_lens, left_padded, causal)
    positions = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tokens_at(pair, positions)
    keys = tokens_at(pair, tl.arange(0, BLOCK_N))
    q = matrix_of(pair, q, stride_qb, stride_qh, stride_qn, stride_qd)
    k = matrix_of(pair, k, stride_kb, stride_kh, stride_kn, stride_kd)
    v = matrix_of(pair, v, stride_vb, stride_vh, stride_vn, stride_vd)
    out = contiguous_of(pair, out, VALUE_DIM)

    a = source_rows(pair, keys, keys, q, k, scale, HEAD_DIM, FROM_WEIGHTS, BLOCK_D)
    a_rows = a
    if BLOCK_M < BLOCK_N:
        a_rows = source_rows(pair, rows, keys, q, k, scale, HEAD_DIM, FROM_WEIGHTS, BLOCK_D)
    inner_values = None
    if w_v is not None:
        w_v = Matrix(w_v + head * stride_wh, stride_wn, stride_wk)
        inner_values = dot(a, load_square(pair, w_v, BLOCK_N)).to(a.dtype)
    g = Matrix(g + head * stride_gh, BLOCK_N, 1)
    dropout = Dropout(dropout_seed, dropped)
    weights = refine(pair, rows, keys, a_rows, a, inner_values, g, dropout, ADDS_SOURCE)

    stored = positions_at(pair, positions)
    final = after_dropout(weights.final, dropout).to(a.dtype)
    for start in range(0, VALUE_DIM, BLOCK_D):
        v_block = load_tokens(columns_from(v, start), keys, VALUE_DIM - start, BLOCK_D)
        store_tokens(columns_from(out, start), dot(final, v_block), stored, VALUE_DIM - start, BLOCK_D)


# Of the backward: all of it in one program a pair, or in three launches by blocks of rows.
ALL: tl.constexpr = tl.constexpr(0)
TO_M: tl.constexpr = tl.constexpr(1)
TO_Q: tl.constexpr = tl.constexpr(2)
TO_K: tl.constexpr = tl.constexpr(3)


class HandedOn(NamedTuple):
    """What the launches of a backward in three leave for the next, [N, N] each."""

    a: tl.tensor
    final: tl.tensor  # the final weights
    queries: tl.tensor  # A G
    dqueries: tl.tensor
    dscores: tl.tensor  # the gradient of the inner scores
    inner: tl.tensor  # the inner weights
    dvalues: tl.tensor  # the gradient of A W_v
    dm: tl.tensor  # that of M
    dlogits: tl.tensor  # that of scale · QKᵀ but for the scale


@triton.jit
def handed_on_by(base, slot, BLOCK_N: tl.constexpr):
    SIZE: tl.constexpr = BLOCK_N * BLOCK_N
    x = base + slot * (9 * SIZE)
    return HandedOn(
        x, x + SIZE, x + 2 * SIZE, x + 3 * SIZE, x + 4 * SIZE, x + 5 * SIZE, x + 6 * SIZE, x + 7 * SIZE, x + 8 * SIZE
    )


@triton.jit
def add_to_partial(addresses, product, accumulates):
    """Add to what only this program of a launch reads and writes."""
    if accumulates:
        product += tl.load(addresses)
    tl.store(addresses, product)


@triton.jit(
    do_not_specialize=["stride_wh", "stride_wn", "num_heads", "N", "first_pair", "causal", "left_padded", "dropped"]
)
def refined_attention_bwd_kernel(
    dout,
    q,
    k,
    v,
    dq,
    dk,
    dv,
    dg,
    dw_v,
    handed_on,
    g,
    w_v,
    seq_lens,
    dropout_seed,
    stride_dob,
    stride_doh,
    stride_don,
    stride_dod,
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
    stride_gh,
    stride_wh,
    stride_wn,
    stride_wk,
    num_heads,
    N,
    first_pair,
    scale,
    causal,
    left_padded,
    dropped,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    ADDS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Program (i, j, r) takes block r of the rows of pair first_pair + i of the j-th group of heads.

    It adds to those rows of sum (i, j) of dG and dW_v.
    """
    dtype: tl.constexpr = q.dtype.element_ty
    heads = num_heads // tl.num_programs(1)  # of a group
    index = first_pair + tl.program_id(0)
    batch = (index // heads).to(tl.int64)
    head = (tl.program_id(1) * heads + index % heads).to(tl.int64)
    pair = load_pair(batch, head, num_heads, N, seq_lens, left_padded, causal)
    columns = tl.arange(0, BLOCK_N)
    row_positions = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tokens_at(pair, columns)
    rows = tokens_at(pair, row_positions)
    stored = positions_at(pair, row_positions)
    slot = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    partial = slot * (BLOCK_N * BLOCK_N)  # which sum
    square = columns[:, None] * BLOCK_N + columns[None, :]
    own = row_positions[:, None] * BLOCK_N + columns[None, :]
    own_t = row_positions[:, None] + columns[None, :] * BLOCK_N
    if STAGE != ALL:
        handed_on = handed_on_by(handed_on, slot, BLOCK_N)
    q = matrix_of(pair, q, stride_qb, stride_qh, stride_qn, stride_qd)
    k = matrix_of(pair, k, stride_kb, stride_kh, stride_kn, stride_kd)
    dout = matrix_of(pair, dout, stride_dob, stride_doh, stride_don, stride_dod)
    g = Matrix(g + head * stride_gh, BLOCK_N, 1)
    if w_v is not None:
        w_v = Matrix(w_v + head * stride_wh, stride_wn, stride_wk)
    if (STAGE == ALL) | (STAGE == TO_M):
        a = source_rows(pair, keys, keys, q, k, scale, HEAD_DIM, FROM_WEIGHTS, BLOCK_D)
        a_rows = a
        if BLOCK_M < BLOCK_N:
            a_rows = source_rows(pair, rows, keys, q, k, scale, HEAD_DIM, FROM_WEIGHTS, BLOCK_D)
        v = matrix_of(pair, v, stride_vb, stride_vh, stride_vn, stride_vd)
        inner_values = None
        if w_v is not None:
            inner_values = dot(a, load_square(pair, w_v, BLOCK_N)).to(dtype)
        dropout = Dropout(dropout_seed, dropped)
        weights = refine(pair, rows, keys, a_rows, a, inner_values, g, dropout, ADDS_SOURCE)
        if STAGE == TO_M:
            tl.store(handed_on.a + own, a_rows)
            tl.store(handed_on.queries + own, weights.queries)
            if w_v is not None:
                tl.store(handed_on.inner + own, weights.inner)
        dfinal = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, VALUE_DIM, BLOCK_D):
            dout_block = load_tokens(columns_from(dout, start), rows, VALUE_DIM - start, BLOCK_D)
            v_block = load_tokens(columns_from(v, start), keys, VALUE_DIM - start, BLOCK_D)
            dfinal = dot(dout_block, tl.trans(v_block), dfinal)
        final = after_dropout(weights.final, dropout)
        products = final * dfinal
        dm = (products - tl.abs(weights.final) * tl.sum(products, 1)[:, None]).to(dtype)
        final = final.to(dtype)
        dscores = dm
        if w_v is not None:
            dscores = softmax_backward(weights.inner.to(tl.float32), dot(dm, tl.trans(inner_values))).to(dtype)
        if STAGE == TO_M:
            tl.store(handed_on.final + own, final)
            tl.store(handed_on.dscores + own, dscores)
            if w_v is not None:
                tl.store(handed_on.dm + own, dm)

    if (STAGE == ALL) | (STAGE == TO_Q):
        final_t = tl.trans(final) if STAGE == ALL else tl.load(handed_on.final + own_t)
        dv = contiguous_of(pair, dv, VALUE_DIM)
        for start in range(0, VALUE_DIM, BLOCK_D):
            dout_block = load_tokens(columns_from(dout, start), keys, VALUE_DIM - start, BLOCK_D)
            dv_block = dot(final_t, dout_block)
            store_tokens(columns_from(dv, start), dv_block, stored, VALUE_DIM - start, BLOCK_D)
        if w_v is not None:
            inner_t = tl.trans(weights.inner) if STAGE == ALL else tl.load(handed_on.inner + own_t)
            dm_all = dm if STAGE == ALL else tl.load(handed_on.dm + square)
            dvalues = dot(inner_t, dm_all).to(dtype)
            if STAGE == ALL:
                add_to_partial(dw_v + partial + own, dot(tl.trans(a), dvalues), first_pair > 0)
            else:
                tl.store(handed_on.dvalues + own, dvalues)
        if STAGE == TO_Q:
            dscores = tl.load(handed_on.dscores + own)
        dqueries = dot(dscores, a if STAGE == ALL else tl.load(handed_on.a + square)).to(dtype)
        if STAGE == ALL:
            add_to_partial(dg + partial + own, dot(tl.trans(a), dqueries), first_pair > 0)
        else:
            tl.store(handed_on.dqueries + own, dqueries)
        dscores_t = tl.trans(dscores) if STAGE == ALL else tl.load(handed_on.dscores + own_t)
        da = dot(dscores_t, weights.queries if STAGE == ALL else tl.load(handed_on.queries + square))
        da = dot(dqueries, tl.trans(load_square(pair, g, BLOCK_N)), da)
        if w_v is not None:
            da = dot(dvalues, tl.trans(load_square(pair, w_v, BLOCK_N)), da)
        if ADDS_SOURCE:
            da += dm if STAGE == ALL else tl.load(handed_on.dm + own)
        if FROM_WEIGHTS:
            a_rows = a if STAGE == ALL else tl.load(handed_on.a + own)
            dlogits = softmax_backward(a_rows.to(tl.float32), da).to(dtype)
        else:
            dlogits = tl.where(visible_pairs(pair, rows, keys), da, 0.0).to(dtype)
        dq = contiguous_of(pair, dq, HEAD_DIM)
        for start in range(0, HEAD_DIM, BLOCK_D):
            # The scale comes last: it might take gradients out of half precision.
            k_block = load_tokens(columns_from(k, start), keys, HEAD_DIM - start, BLOCK_D)
            dq_block = scale * dot(dlogits, k_block)
            store_tokens(columns_from(dq, start), dq_block, stored, HEAD_DIM - start, BLOCK_D)
        if STAGE == TO_Q:
            tl.store(handed_on.dlogits + own, dlogits)

    if (STAGE == ALL) | (STAGE == TO_K):
        dlogits_t = tl.trans(dlogits) if STAGE == ALL else tl.load(handed_on.dlogits + own_t)
        dk = contiguous_of(pair, dk, HEAD_DIM)
        for start in range(0, HEAD_DIM, BLOCK_D):
            q_block = load_tokens(columns_from(q, start), keys, HEAD_DIM - start, BLOCK_D)
            dk_block = scale * dot(dlogits_t, q_block)
            store_tokens(columns_from(dk, start), dk_block, stored, HEAD_DIM - start, BLOCK_D)
    if STAGE == TO_K:
        a_t = tl.load(handed_on.a + own_t)
        add_to_partial(dg + partial + own, dot(a_t, tl.load(handed_on.dqueries + square)), first_pair > 0)
        if w_v is not None:
            add_to_partial(dw_v + partial + own, dot(a_t, tl.load(handed_on.dvalues + square)), first_pair > 0)


# --- Launchers ---


def launch_refined_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor | None,
    seq_lens: Tensor | None,
    dropout: Dropout = NO_DROPOUT,
    *,
    mechanism: str,
    source: str,
    causal: bool,
    left_padded: bool,
    scale: float,
    config: RefinedAttentionConfig | None = None,
) -> Tensor:
    """out [B, H, N, Dv], zero at padding.

    q, k [B, H, N, D]; v [B, H, N, Dv]; w_q, w_k [Nmax, R] or [H, Nmax, R]; w_v [Nmax, Nmax] or [H, Nmax, Nmax], or
    None for the simple mechanism; seq_lens [B] or None.
    """
    B, H, N, _ = q.shape
    out = v.new_empty(v.shape)
    if out.numel() == 0:
        return out
    config = config or _heuristic(q, v, mechanism)
    g = _product_of_weights(w_q, w_k, N)
    options = (seq_lens, dropout, mechanism, source, causal, left_padded, scale, config.fwd)
    arguments = _fwd_arguments(q, k, v, out, g, w_v, *options)
    with torch.cuda.device_of(q):
        grid = (B * H, triton.cdiv(N, config.fwd.block_m))
        launch_kernel(refined_attention_fwd_kernel, grid, arguments, **config.fwd.launch_options)
    return out


def launch_refined_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor | None,
    seq_lens: Tensor | None,
    dropout: Dropout = NO_DROPOUT,
    *,
    mechanism: str,
    source: str,
    causal: bool,
    left_padded: bool,
    scale: float,
    config: RefinedAttentionConfig | None = None,
) -> list[Tensor]:
    """dq, dk, dv, dw_q, dw_k and, where there is w_v, dw_v: of the shapes of what they are gradients of, contiguous."""
    B, H, N, _ = q.shape
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    dweights = [w.new_zeros(w.shape) for w in (w_q, w_k, w_v) if w is not None]
    if B * H * N == 0:
        return [dq, dk, dv, *dweights]
    if v.shape[3] == 0:
        return [dq.zero_(), dk.zero_(), dv, *dweights]
    config = config or _heuristic(q, v, mechanism)
    g = _product_of_weights(w_q, w_k, N)
    groups = H if any(w.dim() == 3 for w in (w_q, w_k, w_v) if w is not None) else 1
    pairs = B * H // groups
    slots = min(pairs, _slots(q, groups))
    size = block_width(N)
    # Of dG and dW_v.
    partials = [q.new_empty((slots, groups, size, size), dtype=torch.float32) for _ in dweights[1:]]
    handed_on = q.new_empty((slots, groups, len(HandedOn._fields), size, size)) if len(config.bwd) > 1 else None
    options = (seq_lens, dropout, mechanism, source, causal, left_padded, scale)
    with torch.cuda.device_of(q):
        for first_pair in range(0, pairs, slots):
            for stage in config.bwd:
                arguments = _bwd_arguments(
                    dout, q, k, v, dq, dk, dv, partials, handed_on, g, w_v, first_pair, *options, stage
                )
                grid = (min(slots, pairs - first_pair), groups, size // stage.block_m)
                launch_kernel(refined_attention_bwd_kernel, grid, arguments, **stage.launch_options)
    dg, *dw_v = (x.sum(0)[..., :N, :N] for x in partials)
    factor = w_q.shape[-1] ** -0.5
    sums = [factor * (dg @ w_k[..., :N, :].float()), factor * (dg.mT @ w_q[..., :N, :].float()), *dw_v]
    for total, dw in zip(dweights, sums, strict=True):
        total[..., :N, : dw.shape[-1]] = dw if total.dim() == 3 else dw.sum(0)
    return [dq, dk, dv, *dweights]


# Pairs that a launch of the backward takes for each multiprocessor, by BLOCK_N.
PARTIAL_WAVES = {16: 32, 32: 16, 64: 8, 128: 2}


def _product_of_weights(w_q: Tensor, w_k: Tensor, N: int) -> Tensor:
    """G = W_q W_kᵀ / √R [1 or H, BLOCK_N, BLOCK_N], zero beyond the leading N rows and columns."""
    g = w_q[..., :N, :].float() @ w_k[..., :N, :].float().mT * w_q.shape[-1] ** -0.5
    padding = block_width(N) - N
    return F.pad(g.to(w_q.dtype), (0, padding, 0, padding)).view(-1, N + padding, N + padding)


def _matrix_strides(name: str, w: Tensor | None, axes: str) -> dict[str, int]:
    """The strides of [H, ...], or of [...], one matrix for all heads."""
    if w is None or w.dim() == 3:
        return strides(name, w, axes)
    return {f"stride_{name}{axes[0]}": 0, **strides(name, w, axes[1:])}


def _heuristic(q: Tensor, v: Tensor, mechanism: str) -> RefinedAttentionConfig:
    return RefinedAttentionConfig.heuristic(
        q.shape[2], max(q.shape[3], v.shape[3]), q.dtype, architecture_of(q), mechanism
    )


def _slots(q: Tensor, groups: int) -> int:
    """How many pairs of a group of heads a launch of the backward takes; few by the interpreter, for several launches.

    Each has sums of its own, which should stay in the cache until the next launch adds to them.
    """
    if q.device.type != "cuda":
        return 4
    waves = PARTIAL_WAVES[block_width(q.shape[2])]
    return triton.cdiv(waves * torch.cuda.get_device_properties(q.device).multi_processor_count, groups)


def _fwd_arguments(q, k, v, out, g, w_v, *options) -> dict[str, object]:
    """The arguments of the forward kernel by name."""
    return {**_shared_arguments(q, k, v, g, w_v, *options), "out": out}


def _bwd_arguments(dout, q, k, v, dq, dk, dv, partials, handed_on, g, w_v, first_pair, *options) -> dict[str, object]:
    """The arguments of the backward kernel by name."""
    dg, dw_v = partials if len(partials) > 1 else (*partials, None)
    stage = options[-1]
    return {
        **_shared_arguments(q, k, v, g, w_v, *options),
        "dout": dout,
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "dg": dg,
        "dw_v": dw_v,
        "handed_on": handed_on,
        "first_pair": first_pair,
        **strides("do", dout, "bhnd"),
        "STAGE": stage.stage,
    }


def _shared_arguments(
    q, k, v, g, w_v, seq_lens, dropout, mechanism, source, causal, left_padded, scale, config
) -> dict[str, object]:
    _, num_heads, N, head_dim = q.shape
    return {
        "q": q,
        "k": k,
        "v": v,
        "g": g,
        "w_v": w_v,
        "seq_lens": seq_lens,
        "dropout_seed": dropout.seed,
        **strides("q", q, "bhnd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        "stride_gh": g.stride(0) if g.shape[0] > 1 else 0,
        **_matrix_strides("w", w_v, "hnk"),
        "num_heads": num_heads,
        "N": N,
        "scale": scale,
        "causal": int(causal),
        "left_padded": int(left_padded),
        "dropped": dropout.threshold,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": v.shape[3],
        "FROM_WEIGHTS": source == "weights",
        "ADDS_SOURCE": mechanism == "additive",
        "BLOCK_M": config.block_m,
        "BLOCK_N": g.shape[-1],
        "BLOCK_D": config.block_d,
    }


def shipped_configurations() -> Iterator[Compilation]:
    """What is launched for the head dims and dtypes in use, with every option; "value" asks for no more than these."""
    single, half = torch.float32, torch.bfloat16
    for architecture, dtype in itertools.product(ARCHITECTURES, (single, half)):
        lengths = [N for N in (32, 50, 100) if largest_n(dtype, architecture) >= N]
        kinds = [(64, "simple"), (128, "simple"), (32, "additive"), (64, "additive"), (128, "additive")]
        for N, (head_dim, mechanism) in itertools.product(lengths, kinds):
            yield from _compilations(architecture, dtype, N, head_dim, mechanism)


def _compilations(
    architecture: int, dtype: torch.dtype, N: int, head_dim: int, mechanism: str
) -> Iterator[Compilation]:
    size = block_width(N)
    q = torch.empty(2, 4, N, head_dim, dtype=dtype, device="meta")
    partial = torch.empty(8, 1, size, size, device="meta")
    g, w = (torch.empty(1, width, width, dtype=dtype, device="meta") for width in (size, 200))
    w_v = None if mechanism == "simple" else w
    seq_lens, seed = (torch.empty(2, dtype=torch.int64, device="meta") for _ in range(2))
    options = (seq_lens, Dropout(seed, 100), mechanism, "weights", True, False, 0.125)
    config = RefinedAttentionConfig.heuristic(N, head_dim, dtype, architecture, mechanism)
    launches = [(refined_attention_fwd_kernel, config.fwd, _fwd_arguments(q, q, q, q, g, w_v, *options, config.fwd))]
    for stage in config.bwd:
        partials, handed_on = [partial] * (1 if w_v is None else 2), g if len(config.bwd) > 1 else None
        arguments = _bwd_arguments(q, q, q, q, q, q, q, partials, handed_on, g, w_v, 0, *options, stage)
        launches.append((refined_attention_bwd_kernel, stage, arguments))
    for kernel, tiles, arguments in launches:
        stage = f" stage {tiles.stage}" if kernel is refined_attention_bwd_kernel else ""
        label = f"{str(dtype).removeprefix('torch.')} {mechanism} D={head_dim} {tiles.block_m}x{size}{stage}"
        yield Compilation.of(kernel, label, architecture, arguments, **tiles.launch_options)

"""refined_attention of short sequences, backward: its equations, and what each of its launches computes.

With P = softmax(mask(M)), P₁ = softmax(mask(A G Aᵀ)), Q₁ = A G and V₁ = A W_v, and rowsum(·) that of each row:

    dM  = P ∘ (dP - rowsum(P ∘ dP))             dP  = dO Vᵀ
    dS  = P₁ ∘ (dP₁ - rowsum(P₁ ∘ dP₁))         dP₁ = dM V₁ᵀ              simple: dS = dM
    dQ₁ = dS A          dV₁ = P₁ᵀ dM
    dA  = dSᵀ Q₁ + dQ₁ Gᵀ + dV₁ W_vᵀ            additive: + dM
    dL  = mask(dA), or A ∘ (dA - rowsum(A ∘ dA)) where A = softmax(mask(L)) with L = scale · Q Kᵀ
    dV  = Pᵀ dO         dQ = scale · dL K       dK  = scale · dLᵀ Q
    dG  = Aᵀ dQ₁        dW_v = Aᵀ dV₁           dW_q, dW_k follow from dG
"""

from typing import NamedTuple

import triton
import triton.language as tl

from recattn.triton_kernels.common.softmax import softmax_backward
from recattn.triton_kernels.common.tiles import load_tokens
from recattn.triton_kernels.refined_attention.short import (
    after_dropout,
    columns_from,
    contiguous_rows,
    dot,
    load_square,
    positions_at,
    refine_rows,
    store_product,
    visible_keys,
)


class Gradients(NamedTuple):
    """The outputs of the backward, contiguous; dw_v is None for the simple mechanism."""

    dq: tl.tensor  # [B, H, N, D]
    dk: tl.tensor
    dv: tl.tensor  # [B, H, N, Dv]
    dg: tl.tensor  # [batch-heads of a launch, groups, BLOCK_N, BLOCK_N] float32
    dw_v: tl.tensor


class Workspace(NamedTuple):
    """What a launch of three leaves for the next, [BLOCK_N, BLOCK_N] each for a batch and head."""

    a: tl.tensor
    p: tl.tensor
    q_refined: tl.tensor  # Q₁
    dq_refined: tl.tensor
    ds: tl.tensor
    p_inner: tl.tensor  # P₁
    dv_refined: tl.tensor  # dV₁
    dm: tl.tensor
    dlogits: tl.tensor  # dL


class Square(NamedTuple):
    """Offsets into a contiguous [BLOCK_N, BLOCK_N]."""

    all: tl.tensor  # all of it
    rows: tl.tensor  # this program's rows
    columns: tl.tensor  # this program's columns, transposed


@triton.jit
def workspace_of(base, BLOCK_N: tl.constexpr):
    SIZE: tl.constexpr = BLOCK_N * BLOCK_N
    x = base + partial_index() * (9 * SIZE)
    return Workspace(
        x, x + SIZE, x + 2 * SIZE, x + 3 * SIZE, x + 4 * SIZE, x + 5 * SIZE, x + 6 * SIZE, x + 7 * SIZE, x + 8 * SIZE
    )


@triton.jit
def partial_index():
    """Which partial sum, and which workspace, this program has. Computed where it is used: it would take registers."""
    return (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)


@triton.jit
def add_to_partial(partials, at, a_t, x, accumulates):
    """Add a_t @ x to rows of a sum that only this program of the launch reads and writes."""
    BLOCK_N: tl.constexpr = x.shape[1]
    addresses = partials + partial_index() * (BLOCK_N * BLOCK_N) + at.rows
    total = tl.zeros([a_t.shape[0], BLOCK_N], tl.float32)
    if accumulates:
        total = tl.load(addresses)
    tl.store(addresses, dot(a_t, x, total))


# --- The equations ---


@triton.jit
def mixed_gradient(refined, dout, x, rows, keys, dropout, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """P after dropout, and dM, of a block of rows, float32."""
    dp = tl.zeros([rows.positions.shape[0], keys.positions.shape[0]], tl.float32)
    for start in range(0, VALUE_DIM, BLOCK_D):
        dout_block = load_tokens(columns_from(dout, start), rows, VALUE_DIM - start, BLOCK_D)
        v_block = load_tokens(columns_from(x.v, start), keys, VALUE_DIM - start, BLOCK_D)
        dp = dot(dout_block, tl.trans(v_block), dp)
    p = after_dropout(refined.p, dropout)
    p_dp = p * dp
    return p, p_dp - tl.abs(refined.p) * tl.sum(p_dp, 1)[:, None]


@triton.jit
def scores_gradient(refined, dm, x):
    """dS of a block of rows."""
    dtype: tl.constexpr = refined.a.dtype
    ds = dm
    if x.w_v is not None:
        ds = softmax_backward(refined.p_inner.to(tl.float32), dot(dm.to(dtype), tl.trans(refined.v_refined)))
    return ds.to(dtype)


@triton.jit
def source_gradient(ds_t, q_refined, dq_refined, dv_refined, x, BLOCK_N: tl.constexpr):
    """dA = dSᵀ Q₁ + dQ₁ Gᵀ + dV₁ W_vᵀ of a block of rows."""
    da = dot(ds_t, q_refined)
    da = dot(dq_refined, tl.trans(load_square(x.g, BLOCK_N)), da)
    if x.w_v is not None:
        da = dot(dv_refined, tl.trans(load_square(x.w_v, BLOCK_N)), da)
    return da


@triton.jit
def reread(x, acc=None):
    """x [BLOCK_N, BLOCK_N] in float32, plus acc.

    The products have left x in shared memory. From there it comes back through the tensor cores, which are idle; kept
    in registers it would spill.
    """
    i = tl.arange(0, x.shape[0])
    return dot((i[:, None] == i[None, :]).to(x.dtype), x, acc)


@triton.jit
def logits_gradient(bh, rows, keys, a_rows, da, scale, FROM_WEIGHTS: tl.constexpr):
    """dL of a block of rows."""
    zero = 0.0 * scale  # a constant 0 would have the compiler select after rounding, which it then does entry by entry
    return softmax_backward(a_rows, da) if FROM_WEIGHTS else tl.where(visible_keys(bh, rows, keys), da, zero)


# --- The launches ---


@triton.jit
def bwd_at_once(
    bh,
    rows,
    keys,
    at,
    x,
    dout,
    grads,
    accumulates,
    scale,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    ADDS_SOURCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """All gradients, from all rows."""
    dtype: tl.constexpr = x.q.base.dtype.element_ty
    stored = positions_at(bh, rows.positions)
    refined = refine_rows(bh, rows, keys, x, scale, dropout, HEAD_DIM, FROM_WEIGHTS, ADDS_SOURCE, BLOCK_D)
    # In this order the fewest tiles are in registers at once.
    p, dm = mixed_gradient(refined, dout, x, rows, keys, dropout, VALUE_DIM, BLOCK_D)
    dv = contiguous_rows(bh, grads.dv, VALUE_DIM)
    store_product(dv, stored, tl.trans(p.to(dtype)), dout, keys, None, VALUE_DIM, BLOCK_D)
    dv_refined = None
    if x.w_v is not None:
        dv_refined = dot(tl.trans(refined.p_inner.to(dtype)), dm.to(dtype)).to(dtype)
        add_to_partial(grads.dw_v, at, tl.trans(refined.a), dv_refined, accumulates)
    ds = scores_gradient(refined, dm, x)
    dq_refined = dot(ds, refined.a).to(dtype)
    add_to_partial(grads.dg, at, tl.trans(refined.a), dq_refined, accumulates)
    da = source_gradient(tl.trans(ds), refined.q_refined, dq_refined, dv_refined, x, keys.positions.shape[0])
    a_rows = refined.a_rows
    if dtype != tl.float32:
        a_rows = reread(refined.a)
    if ADDS_SOURCE:
        da = reread(dm.to(dtype), da) if FROM_WEIGHTS and dtype != tl.float32 else da + dm
    dlogits = logits_gradient(bh, rows, keys, a_rows, da, scale, FROM_WEIGHTS).to(dtype)
    # The scale comes last: it might take gradients out of half precision.
    dq, dk = contiguous_rows(bh, grads.dq, HEAD_DIM), contiguous_rows(bh, grads.dk, HEAD_DIM)
    store_product(dq, stored, dlogits, x.k, keys, scale, HEAD_DIM, BLOCK_D)
    store_product(dk, stored, tl.trans(dlogits), x.q, keys, scale, HEAD_DIM, BLOCK_D)


@triton.jit
def bwd_to_scores(
    bh,
    rows,
    keys,
    at,
    x,
    dout,
    workspace,
    scale,
    dropout,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    ADDS_SOURCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The first launch of three: the forward again, dM and dS, of a block of rows."""
    refined = refine_rows(bh, rows, keys, x, scale, dropout, HEAD_DIM, FROM_WEIGHTS, ADDS_SOURCE, BLOCK_D)
    dtype: tl.constexpr = x.q.base.dtype.element_ty
    tl.store(workspace.a + at.rows, refined.a_rows.to(dtype))
    tl.store(workspace.q_refined + at.rows, refined.q_refined)
    if x.w_v is not None:
        tl.store(workspace.p_inner + at.rows, refined.p_inner.to(dtype))
    p, dm = mixed_gradient(refined, dout, x, rows, keys, dropout, VALUE_DIM, BLOCK_D)
    tl.store(workspace.p + at.rows, p.to(dtype))
    if x.w_v is not None:
        tl.store(workspace.dm + at.rows, dm.to(dtype))
    tl.store(workspace.ds + at.rows, scores_gradient(refined, dm, x))


@triton.jit
def bwd_to_q(
    bh,
    rows,
    keys,
    at,
    x,
    dout,
    grads,
    workspace,
    scale,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    ADDS_SOURCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The second launch of three: dV, dQ₁, dV₁, dL and dQ, of a block of rows."""
    dtype: tl.constexpr = x.q.base.dtype.element_ty
    stored = positions_at(bh, rows.positions)
    dv = contiguous_rows(bh, grads.dv, VALUE_DIM)
    store_product(dv, stored, tl.load(workspace.p + at.columns), dout, keys, None, VALUE_DIM, BLOCK_D)
    dv_refined = None
    if x.w_v is not None:
        dv_refined = dot(tl.load(workspace.p_inner + at.columns), tl.load(workspace.dm + at.all)).to(dtype)
        tl.store(workspace.dv_refined + at.rows, dv_refined)
    dq_refined = dot(tl.load(workspace.ds + at.rows), tl.load(workspace.a + at.all)).to(dtype)
    tl.store(workspace.dq_refined + at.rows, dq_refined)
    ds_t, q_refined = tl.load(workspace.ds + at.columns), tl.load(workspace.q_refined + at.all)
    da = source_gradient(ds_t, q_refined, dq_refined, dv_refined, x, keys.positions.shape[0])
    if ADDS_SOURCE:
        da += tl.load(workspace.dm + at.rows)
    a_rows = tl.load(workspace.a + at.rows).to(tl.float32)
    dlogits = logits_gradient(bh, rows, keys, a_rows, da, scale, FROM_WEIGHTS).to(dtype)
    dq = contiguous_rows(bh, grads.dq, HEAD_DIM)
    store_product(dq, stored, dlogits, x.k, keys, scale, HEAD_DIM, BLOCK_D)
    tl.store(workspace.dlogits + at.rows, dlogits)


@triton.jit
def bwd_to_k(
    bh, rows, keys, at, x, grads, workspace, accumulates, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """The last launch of three: dK, dG and dW_v, of a block of rows."""
    dk = contiguous_rows(bh, grads.dk, HEAD_DIM)
    dlogits_t = tl.load(workspace.dlogits + at.columns)
    store_product(dk, positions_at(bh, rows.positions), dlogits_t, x.q, keys, scale, HEAD_DIM, BLOCK_D)
    a_t = tl.load(workspace.a + at.columns)
    add_to_partial(grads.dg, at, a_t, tl.load(workspace.dq_refined + at.all), accumulates)
    if x.w_v is not None:
        add_to_partial(grads.dw_v, at, a_t, tl.load(workspace.dv_refined + at.all), accumulates)

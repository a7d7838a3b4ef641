"""x = A W of raw attention logits A without computing A, forward and backward: the launches of `projection_kernels`."""

from typing import NamedTuple

import torch
from torch import Tensor

from recattn.triton_kernels.common.launch import MAX_REGISTERS, architecture_of, cdiv, launch
from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.common.tiles import BHND, bhnd
from recattn.triton_kernels.refined_attention.config import RefinedProjectionConfig, segment_length
from recattn.triton_kernels.refined_attention.projection_kernels import (
    refined_projection_product_kernel,
    refined_projection_states_kernel,
)

# Programs that keep a GPU busy: for dW the sequences are split among as many.
FULL_GRID = 512


class Batch(NamedTuple):
    """The sequences of a call, and the mask of A."""

    size: int  # B
    positions: int  # N; where packed, a bound of the lengths
    lengths: Lengths
    causal: bool


class Group(NamedTuple):
    """The batch-heads that share W, batch by batch, and how programs split them."""

    heads: int
    size: int
    per_split: int
    num_splits: int


def launch_refined_projection_fwd(q: Tensor, k: Tensor, w: Tensor, batch: Batch, scale: float) -> Tensor:
    """x [B, H, N, P] = A W with A = mask(scale · Q Kᵀ), zero at future and padded entries; zero at padding.

    q, k [B, H, N, D]; w [Nmax, P] or [H, Nmax, P], of which the first N rows are used; any strides. Packed [T, H, D]
    gives [T, H, P].
    """
    w = rows_of_weights(w, q, batch)
    x = q.new_empty(*q.shape[:-1], w.shape[3])
    launch_product(q, k, w, launch_states(k, w, batch), x, batch, scale)
    return x


def launch_refined_projection_bwd(
    dx: Tensor, q: Tensor, k: Tensor, w: Tensor, batch: Batch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dw from dx, in the dtypes of q, k and w; zero at padding and in the rows of w beyond N.

    dw sums over sequences in the same order every time.
    """
    dw = w.new_zeros(w.shape)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    rows = rows_of_weights(w, q, batch)
    states = launch_states(k, rows, batch)  # [B·H, ., D, P]
    launch_product(dx, rows, k, None if states is None else states.mT, dq, batch, scale)
    del states  # frees its memory
    states = launch_states(q, dx, batch, reversed=True)
    launch_product(rows, dx, q, None if states is None else states.mT, dk, batch, scale, reversed=True)
    dw[..., : batch.positions, :] = launch_dw(k, q, dx, states, batch, scale, shared=w.dim() == 2)
    return dq, dk, dw


def launch_dw(
    k: Tensor, q: Tensor, dx: Tensor, states: Tensor | None, batch: Batch, scale: float, *, shared: bool
) -> Tensor:
    """dW, summed over the batch, and with `shared` over the heads: float32 [H, N, P], or [N, P]."""
    B, N, H, D, P = batch.size, batch.positions, k.shape[1], k.shape[-1], dx.shape[-1]
    groups, heads, size = (1, H, B * H) if shared else (H, 1, B)
    config = RefinedProjectionConfig.of_product(D, P, k.dtype, architecture_of(k))
    tiles = cdiv(N, config.block_m) * cdiv(P, config.block_f) * groups
    per_split = cdiv(size, min(size, cdiv(FULL_GRID, max(tiles, 1)))) if size > 0 else 1
    group = Group(heads, size, per_split, cdiv(size, per_split))
    partials = k.new_empty(group.num_splits, groups, N, P, dtype=torch.float32)
    launch_product(k, q, dx, states, partials, batch, scale, reversed=True, summed_over=group)
    total = partials.sum(0)
    return total[0] if shared else total


def rows_of_weights(w: Tensor, q: Tensor, batch: Batch) -> Tensor:
    """[Nmax, P] or [H, Nmax, P] -> [B, H, N, P], a view whose batch stride is 0."""
    return w[..., : batch.positions, :].expand(batch.size, q.shape[1], -1, -1)


def slabs(x: Tensor) -> BHND:
    """x [B, H, N, D] as a kernel argument. Packed [T, H, D] counts batches by the first tokens of sequences."""
    if x.dim() == 4:
        return bhnd(x)
    stride_t, stride_h, stride_d = x.stride()
    return BHND(x, stride_t, stride_h, stride_t, stride_d)


def launch_states(b: Tensor, c: Tensor, batch: Batch, *, reversed: bool = False) -> Tensor | None:
    """The states at the boundaries between segments, [B·H, boundaries, E, F]; None if there is one segment."""
    B, N, H, E, F = batch.size, batch.positions, b.shape[1], b.shape[-1], c.shape[-1]
    boundaries = (N - 1) // segment_length(E, F)
    if not batch.causal:
        boundaries = min(boundaries, 1)
    if b.numel() == 0 or boundaries < 1:
        return None
    states = b.new_empty(B * H, boundaries, E, F)
    config = RefinedProjectionConfig.of_states(E, F, b.dtype, architecture_of(b))
    launch(
        refined_projection_states_kernel,
        (B * H * cdiv(E, config.block_e) * cdiv(F, config.block_f),),
        *(slabs(b), slabs(c), states, batch.lengths, H, N, boundaries),
        E=E,
        F=F,
        BLOCK_N=config.block_n,
        BLOCK_E=config.block_e,
        BLOCK_F=config.block_f,
        SEGMENT=segment_length(E, F),
        CAUSAL=batch.causal,
        REVERSED=reversed,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=MAX_REGISTERS,
    )
    return states


def launch_product(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor | None,
    out: Tensor,
    batch: Batch,
    scale: float,
    *,
    reversed: bool = False,
    summed_over: Group | None = None,
) -> None:
    """Write out [B, H, N, F] or [T, H, F]; with `summed_over` the partial sums [num_splits, groups, N, F]."""
    if out.numel() == 0:
        return
    B, N, H, E, F = batch.size, batch.positions, a.shape[1], a.shape[-1], c.shape[-1]
    config = RefinedProjectionConfig.of_product(E, F, a.dtype, architecture_of(a))
    num_tiles = cdiv(N, config.block_m)
    group, groups = (Group(H, B * H, 1, B * H), 1) if summed_over is None else (summed_over, out.shape[1])
    state_strides, boundaries = ((0, 0), 0) if states is None else (states.stride()[2:], states.shape[1])
    launch(
        refined_projection_product_kernel,
        (num_tiles * cdiv(F, config.block_f) * group.num_splits * groups,),
        *(slabs(a), slabs(b), slabs(c), states, slabs(out), batch.lengths, *state_strides, H, *group, num_tiles),
        *(N, boundaries, scale),
        E=E,
        F=F,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_E=config.block_e,
        BLOCK_F=config.block_f,
        SEGMENT=segment_length(E, F),
        CAUSAL=batch.causal,
        REVERSED=reversed,
        SUMMED=summed_over is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=MAX_REGISTERS,
    )

"""x = A W of raw attention logits A without computing A, forward and backward: the launches of `projection_kernels`."""

from typing import NamedTuple

import torch
from torch import Tensor

from recattn.triton_kernels.common.launch import MAX_REGISTERS, architecture_of, cdiv, launch
from recattn.triton_kernels.common.tiles import bhnd
from recattn.triton_kernels.refined_attention.config import RefinedProjectionConfig, segment_length
from recattn.triton_kernels.refined_attention.projection_kernels import (
    refined_projection_product_kernel,
    refined_projection_states_kernel,
)

# Programs that keep a GPU busy: for dW the sequences are split among as many.
FULL_GRID = 512


class Mask(NamedTuple):
    """The mask of A."""

    seq_lens: Tensor | None
    causal: bool
    left_padded: bool


class Group(NamedTuple):
    """The batch-heads that share W, batch by batch, and how programs split them."""

    heads: int
    size: int
    per_split: int
    num_splits: int


def launch_refined_projection_fwd(q: Tensor, k: Tensor, w: Tensor, mask: Mask, scale: float) -> Tensor:
    """x [B, H, N, P] = A W with A = mask(scale · Q Kᵀ), zero at future and padded entries; zero at padding.

    q, k [B, H, N, D]; w [Nmax, P] or [H, Nmax, P], of which the first N rows are used; any strides.
    """
    w = rows_of_weights(w, q)
    x = q.new_empty(*q.shape[:3], w.shape[3])
    launch_product(q, k, w, launch_states(k, w, mask), x, mask, scale)
    return x


def launch_refined_projection_bwd(
    dx: Tensor, q: Tensor, k: Tensor, w: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dw from dx, in the dtypes of q, k and w; zero at padding and in the rows of w beyond N.

    dw sums over sequences in the same order every time.
    """
    dw = w.new_zeros(w.shape)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    rows = rows_of_weights(w, q)
    states = launch_states(k, rows, mask)  # [B·H, ., D, P]
    launch_product(dx, rows, k, None if states is None else states.mT, dq, mask, scale)
    del states  # frees its memory
    states = launch_states(q, dx, mask, reversed=True)
    launch_product(rows, dx, q, None if states is None else states.mT, dk, mask, scale, reversed=True)
    dw[..., : q.shape[2], :] = launch_dw(k, q, dx, states, mask, scale, shared=w.dim() == 2)
    return dq, dk, dw


def launch_dw(
    k: Tensor, q: Tensor, dx: Tensor, states: Tensor | None, mask: Mask, scale: float, *, shared: bool
) -> Tensor:
    """dW, summed over the batch, and with `shared` over the heads: float32 [H, N, P], or [N, P]."""
    B, H, N, D = k.shape
    P = dx.shape[3]
    groups, heads, size = (1, H, B * H) if shared else (H, 1, B)
    config = RefinedProjectionConfig.of_product(D, P, k.dtype, architecture_of(k))
    tiles = cdiv(N, config.block_m) * cdiv(P, config.block_f) * groups
    per_split = cdiv(size, min(size, cdiv(FULL_GRID, max(tiles, 1)))) if size > 0 else 1
    group = Group(heads, size, per_split, cdiv(size, per_split))
    partials = k.new_empty(group.num_splits, groups, N, P, dtype=torch.float32)
    launch_product(k, q, dx, states, partials, mask, scale, reversed=True, summed_over=group)
    total = partials.sum(0)
    return total[0] if shared else total


def rows_of_weights(w: Tensor, q: Tensor) -> Tensor:
    """[Nmax, P] or [H, Nmax, P] -> [B, H, N, P], a view."""
    return w[..., : q.shape[2], :].expand(*q.shape[:3], w.shape[-1])


def launch_states(b: Tensor, c: Tensor, mask: Mask, *, reversed: bool = False) -> Tensor | None:
    """The states at the boundaries between segments, [B·H, boundaries, E, F]; None if there is one segment."""
    B, H, N, E = b.shape
    F = c.shape[3]
    boundaries = (N - 1) // segment_length(E, F)
    if not mask.causal:
        boundaries = min(boundaries, 1)
    if b.numel() == 0 or boundaries < 1:
        return None
    states = b.new_empty(B * H, boundaries, E, F)
    config = RefinedProjectionConfig.of_states(E, F, b.dtype, architecture_of(b))
    launch(
        refined_projection_states_kernel,
        (B * H * cdiv(E, config.block_e) * cdiv(F, config.block_f),),
        *(bhnd(b), bhnd(c), states, mask.seq_lens, H, N, boundaries, int(mask.left_padded)),
        E=E,
        F=F,
        BLOCK_N=config.block_n,
        BLOCK_E=config.block_e,
        BLOCK_F=config.block_f,
        SEGMENT=segment_length(E, F),
        CAUSAL=mask.causal,
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
    mask: Mask,
    scale: float,
    *,
    reversed: bool = False,
    summed_over: Group | None = None,
) -> None:
    """Write out [B, H, N, F]; with `summed_over` the partial sums [num_splits, groups, N, F]."""
    if out.numel() == 0:
        return
    B, H, N, E = a.shape
    F = c.shape[3]
    config = RefinedProjectionConfig.of_product(E, F, a.dtype, architecture_of(a))
    num_tiles = cdiv(N, config.block_m)
    group, groups = (Group(H, B * H, 1, B * H), 1) if summed_over is None else (summed_over, out.shape[1])
    state_strides, boundaries = ((0, 0), 0) if states is None else (states.stride()[2:], states.shape[1])
    launch(
        refined_projection_product_kernel,
        (num_tiles * cdiv(F, config.block_f) * group.num_splits * groups,),
        *(bhnd(a), bhnd(b), bhnd(c), states, bhnd(out), mask.seq_lens, *state_strides, H, *group, num_tiles),
        *(N, boundaries, scale, int(mask.left_padded)),
        E=E,
        F=F,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_E=config.block_e,
        BLOCK_F=config.block_f,
        SEGMENT=segment_length(E, F),
        CAUSAL=mask.causal,
        REVERSED=reversed,
        SUMMED=summed_over is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        maxnreg=MAX_REGISTERS,
    )

"""Compression of histories, C_u = W_compᵀ E_u, which reads each behaviour once, and its backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.launch import TileConfig, cdiv, host_block_width, launch, num_splits, reduce_splits
from recattn.triton_kernels.common.ragged import Lengths, locate_sequence
from recattn.triton_kernels.common.tiles import add_product, load_rows, offset, store_rows


@triton.jit
def locate_history(user, L, num_rows, lengths):
    """A user's behaviours: (the first, their number), clamped so that no row of W or E is read out of bounds.

    The first counts on the axis of L or, packed, of the num_rows behaviours of all users.
    """
    start, length, _ = locate_sequence(user, L, lengths)
    if lengths.cu_seqlens is not None:
        start = tl.maximum(start, 0)
        length = tl.minimum(length, num_rows - start)
    return start, tl.minimum(length, L)


# A new batch must not compile anew.
@triton.jit(do_not_specialize=["L", "num_rows", "num_items"])
def lrea_compress_fwd_kernel(
    w_comp,
    behaviors,
    lengths,
    item_ids,
    out,
    L,
    num_rows,
    num_items,
    stride_wl,
    stride_wr,
    stride_eu,
    stride_el,
    stride_ed,
    stride_iu,
    stride_il,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: a block of C_u = Σ_l W_l ⊗ E_ul, from one split of user u's behaviours l.

    for each BLOCK_L behaviours of the user:
        W tile [BLOCK_L, BLOCK_R], E tile [BLOCK_L, BLOCK_D]
        acc += Wᵀ E                                                       [BLOCK_R, BLOCK_D]
    out[split] = acc

    A user's behaviours are the first seq_lens[u] of L, or rows cu_seqlens[u] .. cu_seqlens[u + 1] of num_rows. With
    item_ids the row of E is the behaviour's item id, and zeros where that is not below num_items.
    """
    user = tl.program_id(0).to(tl.int64)
    first_rank = tl.program_id(1) // tl.cdiv(WIDTH, BLOCK_D) * BLOCK_R
    first_column = tl.program_id(1) % tl.cdiv(WIDTH, BLOCK_D) * BLOCK_D
    history, length = locate_history(user, L, num_rows, lengths)
    split_size = tl.cdiv(tl.cdiv(length, BLOCK_L), tl.num_programs(2)) * BLOCK_L
    start = tl.program_id(2) * split_size
    stop = tl.minimum(start + split_size, length)
    w_base = w_comp + offset(first_rank, stride_wr)
    e_base = behaviors + user * stride_eu + offset(first_column, stride_ed)
    if item_ids is None:
        e_base += history * stride_el
    else:
        item_ids += user * stride_iu + history * stride_il
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(start, stop, BLOCK_L):
        rows = first + tl.arange(0, BLOCK_L)
        valid = rows < stop
        w_tile = load_rows(w_base, rows, valid, stride_wl, stride_wr, RANK - first_rank, BLOCK_R)  # [BL, BR]
        if item_ids is not None:
            rows = tl.load(item_ids + offset(rows, stride_il), mask=valid, other=-1)
            valid = (rows >= 0) & (rows < num_items)
        e_tile = load_rows(e_base, rows, valid, stride_el, stride_ed, WIDTH - first_column, BLOCK_D)  # [BL, BD]
        acc = tl.dot(tl.trans(w_tile), e_tile, acc, input_precision="ieee")
    num_users = tl.num_programs(0).to(tl.int64)
    out_base = out + (tl.program_id(2) * num_users + user) * RANK * WIDTH + first_rank * WIDTH + first_column
    ranks = tl.arange(0, BLOCK_R)
    store_rows(out_base, acc, ranks, ranks < RANK - first_rank, WIDTH, 1, WIDTH - first_column, BLOCK_D)


@triton.jit(do_not_specialize=["L", "num_rows"])
def lrea_compress_bwd_behaviors_kernel(
    dcompressed,
    w_comp,
    lengths,
    dbehaviors,
    L,
    num_rows,
    rank,
    stride_w,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_L of the up to L behaviours of a user, BLOCK_D columns of dE = W dC; zeros at padding.

    for each BLOCK_R ranks:
        acc += W tile [BLOCK_L, BLOCK_R] @ dC tile [BLOCK_R, BLOCK_D]     [BLOCK_L, BLOCK_D]
    dE = acc
    """
    blocks = tl.cdiv(L, BLOCK_L)
    user = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    first_column = tl.program_id(1) * BLOCK_D
    history, length = locate_history(user, L, num_rows, lengths)
    base = dcompressed + user * rank * WIDTH + first_column
    acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    # rank is no constant: the compiler would unroll the loop and need too many registers.
    for first_rank in range(0, tl.where(tl.program_id(0) % blocks * BLOCK_L < length, rank, 0), BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        w_tile = load_rows(w_comp + first_rank, rows, rows < length, stride_w, 1, rank - first_rank, BLOCK_R)  # [BL, R]
        d_tile = load_rows(base, ranks, ranks < rank, WIDTH, 1, WIDTH - first_column, BLOCK_D)  # [R, BD]
        acc = tl.dot(w_tile, d_tile, acc, input_precision="ieee")
    if lengths.cu_seqlens is not None:
        out_base, stored = dbehaviors + history * WIDTH, rows < length
    else:
        acc = tl.where((rows < length)[:, None], acc, 0.0)
        out_base, stored = dbehaviors + user * L * WIDTH, rows < L
    store_rows(out_base + first_column, acc, rows, stored, WIDTH, 1, WIDTH - first_column, BLOCK_D)


@triton.jit(do_not_specialize=["num_users", "L", "num_rows", "Lmax"])
def lrea_compress_bwd_w_comp_kernel(
    dcompressed,
    behaviors,
    lengths,
    dw,
    num_users,
    L,
    num_rows,
    Lmax,
    stride_eu,
    stride_el,
    stride_ed,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_L of the Lmax rows of dW = Σ_u E_u dC_uᵀ, from one split of the users.

    for each user, and each BLOCK_D columns:
        acc += E tile [BLOCK_L, BLOCK_D] @ dC tile [R, BLOCK_D]ᵀ          [BLOCK_L, R]
    dw[split] = acc
    """
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    split_size = tl.cdiv(num_users, tl.num_programs(1))
    first_user = tl.program_id(1) * split_size
    stop_user = tl.where(tl.program_id(0) * BLOCK_L < L, tl.minimum(first_user + split_size, num_users), first_user)
    STEPS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    ranks = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    for step in range(first_user * STEPS, stop_user * STEPS):
        user = tl.full((), 0, tl.int64) + step // STEPS
        first_column = step % STEPS * BLOCK_D
        history, length = locate_history(user, L, num_rows, lengths)
        valid = rows < length
        base = behaviors + user * stride_eu + history * stride_el + offset(first_column, stride_ed)
        e_tile = load_rows(base, rows, valid, stride_el, stride_ed, WIDTH - first_column, BLOCK_D)  # [BL, BD]
        d_base = dcompressed + user * RANK * WIDTH + first_column
        d_tile = load_rows(d_base, ranks, ranks < RANK, WIDTH, 1, WIDTH - first_column, BLOCK_D)  # [R, BD]
        acc = add_product(acc, e_tile, tl.trans(d_tile))
    store_rows(dw + tl.program_id(1).to(tl.int64) * Lmax * RANK, acc, rows, rows < Lmax, RANK, 1, RANK, BLOCK_R)


# --- Launchers ---


def launch_lrea_compress_fwd(
    behaviors: Tensor, w_comp: Tensor, lengths: Lengths, item_ids: Tensor | None, max_seqlen: int | None
) -> Tensor:
    """[U, r, d] in behaviors' dtype; behaviors [U, L, d], or packed [T, d], or a table [I, d] with the rows item_ids.

    item_ids are [U, L], or packed [T].
    """
    width, (longest, rank) = behaviors.shape[-1], w_comp.shape
    if item_ids is None:
        users, longest, num_rows = _bounds(behaviors.shape[:-1], lengths, longest, max_seqlen)
        num_items, stride_iu, stride_il = 0, 0, 0
    else:
        users, longest, num_rows = _bounds(item_ids.shape, lengths, longest, max_seqlen)
        num_items, (stride_iu, stride_il) = behaviors.shape[0], (0, *item_ids.stride())[-2:]
    block_l = 32 if behaviors.dtype == torch.float32 else 64
    tile = TileConfig(min(host_block_width(rank), 64), min(host_block_width(width), 64), num_warps=4, num_stages=3)
    tiles = cdiv(rank, tile.block_m) * cdiv(width, tile.block_n)
    splits = num_splits(users * tiles, cdiv(longest, block_l))
    out = behaviors.new_empty(splits, users, rank, width, dtype=None if splits == 1 else torch.float32)
    if out.numel() == 0:
        return out[0]
    launch(
        lrea_compress_fwd_kernel,
        (users, tiles, splits),
        *(w_comp, behaviors, lengths, item_ids, out),
        *(longest, num_rows, num_items, *w_comp.stride()),
        *((0, *behaviors.stride())[-3:]),
        *(stride_iu, stride_il),
        RANK=rank,
        WIDTH=width,
        BLOCK_L=block_l,
        BLOCK_R=tile.block_m,
        BLOCK_D=tile.block_n,
        **tile.launch_options,
    )
    return reduce_splits(out, behaviors.dtype)


def launch_lrea_compress_bwd_behaviors(
    dcompressed: Tensor, w_comp: Tensor, lengths: Lengths, num_rows: int, max_seqlen: int | None
) -> Tensor:
    """dE [U, num_rows, d], or packed [num_rows, d], in dcompressed's dtype; dcompressed [U, r, d] and w_comp [Lmax, r]
    are contiguous."""
    users, rank, width = dcompressed.shape
    tile = TileConfig(64, min(host_block_width(width), 64), num_warps=4, num_stages=2)
    if lengths.cu_seqlens is None:
        longest, dbehaviors = num_rows, dcompressed.new_empty(users, num_rows, width)
    else:
        longest = _longest(num_rows, w_comp.shape[0], max_seqlen)
        dbehaviors = dcompressed.new_empty(num_rows, width)
    grid = (users * cdiv(longest, tile.block_m), cdiv(width, tile.block_n))
    if 0 in grid:
        return dbehaviors
    launch(
        lrea_compress_bwd_behaviors_kernel,
        grid,
        *(dcompressed, w_comp, lengths, dbehaviors),
        *(longest, num_rows, rank, w_comp.stride(0)),
        WIDTH=width,
        BLOCK_L=tile.block_m,
        BLOCK_R=min(host_block_width(rank), 32),
        BLOCK_D=tile.block_n,
        **tile.launch_options,
    )
    return dbehaviors


def launch_lrea_compress_bwd_w_comp(
    dcompressed: Tensor, behaviors: Tensor, lengths: Lengths, longest: int, max_seqlen: int | None
) -> Tensor:
    """dW [longest, r] in behaviors' dtype, zeros behind the behaviours; dcompressed [U, r, d] is contiguous."""
    users, rank, width = dcompressed.shape
    _, length, num_rows = _bounds(behaviors.shape[:-1], lengths, longest, max_seqlen)
    block_l = 32 if behaviors.dtype == torch.float32 and rank > 128 else 64
    tile = TileConfig(block_l, min(host_block_width(width), 64), num_warps=4, num_stages=3)
    blocks = cdiv(longest, tile.block_m)
    splits = num_splits(blocks, users)
    dw = behaviors.new_empty(splits, longest, rank, dtype=None if splits == 1 else torch.float32)
    if blocks == 0:
        return dw[0]
    launch(
        lrea_compress_bwd_w_comp_kernel,
        (blocks, splits),
        *(dcompressed, behaviors, lengths, dw),
        *(users, length, num_rows, longest, *(0, *behaviors.stride())[-3:]),
        RANK=rank,
        WIDTH=width,
        BLOCK_L=tile.block_m,
        BLOCK_R=host_block_width(rank),
        BLOCK_D=tile.block_n,
        **tile.launch_options,
    )
    return reduce_splits(dw, behaviors.dtype)


def _bounds(histories: torch.Size, lengths: Lengths, Lmax: int, max_seqlen: int | None) -> tuple[int, int, int]:
    """Of histories [U, L], or packed [T]: users, the most behaviours that one has, and L or T."""
    num_rows = histories[-1]
    if lengths.cu_seqlens is None:
        return histories[0], num_rows, num_rows
    return lengths.cu_seqlens.shape[0] - 1, _longest(num_rows, Lmax, max_seqlen), num_rows


def _longest(num_rows: int, Lmax: int, max_seqlen: int | None) -> int:
    """The most behaviours that a packed history can have. It bounds the grids: U · T would be quadratic."""
    return min(num_rows, Lmax, Lmax if max_seqlen is None else max_seqlen)

"""Compression of histories, C_u = W_compᵀ E_u, which reads each behaviour once, and its backward.

C_u = Σ_l W_l ⊗ E_ul is a sum of outer products: its kernel is that of `jagged_jagged_bmm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.launch import ENABLE_FP_FUSION, TileConfig, num_splits, reduce_splits
from recattn.triton_kernels.common.ragged import locate_sequence
from recattn.triton_kernels.common.tiles import block_width, load_rows, offset, store_rows
from recattn.triton_kernels.lrea.jagged import launch_outer_sum


# A new batch must not compile anew.
@triton.jit(do_not_specialize=["L"])
def lrea_compress_bwd_behaviors_kernel(
    dcompressed,
    w_comp,
    seq_lens,
    dbehaviors,
    L,
    rank,
    stride_w,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_L behaviours of a user, BLOCK_D columns of dE = W dC; zeros at padding.

    for each BLOCK_R ranks:
        acc += W tile [BLOCK_L, BLOCK_R] @ dC tile [BLOCK_R, BLOCK_D]     [BLOCK_L, BLOCK_D]
    dE = acc
    """
    blocks = tl.cdiv(L, BLOCK_L)
    user = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    first_column = tl.program_id(1) * BLOCK_D
    _, length, _ = locate_sequence(user, L, seq_lens, None, False)
    base = dcompressed + user * rank * WIDTH + first_column
    acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    # rank is no constant: the compiler would unroll the loop and need too many registers.
    for first_rank in range(0, rank, BLOCK_R):
        ranks = first_rank + tl.arange(0, BLOCK_R)
        w_tile = load_rows(w_comp + first_rank, rows, rows < L, stride_w, 1, rank - first_rank, BLOCK_R)  # [BL, R]
        d_tile = load_rows(base, ranks, ranks < rank, WIDTH, 1, WIDTH - first_column, BLOCK_D)  # [R, BD]
        acc = tl.dot(w_tile, d_tile, acc, input_precision="ieee")
    gradient = tl.where((rows < length)[:, None], acc, 0.0)
    out_base = dbehaviors + user * L * WIDTH + first_column
    store_rows(out_base, gradient, rows, rows < L, WIDTH, 1, WIDTH - first_column, BLOCK_D)


@triton.jit(do_not_specialize=["num_users", "L"])
def lrea_compress_bwd_w_comp_kernel(
    dcompressed,
    behaviors,
    seq_lens,
    dw,
    num_users,
    L,
    stride_eu,
    stride_el,
    stride_ed,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: BLOCK_L rows of dW = Σ_u E_u dC_uᵀ, from one split of the users.

    for each user, and each BLOCK_D columns:
        acc += E tile [BLOCK_L, BLOCK_D] @ dC tile [R, BLOCK_D]ᵀ          [BLOCK_L, R]
    dw[split] = acc
    """
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    split_size = tl.cdiv(num_users, tl.num_programs(1))
    first_user = tl.program_id(1) * split_size
    stop_user = tl.minimum(first_user + split_size, num_users)
    STEPS: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    ranks = tl.arange(0, BLOCK_R)
    acc = tl.zeros([BLOCK_L, BLOCK_R], tl.float32)
    for step in range(first_user * STEPS, stop_user * STEPS):
        user = tl.full((), 0, tl.int64) + step // STEPS
        first_column = step % STEPS * BLOCK_D
        _, length, _ = locate_sequence(user, L, seq_lens, None, False)
        valid = rows < tl.minimum(length, L)
        base = behaviors + user * stride_eu + offset(first_column, stride_ed)
        e_tile = load_rows(base, rows, valid, stride_el, stride_ed, WIDTH - first_column, BLOCK_D)  # [BL, BD]
        d_base = dcompressed + user * RANK * WIDTH + first_column
        d_tile = load_rows(d_base, ranks, ranks < RANK, WIDTH, 1, WIDTH - first_column, BLOCK_D)  # [R, BD]
        acc = tl.dot(e_tile, tl.trans(d_tile), acc, input_precision="ieee")
    store_rows(dw + tl.program_id(1).to(tl.int64) * L * RANK, acc, rows, rows < L, RANK, 1, RANK, BLOCK_R)


# --- Launchers ---


def launch_lrea_compress_fwd(
    behaviors: Tensor, w_comp: Tensor, seq_lens: Tensor | None, item_ids: Tensor | None
) -> Tensor:
    """[U, r, d] in behaviors' dtype; behaviors [U, L, d], or a table [I, d] of which item_ids [U, L] are the rows."""
    if item_ids is None:
        length = behaviors.shape[1]
    else:
        users, length = item_ids.shape
        behaviors = behaviors.expand(users, -1, -1)
    block_t = 32 if behaviors.dtype == torch.float32 else 64
    partials = launch_outer_sum(w_comp[None], behaviors[:, None], seq_lens, None, item_ids, length, block_t)
    return reduce_splits(partials, behaviors.dtype)[:, 0]


def launch_lrea_compress_bwd_behaviors(
    dcompressed: Tensor, w_comp: Tensor, seq_lens: Tensor | None, length: int
) -> Tensor:
    """dE [U, L, d] in dcompressed's dtype; dcompressed [U, r, d] and w_comp [Lmax, r] are contiguous."""
    users, rank, width = dcompressed.shape
    tile = TileConfig(64, min(block_width(width), 64), num_warps=4, num_stages=2)
    dbehaviors = dcompressed.new_empty(users, length, width)
    grid = (users * triton.cdiv(length, tile.block_m), triton.cdiv(width, tile.block_n))
    if 0 in grid:
        return dbehaviors
    with torch.cuda.device_of(dcompressed):
        lrea_compress_bwd_behaviors_kernel[grid](
            *(dcompressed, w_comp, seq_lens, dbehaviors),
            *(length, rank, w_comp.stride(0)),
            WIDTH=width,
            BLOCK_L=tile.block_m,
            BLOCK_R=min(block_width(rank), 32),
            BLOCK_D=tile.block_n,
            **tile.launch_options,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
    return dbehaviors


def launch_lrea_compress_bwd_w_comp(dcompressed: Tensor, behaviors: Tensor, seq_lens: Tensor | None) -> Tensor:
    """dW, float32 [L, r]; dcompressed [U, r, d] is contiguous."""
    (users, rank, width), length = dcompressed.shape, behaviors.shape[1]
    block_l = 32 if behaviors.dtype == torch.float32 and rank > 128 else 64
    tile = TileConfig(block_l, min(block_width(width), 64), num_warps=4, num_stages=3)
    blocks = triton.cdiv(length, tile.block_m)
    splits = num_splits(blocks, users)
    dw = behaviors.new_empty(splits, length, rank, dtype=torch.float32)
    if blocks == 0:
        return reduce_splits(dw, torch.float32)
    with torch.cuda.device_of(dcompressed):
        lrea_compress_bwd_w_comp_kernel[(blocks, splits)](
            *(dcompressed, behaviors, seq_lens, dw),
            *(users, length, *behaviors.stride()),
            RANK=rank,
            WIDTH=width,
            BLOCK_L=tile.block_m,
            BLOCK_R=block_width(rank),
            BLOCK_D=tile.block_n,
            **tile.launch_options,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
    return reduce_splits(dw, torch.float32)

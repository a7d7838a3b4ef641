"""Compression of histories, C_u = W_compᵀ E_u, which reads each behaviour once, and its backward.

C_u is a sum of outer products, Σ_l W_l ⊗ E_ul, and so are the gradients of keys and values in the restored form,
Σ_t z_t ⊗ q_t over the targets of a user: one kernel sums both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.launch import strides
from recattn.triton_kernels.common.ragged import locate_sequence
from recattn.triton_kernels.common.tiles import block_width, load_rows, offset, store_rows
from recattn.triton_kernels.lrea.core import Launch, Tile, dot_of_any, share_count, sum_of_shares, targets_a_block


# What changes with the batch must not compile anew.
@triton.jit(do_not_specialize=["num_heads", "num_rows", "num_items"])
def lrea_outer_sum_kernel(
    left,
    right,
    seq_lens,
    offsets,
    item_ids,
    out,
    num_heads,
    num_rows,
    num_items,
    stride_lh,
    stride_lt,
    stride_lk,
    stride_ru,
    stride_rh,
    stride_rt,
    stride_rn,
    stride_iu,
    stride_il,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[share, u, h] = Σ left[h, t] ⊗ right[u, h, t], the rows t of each user cut into shares.

    A user's rows are the first seq_lens[u] of num_rows, or those from offsets[u] up to offsets[u + 1]; with item_ids
    the row of right is item_ids[u, t], zeros where that is none of num_items. Rows outside num_rows are left out.
    """
    plane = tl.program_id(0).to(tl.int64)
    user, head = plane // num_heads, plane % num_heads
    first_k = tl.program_id(1) // tl.cdiv(WIDTH, BLOCK_N) * BLOCK_K
    first_column = tl.program_id(1) % tl.cdiv(WIDTH, BLOCK_N) * BLOCK_N
    first_row, length, _ = locate_sequence(user, num_rows, seq_lens, offsets, False)
    if offsets is None:
        length = tl.minimum(length, num_rows)
    else:
        end = tl.minimum(first_row + length, num_rows)
        first_row = tl.minimum(tl.maximum(first_row, 0), num_rows)
        length = tl.maximum(end - first_row, 0).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, BLOCK_T), tl.num_programs(2)) * BLOCK_T
    start = tl.program_id(2) * share
    stop = tl.minimum(start + share, length)
    left_base = left + head * stride_lh + first_row * stride_lt + offset(first_k, stride_lk)
    right_base = right + user * stride_ru + head * stride_rh + first_row * stride_rt + offset(first_column, stride_rn)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for first in range(start, stop, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        valid = rows < stop
        left_tile = load_rows(left_base, rows, valid, stride_lt, stride_lk, K - first_k, BLOCK_K)  # [BT, BK]
        if item_ids is not None:
            rows = tl.load(item_ids + user * stride_iu + offset(rows, stride_il), mask=valid, other=-1)
            valid = (rows >= 0) & (rows < num_items)
        right_tile = load_rows(right_base, rows, valid, stride_rt, stride_rn, WIDTH - first_column, BLOCK_N)
        acc = dot_of_any(tl.trans(left_tile), right_tile, acc)
    planes = tl.num_programs(0).to(tl.int64)
    out_base = out + (tl.program_id(2) * planes + plane) * K * WIDTH + first_column
    ks = first_k + tl.arange(0, BLOCK_K)
    store_rows(out_base, acc, ks, ks < K, WIDTH, 1, WIDTH - first_column, BLOCK_N)


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
    """dE = W dC of a block of a user's behaviours; zeros at padding."""
    blocks = tl.cdiv(L, BLOCK_L)
    user = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_L + tl.arange(0, BLOCK_L)
    first_column = tl.program_id(1) * BLOCK_D
    _, length, _ = locate_sequence(user, L, seq_lens, None, False)
    base = dcompressed + user * rank * WIDTH + first_column
    acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    # Of a number that it knows the compiler would unroll the loop, and need too many registers.
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
    """dw[share] = Σ E dCᵀ over a share of the users."""
    rows = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    share = tl.cdiv(num_users, tl.num_programs(1))
    first_user = tl.program_id(1) * share
    stop_user = tl.minimum(first_user + share, num_users)
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


def launch_lrea_user_outer(left: Tensor, right: Tensor, target_offsets: Tensor) -> Tensor:
    """Σ left[t, h] ⊗ right[t, h] over the targets of each user: [T, H, k], [T, H, n] -> float32 [U, H, k, n].

    target_offsets is contiguous.
    """
    launch, partials = _plan_user_outer(left, right, target_offsets)
    launch.run()
    return sum_of_shares(partials, torch.float32)


def launch_lrea_compress_fwd(
    behaviors: Tensor, w_comp: Tensor, seq_lens: Tensor | None, item_ids: Tensor | None
) -> Tensor:
    """[U, r, d] in behaviors' dtype; behaviors [U, L, d], or a table [I, d] of which item_ids [U, L] are the rows."""
    launch, partials = _plan_compress_fwd(behaviors, w_comp, seq_lens, item_ids)
    launch.run()
    return sum_of_shares(partials, behaviors.dtype)[:, 0]


def launch_lrea_compress_bwd_behaviors(
    dcompressed: Tensor, w_comp: Tensor, seq_lens: Tensor | None, length: int
) -> Tensor:
    """dE [U, L, d] in dcompressed's dtype; dcompressed [U, r, d] and w_comp [Lmax, r] are contiguous."""
    launch, dbehaviors = _plan_compress_bwd_behaviors(dcompressed, w_comp, seq_lens, length)
    launch.run()
    return dbehaviors


def launch_lrea_compress_bwd_w_comp(dcompressed: Tensor, behaviors: Tensor, seq_lens: Tensor | None) -> Tensor:
    """dW, float32 [L, r]; dcompressed [U, r, d] is contiguous."""
    launch, partials = _plan_compress_bwd_w_comp(dcompressed, behaviors, seq_lens)
    launch.run()
    return sum_of_shares(partials, torch.float32)


def _plan_user_outer(left: Tensor, right: Tensor, target_offsets: Tensor) -> tuple[Launch, Tensor]:
    targets, users = left.shape[0], target_offsets.shape[0] - 1
    block_t = targets_a_block(targets, users, torch.float32)
    right = right.transpose(0, 1).expand(users, -1, -1, -1)
    return _plan_outer_sum(left.transpose(0, 1), right, None, target_offsets, None, targets, block_t)


def _plan_compress_fwd(
    behaviors: Tensor, w_comp: Tensor, seq_lens: Tensor | None, item_ids: Tensor | None
) -> tuple[Launch, Tensor]:
    if item_ids is None:
        length = behaviors.shape[1]
    else:
        users, length = item_ids.shape
        behaviors = behaviors.expand(users, -1, -1)
    block_t = 32 if behaviors.dtype == torch.float32 else 64
    return _plan_outer_sum(w_comp[None], behaviors[:, None], seq_lens, None, item_ids, length, block_t)


def _plan_outer_sum(
    left: Tensor,
    right: Tensor,
    seq_lens: Tensor | None,
    offsets: Tensor | None,
    item_ids: Tensor | None,
    num_rows: int,
    block_t: int,
) -> tuple[Launch, Tensor]:
    """left [H, rows, k], right [U, H, rows, n], both of any strides -> the shares of [U, H, k, n]."""
    users, heads, _, width = right.shape
    k = left.shape[2]
    tile = Tile(min(block_width(k), 64), block_t, num_warps=4, num_stages=3)
    block_n = min(block_width(width), 64)
    planes, tiles = users * heads, triton.cdiv(k, tile.kept) * triton.cdiv(width, block_n)
    shares = share_count(planes * tiles, triton.cdiv(num_rows, block_t))
    partials = right.new_empty(shares, users, heads, k, width, dtype=torch.float32)
    arguments = {
        "left": left,
        "right": right,
        "seq_lens": seq_lens,
        "offsets": offsets,
        "item_ids": item_ids,
        "out": partials,
        "num_heads": heads,
        "num_rows": num_rows,
        "num_items": right.shape[2],
        **strides("l", left, "htk"),
        **strides("r", right, "uhtn"),
        **strides("i", item_ids, "ul"),
        "K": k,
        "WIDTH": width,
        "BLOCK_T": block_t,
        "BLOCK_K": tile.kept,
        "BLOCK_N": block_n,
    }
    return Launch(lrea_outer_sum_kernel, (planes, tiles, shares), arguments, tile), partials


def _plan_compress_bwd_behaviors(
    dcompressed: Tensor, w_comp: Tensor, seq_lens: Tensor | None, length: int
) -> tuple[Launch, Tensor]:
    users, rank, width = dcompressed.shape
    tile = Tile(64, min(block_width(width), 64), num_warps=4, num_stages=2)
    dbehaviors = dcompressed.new_empty(users, length, width)
    arguments = {
        "dcompressed": dcompressed,
        "w_comp": w_comp,
        "seq_lens": seq_lens,
        "dbehaviors": dbehaviors,
        "L": length,
        "rank": rank,
        "stride_w": w_comp.stride(0),
        "WIDTH": width,
        "BLOCK_L": tile.kept,
        "BLOCK_R": min(block_width(rank), 32),
        "BLOCK_D": tile.visited,
    }
    grid = (users * triton.cdiv(length, tile.kept), triton.cdiv(width, tile.visited))
    return Launch(lrea_compress_bwd_behaviors_kernel, grid, arguments, tile), dbehaviors


def _plan_compress_bwd_w_comp(dcompressed: Tensor, behaviors: Tensor, seq_lens: Tensor | None) -> tuple[Launch, Tensor]:
    (users, rank, width), length = dcompressed.shape, behaviors.shape[1]
    kept = 32 if behaviors.dtype == torch.float32 and rank > 128 else 64
    tile = Tile(kept, min(block_width(width), 64), num_warps=4, num_stages=3)
    blocks = triton.cdiv(length, tile.kept)
    shares = share_count(blocks, users)
    partials = behaviors.new_empty(shares, length, rank, dtype=torch.float32)
    arguments = {
        "dcompressed": dcompressed,
        "behaviors": behaviors,
        "seq_lens": seq_lens,
        "dw": partials,
        "num_users": users,
        "L": length,
        **strides("e", behaviors, "uld"),
        "RANK": rank,
        "WIDTH": width,
        "BLOCK_L": tile.kept,
        "BLOCK_R": block_width(rank),
        "BLOCK_D": tile.visited,
    }
    return Launch(lrea_compress_bwd_w_comp_kernel, (blocks, shares), arguments, tile), partials

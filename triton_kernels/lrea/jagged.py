"""Products of jagged rows: each target with the matrix of its user, and the sums of outer products of a user's rows.

`jagged_dense_bmm` and `jagged_jagged_bmm` are FBGEMM's names for the two.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.launch import ENABLE_FP_FUSION, TileConfig, num_splits, reduce_splits
from recattn.triton_kernels.common.ragged import locate_sequence
from recattn.triton_kernels.common.tiles import BHND, bhnd, block_width, load_rows, offset, store_rows
from recattn.triton_kernels.lrea.core import count_at_most


@triton.jit
def dot_mixed(a, b, acc):
    """a b + acc. Float32 with half precision is rounded to TF32, whose mantissa is float16's."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")


# --- Each target times the matrix of its user ---


# A new batch must not compile anew.
@triton.jit(do_not_specialize=["num_targets", "num_users", "num_heads", "search_steps"])
def lrea_jagged_dense_bmm_kernel(
    x,
    y,
    target_offsets,
    out,
    num_targets,
    num_users,
    num_heads,
    search_steps,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_T targets of one head, BLOCK_N columns of out[t, h] = x[t, h] @ y[user of t, h].

    for each user of these targets, and each BLOCK_K of K:
        product = x[targets] @ y[user]                                    [BLOCK_T, BLOCK_N]
        acc += product where the target is this user's
    out = acc                                                             0 for targets of no user

    x BHND, packed: [T, H, K]; y BHND [U, H, K, WIDTH]; out float32 [T, H, WIDTH], contiguous.
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    targets = tl.program_id(0) // num_heads * BLOCK_T + tl.arange(0, BLOCK_T)
    first_column = tl.program_id(1) * BLOCK_N
    valid = targets < num_targets
    users = count_at_most(target_offsets, num_users, targets, search_steps) - 1
    # Targets before the first offset and behind the last are of no user: -1.
    users = tl.where(valid & (targets < tl.load(target_offsets + num_users)), users, -1)
    first_user = tl.min(tl.where(users >= 0, users, num_users))
    last_user = tl.max(users)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    # From 0: in a loop that begins at a reduction's result Triton does not see that the loads are aligned.
    for step in range(0, (last_user + 1 - first_user) * STEPS):
        user = tl.full((), 0, tl.int64) + first_user + step // STEPS
        first_k = step % STEPS * BLOCK_K
        x_base = x.ptr + head * x.stride_h + offset(first_k, x.stride_d)
        x_tile = load_rows(x_base, targets, valid, x.stride_n, x.stride_d, K - first_k, BLOCK_K)  # [BT, BK]
        y_base = y.ptr + user * y.stride_b + head * y.stride_h + offset(first_column, y.stride_d)
        ks = first_k + tl.arange(0, BLOCK_K)
        y_tile = load_rows(y_base, ks, ks < K, y.stride_n, y.stride_d, WIDTH - first_column, BLOCK_N)  # [BK, BN]
        product = dot_mixed(x_tile, y_tile, tl.zeros_like(acc))
        acc += tl.where((users == user)[:, None], product, 0.0)
    out_base = out + head * WIDTH + first_column
    store_rows(out_base, acc, targets, valid, num_heads * WIDTH, 1, WIDTH - first_column, BLOCK_N)


def launch_lrea_jagged_dense_bmm(x: Tensor, y: Tensor, target_offsets: Tensor) -> Tensor:
    """x[t] @ y[user of t]: [T, H, k] and [U, H, k, n], of any strides -> float32 [T, H, n].

    target_offsets is contiguous.
    """
    (targets, heads, k), users, width = x.shape, y.shape[0], y.shape[-1]
    tile = TileConfig(targets_per_block(targets, users, x.dtype), min(block_width(width), 64), 4, 3)
    out = x.new_empty(targets, heads, width, dtype=torch.float32)
    grid = (triton.cdiv(targets, tile.block_m) * heads, triton.cdiv(width, tile.block_n))
    if 0 in grid:
        return out
    with torch.cuda.device_of(x):
        lrea_jagged_dense_bmm_kernel[grid](
            *(bhnd(x, target_offsets), bhnd(y), target_offsets, out),
            *(targets, users, heads, users.bit_length()),
            K=k,
            WIDTH=width,
            BLOCK_T=tile.block_m,
            BLOCK_K=min(block_width(k), 64),
            BLOCK_N=tile.block_n,
            **tile.launch_options,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
    return out


def targets_per_block(targets: int, users: int, dtype: torch.dtype) -> int:
    """Few, the least that tl.dot takes, where a block's targets would be of many users."""
    if targets < 32 * users:
        return 16
    # Float32 products are made in registers.
    return 32 if dtype == torch.float32 else 64


# --- Sums of outer products over the rows of a user ---


@triton.jit(do_not_specialize=["num_heads", "num_rows", "num_items"])
def lrea_outer_sum_kernel(
    lhs,
    rhs,
    seq_lens,
    offsets,
    item_ids,
    out,
    num_heads,
    num_rows,
    num_items,
    stride_iu,
    stride_il,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: a block of out[split, u, h] = Σ_t lhs[h, t] ⊗ rhs[u, h, t], from one split of user u's rows t.

    for each BLOCK_T rows of the user:
        lhs tile [BLOCK_T, BLOCK_K], rhs tile [BLOCK_T, BLOCK_N]
        acc += lhsᵀ rhs                                                   [BLOCK_K, BLOCK_N]
    out[split] = acc

    A user's rows are the first seq_lens[u] of num_rows, or those from offsets[u] up to offsets[u + 1]. With item_ids
    the row of rhs is item_ids[u, t], and zeros where that is not below num_items. Rows outside num_rows are left out.
    lhs and rhs are BHND; lhs has no batch axis.
    """
    bh = tl.program_id(0).to(tl.int64)
    user, head = bh // num_heads, bh % num_heads
    first_k = tl.program_id(1) // tl.cdiv(WIDTH, BLOCK_N) * BLOCK_K
    first_column = tl.program_id(1) % tl.cdiv(WIDTH, BLOCK_N) * BLOCK_N
    first_row, length, _ = locate_sequence(user, num_rows, seq_lens, offsets, False)
    if offsets is None:
        length = tl.minimum(length, num_rows)
    else:
        end = tl.minimum(first_row + length, num_rows)
        first_row = tl.minimum(tl.maximum(first_row, 0), num_rows)
        length = tl.maximum(end - first_row, 0).to(tl.int32)
    split_size = tl.cdiv(tl.cdiv(length, BLOCK_T), tl.num_programs(2)) * BLOCK_T
    start = tl.program_id(2) * split_size
    stop = tl.minimum(start + split_size, length)
    lhs_base = lhs.ptr + head * lhs.stride_h + first_row * lhs.stride_n + offset(first_k, lhs.stride_d)
    rhs_base = rhs.ptr + user * rhs.stride_b + head * rhs.stride_h + first_row * rhs.stride_n
    rhs_base += offset(first_column, rhs.stride_d)
    acc = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for first in range(start, stop, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        valid = rows < stop
        lhs_tile = load_rows(lhs_base, rows, valid, lhs.stride_n, lhs.stride_d, K - first_k, BLOCK_K)  # [BT, BK]
        if item_ids is not None:
            rows = tl.load(item_ids + user * stride_iu + offset(rows, stride_il), mask=valid, other=-1)
            valid = (rows >= 0) & (rows < num_items)
        rhs_tile = load_rows(rhs_base, rows, valid, rhs.stride_n, rhs.stride_d, WIDTH - first_column, BLOCK_N)
        acc = dot_mixed(tl.trans(lhs_tile), rhs_tile, acc)
    num_bh = tl.num_programs(0).to(tl.int64)
    out_base = out + (tl.program_id(2) * num_bh + bh) * K * WIDTH + first_column
    ks = first_k + tl.arange(0, BLOCK_K)
    store_rows(out_base, acc, ks, ks < K, WIDTH, 1, WIDTH - first_column, BLOCK_N)


def launch_lrea_jagged_jagged_bmm(x: Tensor, y: Tensor, target_offsets: Tensor) -> Tensor:
    """Σ x[t, h] ⊗ y[t, h] over the targets of each user: [T, H, k], [T, H, n] -> float32 [U, H, k, n].

    target_offsets is contiguous.
    """
    targets, users = x.shape[0], target_offsets.shape[0] - 1
    block_t = targets_per_block(targets, users, torch.float32)
    y = y.transpose(0, 1).expand(users, -1, -1, -1)
    partials = launch_outer_sum(x.transpose(0, 1), y, None, target_offsets, None, targets, block_t)
    return reduce_splits(partials, torch.float32)


def launch_outer_sum(
    lhs: Tensor,
    rhs: Tensor,
    seq_lens: Tensor | None,
    offsets: Tensor | None,
    item_ids: Tensor | None,
    num_rows: int,
    block_t: int,
) -> Tensor:
    """lhs [H, rows, k], rhs [U, H, rows, n], both of any strides -> float32 [splits, U, H, k, n]."""
    users, heads, num_items, width = rhs.shape
    k = lhs.shape[2]
    tile = TileConfig(min(block_width(k), 64), min(block_width(width), 64), num_warps=4, num_stages=3)
    tiles = triton.cdiv(k, tile.block_m) * triton.cdiv(width, tile.block_n)
    splits = num_splits(users * heads * tiles, triton.cdiv(num_rows, block_t))
    out = rhs.new_empty(splits, users, heads, k, width, dtype=torch.float32)
    grid = (users * heads, tiles, splits)
    if 0 in grid:
        return out
    stride_iu, stride_il = (0, 0) if item_ids is None else item_ids.stride()
    with torch.cuda.device_of(lhs):
        lrea_outer_sum_kernel[grid](
            *(BHND(lhs, 0, *lhs.stride()), bhnd(rhs), seq_lens, offsets, item_ids, out),
            *(heads, num_rows, num_items, stride_iu, stride_il),
            K=k,
            WIDTH=width,
            BLOCK_T=block_t,
            BLOCK_K=tile.block_m,
            BLOCK_N=tile.block_n,
            **tile.launch_options,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
    return out

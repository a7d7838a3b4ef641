"""Launches of `lrea_attention`: its tiles, what is split to fill a GPU, and when sorting users pays.

The forward is one launch, the backward three; sorting users adds one to the forward. Batches too small to fill a GPU
split W's columns, and add up the splits in a launch of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from recattn.triton_kernels.common.launch import (
    TileConfig,
    cached,
    cdiv,
    host_block_width,
    launch,
    num_splits,
    reduce_splits,
)
from recattn.triton_kernels.common.tiles import bhnd
from recattn.triton_kernels.lrea.core import lrea_columns_kernel, lrea_rows_kernel
from recattn.triton_kernels.lrea.jagged import (
    Jagged,
    lrea_reduce_rows_kernel,
    lrea_sort_users_kernel,
    lrea_user_gradients_kernel,
)

LARGEST_RANK = 256
# One program for each multiprocessor of an H200: with as many, rows are not split.
MULTIPROCESSORS = 132
# Splitting the columns costs a launch, which takes as long as so many blocks of columns.
FEWEST_SPLIT_STEPS = 32
# Splitting a user's targets costs a sum of the splits, which takes as long as so many targets.
FEWEST_SPLIT_TARGETS = 1024
# So many products in a pass of the middle factor take several times as long as a launch or two that save some of them.
LARGE_PRODUCT = 1 << 28
# Sorting takes time for each pair of users.
PRODUCTS_PER_PAIR = 16
SORT_TILE = TileConfig(32, 128, num_warps=4, num_stages=2)
REDUCE_TILE = TileConfig(16, 32, num_warps=4, num_stages=2)
# Columns of W in 16 bytes of half precision.
ALIGNMENT = 8
# Elements of dW that a program adds up.
REDUCE_BLOCK = 1024


class AttentionConfig(NamedTuple):
    """Tiles of each kernel, BLOCK_M rows of x by BLOCK_N columns of W. `bwd_rows` is the rows kernel with dy."""

    fwd: TileConfig
    bwd_rows: TileConfig
    bwd_columns: TileConfig

    @classmethod
    def of(cls, *tiles: tuple[int, int, int, int]) -> "AttentionConfig":
        return cls(*(TileConfig(*tile) for tile in tiles))


# Tiles that do not spill, by precision and rank. Float32 tiles are small: float32 products are made in registers.
TILES = {
    "half": {
        64: AttentionConfig.of((64, 64, 4, 3), (64, 64, 4, 3), (64, 128, 8, 3)),
        128: AttentionConfig.of((64, 64, 4, 2), (64, 32, 4, 2), (64, 64, 8, 2)),
        256: AttentionConfig.of((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    "single": {
        32: AttentionConfig.of((32, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
        64: AttentionConfig.of((32, 32, 4, 2), (16, 32, 8, 2), (32, 32, 8, 2)),
        128: AttentionConfig.of((16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2)),
        256: AttentionConfig.of((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    },
}


@cached
def heuristic(rank: int, dtype: torch.dtype) -> AttentionConfig:
    tiles = TILES["single" if dtype == torch.float32 else "half"]
    return tiles[min(limit for limit in tiles if limit >= rank)]


def sorts_users(users: int, rows: int, columns: int, rank: int) -> bool:
    """Whether rows are sorted by length: it depends on sizes alone."""
    return users > 1 and rows * columns * rank >= max(LARGE_PRODUCT, PRODUCTS_PER_PAIR * users**2)


def align(w: Tensor, rows: int) -> Tensor:
    """W, contiguous, with columns of zeros where its rows would not be aligned and so many rows are multiplied."""
    rank, columns = w.shape
    if columns % ALIGNMENT and rows * columns * rank >= LARGE_PRODUCT:
        return pad(w, (0, -columns % ALIGNMENT))
    return w.contiguous()


def unit_of(w: Tensor) -> int:
    """Columns that are loaded at once."""
    return ALIGNMENT if w.shape[1] % ALIGNMENT == 0 else 1


def launch_lrea_attention_fwd(
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    w: Tensor,
    target_offsets: Tensor,
    seq_lens: Tensor | None,
    negative_slope: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [T, H, dv] in targets' dtype; x, y and the plan of `Jagged`, which the backward takes.

    Tensors of any strides; target_offsets and seq_lens are contiguous.
    """
    (num_targets, heads, _), (users, _, rank, value_width), columns = targets.shape, values.shape, w.shape[1]
    w = align(w, num_targets * heads)
    out = targets.new_empty(num_targets, heads, value_width)
    parts = 1 if w.dtype == torch.float32 else 2
    x = w.new_empty(parts, num_targets, heads, rank)
    plan = out.new_empty(3 * num_targets + 4 * (users + 2), dtype=torch.int32)
    jagged = Jagged(target_offsets, seq_lens, plan)
    is_sorted = seq_lens is not None and sorts_users(users, num_targets * heads, columns, rank)
    if is_sorted:
        _launch_sort(jagged, num_targets, users, columns)
    y = _launch_rows(targets, keys, values, jagged, w, columns, x, None, out, negative_slope, (scale, 1.0), is_sorted)
    return out, x, y, plan


def launch_lrea_attention_bwd(
    dout: Tensor,
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    w: Tensor,
    target_offsets: Tensor,
    seq_lens: Tensor | None,
    x: Tensor,
    y: Tensor,
    plan: Tensor,
    negative_slope: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dtargets, dkeys, dvalues and dw, contiguous and in targets' dtype. Arguments as in the forward."""
    (num_targets, heads, _), (users, _, rank, _), columns = targets.shape, keys.shape, w.shape[1]
    w = align(w, num_targets * heads)
    jagged = Jagged(target_offsets, seq_lens, plan)
    is_sorted = seq_lens is not None and sorts_users(users, num_targets * heads, columns, rank)
    dtargets = torch.empty_like(targets, memory_format=torch.contiguous_format)
    dy = x.new_empty(num_targets, heads, rank)
    dx = _launch_rows(dout, values, keys, jagged, w, columns, x, dy, dtargets, negative_slope, (1.0, scale), is_sorted)
    dw = _launch_columns(x, dy, w, columns, None if seq_lens is None else plan, negative_slope, is_sorted)
    dkeys, dvalues, dw = _launch_user_gradients(dx, y, targets, dout, jagged, users, dw, scale, is_sorted)
    return dtargets, dkeys, dvalues, dw


def _launch_sort(jagged: Jagged, targets: int, users: int, columns: int) -> None:
    launch(
        lrea_sort_users_kernel,
        (cdiv(users + 2, SORT_TILE.block_m),),
        *(jagged, targets, users, columns),
        BLOCK_M=SORT_TILE.block_m,
        BLOCK_N=SORT_TILE.block_n,
        **SORT_TILE.launch_options,
    )


def _launch_rows(
    lhs: Tensor,
    lhs_matrices: Tensor,
    out_matrices: Tensor,
    jagged: Jagged,
    w: Tensor,
    columns: int,
    x: Tensor,
    dy: Tensor | None,
    out: Tensor,
    negative_slope: float,
    scales: tuple[float, float],
    is_sorted: bool,
) -> Tensor:
    """Fill out, and x or dy; returns y, float32 [T, H, r]. Arguments as in `lrea_rows_kernel`."""
    (targets, heads, width), (users, _, rank, out_width) = lhs.shape, out_matrices.shape
    lhs_scale, out_scale = scales
    config = heuristic(rank, w.dtype)
    tile = config.fwd if dy is None else config.bwd_rows
    blocks = cdiv(targets, tile.block_m) * heads
    y = lhs.new_empty(targets, heads, rank, dtype=torch.float32)
    if blocks == 0:
        return y
    steps = cdiv(columns, tile.block_n)
    splits = 1 if blocks >= MULTIPROCESSORS or steps < FEWEST_SPLIT_STEPS else num_splits(blocks, steps)
    partials = y if splits == 1 else y.new_empty(splits, *y.shape)
    search_steps, w_unit = (users + 2).bit_length(), unit_of(w)
    block_r = host_block_width(rank)
    block_d = 16
    launch(
        lrea_rows_kernel,
        (blocks, splits),
        *(bhnd(lhs, jagged.target_offsets), bhnd(lhs_matrices), bhnd(out_matrices), jagged),
        *(w, x, dy, partials, out if splits == 1 else None),
        *(targets, users, heads, columns, w.shape[1] // w_unit, lhs_scale, out_scale, negative_slope, search_steps),
        LHS_WIDTH=width,
        RANK=rank,
        OUT_WIDTH=out_width,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=block_r,
        BLOCK_K=min(block_r, block_d),
        BLOCK_D=block_d,
        W_UNIT=w_unit,
        SORTED=is_sorted,
        **tile.launch_options,
    )
    if splits > 1:
        launch(
            lrea_reduce_rows_kernel,
            (cdiv(targets, REDUCE_TILE.block_m) * heads,),
            *(partials, bhnd(out_matrices), jagged, y, out),
            *(targets, users, heads, splits, out_scale),
            RANK=rank,
            OUT_WIDTH=out_width,
            BLOCK_M=REDUCE_TILE.block_m,
            BLOCK_R=block_r,
            BLOCK_K=min(block_r, block_d),
            BLOCK_N=block_d,
            SORTED=is_sorted,
            **REDUCE_TILE.launch_options,
        )
    return y


def _launch_columns(
    x: Tensor, dy: Tensor, w: Tensor, columns: int, plan: Tensor | None, negative_slope: float, is_sorted: bool
) -> Tensor:
    """dW [1, r, L] in w's dtype, or float32 [splits, r, L]."""
    targets, heads, rank = dy.shape
    tile = heuristic(rank, w.dtype).bwd_columns
    blocks = cdiv(columns, tile.block_n)
    splits = num_splits(blocks, cdiv(targets * heads, tile.block_m))
    dw = w.new_empty(splits, rank, columns, dtype=w.dtype if splits == 1 else torch.float32)
    if blocks == 0:
        return dw
    w_unit = unit_of(w)
    launch(
        lrea_columns_kernel,
        (blocks, splits),
        *(x, dy, w, plan, dw),
        *(targets, heads, columns, w.shape[1] // w_unit, negative_slope, targets.bit_length()),
        RANK=rank,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_R=host_block_width(rank),
        W_UNIT=w_unit,
        SORTED=is_sorted,
        **tile.launch_options,
    )
    return dw


def _launch_user_gradients(
    dx: Tensor,
    y: Tensor,
    targets: Tensor,
    dout: Tensor,
    jagged: Jagged,
    users: int,
    dw: Tensor,
    scale: float,
    is_sorted: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dkeys, dvalues, and dW of the splits that `_launch_columns` left."""
    (num_targets, heads, rank), width, value_width = y.shape, targets.shape[2], dout.shape[2]
    dtype, dw_splits = targets.dtype, len(dw)
    block_t = targets_per_block(num_targets, users)
    tile = TileConfig(min(host_block_width(rank), 64), min(host_block_width(max(width, value_width)), 64), 4, 3)
    programs = users * heads * cdiv(rank, tile.block_m) * cdiv(max(width, value_width), tile.block_n)
    is_split = programs < MULTIPROCESSORS and num_targets >= FEWEST_SPLIT_TARGETS * users
    splits = num_splits(programs, cdiv(num_targets, block_t)) if is_split else 1
    kept = dtype if splits == 1 else torch.float32
    dkeys = targets.new_empty(splits, users, heads, rank, width, dtype=kept)
    dvalues = targets.new_empty(splits, users, heads, rank, value_width, dtype=kept)
    dw_sum = None
    if dw_splits > 1:
        dw_sum = torch.empty_like(dw[0], dtype=dtype)
        programs += cdiv(dw_sum.numel(), REDUCE_BLOCK)
    if programs:
        launch(
            lrea_user_gradients_kernel,
            (programs, splits),
            *(dx, y, bhnd(targets, jagged.target_offsets), bhnd(dout, jagged.target_offsets), jagged),
            *(dkeys, dvalues, dw, dw_sum),
            *(num_targets, users, heads, scale, dw[0].numel(), dw_splits),
            RANK=rank,
            WIDTH=width,
            VALUE_WIDTH=value_width,
            BLOCK_T=block_t,
            BLOCK_R=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_W=REDUCE_BLOCK,
            SORTED=is_sorted,
            **tile.launch_options,
        )
    return reduce_splits(dkeys, dtype), reduce_splits(dvalues, dtype), dw[0] if dw_sum is None else dw_sum


def targets_per_block(targets: int, users: int) -> int:
    """Few, the least that tl.dot takes, where a block's targets would be of many users."""
    return 16 if targets < 32 * users else 32

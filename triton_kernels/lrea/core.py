"""LREA's middle factor: a two-layer MLP with tied weights, forward and backward, tile by tile.

    out = φ(x W) Wᵀ                  x [N, r], W [r, L], φ the leaky ReLU, L the length of a history

φ(s) = φ'(s) s, so out = J(x) x with J(x) = W diag(φ'(x W)) Wᵀ. J is symmetric, so dx = J(x) dout: one kernel, which
computes rows of the result and loops over the columns of W, is the forward and half of the backward. The other kernel
computes columns of

    dW = Σ_n  x_n ⊗ φ'(x_n W)∘(dout_n W) + dout_n ⊗ φ(x_n W)

and loops over the rows. Both recompute the hidden layer x W in tiles: no tensor [N, L] is in memory. Where rows see
different numbers of columns, they are sorted by that number: a block of rows then sees about the same columns, and a
block of columns is seen by the last rows.

Half precision rounds x, dout, and φ and φ'∘(dout W) before they multiply W, so in float16 they must be in its range;
sums are float32. φ' jumps at 0, so the backward adds the hidden layer of x's rounding error: its signs are then
float32's.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from recattn.triton_kernels.common.launch import ENABLE_FP_FUSION, TileConfig, num_splits, reduce_splits
from recattn.triton_kernels.common.tiles import block_width, load_rows, offset, store_rows

LARGEST_RANK = 256


@triton.jit
def count_at_most(ascending, size, values, search_steps):
    """How many of `size` ascending numbers in memory are at most each value: a binary search."""
    low = values * 0
    high = low + size
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        searching = low < high
        at_most = tl.load(ascending + middle, mask=searching, other=0) <= values
        high = tl.where(searching & (at_most == 0), middle, high)
        low = tl.where(searching & at_most, middle + 1, low)
    return low


# --- The kernels ---


@triton.jit
def leaky_relu_grad(dhidden, hidden, negative_slope):
    """φ'(hidden) · dhidden. Of hidden itself that is φ(hidden)."""
    return tl.where(hidden > 0, dhidden, negative_slope * dhidden)


@triton.jit
def add_columns(
    acc,
    x_tile,
    x_error_tile,
    dout_tile,
    w,
    stride_w,
    first_column,
    lengths,
    negative_slope,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc + φ(x W) Wᵀ over a block of columns; with dout acc + (φ'(x W)∘(dout W)) Wᵀ."""
    ranks = tl.arange(0, acc.shape[1])
    columns = first_column + tl.arange(0, BLOCK_N)
    w_tile = tl.load(w + offset(ranks[:, None], stride_w) + columns[None, :])  # [R, BN]
    hidden = tl.dot(x_tile, w_tile, input_precision="ieee")  # [BM, BN]
    if x_error_tile is not None:
        hidden = tl.dot(x_error_tile, w_tile, hidden, input_precision="ieee")
    dhidden = hidden
    if dout_tile is not None:
        dhidden = tl.dot(dout_tile, w_tile, input_precision="ieee")
    activated = leaky_relu_grad(dhidden, hidden, negative_slope)
    if MASKED:
        activated = tl.where(columns[None, :] < lengths[:, None], activated, 0.0)
    return tl.dot(activated.to(w_tile.dtype), tl.trans(w_tile), acc, input_precision="ieee")


# A new batch, or a new number for an option, must not compile anew.
@triton.jit(do_not_specialize=["N", "L", "negative_slope"])
def lrea_middle_factor_rows_kernel(
    x,
    x_error,
    dout,
    w,
    lengths,
    order,
    out,
    N,
    L,
    stride_w,
    negative_slope,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M rows of out = φ(x W) Wᵀ, or with dout of dx = (φ'(x W)∘(dout W)) Wᵀ, from one split of W.

    for each BLOCK_N columns of W:                                        W tile [R, BLOCK_N]
        hidden = x W (+ x_error W)                                        [BLOCK_M, BLOCK_N]
        activated = φ(hidden), or φ'(hidden)∘(dout W)                     masked only beyond the shortest row
        acc += activated Wᵀ                                               [BLOCK_M, R]
    out[split] = acc                                                      `order` puts sorted rows back in place
    """
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < N
    x_tile = load_rows(x, rows, valid, RANK, 1, RANK, BLOCK_R)  # [BM, R]
    x_error_tile = None
    if x_error is not None:
        x_error_tile = load_rows(x_error, rows, valid, RANK, 1, RANK, BLOCK_R)
    dout_tile = None
    if dout is not None:
        dout_tile = load_rows(dout, rows, valid, RANK, 1, RANK, BLOCK_R)
    # Columns that some row sees, and columns that all rows see. Behind column L W is zero.
    row_lengths = None
    seen_by_some = L
    seen_by_all = L
    if lengths is not None:
        row_lengths = tl.load(lengths + rows, mask=valid, other=0)
        seen_by_some = tl.minimum(tl.load(lengths + tl.minimum(first_row + BLOCK_M, N) - 1), L)
        shortest = tl.load(lengths + first_row)
        seen_by_all = tl.where(shortest < L, shortest // BLOCK_N * BLOCK_N, L)
    split_size = tl.cdiv(tl.cdiv(seen_by_some, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    start = tl.program_id(1) * split_size
    stop = tl.minimum(start + split_size, seen_by_some)
    masked_from = tl.maximum(tl.minimum(seen_by_all, stop), start)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for column in range(start, masked_from, BLOCK_N):
        acc = add_columns(
            acc, x_tile, x_error_tile, dout_tile, w, stride_w, column, row_lengths, negative_slope, BLOCK_N, False
        )
    if lengths is not None:
        for column in range(tl.multiple_of(masked_from, BLOCK_N), stop, BLOCK_N):
            acc = add_columns(
                acc, x_tile, x_error_tile, dout_tile, w, stride_w, column, row_lengths, negative_slope, BLOCK_N, True
            )
        rows = tl.load(order + rows, mask=valid, other=0)
    split_out = out + tl.program_id(1).to(tl.int64) * N * RANK
    store_rows(split_out, acc, rows, valid, RANK, 1, RANK, BLOCK_R)


@triton.jit
def add_rows(
    acc,
    w_tile,
    columns,
    x,
    x_error,
    dout,
    first_row,
    stop,
    lengths,
    negative_slope,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc [BN, R] + the gradient of columns of W from a block of rows."""
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < stop
    x_tile = load_rows(x, rows, valid, RANK, 1, RANK, acc.shape[1])  # [BM, R]
    dout_tile = load_rows(dout, rows, valid, RANK, 1, RANK, acc.shape[1])
    hidden = tl.dot(w_tile, tl.trans(x_tile), input_precision="ieee")  # [BN, BM]
    if x_error is not None:
        x_error_tile = load_rows(x_error, rows, valid, RANK, 1, RANK, acc.shape[1])
        hidden = tl.dot(w_tile, tl.trans(x_error_tile), hidden, input_precision="ieee")
    dhidden = leaky_relu_grad(tl.dot(w_tile, tl.trans(dout_tile), input_precision="ieee"), hidden, negative_slope)
    activated = leaky_relu_grad(hidden, hidden, negative_slope)
    if MASKED:
        seen = columns[:, None] < tl.load(lengths + rows, mask=valid, other=0)[None, :]
        dhidden, activated = tl.where(seen, dhidden, 0.0), tl.where(seen, activated, 0.0)
    acc = tl.dot(dhidden.to(x_tile.dtype), x_tile, acc, input_precision="ieee")
    return tl.dot(activated.to(dout_tile.dtype), dout_tile, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["N", "L", "negative_slope", "search_steps"])
def lrea_middle_factor_columns_kernel(
    x,
    x_error,
    dout,
    w,
    lengths,
    dw,
    N,
    L,
    stride_w,
    negative_slope,
    search_steps,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N columns of dW, from one split of the rows that see them.

    for each BLOCK_M rows:                                                x, dout tiles [BLOCK_M, R]
        hidden = Wᵀ xᵀ (+ Wᵀ x_errorᵀ)                                    [BLOCK_N, BLOCK_M]
        dhidden = φ'(hidden)∘(Wᵀ doutᵀ);  activated = φ(hidden)           masked only before the first row to see all
        acc += dhidden x + activated dout                                 [BLOCK_N, R]
    dw[split] = accᵀ
    """
    first_column = tl.program_id(0) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    w_tile = tl.load(w + columns[:, None] + offset(ranks[None, :], stride_w))  # [BN, R]
    # Rows ascend by length: those from first_row on see some of these columns, the last of them all.
    first_row = 0
    first_to_see_all = 0
    if lengths is not None:
        first_row = count_at_most(lengths, N, first_column, search_steps)
        last_column = tl.minimum(first_column + BLOCK_N, L) - 1
        first_to_see_all = count_at_most(lengths, N, last_column, search_steps)
    split_size = tl.cdiv(tl.cdiv(N - first_row, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    start = first_row + tl.program_id(1) * split_size
    stop = tl.minimum(start + split_size, N)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    if lengths is not None:
        blocks = tl.cdiv(tl.maximum(tl.minimum(first_to_see_all, stop) - start, 0), BLOCK_M)
        masked_until = start + blocks * BLOCK_M
        for row in range(start, masked_until, BLOCK_M):
            acc = add_rows(
                acc, w_tile, columns, x, x_error, dout, row, stop, lengths, negative_slope, RANK, BLOCK_M, True
            )
        start = masked_until
    for row in range(start, stop, BLOCK_M):
        acc = add_rows(acc, w_tile, columns, x, x_error, dout, row, stop, lengths, negative_slope, RANK, BLOCK_M, False)
    split_dw = dw + tl.program_id(1).to(tl.int64) * RANK * L
    store_rows(split_dw, acc, columns, columns < L, 1, L, RANK, BLOCK_R)


# --- Launchers ---


class RaggedRows(NamedTuple):
    """Rows sorted by the number of columns of W that they see."""

    lengths: Tensor  # [N] int32, ascending
    order: Tensor  # [N] the row of the result that each sorted row is


class MiddleFactorConfig(NamedTuple):
    """Tiles of each kernel, BLOCK_M rows of x by BLOCK_N columns of W. `bwd_rows` is the rows kernel with dout."""

    fwd: TileConfig
    bwd_rows: TileConfig
    bwd_columns: TileConfig

    @classmethod
    def heuristic(cls, rank: int, dtype: torch.dtype) -> "MiddleFactorConfig":
        tiles = TILES["single" if dtype == torch.float32 else "half"]
        return tiles[min(limit for limit in tiles if limit >= rank)]

    @classmethod
    def of(cls, *tiles: tuple[int, int, int, int]) -> "MiddleFactorConfig":
        return cls(*(TileConfig(*tile) for tile in tiles))


LARGEST_BLOCK = 128
# Tiles that do not spill, by precision and rank. Float32 tiles are small: float32 products are made in registers.
TILES = {
    "half": {
        64: MiddleFactorConfig.of((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
        128: MiddleFactorConfig.of((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
        256: MiddleFactorConfig.of((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    "single": {
        32: MiddleFactorConfig.of((32, 64, 4, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
        64: MiddleFactorConfig.of((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
        128: MiddleFactorConfig.of((16, 16, 4, 2), (16, 16, 4, 2), (16, 16, 8, 2)),
        256: MiddleFactorConfig.of((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    },
}


def launch_lrea_middle_factor_fwd(x: Tensor, w: Tensor, ragged: RaggedRows | None, negative_slope: float) -> Tensor:
    """out, float32 [N, r]; x [N, r] is contiguous, w [r, L] has its dtype. `ragged`: x is sorted, and out is not."""
    inputs = MiddleFactorInputs(x, None, _pad_to_blocks(w), w.shape[1], ragged, negative_slope)
    tile = MiddleFactorConfig.heuristic(x.shape[1], w.dtype).fwd
    return reduce_splits(_launch_rows(inputs, None, tile), torch.float32)


def launch_lrea_middle_factor_bwd(
    dout: Tensor, x: Tensor, x_error: Tensor | None, w: Tensor, ragged: RaggedRows | None, negative_slope: float
) -> tuple[Tensor, Tensor]:
    """dx, float32 [N, r], and dw, float32 [r, L].

    dout and x_error (what rounding took from x) are like x; otherwise as in the forward.
    """
    inputs = MiddleFactorInputs(x, x_error, _pad_to_blocks(w), w.shape[1], ragged, negative_slope)
    config = MiddleFactorConfig.heuristic(x.shape[1], w.dtype)
    dx = _launch_rows(inputs, dout, config.bwd_rows)
    dw = _launch_columns(inputs, dout, config.bwd_columns)
    return reduce_splits(dx, torch.float32), reduce_splits(dw, torch.float32)


class MiddleFactorInputs(NamedTuple):
    """What both launches take."""

    x: Tensor
    x_error: Tensor | None
    w: Tensor  # padded to whole blocks
    num_columns: int  # without the padding
    ragged: RaggedRows | None
    negative_slope: float


def _pad_to_blocks(w: Tensor) -> Tensor:
    """W, contiguous, with zeros up to whole blocks: zeros add nothing to a product, so no load of W needs a mask."""
    rank, columns = w.shape
    missing = (0, -columns % LARGEST_BLOCK, 0, block_width(rank) - rank)
    return pad(w, missing) if any(missing) else w.contiguous()


def _launch_rows(inputs: MiddleFactorInputs, dout: Tensor | None, tile: TileConfig) -> Tensor:
    """[splits, N, r]: out, or with dout dx."""
    x, x_error, w, columns, ragged, negative_slope = inputs
    lengths, order = ragged or (None, None)
    rows, rank = x.shape
    blocks = triton.cdiv(rows, tile.block_m)
    splits = num_splits(blocks, triton.cdiv(columns, tile.block_n))
    out = x.new_empty(splits, rows, rank, dtype=torch.float32)
    if blocks == 0:
        return out
    with torch.cuda.device_of(x):
        lrea_middle_factor_rows_kernel[(blocks, splits)](
            *(x, x_error, dout, w, lengths, order, out),
            *(rows, columns, w.stride(0), negative_slope),
            RANK=rank,
            BLOCK_R=w.shape[0],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **tile.launch_options,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
    return out


def _launch_columns(inputs: MiddleFactorInputs, dout: Tensor, tile: TileConfig) -> Tensor:
    """[splits, r, L]: dW."""
    x, x_error, w, columns, ragged, negative_slope = inputs
    rows, rank = x.shape
    blocks = triton.cdiv(columns, tile.block_n)
    splits = num_splits(blocks, triton.cdiv(rows, tile.block_m))
    dw = x.new_empty(splits, rank, columns, dtype=torch.float32)
    if blocks == 0:
        return dw
    with torch.cuda.device_of(x):
        lrea_middle_factor_columns_kernel[(blocks, splits)](
            *(x, x_error, dout, w, ragged and ragged.lengths, dw),
            *(rows, columns, w.stride(0), negative_slope, rows.bit_length()),
            RANK=rank,
            BLOCK_R=w.shape[0],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            **tile.launch_options,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
    return dw

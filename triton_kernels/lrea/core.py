"""LREA's restored form: the middle factor in one kernel by rows and one by columns, and each target times its user's
matrix.

With J(z) = W diag(φ'(z W)) Wᵀ, φ the leaky ReLU, the middle factor is y = φ(z W) Wᵀ = J(z) z, for φ(s) = φ'(s) s, and
J is symmetric: dz = J(z) dy. So one kernel, which keeps rows of the result and visits the columns of W, is both the
forward and half of the backward. The other half keeps columns of

    dW = Σ_t  z_t ⊗ φ'(z_t W)∘(dy_t W) + dy_t ⊗ φ(z_t W)

and visits the rows. Scores are recomputed in tiles; no tensor of rows × columns is in memory. Where rows see different
numbers of columns, they come in ascending order of those: a block of rows sees about the same columns, and a block of
columns is seen by the last rows.

Half precision rounds z, dy, and φ and φ'∘(dy W) before their product with W, so in float16 they must be in its range;
sums are float32. φ' jumps at 0, so the backward takes the scores of z and of what rounding left of it: their signs are
float32's.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from recattn.triton_kernels.common.compilation import Compilation
from recattn.triton_kernels.common.launch import ARCHITECTURES, MAX_REGISTERS, launch_kernel, strides
from recattn.triton_kernels.common.tiles import block_width, load_rows, offset, store_rows

LARGEST_RANK = 256

# --- Launches, of lrea_compress too ---

# Four programs for each of an H200's 132 multiprocessors.
FULL_GRID = 528
# A shorter share would cost more to sum than it saves.
FEWEST_STEPS = 8


def share_count(programs: int, steps: int) -> int:
    """Into how many shares the loops of too few programs to fill a GPU are cut. Sizes alone decide: reruns agree."""
    return max(1, min(FULL_GRID // max(programs, 1), steps // FEWEST_STEPS))


def sum_of_shares(partials: Tensor, dtype: torch.dtype) -> Tensor:
    return (partials[0] if len(partials) == 1 else partials.sum(0)).to(dtype)


@dataclass(frozen=True)
class Tile:
    """Launch parameters of one kernel: what a program keeps, what it visits at a time, warps, pipeline stages."""

    kept: int
    visited: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launch:
    """One launch: to run, or to compile without a GPU."""

    kernel: object
    grid: tuple[int, ...]
    arguments: Mapping[str, object]
    tile: Tile

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages, "maxnreg": MAX_REGISTERS}

    def run(self) -> None:
        if 0 in self.grid:
            return
        with torch.cuda.device_of(next(x for x in self.arguments.values() if isinstance(x, Tensor))):
            launch_kernel(self.kernel, self.grid, self.arguments, **self.options)

    def compilation(self, label: str, architecture: int) -> Compilation:
        label = f"{label} {self.tile.kept}x{self.tile.visited}"
        return Compilation.of(self.kernel, label, architecture, self.arguments, **self.options)


# --- What the kernels share ---


@triton.jit
def count_at_most(ascending, size, values, search_steps):
    """Of each value, how many of `size` ascending numbers in memory are at most that: a binary search."""
    low = values * 0
    high = low + size
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        searching = low < high
        at_most = tl.load(ascending + middle, mask=searching, other=0) <= values
        high = tl.where(searching & (at_most == 0), middle, high)
        low = tl.where(searching & at_most, middle + 1, low)
    return low


@triton.jit
def dot_of_any(a, b, acc):
    """a b + acc. Float32 beside half precision is rounded to TF32, whose mantissa is float16's."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")


@triton.jit
def times_slope(x, scores, negative_slope):
    """φ'(scores) x; φ(scores) where x is the scores."""
    return tl.where(scores > 0, x, negative_slope * x)


# --- The middle factor ---


@triton.jit
def add_columns(
    acc,
    z_tile,
    rest_tile,
    x_tile,
    w,
    stride_w,
    first_column,
    lengths,
    negative_slope,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc + (φ'(z W)∘(x W)) Wᵀ over a block of columns; x None: z."""
    ranks = tl.arange(0, acc.shape[1])
    columns = first_column + tl.arange(0, BLOCK_N)
    w_tile = tl.load(w + offset(ranks[:, None], stride_w) + columns[None, :])  # [R, BN]
    scores = tl.dot(z_tile, w_tile, input_precision="ieee")  # [BM, BN]
    if rest_tile is not None:
        scores = tl.dot(rest_tile, w_tile, scores, input_precision="ieee")
    x_scores = scores
    if x_tile is not None:
        x_scores = tl.dot(x_tile, w_tile, input_precision="ieee")
    weights = times_slope(x_scores, scores, negative_slope)
    if MASKED:
        weights = tl.where(columns[None, :] < lengths[:, None], weights, 0.0)
    return tl.dot(weights.to(w_tile.dtype), tl.trans(w_tile), acc, input_precision="ieee")


# What changes with the batch, or from call to call, must not compile anew.
@triton.jit(do_not_specialize=["N", "L", "negative_slope"])
def lrea_middle_factor_rows_kernel(
    z,
    z_rest,
    x,
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
    """out[share] = J(z) x, the columns of W cut into shares; x None: z."""
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest first
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < N
    z_tile = load_rows(z, rows, valid, RANK, 1, RANK, BLOCK_R)  # [BM, R]
    rest_tile = None
    if z_rest is not None:
        rest_tile = load_rows(z_rest, rows, valid, RANK, 1, RANK, BLOCK_R)
    x_tile = None
    if x is not None:
        x_tile = load_rows(x, rows, valid, RANK, 1, RANK, BLOCK_R)
    # Columns that some row sees, and those that all see; behind column L stand zeros.
    row_lengths = None
    seen_by_some = L
    seen_by_all = L
    if lengths is not None:
        row_lengths = tl.load(lengths + rows, mask=valid, other=0)
        seen_by_some = tl.minimum(tl.load(lengths + tl.minimum(first_row + BLOCK_M, N) - 1), L)
        shortest = tl.load(lengths + first_row)
        seen_by_all = tl.where(shortest < L, shortest // BLOCK_N * BLOCK_N, L)
    share = tl.cdiv(tl.cdiv(seen_by_some, BLOCK_N), tl.num_programs(1)) * BLOCK_N
    start = tl.program_id(1) * share
    stop = tl.minimum(start + share, seen_by_some)
    masked_from = tl.maximum(tl.minimum(seen_by_all, stop), start)
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for column in range(start, masked_from, BLOCK_N):
        acc = add_columns(
            acc, z_tile, rest_tile, x_tile, w, stride_w, column, row_lengths, negative_slope, BLOCK_N, False
        )
    if lengths is not None:
        for column in range(tl.multiple_of(masked_from, BLOCK_N), stop, BLOCK_N):
            acc = add_columns(
                acc, z_tile, rest_tile, x_tile, w, stride_w, column, row_lengths, negative_slope, BLOCK_N, True
            )
        rows = tl.load(order + rows, mask=valid, other=0)
    share_out = out + tl.program_id(1).to(tl.int64) * N * RANK
    store_rows(share_out, acc, rows, valid, RANK, 1, RANK, BLOCK_R)


@triton.jit
def add_rows(
    acc,
    w_tile,
    columns,
    z,
    z_rest,
    dy,
    first_row,
    stop,
    lengths,
    negative_slope,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc [BN, R] + the gradient of columns of W by a block of rows."""
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < stop
    z_tile = load_rows(z, rows, valid, RANK, 1, RANK, acc.shape[1])  # [BM, R]
    dy_tile = load_rows(dy, rows, valid, RANK, 1, RANK, acc.shape[1])
    scores = tl.dot(w_tile, tl.trans(z_tile), input_precision="ieee")  # [BN, BM]
    if z_rest is not None:
        rest_tile = load_rows(z_rest, rows, valid, RANK, 1, RANK, acc.shape[1])
        scores = tl.dot(w_tile, tl.trans(rest_tile), scores, input_precision="ieee")
    dscores = times_slope(tl.dot(w_tile, tl.trans(dy_tile), input_precision="ieee"), scores, negative_slope)
    weights = times_slope(scores, scores, negative_slope)
    if MASKED:
        seen = columns[:, None] < tl.load(lengths + rows, mask=valid, other=0)[None, :]
        dscores, weights = tl.where(seen, dscores, 0.0), tl.where(seen, weights, 0.0)
    acc = tl.dot(dscores.to(z_tile.dtype), z_tile, acc, input_precision="ieee")
    return tl.dot(weights.to(dy_tile.dtype), dy_tile, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["N", "L", "negative_slope", "search_steps"])
def lrea_middle_factor_columns_kernel(
    z,
    z_rest,
    dy,
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
    """dw[share] = the gradient of W, the rows that see a block of columns cut into shares."""
    first_column = tl.program_id(0) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    w_tile = tl.load(w + columns[:, None] + offset(ranks[None, :], stride_w))  # [BN, R]
    # The last rows see some of these columns, the last of those all.
    first_row = 0
    first_to_see_all = 0
    if lengths is not None:
        first_row = count_at_most(lengths, N, first_column, search_steps)
        last_column = tl.minimum(first_column + BLOCK_N, L) - 1
        first_to_see_all = count_at_most(lengths, N, last_column, search_steps)
    share = tl.cdiv(tl.cdiv(N - first_row, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    start = first_row + tl.program_id(1) * share
    stop = tl.minimum(start + share, N)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    if lengths is not None:
        blocks = tl.cdiv(tl.maximum(tl.minimum(first_to_see_all, stop) - start, 0), BLOCK_M)
        masked_until = start + blocks * BLOCK_M
        for row in range(start, masked_until, BLOCK_M):
            acc = add_rows(acc, w_tile, columns, z, z_rest, dy, row, stop, lengths, negative_slope, RANK, BLOCK_M, True)
        start = masked_until
    for row in range(start, stop, BLOCK_M):
        acc = add_rows(acc, w_tile, columns, z, z_rest, dy, row, stop, lengths, negative_slope, RANK, BLOCK_M, False)
    share_dw = dw + tl.program_id(1).to(tl.int64) * RANK * L
    store_rows(share_dw, acc, columns, columns < L, 1, L, RANK, BLOCK_R)


class RaggedRows(NamedTuple):
    """Rows by the number of columns of W that they see."""

    lengths: Tensor  # [N] int32, ascending
    order: Tensor  # [N] where each row's result stands


class MiddleFactorConfig(NamedTuple):
    """Launch parameters, a kernel each; by rows without x and with it."""

    fwd: Tile
    bwd_rows: Tile
    bwd_columns: Tile

    @classmethod
    def heuristic(cls, rank: int, dtype: torch.dtype) -> "MiddleFactorConfig":
        tiles = TILES["single" if dtype == torch.float32 else "half"]
        return tiles[min(limit for limit in tiles if limit >= rank)]


LARGEST_BLOCK = 128
# Tiles found not to spill, by precision and rank. Float32 tiles stay small: its products are made in registers.
TILES = {
    "half": {
        64: MiddleFactorConfig(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        128: MiddleFactorConfig(Tile(128, 64, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        256: MiddleFactorConfig(Tile(32, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
    },
    "single": {
        32: MiddleFactorConfig(Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
        64: MiddleFactorConfig(Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
        128: MiddleFactorConfig(Tile(16, 16, 4, 2), Tile(16, 16, 4, 2), Tile(16, 16, 8, 2)),
        256: MiddleFactorConfig(Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2)),
    },
}


def launch_lrea_middle_factor_fwd(z: Tensor, w: Tensor, ragged: RaggedRows | None, negative_slope: float) -> Tensor:
    """y, float32 [N, r]; z [N, r] contiguous and w [r, L] share a dtype. With `ragged` z is sorted, and y is not."""
    tile = MiddleFactorConfig.heuristic(z.shape[1], w.dtype).fwd
    launch, partials = _plan_rows(z, None, None, _padded(w), w.shape[1], ragged, negative_slope, tile)
    launch.run()
    return sum_of_shares(partials, torch.float32)


def launch_lrea_middle_factor_bwd(
    dy: Tensor, z: Tensor, z_rest: Tensor | None, w: Tensor, ragged: RaggedRows | None, negative_slope: float
) -> tuple[Tensor, Tensor]:
    """dz, float32 [N, r], and dw, float32 [r, L]; as in the forward, dy and z_rest like z, whose rounding it is."""
    config = MiddleFactorConfig.heuristic(z.shape[1], w.dtype)
    arguments = (z, z_rest, dy, _padded(w), w.shape[1], ragged, negative_slope)
    by_rows, dz = _plan_rows(*arguments, config.bwd_rows)
    by_columns, dw = _plan_columns(*arguments, config.bwd_columns)
    by_rows.run()
    by_columns.run()
    return sum_of_shares(dz, torch.float32), sum_of_shares(dw, torch.float32)


def _padded(w: Tensor) -> Tensor:
    """W contiguous, in whole blocks of any size: zeros add nothing to a product, and no load needs a mask."""
    rank, columns = w.shape
    missing = (0, -columns % LARGEST_BLOCK, 0, block_width(rank) - rank)
    return pad(w, missing) if any(missing) else w.contiguous()


def _plan_rows(
    z: Tensor,
    z_rest: Tensor | None,
    x: Tensor | None,
    w: Tensor,
    columns: int,
    ragged: RaggedRows | None,
    negative_slope: float,
    tile: Tile,
) -> tuple[Launch, Tensor]:
    """The launch and the shares of J(z) x; `w` is padded, `columns` are its own."""
    blocks = triton.cdiv(z.shape[0], tile.kept)
    shares = share_count(blocks, triton.cdiv(columns, tile.visited))
    partials = z.new_empty(shares, *z.shape, dtype=torch.float32)
    arguments = _middle_factor_arguments(z, z_rest, w, columns, ragged, negative_slope)
    arguments |= {"x": x, "order": ragged and ragged.order, "out": partials}
    arguments |= {"BLOCK_M": tile.kept, "BLOCK_N": tile.visited}
    return Launch(lrea_middle_factor_rows_kernel, (blocks, shares), arguments, tile), partials


def _plan_columns(
    z: Tensor,
    z_rest: Tensor | None,
    dy: Tensor,
    w: Tensor,
    columns: int,
    ragged: RaggedRows | None,
    negative_slope: float,
    tile: Tile,
) -> tuple[Launch, Tensor]:
    """The launch and the shares of dW."""
    rows, rank = z.shape
    blocks = triton.cdiv(columns, tile.kept)
    shares = share_count(blocks, triton.cdiv(rows, tile.visited))
    partials = z.new_empty(shares, rank, columns, dtype=torch.float32)
    arguments = _middle_factor_arguments(z, z_rest, w, columns, ragged, negative_slope)
    arguments |= {"dy": dy, "dw": partials, "search_steps": rows.bit_length()}
    arguments |= {"BLOCK_M": tile.visited, "BLOCK_N": tile.kept}
    return Launch(lrea_middle_factor_columns_kernel, (blocks, shares), arguments, tile), partials


def _middle_factor_arguments(
    z: Tensor, z_rest: Tensor | None, w: Tensor, columns: int, ragged: RaggedRows | None, negative_slope: float
) -> dict[str, object]:
    return {
        "z": z,
        "z_rest": z_rest,
        "w": w,
        "lengths": ragged and ragged.lengths,
        "N": z.shape[0],
        "L": columns,
        "stride_w": w.stride(0),
        "negative_slope": negative_slope,
        "RANK": z.shape[1],
        "BLOCK_R": w.shape[0],
    }


# --- Each target times a matrix of its user ---


@triton.jit(do_not_specialize=["num_targets", "num_users", "num_heads", "search_steps"])
def lrea_user_matmul_kernel(
    rows,
    matrices,
    target_offsets,
    out,
    num_targets,
    num_users,
    num_heads,
    search_steps,
    stride_rt,
    stride_rh,
    stride_rk,
    stride_mu,
    stride_mh,
    stride_mk,
    stride_mn,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[t, h] = rows[t, h] matrices[user of t, h]: a block of targets visits the users that it is of.

    Zeros for targets of no user, before the first offset and behind the last.
    """
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    targets = tl.program_id(0) // num_heads * BLOCK_T + tl.arange(0, BLOCK_T)
    first_column = tl.program_id(1) * BLOCK_N
    valid = targets < num_targets
    users = count_at_most(target_offsets, num_users, targets, search_steps) - 1
    users = tl.where(valid & (targets < tl.load(target_offsets + num_users)), users, -1)
    first_user = tl.min(tl.where(users >= 0, users, num_users))
    last_user = tl.max(users)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    # From 0: of a loop that begins at a reduction's result Triton does not see that its loads are aligned.
    for step in range(0, (last_user + 1 - first_user) * STEPS):
        user = tl.full((), 0, tl.int64) + first_user + step // STEPS
        first_k = step % STEPS * BLOCK_K
        row_base = rows + head * stride_rh + offset(first_k, stride_rk)
        row_tile = load_rows(row_base, targets, valid, stride_rt, stride_rk, K - first_k, BLOCK_K)  # [BT, BK]
        base = matrices + user * stride_mu + head * stride_mh + offset(first_column, stride_mn)
        ks = first_k + tl.arange(0, BLOCK_K)
        matrix_tile = load_rows(base, ks, ks < K, stride_mk, stride_mn, WIDTH - first_column, BLOCK_N)  # [BK, BN]
        product = dot_of_any(row_tile, matrix_tile, tl.zeros_like(acc))
        acc += tl.where((users == user)[:, None], product, 0.0)
    out_base = out + head * WIDTH + first_column
    store_rows(out_base, acc, targets, valid, num_heads * WIDTH, 1, WIDTH - first_column, BLOCK_N)


def launch_lrea_user_matmul(rows: Tensor, matrices: Tensor, target_offsets: Tensor) -> Tensor:
    """[T, H, k] and [U, H, k, n], of any strides -> float32 [T, H, n]; target_offsets is contiguous."""
    launch, out = _plan_user_matmul(rows, matrices, target_offsets)
    launch.run()
    return out


def _plan_user_matmul(rows: Tensor, matrices: Tensor, target_offsets: Tensor) -> tuple[Launch, Tensor]:
    (targets, heads, k), users, width = rows.shape, matrices.shape[0], matrices.shape[-1]
    tile = Tile(targets_a_block(targets, users, rows.dtype), min(block_width(k), 64), num_warps=4, num_stages=3)
    block_n = min(block_width(width), 64)
    out = rows.new_empty(targets, heads, width, dtype=torch.float32)
    arguments = {
        "rows": rows,
        "matrices": matrices,
        "target_offsets": target_offsets,
        "out": out,
        "num_targets": targets,
        "num_users": users,
        "num_heads": heads,
        "search_steps": users.bit_length(),
        **strides("r", rows, "thk"),
        **strides("m", matrices, "uhkn"),
        "K": k,
        "WIDTH": width,
        "BLOCK_T": tile.kept,
        "BLOCK_K": tile.visited,
        "BLOCK_N": block_n,
    }
    grid = (triton.cdiv(targets, tile.kept) * heads, triton.cdiv(width, block_n))
    return Launch(lrea_user_matmul_kernel, grid, arguments, tile), out


def targets_a_block(targets: int, users: int, dtype: torch.dtype) -> int:
    """As few as a product takes where the targets of a block would be of many users."""
    if targets < 32 * users:
        return 16
    # Float32 products are made in registers.
    return 32 if dtype == torch.float32 else 64


# --- What is shipped ---


def shipped_configurations() -> Iterator[Compilation]:
    """What is launched for ranks of 32 to 128 and heads of 64, many targets a user, ragged histories."""
    meta = torch.device("meta")
    lengths = torch.empty(4096, dtype=torch.int32, device=meta)
    ragged = RaggedRows(lengths, torch.empty(4096, dtype=torch.int64, device=meta))
    offsets = torch.empty(9, dtype=torch.int64, device=meta)
    for architecture, (dtype, rank) in itertools.product(
        ARCHITECTURES, ((torch.bfloat16, 32), (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64))
    ):
        z = torch.empty(4096, rank, dtype=dtype, device=meta)
        w = _padded(torch.empty(rank, 10_000, dtype=dtype, device=meta))
        rest = None if dtype == torch.float32 else z
        config = MiddleFactorConfig.heuristic(rank, dtype)
        name = str(dtype).removeprefix("torch.")
        for label, (launch, _) in {
            f"r={rank}": _plan_rows(z, None, None, w, 10_000, ragged, 0.01, config.fwd),
            f"r={rank} dz": _plan_rows(z, rest, z, w, 10_000, ragged, 0.01, config.bwd_rows),
            f"r={rank} dW": _plan_columns(z, rest, z, w, 10_000, ragged, 0.01, config.bwd_columns),
        }.items():
            yield launch.compilation(f"{name} {label}", architecture)
    for architecture, dtype in itertools.product(ARCHITECTURES, (torch.float32, torch.bfloat16)):
        name = str(dtype).removeprefix("torch.")
        y, targets = torch.empty(4096, 2, 64, device=meta), torch.empty(4096, 2, 64, dtype=dtype, device=meta)
        states = torch.empty(8, 2, 64, 64, dtype=dtype, device=meta)
        launch, _ = _plan_user_matmul(y, states, offsets)
        yield launch.compilation(f"{name} out", architecture)
        if dtype == torch.bfloat16:  # where its product is another
            launch, _ = _plan_user_matmul(targets, states.mT, offsets)
            yield launch.compilation(f"{name} z", architecture)

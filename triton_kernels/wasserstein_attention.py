"""wasserstein_attention in one flash kernel forward and two backward.

The weights P = softmax(mask(-scale · ‖query_i - key_j‖²)) multiply μ_v, and their squares Σ_v, in one walk over the
keys: a block is rescaled by r for the one product and by r² for the other. A score leaves out the query's own term,
which the softmax drops. With D = dmean·mean + 2 dcov·cov of each row, the scores' gradient is

    dS = P∘(dmean μ_vᵀ + 2 P∘(dcov Σ_vᵀ) - D)
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.compilation import Compilation
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import ARCHITECTURES, MAX_REGISTERS, launch_kernel
from recattn.triton_kernels.common.ragged import locate_sequence
from recattn.triton_kernels.common.softmax import exp_scaled, log2e_scale
from recattn.triton_kernels.common.tiles import block_width, load_rows, store_rows


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of one kernel: query rows and keys a tile, warps, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class WassersteinAttentionConfig(NamedTuple):
    """Launch parameters, a kernel each."""

    fwd: TileConfig
    bwd_dq: TileConfig
    bwd_dkdv: TileConfig

    @classmethod
    def heuristic(cls, width: int, value_dim: int, dtype: torch.dtype) -> "WassersteinAttentionConfig":
        tiles = TILES["single" if dtype == torch.float32 else "half"]
        widest = max(width, 2 * value_dim)
        return tiles[min(limit for limit in tiles if limit >= widest)]


def _config(*tiles: tuple[int, ...]) -> WassersteinAttentionConfig:
    return WassersteinAttentionConfig(*(TileConfig(*tile) for tile in tiles))


# Tiles found not to spill, by precision and by the wider of the vectors and both values together. Float32 tiles stay
# small: its products are made in registers.
TILES = {
    "half": {
        64: _config((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
        128: _config((64, 64, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
        256: _config((64, 32, 8, 2), (32, 16, 8, 2), (16, 32, 8, 2)),
    },
    "single": {
        64: _config((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        128: _config((16, 16, 4, 1), (16, 16, 8, 2), (16, 16, 8, 1)),
        256: _config((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1)),
    },
}


# --- What the kernels share ---


@triton.jit
def load_tile(x, first, tokens, length, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Tokens of a sequence whose first is the given row of a contiguous matrix; zeros past its end."""
    return load_rows(x + first * WIDTH, tokens, tokens < length, WIDTH, 1, WIDTH, BLOCK_WIDTH)


@triton.jit
def store_tile(x, values, first, tokens, length, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The inverse of `load_tile`."""
    store_rows(x + first * WIDTH, values, tokens, tokens < length, WIDTH, 1, WIDTH, BLOCK_WIDTH)


@triton.jit
def squared_norms(tile):
    tile = tile.to(tl.float32)
    return tl.sum(tile * tile, 1)


@triton.jit
def dot_of_rows(a_tile, b_tile):
    """Of each row, summed in the order of the products of two tiles.

    Where one key holds a row, dS is the difference of such a sum and such a product, and zero.
    """
    row = tl.arange(0, a_tile.shape[0])
    products = tl.dot(a_tile, tl.trans(b_tile), input_precision="ieee")
    return tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), 1)


@triton.jit
def is_visible(rows, keys, length, causal):
    return (keys < length) & ((causal == 0) | (keys <= rows))


# What changes with N, B and H, or from call to call, must not compile anew.
CHANGING = ["num_heads", "N", "scale", "causal", "left_padded", "dropped"]


# --- Forward ---


@triton.jit(do_not_specialize=CHANGING)
def wasserstein_attention_fwd_kernel(
    query,
    key,
    mean_v,
    cov_v,
    mean,
    cov,
    shift,
    mass,
    seq_lens,
    dropout_seed,
    num_heads,
    N,
    scale,
    causal,
    left_padded,
    dropped,
    WIDTH: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    plane = tl.program_id(0)
    start, length, _ = locate_sequence(plane // num_heads, N, seq_lens, None, left_padded)
    first = plane.to(tl.int64) * N + start
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # where the mask is causal, the long ones first
    if tile * BLOCK_M >= length:
        return
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_tile = load_tile(query, first, rows, length, WIDTH, BLOCK_W)  # [BM, W]
    scale *= log2e_scale(q_tile)
    mean_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    cov_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_shift = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_mass = tl.zeros([BLOCK_M], tl.float32)
    end = tl.where(causal != 0, tl.minimum(length, (tile + 1) * BLOCK_M), length)
    for first_key in range(0, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(key, first, keys, length, WIDTH, BLOCK_W)  # [BN, W]
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores = scale * (2 * products - squared_norms(k_tile)[None, :])  # [BM, BN]
        scores = tl.where(is_visible(rows[:, None], keys[None, :], length, causal), scores, -float("inf"))
        # Every row sees the first key, so from the first block on this is finite.
        new_shift = tl.maximum(row_shift, tl.max(scores, 1))
        weights = exp_scaled(scores - new_shift[:, None], q_tile)
        rescale = exp_scaled(row_shift - new_shift, q_tile)
        row_mass = row_mass * rescale + tl.sum(weights, 1)
        if dropout_seed is not None:
            weights *= dropout_weights(tl.load(dropout_seed), plane, 0, rows, first_key, dropped, BLOCK_N)
        mean_tile = load_tile(mean_v, first, keys, length, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        mean_acc = tl.dot(weights.to(mean_tile.dtype), mean_tile, mean_acc * rescale[:, None], input_precision="ieee")
        cov_tile = load_tile(cov_v, first, keys, length, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        squares, rescale = weights * weights, rescale * rescale
        cov_acc = tl.dot(squares.to(cov_tile.dtype), cov_tile, cov_acc * rescale[:, None], input_precision="ieee")
        row_shift = new_shift
    share = 1 / row_mass
    store_tile(mean, mean_acc * share[:, None], first, rows, length, V_HEAD_DIM, BLOCK_DV)
    store_tile(cov, cov_acc * (share * share)[:, None], first, rows, length, V_HEAD_DIM, BLOCK_DV)
    tl.store(shift + first + rows, row_shift, mask=rows < length)
    tl.store(mass + first + rows, row_mass, mask=rows < length)


# --- Backward ---


@triton.jit
def weights_and_score_gradient(
    q_tile,
    k_tile,
    mean_v_tile,
    cov_v_tile,
    dmean_tile,
    dcov_tile,
    shift,
    share,
    delta,
    score_scale,
    visible,
    dropout_seed,
    plane,
    rows,
    first_key,
    dropped,
):
    """P with dropout and dS, [BM, BN], of the scores of which a row's shift and share, 1 / mass, are given."""
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    scores = score_scale * (2 * products - squared_norms(k_tile)[None, :])
    weights = exp_scaled(scores - shift[:, None], q_tile) * share[:, None]
    weights = tl.where(visible, weights, 0.0)
    dropped_weights = weights
    if dropout_seed is not None:
        factors = dropout_weights(tl.load(dropout_seed), plane, 0, rows, first_key, dropped, k_tile.shape[0])
        dropped_weights = weights * factors
    dweights = 2 * dropped_weights * tl.dot(dcov_tile, tl.trans(cov_v_tile), input_precision="ieee")
    dweights += tl.dot(dmean_tile, tl.trans(mean_v_tile), input_precision="ieee")
    if dropout_seed is not None:
        dweights *= factors
    return dropped_weights, weights * (dweights - delta[:, None])


@triton.jit(do_not_specialize=CHANGING)
def wasserstein_attention_bwd_dq_kernel(
    query,
    key,
    mean_v,
    cov_v,
    mean,
    cov,
    shift,
    mass,
    dmean,
    dcov,
    delta,
    dquery,
    seq_lens,
    dropout_seed,
    num_heads,
    N,
    scale,
    causal,
    left_padded,
    dropped,
    WIDTH: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    plane = tl.program_id(0)
    start, length, _ = locate_sequence(plane // num_heads, N, seq_lens, None, left_padded)
    first = plane.to(tl.int64) * N + start
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    if tile * BLOCK_M >= length:
        return
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dmean_tile = load_tile(dmean, first, rows, length, V_HEAD_DIM, BLOCK_DV)  # [BM, Dv]
    dcov_tile = load_tile(dcov, first, rows, length, V_HEAD_DIM, BLOCK_DV)
    mean_tile = load_tile(mean, first, rows, length, V_HEAD_DIM, BLOCK_DV)
    cov_tile = load_tile(cov, first, rows, length, V_HEAD_DIM, BLOCK_DV)
    row_delta = dot_of_rows(dmean_tile, mean_tile) + 2 * dot_of_rows(dcov_tile, cov_tile)  # [BM]
    tl.store(delta + first + rows, row_delta, mask=rows < length)
    row_shift = tl.load(shift + first + rows, mask=rows < length, other=0.0)
    row_share = 1 / tl.load(mass + first + rows, mask=rows < length, other=1.0)
    q_tile = load_tile(query, first, rows, length, WIDTH, BLOCK_W)  # [BM, W]
    score_scale = scale * log2e_scale(q_tile)
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)  # Σ_j dS_ij: what rounding leaves of 0
    end = tl.where(causal != 0, tl.minimum(length, (tile + 1) * BLOCK_M), length)
    for first_key in range(0, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(key, first, keys, length, WIDTH, BLOCK_W)  # [BN, W]
        mean_v_tile = load_tile(mean_v, first, keys, length, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        cov_v_tile = load_tile(cov_v, first, keys, length, V_HEAD_DIM, BLOCK_DV)
        visible = is_visible(rows[:, None], keys[None, :], length, causal)
        _dropped_weights, dscores = weights_and_score_gradient(
            q_tile,
            k_tile,
            mean_v_tile,
            cov_v_tile,
            dmean_tile,
            dcov_tile,
            row_shift,
            row_share,
            row_delta,
            score_scale,
            visible,
            dropout_seed,
            plane,
            rows,
            first_key,
            dropped,
        )
        dscores = dscores.to(k_tile.dtype)
        acc = tl.dot(dscores, k_tile, acc, input_precision="ieee")
        total += tl.sum(dscores.to(tl.float32), 1)
    acc = 2 * scale * (acc - total[:, None] * q_tile)
    store_tile(dquery, acc, first, rows, length, WIDTH, BLOCK_W)


@triton.jit(do_not_specialize=CHANGING)
def wasserstein_attention_bwd_dkdv_kernel(
    query,
    key,
    mean_v,
    cov_v,
    shift,
    mass,
    dmean,
    dcov,
    delta,
    dkey,
    dmean_v,
    dcov_v,
    seq_lens,
    dropout_seed,
    num_heads,
    N,
    scale,
    causal,
    left_padded,
    dropped,
    WIDTH: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    plane = tl.program_id(0)
    start, length, _ = locate_sequence(plane // num_heads, N, seq_lens, None, left_padded)
    first = plane.to(tl.int64) * N + start
    first_key = tl.program_id(1) * BLOCK_N
    if first_key >= length:
        return
    keys = first_key + tl.arange(0, BLOCK_N)
    k_tile = load_tile(key, first, keys, length, WIDTH, BLOCK_W)  # [BN, W]
    mean_v_tile = load_tile(mean_v, first, keys, length, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
    cov_v_tile = load_tile(cov_v, first, keys, length, V_HEAD_DIM, BLOCK_DV)
    score_scale = scale * log2e_scale(k_tile)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)  # Σ_i dS_ij
    dmean_v_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dcov_v_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first_row = tl.where(causal != 0, first_key // BLOCK_M * BLOCK_M, 0)
    for step in range(0, tl.cdiv(length - first_row, BLOCK_M)):
        rows = first_row + step * BLOCK_M + tl.arange(0, BLOCK_M)
        q_tile = load_tile(query, first, rows, length, WIDTH, BLOCK_W)  # [BM, W]
        row_shift = tl.load(shift + first + rows, mask=rows < length, other=0.0)
        row_share = 1 / tl.load(mass + first + rows, mask=rows < length, other=1.0)
        row_delta = tl.load(delta + first + rows, mask=rows < length, other=0.0)
        dmean_tile = load_tile(dmean, first, rows, length, V_HEAD_DIM, BLOCK_DV)  # [BM, Dv]
        dcov_tile = load_tile(dcov, first, rows, length, V_HEAD_DIM, BLOCK_DV)
        visible = is_visible(rows[:, None], keys[None, :], length, causal) & (rows < length)[:, None]
        weights, dscores = weights_and_score_gradient(
            q_tile,
            k_tile,
            mean_v_tile,
            cov_v_tile,
            dmean_tile,
            dcov_tile,
            row_shift,
            row_share,
            row_delta,
            score_scale,
            visible,
            dropout_seed,
            plane,
            rows,
            first_key,
            dropped,
        )
        squares = tl.trans((weights * weights).to(dcov_tile.dtype))
        dcov_v_acc = tl.dot(squares, dcov_tile, dcov_v_acc, input_precision="ieee")
        weights = tl.trans(weights.to(dmean_tile.dtype))
        dmean_v_acc = tl.dot(weights, dmean_tile, dmean_v_acc, input_precision="ieee")
        dscores = dscores.to(q_tile.dtype)
        dk_acc = tl.dot(tl.trans(dscores), q_tile, dk_acc, input_precision="ieee")
        total += tl.sum(dscores.to(tl.float32), 0)
    dk_acc = 2 * scale * (dk_acc - total[:, None] * k_tile)
    store_tile(dkey, dk_acc, first, keys, length, WIDTH, BLOCK_W)
    store_tile(dmean_v, dmean_v_acc, first, keys, length, V_HEAD_DIM, BLOCK_DV)
    store_tile(dcov_v, dcov_v_acc, first, keys, length, V_HEAD_DIM, BLOCK_DV)


# --- Launchers ---


def launch_wasserstein_attention_fwd(
    query: Tensor,
    key: Tensor,
    mean_v: Tensor,
    cov_v: Tensor,
    mean: Tensor,
    cov: Tensor,
    shift: Tensor,
    mass: Tensor,
    seq_lens: Tensor | None,
    dropout: Dropout = NO_DROPOUT,
    *,
    causal: bool,
    left_padded: bool,
    scale: float,
    config: WassersteinAttentionConfig | None = None,
) -> None:
    """Write mean = P μ_v, cov = (P∘P) Σ_v and what the backward reads of the softmax.

    query, key [B, H, N, W]; mean_v, cov_v, mean, cov [B, H, N, Dv]; shift, mass [B, H, N] float32; all contiguous. What
    lies in padding is not written.
    """
    tensors = {"query": query, "key": key, "mean_v": mean_v, "cov_v": cov_v, "mean": mean, "cov": cov}
    tensors |= {"shift": shift, "mass": mass, "seq_lens": seq_lens, "dropout": dropout}
    options = {"causal": causal, "left_padded": left_padded, "scale": scale}
    config = config or _heuristic(query, mean_v)
    _launch(wasserstein_attention_fwd_kernel, tensors, options, config.fwd, config.fwd.block_m)


def launch_wasserstein_attention_bwd(
    query: Tensor,
    key: Tensor,
    mean_v: Tensor,
    cov_v: Tensor,
    mean: Tensor,
    cov: Tensor,
    shift: Tensor,
    mass: Tensor,
    dmean: Tensor,
    dcov: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dmean_v: Tensor,
    dcov_v: Tensor,
    seq_lens: Tensor | None,
    dropout: Dropout = NO_DROPOUT,
    *,
    causal: bool,
    left_padded: bool,
    scale: float,
    config: WassersteinAttentionConfig | None = None,
) -> None:
    """Write dquery, dkey, dmean_v and dcov_v; shapes as in the forward, all contiguous."""
    tensors = {"query": query, "key": key, "mean_v": mean_v, "cov_v": cov_v, "mean": mean, "cov": cov}
    tensors |= {"shift": shift, "mass": mass, "dmean": dmean, "dcov": dcov, "delta": torch.empty_like(shift)}
    tensors |= {"dquery": dquery, "dkey": dkey, "dmean_v": dmean_v, "dcov_v": dcov_v}
    tensors |= {"seq_lens": seq_lens, "dropout": dropout}
    options = {"causal": causal, "left_padded": left_padded, "scale": scale}
    config = config or _heuristic(query, mean_v)
    _launch(wasserstein_attention_bwd_dq_kernel, tensors, options, config.bwd_dq, config.bwd_dq.block_m)
    _launch(wasserstein_attention_bwd_dkdv_kernel, tensors, options, config.bwd_dkdv, config.bwd_dkdv.block_n)


def _heuristic(query: Tensor, mean_v: Tensor) -> WassersteinAttentionConfig:
    return WassersteinAttentionConfig.heuristic(query.shape[3], mean_v.shape[3], query.dtype)


def _launch(kernel, tensors: dict[str, object], options: dict[str, object], tile: TileConfig, block: int) -> None:
    B, H, N, _ = tensors["query"].shape
    if B * H * N == 0:
        return
    arguments = _arguments(kernel, tensors, options, tile)
    with torch.cuda.device_of(tensors["query"]):
        # Only the first axis of a grid can be longer than 65535.
        grid = (B * H, triton.cdiv(N, block))
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "maxnreg": MAX_REGISTERS}
        launch_kernel(kernel, grid, arguments, **options)


def _arguments(kernel, tensors: dict[str, object], options: dict[str, object], tile: TileConfig) -> dict[str, object]:
    """The arguments of one of the kernels by name."""
    _, num_heads, N, width = tensors["query"].shape
    value_dim, dropout = tensors["mean_v"].shape[3], tensors["dropout"]
    everything = {
        **tensors,
        "dropout_seed": dropout.seed,
        "dropped": dropout.threshold,
        "num_heads": num_heads,
        "N": N,
        "scale": options["scale"],
        "causal": int(options["causal"]),
        "left_padded": int(options["left_padded"]),
        "WIDTH": width,
        "V_HEAD_DIM": value_dim,
        "BLOCK_W": block_width(width),
        "BLOCK_DV": block_width(value_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    return {name: everything[name] for name in kernel.arg_names}


def shipped_configurations() -> Iterator[Compilation]:
    """What is launched for the widths and dtypes in use: STOSA's heads of 16 to 128, and R = 100."""
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    statistics = torch.empty(2, 8, 500, device="meta")
    for architecture, dtype, (width, value_dim), dropout in itertools.product(
        ARCHITECTURES,
        (torch.float32, torch.bfloat16),
        ((32, 16), (64, 32), (128, 64), (256, 128), (200, 16)),
        (NO_DROPOUT, Dropout(seed, 6554)),
    ):
        vectors, values = (torch.empty(2, 8, 500, size, dtype=dtype, device="meta") for size in (width, value_dim))
        tensors = dict.fromkeys(("query", "key", "dquery", "dkey"), vectors)
        tensors |= dict.fromkeys(("mean_v", "cov_v", "mean", "cov", "dmean", "dcov", "dmean_v", "dcov_v"), values)
        tensors |= dict.fromkeys(("shift", "mass", "delta"), statistics)
        tensors |= {"seq_lens": torch.empty(2, dtype=torch.int64, device="meta"), "dropout": dropout}
        options = {"causal": True, "left_padded": False, "scale": 0.125}
        config = WassersteinAttentionConfig.heuristic(width, value_dim, dtype)
        for kernel, tile in (
            (wasserstein_attention_fwd_kernel, config.fwd),
            (wasserstein_attention_bwd_dq_kernel, config.bwd_dq),
            (wasserstein_attention_bwd_dkdv_kernel, config.bwd_dkdv),
        ):
            label = f"{str(dtype).removeprefix('torch.')} W={width} Dv={value_dim} {tile.block_m}x{tile.block_n}"
            label += " dropout" if dropout is not NO_DROPOUT else ""
            yield Compilation.of(
                kernel,
                label,
                architecture,
                _arguments(kernel, tensors, options, tile),
                tile.num_warps,
                tile.num_stages,
                MAX_REGISTERS,
            )

"""Launch parameters of wasserstein_attention's kernels."""

from typing import NamedTuple

import torch
from torch import Tensor

from recattn.triton_kernels.common.launch import MAX_REGISTERS, TileConfig, architecture_of, cached
from recattn.triton_kernels.common.tiles import block_width


class WassersteinAttentionConfig(NamedTuple):
    """Launch parameters of each kernel; a tile has queries as rows and keys as columns."""

    fwd: TileConfig
    bwd_dq: TileConfig
    bwd_dkdv: TileConfig

    @classmethod
    def heuristic(cls, width: int, value_dim: int, dtype: torch.dtype) -> "WassersteinAttentionConfig":
        tiles = TILES["single" if dtype == torch.float32 else "half"]
        widest = max(width, 2 * value_dim)
        return tiles[min(limit for limit in tiles if limit >= widest)]


class Constants(NamedTuple):
    """The constants and launch options of each kernel."""

    vectors: dict[str, object]
    fwd: dict[str, object]
    bwd_dq: dict[str, object]
    bwd_dkdv: dict[str, object]


# Tokens times features that the kernel of the vectors loads at a time.
VECTORS_TILE = 8192
VECTORS_OPTIONS = {"num_warps": 8, "maxnreg": MAX_REGISTERS}


@cached
def launch_constants(head_dim: int, value_dim: int, dtype: torch.dtype, refined: bool) -> Constants:
    config = WassersteinAttentionConfig.heuristic(2 * head_dim, value_dim, dtype)
    blocks = {"BLOCK_W": block_width(2 * head_dim), "BLOCK_DV": block_width(value_dim)}
    shared = {"HEAD_DIM": head_dim, "V_HEAD_DIM": value_dim, **blocks}
    fwd, *bwd = (
        {**shared, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, **more, **tile.launch_options}
        for tile, more in zip(config, ({}, {"REFINED": refined}, {"REFINED": refined}), strict=True)
    )
    block_d = block_width(head_dim)
    tile = {"BLOCK_D": block_d, "BLOCK_N": VECTORS_TILE // block_d}
    return Constants({"REFINED": refined, "HEAD_DIM": head_dim, **tile, **VECTORS_OPTIONS}, fwd, *bwd)


# The widest head of which a program of the short kernels holds all tokens without spilling, by architecture: of up to
# 64 tokens, of up to 128, and of up to 128 with dropout or a refinement (`has_more`).
LARGEST_SHORT_HEAD_DIM = {80: (32, 0, 0), 90: (64, 64, 32), 100: (64, 32, 0)}


def longest_of(mean_q: Tensor, max_seqlen: int | None) -> int:
    """A bound of the lengths: N of mean_q [B, H, N, D]; packed [T, H, D] `max_seqlen`, or T."""
    if mean_q.dim() == 4:
        return mean_q.shape[2]
    return mean_q.shape[0] if max_seqlen is None else max_seqlen


def is_short(mean_q: Tensor, mean_v: Tensor, max_seqlen: int | None, has_more: bool) -> bool:
    """Whether the kernels of short sequences serve a call. Float32 matmuls would need too many registers."""
    longest, widest = longest_of(mean_q, max_seqlen), max(mean_q.shape[-1], mean_v.shape[-1])
    if mean_q.dtype == torch.float32 or longest > 128:
        return False
    limits = LARGEST_SHORT_HEAD_DIM[architecture_of(mean_q)]
    return widest <= limits[0 if longest <= 64 else 2 if has_more else 1]


class ShortConstants(NamedTuple):
    """The constants and launch options of the kernels of short sequences."""

    fwd: dict[str, object]
    bwd: dict[str, object]


@cached
def short_constants(
    block_n: int, head_dim: int, value_dim: int, refined: bool, has_dropout: bool, architecture: int
) -> ShortConstants:
    block_d, block_dv = block_width(head_dim), block_width(value_dim)
    blocks = {"BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_N": block_n}
    constants = {"HEAD_DIM": head_dim, "V_HEAD_DIM": value_dim, **blocks, "REFINED": refined}
    constants |= {"num_warps": block_n // 16, "num_stages": 1, "maxnreg": MAX_REGISTERS}
    # Where they suffice, 128 registers let one more program run beside the others.
    limited, widest = {"maxnreg": 128}, max(block_d, block_dv)
    may_limit = architecture == 90 and not has_dropout
    more_warps = {"num_warps": block_n // 8} if refined and block_n == 32 and widest > 32 else {}
    return ShortConstants(
        constants | (limited if may_limit and block_n == 128 and widest <= 32 else {}),
        constants | (limited if may_limit and block_n == 64 and widest <= 16 else {}) | more_warps,
    )


def _config(*tiles: tuple[int, ...]) -> WassersteinAttentionConfig:
    return WassersteinAttentionConfig(*(TileConfig(*tile) for tile in tiles))


# Tiles that do not spill, by precision and by the largest width: of the vectors, or of both values together. Those of
# float32 are small, because its matmuls hold their operands in registers. A wgmma has 64 rows for four warps: of eight
# the other four would repeat them.
TILES = {
    "half": {
        64: _config((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        128: _config((64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
        256: _config((64, 32, 4, 2), (32, 32, 4, 2), (16, 32, 8, 2)),
    },
    "single": {
        64: _config((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        128: _config((16, 16, 4, 1), (16, 16, 8, 2), (16, 16, 8, 1)),
        256: _config((16, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 1)),
    },
}

"""Launch parameters of the fused path's kernels, for each architecture."""

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of a flash kernel: query rows and keys a tile, warps, stages of the load pipeline.

    Rows of sinks visit the sinks block_s at a time: few, for a tile of the bias takes registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    block_s: int = 16


class SinkAttentionConfig(NamedTuple):
    """Launch parameters of the fused path, a kernel each."""

    fwd: TileConfig
    bwd_dq: TileConfig
    bwd_dkdv: TileConfig

    @classmethod
    def heuristic(
        cls, head_dim: int, dtype: torch.dtype, architecture: int, *, dropout: bool = False
    ) -> "SinkAttentionConfig":
        tiles = TILES[architecture, kind_of(dtype, dropout)]
        return tiles[min(width for width in tiles if width >= head_dim)]


def kind_of(dtype: torch.dtype, dropout: bool) -> str:
    """What takes registers besides the head dim: products without tensor cores, random numbers."""
    return ("single" if dtype == torch.float32 else "half") + (" dropout" if dropout else "")


def _config(*tiles: tuple[int, ...]) -> SinkAttentionConfig:
    return SinkAttentionConfig(*(TileConfig(*tile) for tile in tiles))


# The largest tiles that were found not to spill, by architecture and kind, and by head dim.
TILES = {
    (80, "half"): {
        32: _config((128, 64, 4, 3, 32), (128, 64, 8, 2), (64, 128, 8, 2)),
        64: _config((128, 64, 8, 3), (64, 64, 8, 2), (32, 128, 8, 2)),
        128: _config((128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    },
    (80, "half dropout"): {
        32: _config((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        64: _config((128, 64, 8, 3, 32), (64, 32, 8, 2), (32, 64, 8, 2)),
        128: _config((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    (80, "single"): {
        32: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
        64: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
        256: _config((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 1)),
    },
    (80, "single dropout"): {
        32: _config((32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
        64: _config((16, 16, 4, 2), (32, 16, 8, 2), (32, 32, 4, 2)),
        128: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 2)),
        256: _config((32, 32, 8, 2), (16, 16, 8, 2), (32, 32, 8, 1)),
    },
    (90, "half"): {
        32: _config((128, 64, 4, 3, 32), (128, 64, 8, 2), (64, 128, 8, 2)),
        64: _config((128, 64, 4, 3, 16), (128, 64, 8, 2), (64, 128, 8, 2)),
        128: _config((128, 64, 8, 3, 32), (128, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    },
    (90, "half dropout"): {
        32: _config((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        64: _config((128, 64, 8, 3, 32), (128, 64, 8, 2), (64, 64, 8, 2)),
        128: _config((128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 2)),
        256: _config((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    (90, "single"): {
        32: _config((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: _config((16, 16, 4, 1), (32, 32, 4, 2), (32, 32, 8, 2)),
        256: _config((16, 16, 4, 1), (32, 32, 8, 2), (32, 32, 8, 1)),
    },
    (90, "single dropout"): {
        32: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: _config((16, 16, 4, 2), (32, 16, 8, 2), (32, 32, 4, 2)),
        128: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 2)),
        256: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 1)),
    },
    (100, "half"): {
        32: _config((128, 64, 4, 3, 32), (128, 64, 8, 2), (64, 128, 8, 2)),
        64: _config((128, 64, 4, 3, 32), (64, 64, 4, 2), (64, 128, 8, 2)),
        128: _config((128, 64, 8, 3, 32), (128, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    },
    (100, "half dropout"): {
        32: _config((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        64: _config((128, 64, 8, 3, 32), (128, 64, 8, 2), (64, 64, 8, 2)),
        128: _config((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    },
    (100, "single"): {
        32: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: _config((32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 4, 2)),
        128: _config((16, 16, 4, 1), (16, 16, 8, 1), (32, 32, 4, 2)),
        256: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 1)),
    },
    (100, "single dropout"): {
        32: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: _config((16, 16, 4, 2), (32, 16, 8, 2), (32, 32, 4, 2)),
        128: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 2)),
        256: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 1)),
    },
}


def candidates(kernel: str, kind: str) -> list[TileConfig]:
    """What autotuning tries for a kernel: the tiles of every architecture and head dim."""
    tiles = {
        getattr(config, kernel): None for (_, of), widths in TILES.items() if of == kind for config in widths.values()
    }
    return list(tiles)

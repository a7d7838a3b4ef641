"""Launch parameters of wasserstein_attention's kernels."""

from typing import NamedTuple

import torch

from recattn.triton_kernels.common.launch import TileConfig


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


def _config(*tiles: tuple[int, ...]) -> WassersteinAttentionConfig:
    return WassersteinAttentionConfig(*(TileConfig(*tile) for tile in tiles))


# Tiles that do not spill, by precision and by the largest width: of the vectors, or of both values together. Those of
# float32 are small, because its matmuls hold their operands in registers.
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

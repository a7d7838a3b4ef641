"""Tile sizes, warps and pipeline stages of sink_attention's kernels, for each architecture."""

import functools
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from recattn.triton_kernels.common.dropout import Dropout
from recattn.triton_kernels.common.launch import architecture_of, cached


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of a flash kernel.

    block_m: query rows a tile; block_n: keys a tile. A tile of sinks visits block_s sinks at a time: few, for a tile of
    the bias takes registers.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int  # of the pipeline of loads
    block_s: int = 16

    # Kept, for a launch costs microseconds.
    @functools.cached_property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_S": self.block_s}

    @functools.cached_property
    def blocks_without_sinks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}

    @functools.cached_property
    def warps(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class SinkAttentionConfig(NamedTuple):
    """Launch parameters of the fused path's kernels."""

    fwd: TileConfig
    bwd_dq: TileConfig
    bwd_dkdv: TileConfig

    @classmethod
    @cached
    def heuristic(
        cls, head_dim: int, dtype: torch.dtype, architecture: int, *, dropout: bool = False
    ) -> "SinkAttentionConfig":
        tiles = TILES[architecture, kind_of(dtype, dropout)]
        return tiles[min(width for width in tiles if width >= head_dim)]


def config_of(q: Tensor, v: Tensor, dropout: Dropout) -> SinkAttentionConfig:
    """The launch parameters of a call on q's device."""
    width = max(q.shape[-1], v.shape[-1])
    return SinkAttentionConfig.heuristic(width, q.dtype, architecture_of(q), dropout=dropout.seed is not None)


def kind_of(dtype: torch.dtype, dropout: bool) -> str:
    """What decides the registers besides the head dim: float32 products use no tensor cores, dropout draws numbers."""
    return ("single" if dtype == torch.float32 else "half") + (" dropout" if dropout else "")


@dataclass(frozen=True)
class PairsConfig:
    """Launch parameters of the sink pairs' backward: sink rows and keys a tile.

    block_k: head components a dot product, in float32; half precision takes all at once.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    @cached
    def heuristic(cls, head_dim: int, dtype: torch.dtype, architecture: int, *, dropout: bool = False) -> "PairsConfig":
        """The largest tiles that do not spill registers."""
        if dtype == torch.float32 or head_dim > 128:
            # Without tensor cores a dot product holds its operands in registers.
            half = dtype != torch.float32
            rows = 32 if half and architecture == 90 and not dropout else 16
            warps = 4 if half and architecture >= 90 and dropout else 8
            return cls(rows, 16, block_k=16, num_warps=warps, num_stages=1)
        if head_dim > 64 and (architecture < 90 or (dropout and architecture >= 100)):
            return cls(32, 16, block_k=16, num_warps=8, num_stages=2)
        if architecture < 90:
            return cls(32 if head_dim > 32 else 64, 16, block_k=16, num_warps=4, num_stages=2)
        if dropout or (head_dim > 64 and architecture >= 100):
            return cls(64, 16, block_k=16, num_warps=4, num_stages=2)
        keys = 64 if architecture == 90 and 32 < head_dim <= 64 else 32
        return cls(64, keys, block_k=16, num_warps=4, num_stages=2)


@dataclass(frozen=True)
class CorrectionConfig:
    """Launch parameters of the correction: sink rows a program, keys an iteration.

    block_k: head components a dot product, in float32; half precision takes all at once.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    @cached
    def heuristic(cls, head_dim: int, dtype: torch.dtype, architecture: int) -> "CorrectionConfig":
        """The largest tiles that do not spill registers."""
        if dtype == torch.float32:
            # Without tensor cores a dot product holds its operands in registers.
            return cls(16, 32, block_k=16, num_warps=8, num_stages=1)
        if head_dim <= 64 or (head_dim <= 128 and architecture == 90):
            return cls(64, 32, block_k=16, num_warps=4, num_stages=2)
        if architecture < 90:
            return cls(32, 32, block_k=16, num_warps=4 if head_dim <= 128 else 8, num_stages=2)
        if architecture == 90:
            return cls(64, 32, block_k=16, num_warps=8, num_stages=2)
        return cls(64, 32 if head_dim <= 128 else 16, block_k=16, num_warps=8, num_stages=1)


# --- Autotuning ---


def autotuning_is_on() -> bool:
    return os.environ.get("RECATTN_AUTOTUNE") == "1"


@functools.cache
def autotuned(kernel, name: str, kind: str):
    """`kernel`, which SinkAttentionConfig calls `name`, with its candidates timed at the first call of a head dim."""
    configs = []
    for tile in candidates(name, kind):
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_S": tile.block_s}
        own = {block: size for block, size in blocks.items() if block in kernel.arg_names}
        configs.append(triton.Config(own, num_warps=tile.num_warps, num_stages=tile.num_stages))
    return triton.autotune(configs, key=["HEAD_DIM", "V_HEAD_DIM"])(kernel)


def candidates(name: str, kind: str) -> list[TileConfig]:
    """What autotuning tries for a kernel: its tiles of every architecture and head dim."""
    tiles = {
        getattr(config, name): None for (_, of), widths in TILES.items() if of == kind for config in widths.values()
    }
    return list(tiles)


# --- The fused path's tiles ---


def _config(*tiles: tuple[int, ...]) -> SinkAttentionConfig:
    return SinkAttentionConfig(*(TileConfig(*tile) for tile in tiles))


# The largest tiles that do not spill registers, by architecture and kind, then by head dim.
TILES = {
    (80, "half"): {
        32: _config((128, 64, 4, 3, 32), (128, 64, 8, 2), (64, 128, 8, 2)),
        64: _config((128, 64, 8, 3), (128, 32, 8, 2), (32, 128, 8, 2)),
        128: _config((128, 32, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2)),
        256: _config((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    },
    (80, "half dropout"): {
        32: _config((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2)),
        64: _config((128, 64, 8, 3, 32), (64, 32, 8, 2), (32, 64, 8, 2)),
        128: _config((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        256: _config((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    (80, "single"): {
        32: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
        64: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
        256: _config((32, 32, 8, 2), (32, 16, 8, 2), (32, 32, 8, 1)),
    },
    (80, "single dropout"): {
        32: _config((32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1)),
        64: _config((16, 16, 4, 2), (32, 16, 8, 2), (32, 32, 4, 2)),
        128: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 2)),
        256: _config((32, 32, 8, 2), (16, 16, 8, 2), (32, 32, 8, 1)),
    },
    (90, "half"): {
        32: _config((128, 64, 4, 3, 32), (128, 128, 8, 2), (64, 128, 8, 2)),
        64: _config((128, 64, 4, 3, 16), (128, 128, 8, 2), (64, 128, 8, 2)),
        128: _config((128, 128, 8, 2, 16), (128, 128, 8, 2), (32, 128, 8, 2)),
        256: _config((128, 64, 8, 2, 16), (128, 32, 8, 2), (32, 32, 8, 2)),
    },
    (90, "half dropout"): {
        32: _config((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2)),
        64: _config((128, 64, 8, 3, 32), (128, 64, 8, 2), (32, 128, 8, 2)),
        128: _config((128, 64, 8, 2), (128, 32, 8, 2), (16, 128, 8, 2)),
        256: _config((128, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    },
    (90, "single"): {
        32: _config((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        128: _config((16, 16, 4, 1), (32, 32, 8, 2), (32, 32, 8, 2)),
        256: _config((16, 16, 4, 1), (32, 16, 8, 2), (32, 32, 8, 1)),
    },
    (90, "single dropout"): {
        32: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: _config((16, 16, 4, 2), (32, 16, 8, 2), (32, 32, 4, 2)),
        128: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 2)),
        256: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 1)),
    },
    (100, "half"): {
        32: _config((128, 64, 4, 3, 32), (128, 64, 8, 2), (64, 128, 8, 2)),
        64: _config((128, 64, 4, 3, 16), (64, 64, 4, 2), (64, 128, 8, 2)),
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
        128: _config((16, 16, 4, 1), (16, 16, 8, 1), (32, 32, 8, 2)),
        256: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 1)),
    },
    (100, "single dropout"): {
        32: _config((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
        64: _config((16, 16, 4, 2), (32, 16, 8, 2), (32, 32, 4, 2)),
        128: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 2)),
        256: _config((16, 16, 4, 1), (16, 16, 4, 2), (32, 32, 8, 1)),
    },
}

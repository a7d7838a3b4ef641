"""Launch parameters of refined_attention's kernels."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from recattn.triton_kernels.common.launch import MAX_REGISTERS
from recattn.triton_kernels.common.tiles import block_width

LARGEST_HEAD_DIM = 256


def largest_n(dtype: torch.dtype, architecture: int) -> int:
    """How many tokens fit in registers. Without tensor cores a product holds its operands there too."""
    if dtype == torch.float32:
        return 32
    return 128 if architecture >= 90 else 64


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of a kernel: rows a program, head components a product, warps."""

    block_m: int
    block_d: int
    num_warps: int

    @property
    def launch_options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": 1, "maxnreg": MAX_REGISTERS}


@dataclass(frozen=True)
class StageConfig(TileConfig):
    """Launch parameters of the backward in one launch (stage 0), or of one launch of three (stages 1, 2 and 3)."""

    stage: int = 0


class RefinedAttentionConfig(NamedTuple):
    """Launch parameters, a launch each; those of the backward are repeated for one share of the pairs after another."""

    fwd: TileConfig
    bwd: tuple[StageConfig, ...]

    @classmethod
    def heuristic(
        cls, N: int, head_dim: int, dtype: torch.dtype, architecture: int, mechanism: str
    ) -> "RefinedAttentionConfig":
        """The fewest warps and launches that were found not to spill."""
        size, block_d = block_width(N), min(32, block_width(head_dim))
        if dtype == torch.float32:
            warps = 4 if size == 16 else 8
            return cls(TileConfig(size, 16, warps), (StageConfig(size, 16, warps),))
        if size > 64:
            first = StageConfig(64 if head_dim > 16 else 32, 16, 8, 1)
            return cls(TileConfig(64, block_d, 8), (first, *(StageConfig(64, block_d, 8, stage) for stage in (2, 3))))
        warps = size // 16
        fwd = TileConfig(size, block_d, warps)
        if mechanism == "simple":
            return cls(fwd, (StageConfig(size, block_d, warps),))
        if size == 64 and architecture < 90:
            return cls(fwd, tuple(StageConfig(32, block_d, 4, stage) for stage in (1, 2, 3)))
        return cls(fwd, (StageConfig(size, block_d, 2 * warps),))

"""Launch parameters of refined_attention's kernels."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton

from recattn.triton_kernels.common.launch import cached
from recattn.triton_kernels.common.tiles import block_width

LARGEST_HEAD_DIM = 256


@functools.cache
def num_multiprocessors(device_index: int | None) -> int:
    """Those of a GPU; for other devices, Hopper's."""
    return 132 if device_index is None else torch.cuda.get_device_properties(device_index).multi_processor_count


def largest_n(dtype: torch.dtype, architecture: int) -> int:
    """How many tokens fit in registers. Float32 matmuls, without tensor cores, hold their operands there too."""
    if dtype == torch.float32:
        return 32
    return 128 if architecture >= 90 else 64


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of a kernel for short sequences."""

    block_m: int  # rows of A of a program
    block_d: int  # columns of q, k, v or dout in a tl.dot
    num_warps: int


@dataclass(frozen=True)
class StageConfig(TileConfig):
    """Launch parameters of the backward in one launch (stage 0), or of one launch of three (stages 1, 2 and 3)."""

    stage: int = 0


class RefinedAttentionConfig(NamedTuple):
    """Tile sizes and warps of each launch. The backward runs its launches once per chunk of batch-heads."""

    fwd: TileConfig
    bwd: tuple[StageConfig, ...]

    @classmethod
    @cached
    def heuristic(
        cls, N: int, head_dim: int, dtype: torch.dtype, architecture: int, mechanism: str, drops: bool = False
    ) -> "RefinedAttentionConfig":
        """The fewest warps and launches that do not spill."""
        size, block_d = block_width(N), min(32, block_width(head_dim))
        if dtype == torch.float32:
            warps = 4 if size == 16 else 8
            return cls(TileConfig(size, 16, warps), (StageConfig(size, 16, warps),))
        if size > 64:
            # On Hopper all rows fit: A is computed once, and the backward of "simple" may need no workspace.
            fwd = TileConfig(128 if architecture == 90 else 64, block_d, 8)
            if architecture == 90 and mechanism == "simple" and head_dim in (32, 64) and not drops:
                return cls(fwd, (StageConfig(128, 32 if head_dim == 64 else 16, 8),))
            first = StageConfig(64 if head_dim > 16 else 32, 16, 8, 1)
            return cls(fwd, (first, *(StageConfig(64, block_d, 8, stage) for stage in (2, 3))))
        warps = size // 16
        fwd = TileConfig(size, block_d, warps)
        if size == 64 and architecture < 90 and mechanism != "simple":
            return cls(fwd, tuple(StageConfig(32, block_d, 4, stage) for stage in (1, 2, 3)))
        return cls(fwd, (StageConfig(size, block_d, warps),))


@dataclass(frozen=True)
class RefinedProjectionConfig:
    """Launch parameters of one kernel of the projection; block_m is 0 for the kernel of the states."""

    block_m: int  # rows of a in a tile
    block_n: int  # rows of b and c in a block
    block_e: int  # components of a and b in a tl.dot
    block_f: int  # columns of c in a tile
    num_warps: int
    num_stages: int

    @classmethod
    @cached
    def of_product(cls, E: int, F: int, dtype: torch.dtype, architecture: int) -> "RefinedProjectionConfig":
        if dtype == torch.float32:
            # On sm_100 Triton uses the tensor cores for tiles of 64 rows, in TF32 whatever precision is asked for.
            return cls(32, 32, min(block_width(E), 32), min(block_width(F), 64), num_warps=8, num_stages=2)
        # Components beyond 128 are visited a few at a time: in four steps at most. In eight ptxas serializes wgmma.
        block_e = block_width(E) if E <= 128 else 128 if E > 256 and architecture == 90 else 64
        wide = architecture == 80 and max(E, F) > 128
        return cls(64, 64, block_e, min(block_width(F), 128), num_warps=8 if wide else 4, num_stages=2)

    @classmethod
    @cached
    def of_states(cls, E: int, F: int, dtype: torch.dtype, architecture: int) -> "RefinedProjectionConfig":
        if dtype == torch.float32:
            return cls(0, 32, min(block_width(E), 32), min(block_width(F), 64), num_warps=4, num_stages=2)
        # Few sequences make few programs; small blocks of the state make more.
        return cls(0, 64, min(block_width(E), 64), min(block_width(F), 64), num_warps=4, num_stages=3)


@cached
def segment_length(D: int, P: int) -> int:
    """Positions of a segment, a power of two: work inside segments and work with states are about equal."""
    return max(64, triton.next_power_of_2(2 * D * P // (D + P)))

"""How kernels are launched.

Triton compiles a kernel anew for each combination of its arguments' types, and of integers being 1 or divisible by 16.
A kernel lists in `do_not_specialize` what changes with the batch or from call to call, so that no call waits for the
compiler: sizes, lengths, flags, and strides made of them. The list does not reach into a tuple argument such as
`tiles.BHND`, so what must not be specialized stays an argument of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Ampere, Hopper, Blackwell: every shipped configuration is compiled for each.
ARCHITECTURES = (80, 90, 100)
# All that a thread can have. Without this limit the assembler may spill to let more programs run side by side.
MAX_REGISTERS = 255
# Round a product and the sum it goes into once. Triton does so by default only before 3.10, so every launch says so.
ENABLE_FP_FUSION = True


@dataclass(frozen=True)
class TileConfig:
    """Launch parameters of one kernel: rows and columns of a tile, warps, stages of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def launch_options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": MAX_REGISTERS}


def architecture_of(x: Tensor) -> int:
    """The architecture whose launch parameters a tensor's kernels take: that of its GPU, Hopper's elsewhere."""
    if x.device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(x.device)
    return max(architecture for architecture in ARCHITECTURES if architecture <= max(10 * major, ARCHITECTURES[0]))


# Four programs for each of an H200's 132 multiprocessors.
FULL_GRID = 528
# A loop of fewer steps costs more to sum up than splitting it saves.
FEWEST_STEPS = 8


def num_splits(programs: int, steps: int) -> int:
    """Into how many parts to cut a loop of `steps` where `programs` are too few to fill a GPU.

    It depends on sizes alone, so that a rerun gives the same bits.
    """
    return max(1, min(FULL_GRID // max(programs, 1), steps // FEWEST_STEPS))


def reduce_splits(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis, on which each split has its own result."""
    return (partials[0] if len(partials) == 1 else partials.sum(0)).to(dtype)

"""How kernels are launched, and with what parameters.

Triton compiles a kernel anew for each combination of its arguments' types, and of integers being 1 or divisible by 16.
A kernel lists in `do_not_specialize` what changes with the batch or from call to call, so that no call waits for the
compiler: sizes, lengths, flags, and strides made of them. The list does not reach into a tuple argument such as
`tiles.BHND`, so what must not be specialized stays an argument of its own.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from recattn import _native
from recattn.triton_kernels.common import assembler

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
    return _architecture_of_device(x.device.index) if x.is_cuda else 90


@functools.cache
def _architecture_of_device(index: int) -> int:
    major, _ = torch.cuda.get_device_capability(index)
    return max(architecture for architecture in ARCHITECTURES if architecture <= max(10 * major, ARCHITECTURES[0]))


def describe(kernel) -> tuple[bytes, int] | None:
    """Which arguments of a kernel Triton specializes on, and how many are tl.constexpr.

    None: a kernel that only Triton can launch, for it is interpreted or autotuned.
    """
    if type(kernel) is not JITFunction:
        return None
    parameters = kernel.params
    return bytes(not x.do_not_specialize for x in parameters), sum(x.is_constexpr for x in parameters)


def launch_by_triton(kernel, grid: tuple[int, ...] | Callable, *arguments, **constants) -> tuple | None:
    """kernel[grid](*arguments, **constants) on the device of the first argument, or of its first field.

    Returns the compiled kernel as `launch` calls it, None for one that it cannot.
    """
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    # An interpreted kernel needs no assembler.
    architecture = architecture_of(first) if type(kernel) is JITFunction else None
    with torch.cuda.device_of(first), assembler.for_architecture(architecture):
        compiled = kernel[grid](*arguments, **constants, enable_fp_fusion=ENABLE_FP_FUSION)
    if compiled is None or architecture is None:
        return None
    names = kernel.arg_names[len(arguments) :]
    if list(constants)[: len(names)] != names:
        raise TypeError(f"constants must begin with {names}, got {list(constants)}")
    return compiled.run, compiled.function, compiled.packed_metadata


# launch(kernel, grid, *arguments, **constants): constants are the kernel's tl.constexpr arguments, in its order, then
# num_warps and the like. Triton takes 20 µs to find a compiled kernel, csrc/host/launch.cpp 2.
launch = launch_by_triton
if _native.make_launch is not None:
    launch = _native.make_launch(describe, launch_by_triton, knobs.runtime, driver)


def cached(function: Callable) -> Callable:
    """functools.cache for functions of sizes: a size of a function that is recorded (ops/_plans.py) is no int there.

    It counts as its number, so that the cache keeps plain numbers, and becomes a guard.
    """
    kept = functools.cache(function)

    @functools.wraps(function)
    def of_numbers(*args, **kwargs):
        return kept(*map(_number, args), **{name: _number(value) for name, value in kwargs.items()})

    return of_numbers


def _number(value: object) -> object:
    return operator.index(value) if hasattr(value, "__index__") and not isinstance(value, bool) else value


def cdiv(x: int, y: int) -> int:
    """triton.cdiv, which takes 2 µs on the host."""
    return -(-x // y)


def host_block_width(width: int) -> int:
    """tiles.block_width, which takes 5 µs on the host."""
    return max(16, 1 << (width - 1).bit_length())


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

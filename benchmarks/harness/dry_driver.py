"""Run the GPU path without a GPU: Triton's own launch path for Hopper, on CPU tensors; launches are only recorded.

What it leaves out of a call's host time: Triton's C launcher (3 to 4 µs a launch), the CUDA driver, and the hand-over
to autograd's device thread. Use it in a process of its own: it cannot be undone, and kernels must be decorated without
TRITON_INTERPRET.
"""

import importlib
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import torch

# Of a grid on any GPU.
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]


class DeviceProperties(NamedTuple):
    """What recattn asks torch.cuda for."""

    name: str = "a GPU that launches nothing"
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132


DEVICE = DeviceProperties()


class DryDriver:
    """The device that Triton sees."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 10 * DEVICE.major + DEVICE.minor, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target


class DryKernel:
    """Takes the place of a compiled kernel in a launch."""

    function = packed_metadata = None

    def __init__(self, name: str, launches: list[Launch]):
        self.name, self.launches = name, launches

    def launch_metadata(self, *_) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_) -> None:
        self.launches.append(Launch(self.name, (x, y, z)))


def install(on_compile: Callable[..., None] | None = None) -> list[Launch]:
    """Record every later launch in the list returned. Where Triton would compile, it calls `on_compile` instead.

    It takes triton.compile's arguments: the source, the target and the options.
    """
    import triton
    from triton.runtime import driver

    launches: list[Launch] = []

    def compile(source, target, options, **others):
        if on_compile is not None:
            on_compile(source, target, options)
        return DryKernel(source.fn.__name__, launches)

    triton.compiler.compile = compile
    driver.set_active(DryDriver())
    _serve_cpu_tensors()
    _choose_as_on_a_gpu()
    return launches


def expect_valid(call: str, launches: list[Launch]) -> None:
    """Raise ValueError if a call made no launch, or one whose grid a GPU refuses."""
    if not launches:
        raise ValueError(f"{call} reached no launch")
    for kernel, grid in launches:
        if not all(0 < size <= most for size, most in zip(grid, LARGEST_GRID, strict=True)):
            raise ValueError(f"{call}: {kernel} has the grid {grid}, and a GPU's limits are {LARGEST_GRID}")


def _serve_cpu_tensors() -> None:
    import recattn.ops
    from recattn.functional import validation

    validation.values_are_checked = lambda device: False  # as on a GPU
    for module in pkgutil.walk_packages(recattn.ops.__path__, "recattn.ops."):
        module = importlib.import_module(module.name)
        if hasattr(module, "triton_unsupported_reason"):
            module.triton_unsupported_reason = lambda device_type, dtype=None: None


def _choose_as_on_a_gpu() -> None:
    """sink_attention without `impl` chooses between its kernel and the correction of a backend, in every call."""
    from recattn.ops import sink_attention as ops
    from recattn.ops.sink_attention import triton as by_triton

    torch.cuda.get_device_properties = _device_properties
    ops.unsupported_reasons = _of_a_gpu(ops.unsupported_reasons)
    _replace(ops, "_runs_in_cpp", lambda q, options: False)
    _replace(by_triton, "is_on_gpu", lambda x: True)


def _device_properties(device=None) -> DeviceProperties:
    torch.cuda._get_device_index(torch.device("cuda", 0), optional=True)  # half of what the question costs on a GPU
    return DEVICE


def _of_a_gpu(unsupported_reasons: Callable) -> Callable:
    return lambda device_type, *args, **options: unsupported_reasons("cuda", *args, **options)


def _replace(module, name: str, function: Callable) -> None:
    """A stand-in for a function that must exist."""
    getattr(module, name)
    setattr(module, name, function)

"""Run Triton without a GPU: its own binder and compiler for Hopper, on CPU tensors; launches are only recorded.

Use it in a process of its own: it cannot be undone, and kernels must be decorated without TRITON_INTERPRET.
"""

import importlib
import pkgutil
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

ARCHITECTURE = 90


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, int, int]
    shared_bytes: int | None  # None where nothing was compiled


class DryDriver:
    """The device that Triton sees."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCHITECTURE, 32)


class DryKernel:
    """Takes the place of a compiled kernel in a launch."""

    function = packed_metadata = None

    def __init__(self, name: str, shared_bytes: int | None, launches: list[Launch]):
        self.name, self.shared_bytes, self.launches = name, shared_bytes, launches

    def launch_metadata(self, *_) -> None:
        return None

    def run(self, x: int, y: int, z: int, *_) -> None:
        self.launches.append(Launch(self.name, (x, y, z), self.shared_bytes))


def install(*, compiles: bool) -> list[Launch]:
    """Record every later launch in the list returned. With `compiles`, each kernel is also compiled."""
    launches: list[Launch] = []
    compile_kernel = triton.compile

    def compile(source, target, options, **others):
        shared = compile_kernel(source, target=target, options=options).metadata.shared if compiles else None
        return DryKernel(source.fn.__name__, shared, launches)

    triton.compiler.compile = compile
    driver.set_active(DryDriver())
    _serve_cpu_tensors()
    return launches


def _serve_cpu_tensors() -> None:
    import recattn.ops
    from recattn.functional import validation

    validation.values_are_checked = lambda device: False  # as on a GPU
    for module in pkgutil.walk_packages(recattn.ops.__path__, "recattn.ops."):
        module = importlib.import_module(module.name)
        if hasattr(module, "triton_unsupported_reason"):
            module.triton_unsupported_reason = lambda device_type, dtype=None: None

"""The assembler of Hopper's kernels: the newer of the two that come with Triton.

ptxas 12.8, which Triton 3.6 and 3.7 use for Hopper, can lose half of a 64-bit address: a wgmma then multiplies another
tile than the one meant, and no error is raised. It was seen on an H200; tests/compile_table/wgmma_operands.py finds it
without a GPU. Both versions also bring a later ptxas, for Blackwell.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from triton import knobs

OLDEST = (12, 9)


@functools.cache
def path() -> str:
    """The newest ptxas of TRITON_PTXAS_PATH, or else of Triton's package."""
    version, found = max((_version(tool), tool.path) for tool in _tools())
    if version < OLDEST:
        raise RuntimeError(
            f"ptxas {'.'.join(map(str, version))} ({found}) computes wrong results on Hopper: set TRITON_PTXAS_PATH to "
            f"one of CUDA {'.'.join(map(str, OLDEST))} or later"
        )
    return found


def _tools() -> Iterator[knobs.NvidiaTool]:
    yield knobs.nvidia.ptxas
    with suppress(RuntimeError):  # a package of Triton without it
        yield knobs.nvidia.ptxas_blackwell


def _version(tool: knobs.NvidiaTool) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")))


_lock = threading.Lock()
_users = 0


@contextmanager
def for_architecture(architecture: int | None) -> Iterator[None]:
    """Triton compiles with it what it compiles for Hopper meanwhile, in any thread."""
    if architecture != 90:
        yield
        return
    chosen = path()
    _count(1, chosen)
    try:
        yield
    finally:
        _count(-1, chosen)


def _count(change: int, chosen: str) -> None:
    global _users
    with _lock:
        _users += change
        # Not by assignment to the knob, which sets the environment variable too, for good.
        if _users:
            vars(knobs.nvidia)["ptxas"] = chosen
        else:
            vars(knobs.nvidia).pop("ptxas", None)

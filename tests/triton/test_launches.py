"""Every launch of every kernel, reached by the public calls: its grid at large batches, and that it compiles."""

import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compile_table import table

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("every_launch.py")
# Of a grid on any GPU.
LARGEST_GRID = (2**31 - 1, 65_535, 65_535)


@functools.cache
def launches(*arguments: str) -> dict[str, list]:
    """Each call's launches: kernel, grid, shared memory. From another process, because here kernels are interpreted."""
    run = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def every_kernel() -> set[str]:
    modules = map(importlib.import_module, table.kernel_modules())
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def launched(made: dict[str, list]) -> set[str]:
    return {kernel for call in made.values() for kernel, *_ in call}


def test_grids_of_large_batches():
    made = launches("--sequences", "70000", "--packed", "100000")
    assert launched(made) == every_kernel()
    for call, of_call in made.items():
        for kernel, grid, _ in of_call:
            assert all(0 < size <= most for size, most in zip(grid, LARGEST_GRID, strict=True)), (call, kernel, grid)


def test_programs_of_packed_sequences():
    """Their number is the sum of tiles and sequences, not the product."""
    made = launches("--sequences", "70000", "--packed", "100000")
    for kernel, (programs, _, _), _ in made["sink_attention, packed"]:
        assert programs <= 5 * 100_000, kernel


def test_every_launch_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = launches("--compile")
    assert launched(made) == every_kernel()
    for call, of_call in made.items():
        for kernel, _, shared_bytes in of_call:
            assert shared_bytes <= table.SHARED_MEMORY[90], (call, kernel)


def test_calls_of_the_check():
    """Each case in each dtype makes launches. Only the correction's kernels are reached by none."""
    made = launches("--checks")
    assert [call for call, of_call in made.items() if not of_call] == [
        "refined_attention ragged additive torch.float32"  # longer than a program holds in float32
    ]
    unreached = every_kernel() - launched(made)
    assert unreached == {"sink_attention_correction_fwd_kernel", "sink_attention_correction_delta_kernel"}

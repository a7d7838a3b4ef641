"""Every launch of every kernel, reached by the public calls: its grid at large batches, and that it compiles."""

import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.harness import dry_driver
from tests.compile_table import table

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("every_launch.py")
TRITONS = {importlib.metadata.version("triton"): None, "3.6.0": Path(sys.prefix) / "triton-3.6.0"}
# Longer than a program holds in float32.
BY_MATMULS = ["refined_attention ragged additive torch.float32"]
LARGE = ("--sequences", "70000", "--packed", "100000")


@functools.cache
def run(triton: str, *arguments: str) -> dict[str, list]:
    """Each call's launches: kernel, grid, shared memory. From another process, because here kernels are interpreted."""
    path = {"PYTHONPATH": str(TRITONS[triton])} if TRITONS[triton] else {}
    ran = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=os.environ | path)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(params=TRITONS)
def launches(request) -> Callable[..., dict[str, list]]:
    """The launches that public calls reach under a version of Triton: every call reaches some, with valid grids."""
    if TRITONS[request.param] is not None and not TRITONS[request.param].exists():
        pytest.skip(f"Triton {request.param} is not installed in {TRITONS[request.param]}")

    def launched_by(*arguments: str) -> dict[str, list]:
        made = run(request.param, *arguments)
        for call, of_call in made.items():
            if call not in BY_MATMULS:
                dry_driver.expect_valid(call, of_call)
        return made

    return launched_by


def every_kernel() -> set[str]:
    modules = map(importlib.import_module, table.kernel_modules())
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def launched(made: dict[str, list]) -> set[str]:
    return {kernel for call in made.values() for kernel, *_ in call}


def test_grids_of_large_batches(launches):
    assert launched(launches(*LARGE)) == every_kernel()


def test_programs_of_packed_sequences(launches):
    """Their number is the sum of tiles and sequences, not the product."""
    for kernel, (programs, _, _), _ in launches(*LARGE)["sink_attention, packed"]:
        assert programs <= 5 * 100_000, kernel


def test_a_gpu_chooses_the_fused_kernels(launches):
    made = launches(*LARGE)
    by_choice, by_name = (
        [kernel for kernel, *_ in made[call]] for call in ("sink_attention, by the choice of a GPU", "sink_attention")
    )
    assert by_choice == by_name


def test_repeated_calls_launch_the_same(launches):
    """Later calls find their kernels, grids and arguments another way than the first."""
    assert launched(launches("--repeats", "3")) == every_kernel()
    launches("--checks", "--repeats", "3")


def test_every_launch_compiles(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = run(next(iter(TRITONS)), "--compile")
    assert launched(made) == every_kernel()
    for call, of_call in made.items():
        for kernel, _, shared_bytes in of_call:
            assert shared_bytes <= table.SHARED_MEMORY[90], (call, kernel)


def test_calls_of_the_check(launches):
    """Each case in each dtype makes launches. Only the correction's kernels are reached by none."""
    made = launches("--checks")
    assert [call for call, of_call in made.items() if not of_call] == BY_MATMULS
    unreached = every_kernel() - launched(made)
    assert unreached == {"sink_attention_correction_fwd_kernel", "sink_attention_correction_delta_kernel"}


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (0, 1, 1)])
def test_a_grid_that_a_gpu_refuses_is_an_error(grid):
    with pytest.raises(ValueError, match="some call: a_kernel has the grid"):
        dry_driver.expect_valid("some call", [("a_kernel", grid, None)])
    with pytest.raises(ValueError, match="some call reached no launch"):
        dry_driver.expect_valid("some call", [])

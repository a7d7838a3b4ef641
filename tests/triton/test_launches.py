"""Every launch of every kernel, reached by the public calls: its grid at large batches, and that it compiles."""

import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks.harness import dry_driver
from tests.compile_table import table
from tests.triton import compile_launches

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("every_launch.py")
INSTALLED = importlib.metadata.version("triton")
TRITONS = {INSTALLED: None, "3.6.0": Path(sys.prefix) / "triton-3.6.0"}
# Longer than a program holds in float32.
BY_MATMULS = ["refined_attention ragged additive torch.float32"]
# One more than a grid has in its second and third dimension.
LARGE = ("--sequences", "65536", "--packed", "65536")


@functools.cache
def run(triton: str, *arguments: str) -> dict[str, list]:
    """What every_launch.py prints. It is another process, because here kernels are interpreted."""
    path = {"PYTHONPATH": str(TRITONS[triton])} if TRITONS[triton] else {}
    ran = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=os.environ | path)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def launches(*arguments: str, triton: str = INSTALLED) -> dict[str, list]:
    """The launches that public calls reach under a version of Triton: every call reaches some, with valid grids."""
    made = run(triton, *arguments)
    for call, of_call in made.items():
        if call not in BY_MATMULS:
            dry_driver.expect_valid(call, of_call)
    return made


def every_kernel() -> set[str]:
    modules = map(importlib.import_module, table.kernel_modules())
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def launched(made: dict[str, list]) -> set[str]:
    return {kernel for call in made.values() for kernel, *_ in call}


def test_grids_of_large_batches():
    made = launches(*LARGE)
    assert launched(made) == every_kernel()
    # The number of programs is the sum of tiles and sequences, not the product.
    for kernel, (programs, _, _) in made["sink_attention, packed"]:
        assert programs <= 5 * 65_536, kernel
    by_choice, by_name = (
        [kernel for kernel, _ in made[call]] for call in ("sink_attention, by the choice of a GPU", "sink_attention")
    )
    assert by_choice == by_name


@pytest.mark.parametrize("triton", TRITONS)
def test_repeated_calls_launch_the_same(triton):
    """Later calls find their kernels, grids and arguments another way than the first."""
    if TRITONS[triton] is not None and not TRITONS[triton].exists():
        pytest.skip(f"Triton {triton} is not installed in {TRITONS[triton]}")
    assert launched(launches("--repeats", "3", triton=triton)) == every_kernel()


def test_calls_of_the_check():
    """Each case in each dtype makes launches, and later the same. Only the correction's kernels are reached by none."""
    made = launches("--checks", "--repeats", "3")
    assert [call for call, of_call in made.items() if not of_call] == BY_MATMULS
    unreached = every_kernel() - launched(made)
    assert unreached == {"sink_attention_correction_fwd_kernel", "sink_attention_correction_delta_kernel"}


def test_every_launch_compiles(tmp_path, monkeypatch):
    """Whole, by its options, here or in the compile table; each is lowered to Triton's IR here."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = run(INSTALLED, "--compile")
    assert launched(made["launches"]) == every_kernel()
    for kernel, shared_bytes in made["compiled"]:
        assert shared_bytes <= table.SHARED_MEMORY[90], kernel


def test_few_launches_show_every_option():
    def request(**given: str | None) -> tuple:
        signature = {name: "*bf16" if value == "given" else "constexpr" for name, value in given.items()}
        constants = {(i,): value for i, value in enumerate(given.values()) if value != "given"}
        return (types.SimpleNamespace(signature=signature, constants=constants),)

    plain, padded = request(lengths=None, flag=False, SIZE=16), request(lengths="given", flag=False, SIZE=32)
    both, flagged = request(lengths="given", flag=True, SIZE=16), request(lengths=None, flag=True, SIZE=64)
    requests = [plain, padded, both, flagged]
    assert compile_launches.showing(requests, set()) == [plain, both]
    assert compile_launches.showing(requests, {((0,), None), ((1,), False)}) == [both]
    assert compile_launches.showing(requests, {((0,), None), ((0,), "given"), ((1,), False)}) == [both]
    assert compile_launches.showing([plain, padded], {((0,), None), ((0,), "given"), ((1,), False)}) == []


def test_options_of_a_launch_and_of_the_table_are_written_alike():
    of_launch = {(0, 0): None, (0, 1): 16, (1,): True}
    of_table = {(0, 0): None, (0, 1): 16, "flag": True}
    signature = {"tensors": ("constexpr", "constexpr", "*fp32:16"), "flag": "constexpr", "count": "i32:16"}
    expected = {((0, 0), None), ((0, 2), "given"), ((1,), True)}
    assert compile_launches.options_of(signature, of_launch) == expected
    assert compile_launches.options_of(signature, of_table) == expected


@pytest.mark.parametrize("grid", [(2**31, 1, 1), (1, 65536, 1), (1, 1, 65536), (0, 1, 1)])
def test_a_grid_that_a_gpu_refuses_is_an_error(grid):
    with pytest.raises(ValueError, match="some call: a_kernel has the grid"):
        dry_driver.expect_valid("some call", [("a_kernel", grid)])
    with pytest.raises(ValueError, match="some call reached no launch"):
        dry_driver.expect_valid("some call", [])

"""Runs the CPU kernels at a given instruction set."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.packaging.lower_isas import lower_isas

ROOT = Path(__file__).parents[2]
# Each has what those before it have.
CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")


def results_at(capability: str, compute: Callable[[list], list], cases: list, folder: Path) -> list:
    """`compute(cases)`, of a function of a test module; skips where this process has less, or `make test-isa` runs all.

    In a process of its own, unless this one has that instruction set already; bfloat16 products run on Intel only
    where they are asked for.
    """
    best = torch.ops.recattn.cpu_capability()
    if CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        pytest.skip(f"this process has {best} at most")
    if capability in lower_isas(best):
        pytest.skip("make test-isa runs every test at it")
    if capability == best != "avx512_bf16":
        return compute(cases)
    files = str(folder / "inputs"), str(folder / "outputs")
    torch.save(cases, files[0])
    code = f"""
import sys, torch
from {compute.__module__} import {compute.__name__} as compute
results = compute(torch.load(sys.argv[1]))
torch.save((torch.ops.recattn.cpu_capability(), results), sys.argv[2])
"""
    environment = {**os.environ, "RECATTN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code, *files], env=environment, cwd=ROOT, check=True)
    used, results = torch.load(files[1])
    assert used == capability
    return results

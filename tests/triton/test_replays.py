"""How later calls find their kernels, grids and arguments: `launch` in C++, and replayed plans."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import recattn
from tests.helpers.interpreted import DEVICE

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("replays.py")
INSTALLED = importlib.metadata.version("triton")
TRITONS = {INSTALLED: None, "3.6.0": Path(sys.prefix) / "triton-3.6.0"}


# What depends on Triton: its search and its hooks.
OF_TRITON = ["search", "hooks"]


@pytest.mark.parametrize(
    "triton, tests", zip([INSTALLED, INSTALLED, "3.6.0"], [[], ["without"], OF_TRITON], strict=True), ids=str
)
def test_by_triton(triton, tests):
    """In another process, because here kernels are interpreted."""
    pytest.importorskip("recattn._host")
    if TRITONS[triton] is not None and not TRITONS[triton].exists():
        pytest.skip(f"Triton {triton} is not installed in {TRITONS[triton]}")
    path = {"PYTHONPATH": str(TRITONS[triton])} if TRITONS[triton] else {}
    run = subprocess.run([sys.executable, SCRIPT, *tests], capture_output=True, text=True, env=os.environ | path)
    assert run.returncode == 0, run.stderr


def test_empty_batches_are_replayed():
    """Without a launch, and so without a driver to ask."""
    for _ in range(3):
        q = torch.zeros(2, 1, 0, 16, device=DEVICE, requires_grad=True)
        positions, bias = torch.full((2, 3), -1, device=DEVICE), torch.zeros(2, 1, 3, 3, device=DEVICE)
        out = recattn.sink_attention(q, q, q, positions, bias, impl="triton")
        assert out.shape == q.shape and torch.autograd.grad(out, q, out)[0].shape == q.shape
        assert recattn.inter_sink_bias(q, q, impl="triton").shape == (2, 1, 0, 0)

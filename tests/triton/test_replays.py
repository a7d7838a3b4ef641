"""How later calls find their kernels, grids and arguments: `launch` in C++, and replayed plans."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("replays.py")
TRITONS = {importlib.metadata.version("triton"): None, "3.6.0": Path(sys.prefix) / "triton-3.6.0"}


@pytest.mark.parametrize("triton", TRITONS)
@pytest.mark.parametrize("test", ["search", "sizes", "hooks", "threads", "memory", "without"])
def test_by_triton(test, triton):
    """In another process, because here kernels are interpreted."""
    pytest.importorskip("recattn._host")
    if TRITONS[triton] is not None and not TRITONS[triton].exists():
        pytest.skip(f"Triton {triton} is not installed in {TRITONS[triton]}")
    path = {"PYTHONPATH": str(TRITONS[triton])} if TRITONS[triton] else {}
    run = subprocess.run([sys.executable, SCRIPT, test], capture_output=True, text=True, env=os.environ | path)
    assert run.returncode == 0, run.stderr

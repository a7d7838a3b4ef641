"""Runs the CPU kernels in a process of their own, at a given instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def results_at(capability: str, script: str, cases: list, folder: Path) -> list:
    """What `script` computes of the cases; skips where the processor has less.

    The script reads the cases from the file sys.argv[1] and saves (torch.ops.recattn.cpu_capability(), results) to
    sys.argv[2].
    """
    files = str(folder / "inputs"), str(folder / "outputs")
    torch.save(cases, files[0])
    environment = {**os.environ, "RECATTN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", script, *files], env=environment, check=True)
    used, results = torch.load(files[1])
    if used != capability:
        pytest.skip(f"this processor has {used} at most")
    return results

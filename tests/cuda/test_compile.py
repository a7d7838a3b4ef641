"""Every CUDA source compiles for every shipped architecture, and spills no register."""

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
ARCHITECTURES = ("80", "90a", "100")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc on the PATH")
@pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.stem)
def test_compiles_without_spills(source, tmp_path):
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    targets = [flag for a in ARCHITECTURES for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    # setup.py's flags and those that torch adds to them.
    # Code of the GPU only: tests/cuda/test_emulation.py has the host's, and cicc parses it here.
    command = [NVCC, "-fatbin", "-O3", "-std=c++20", *targets, "-Xptxas", "-v", *COMMON_NVCC_FLAGS]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes, f"-I{CSRC}"]
    result = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "kernel.fatbin")], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    compiled = Counter(re.findall(r"Compiling entry function '\w+' for 'sm_(\w+)'", result.stderr))
    assert compiled.keys() == set(ARCHITECTURES) and len(set(compiled.values())) == 1, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills == [("0", "0")] * compiled.total(), result.stderr

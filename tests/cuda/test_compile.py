"""Every CUDA source compiles, and spills no register: here for Hopper, by `make sanitize` for all that are shipped."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

CSRC = Path(__file__).parents[2] / "csrc"
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="needs nvcc on the PATH")
each_source = pytest.mark.parametrize("source", sorted((CSRC / "cuda").glob("*.cu")), ids=lambda path: path.stem)


@needs_nvcc
@each_source
def test_compiles_without_spills(source, tmp_path):
    assert_compiles_without_spills(source, tmp_path, ("90a",))


def assert_compiles_without_spills(source: Path, folder: Path, architectures: Sequence[str]) -> None:
    includes = [flag for path in include_paths() for flag in ("-isystem", path)]
    targets = [flag for a in architectures for flag in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
    # setup.py's flags and those that torch adds to them.
    # Code of the GPU only: tests/cuda/test_emulation.py has the host's, and cicc parses it here.
    command = [NVCC, "-fatbin", "-O3", "-std=c++20", *targets, "-Xptxas", "-v", *COMMON_NVCC_FLAGS]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", *includes, f"-I{CSRC}"]
    result = subprocess.run(
        [*command, str(source), "-o", str(folder / "kernel.fatbin")], capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    compiled = Counter(re.findall(r"Compiling entry function '\w+' for 'sm_(\w+)'", result.stderr))
    assert compiled.keys() == set(architectures) and len(set(compiled.values())) == 1, result.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert spills == [("0", "0")] * compiled.total(), result.stderr

"""The emulation of csrc/cuda on a CPU: which faults it finds.

The kernels under sanitizers are in sanitize.py, their results in test_lrea_absorbed_attention.py.
"""

import re
import subprocess

import pytest

from tests.helpers.emulated_cuda import compile_program

# Of a kernel of faults.cpp, what is said. Whoever comes first may wait in vain, or find that another has gone.
FAULTS = {
    "return": r"__syncthreads at faults.cpp:\d+ behind which a thread has returned|63 of 64 at __syncthreads",
    "two barriers": r"threads wait both at __syncthreads at faults.cpp:\d+ and at __syncthreads at faults.cpp:",
    "vote": r"__ballot_sync at faults.cpp:\d+ behind which a thread has returned|31 of 32 at __ballot_sync",
    "deadlock": r"wait for each other: 1 of 64 at __syncthreads at faults.cpp:\d+, 31 of 32 at __ballot_sync",
    "trap": r"^emulated kernel: trap in block \(\d, 0, 0\)$",
    "uninitialised": "^no error$",  # what it reads is NaN
    "no barrier": r"^emulated kernel: trap in block \(\d, 0, 0\)$",  # what it reads is NaN
    "too much": "^invalid argument$",
}


def run(program, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    return compile_program("faults.cpp", tmp_path_factory.mktemp("faults"), sanitizer="address")


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_kernel_are_told(faults, fault):
    said = run(faults, fault).stdout
    assert re.search(FAULTS[fault], said), said


def test_the_end_of_shared_memory_is_seen(faults):
    result = run(faults, "behind")
    assert result.returncode != 0 and "use-after-poison" in result.stderr, result.stderr[:5000]

"""The kernels as compiled for use, while behind each tensor lies memory that nobody may touch (guarded_memory.c)."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recattn._extension import MISSING
from tests.helpers.sanitizers import compiler, run_script

SOURCE = Path(__file__).parents[1] / "helpers" / "guarded_memory.c"
pytestmark = pytest.mark.skipif("cpu" in MISSING, reason=MISSING.get("cpu", ""))


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """The environment of a process with guarded memory."""
    library = tmp_path_factory.mktemp("guarded") / "guarded_memory.so"
    subprocess.run([compiler(), "-x", "c", "-O1", "-shared", "-fPIC", SOURCE, "-o", library, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    "touch",
    ["ctypes.c_byte.from_address(x.data_ptr() + x.nbytes).value", "a = x.data_ptr(); del x; ctypes.string_at(a)"],
    ids=["behind", "freed"],
)
def test_a_byte_outside_ends_the_process(guarded, touch):
    code = f"import ctypes, torch\nx = torch.ones(7)\nprint(x.sum().item(), flush=True)\n{touch}"
    result = subprocess.run([sys.executable, "-c", code], env=guarded, capture_output=True, text=True)
    assert result.returncode == -signal.SIGSEGV and result.stdout == "7.0\n", result


def test_no_operator_touches_anything_outside(guarded):
    code, said = run_script(guarded, "helpers/odd_calls.py")
    assert code == 0, said

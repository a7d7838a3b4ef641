"""The instruction sets at which `make test-isa` runs the CPU tests again."""

import os
import subprocess
import sys

import pytest
import torch

from recattn._extension import MISSING
from tests.packaging.lower_isas import ISAS, environment_of, lower_isas


@pytest.mark.parametrize(
    "best, expected",
    [("baseline", []), ("avx2", ["baseline"]), ("avx512", ["baseline", "avx2"]), ("avx512_bf16", ["baseline", "avx2"])],
)
def test_none_runs_twice(best, expected):
    assert lower_isas(best) == expected


@pytest.mark.skipif("cpu" in MISSING, reason=MISSING.get("cpu", ""))
@pytest.mark.parametrize("isa", ISAS)
def test_kernels_and_pytorch_keep_to_it(isa):
    if isa not in lower_isas(torch.ops.recattn.cpu_capability()):
        pytest.skip("not below this processor's best")
    code = "import torch, recattn; print(torch.ops.recattn.cpu_capability(), torch.backends.cpu.get_cpu_capability())"
    environment = os.environ | environment_of(isa)
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [isa, {"baseline": "DEFAULT", "avx2": "AVX2"}[isa]]

"""Run the operators' CPU tests as on older processors: once for each instruction set below this one's best.

python tests/packaging/lower_isas.py [options of pytest]
"""

import os
import subprocess
import sys
from pathlib import Path

import torch

import recattn  # noqa: F401 (registers the operators)

# The kernels, PyTorch, MKL and oneDNN each have a limit of their own.
LIMITS = ("RECATTN_CPU_CAPABILITY", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
ISAS = {"baseline": ("baseline", "default", "SSE4_2", "SSE41"), "avx2": ("avx2", "avx2", "AVX2", "AVX2")}
TESTS = (
    "cpu/test_inter_sink_bias.py",
    "cpu/test_lrea_attention.py",
    "cpu/test_refined_attention.py",
    "cpu/test_sink_attention.py",
    "nn/test_inter_sink_bias.py",
    "ops/test_lrea_attention.py",
    "ops/test_lrea_reference.py",
    "ops/test_refined_attention.py",
    "ops/test_sink_attention.py",
    "ops/test_wasserstein_attention.py",
)
# What depends on no instruction set, or goes through all of them itself.
LEFT_OUT = "bad_input or by_hand or compiles or dropout or empty or gradcheck or instruction_set or opcheck or refuse"


def lower_isas(best: str) -> list[str]:
    """The instruction sets below the processor's best."""
    return [isa for isa in ISAS if isa != best] if best != "baseline" else []


def environment_of(isa: str) -> dict[str, str]:
    return dict(zip(LIMITS, ISAS[isa], strict=True))


def main(options: list[str]) -> int:
    folder = Path(__file__).parents[1]
    files = [str(folder / name) for name in TESTS]
    command = [sys.executable, "-m", "pytest", *options, "-k", f"not ({LEFT_OUT})", *files]
    failed = False
    for isa in lower_isas(torch.ops.recattn.cpu_capability()):
        print(f"The operators' CPU tests at {isa}:", flush=True)
        failed |= subprocess.run(command, env=os.environ | environment_of(isa), cwd=folder.parent).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

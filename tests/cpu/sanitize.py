"""Slow test of `make sanitize`: the C++ kernels under AddressSanitizer, while another thread writes their indices."""

import os
import subprocess
import sys
from pathlib import Path

from torch.utils import cpp_extension

from tests.helpers.sanitizers import compile_command, preloaded

ROOT = Path(__file__).parents[2]
SOURCES = (
    "index_checks",
    "lrea_attention",
    "lrea_compress",
    "lrea_restored",
    "sink_attention",
    "sink_attention_bwd",
)


def test_races_under_address_sanitizer(tmp_path):
    command, library = compile_command("address", tmp_path), str(tmp_path / "operators.so")
    include = [f"-I{path}" for path in (ROOT / "csrc", *cpp_extension.include_paths())]
    shared = ["-shared", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    linked = [f"-L{path}" for path in cpp_extension.library_paths()]
    sources = [str(ROOT / "csrc" / "cpu" / f"{name}.cpp") for name in SOURCES]
    subprocess.run([*command, *shared, *include, *sources, *linked, "-ltorch_cpu", "-o", library], check=True)
    environment = os.environ | {"LD_PRELOAD": preloaded(command), "ASAN_OPTIONS": "detect_leaks=0"}
    race = [sys.executable, str(ROOT / "tests" / "helpers" / "racing_indices.py"), "0.5", library]
    result = subprocess.run(race, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "AddressSanitizer" not in result.stderr, result.stderr[:5000]

"""Compilation for a sanitizer, and what tests run under more than one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def compiler() -> str:
    """The C++ compiler. Skips the test if there is none."""
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no C++ compiler: {name} is not on the PATH")
    return found


def compile_command(sanitizer: str, folder: Path) -> list[str]:
    """The compiler and its options for "thread" or "address". Skips the test if they do not work here."""
    command = [compiler(), f"-fsanitize={sanitizer}", "-O1", "-g1", "-std=c++20"]
    source, program = folder / "empty.cpp", str(folder / "empty")
    source.write_text("int main() {}\n")
    for attempt in ([*command, str(source), "-o", program], [program]):
        result = subprocess.run(attempt, capture_output=True, text=True)
        if result.returncode != 0:
            pytest.skip(f"no {sanitizer} sanitizer here: {result.stderr}")
    return command


def run_script(environment: dict[str, str], script: str, *arguments: str) -> tuple[int, str]:
    """The exit status of a script in tests/, and what it and a sanitizer said."""
    program = [sys.executable, "-W", "ignore", str(ROOT / "tests" / script), *arguments]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=600)
    return result.returncode, result.stdout[-5000:] + result.stderr[:5000]


def preloaded(command: list[str], runtime: str) -> str:
    """LD_PRELOAD for a Python that loads a library under a sanitizer, which must see C++ exceptions."""
    names = (runtime, "libstdc++.so")
    return " ".join(
        subprocess.check_output([command[0], f"-print-file-name={name}"], text=True).strip() for name in names
    )


def run_slot_map_stress(sanitizer: str, folder: Path) -> None:
    """Compile and run tests/serving/slot_map_stress.cpp."""
    csrc, program = ROOT / "csrc", str(folder / "stress")
    sources = [str(ROOT / "tests" / "serving" / "slot_map_stress.cpp"), str(csrc / "slot_map" / "slot_map.cpp")]
    command = [*compile_command(sanitizer, folder), "-fno-sanitize-recover=all", f"-I{csrc}"]
    subprocess.run([*command, *sources, "-o", program], check=True, timeout=120)
    result = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and "Sanitizer" not in result.stderr, result.stdout + result.stderr[:5000]

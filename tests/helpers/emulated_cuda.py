"""lrea_absorbed_attention's CUDA kernels on a CPU: g++ compiles csrc/cuda with tests/cuda/cuda_emulation's headers."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from filelock import FileLock  # a dependency of torch
from torch.utils import cpp_extension

from recattn._extension import MISSING
from recattn.ops import lrea_attention as ops
from tests.helpers.sanitizers import compile_command, compiler

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
EMULATION = ROOT / "tests" / "cuda" / "cuda_emulation"
# Where the tensors of a test are that takes the fixture `cuda_kernels`.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_LIBRARY = torch.library.Library("recattn_emulated", "DEF")


def compile_program(source: str, folder: Path, *, sanitizer: str | None = None, csrc: Path = CSRC) -> Path:
    """Compile a program of tests/cuda/cuda_emulation with csrc/cuda and the emulator."""
    command = [compiler(), "-O1", "-std=c++20"] if sanitizer is None else compile_command(sanitizer, folder)
    program = folder / Path(source).stem
    _link([*command, "-fno-sanitize-recover=all"], EMULATION / source, program, csrc, [])
    return program


def altered(folder: Path, name: str, text: str, replacement: str, occurrence: int = 0) -> Path:
    """A copy of csrc with one occurrence of a text in csrc/cuda/<name> replaced."""
    csrc = shutil.copytree(CSRC, folder / "csrc")
    source = csrc / "cuda" / name
    parts = source.read_text().split(text)
    assert occurrence + 1 < len(parts), f"{name} no longer has {text!r} so often"
    source.write_text(text.join(parts[: occurrence + 1]) + replacement + text.join(parts[occurrence + 1 :]))
    return csrc


def compile_library(folder: Path) -> Path:
    """Compile the operator, registered as recattn_emulated::lrea_absorbed_attention."""
    library = folder / "emulated.so"
    linked = ["-shared", *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    command = [compiler(), "-O2", "-std=c++20", "-fPIC", "-fvisibility=hidden"]
    _link(command, CSRC / "cuda" / "lrea_absorbed_attention.cu", library, CSRC, linked)
    return library


def _link(command: list[str], source: Path, target: Path, csrc: Path, options: list[str]) -> None:
    include = [f"-I{path}" for path in (EMULATION, csrc)]
    include += [option for path in cpp_extension.include_paths() for option in ("-isystem", path)]
    # A kernel sees its shared memory as numbers of several types.
    own_options = ["-fno-strict-aliasing", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    # ThreadSanitizer is to see what kernels do, not what the emulator does for them.
    emulators = ["-fno-sanitize=thread", "-DEMULATION_TSAN"] if "-fsanitize=thread" in command else []
    objects = []
    for path, more in ((source, own_options), (EMULATION / "emulator.cpp", emulators)):
        objects.append(str(target.with_name(path.stem + ".o")))
        subprocess.run([*command, *more, *include, "-x", "c++", "-c", str(path), "-o", objects[-1]], check=True)
    subprocess.run([*command, *objects, *options, "-o", str(target)], check=True)


def load_library(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Load the emulated operator. It is compiled once for all processes of a pytest run."""
    if "cpu" in MISSING:  # which has the operator's schemas
        pytest.skip(MISSING["cpu"])
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(folder / "emulated.lock"):
        library = folder / "emulated.so"
        if not library.exists():
            compile_library(folder)
    for name in torch.ops.recattn.lrea_absorbed_attention.overloads():
        schema = getattr(torch.ops.recattn.lrea_absorbed_attention, name)._schema
        _LIBRARY.define(str(schema).removeprefix("recattn::"))
    torch.ops.load_library(library)


def route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make impl="cuda" run the emulated kernels, on CPU tensors."""
    real = ops.unsupported_reasons
    monkeypatch.setattr(ops, "unsupported_reasons", lambda *args, **options: real(*args, **options) | {"cuda": None})
    emulated = torch.ops.recattn_emulated.lrea_absorbed_attention
    monkeypatch.setattr(torch.ops.recattn, "lrea_absorbed_attention", emulated)

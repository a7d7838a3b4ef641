"""recattn compiled for a sanitizer: csrc/cpu for one instruction set, and csrc/host."""

import dataclasses
import os
import pickle
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock  # a dependency of torch
from torch.utils import cpp_extension

from tests.helpers.sanitizers import ROOT, compile_command, preloaded, run_script

OWN = ROOT / "tests" / "cpu"  # has what is compiled in place of csrc's
CSRC = ROOT / "csrc"
# Of UndefinedBehaviorSanitizer all but what it checks at each access, which doubles the time of a compilation:
# AddressSanitizer sees those.
UNDEFINED = (
    "shift,integer-divide-by-zero,signed-integer-overflow,unreachable,return,vla-bound,bounds,float-cast-overflow"
)
BY_CALLS = ["--param", "asan-instrumentation-with-call-threshold=0"]  # three times as fast to compile
OPTIONS = {"address": [*BY_CALLS, f"-fsanitize={UNDEFINED}", "-fno-sanitize-recover=all"], "thread": []}
RUNTIMES = {"address": "libasan.so", "thread": "libtsan.so"}


@dataclasses.dataclass(frozen=True)
class SanitizedPackage:
    """What Python imports from `folder`, linked from an object of each source ("cpu/lrea_compress.cpp")."""

    folder: Path
    sanitizer: str
    command: list[str]
    objects: dict[str, Path]

    def link(self) -> None:
        package = self.folder / "recattn"
        package.mkdir(parents=True)
        for path in (*(ROOT / "python" / "recattn").iterdir(), ROOT / "triton_kernels"):
            if path.suffix != ".so":
                (package / path.name).symlink_to(path)
        libraries = {"cpu": self.operators, "host": package / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"}
        paths = [f"-L{path}" for path in cpp_extension.library_paths()]
        for part, library in libraries.items():
            own = [str(path) for name, path in self.objects.items() if name.startswith(part)]
            subprocess.run([*self.command, "-shared", *own, *paths, "-ltorch_cpu", "-o", str(library)], check=True)

    @property
    def operators(self) -> Path:
        return self.folder / "recattn" / "_C.abi3.so"

    def run(self, script: str, *arguments: str) -> tuple[int, str]:
        """The exit status of a script in tests/, and what it and the sanitizer said."""
        options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1 ignore_noninstrumented_modules=1"}
        preload = preloaded(self.command, RUNTIMES[self.sanitizer])
        paths = {"PYTHONPATH": f"{self.folder}:{ROOT}", "LD_PRELOAD": preload, "OMP_NUM_THREADS": "1"}
        return run_script(os.environ | options | paths, script, *arguments)

    def with_mistake(self, folder: Path, name: str, said: str, mistake: str) -> "SanitizedPackage":
        """The same with one text of one source replaced."""
        source = folder / Path(name).name
        source.write_text(replaced(CSRC / name, said, mistake))
        objects = self.objects | {name: compiled(self.command, source, folder)}
        package = dataclasses.replace(self, folder=folder / "package", objects=objects)
        package.link()
        return package


def compiled_once(sanitizer: str, tmp_path_factory: pytest.TempPathFactory) -> SanitizedPackage:
    """compile_package for all processes of a pytest run."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / sanitizer
    folder.mkdir(exist_ok=True)
    kept = folder / "package.pickle"
    with FileLock(folder / "lock"):
        if not kept.exists():
            kept.write_bytes(pickle.dumps(compile_package(sanitizer, folder)))
        return pickle.loads(kept.read_bytes())


def compile_package(sanitizer: str, folder: Path) -> SanitizedPackage:
    """Under "thread", parallel_for starts threads that the sanitizer sees, however little there is to do.

    Skips the test if the sanitizer does not work here.
    """
    command = [*compile_command(sanitizer, folder), *OPTIONS[sanitizer], "-w", "-fPIC", "-fvisibility=hidden"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources = {
        f"{path.parent.name}/{path.name}": path for part in ("cpu", "host") for path in CSRC.glob(f"{part}/*.cpp")
    }
    if sanitizer == "thread":
        sources["cpu/threads.cpp"] = OWN / "threads.cpp"
        (folder / "cpu").mkdir()
        (folder / "cpu" / "common.h").write_text(
            replaced(CSRC / "cpu" / "common.h", "PerThread = 1 << 18", "PerThread = 1")
        )
    include = [folder, OWN / "one_isa", CSRC, *cpp_extension.include_paths(), sysconfig.get_path("include")]
    command += [f"-I{path}" for path in include]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = pool.map(lambda path: compiled(command, path, folder), sources.values())
    package = SanitizedPackage(folder / "package", sanitizer, command, dict(zip(sources, objects, strict=True)))
    package.link()
    return package


def compiled(command: list[str], source: Path, folder: Path) -> Path:
    target = folder / f"{source.parent.name}_{source.stem}.o"
    subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
    return target


def replaced(source: Path, said: str, mistake: str) -> str:
    text = source.read_text()
    assert text.count(said) == 1, f"{source.name} has {said!r} {text.count(said)} times"
    return text.replace(said, mistake)

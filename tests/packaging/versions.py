"""The kernels under every torch and Triton that recattn is tried with, each pair in an environment of its own.

python tests/packaging/versions.py    writes what it finds to versions.md; needs no GPU, and hours of one core
python tests/packaging/versions.py --every 8 --only 2.11.0 3.6.0    these rows of it, by one kernel test in eight

The environments stay in .cache/versions, 5 GB each where pip serves CUDA builds of torch. The C++ kernels in them are
the checkout's own, whichever torch they were built with: their ABI is the stable one.
"""

import argparse
import itertools
import os
import platform
import re
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from datetime import date
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
TABLE = Path(__file__).with_name("versions.md")


@dataclass(frozen=True)
class Pair:
    """A torch, the Triton that pip installs with it, and a numpy for its interpreter: numpy 2.4 needs Triton 3.7."""

    torch: str
    triton: str
    numpy: str


PAIRS = (
    Pair("2.10.0", "3.6.0", "2.3.5"),
    Pair("2.11.0", "3.6.0", "2.3.5"),
    Pair("2.13.0", "3.7.1", "2.4.6"),
    Pair("2.14.1", "3.8.0", "2.4.6"),
)
# Those of the pairs, and what recattn admits besides: the oldest, and the newest that was tried.
TRITONS = ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "3.9.0")
TOOLS = ("pytest", "hypothesis", "setuptools>=77,<82", "ninja", "pybind11")

KERNEL_TESTS = sorted({*TESTS.glob("triton/test_*.py")} - {TESTS / "triton" / "test_launches.py"})
# And where the tests are that torch.compile the public operators and modules, and have nvcc read torch's headers.
OPERATORS = ("inter_sink_bias", "lrea_attention", "refined_attention*", "sink_attention*", "wasserstein_attention")
OTHERS = ("cpu/test_refined_attention", "cuda/test_compile", "nn/test_*", "ops/test_double_backward")
OTHER_TESTS = sorted(
    path for name in (*(f"ops/test_{name}" for name in OPERATORS), *OTHERS) for path in TESTS.glob(f"{name}.py")
)
COMPILES = "compiles or one_graph or compiled_backwards"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "versions", help="for the environments")
    parser.add_argument("--every", type=int, default=1, help="run one kernel test in so many")
    parser.add_argument("--only", nargs="+", metavar="VERSION", help="these of torch and Triton; other rows stay")
    options = parser.parse_args()

    chosen = options.only or [*(pair.torch for pair in PAIRS), *TRITONS]
    folder = options.folder.resolve()
    tried = itertools.chain(
        (try_pair(folder, pair, options.every) for pair in PAIRS if pair.torch in chosen),
        (try_triton(folder, triton) for triton in TRITONS if triton in chosen),
    )
    failed = False
    for row in tried:
        print(row, flush=True)
        TABLE.write_text(with_row(TABLE.read_text(), row))
        failed |= re.search(r"[1-9]\d* failed", row) is not None
    return int(failed)


def with_row(table: str, row: str) -> str:
    """The table with the row that has the same first cell replaced."""
    lines, first_cell = table.splitlines(), row.split(" | ")[0]
    (place,) = (i for i, line in enumerate(lines) if line.split(" | ")[0] == first_cell)
    return "\n".join([*lines[:place], row, *lines[place + 1 :]]) + "\n"


def try_pair(folder: Path, pair: Pair, every: int) -> str:
    began = time.monotonic()
    python = environment(folder, pair)
    kernels = run_tests(python, KERNEL_TESTS, f"not ({COMPILES})", every)
    compiled = run_tests(python, [*KERNEL_TESTS, *OTHER_TESTS], COMPILES)
    if every > 1:
        kernels += f" (one in {every})"
    return row_of(f"torch {pair.torch}", f"Triton {pair.triton}", f"numpy {pair.numpy}", kernels, compiled, began=began)


def try_triton(folder: Path, triton: str) -> str:
    began = time.monotonic()
    return row_of(f"Triton {triton}", compile_kernels(folder, triton), began=began)


def row_of(*cells: str, began: float) -> str:
    minutes = f"{(time.monotonic() - began) / 60:.0f} minutes"
    return f"| {' | '.join((*cells, minutes, str(date.today()), machine()))} |"


def machine() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"Python {platform.python_version()}, {found[1] if found else platform.machine()}"


def environment(folder: Path, pair: Pair) -> Path:
    """The interpreter of a pair's environment, which is made if it does not exist."""
    home = folder / f"torch-{pair.torch}"
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    pip_install(python, f"torch=={pair.torch}", f"triton=={pair.triton}", f"numpy=={pair.numpy}", *TOOLS)
    pip_install(python, "--no-build-isolation", "--no-deps", "--editable", str(ROOT), RECATTN_BUILD="none")
    return python


def pip_install(python: Path | str, *arguments: str, **variables: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, env=os.environ | variables, check=True)


def run_tests(python: Path, files: list[Path], chosen: str, every: int = 1) -> str:
    """How many tests passed, failed and were skipped. Failures are printed to stderr."""
    plugins = ("-p", "no:cacheprovider", "-p", "tests.packaging.versions")
    command = [python, "-m", "pytest", "-q", *plugins, "-k", chosen, *files]
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RECATTN_TEST_EVERY": str(every)}
    said = subprocess.run(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE, text=True).stdout
    for line in said.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            print(line, file=sys.stderr, flush=True)
    summary = said.rstrip().rpartition("\n")[2]
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}
    if "passed" not in counts:
        raise SystemExit(said)
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return f"{counts['passed']} passed, {failed} failed, {counts.get('skipped', 0)} skipped"


def pytest_collection_modifyitems(items: list) -> None:
    """Keep one test in RECATTN_TEST_EVERY, in the runs that load this file as a plugin."""
    items[:] = items[:: int(os.environ["RECATTN_TEST_EVERY"])]


def compile_kernels(folder: Path, triton: str) -> str:
    """How many configurations compiled under this Triton, which precedes this environment's on PYTHONPATH."""
    target = folder / f"triton-{triton}"
    if not target.exists():
        pip_install(sys.executable, "--no-deps", "--target", str(target), f"triton=={triton}")
    command = [sys.executable, TESTS / "compile_table" / "table.py", "--one-of-each-kind"]
    variables = {"PYTHONPATH": str(target), "TRITON_CACHE_DIR": str(folder / f"cache-{triton}")}
    said = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, text=True, check=False).stdout
    found = re.search(rf"(\d+) configurations, (\d+) problems by triton {re.escape(triton)}$", said.rstrip())
    if found is None:
        raise SystemExit(said)
    problems, spilling = int(found[2]), said.count(": spills ")
    if problems:
        print(said, file=sys.stderr, flush=True)
    return f"{int(found[1]) - problems} compiled, {problems} failed, {spilling} spill"


if __name__ == "__main__":
    sys.exit(main())

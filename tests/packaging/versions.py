"""recattn under every Python, torch, Triton, numpy and transformers that it is tried with, each row in an environment.

python tests/packaging/versions.py    writes what it finds to versions.md; needs no GPU, and hours of one core
python tests/packaging/versions.py --every 8 --only 2.11.0 3.6.0    the rows with these, by one test in eight
python tests/packaging/versions.py --suites transformers    one column of every row

The environments stay in .cache/versions, 5 GB each where pip serves CUDA builds of torch. A row needs its Python on the
PATH (python3.10 and so on). The C++ kernels are the checkout's own, whichever Python and torch they were built with:
their ABI is the stable one.
"""

import argparse
import itertools
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import astuple, dataclass
from datetime import date
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
TABLE = Path(__file__).with_name("versions.md")


@dataclass(frozen=True)
class Environment:
    """A torch, the Triton that pip installs with it, and what people have beside them."""

    python: str
    torch: str
    triton: str
    numpy: str
    transformers: str

    @property
    def cells(self) -> tuple[str, ...]:
        names = ("Python", "torch", "Triton", "numpy", "transformers")
        return tuple(f"{name} {version}" for name, version in zip(names, astuple(self), strict=True))


# Triton's interpreter before 3.7 needs numpy below 2.4. RecBole and RecTools need numpy 1.
ENVIRONMENTS = (
    Environment("3.10", "2.10.0", "3.6.0", "2.2.6", "4.48.3"),
    Environment("3.11", "2.10.0", "3.6.0", "2.3.5", "4.51.3"),
    Environment("3.11", "2.11.0", "3.6.0", "2.3.5", "4.57.6"),
    Environment("3.11", "2.13.0", "3.7.1", "1.26.4", "5.0.0"),
    Environment("3.12", "2.13.0", "3.7.1", "2.4.6", "5.10.4"),
    Environment("3.11", "2.13.0", "3.7.1", "2.4.6", "5.23.0"),
    Environment("3.11", "2.14.1", "3.8.0", "2.4.6", "5.3.0"),
    Environment("3.13", "2.14.1", "3.8.0", "2.4.6", "5.24.0"),
    Environment("3.11", "2.13.0", "3.9.0", "2.4.6", "5.24.0"),
)
# Those above, and others that recattn admits.
TRITONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
TOOLS = ("pytest", "hypothesis", "setuptools>=77,<82", "ninja", "pybind11")

COMPILES = "compiles or one_graph or compiled_backwards"
KERNEL_TESTS = sorted(
    {*TESTS.glob("triton/test_*.py"), *TESTS.glob("cpu/test_*.py")} - {TESTS / "triton/test_launches.py"}
)
# And where the tests are that torch.compile the public operators and modules, and have nvcc read torch's headers.
OPERATORS = ("inter_sink_bias", "lrea_attention", "refined_attention*", "sink_attention*", "wasserstein_attention")
COMPILE_TESTS = (
    *(f"ops/test_{name}" for name in OPERATORS),
    "cuda/test_compile",
    "nn/test_*",
    "ops/test_double_backward",
)
SUITES = {
    "kernels": (KERNEL_TESTS, f"not ({COMPILES})"),
    "compile": (
        [*KERNEL_TESTS, *sorted(path for name in COMPILE_TESTS for path in TESTS.glob(f"{name}.py"))],
        COMPILES,
    ),
    "transformers": (sorted(TESTS.glob("integrations/test_transformers*.py")), ""),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "versions", help="for the environments")
    parser.add_argument("--every", type=int, default=1, help="run one test in so many")
    parser.add_argument("--only", nargs="+", metavar="VERSION", help="the rows with one of these; other rows stay")
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=[*SUITES], help="these columns; others stay")
    options = parser.parse_args()

    folder = options.folder.resolve()
    chosen = [x for x in ENVIRONMENTS if not options.only or {*options.only} & {*astuple(x)}]
    tritons = [] if options.suites != [*SUITES] else [x for x in TRITONS if x in (options.only or TRITONS)]
    failed = False
    tried = itertools.chain(
        (try_environment(folder, environment, options.suites, options.every) for environment in chosen),
        (try_triton(folder, triton) for triton in tritons),
    )
    for row in tried:
        print(row, flush=True)
        TABLE.write_text(with_row(TABLE.read_text(), row))
        failed |= re.search(r"[1-9]\d* failed", row) is not None
    return int(failed)


def find_row(table: str, cells: tuple[str, ...]) -> str:
    """The row that begins with these cells."""
    (row,) = (line for line in table.splitlines() if line.startswith(f"| {' | '.join(cells)} |"))
    return row


def with_row(table: str, row: str) -> str:
    """The table with the row of the same environment, or of the same Triton, replaced."""
    known = itertools.takewhile(lambda cell: re.fullmatch(r"[A-Za-z]+ [\d.]+", cell), row[2:].split(" | "))
    return table.replace(find_row(table, tuple(known)), row)


def try_environment(folder: Path, environment: Environment, suites: list[str], every: int) -> str:
    python = install(folder, environment)
    results = find_row(TABLE.read_text(), environment.cells)[2:].split(" | ")[len(environment.cells) :][: len(SUITES)]
    for i, (suite, (files, chosen)) in enumerate(SUITES.items()):
        if suite in suites:
            results[i] = run_tests(python, files, chosen, every) + (f" (one in {every})" if every > 1 else "")
    return row_of(*environment.cells, *results)


def try_triton(folder: Path, triton: str) -> str:
    return row_of(f"Triton {triton}", compile_kernels(folder, triton))


def row_of(*cells: str) -> str:
    return f"| {' | '.join((*cells, str(date.today()), machine()))} |"


def machine() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def install(folder: Path, environment: Environment) -> Path:
    """The interpreter of an environment, which is made if it does not exist."""
    home = folder / "-".join(astuple(environment))
    python = home / "bin" / "python"
    if not python.exists():
        interpreter = shutil.which(f"python{environment.python}")
        if interpreter is None:
            raise SystemExit(f"python{environment.python} is not on the PATH")
        subprocess.run([interpreter, "-m", "venv", home], check=True)
    packages = [f"{name}=={getattr(environment, name)}" for name in ("torch", "triton", "numpy", "transformers")]
    pip_install(python, *packages, *TOOLS)
    pip_install(python, "--no-build-isolation", "--no-deps", "--editable", str(ROOT), RECATTN_BUILD="none")
    return python


def pip_install(python: Path | str, *arguments: str, **variables: str) -> None:
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, env=os.environ | variables, check=True)


def run_tests(python: Path, files: list[Path], chosen: str, every: int) -> str:
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

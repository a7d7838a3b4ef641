"""Train a model of each library, stock and with our attention: `python -m benchmarks.clients.run [--only recbole]`.

Each library gets an environment of its own in .cache/clients: torch and Triton as requirements/dev.txt pins them, the
library by recattn's extra, and recattn from this checkout with its compiled kernels, so use the Python that compiled
them. The tests that CI leaves out run there first. What the scripts print is kept in results/, and docs/integrations.md
has it as a table.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import venv
from collections.abc import Iterable
from pathlib import Path

from benchmarks import ROOT
from tests.packaging.versions import pip_install

# By the script's name. TorchRec's extra is for CUDA; on a CPU requirements/torchrec.txt replaces it.
EXTRAS = {"recbole": "recbole", "rectools": "rectools", "torch_rechub": "torch-rechub", "fuxictr": "fuxictr"}
CLIENTS = (*EXTRAS, "torchrec")
# Of libraries that are too large for CI's environment, and one that is too slow for it.
TESTS = {"fuxictr": "test_fuxictr.py", "torchrec": "torchrec_sharded.py"}
ENVIRONMENTS = ROOT / ".cache" / "clients"
RESULTS = Path(__file__).with_name("results")
PAGE = ROOT / "docs" / "integrations.md"
MARKS = "<!-- make clients writes what follows -->", "<!-- until here -->"
THREADS = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CLIENTS, default=CLIENTS, help="these libraries")
    for client in parser.parse_args().only:
        python = environment(client)
        if client in TESTS:
            run_tests(python, TESTS[client])
        lines = run_script(python, client)
        print("\n".join(lines), flush=True)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{client}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        PAGE.write_text(with_table(PAGE.read_text(), results_table()))


def environment(client: str) -> Path:
    """The interpreter of a client's environment, which is made if it does not exist."""
    home = ENVIRONMENTS / client
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    extra = f"[{EXTRAS[client]}]" if client in EXTRAS else ""
    pip_install(python, *pins("torch", "triton"), "--editable", f"{ROOT}{extra}", RECATTN_BUILD="none")
    if not extra:
        pip_install(python, "--no-deps", "--requirement", str(ROOT / "requirements" / f"{client}.txt"))
    return python


def pins(*packages: str) -> list[str]:
    pinned = (ROOT / "requirements" / "dev.txt").read_text()
    return re.findall(rf"^(?:{'|'.join(packages)})==.*$", pinned, flags=re.MULTILINE)


def run_tests(python: Path, name: str) -> None:
    pip_install(python, *pins("pytest", "hypothesis"))
    subprocess.run([python, "-m", "pytest", "-q", ROOT / "tests" / "integrations" / name], cwd=ROOT, check=True)


def run_script(python: Path, client: str) -> list[str]:
    """The comparisons that a client's script prints, as JSON. The files that a trainer writes are thrown away."""
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS)}
    with tempfile.TemporaryDirectory() as folder:
        said = subprocess.run(
            [python, "-m", f"benchmarks.clients.{client}"],
            cwd=folder,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout
    lines = [line for line in said.splitlines() if line.startswith('{"library": ')]
    if not lines:
        raise SystemExit(f"benchmarks/clients/{client}.py printed no comparison:\n{said}")
    return lines


def results_table() -> str:
    """All results as Markdown."""
    files = [RESULTS / f"{client}.jsonl" for client in CLIENTS]
    rows = [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]
    heads = ("library", "model", "our attention", "epochs", "CPU seconds per epoch: stock, ours", "metric")
    heads += ("stock", "ours", "environment")
    lines = [table_row(heads), table_row(["---"] * len(heads)), *map(row_of, rows)]
    machines = sorted({f"{row['cpu']} ({row['kernels']}), threads: {row['threads']}, {row['date']}" for row in rows})
    return "\n".join(lines) + f"\n\nMeasured on {'; '.join(machines)}.\n"


def row_of(result: dict) -> str:
    stock, ours = result["stock"], result["ours"]
    seconds = f"{stock['seconds_per_epoch']:.1f}, {ours['seconds_per_epoch']:.1f}"
    metrics = (f"{outcome['metric']:.4f}" for outcome in (stock, ours))
    environment = f"Python {result['python']}, numpy {result['numpy']}, torch {result['torch'].partition('+')[0]}"
    first = (result[name] for name in ("library", "model", "attention", "epochs"))
    return table_row((*first, seconds, result["metric"], *metrics, environment))


def table_row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def with_table(page: str, written: str) -> str:
    """The page with this between its marks."""
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return f"{before}{MARKS[0]}\n\n{written}\n{MARKS[1]}{after}"


if __name__ == "__main__":
    main()

"""The command `python -m recattn check`."""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from recattn import _environment
from recattn._arguments import positive
from recattn.checks import report
from recattn.checks.cases import OPERATORS
from recattn.checks.supervisor import run

DESCRIPTION = """Hold every operator to the float64 reference, in each implementation and dtype that runs on a device.

An output or gradient passes when neither its largest nor its mean error is over 2 times (that of plain PyTorch in the
same dtype + eps times the largest number). "error/bound" is the worst of a row: up to 1.00 passes. The exit status is 1
if something went wrong. Attach the file of --json to a bug report."""

INTERRUPTED = 130  # the shell's convention
INTERPRET = "TRITON_INTERPRET"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.formatter_class = DESCRIPTION, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", type=_device, help="cpu, cuda or cuda:N; a CUDA device where there is one")
    parser.add_argument("--op", nargs="+", choices=OPERATORS, metavar="NAME", help=", ".join(OPERATORS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="written anew after every row, errors included")
    parser.add_argument("--quick", action="store_true", help="one dtype, and no shapes of real size")
    parser.add_argument("--timeout", type=positive(float), default=60.0, help="seconds for one case, 60 by default")
    parser.add_argument("--jobs", type=positive(int), help="processes at a time; several on a GPU with room for them")


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, got {text}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise argparse.ArgumentTypeError(f"torch {torch.__version__} sees {found} CUDA devices here, got {text}")
    return device


@contextmanager
def compiled_kernels() -> Iterator[None]:
    """Without TRITON_INTERPRET, also in the processes that are started."""
    interpret = os.environ.pop(INTERPRET, None)
    try:
        yield
    finally:
        if interpret is not None:
            os.environ[INTERPRET] = interpret


@compiled_kernels()
def check(arguments: argparse.Namespace) -> int:
    device = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    started = time.perf_counter()
    environment = _environment.describe(device)
    print(report.heading(environment), flush=True)
    operators = [OPERATORS[name] for name in arguments.op or OPERATORS]
    jobs = arguments.jobs or _jobs(device)
    rows = []

    def write(finished: bool) -> None:
        if arguments.json:
            found = {"environment": environment, "quick": arguments.quick, "finished": finished}
            report.write_json(arguments.json, rows, found)

    write(finished=False)  # fails now if the file cannot be written
    found = run(operators, str(device), quick=arguments.quick, timeout=arguments.timeout, jobs=jobs)
    interrupted = False
    try:
        for row in report.shown(found):
            rows.append(row)
            write(finished=False)
        write(finished=True)
    except KeyboardInterrupt:
        interrupted = True
    print(*report.details(rows), report.summary(rows, time.perf_counter() - started), sep="\n")
    return INTERRUPTED if interrupted else int(any(map(report.went_wrong, rows)))


def _jobs(device: torch.device) -> int:
    """Processes at a time on a GPU: each may hold 4 GB, and uses a core to compile."""
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(8, free // 2**32, (os.cpu_count() or 1) // 2))

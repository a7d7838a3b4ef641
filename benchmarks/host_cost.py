"""`python -m benchmarks.host_cost`: what one call of each operator costs the host, in units of SDPA's smallest call.

The GPU path runs dry: Triton's launch path for Hopper, with launches that do nothing. The exit status is 1 if a call
failed.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when a kernel is decorated

import torch
from rich.console import Console

from benchmarks.harness import host_time, records
from benchmarks.report import host


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", nargs="+", choices=host_time.OPERATORS, metavar="OP", default=host_time.OPERATORS)
    parser.add_argument("--repeats", type=int, default=host_time.REPEATS, help="of each figure, %(default)s")
    parser.add_argument("--results", type=Path, help="file to add the rows to, as JSON lines")
    chosen = parser.parse_args(arguments)
    common = records.environment(torch.device("cpu"))
    costs = host_time.measure(chosen.op, chosen.repeats)
    if chosen.results:
        records.append_lines(map(asdict, costs), common | {"threads": 1}, chosen.results)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(f"{common['device']}; torch {common['torch']}, triton {common['triton']}", highlight=False)
    console.print(host.table(costs))
    console.print(host.legend(costs), style="dim", highlight=False)
    return int(any(cost.reason is not None for cost in costs))


if __name__ == "__main__":
    sys.exit(main())

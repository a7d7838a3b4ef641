"""`python -m benchmarks.run`: time recattn and other implementations, print tables, write the rows as JSON lines.

The exit status is 1 if an implementation of recattn was refused as wrong, failed, or is slower than in the baseline
file, and 2 if the request cannot be met.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import ROOT
from benchmarks.data import movielens
from benchmarks.harness import host_time, records
from benchmarks.harness.ceilings import around, measure_ceilings
from benchmarks.harness.contest import Contest, Settings, call_each
from benchmarks.harness.memory import limit_memory
from benchmarks.harness.registry import (
    BACKWARD,
    DIRECTIONS,
    FORWARD,
    TRAINING,
    Implementation,
    Operator,
    load_operators,
)
from benchmarks.harness.registry import DTYPES as DEFAULT_DTYPES
from benchmarks.harness.timing import clock_for
from benchmarks.harness.workloads import TIERS, Draw, Workload
from benchmarks.report import compare, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SECONDS = {"quick": 0.2, "default": 1.0, "full": 10.0}


def parse_arguments(arguments: Sequence[str] | None, operators: dict[str, Operator]) -> argparse.Namespace:
    workloads = sorted({workload.name for operator in operators.values() for workload in operator.workloads})
    implementations = sorted({name for operator in operators.values() for name in operator.implementations})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--op", nargs="+", choices=operators, metavar="OP", help=", ".join(operators))
    parser.add_argument("--workload", nargs="+", choices=workloads, metavar="NAME", help=", ".join(workloads))
    parser.add_argument("--impl", nargs="+", choices=implementations, metavar="IMPL", help="; ".join(implementations))
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a CUDA device if there is one")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="float32 on a CPU, bfloat16 on CUDA by default")
    directions = (FORWARD, BACKWARD, TRAINING)
    parser.add_argument("--direction", nargs="+", choices=directions, help="all by default; on a CPU all but backward")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", dest="tier", action="store_const", const="quick", help="tiny workloads, seconds")
    length.add_argument(
        "--full", dest="tier", action="store_const", const="full", help="every workload and implementation"
    )
    parser.add_argument("--seconds", type=float, help=f"time for each workload and direction, {SECONDS}")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the JSON lines")
    parser.add_argument("--baseline-file", type=Path, help="file or folder of an older run to compare with")
    parser.add_argument(
        "--threshold", type=float, default=compare.THRESHOLD, help="relative slowdown that counts as a regression"
    )
    parser.add_argument(
        "--fill", action="store_true", help="only call compiled implementations once, to fill the compilers' caches"
    )
    parser.add_argument("--offline", action="store_true", help="do not download MovieLens-100k; draw its items")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    try:
        chosen.baseline = records.read([chosen.baseline_file]) if chosen.baseline_file else None
    except ValueError as error:
        parser.error(f"--baseline-file: {error}")
    chosen.tier = chosen.tier or "default"
    chosen.device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    default_dtype = DEFAULT_DTYPES[chosen.device.type]
    chosen.dtype = chosen.dtype or [name for name, dtype in DTYPES.items() if dtype == default_dtype]
    chosen.direction = tuple(chosen.direction or DIRECTIONS[chosen.device.type])
    return chosen


def choose(
    operators: dict[str, Operator], chosen: argparse.Namespace
) -> list[tuple[Operator, Workload, list[Implementation]]]:
    """What to run. A workload or implementation that is named runs whatever its tier and device."""
    tiers = TIERS[: TIERS.index(chosen.tier) + 1]
    device = chosen.device.type
    plan = []
    for operator in operators.values():
        if chosen.op and operator.name not in chosen.op:
            continue
        for workload in operator.workloads:
            # Only --quick runs the tiny workloads.
            fits = workload.tier in (tiers[1:] or tiers) and device in workload.devices
            if not (workload.name in chosen.workload if chosen.workload else fits):
                continue
            implementations = [
                i
                for i in operator.implementations.values()
                if i.applies(workload)
                and (i.name in chosen.impl if chosen.impl else i.tier_on(device) in tiers and device in i.devices)
            ]
            if implementations:
                plan.append((operator, workload, implementations))
    return plan


class Bars:
    """Progress bars of the whole run and of its current part. Drawn only between timed calls, without a thread."""

    def __init__(self, console: Console, total: int) -> None:
        columns = BarColumn(bar_width=30), TimeElapsedColumn(), TextColumn("{task.description}")
        self.progress = Progress(*columns, console=console, transient=True, auto_refresh=False)
        self.whole, self.part = self.progress.add_task("", total=total), self.progress.add_task("", total=1.0)
        self.drawn = 0.0

    def begin(self, description: str) -> None:
        self.progress.update(self.whole, description=description)

    def show(self, doing: str, done: float) -> None:
        self.progress.update(self.part, description=doing, completed=done)
        if time.perf_counter() > self.drawn + 0.2:
            self.progress.refresh()
            self.drawn = time.perf_counter()

    def end(self) -> None:
        self.progress.advance(self.whole)


def fill_caches(console: Console, plan, chosen: argparse.Namespace, histories: movielens.Histories) -> int:
    """Call the compiled implementations once, without gate (it needs memory that others may need) and clocks."""
    ours_broke = False
    for operator, workload, implementations in plan:
        compiled = [i for i in implementations if i.compiled or i.ours]
        for dtype in map(DTYPES.get, chosen.dtype):
            draw = Draw(0, dtype, chosen.device, histories)
            for implementation, reason in call_each(operator, workload, compiled, chosen.direction, draw):
                console.print(f"{operator.name} {workload.name} {implementation.name}: {reason}", highlight=False)
                ours_broke |= implementation.ours
    return int(ours_broke)


def measure_host(chosen: argparse.Namespace, path: Path) -> bool:
    """Measure what calls cost the host, in a process of its own. False if a call failed."""
    ops = [op for op in host_time.OPERATORS if not chosen.op or op.partition(",")[0] in chosen.op]
    if chosen.device.type != "cpu" or chosen.workload or chosen.impl or not ops:  # rows of a GPU have host_ms
        return True
    repeats = ("--repeats", "1") if chosen.tier == "quick" else ()
    command = (sys.executable, "-m", "benchmarks.host_cost", "--results", path.resolve(), *repeats, "--op", *ops)
    return subprocess.run(command, cwd=ROOT).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    operators = load_operators()
    chosen = parse_arguments(arguments, operators)
    plan = choose(operators, chosen)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if not plan:
        console.print("no operator has such a workload and implementation")
        return 2
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    limit_memory(chosen.device)

    histories = movielens.load(chosen.offline)
    if chosen.fill:
        return fill_caches(console, plan, chosen, histories)
    clock = clock_for(chosen.device)
    common = records.environment(chosen.device)
    table.print_heading(console, common)
    rows: list[records.Row] = []
    bars = Bars(console, len(plan) * len(chosen.dtype))
    seconds = SECONDS[chosen.tier] if chosen.seconds is None else chosen.seconds
    settings = [
        Settings(
            chosen.device,
            dtype,
            histories,
            around(partial(measure_ceilings, chosen.device, [dtype], clock, quick=chosen.tier == "quick")),
            clock,
            seconds,
            chosen.direction,
            bars.show,
        )
        for dtype in map(DTYPES.get, chosen.dtype)
    ]
    path = chosen.results / f"{datetime.now():%Y%m%d-%H%M%S}-{chosen.device.type}.jsonl"
    ours_broke = False
    with bars.progress:
        for operator, workload, implementations in plan:
            for each in settings:
                bars.begin(f"{operator.name} · {workload.name}")
                own = Contest(operator, workload, implementations, each).run()
                records.append(own, common, path)
                if own:
                    console.print(table.block(operator, own))
                bars.end()
                rows += own
                ours_broke |= any(
                    operator.implementations[row.impl].ours and row.status in (records.REFUSED, records.FAILED)
                    for row in own
                )
    table.print_summary(console, rows)
    ours_broke |= not measure_host(chosen, path)
    console.print(f"{len(rows)} rows in {path}, {time.perf_counter() - started:.0f} s")
    if chosen.baseline is None:
        return int(ours_broke)
    try:
        measured = [records.Record(row, common) for row in rows]
        changes = compare.compare(chosen.baseline, measured, operators, chosen.threshold)
    except ValueError as error:
        console.print(f"--baseline-file: {error}", highlight=False)
        return 2
    compare.report(console, changes, chosen.threshold)
    return int(ours_broke or bool(compare.regressions(changes)))


if __name__ == "__main__":
    sys.exit(main())

"""Results of the check: a table that grows on the screen, details of what went wrong, and a JSON file."""

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from recattn.checks.worker import CANNOT_RUN, PASSED, Row

COLUMNS = {"operator": 24, "implementation": 24, "dtype": 9, "result": 10, "error/bound": 11, "where, or why": 0}
STYLES = {PASSED: "green", CANNOT_RUN: "dim"}  # everything else is red


def heading(environment: Mapping[str, object]) -> str:
    """The versions and the device, in two lines."""
    known = {name: value for name, value in environment.items() if value is not None}
    packages = ", ".join(f"{name} {known[name]}" for name in ("recattn", "torch", "triton", "python") if name in known)
    drivers = [f"{name} {known[name]}" for name in ("compute_capability", "cuda", "cudnn", "driver") if name in known]
    where = ", ".join([str(known["device"]), *drivers] if "driver" in known else [str(known["device"])])
    return f"{packages}, commit {known.get('commit', 'unknown')}\n{where}"


def cells(row: Row) -> tuple[str, ...]:
    worst = "" if row.worst is None else f"{row.worst:.2f}"
    why = f"{row.where}: {row.reason}" if row.where and row.reason else row.where or row.reason
    served = sum(result.refused is None for result in row.cases)
    if 0 < served < len(row.cases) and row.worst is not None:
        why += f"; serves {served} of {len(row.cases)} cases"
    return row.operator, row.implementation, row.dtype or "any", row.status, worst, why


def line(texts: Sequence[str]) -> str:
    return "  ".join(f"{text:{width}}" for text, width in zip(texts, COLUMNS.values(), strict=True)).rstrip()


def shown(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows, each printed as it passes: with rich on a terminal, if installed, else as plain lines."""
    try:
        from rich.console import Console
    except ImportError:
        return _as_lines(rows)
    console = Console()
    return _as_table(rows, console) if console.is_terminal else _as_lines(rows)


def _as_lines(rows: Iterator[Row]) -> Iterator[Row]:
    print(line(tuple(COLUMNS)), flush=True)
    for row in rows:
        print(line(cells(row)), flush=True)
        yield row


def _as_table(rows: Iterator[Row], console) -> Iterator[Row]:
    from rich.live import Live
    from rich.table import Table

    table = Table(*COLUMNS, box=None, pad_edge=False)
    with Live(table, console=console, vertical_overflow="visible"):
        for row in rows:
            table.add_row(*cells(row), style=STYLES.get(row.status, "bold red"))
            yield row


def went_wrong(row: Row) -> bool:
    return row.status not in (PASSED, CANNOT_RUN)


def details(rows: Sequence[Row]) -> Iterator[str]:
    """For each row that went wrong: every error over its bound, or what its process printed."""
    for row in filter(went_wrong, rows):
        name = f"{row.operator} impl={row.implementation!r} {row.dtype}"
        yield f"\n{name}: {row.status}, {cells(row)[-1]}"
        for result in row.cases:
            yield from (f"  {result.case}: {error}" for error in result.errors if not error.passed)
        if row.output:
            yield row.output


def summary(rows: Sequence[Row], seconds: float) -> str:
    counts = Counter(row.status for row in rows)
    return (", ".join(f"{count} {status}" for status, count in counts.items()) or "no rows") + f"; {seconds:.0f} s"


def write_json(path: Path, rows: Sequence[Row], run: Mapping[str, object]) -> None:
    """Write all rows so far. The file is replaced as a whole, so no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(_finite({**run, "rows": [asdict(row) for row in rows]}), allow_nan=False, indent=1)
    partial.write_text(text + "\n")
    os.replace(partial, path)


def _finite(value: object) -> object:
    """The value with NaN and infinities as strings, because JSON has neither."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""Compares two records of the suite: what has become slower or needs more memory."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.harness.records import TIMED, Record
from benchmarks.harness.registry import Operator
from benchmarks.report import table as tables

THRESHOLD = 0.10
# Growth below this is the rounding of an allocator.
NEGLIGIBLE_BYTES = 2**20
SAME, FASTER, SLOWER, LARGER, LOST = "same", "faster", "slower", "more memory", "lost"
REGRESSIONS = (SLOWER, LARGER, LOST)
STYLE = {SLOWER: "red", LARGER: "red", LOST: "red", FASTER: "green"}

Key = tuple[object, ...]


@dataclass(frozen=True)
class Change:
    """How a row changed. The ratio is None if the row was not timed in one of the two records."""

    old: Record
    new: Record
    ours: bool
    verdict: str
    time_ratio: float | None = None  # new over old
    spread: float | None = None  # of the ratio, from the spreads of both


def key_of(record: Record) -> Key:
    """What two rows must have in common to be compared."""
    row, run = record
    shape = tuple(sorted((name, value) for name, value in row.shape.items() if value not in (None, False)))
    machine = run["device"], run["threads"], run.get("cpu_capability")
    return *machine, row.op, row.workload, shape, row.dtype, row.impl, row.direction


def compare(
    old: Sequence[Record], new: Sequence[Record], operators: dict[str, Operator], threshold: float = THRESHOLD
) -> list[Change]:
    """A change for each row that both records have. If a row was measured more than once, the last counts.

    A row is slower if the time ratio exceeds 1 + threshold even at the favourable end of its spread.

    Raises ValueError if they have no row in common, for example because they come from two machines.
    """
    before, after = ({key_of(record): record for record in records} for records in (old, new))
    common = [key for key in before if key in after]
    if not common:
        machines = [sorted({tables.machine_name(r.run) for r in rows}) for rows in (old, new)]
        raise ValueError(f"no row in common: the old record is of {machines[0]}, the new one of {machines[1]}")
    return [_change(before[key], after[key], operators, threshold) for key in common]


def _change(old: Record, new: Record, operators: dict[str, Operator], threshold: float) -> Change:
    implementation = operators[new.row.op].implementations.get(new.row.impl) if new.row.op in operators else None
    ours = implementation is not None and implementation.ours
    if old.row.status != TIMED or new.row.status != TIMED:
        return Change(old, new, ours, LOST if old.row.status == TIMED else SAME)
    ratio = new.row.p50_ms / old.row.p50_ms
    # Without a spread (too few samples) no change is significant.
    spread = math.hypot(*(math.inf if row.spread is None else row.spread for row in (old.row, new.row)))
    verdict = SAME
    if ratio * (1 - spread) > 1 + threshold:
        verdict = SLOWER
    elif new.row.peak_bytes > (1 + threshold) * old.row.peak_bytes + NEGLIGIBLE_BYTES:
        verdict = LARGER
    elif ratio * (1 + spread) < 1 / (1 + threshold):
        verdict = FASTER
    return Change(old, new, ours, verdict, ratio, spread)


def regressions(changes: Sequence[Change]) -> list[Change]:
    """The regressions of recattn. Other implementations are not our concern."""
    return [change for change in changes if change.ours and change.verdict in REGRESSIONS]


def report(console: Console, changes: Sequence[Change], threshold: float) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="changes", title_justify="left", title_style="bold", pad_edge=False)
    for column in ("operator", "workload", "implementation", "direction"):
        table.add_column(column)
    for column in ("old ms", "new ms", "×", "spread", "verdict"):
        table.add_column(column, justify="right", no_wrap=True)
    for change in changes:
        if change.verdict == SAME:
            continue
        row = change.new.row
        figures = ("–",) * 4
        if change.time_ratio is not None:
            times = (change.old.row.p50_ms, row.p50_ms, change.time_ratio)
            figures = (*(f"{value:.3g}" for value in times), f"{change.spread:.0%}")
        style = STYLE[change.verdict] if change.ours else "dim"
        table.add_row(row.op, row.workload, row.impl, row.direction, *figures, Text(change.verdict, style=style))
    if table.row_count:
        console.print(table)
    lost, peers = regressions(changes), [c.time_ratio for c in changes if not c.ours and c.time_ratio is not None]
    console.print(
        f"{len(changes)} rows in common; {len(lost)} of recattn regressed by over {threshold:.0%} beyond the spread"
        + (f"; its peers take {statistics.median(peers):.2f}× the old time (median)" if peers else ""),
        highlight=False,
    )

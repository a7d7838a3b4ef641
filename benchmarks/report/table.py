"""The printed tables: one for each operator and workload, with a row for each implementation."""

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks.harness.correctness import PEER_ALLOWANCE
from benchmarks.harness.goals import CAPABILITIES, NOT_MEASURED, Outcome
from benchmarks.harness.records import NOT_RUN, TIMED, Row
from benchmarks.harness.registry import BACKWARD, FORWARD, TRAINING, Operator
from benchmarks.harness.timing import MAX_SPREAD, MAX_WAITING

VERDICT_STYLE = {"met": "green", "missed": "red"}
HEADINGS = {FORWARD: "forward ms", BACKWARD: "backward ms", TRAINING: "fwd+bwd ms"}

LEGEND = {
    "ms": "median time of a single call",
    "×": "speedup over the baseline, in each direction",
    "peak": "most memory in use at one time, not counting the inputs",
    "ceiling": "the shortest time that the measured matmul and copy rates allow, divided by the time taken",
    "error": "largest error of the output against float64; in brackets the largest error of output and gradients as "
    f"a share of its bound (the bound of other implementations is {PEER_ALLOWANCE:.0f} times larger)",
    "spread (±)": "half the 95% confidence interval of the median of the time ratios of interleaved rounds, relative "
    "to the median",
    "no verdict": f"the spread is over {MAX_SPREAD:.0%}, or the threads waited for other programs for over "
    f"{MAX_WAITING:.0%} of the time",
}


def block(operator: Operator, rows: Sequence[Row]) -> Group:
    """The printed table of one operator and workload."""
    head = rows[0]
    shape = " ".join(f"{name}={value}" for name, value in head.shape.items() if value not in (None, False))
    title = Text.assemble((f"\n{operator.name} · {head.workload}", "bold"), f"  {head.dtype}  {shape}  ({head.data})")
    directions = [direction for direction in HEADINGS if any(row.direction == direction for row in rows)]
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row.impl, {})[row.direction] = row
    baseline = by_name.get(operator.baseline, {})

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.add_column("implementation", no_wrap=True)
    columns = (*map(HEADINGS.get, directions), f"× {operator.baseline}", "peak MB", "ceiling", "error")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    notes = [_ceilings(row.ceilings) for row in rows if row.ceilings][:1]
    for name, own in by_name.items():
        last = list(own.values())[-1]
        if any(row.status != NOT_RUN for row in own.values()):
            table.add_row(
                escape(name),
                *(_time(own.get(direction)) for direction in directions),
                " / ".join(_speed(own.get(direction), baseline.get(direction)) for direction in directions),
                _number(last.peak_bytes, 1e-6),
                _percent(last.ceiling_fraction),
                _error(last),
            )
        notes += _notes(name, own.values())
    for direction, waiting in {row.direction: row.waiting for row in rows if row.waiting is not None}.items():
        if waiting > MAX_WAITING:
            notes.append(f"{direction}: other programs kept the threads waiting {waiting:.0%} of the time")
    notes += [
        f"{row.impl}, {row.direction}: the host takes {row.host_ms:.2f} ms to launch, longer than the GPU takes to run"
        for row in rows
        if row.host_ms and row.p50_ms and row.host_ms > row.p50_ms
    ]
    checked = next((row for row in rows if row.gate_shape not in (None, row.shape)), None)
    if checked:
        notes.append(f"checked against float64 on a batch of {checked.gate_shape['batch']}")
    return Group(title, table, *(Text(f"  {note}", style="dim") for note in notes))


def goals(rows: Sequence[Row]) -> Table:
    """The goals and their verdicts."""
    table = Table(box=box.SIMPLE_HEAD, title="goals", title_justify="left", title_style="bold", pad_edge=False)
    for column in ("operator", "workload", "goal", "measured", "spread", "verdict"):
        table.add_column(column)
    for row in rows:
        for goal in row.goals:
            table.add_row(
                row.op,
                row.workload,
                with_implementation(goal.goal, row.impl),
                measured(goal, row),
                _percent(goal.spread),
                Text(goal.verdict, style=VERDICT_STYLE.get(goal.verdict, "yellow")),
            )
    return table


def with_implementation(goal: str, implementation: str) -> str:
    """A goal, preceded by its implementation unless that is recattn with its default options."""
    return goal if implementation == "recattn" else f"{implementation}: {goal}"


def machine_name(run: Mapping[str, object]) -> str:
    """A CPU that measured with fewer instructions than it has is another machine. Old records do not say which."""
    used = CAPABILITIES.get(run.get("cpu_capability"))
    return f"{run['device']}{f' ({used})' if used else ''}, {run['threads']} threads"


def print_heading(console: Console, common: Mapping[str, object]) -> None:
    commit = f"{(common['commit'] or 'no commit')[:10]}{' with changes' if common['dirty'] else ''}"
    console.print(
        f"{machine_name(common)}; torch {common['torch']}, triton {common['triton']}, "
        f"Python {common['python']}; {commit}",
        highlight=False,
    )


def print_summary(console: Console, rows: Sequence[Row]) -> None:
    if any(row.goals for row in rows):
        console.print(goals(rows))
    console.print(Text(".  ".join(f"{term}: {meaning}" for term, meaning in LEGEND.items()), style="dim"))


def measured(outcome: Outcome, row: Row) -> str:
    """The measured value in the unit of the goal, or why there is none."""
    if outcome.verdict == NOT_MEASURED:
        return row.status if row.status != TIMED else "nothing to compare with was timed"
    if outcome.undecided:
        return f"{outcome.against}: refused or failed"
    if outcome.extra_bytes is not None:
        value = f"{outcome.extra_bytes / 1e6:.1f} MB"
    elif outcome.milliseconds is not None:
        value = f"{1e3 * outcome.milliseconds:.1f} µs"
    elif outcome.ceiling_fraction is not None:
        value = _percent(outcome.ceiling_fraction)
    elif outcome.memory_ratio is not None:
        value = f"{outcome.memory_ratio:.2g}×"
    else:
        value = f"{outcome.time_ratio:.2f}×" if "≤" in outcome.goal else f"{1 / outcome.time_ratio:.2f}×"
    return f"{value} ({outcome.against})" if "the best " in outcome.goal else value


def _time(row: Row | None) -> Text:
    if row is None:
        return Text("–")
    if row.p50_ms is None:
        return Text(row.status, style="red")
    return Text(significant(row.p50_ms))


def _speed(row: Row | None, baseline: Row | None) -> str:
    if row is None or baseline is None or row.p50_ms is None or baseline.p50_ms is None:
        return "–"
    return significant(baseline.p50_ms / row.p50_ms)


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _number(value: float | None, unit: float) -> str:
    return "–" if value is None else f"{value * unit:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _error(row: Row) -> str:
    return "–" if row.max_error is None else f"{row.max_error:.0e} ({_percent(row.error_share)})"


def _ceilings(measured: Mapping[str, float]) -> str:
    return (
        f"ceilings: matmul {measured['tflops']:.3g} TFLOP/s, copy {measured['gbs']:.3g} GB/s, "
        f"softmax {measured['gsoftmax']:.3g} G elements/s, {measured['launch_us']:.2g} µs per call"
    )


def _notes(name: str, rows: Iterable[Row]) -> list[str]:
    reasons = {row.reason: row for row in rows if row.reason}
    return [f"{name}: {row.status}: {reason}" for reason, row in reasons.items()]

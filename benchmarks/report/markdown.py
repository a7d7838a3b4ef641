"""What the committed records say, as text: RESULTS.md, and the part of README between its marks.

Of what was measured more than once on a machine, the newest run counts, contestant beside contestant.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.goals import NOT_MEASURED, Goal, Outcome
from benchmarks.harness.records import TIMED, Record, Row, dtype_name
from benchmarks.harness.registry import BACKWARD, DTYPES, FORWARD, TRAINING, Operator
from benchmarks.harness.workloads import CUDA, Workload
from benchmarks.report import cost_model, reasons, table

OURS = "recattn"
MARKS = "<!-- python -m benchmarks.plot writes what follows -->", "<!-- until here -->"
OWED = "owed"
SHORT = {FORWARD: "fwd", BACKWARD: "bwd", TRAINING: "fwd + bwd"}

Contest = dict[str, Record]  # by implementation


@dataclass
class Machine:
    """A device and what was last measured on it, in the dtype that its goals are for."""

    name: str
    type: str  # "cpu" or "cuda"
    contests: dict[tuple[str, str, str], Contest] = field(default_factory=dict)  # by operator, workload, direction
    run: dict[str, object] = field(default_factory=dict)  # the newest

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.type]

    def row(self, operator: str, workload: str, direction: str, implementation: str = OURS) -> Row | None:
        """None where it was not timed."""
        record = self.contests.get((operator, workload, direction), {}).get(implementation)
        return record.row if record is not None and record.row.status == TIMED else None

    def rows(self) -> Iterator[Row]:
        return (row for contest in self.contests.values() for row, _ in contest.values())

    def device(self, row: Row) -> cost_model.Device:
        """As a model sees it, by the ceilings of that row."""
        return cost_model.Device(
            self.name, self.type, Ceilings(**{**row.ceilings, "tflops": {self.dtype: row.ceilings["tflops"]}})
        )


def machines(records: Iterable[Record]) -> list[Machine]:
    """The last measured first."""
    found: dict[str, Machine] = {}
    for record in sorted(records, key=lambda record: record.run["started"]):
        row, run = record
        kind = "cuda" if run.get("cuda") else "cpu"
        if row.dtype != dtype_name(DTYPES[kind]):
            continue
        name = run["device"] if kind == "cuda" else f"{run['device']}, {run['threads']} threads"
        machine = found.setdefault(name, Machine(name, kind))
        machine.run = run
        contest = machine.contests.setdefault((row.op, row.workload, row.direction), {})
        if any(other.run["started"] != run["started"] for other in contest.values()):
            contest.clear()
        contest[row.impl] = record
    return sorted(found.values(), key=lambda machine: machine.run["started"], reverse=True)


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)


# --- Goals ---


def goals_table(operators: dict[str, Operator], measured: Sequence[Machine], kind: str) -> str:
    """Every goal for that type of device, with what each machine of the type made of it."""
    own = [machine for machine in measured if machine.type == kind]
    rows = [
        (
            operator.name,
            goal.workload,
            table.stated(str(goal), goal.implementation),
            *(_verdict(operator, goal, machine) for machine in own or [None]),
        )
        for operator in operators.values()
        for goal in operator.goals
        if goal.device == kind
    ]
    return markdown(("operator", "workload", "goal", *([machine.name for machine in own] or ["H200"])), rows)


def _verdict(operator: Operator, goal: Goal, machine: Machine | None) -> str:
    if machine is None:
        return OWED
    record = machine.contests.get((operator.name, goal.workload, goal.direction), {}).get(goal.implementation)
    outcomes = [outcome for outcome in record.row.goals if outcome.goal == str(goal)] if record else []
    return verdict(outcomes[0], record.row) if outcomes else "–"


def verdict(outcome: Outcome, row: Row) -> str:
    """What was measured, and whether that is enough."""
    if outcome.verdict == NOT_MEASURED:
        return f"{NOT_MEASURED}: {table.measured(outcome, row)}"
    spread = "" if outcome.spread is None else f" ± {outcome.spread:.0%}"
    return f"{table.measured(outcome, row)}{spread}: **{outcome.verdict}**"


# --- Times ---


def times_table(operator: Operator, machine: Machine) -> str:
    """A line for each workload and direction: recattn, who computes the same, who computes something else."""
    rows = []
    for workload in operator.workloads:
        heading = _heading(workload)
        for direction in SHORT:
            contest = machine.contests.get((operator.name, workload.name, direction))
            row = contest.get(OURS).row if contest and OURS in contest else None
            if row is not None:
                same, other = _peers(operator, contest)
                rows.append((heading, SHORT[direction], _own(row), same, other, _memory(row), _share(row)))
                heading = ""
    columns = ("workload", "", "recattn", "the same", "less, or something else", "peak MB", "ceiling")
    return markdown(columns, rows) if rows else ""


def _heading(workload: Workload) -> str:
    shape = " ".join(f"{name}={value}" for name, value in workload.shape.items() if value not in (None, False))
    return f"**{workload.name}** {shape}"


def _own(row: Row) -> str:
    return f"**{table.significant(row.p50_ms)}**" if row.status == TIMED else row.status


def _peers(operator: Operator, contest: Contest) -> tuple[str, str]:
    """Times of those with the operator's own reference, and of those with another, fastest first."""
    cells: tuple[list[tuple[float, str]], ...] = ([], [])
    for name, (row, _) in contest.items():
        implementation = operator.implementations.get(name)
        if name != OURS and implementation is not None and row.status == TIMED:
            text = f"{name.removeprefix('recattn, ')} {table.significant(row.p50_ms)}"
            cells[implementation.reference is not None].append((row.p50_ms, text))
    same, other = ("; ".join(text for _, text in sorted(own)) or "–" for own in cells)
    return same, other


def _memory(row: Row) -> str:
    return "–" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.1f}"


def _share(row: Row) -> str:
    return "–" if row.ceiling_fraction is None else f"{row.ceiling_fraction:.0%}"


def not_timed(machine: Machine) -> list[str]:
    """Why contestants have no time, each reason once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (operator, workload, _), contest in machine.contests.items():
        for name, (row, _) in contest.items():
            if row.status != TIMED:
                where = found.setdefault((operator, name, f"{row.status}: {row.reason}"), [])
                if workload not in where:
                    where.append(workload)
    return [f"- {op}, {name} ({', '.join(where)}): {reason}" for (op, name, reason), where in found.items()]


# --- The model ---


@dataclass(frozen=True)
class Prediction:
    row: Row
    milliseconds: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.row.p50_ms / self.milliseconds

    @property
    def parts(self) -> bool:
        return not 1 / (1 + cost_model.TOLERANCE) <= self.ratio <= 1 + cost_model.TOLERANCE


def predictions(operators: dict[str, Operator], machine: Machine) -> Iterator[Prediction]:
    """Of what recattn was timed at."""
    for operator in operators.values():
        for workload in operator.workloads:
            for direction in SHORT:
                row = machine.row(operator.name, workload.name, direction)
                if row is None or not row.ceilings:  # of before ceilings were measured for each
                    continue
                predicted = cost_model.predict(operator, workload, direction, machine.device(row), machine.dtype)
                if predicted is not None:
                    yield Prediction(row, predicted)


def model_table(operators: dict[str, Operator], machine: Machine) -> str:
    rows, given = [], []
    for prediction in predictions(operators, machine):
        row, why = prediction.row, "–"
        if prediction.parts:
            reason = reasons.reason(row.op, row.workload, machine.type)
            if reason not in given:
                given.append(reason)
            why = f"{given.index(reason) + 1}"
        times = (table.significant(value) for value in (row.p50_ms, prediction.milliseconds))
        rows.append((row.op, row.workload, row.direction, *times, f"{prediction.ratio:.2f}", why))
    if not rows:
        return ""
    columns = ("operator", "workload", "direction", "measured ms", "predicted ms", "ratio", "why")
    why = "".join(f"{number}. {reason}\n" for number, reason in enumerate(given, 1))
    return f"{markdown(columns, rows)}\n{why}"


def gpu_predictions_table(operators: dict[str, Operator]) -> str:
    """Of the workloads that are for a GPU, in bfloat16."""
    rows = []
    for operator in operators.values():
        for workload in operator.workloads:
            if workload.devices != CUDA or workload.tier == "full":
                continue
            for direction in operator.directions(operator.implementations[OURS], torch.device("cuda")):
                times = [
                    cost_model.predict(operator, workload, direction, gpu, torch.bfloat16) for gpu in cost_model.GPUS
                ]
                if None not in times:
                    rows.append((operator.name, workload.name, direction, *map(table.significant, times)))
    return markdown(("operator", "workload", "direction", *(f"{gpu.name} ms" for gpu in cost_model.GPUS)), rows)


# --- The pages ---


def about(machine: Machine) -> str:
    run = machine.run
    extra = "".join(f", {name} {run[name]}" for name in ("cuda", "driver") if run.get(name))
    commits = {record.run["commit"][:8] for contest in machine.contests.values() for record in contest.values()}
    return (
        f"torch {run['torch']}, triton {run['triton']}, Python {run['python']}{extra}; commits "
        f"{', '.join(sorted(commits))}. Ceilings, the better of before and after each workload: "
        f"{_range(machine, 'tflops')} TFLOP/s, "
        f"copy {_range(machine, 'gbs')} GB/s, softmax {_range(machine, 'gsoftmax')} G/s, "
        f"{_range(machine, 'launch_us')} µs a call."
    )


def _range(machine: Machine, ceiling: str) -> str:
    found = [row.ceilings[ceiling] for row in machine.rows() if row.ceilings]
    return f"{min(found):.3g}–{max(found):.3g}" if found else "–"


def results_page(
    operators: dict[str, Operator], measured: Sequence[Machine], images: dict[str, list[tuple[str, str]]]
) -> str:
    """RESULTS.md. `images`: of each type of device, the files of its figures and their captions."""
    parts = [
        "# Results\n\nWritten by `python -m benchmarks.plot` from the records in `results/`; edit nothing here.\n\n"
        f"Every time is a median of interleaved calls that passed the float64 gate. {table.LEGEND}\n"
    ]
    for kind, title in {"cpu": "CPU", "cuda": "GPU"}.items():
        own = [machine for machine in measured if machine.type == kind]
        parts.append(f"## Goals on a {title}\n\n{goals_table(operators, measured, kind)}")
        if not own:
            parts.append(f"No {title} has run the suite yet: every figure for one is {OWED}.\n")
        # Figures and times of the last machine of a type; older ones stand among the goals.
        for machine in own[:1]:
            parts.append(f"## {machine.name}\n\n{about(machine)}\n")
            parts += [f"![]({file})\n\n{caption}\n" for file, caption in images.get(kind, [])]
            for operator in operators.values():
                times = times_table(operator, machine)
                parts += (
                    [f"### {operator.name}\n\nMilliseconds, {dtype_name(machine.dtype)}.\n\n{times}"] if times else []
                )
            missing = not_timed(machine)
            parts += ["### Not timed\n\n" + "\n".join(missing) + "\n"] if missing else []
            predicted = model_table(operators, machine)
            parts += [f"### Measured against the model\n\n{cost_model.__doc__}\n{predicted}"] if predicted else []
    parts.append(f"## What the model expects of GPUs\n\nbfloat16.\n\n{gpu_predictions_table(operators)}")
    return "\n".join(parts)


def readme_block(operators: dict[str, Operator], measured: Sequence[Machine], images: Iterable[tuple[str, str]]) -> str:
    """What stands between the marks of README.md: its one figure, and the goals."""
    figures = "".join(f"![](benchmarks/{file})\n\n{caption}\n" for file, caption in images)
    goals = sum(goal.device == "cuda" for operator in operators.values() for goal in operator.goals)
    owed = "" if any(machine.type == "cuda" for machine in measured) else f"\nAll {goals} goals for a GPU are {OWED}.\n"
    return f"\n{figures}\n{goals_table(operators, measured, 'cpu')}{owed}\n"


def with_block(readme: str, block: str) -> str:
    """README.md with what stands between its marks replaced."""
    begin, end = MARKS
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md must hold each of {begin!r} and {end!r} once")
    before, rest = readme.split(begin)
    return f"{before}{begin}\n{block}{end}{rest.split(end)[1]}"

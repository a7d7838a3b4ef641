"""The committed records as text: RESULTS.md, and the part of README.md between its two marks.

If a machine measured a workload more than once, the newest run counts, with all its contestants.
"""

import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.goals import NOT_MEASURED, Goal, NeverSlowerGoal, Outcome
from benchmarks.harness.host_time import HostCost
from benchmarks.harness.records import TIMED, Record, Row, dtype_name
from benchmarks.harness.registry import BACKWARD, DTYPES, FORWARD, TRAINING, Operator
from benchmarks.harness.workloads import Workload
from benchmarks.report import cost_model, devices, host, predicted, reasons, table

OURS = "recattn"
BLOCK = re.compile(r"(<!-- plot: (?P<name>[\w ]+) -->\n).*?(<!-- plot: end -->)", flags=re.DOTALL)
SHORT = {FORWARD: "fwd", BACKWARD: "bwd", TRAINING: "fwd + bwd"}
MOST_NAMED = 5  # workloads in a line of the list of what was not timed

Contest = dict[str, Record]  # by implementation


HostCosts = tuple[list[HostCost], dict[str, object]]  # rows, and what they share
NO_HOST_COSTS: HostCosts = ([], {})


def short_name(device: str) -> str:
    return device.replace("(R)", "").replace(" Processor", "")


@dataclass
class Machine:
    """A device and the newest measurements on it, in the dtype of its goals."""

    name: str
    type: str  # "cpu" or "cuda"
    contests: dict[tuple[str, str, str], Contest] = field(default_factory=dict)  # by operator, workload, direction
    run: dict[str, object] = field(default_factory=dict)  # of the newest row: versions, commit, time

    @property
    def title(self) -> str:
        """The name without the vendor's decoration."""
        return short_name(self.name)

    @property
    def capability(self) -> str | None:
        """The instruction set of a CPU; None where the record is older than that field."""
        return self.run.get("cpu_capability")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.type]

    def row(self, operator: str, workload: str, direction: str, implementation: str = OURS) -> Row | None:
        """None if it was not timed."""
        record = self.contests.get((operator, workload, direction), {}).get(implementation)
        return record.row if record is not None and record.row.status == TIMED else None

    def rows(self) -> Iterator[Row]:
        return (row for contest in self.contests.values() for row, _ in contest.values())

    def device(self, row: Row) -> devices.Device:
        """The device for the cost model, with the ceilings measured for that row."""
        return devices.measured(
            self.name, self.type, Ceilings(**{**row.ceilings, "tflops": {self.dtype: row.ceilings["tflops"]}})
        )


def machines(records: Iterable[Record]) -> list[Machine]:
    """The machines in the records, the last measured first."""
    found: dict[str, Machine] = {}
    for record in sorted(records, key=lambda record: record.run["started"]):
        row, run = record
        kind = "cuda" if run.get("cuda") else "cpu"
        if row.dtype != dtype_name(DTYPES[kind]):
            continue
        name = run["device"] if kind == "cuda" else table.machine_name(run)
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


# --- Summary ---


def summary_table(operators: dict[str, Operator], measured: Sequence[Machine]) -> str:
    """A row for each operator and device: speedups over baselines, as the median and range over the workloads."""
    rows = [row for operator in operators.values() for machine in measured if (row := _summary(operator, machine))]
    columns = (
        "operator",
        "device",
        "workloads",
        "speedup over eager PyTorch",
        "speedup over the fastest equivalent baseline",
        "time vs attention that computes less",
    )
    return markdown(columns, rows)


def _summary(operator: Operator, machine: Machine) -> tuple[str, ...] | None:
    direction = TRAINING if operator.grads else FORWARD
    over_eager, over_fastest, versus_less = [], [], []
    for workload in operator.workloads:
        contest = machine.contests.get((operator.name, workload.name, direction), {})
        times = {name: row.p50_ms for name, (row, _) in contest.items() if row.status == TIMED}
        if OURS not in times:
            continue
        peers = {name: i for name, i in operator.implementations.items() if name in times and not i.ours}
        equivalent = [times[name] for name, i in peers.items() if i.reference is None]
        less = [times[name] for name, i in peers.items() if i.reference is not None]
        if operator.baseline in times:
            over_eager.append(times[operator.baseline] / times[OURS])
        over_fastest += [min(equivalent) / times[OURS]] if equivalent else []
        versus_less += [times[OURS] / min(less)] if less else []
    if not over_fastest:
        return None
    figures = (_median_and_range(ratios) for ratios in (over_eager, over_fastest, versus_less))
    return operator.name, machine.title, f"{len(over_fastest)}", *figures


def _median_and_range(ratios: Sequence[float]) -> str:
    if not ratios:
        return "–"
    median, least, most = (
        f"{value:.2f}" if value < 10 else f"{value:.0f}"
        for value in (statistics.median(ratios), min(ratios), max(ratios))
    )
    return f"**{median}×**" if len(ratios) == 1 else f"**{median}×** ({least}–{most})"


# --- Goals ---


def goals_tables(operators: dict[str, Operator], measured: Sequence[Machine], kind: str) -> str:
    """Every goal for that type of device but `NeverSlowerGoal`, which `slower_section` is about.

    Workloads with the same goals share a table; a column is a goal.
    """
    own = [machine for machine in measured if machine.type == kind] or [None]
    capabilities = {machine.capability if machine else None for machine in own}
    newest, tables = own[0], []
    for operator in operators.values():
        by_goals: dict[tuple[str, ...], dict[str, list[Goal]]] = {}
        for workload in operator.workloads:
            goals = [
                goal
                for goal in operator.goals
                if (goal.workload, goal.device) == (workload.name, kind)
                and not isinstance(goal, NeverSlowerGoal)
                and any(map(goal.holds_at, capabilities))
            ]
            if goals:
                by_goals.setdefault(tuple(map(_heading_of_goal, goals)), {})[workload.name] = goals
        for columns, workloads in by_goals.items():
            rows = [
                (name, machine.title if machine else "not measured", *cells)
                for name, goals in workloads.items()
                for machine in own
                if (cells := [_result(operator, goal, machine) for goal in goals])
                and (machine is newest or any(cell != "–" for cell in cells))
            ]
            tables.append(markdown((operator.name, "device", *columns), rows))
    return "\n".join(tables)


def _heading_of_goal(goal: Goal) -> str:
    """A goal as the heading of a column."""
    _, quantity, target = goal.wording
    return table.with_implementation(f"{goal.direction}, {quantity} (goal: {target})", goal.implementation)


def _result(operator: Operator, goal: Goal, machine: Machine | None) -> str:
    contests = machine.contests if machine else {}
    record = contests.get((operator.name, goal.workload, goal.direction), {}).get(goal.implementation)
    outcomes = [outcome for outcome in record.row.goals if outcome.goal == str(goal)] if record else []
    return result(outcomes[0], record.row) if outcomes else "–"


def result(outcome: Outcome, row: Row) -> str:
    """What was measured. A verdict is added unless the goal is met."""
    if outcome.verdict == NOT_MEASURED:
        return f"{NOT_MEASURED}: {table.measured(outcome, row)}"
    spread = "" if outcome.spread is None else f" ± {outcome.spread:.0%}"
    verdict = "" if outcome.verdict == "met" else f" ({outcome.verdict})"
    return f"{table.measured(outcome, row)}{spread}{verdict}"


# --- Slower than PyTorch ---


def never_slower(operators: dict[str, Operator], machine: Machine) -> Iterator[tuple[Row, Outcome]]:
    """The rows that were held against the best PyTorch formulation, with what came out."""
    for operator in operators.values():
        for goal in operator.goals:
            row = machine.row(operator.name, goal.workload, goal.direction)
            if row is not None and isinstance(goal, NeverSlowerGoal):
                outcomes = (outcome for outcome in row.goals if outcome.goal == str(goal))
                yield from ((row, outcome) for outcome in outcomes if outcome.verdict != NOT_MEASURED)


def slower(operators: dict[str, Operator], machine: Machine) -> list[tuple[Row, Outcome]]:
    """Those that were slower, even if not measured well enough to be sure; the slowest first."""
    found = [(row, outcome) for row, outcome in never_slower(operators, machine) if (outcome.time_ratio or 0) > 1]
    return sorted(found, key=lambda each: -each[1].time_ratio)


def slower_section(operators: dict[str, Operator], measured: Sequence[Machine]) -> str:
    """Every workload on which recattn is slower than the best PyTorch formulation."""
    parts = [
        "## Slower than PyTorch\n\nOn each CPU, workload and direction recattn is compared with the fastest PyTorch "
        "formulation of the same result: eager, torch.compile, SDPA with a dense mask.\n"
    ]
    for machine in measured:
        held = list(never_slower(operators, machine))
        if not held:
            continue
        rows = [
            (row.op, row.workload, SHORT[row.direction], result(outcome, row))
            for row, outcome in slower(operators, machine)
        ]
        undecided = [f"{row.op} {row.workload} {SHORT[row.direction]}" for row, outcome in held if outcome.undecided]
        total = f"{machine.title}: slower on {len(rows) or 'none'} of {len(held)}."
        if undecided:
            total += f" Undecided, because a PyTorch formulation was refused or failed: {', '.join(undecided)}."
        total += "\n"
        columns = ("operator", "workload", "pass", "time vs the best PyTorch formulation")
        parts += [total, markdown(columns, rows)] if rows else [total]
    return "\n".join(parts if len(parts) > 1 else [*parts, "No record holds that comparison yet.\n"])


def slower_sentence(operators: dict[str, Operator], measured: Sequence[Machine]) -> str:
    """Where recattn is slower than PyTorch on the last CPUs measured, in a line each; nothing where nowhere."""
    lines = []
    for machine in measured:
        found = [
            f"{row.op} {row.workload} {SHORT[row.direction]}"
            + (f" {outcome.time_ratio:.2f}×" if outcome.time_ratio else "")
            for row, outcome in slower(operators, machine)
        ]
        if found:
            more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
            lines.append(
                f"\nSlower than the best PyTorch formulation on {machine.title}: {', '.join(found[:MOST_NAMED])}{more} "
                "([all](benchmarks/RESULTS.md#slower-than-pytorch)).\n"
            )
    return "".join(lines)


# --- Times ---


def times_table(operator: Operator, machine: Machine) -> str:
    """A line for each workload and direction: the times of recattn and of its baselines."""
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
    columns = (
        "workload",
        "pass",
        "recattn",
        "equivalent baselines",
        "baselines that compute less or something else",
        "peak MB",
        "ceiling",
    )
    return markdown(columns, rows) if rows else ""


def _heading(workload: Workload) -> str:
    shape = " ".join(f"{name}={value}" for name, value in workload.shape.items() if value not in (None, False))
    return f"**{workload.name}** {shape}"


def _own(row: Row) -> str:
    return f"**{table.significant(row.p50_ms)}**" if row.status == TIMED else row.status


def _peers(operator: Operator, contest: Contest) -> tuple[str, str]:
    """Times of the equivalent baselines, and of those held against another reference; the fastest first."""
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
    """Why implementations have no time: each reason once, with its workloads."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for (operator, workload, _), contest in machine.contests.items():
        for name, (row, _) in contest.items():
            if row.status != TIMED:
                where = found.setdefault((operator, name, f"{row.status}: {row.reason}"), [])
                if workload not in where:
                    where.append(workload)
    return [f"- {op}, {name} ({_named(where)}): {reason}" for (op, name, reason), where in found.items()]


def _named(workloads: Sequence[str]) -> str:
    return ", ".join(workloads) if len(workloads) <= MOST_NAMED else f"{len(workloads)} workloads"


# --- The cost model ---


@dataclass(frozen=True)
class Prediction:
    row: Row
    milliseconds: float

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.row.p50_ms / self.milliseconds

    @property
    def is_off(self) -> bool:
        """Whether the measured time differs from the predicted one by more than the tolerance."""
        return not 1 / (1 + cost_model.TOLERANCE) <= self.ratio <= 1 + cost_model.TOLERANCE


def predictions(operators: dict[str, Operator], machine: Machine) -> Iterator[Prediction]:
    """Predictions of the times of recattn."""
    for operator in operators.values():
        for workload in operator.workloads:
            for direction in SHORT:
                row = machine.row(operator.name, workload.name, direction)
                if row is None or not row.ceilings:  # records from before every row had its ceilings
                    continue
                time = cost_model.predict(operator, workload, direction, machine.device(row), machine.dtype)
                if time is not None:
                    yield Prediction(row, time)


def model_table(operators: dict[str, Operator], machine: Machine) -> str:
    rows, given = [], []
    for prediction in predictions(operators, machine):
        row, why = prediction.row, "–"
        if prediction.is_off:
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


# --- The pages ---


def describe(machine: Machine) -> str:
    run = machine.run
    extra = "".join(f", {name} {run[name]}" for name in ("cuda", "driver") if run.get(name))
    commits = {record.run["commit"][:8] for contest in machine.contests.values() for record in contest.values()}
    return (
        f"torch {run['torch']}, triton {run['triton']}, Python {run['python']}{extra}; commits "
        f"{', '.join(sorted(commits))}. Ceilings (the better of the measurements before and after each workload): "
        f"matmul {_range(machine, 'tflops')} TFLOP/s, copy {_range(machine, 'gbs')} GB/s, "
        f"softmax {_range(machine, 'gsoftmax')} G elements/s, {_range(machine, 'launch_us')} µs per call."
    )


def _range(machine: Machine, ceiling: str) -> str:
    found = [row.ceilings[ceiling] for row in machine.rows() if row.ceilings]
    return f"{min(found):.3g}–{max(found):.3g}" if found else "–"


def results_page(
    operators: dict[str, Operator],
    measured: Sequence[Machine],
    images: dict[str, list[tuple[str, str]]],
    host_costs: HostCosts = NO_HOST_COSTS,
    serving: str = "",
) -> str:
    """RESULTS.md. `images`: the figures of each type of device, as files and captions; `serving`: a section."""
    parts = [
        "# Results\n\nWritten by `python -m benchmarks.plot` from the records in `results/`. Do not edit.\n",
        _summary_section(operators, measured),
    ]
    for kind, title in {"cpu": "CPU", "cuda": "GPU"}.items():
        own = [machine for machine in measured if machine.type == kind]
        parts.append(_goals_section(operators, measured, kind, title))
        parts += [slower_section(operators, own)] if kind == "cpu" else []
        # Figures and times of the last machine of a type. Older machines appear in the summary and the goals.
        parts += [_machine_section(operators, machine, images.get(kind, [])) for machine in own[:1]]
    parts += [_host_section(*host_costs)] if host_costs[0] else []
    parts += [serving] if serving else []
    parts.append(_predicted_section(operators, next((machine for machine in measured if machine.type == "cuda"), None)))
    return "\n".join(parts)


def _summary_section(operators: dict[str, Operator], measured: Sequence[Machine]) -> str:
    terms = "".join(f"- **{term}**: {meaning}.\n" for term, meaning in table.LEGEND.items())
    no_gpu = "" if _has_gpu(measured) else "No GPU has run the suite yet.\n\n"
    return (
        f"## Summary\n\n{_conditions(measured)} A speedup above 1× means that recattn is faster; in the last column, "
        "less is better. Every time is the median of interleaved calls of an implementation that passed the float64 "
        f"correctness check.\n\n{summary_table(operators, measured)}\n{no_gpu}"
        "A baseline is *equivalent* if it computes the same result. Attention without the operator's bias or "
        f"refinement computes less; its time is the limit to compare with.\n\nTerms in the tables:\n\n{terms}"
    )


def _conditions(measured: Sequence[Machine]) -> str:
    dtypes = {machine.type: dtype_name(machine.dtype) for machine in measured}
    names = {"cpu": "CPUs", "cuda": "GPUs"}
    used = ", ".join(f"{dtype} on {names[kind]}" for kind, dtype in sorted(dtypes.items()))
    return (
        "Median over the workloads of an operator (smallest–largest in brackets), forward+backward where there is a "
        f"backward, {used}."
    )


def _goals_section(operators: dict[str, Operator], measured: Sequence[Machine], kind: str, title: str) -> str:
    no_device = "" if any(machine.type == kind for machine in measured) else f"No {title} has run the suite yet.\n\n"
    return (
        f"## Goals on a {title}\n\nEach column is a goal; ± is the spread of the ratio. A value without a remark meets "
        f"its goal.\n\n{no_device}{goals_tables(operators, measured, kind)}"
    )


def _machine_section(operators: dict[str, Operator], machine: Machine, images: Iterable[tuple[str, str]]) -> str:
    parts = [f"## {machine.title}\n\n{describe(machine)}\n", *(f"![]({file})\n\n{text}\n" for file, text in images)]
    for operator in operators.values():
        times = times_table(operator, machine)
        parts += [f"### {operator.name}\n\nMilliseconds, {dtype_name(machine.dtype)}.\n\n{times}"] if times else []
    missing = not_timed(machine)
    parts += ["### Not timed\n\n" + "\n".join(missing) + "\n"] if missing else []
    model = model_table(operators, machine)
    parts += [f"### Measured against the cost model\n\n{cost_model.__doc__}\n{model}"] if model else []
    return "\n".join(parts)


def _host_section(costs: Sequence[HostCost], run: dict[str, object]) -> str:
    return (
        f"## Host time of a call\n\n{short_name(run['device'])}, one thread; torch {run['torch']}, triton "
        f"{run['triton']}, Python {run['python']}; commit {run['commit'][:8]}. The path of a GPU runs without one: "
        f"Triton's launch path for Hopper, with launches that do nothing (B = 2, H = 4, N = 16, D = 64, bfloat16; on "
        f"the CPU B = H = 1, N = 2, float32).\n\n{host.legend(costs)}\n\n"
        f"{markdown(host.COLUMNS, map(host.cells, costs))}"
    )


def _predicted_section(operators: dict[str, Operator], gpu: Machine | None) -> str:
    rows = markdown(*predicted.lines(operators, gpu))
    return f"## Predicted times on GPUs\n\n{predicted.introduction(gpu)}\n{rows}"


def _has_gpu(measured: Sequence[Machine]) -> bool:
    return any(machine.type == "cuda" for machine in measured)


def readme_block(
    operators: dict[str, Operator],
    measured: Sequence[Machine],
    images: Iterable[tuple[str, str]],
    host_costs: HostCosts = NO_HOST_COSTS,
) -> str:
    """README.md's speed: its one figure, the summary, and what a call costs the host."""
    figures = "".join(f"![](benchmarks/{file})\n\n{caption}\n" for file, caption in images)
    no_gpu = "" if _has_gpu(measured) else "\nNo GPU has run the suite yet.\n"
    costs, run = host_costs
    cost = f"\n{host.sentence(costs, short_name(run['device']))}\n" if costs else ""
    slow = slower_sentence(operators, measured)
    return f"{figures}\n{_conditions(measured)}\n\n{summary_table(operators, measured)}{slow}{no_gpu}{cost}"


def with_blocks(page: str, texts: Mapping[str, str]) -> str:
    """A page with the text between its marks replaced. Raises ValueError unless it holds each block once."""
    names = [found["name"] for found in BLOCK.finditer(page)]
    if sorted(names) != sorted(texts):
        raise ValueError(f"a page must hold each of the blocks {sorted(texts)} once, got {names}")
    return BLOCK.sub(lambda found: f"{found[1]}\n{texts[found['name']]}\n{found[3]}", page)

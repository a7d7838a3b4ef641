"""RESULTS.md, its figures and the README's are drawn from the committed records, and are up to date."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks import plot
from benchmarks.harness import records
from benchmarks.harness.goals import NeverSlowerGoal, Outcome
from benchmarks.harness.host_time import HostCost
from benchmarks.harness.records import Record, Row
from benchmarks.harness.registry import FORWARD, TRAINING, load_operators
from benchmarks.report import cost_model, devices, markdown, predicted, quality, reasons
from benchmarks.serving.outcomes import Fault, StoreLoad

OPERATORS = load_operators()
RECORDS = records.read([plot.RECORDS])
CPU_RECORDS = [record for record in RECORDS if not record.run.get("cuda")]


def test_nothing_is_stale():
    stale = [str(path.relative_to(plot.ROOT)) for path in plot.pages().stale()]
    assert not stale, f"{stale} are not of the committed records: run python -m benchmarks.plot"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Redirect all output to a temporary folder."""
    names = {"FIGURES": "figures", "RESULTS": "RESULTS.md", "README": "README.md", "QUALITY": "QUALITY.md"}
    for name, path in names.items():
        monkeypatch.setattr(plot, name, tmp_path / path)
    monkeypatch.setattr(plot, "ROOT", tmp_path)
    for page, blocks in (("README.md", ("speed", "summary")), ("QUALITY.md", quality.blocks({}, tmp_path, {}))):
        marked = "".join(f"<!-- plot: {name} -->\nold\n<!-- plot: end -->\n" for name in blocks)
        (tmp_path / page).write_text(f"before\n{marked}after\n")
    return tmp_path


def faster(record: Record) -> Record:
    """The same record with half the time."""
    row = record.row
    if row.impl != "recattn" or row.p50_ms is None:
        return record
    goals = [goal if goal.undecided else replace(goal, verdict="met") for goal in row.goals]
    return Record(replace(row, p50_ms=row.p50_ms / 2, tflops=2 * row.tflops, gbs=2 * row.gbs, goals=goals), record.run)


@pytest.fixture
def undrawn(monkeypatch):
    """Write only what a figure's file is recognised by."""
    monkeypatch.setattr(plot, "draw", write_digest)


def write_digest(figure: plot.Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(figure.digest)


def test_a_changed_record_makes_everything_stale_until_it_is_written(elsewhere, monkeypatch, capsys):
    assert plot.main(["--check"]) == 1
    assert plot.main([]) == 0
    assert plot.main(["--check"]) == 0
    before = {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    assert plot.main([]) == 0
    assert before == {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}

    monkeypatch.setattr(cost_model, "TOLERANCE", 1e9)  # nobody explains what is made up here
    monkeypatch.setattr(records, "read", lambda paths: [faster(record) for record in RECORDS])
    monkeypatch.setattr(plot, "draw", write_digest)
    capsys.readouterr()
    assert plot.main(["--check"]) == 1
    printed = capsys.readouterr().out
    for name in ("RESULTS.md", "README.md", "cpu-speed-ups.svg"):
        assert name in printed
    assert before == {path: path.read_bytes() for path in elsewhere.rglob("*") if path.is_file()}
    assert plot.main([]) == 0 and plot.main(["--check"]) == 0


def test_a_figure_that_nothing_draws_any_more_is_stale(elsewhere, undrawn):
    assert plot.main([]) == 0
    left = plot.FIGURES / "old.svg"
    left.write_text("<svg/>")
    assert plot.main(["--check"]) == 1
    assert plot.main([]) == 0 and not left.exists()


def test_the_readme_is_left_as_it_is_around_the_marks(elsewhere, undrawn):
    assert plot.main([]) == 0
    text = (elsewhere / "README.md").read_text()
    assert text.startswith("before\n<!-- plot: speed -->\n") and text.endswith("<!-- plot: end -->\nafter\n")
    assert "old" not in text.split() and text.count("![](") == 1
    for page in ("no marks", text.replace("plot: speed", "plot: sped"), text + text):
        (elsewhere / "README.md").write_text(page)
        with pytest.raises(ValueError, match=r"must hold each of the blocks \['speed', 'summary'\] once"):
            plot.pages()


def goals_of(kind: str):
    capabilities = {machine.capability for machine in markdown.machines(RECORDS) if machine.type == kind} or {None}
    return [
        (operator, goal)
        for operator in OPERATORS.values()
        for goal in operator.goals
        if goal.device == kind and not isinstance(goal, NeverSlowerGoal) and any(map(goal.holds_at, capabilities))
    ]


def goal_cells(text: str) -> dict[tuple[str, str, str], list[str]]:
    """By operator, workload and heading of the column: what each device made of the goal."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for block in text.split("\n\n"):
        (operator, _, *headings), _, *rows = (
            [cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()
        )
        for workload, _, *cells in rows:
            for heading, cell in zip(headings, cells, strict=True):
                found.setdefault((operator, workload, heading), []).append(cell)
    return found


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_every_goal_is_a_column_with_its_verdict(kind):
    measured = markdown.machines(RECORDS)
    cells = goal_cells(markdown.goals_tables(OPERATORS, measured, kind))
    assert len(cells) == len(goals_of(kind)) > 5
    for operator, goal in goals_of(kind):
        (own,) = (
            own
            for (name, workload, heading), own in cells.items()
            if (name, workload) == (operator.name, goal.workload)
            and f"{goal.direction}, {goal.wording.quantity} (goal: {goal.wording.target})" in heading
            and heading.startswith(goal.direction if goal.implementation == "recattn" else goal.implementation)
        )
        contests = [m.contests.get((operator.name, goal.workload, goal.direction)) for m in measured if m.type == kind]
        contests = [contest for contest in contests if contest]
        outcomes = [o for c in contests for o in c[goal.implementation].row.goals if o.goal == str(goal)]
        for cell, outcome in zip(own, outcomes, strict=False):
            assert cell[0].isdigit() or outcome.undecided
            assert cell.endswith(f" ({outcome.verdict})") == (outcome.verdict != "met")
        assert own[len(outcomes) :] == ["–"] * (len(own) - len(outcomes))


def test_every_goal_for_a_cpu_was_measured_on_the_last_machine():
    table = markdown.goals_tables(OPERATORS, markdown.machines(CPU_RECORDS)[:1], "cpu")
    assert "–" not in table and "not measured" not in table


def test_the_summary_has_every_operator_and_device_that_was_measured():
    measured = markdown.machines(RECORDS)
    lines = markdown.summary_table(OPERATORS, measured).splitlines()[2:]
    rows = {tuple(cell.strip() for cell in line.strip("|").split(" | "))[:2]: line for line in lines}
    whole = {op: TRAINING if operator.grads else FORWARD for op, operator in OPERATORS.items()}
    assert rows.keys() == {
        (op, machine.title) for machine in measured for op, _, step in machine.contests if step == whole[op]
    }
    (layer,) = (line for (name, _), line in rows.items() if name == "bert_layer")
    contest = markdown.machines(CPU_RECORDS)[0].contests["bert_layer", "bert_base", TRAINING]
    times = {name: row.p50_ms for name, (row, _) in contest.items()}
    assert f"| 1 | **{times['official, eager'] / times['recattn']:.2f}×** |" in layer
    assert f"**{times['recattn'] / times['transformers, SDPA, no bias']:.2f}×** |" in layer


def cuda_record(**options) -> Record:
    operator, goal = next((operator, goal) for operator, goal in goals_of("cuda") if operator.name == "sink_attention")
    outcome = Outcome(str(goal), "met", goal.against[0], time_ratio=0.97, spread=0.01)
    run = dict(RECORDS[-1].run) | {"device": "NVIDIA H200", "cuda": "13.0", "driver": "580.1"}
    workload = next(w for w in operator.workloads if w.name == goal.workload)
    row = Row(
        op=operator.name,
        workload=goal.workload,
        shape=workload.shape,
        dtype="bfloat16",
        impl="recattn",
        direction=goal.direction,
        data="drawn",
        p50_ms=0.3,
        spread=0.01,
        tflops=100.0,
        gbs=100.0,
        peak_bytes=10**6,
        ceilings={"tflops": 788.0, "gbs": 4300.0, "gsoftmax": 4000.0, "launch_us": 2.0},
        goals=[outcome],
    )
    return Record(replace(row, **options), run)


def test_a_gpu_gets_a_column_once_it_was_measured(monkeypatch):
    monkeypatch.setattr(cost_model, "TOLERANCE", 1e9)
    assert "No GPU has run the suite yet" in markdown.results_page(OPERATORS, markdown.machines(CPU_RECORDS), {})
    assert "No GPU has run the suite yet" in markdown.readme_block(OPERATORS, markdown.machines(CPU_RECORDS), [])
    measured = markdown.machines([*CPU_RECORDS, cuda_record()])
    page = markdown.results_page(OPERATORS, measured, {})
    assert "| NVIDIA H200 |" in page and "| 0.97× (unbiased flash) ± 1% |" in page and "driver 580.1" in page
    assert "No GPU has run" not in page
    assert "No GPU" not in markdown.readme_block(OPERATORS, measured, [])


def test_what_a_call_costs_the_host_is_in_both_pages():
    costs, run = records.read_newest(HostCost, [plot.RECORDS])
    page = markdown.results_page(OPERATORS, markdown.machines(RECORDS), {}, (costs, run))
    lines = page.split("## Host time of a call")[1].split("\n## ")[0].splitlines()
    assert run["commit"][:8] in "".join(lines)
    rows = [tuple(line.strip("|").split(" | ")) for line in lines if line.startswith("| ")][2:]
    assert [(op.strip(), path, step) for op, path, step, *_ in rows] == [(c.host_of, c.path, c.step) for c in costs]
    for cost, row in zip(costs, rows, strict=True):
        assert f"{cost.units:.1f}" in row and cost.reason is None
    readme = markdown.readme_block(OPERATORS, markdown.machines(RECORDS), [], (costs, run))
    assert "What a call costs the host" in readme and "`sink_attention`" in readme


def test_every_store_and_fault_that_was_recorded_is_in_results():
    (loads, _), (faults, _) = (records.read_newest(kind, [plot.RECORDS]) for kind in (StoreLoad, Fault))
    section = plot.RESULTS.read_text().split("## Serving from a store")[1].split("\n## ")[0]
    assert all(section.count(f"\n| {load.load_of} | {load.users:,} |") == 1 for load in loads)
    assert all(f"\n| {fault.fault_of} | {fault.fault} | {fault.setting} |" in section for fault in faults)
    assert {load.load_of for load in loads} == {fault.fault_of for fault in faults} == {"lmdb", "redis", "cluster"}


def test_of_a_contest_the_newest_run_counts_as_a_whole():
    def at(hour: int, impl: str, direction: str, milliseconds: float) -> Record:
        record = cuda_record(impl=impl, direction=direction, p50_ms=milliseconds)
        return Record(record.row, record.run | {"started": f"2026-01-01T{hour:02}:00:00+00:00"})

    records = [
        at(3, "recattn", FORWARD, 3.0),
        at(1, "recattn", FORWARD, 1.0),
        at(1, "eager", FORWARD, 1.0),
        at(1, "recattn", TRAINING, 1.5),
        at(2, "recattn", FORWARD, 2.0),
    ]
    (machine,) = markdown.machines(records)
    row = records[0].row
    assert machine.row(row.op, row.workload, FORWARD).p50_ms == 3.0
    assert machine.row(row.op, row.workload, FORWARD, "eager") is None  # of an older run
    assert machine.row(row.op, row.workload, TRAINING).p50_ms == 1.5


def test_what_was_not_run_is_told_once():
    missing = cuda_record(
        impl="unbiased FlashAttention 2", status=records.NOT_RUN, reason="flash_attn is not installed"
    )
    again = Record(replace(missing.row, direction=TRAINING), missing.run)
    (machine,) = markdown.machines([missing, again])
    assert markdown.not_timed(machine) == [
        f"- sink_attention, unbiased FlashAttention 2 ({missing.row.workload}): not run: flash_attn is not installed"
    ]


def test_the_page_has_every_time_that_counts():
    machine = markdown.machines(RECORDS)[0]
    for operator in OPERATORS.values():
        text = markdown.times_table(operator, machine)
        timed = [
            (workload, row)
            for (op, workload, _), contest in machine.contests.items()
            for row, _ in contest.values()
            if op == operator.name and row.status == records.TIMED and row.impl in operator.implementations
        ]
        assert bool(text) == bool(timed)
        for workload, row in timed:
            assert f"**{workload}**" in text
            assert markdown.table.significant(row.p50_ms) in text


def test_a_prediction_that_parts_has_a_reason_beside_it(monkeypatch):
    record = cuda_record()
    machine = markdown.machines([record])[0]
    (prediction,) = markdown.predictions(OPERATORS, machine)
    assert prediction.ratio == pytest.approx(record.row.p50_ms / prediction.milliseconds)
    slow = markdown.machines([cuda_record(p50_ms=2 * prediction.milliseconds)])[0]
    monkeypatch.setattr(reasons, "REASONS", {})
    with pytest.raises(LookupError):
        markdown.model_table(OPERATORS, slow)
    monkeypatch.setattr(reasons, "REASONS", {("sink_attention", "cuda"): (reasons.Reason("a reason"),)})
    text = markdown.model_table(OPERATORS, slow)
    assert "| 2.00 | 1 |" in text and text.endswith("1. a reason\n")
    near = markdown.machines([cuda_record(p50_ms=1.2 * prediction.milliseconds)])[0]
    assert "a reason" not in markdown.model_table(OPERATORS, near)


def predicted_cells(gpu) -> dict[tuple[str, str, str], list[str]]:
    columns, rows = predicted.lines(OPERATORS, gpu)
    assert all(len(row) == len(columns) for row in rows)
    return {tuple(row[:3]): row[3:] for row in rows}


def test_the_first_measured_gpu_corrects_the_predictions():
    """Of its kind, with the median ratio over the workloads; the fastest backend counts."""

    def record(impl: str, workload: str, factor: float) -> Record:
        known = {w.name: w for w in OPERATORS["sink_attention"].workloads}
        of_h200 = devices.measured("H200", "cuda", next(gpu for gpu in devices.GPUS if gpu.name == "H200").ceilings)
        call = OPERATORS["sink_attention"], known[workload], FORWARD, of_h200, torch.bfloat16
        time = cost_model.predict(*call, impl.partition(":")[0])
        ceilings = of_h200.ceilings.of(torch.bfloat16)
        return cuda_record(impl=impl, workload=workload, direction=FORWARD, p50_ms=factor * time, ceilings=ceilings)

    names = ("gpu_1k_d64", "gpu_2k_d128", "gpu_4k_d64")
    fused = [record("recattn triton", name, factor) for name, factor in zip(names, (1.5, 2.0, 4.0), strict=True)]
    slow, fast = (record(f"recattn correction:{name}", names[0], f) for name, f in (("efficient", 9.0), ("cuDNN", 0.5)))
    (gpu,) = markdown.machines([*fused, slow, fast])
    before, after = predicted_cells(None), predicted_cells(gpu)
    assert after.keys() == before.keys()
    h200 = 1

    def ms(cells: list[str]) -> float:
        return float(cells[h200].split()[0])

    for key, cells in after.items():
        name, workload, direction = key
        factor, ratio = 1.0, "–"
        if (name, direction) == ("sink_attention, triton", FORWARD):
            factor, ratio = 2.0, dict(zip(names, ("1.50", "2.00", "4.00"), strict=True)).get(workload, "–")
        elif (name, direction) == ("sink_attention, correction", FORWARD):
            factor, ratio = 0.5, "0.50" if workload == names[0] else "–"
        assert ms(cells) == pytest.approx(factor * ms(before[key]), rel=0.02)
        assert cells[-1] == ratio
    assert "corrected" in predicted.introduction(gpu) and "corrected" not in predicted.introduction()


def test_records_hold_what_was_measured():
    for row, run in RECORDS:
        assert run["commit"] and json.dumps(asdict(row), allow_nan=False)
        assert row.status != records.TIMED or 0 < row.p10_ms <= row.p50_ms <= row.p90_ms


# --- Slower than PyTorch ---


def held_records(ratios: dict[str, float | None], capability: str = "avx2", started: str = "2027") -> list[Record]:
    """inter_sink_bias on a CPU, by direction: its time over that of the best PyTorch formulation."""
    operator = OPERATORS["inter_sink_bias"]
    run = dict(RECORDS[0].run) | {"device": "EPYC", "cpu_capability": capability, "started": started}
    found = []
    for direction, ratio in ratios.items():
        (goal,) = (
            goal
            for goal in operator.goals
            if isinstance(goal, NeverSlowerGoal) and (goal.workload, goal.direction) == ("ctr_sink_bias", direction)
        )
        verdict = "no verdict" if ratio is None else "met" if ratio <= 1 else "missed"
        outcome = Outcome(str(goal), verdict, "eager", ratio, None if ratio is None else 0.01)
        shape = next(w for w in operator.workloads if w.name == goal.workload).shape
        row = Row(
            op="inter_sink_bias",
            workload=goal.workload,
            shape=shape,
            dtype="float32",
            impl="recattn",
            direction=direction,
            data="drawn",
            p50_ms=1.0,
            goals=[outcome],
        )
        found.append(Record(row, run))
    return found


def test_what_is_slower_than_pytorch_is_listed():
    slow = markdown.machines(held_records({FORWARD: 1.25, TRAINING: 0.5}))
    section = markdown.slower_section(OPERATORS, slow)
    assert "EPYC (AVX2), 2 threads: slower on 1 of 2." in section
    assert "| inter_sink_bias | ctr_sink_bias | fwd | 1.25× (eager) ± 1% (missed) |" in section
    assert "fwd + bwd" not in section
    assert "inter_sink_bias ctr_sink_bias fwd 1.25×" in markdown.slower_sentence(OPERATORS, slow)
    unclear = markdown.machines(held_records({FORWARD: None, TRAINING: 0.5}))
    section = markdown.slower_section(OPERATORS, unclear)
    assert "slower on none of 2. Undecided, because a PyTorch formulation was refused or failed: inter_" in section


def test_nothing_is_said_where_nothing_is_slower():
    fast = markdown.machines(held_records({FORWARD: 0.9, TRAINING: 0.5}))
    assert "slower on none of 2." in markdown.slower_section(OPERATORS, fast)
    assert markdown.slower_sentence(OPERATORS, fast) == ""
    assert "No record holds that comparison yet." in markdown.slower_section(OPERATORS, [])


def test_capabilities_of_a_cpu_are_machines_of_their_own():
    rows = held_records({FORWARD: 0.9}) + held_records({FORWARD: 0.8}, "avx512_bf16", "2028")
    assert [machine.title for machine in markdown.machines(rows)] == [
        "EPYC (AVX-512 with BF16), 2 threads",
        "EPYC (AVX2), 2 threads",
    ]

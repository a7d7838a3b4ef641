"""The benchmark suite itself: what it refuses, how it times, and what it writes."""

import io
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import correctness, memory, movielens, results, run, suite, table, timing
from benchmarks.ceilings import Ceilings
from benchmarks.registry import FORWARD, TRAINING, Cost, Goal, Operator, load_operators
from benchmarks.workloads import Draw, LreaWorkload, RefinedWorkload, SinkWorkload, Workload

ROOT = Path(run.__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def histories():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(movielens, "CACHED", Path("no such file"))
        return movielens.load(offline=True)


@pytest.fixture
def settings(histories):
    ceilings = Ceilings({torch.float32: 0.1}, 10.0)
    return suite.Settings(CPU, torch.float32, histories, ceilings, timing.CpuClock(), seconds=0.01)


@pytest.fixture
def product():
    """An operator x @ w with an eager implementation."""

    def draw_inputs(workload, draw):
        return {"x": draw.normal(workload.batch, 8), "w": draw.normal(8, 3)}

    operator = Operator(
        "product",
        lambda x, w: x @ w,
        draw_inputs,
        lambda workload, inputs, direction: Cost(48 * workload.batch, 44 * workload.batch),
        grads=("x", "w"),
        baseline="eager",
        workloads=(Workload(name="small", batch=16, gate_batch=4),),
        goals=(Goal("small", TRAINING, against="eager", time_ratio=1.5),),
    )
    operator.implementation("eager")(lambda x, w: x @ w)
    return operator


def run_all(operator, settings):
    contest = suite.Contest(operator, operator.workloads[0], list(operator.implementations.values()), settings)
    return {(row.impl, row.direction): row for row in contest.run()}


# The gate


def test_a_wrong_output_is_refused_and_never_timed(product, settings):
    calls = []

    @product.implementation("recattn")
    def wrong(x, w):
        calls.append(len(x))
        return (x @ w) * (1 + 1e-4)

    rows = run_all(product, settings)
    for direction in (FORWARD, TRAINING):
        row = rows["recattn", direction]
        assert row.status == results.REFUSED
        assert "output" in row.reason
        assert row.p50_ms is None and row.samples == 0
        assert row.error_share > 1
        assert rows["eager", direction].p50_ms > 0
    assert calls == [4]  # the gate's one call, at the gate's size


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, incoming):
        x, w = ctx.saved_tensors
        return incoming @ w.mT, 1.001 * (x.mT @ incoming)


def test_a_wrong_gradient_is_refused(product, settings):
    product.implementation("recattn")(lambda x, w: WrongGradient.apply(x, w))
    row = run_all(product, settings)["recattn", FORWARD]
    assert row.status == results.REFUSED
    assert "dw" in row.reason and "dx" not in row.reason


@pytest.mark.parametrize(
    ("broken", "status"),
    [
        (lambda x, w: x @ w[:, :1], results.REFUSED),
        (lambda x, w: x @ w * math.nan, results.REFUSED),
        (lambda x, w: x @ x, results.FAILED),
    ],
    ids=["shape", "nan", "raises"],
)
def test_what_breaks_is_a_row_and_the_others_are_timed(product, settings, broken, status):
    product.implementation("recattn")(broken)
    rows = run_all(product, settings)
    assert rows["recattn", FORWARD].status == status
    assert rows["recattn", FORWARD].reason
    assert rows["eager", TRAINING].status == results.TIMED


def test_a_missing_implementation_is_a_row_with_its_reason(product, settings):
    product.implementation("peer", unavailable=lambda workload, device: f"no peer on {device}")(None)

    @product.implementation("recattn")
    def refuses(x, w):
        raise NotImplementedError("not for 8 columns")

    rows = run_all(product, settings)
    assert rows["peer", TRAINING].status == results.NOT_RUN
    assert rows["peer", TRAINING].reason == "no peer on cpu"
    assert rows["recattn", FORWARD].status == results.NOT_RUN
    assert "not for 8 columns" in rows["recattn", FORWARD].reason


def test_a_layout_of_its_own_is_undone_for_the_gate_and_not_timed(product, settings):
    prepared = []

    def prepare(inputs):
        prepared.append(1)
        return {"x": inputs["x"].t().contiguous(), "w": inputs["w"]}

    restore = {"restore": lambda output, inputs: output.t()}
    product.implementation("recattn", prepare=prepare, **restore)(lambda x, w: w.t() @ x)
    rows = run_all(product, settings)
    assert rows["recattn", TRAINING].status == results.TIMED
    assert len(prepared) < rows["recattn", TRAINING].samples


# Timing


def test_contestants_interleave_forward_then_reversed():
    seen = []
    calls = {name: lambda turn, name=name: seen.append((name, turn)) for name in "abc"}
    samples = timing.measure(calls, timing.CpuClock(), seconds=1e-3)
    names = "".join(name for name, _ in seen)
    assert names == "abccba" * (len(names) // 6)
    assert [turn for _, turn in seen] == list(range(len(seen)))  # no two calls in a row on the same inputs
    assert {len(taken.times) + timing.WARM_UP_CALLS for taken in samples.values()} == {len(names) // 3}


def test_once_the_time_is_up_only_who_is_judged_goes_on():
    few, enough, patience = timing.FEW_ROUNDS, timing.JUDGED_ROUNDS, timing.PATIENCE
    for finished, done, expected in (
        (enough + 5, 0.9, "abc"),
        (few - 1, 1.1, "abc"),
        (few, 1.1, "ac"),
        (enough - 1, patience - 0.1, "ac"),
        (enough, 1.1, ""),
        (1, patience, ""),
    ):
        assert "".join(timing.contestants_of_round("abc", {"a", "c"}, finished, done)) == expected


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system does not say")
def test_waiting_for_a_core_is_noticed():
    core = {min(os.sched_getaffinity(0))}
    allowed = os.sched_getaffinity(0)
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        os.sched_setaffinity(busy.pid, core)
        os.sched_setaffinity(0, core)
        stop = timing.time.perf_counter() + 0.5
        before = timing.seconds_waited()
        while timing.time.perf_counter() < stop:
            pass
        assert timing.seconds_waited() - before > 0.1
    finally:
        busy.kill()
        busy.wait()
        os.sched_setaffinity(0, allowed)


def test_percentiles_are_those_of_torch():
    values = torch.rand(37, dtype=torch.float64)
    for percent in (0, 10, 50, 90, 100):
        expected = torch.quantile(values, percent / 100).item()
        assert timing.percentile(values.tolist(), percent) == pytest.approx(expected)


def test_the_spread_covers_the_median_in_95_of_100_runs():
    generator = torch.Generator().manual_seed(0)
    for n in (6, 15, 60):
        runs = 1000
        covered = 0
        for draws in torch.rand(runs, n, generator=generator, dtype=torch.float64):
            values = (1 + draws).tolist()  # median 1.5
            half_width = timing.spread(values) * timing.percentile(values, 50)
            ordered = sorted(values)
            outside = next(
                i for i in range(n) if math.isclose((ordered[n - 1 - i] - ordered[i]) / 2, half_width, rel_tol=1e-9)
            )
            covered += ordered[outside] <= 1.5 <= ordered[n - 1 - outside]
        assert covered >= 0.93 * runs


def test_over_3_percent_spread_there_is_no_verdict():
    assert timing.verdict(1.05, 0.03, waiting=0.03, goal=1.10) == "met"
    assert timing.verdict(1.15, 0.03, waiting=0.03, goal=1.10) == "missed"
    assert timing.verdict(1.05, 0.031, waiting=0.0, goal=1.10) == "no verdict"
    assert timing.verdict(1.05, 0.0, waiting=0.031, goal=1.10) == "no verdict"
    assert timing.verdict(1.05, timing.spread([1.0] * 5), waiting=0.0, goal=1.10) == "no verdict"  # too few rounds
    assert timing.spread([2.0] * 6) == 0


def test_a_drift_of_the_machine_cancels_in_the_ratio():
    drift = [1 + 0.2 * i for i in range(20)]
    ours = timing.Samples(tuple(2 * x for x in drift))
    theirs = timing.Samples(tuple(drift))
    ratio, spread = timing.time_ratio(ours, theirs)
    assert ratio == pytest.approx(2) and spread == pytest.approx(0)
    assert ours.spread > timing.MAX_SPREAD


def test_goals_are_judged_by_the_measured_ratio(product, settings):
    product.implementation("recattn")(lambda x, w: x @ w)
    row = run_all(product, settings)["recattn", TRAINING]
    assert row.goal == "forward+backward ≤ 1.50× the time of eager"
    assert row.verdict == timing.verdict(row.time_ratio, row.time_ratio_spread or math.inf, row.waiting, 1.5)
    assert str(Goal("", FORWARD, "eager", 1 / 1.8)) == "forward ≥ 1.8× as fast as eager"


def test_peak_memory_counts_what_is_held_at_one_time():
    x = torch.randn(1000)

    def call():
        first = x + 1
        del first
        second = x + 1
        return second * 2

    assert 8000 <= memory.peak_memory(call, CPU) <= 8400  # rounded up to the allocator's alignment


def test_the_ceiling_is_the_slower_of_arithmetic_and_traffic():
    ceilings = Ceilings({torch.float32: 2.0}, gbs=100.0)
    assert ceilings.fraction(Cost(flops=2e12, bytes=1e9), torch.float32, ms=2000) == pytest.approx(0.5)
    assert ceilings.fraction(Cost(flops=2e9, bytes=100e9), torch.float32, ms=4000) == pytest.approx(0.25)


# MovieLens-100k


def test_the_histogram_is_that_of_movielens_100k():
    lengths = sorted(movielens.read_histogram().elements())
    assert len(lengths) == 943
    assert sum(lengths) == 100_000
    assert lengths[943 // 2] == 65
    assert lengths[-1] == 737


def test_without_the_data_the_lengths_are_real_and_the_items_drawn(histories):
    assert histories.source == "MovieLens-100k lengths, drawn items"
    assert Counter(map(len, histories.items)) == movielens.read_histogram()
    items = torch.cat(histories.items)
    assert items.min() >= 1 and items.max() <= movielens.ITEMS
    lengths = sorted(map(len, histories.sample(256)))
    assert (lengths[0], lengths[-1]) == (20, 737)
    assert max(map(len, histories.sample(256, longest=50))) == 50


@pytest.mark.skipif(not movielens.CACHED.exists(), reason="the data was never downloaded here")
def test_the_data_has_the_lengths_of_the_histogram():
    histories = movielens.load()
    assert histories.source == "MovieLens-100k"
    assert Counter(map(len, histories.items)) == movielens.read_histogram()


def test_tampered_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "CACHED", tmp_path / "ml-100k.inter")
    movielens.CACHED.write_text("user_id:token\titem_id:token\n1\t1\n")
    with pytest.raises(ValueError, match="must have sha256 4edb74e2"):
        movielens.load()


# The real operators


SMALL = {
    "sink_attention": (
        SinkWorkload(name="gqa", batch=2, heads=4, kv_heads=2, length=63, dim=8, sinks=9),
        SinkWorkload(name="causal", batch=2, heads=2, kv_heads=2, length=63, dim=8, sinks=9, causal=True),
        SinkWorkload(
            name="ragged",
            batch=3,
            heads=2,
            kv_heads=2,
            length=100,
            dim=8,
            sinks=25,
            tokens_per_behavior=4,
            histories=True,
        ),
    ),
    "refined_attention": tuple(
        RefinedWorkload(
            name=f"{mechanism}-{source}", batch=3, length=40, dim=8, mechanism=mechanism, source=source, histories=True
        )
        for mechanism in ("simple", "value", "additive")
        for source in ("logits", "weights")
    ),
    "lrea_absorbed_attention": (
        LreaWorkload(name="even", batch=3, targets=5, rank=4, dim=8),
        LreaWorkload(name="ragged", batch=9, targets=40, rank=4, dim=8, ragged=True),
    ),
    "lrea_compress": (LreaWorkload(name="histories", batch=3, rank=4, dim=8, longest=40, histories=True),),
    "lrea_attention": (LreaWorkload(name="histories", batch=3, targets=5, rank=4, dim=8, longest=40, histories=True),),
}


def implementations_to_check():
    for operator in load_operators().values():
        for workload in SMALL[operator.name]:
            for name, implementation in operator.implementations.items():
                applies = implementation.applies(workload) and implementation.unavailable(workload, CPU) is None
                if applies and implementation.tier == "quick":
                    yield pytest.param(operator, workload, name, id=f"{operator.name}-{workload.name}-{name}")


@pytest.mark.parametrize(("operator", "workload", "name"), list(implementations_to_check()))
def test_every_contestant_passes_the_gate(operator, workload, name, histories):
    implementation = operator.implementations[name]
    inputs = operator.inputs(workload, Draw(0, torch.float32, CPU, histories))
    errors = correctness.check(operator, implementation, operator.directions(implementation, CPU), inputs)
    assert correctness.passes(implementation, errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("operator", load_operators().values(), ids=load_operators())
def test_goals_name_what_exists(operator):
    workloads = {workload.name: workload for workload in operator.workloads}
    assert len(workloads) == len(operator.workloads)
    assert operator.baseline in operator.implementations
    for goal in operator.goals:
        assert goal.implementation in operator.implementations
        assert operator.implementations[goal.against].applies(workloads[goal.workload])


# The command


@pytest.fixture
def only_product(product, monkeypatch, histories):
    monkeypatch.setattr(run, "load_operators", lambda: {"product": product})
    monkeypatch.setattr(movielens, "load", lambda offline: histories)
    return product


def test_a_refusal_makes_the_run_fail_and_is_printed(only_product, tmp_path, capsys):
    only_product.implementation("recattn")(lambda x, w: x @ w + 1)
    assert run.main(["--workload", "small", "--quick", "--seconds", "0.01", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "refused: wrong: FAIL output" in printed
    assert printed.split("goals")[1].split("ms: median")[0].count("refused: wrong") == 1  # the goal is not forgotten
    assert all(len(line) <= 120 for line in printed.splitlines())


def test_every_row_has_every_field(only_product, tmp_path):
    assert run.main(["--workload", "small", "--quick", "--seconds", "0.01", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["direction"] for row in rows] == [FORWARD, TRAINING]
    common = {"device", "threads", "python", "torch", "triton", "commit", "dirty", "started"}
    common |= {"ceiling_tflops", "ceiling_gbs"}
    for row in rows:
        assert set(row) == {f.name for f in fields(results.Row)} | common
        unknown = {name for name, value in row.items() if value is None}
        assert unknown <= {"reason", "goal", "time_ratio", "time_ratio_spread", "verdict", "triton", "commit"}
        assert 0 < row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"]
        assert row["gate_shape"] == {"batch": 4} and row["shape"] == {"batch": 16}
        # flops / ms: 48 · 16 operations
        assert row["tflops"] == pytest.approx(768 / row["p50_ms"] / 1e9)
    assert set(rows[1]["errors"]) == {"output", "dx", "dw"}


def test_the_table_fits_120_columns_and_says_what_was_not_run(product, settings):
    product.implementation("peer", unavailable=lambda workload, device: "no peer here")(None)
    rows = list(run_all(product, settings).values())
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table.block(product, rows), table.goals(rows))
    text = console.export_text()
    assert "peer: not run: no peer here" in text
    assert "checked against float64 on a batch of 4" in text
    assert all(len(line) <= 120 for line in text.splitlines())


def test_tiers(product):
    product = replace(
        product, workloads=tuple(Workload(name=tier, batch=1, tier=tier) for tier in ("quick", "default", "full"))
    )
    product.implementation("slow peer", tier="full")(None)

    def plan(*arguments):
        chosen = run.parse_arguments(arguments, {"product": product})
        return [
            (workload.name, [i.name for i in implementations])
            for _, workload, implementations in run.choose({"product": product}, chosen)
        ]

    assert plan("--quick") == [("quick", ["eager"])]
    assert plan() == [("default", ["eager"])]
    assert plan("--full") == [("default", ["eager", "slow peer"]), ("full", ["eager", "slow peer"])]
    assert plan("--workload", "full", "--impl", "slow peer") == [("full", ["slow peer"])]


def run_command(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)


def test_quick_run_end_to_end(tmp_path):
    done = run_command(
        *("--quick", "--op", "sink_attention", "--offline", "--seconds", "0.05", "--results", str(tmp_path))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sink_attention · tiny" in done.stdout
    (file,) = tmp_path.glob("*.jsonl")
    timed = {row["impl"] for row in map(json.loads, file.read_text().splitlines()) if row["status"] == results.TIMED}
    assert {"recattn", "eager", "SDPA, dense bias", "unbiased SDPA"} <= timed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err

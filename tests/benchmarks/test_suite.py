"""The benchmark suite itself: what it refuses, how it times, and what it writes."""

import io
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from itertools import accumulate, pairwise
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from benchmarks import run
from benchmarks.data import movielens
from benchmarks.harness import contest, correctness, memory, records, timing
from benchmarks.harness.ceilings import Ceilings, around
from benchmarks.harness.goals import (
    NOT_MEASURED,
    CeilingGoal,
    ExtraMemoryGoal,
    LatencyGoal,
    Measured,
    MemoryGoal,
    Outcome,
    TimeGoal,
)
from benchmarks.harness.registry import BACKWARD, DIRECTIONS, FORWARD, TRAINING, Cost, load_operators
from benchmarks.harness.workloads import Draw, LreaWorkload, RefinedWorkload, SinkWorkload, Workload
from benchmarks.operators import lrea_attention, sink_attention
from benchmarks.report import markdown, table

ROOT = Path(run.__file__).parent.parent
CPU = torch.device("cpu")


def run_all(operator, settings):
    own = contest.Contest(operator, operator.workloads[0], list(operator.implementations.values()), settings)
    return {(row.impl, row.direction): row for row in own.run()}


# The gate


def test_a_wrong_output_is_refused_and_never_timed(product, suite_settings):
    calls = []

    @product.implementation("recattn")
    def wrong(x, w):
        calls.append(len(x))
        return (x @ w) * (1 + 1e-4)

    rows = run_all(product, suite_settings)
    for direction in (FORWARD, TRAINING):
        row = rows["recattn", direction]
        assert row.status == records.REFUSED
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


def test_a_wrong_gradient_is_refused(product, suite_settings):
    product.implementation("recattn")(lambda x, w: WrongGradient.apply(x, w))
    row = run_all(product, suite_settings)["recattn", FORWARD]
    assert row.status == records.REFUSED
    assert "dw" in row.reason and "dx" not in row.reason


@pytest.mark.parametrize(
    ("broken", "status"),
    [
        (lambda x, w: x @ w[:, :1], records.REFUSED),
        (lambda x, w: x @ w * math.nan, records.REFUSED),
        (lambda x, w: x @ x, records.FAILED),
    ],
    ids=["shape", "nan", "raises"],
)
def test_what_breaks_is_a_row_and_the_others_are_timed(product, suite_settings, broken, status):
    product.implementation("recattn")(broken)
    rows = run_all(product, suite_settings)
    assert rows["recattn", FORWARD].status == status
    assert rows["recattn", FORWARD].reason
    assert rows["eager", TRAINING].status == records.TIMED


def test_a_missing_implementation_is_a_row_with_its_reason(product, suite_settings):
    product.implementation("peer", unavailable=lambda workload, device: f"no peer on {device}")(None)

    @product.implementation("recattn")
    def refuses(x, w):
        raise NotImplementedError("not for 8 columns")

    rows = run_all(product, suite_settings)
    assert rows["peer", TRAINING].status == records.NOT_RUN
    assert rows["peer", TRAINING].reason == "no peer on cpu"
    assert rows["recattn", FORWARD].status == records.NOT_RUN
    assert "not for 8 columns" in rows["recattn", FORWARD].reason


def test_a_layout_of_its_own_is_undone_for_the_gate_and_not_timed(product, suite_settings):
    prepared = []

    def prepare(inputs):
        prepared.append(1)
        return {"x": inputs["x"].t().contiguous(), "w": inputs["w"]}

    restore = {"restore": lambda output, inputs: output.t()}
    product.implementation("recattn", prepare=prepare, **restore)(lambda x, w: w.t() @ x)
    rows = run_all(product, suite_settings)
    assert rows["recattn", TRAINING].status == records.TIMED
    assert len(prepared) < rows["recattn", TRAINING].samples


# Timing


def test_contestants_interleave_forward_then_reversed():
    seen = []
    calls = {name: lambda turn, name=name: lambda: seen.append((name, turn)) for name in "abc"}
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


def test_the_cache_is_flushed_without_writing(monkeypatch):
    """What a flush wrote would be written back to memory while the call is timed."""

    class Event:
        def __init__(self, enable_timing):
            pass

        record = synchronize = lambda self: None

        def elapsed_time(self, stop):
            return 0.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.CudaClock, "FLUSH_BYTES", 2**20)
    clock = timing.CudaClock(CPU)
    assert clock.flush.nbytes == 2**20
    clock.flush[-1] = 3  # read to the last element
    version = clock.flush._version
    assert clock(lambda: None) == 0.0
    assert clock.flush._version == version and clock.sum == 3


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
    for numbers in ((math.nan, 0.0, 0.0), (1.05, math.nan, 0.0), (1.05, 0.0, math.nan)):
        assert timing.verdict(*numbers, goal=1.10) == "no verdict"
    assert timing.spread([2.0] * 6) == 0


def test_a_drift_of_the_machine_cancels_in_the_ratio():
    drift = [1 + 0.2 * i for i in range(20)]
    ours = timing.Samples(tuple(2 * x for x in drift))
    theirs = timing.Samples(tuple(drift))
    ratio, spread = timing.time_ratio(ours, theirs)
    assert ratio == pytest.approx(2) and spread == pytest.approx(0)
    assert ours.spread > timing.MAX_SPREAD


def test_goals_are_judged_by_the_measured_ratio(product, suite_settings):
    product.implementation("recattn")(lambda x, w: x @ w)
    rows = run_all(product, suite_settings)
    row = rows["recattn", TRAINING]
    (outcome,) = row.goals
    assert outcome.goal == "forward+backward ≤ 1.50× the time of eager"
    assert outcome.verdict == timing.verdict(outcome.time_ratio, outcome.spread or math.inf, row.waiting, 1.5)
    assert outcome.against == "eager"
    assert rows["recattn", FORWARD].goals == rows["eager", TRAINING].goals == []


def measured(*milliseconds: float, peak: int = 0) -> Measured:
    """Eight rounds of the same times."""
    return Measured(timing.Samples(milliseconds * 8), peak)


def test_a_goal_against_several_is_against_the_best_of_those_measured():
    goal = TimeGoal(workload="", direction=BACKWARD, against=("slow", "fast", "absent"), time_ratio=1 / 1.8)
    assert str(goal) == "backward ≥ 1.8× as fast as the best of slow, fast, absent"
    outcome = goal.judge(measured(1.0, 1.0), {"slow": measured(9.0, 9.0), "fast": measured(2.0, 2.0)})
    assert outcome == Outcome(str(goal), "met", "fast", time_ratio=0.5, spread=0.0)
    assert goal.judge(measured(1.5, 1.5), {"fast": measured(2.0, 2.0)}).verdict == "missed"


def test_the_best_is_one_opponent_for_all_rounds():
    goal = TimeGoal(workload="", direction=FORWARD, against=("a", "b"), time_ratio=1.0)
    own = Measured(timing.Samples((1.0,) * 40), 0)
    # Each is the faster one in every other round; nobody can have both.
    a = Measured(timing.Samples((0.9, 0.9, 1.3, 1.3) * 10), 0)
    b = Measured(timing.Samples((1.3, 1.3, 0.89, 0.89) * 10), 0)
    outcome = goal.judge(own, {"a": a, "b": b})
    assert outcome.against == "b" and outcome.verdict == "no verdict"
    assert outcome.time_ratio < 1


def test_an_extra_memory_goal_is_against_the_leanest():
    goal = ExtraMemoryGoal(workload="", direction=TRAINING, against=("a", "b"), extra_bytes=46_000_000)
    assert str(goal) == "forward+backward ≤ 46 MB more than the best of a, b"
    others = {"a": measured(1.0, 1.0, peak=10**9), "b": measured(5.0, 5.0, peak=10**9 - 10**6)}
    outcome = goal.judge(measured(1.0, 1.0, peak=10**9 + 45 * 10**6), others)
    assert outcome == Outcome(str(goal), "met", "b", extra_bytes=46 * 10**6)
    assert goal.judge(measured(1.0, 1.0, peak=10**9 + 45 * 10**6 + 1), others).verdict == "missed"


def test_a_memory_goal_is_a_share_of_the_leanest():
    goal = MemoryGoal(workload="", direction=TRAINING, against=("a", "b"), memory_ratio=1 / 8)
    assert str(goal) == "forward+backward ≤ 1/8 of the memory of the best of a, b"
    others = {"a": measured(1.0, 1.0, peak=8000), "b": measured(5.0, 5.0, peak=16000)}
    outcome = goal.judge(measured(1.0, 1.0, peak=1000), others)
    assert outcome == Outcome(str(goal), "met", "a", memory_ratio=1 / 8)
    assert goal.judge(measured(1.0, 1.0, peak=1001), others).verdict == "missed"


def test_a_latency_goal_counts_the_host_where_it_says_so():
    own = measured(0.005, 0.005)._replace(host_ms=0.004)
    device = LatencyGoal(workload="", direction=FORWARD, milliseconds=0.006)
    assert str(device) == "device ≤ 6 µs a call"
    assert device.judge(own, {}) == Outcome(str(device), "met", spread=0.0, milliseconds=0.005)
    both = LatencyGoal(workload="", direction=FORWARD, milliseconds=0.008, host=True)
    assert str(both) == "host + device ≤ 8 µs a call"
    assert both.judge(own, {}).verdict == "missed"
    assert both.judge(own._replace(host_ms=0.003), {}).verdict == "met"


def test_a_ceiling_goal_is_a_share_of_it():
    goal = CeilingGoal(workload="", direction=FORWARD, fraction=0.85)
    assert str(goal) == "forward ≥ 85% of the ceiling"
    near, far = (measured(1.0, 1.0)._replace(ceiling_fraction=share) for share in (0.86, 0.84))
    assert goal.judge(near, {}) == Outcome(str(goal), "met", spread=0.0, ceiling_fraction=0.86)
    assert goal.judge(far, {}).verdict == "missed"


def test_a_goal_against_nobody_is_judged(product, suite_settings):
    goals = (
        LatencyGoal(workload="small", direction=FORWARD, milliseconds=1e6),
        CeilingGoal(workload="small", direction=FORWARD, fraction=1e-9),
    )
    product = replace(product, goals=goals)
    product.implementation("recattn")(lambda x, w: x @ w)
    row = run_all(product, suite_settings)["recattn", FORWARD]
    latency, ceiling = row.goals
    assert latency.milliseconds == row.p50_ms and ceiling.ceiling_fraction == row.ceiling_fraction
    assert {latency.verdict, ceiling.verdict} <= {"met", "no verdict"}


def test_an_extra_memory_goal_is_judged_by_peaks(product, suite_settings):
    goal = ExtraMemoryGoal(workload="small", direction=FORWARD, against=("eager",), extra_bytes=10**6)
    product = replace(product, goals=(goal,))
    product.implementation("recattn")(lambda x, w: x.repeat(4096, 1)[: len(x)] @ w)
    rows = run_all(product, suite_settings)
    (outcome,) = rows["recattn", FORWARD].goals
    assert outcome.verdict == "missed"
    assert outcome.extra_bytes == rows["recattn", FORWARD].peak_bytes - rows["eager", FORWARD].peak_bytes > 10**6


def test_goals_are_those_of_the_device_and_its_dtype(product):
    workload, cuda = product.workloads[0], torch.device("cuda")
    on_cuda = TimeGoal(workload="small", direction=FORWARD, against=("eager",), time_ratio=1.0, device="cuda")
    product = replace(product, goals=(*product.goals, on_cuda))
    assert product.goals_of(workload, CPU, torch.float32) == [product.goals[0]]
    assert product.goals_of(workload, cuda, torch.bfloat16) == [on_cuda]
    assert product.goals_of(workload, CPU, torch.bfloat16) == product.goals_of(workload, cuda, torch.float32) == []


@pytest.mark.parametrize("name", ["recattn", "eager"])
def test_a_goal_that_could_not_be_measured_stands_there(product, suite_settings, name):
    product.implementation("recattn")(lambda x, w: x @ w)
    product.implementation(name)(lambda x, w: x @ w + 1)
    row = run_all(product, suite_settings)["recattn", TRAINING]
    assert [outcome.verdict for outcome in row.goals] == [NOT_MEASURED]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table.goals([row]))
    reason = "refused: wrong" if name == "recattn" else "nothing to compare with"
    text = console.export_text()
    assert "not measured" in text and reason in text


def test_a_goal_whose_opponent_was_refused_or_failed_has_no_verdict(product, suite_settings):
    """It might have been the fastest: those that are left decide nothing."""
    goal = TimeGoal(workload="small", direction=TRAINING, against=("eager", "wrong", "broken"), time_ratio=1e6)
    product = replace(product, goals=(goal,))
    product.implementation("recattn")(lambda x, w: x @ w)
    (easily_met,) = run_all(product, suite_settings)["recattn", TRAINING].goals
    assert easily_met.against == "eager"
    product.implementation("wrong")(lambda x, w: x @ w + 1)
    product.implementation("broken")(lambda x, w: 1 / 0)
    row = run_all(product, suite_settings)["recattn", TRAINING]
    assert row.goals == [Outcome(str(goal), "no verdict", "wrong, broken")]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table.goals([row]))
    assert "wrong, broken: refused or failed" in console.export_text()
    assert markdown.result(row.goals[0], row) == "wrong, broken: refused or failed (no verdict)"


# Directions


def test_a_backward_leaves_its_forward_outside_the_clock(product, suite_settings):
    events = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            events.append("forward")
            ctx.save_for_backward(x, w)
            return x @ w

        @staticmethod
        def backward(ctx, incoming):
            events.append("backward")
            x, w = ctx.saved_tensors
            return incoming @ w.mT, x.mT @ incoming

    product.implementation("recattn")(lambda x, w: Watched.apply(x, w))

    def clock(call):
        events.append("start")
        call()
        events.append("stop")
        return 1.0

    rows = run_all(product, replace(suite_settings, clock=clock, directions=(BACKWARD,)))
    assert {direction for _, direction in rows} == {BACKWARD}
    assert set(rows["recattn", BACKWARD].errors) == {"output", "dx", "dw"}
    timed = [events[i : i + 4] for i, event in enumerate(events) if event == "forward" and events[i + 1] == "start"]
    assert len(timed) == rows["recattn", BACKWARD].samples > 0
    assert all(events == ["forward", "start", "backward", "stop"] for events in timed)
    # two of the three passes, 48 · 16 operations each, in a millisecond
    assert rows["recattn", BACKWARD].tflops == pytest.approx(2 * 768 / 1e9)


def test_what_has_no_backward_is_left_out_of_it(product, suite_settings):
    product.implementation("recattn", forward_only=lambda device: True)(lambda x, w: (x @ w).detach())
    rows = run_all(product, replace(suite_settings, directions=DIRECTIONS["cuda"]))
    assert [direction for name, direction in rows if name == "recattn"] == [FORWARD]
    assert [direction for name, direction in rows if name == "eager"] == [FORWARD, BACKWARD, TRAINING]
    assert ("recattn", BACKWARD) not in run_all(product, replace(suite_settings, directions=(BACKWARD,)))


def test_memory_of_a_backward_is_its_own(product, suite_settings):
    rows = run_all(product, replace(suite_settings, directions=DIRECTIONS["cuda"]))
    peaks = {direction: row.peak_bytes for (_, direction), row in rows.items()}
    # dx [16, 8] and dw [8, 3]; the output [16, 3] is there already
    assert peaks[BACKWARD] == 4 * (16 * 8 + 8 * 3)
    assert peaks[TRAINING] == peaks[BACKWARD] + peaks[FORWARD]


def test_peak_memory_counts_what_is_held_at_one_time():
    x = torch.randn(1000)

    def call():
        first = x + 1
        del first
        second = x + 1
        return second * 2

    assert 8000 <= memory.peak_memory(call, CPU) <= 8400  # rounded up to the allocator's alignment


@pytest.mark.gpu
def test_peak_memory_on_a_gpu():
    x = torch.randn(2**18, device="cuda")

    def call():
        first = x + 1
        del first
        return (x + 1) * 2

    assert memory.peak_memory(call, x.device) == 2 * x.nbytes


@pytest.mark.gpu
def test_the_time_on_a_gpu_is_that_of_the_device():
    clock = timing.CudaClock(torch.device("cuda"))
    x = torch.randn(2**24, device="cuda")
    for _ in range(3):  # what is slow the first time
        launched_late = clock(lambda: timing.time.sleep(1e-4))
        copied = clock(x.clone)
    assert launched_late < 0.05
    # 128 MiB moved, at 0.2 to 20 TB/s
    assert 0.006 < copied < 0.6
    waits = timing.host_time(lambda turn: lambda: timing.time.sleep(2e-3))
    assert 2 <= waits < 20


def test_the_ceiling_is_the_slower_of_arithmetic_and_traffic():
    ceilings = Ceilings({torch.float32: 2.0}, gbs=100.0, gsoftmax=1.0, launch_us=5.0)
    assert ceilings.fraction(Cost(flops=2e12, bytes=1e9), torch.float32, ms=2000) == pytest.approx(0.5)
    assert ceilings.fraction(Cost(flops=2e9, bytes=100e9), torch.float32, ms=4000) == pytest.approx(0.25)


def test_ceilings_are_the_better_of_before_and_after():
    measured = iter(Ceilings({torch.float32: pace}, pace, pace, 1 / pace) for pace in (1.0, 2.0, 0.5, 0.25))
    ceilings = around(lambda: next(measured))
    assert [(c.tflops[torch.float32], c.gbs, c.gsoftmax, 1 / c.launch_us) for c in (ceilings() for _ in range(3))] == [
        (2.0,) * 4,
        (2.0,) * 4,
        (0.5,) * 4,
    ]


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
    "bert_layer": (SinkWorkload(name="even", batch=2, heads=2, kv_heads=2, length=20, dim=8, sinks=5),),
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
        SinkWorkload(name="no sinks", batch=2, heads=2, kv_heads=2, length=64, dim=8, sinks=0),
        SinkWorkload(name="all sinks", batch=2, heads=2, kv_heads=2, length=64, dim=8, sinks=64),
        SinkWorkload(name="one long", batch=5, heads=2, kv_heads=2, length=70, dim=8, sinks=20, others=6, causal=True),
        SinkWorkload(name="zipf", batch=5, heads=2, kv_heads=2, length=70, dim=8, sinks=20, ragged=True, causal=True),
    ),
    "inter_sink_bias": (
        SinkWorkload(name="full", batch=5, heads=3, kv_heads=3, length=20, dim=8, sinks=7),
        SinkWorkload(name="causal", batch=5, heads=3, kv_heads=3, length=20, dim=8, sinks=7, causal=True),
    ),
    "wasserstein_attention": tuple(
        RefinedWorkload(name=mechanism, batch=3, length=30, dim=8, heads=2, mechanism=mechanism, histories=True)
        for mechanism in ("plain", "stochastic")
    ),
    "refined_attention": tuple(
        RefinedWorkload(
            name=f"{mechanism}-{source}", batch=3, length=30, dim=8, mechanism=mechanism, source=source, histories=True
        )
        for mechanism in ("simple", "value", "additive", "stochastic")
        for source in ("logits", "weights")
    ),
    "lrea_absorbed_attention": (
        LreaWorkload(name="even", batch=3, targets=5, rank=4, dim=8),
        LreaWorkload(name="ragged", batch=9, targets=40, rank=4, dim=8, ragged=True),
    ),
    "lrea_compress": (LreaWorkload(name="histories", batch=3, rank=4, dim=8, longest=40, histories=True),),
    "lrea_compress_items": (LreaWorkload(name="histories", batch=3, rank=4, dim=8, longest=40, histories=True),),
    "lrea_attention": (LreaWorkload(name="histories", batch=3, targets=5, rank=4, dim=8, longest=40, histories=True),),
}


def implementations_to_check():
    for operator in load_operators().values():
        for workload in SMALL[operator.name]:
            for name, implementation in operator.implementations.items():
                applies = implementation.applies(workload) and implementation.unavailable(workload, CPU) is None
                compiles = "torch.compile" in name
                if applies and "cpu" in implementation.devices and not compiles:
                    yield pytest.param(operator, workload, name, id=f"{operator.name}-{workload.name}-{name}")


@pytest.mark.parametrize(("operator", "workload", "name"), list(implementations_to_check()))
def test_every_contestant_passes_the_gate(operator, workload, name, histories):
    implementation = operator.implementations[name]
    inputs = operator.inputs(workload, Draw(0, torch.float32, CPU, histories))
    errors = correctness.Gate(operator, inputs).check(implementation, operator.directions(implementation, CPU))
    assert correctness.passes(implementation, errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("workload", SMALL["sink_attention"], ids=lambda workload: workload.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(workload, histories, monkeypatch):
    """Uncompiled, which needs no GPU."""
    monkeypatch.setattr(sink_attention, "compiled", lambda function: function)
    implementation = sink_attention.SINK_ATTENTION.implementations["FlexAttention"]
    if not implementation.applies(workload):
        pytest.skip("it captures no empty tensor")
    inputs = sink_attention.draw_inputs(workload, Draw(0, torch.float32, CPU, histories))
    errors = correctness.Gate(sink_attention.SINK_ATTENTION, inputs).check(implementation, (FORWARD,))
    assert correctness.passes(implementation, errors), "\n".join(map(str, errors))


@pytest.mark.parametrize(
    "operator, workload, name",
    [
        ("lrea_absorbed_attention", "even", lrea_attention.COMPILED),
        ("lrea_absorbed_attention", "even", lrea_attention.JAGGED),
        ("lrea_absorbed_attention", "ragged", lrea_attention.JAGGED),
        ("lrea_absorbed_attention", "even", lrea_attention.FULL_ATTENTION),
        ("lrea_attention", "histories", lrea_attention.COMPILED_FACTORED),
        ("lrea_compress", "histories", lrea_attention.COMPILED),
        ("lrea_compress_items", "histories", lrea_attention.COMPILED),
        ("refined_attention", "value-logits", "eager, torch.compile"),
        ("wasserstein_attention", "stochastic", "eager, torch.compile"),
        ("inter_sink_bias", "causal", "eager, torch.compile"),
        ("sink_attention", "ragged", "eager, torch.compile"),
    ],
)
def test_peers_that_are_not_for_here_compute_the_same(operator, workload, name, histories, monkeypatch):
    """On a CPU, and uncompiled."""
    operator = load_operators()[operator]
    function = operator.implementations[name].run
    monkeypatch.setitem(function.__globals__, "compiled", lambda function: function)
    workload = next(w for w in SMALL[operator.name] if w.name == workload)
    inputs = operator.inputs(workload, Draw(0, torch.float32, CPU, histories))
    errors = correctness.Gate(operator, inputs).check(operator.implementations[name], (FORWARD,))
    assert correctness.passes(operator.implementations[name], errors), "\n".join(map(str, errors))


def test_histories_of_one_length(histories):
    workload = LreaWorkload(name="", batch=3, rank=4, dim=8, length=50)
    inputs = lrea_attention.draw_compress(workload, Draw(0, torch.float32, CPU, histories))
    assert inputs["behaviors"].shape == (3, 50, 8) and inputs["seq_lens"].tolist() == [50] * 3


PEERS_OF_OTHERS = [name for name in sink_attention.SINK_ATTENTION.implementations if re.search("FlashA|xFormers", name)]
WORKLOADS_OF_OTHERS = ("causal", "no sinks", "one long", "gqa")


def attention_of(q, k, v, causal):
    """Tokens first, as libraries for GPUs have it; heads that are grouped stay so."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def packed_attention_of(q, k, v, bounds, causal):
    own = [attention_of(*(x[a:b].unsqueeze(0) for x in (q, k, v)), causal)[0] for a, b in pairwise(bounds.tolist())]
    return torch.cat(own)


class FakeFlashAttention(ModuleType):
    @staticmethod
    def flash_attn_func(q, k, v, *, causal):
        return attention_of(q, k, v, causal), "log-sum-exp"

    @staticmethod
    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        return packed_attention_of(q, k, v, cu_seqlens_q, causal)


class FakeXformers(ModuleType):
    """Its masks, and an attention without groups that a tensor may bias."""

    class LowerTriangularMask: ...

    class BlockDiagonalMask:
        causal = False

        @classmethod
        def from_seqlens(cls, lengths, *, device):
            mask = cls()
            mask.bounds = torch.tensor([0, *accumulate(lengths)])
            return mask

        def make_causal(self):
            self.causal = True
            return self

    @classmethod
    def memory_efficient_attention(cls, q, k, v, *, attn_bias):
        assert q.shape == k.shape == v.shape and q.dim() == 4
        if isinstance(attn_bias, cls.BlockDiagonalMask):
            return packed_attention_of(q[0], k[0], v[0], attn_bias.bounds, attn_bias.causal).unsqueeze(0)
        if not isinstance(attn_bias, torch.Tensor):
            return attention_of(q, k, v, causal=attn_bias is not None)
        assert attn_bias.shape == (len(q), q.shape[2], q.shape[1], q.shape[1]) and attn_bias.dtype == q.dtype
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(q.shape[-1]) + attn_bias
        return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("name", PEERS_OF_OTHERS)
@pytest.mark.parametrize("workload", WORKLOADS_OF_OTHERS)
def test_libraries_for_gpus_are_called_as_they_want_it(name, workload, histories, monkeypatch):
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, FakeFlashAttention(module))
    xformers = FakeXformers("xformers.ops")
    xformers.fmha = xformers
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    operator = sink_attention.SINK_ATTENTION
    implementation = operator.implementations[name]
    workload = next(w for w in SMALL["sink_attention"] if w.name == workload)
    if not implementation.applies(workload):
        assert name == "xFormers, dense bias" and (workload.packed or workload.length % 8)
        return
    inputs = operator.inputs(workload, Draw(0, torch.float32, CPU, histories))
    errors = correctness.Gate(operator, inputs).check(implementation, (FORWARD, TRAINING))
    assert correctness.passes(implementation, errors), "\n".join(map(str, errors))
    assert len(errors) == 1 + len(correctness.gradients(operator, implementation, inputs))


@pytest.mark.parametrize("name", PEERS_OF_OTHERS)
def test_a_library_that_is_not_there_says_so(name):
    implementation = sink_attention.SINK_ATTENTION.implementations[name]
    workload = sink_attention.SINK_ATTENTION.workloads[0]
    assert implementation.unavailable(workload, CPU) == "it needs a CUDA device"
    reason = implementation.unavailable(workload, torch.device("cuda"))
    assert "cannot be imported: ModuleNotFoundError: No module named" in reason


def test_cudnn_never_runs_a_backward_with_a_mask(histories, monkeypatch):
    """With one, and N % 128 == 64, torch 2.11 returns NaN."""
    masked = []

    def spy(q, k, v, mask=None, **options):
        masked.append(mask is not None)
        return torch.zeros_like(q)

    monkeypatch.setattr(sink_attention.F, "scaled_dot_product_attention", spy)
    operator, cuda = sink_attention.SINK_ATTENTION, torch.device("cuda")
    for name, implementation in operator.implementations.items():
        for workload in SMALL["sink_attention"]:
            if "cuDNN" in name and implementation.applies(workload):
                inputs = operator.inputs(workload, Draw(0, torch.float32, CPU, histories))
                implementation.run(**implementation.prepare(inputs))
                assert not masked.pop() or operator.directions(implementation, cuda) == (FORWARD,)
                assert not masked


@pytest.mark.parametrize("name", ["SDPA, dense bias", "SDPA efficient, dense bias", "SDPA cuDNN, dense bias"])
@pytest.mark.parametrize("workload", ["causal", "ragged"])
def test_a_mask_has_the_dtype_of_what_it_masks(name, workload, histories, monkeypatch):
    """torch 2.11 misreads a float32 mask beside bfloat16 without a word."""
    dtypes = []

    def spy(q, k, v, mask=None, **options):
        dtypes.append((q.dtype, mask.dtype))
        return torch.zeros_like(q)

    monkeypatch.setattr(sink_attention.F, "scaled_dot_product_attention", spy)
    operator = sink_attention.SINK_ATTENTION
    implementation = operator.implementations[name]
    workload = next(w for w in SMALL["sink_attention"] if w.name == workload)
    inputs = operator.inputs(workload, Draw(0, torch.bfloat16, CPU, histories))
    inputs["inter_sink_bias"] = inputs["inter_sink_bias"].float()  # as recattn.inter_sink_bias returns it
    implementation.run(**implementation.prepare(inputs))
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]


def test_one_long_sequence_among_short_ones(histories):
    workload = next(w for w in SMALL["sink_attention"] if w.name == "one long")
    inputs = sink_attention.draw_inputs(workload, Draw(0, torch.float32, CPU, histories))
    assert inputs["cu_seqlens"].diff().tolist() == [70, 6, 6, 6, 6]
    assert (inputs["sink_positions"] >= 0).sum(1).tolist() == [20, 1, 1, 1, 1]


@pytest.mark.parametrize("name", sink_attention.UNBIASED_PACKED)
def test_packed_unbiased_attention_is_called_as_declared(name, histories):
    inputs = sink_attention.draw_inputs(SMALL["sink_attention"][-1], Draw(0, torch.bfloat16, CPU, histories))
    inputs = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    out = sink_attention.SINK_ATTENTION.implementations[name].run(**inputs, max_seqlen=70)
    assert out.shape == inputs["q"].shape and out.dtype == torch.bfloat16


def test_zipf_lengths(histories):
    workload = replace(SMALL["sink_attention"][-1], batch=400, length=100, sinks=10)
    inputs = sink_attention.draw_inputs(workload, Draw(0, torch.float32, CPU, histories))
    lengths = inputs["cu_seqlens"].diff()
    assert lengths.min() == 1 and lengths.max() == 100
    # With probability ∝ 1/n, 56% have at most 10 tokens.
    assert 0.5 < (lengths <= 10).float().mean() < 0.62
    positions = inputs["sink_positions"]
    assert torch.equal((positions >= 0).sum(1), lengths // 10)
    assert (positions < lengths[:, None]).all()


@pytest.mark.parametrize("operator", load_operators().values(), ids=load_operators())
def test_goals_name_what_exists(operator):
    workloads = {workload.name: workload for workload in operator.workloads}
    assert len(workloads) == len(operator.workloads)
    assert operator.baseline in operator.implementations
    for goal in operator.goals:
        workload = workloads[goal.workload]
        assert goal.device in workload.devices and workload.tier != "quick"
        for name in (goal.implementation, *goal.against):
            implementation = operator.implementations[name]
            assert implementation.applies(workload) and goal.device in implementation.devices
            assert goal.direction == FORWARD or not implementation.forward_only(torch.device(goal.device))


# The command


def test_a_refusal_makes_the_run_fail_and_is_printed(only_product, tmp_path, capsys):
    only_product.implementation("recattn", ours=True)(lambda x, w: x @ w + 1)
    assert run.main(["--workload", "small", "--quick", "--seconds", "0.01", "--results", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "refused: wrong: FAIL output" in printed
    assert printed.split("goals")[1].split("ms: median")[0].count("refused: wrong") == 1  # the goal is not forgotten
    assert all(len(line) <= 120 for line in printed.splitlines())


def test_a_peer_that_is_wrong_is_a_finding(only_product, tmp_path, capsys):
    only_product.implementation("peer")(lambda x, w: x @ w + 1)
    assert run.main(["--workload", "small", "--quick", "--seconds", "0.01", "--results", str(tmp_path)]) == 0
    assert "peer: refused: wrong: FAIL output" in capsys.readouterr().out


def test_every_row_has_every_field(only_product, tmp_path):
    assert run.main(["--workload", "small", "--quick", "--seconds", "0.01", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["direction"] for row in rows] == [FORWARD, TRAINING]
    common = {"device", "compute_capability", "threads", "platform", "python", "commit", "dirty", "started"}
    common |= {"recattn", "torch", "triton", "numpy", "cuda", "cudnn", "driver"}
    for row in rows:
        assert set(row) == {f.name for f in fields(records.Row)} | common
        unknown = {name for name, value in row.items() if value is None}
        assert unknown <= {"reason", "host_ms", "triton", "compute_capability", "cuda", "cudnn", "driver", "commit"}
        assert 0 < row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"]
        assert row["gate_shape"] == {"batch": 4} and row["shape"] == {"batch": 16}
        # flops / ms: 48 · 16 operations a pass
        passes = 1 if row["direction"] == FORWARD else 3
        assert row["tflops"] == pytest.approx(passes * 768 / row["p50_ms"] / 1e9)
    assert set(rows[1]["errors"]) == {"output", "dx", "dw"}


def test_the_table_fits_120_columns_and_says_what_was_not_run(product, suite_settings):
    product.implementation("peer", unavailable=lambda workload, device: "no peer here")(None)
    product.implementation("recattn correction:flash_attn_2")(lambda x, w: x @ w)
    rows = list(run_all(product, replace(suite_settings, directions=DIRECTIONS["cuda"])).values())
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


def test_what_is_for_a_gpu_runs_on_a_cpu_only_if_named(product):
    on_gpu = Workload(name="large", batch=1, devices=("cuda",))
    product = replace(product, workloads=(*product.workloads, on_gpu))
    product.implementation("backend", devices=("cuda",))(None)

    def plan(*arguments):
        chosen = run.parse_arguments(["--device", "cpu", *arguments], {"product": product})
        return {
            w.name: [i.name for i in implementations] for _, w, implementations in run.choose({"": product}, chosen)
        }

    assert plan() == {"small": ["eager"]}
    assert plan("--workload", "large") == {"large": ["eager"]}
    assert plan("--impl", "backend") == {"small": ["backend"]}


def test_directions_of_a_run(product, monkeypatch):
    def directions(*arguments):
        return run.parse_arguments(arguments, {"product": product}).direction

    assert directions("--device", "cpu") == (FORWARD, TRAINING)
    assert directions("--direction", "backward") == (BACKWARD,)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert directions("--device", "cuda") == (FORWARD, BACKWARD, TRAINING)


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
    timed = {row["impl"] for row in map(json.loads, file.read_text().splitlines()) if row["status"] == records.TIMED}
    assert {"recattn", "eager", "SDPA, dense bias", "unbiased SDPA"} <= timed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err

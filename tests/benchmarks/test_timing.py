"""How the benchmark suite times, and how it judges goals by the times."""

import io
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.harness import timing
from benchmarks.harness.goals import (
    NOT_MEASURED,
    CeilingGoal,
    ExtraMemoryGoal,
    LatencyGoal,
    Measured,
    MemoryGoal,
    NeverSlowerGoal,
    Outcome,
    TimeGoal,
)
from benchmarks.harness.registry import BACKWARD, FORWARD, TRAINING
from benchmarks.report import markdown, table
from recattn._environment import cpu_capability
from tests.helpers.suite_runs import CPU, measured, run_all

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
    """Lines that a flush had written would be written back to memory during the timed call."""

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


def test_never_slower_is_against_the_fastest_formulation():
    goal = NeverSlowerGoal(workload="", direction=FORWARD, against=("a", "b", "c"))
    assert str(goal) == "forward ≤ 1.00× the time of the best PyTorch formulation"
    # The fastest has as many rounds as recattn; another stopped earlier.
    others = {"a": measured(2.0, 2.0), "b": measured(0.9, 0.9), "c": Measured(timing.Samples((0.5,) * 6), 0)}
    outcome = goal.judge(measured(1.0, 1.0), others)
    assert (outcome.verdict, outcome.against) == ("missed", "b") and outcome.time_ratio == pytest.approx(1 / 0.9)
    assert goal.judge(measured(0.8, 0.8), others).verdict == "met"


def test_only_the_fastest_rival_is_timed_for_a_verdict(monkeypatch):
    monkeypatch.setattr(timing, "PATIENCE", math.inf)
    ticks = {"recattn": 0.001, "slow": 0.003, "fast": 0.002}
    calls = {name: lambda turn, seconds=seconds: lambda: time.sleep(seconds) for name, seconds in ticks.items()}
    taken = timing.measure(calls, timing.CpuClock(), 0.01, judged=("recattn",), rivals=("slow", "fast", "absent"))
    rounds = {name: len(samples.rounds) for name, samples in taken.items()}
    assert rounds == {"recattn": timing.JUDGED_ROUNDS, "fast": timing.JUDGED_ROUNDS, "slow": timing.FEW_ROUNDS}


def test_goals_may_hold_at_some_capabilities(product):
    workload, options = product.workloads[0], {"workload": "small", "direction": FORWARD, "against": ("eager",)}
    here, elsewhere = ((cpu_capability(),), ("none",))
    goals = [TimeGoal(**options, time_ratio=1 / 1.3, capabilities=names) for names in (here, elsewhere)]
    product = replace(product, goals=tuple(goals))
    assert product.goals_of(workload, CPU, torch.float32) == goals[:1]
    named = TimeGoal(**options, time_ratio=1 / 1.3, capabilities=("avx2",))
    assert str(named) == "forward ≥ 1.3× as fast as eager at AVX2" and named.wording.target == "≥ 1.3× at AVX2"
    assert str(replace(named, time_ratio=0.85)) == "forward ≤ 0.85× the time of eager at AVX2"


def test_every_workload_of_a_cpu_has_a_goal(product):
    product.implementation("ours", ours=True)(lambda x, w: x @ w)
    product.implementation("limit", reference=lambda x, w: x)(lambda x, w: x)
    product.implementation("on a GPU", devices=("cuda",))(lambda x, w: x)
    goals = product.with_goals_of_all_workloads().goals[len(product.goals) :]
    assert [(goal.workload, goal.direction, goal.against) for goal in goals] == [
        ("small", FORWARD, ("eager",)),
        ("small", TRAINING, ("eager",)),
    ]


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
    """The missing opponent might have been the fastest, so the others decide nothing."""
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

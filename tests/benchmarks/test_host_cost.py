"""The host's time of a call: its launches, its unit, its goals, and its row in the records."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import ROOT
from benchmarks.harness import host_time
from benchmarks.harness.host_time import CPU, GPU, HostCost
from benchmarks.harness.registry import FORWARD, TRAINING
from benchmarks.report import host

X = torch.rand(4, 4)


@pytest.mark.parametrize(
    "call, launches",
    [
        (lambda: X.transpose(0, 1).unsqueeze(0).expand(3, 4, 4).reshape(3, 4, 4), 0),
        (lambda: X.contiguous().to(X.dtype).detach(), 0),
        (lambda: torch.empty_like(X).new_empty(3), 0),
        (lambda: X.new_zeros(3), 1),
        (lambda: X.double(), 1),
        (lambda: X @ X, 1),
        (lambda: (X + 1).sum(), 2),
        (lambda: torch.cat([X.t().contiguous(), X]), 2),
    ],
)
def test_launches_of_pytorch_are_counted_without_views_and_allocations(call, launches):
    torch.use_deterministic_algorithms(False)  # which fill every allocation
    assert host_time.count_torch_launches(call) == launches


@pytest.mark.parametrize("case", [case for case in host_time.CASES if case.path == CPU], ids=lambda case: case.op)
def test_every_leaf_gets_a_gradient(case):
    for direction in case.directions:
        call = case.make(case.sizes, 4).in_direction(direction, case.impl)
        with torch.set_grad_enabled(direction == TRAINING):
            results = call()
        if direction == TRAINING:
            assert len(results) == len(case.make(case.sizes, 4).leaves)


def test_the_least_of_the_repeats_counts(monkeypatch):
    times = iter([1.0, 1.0, 5e-6, 3e-6, 4e-6])
    monkeypatch.setattr(host_time, "_seconds", lambda calls: next(times))
    assert host_time.best_us(lambda: None, 4) == pytest.approx(3.0)


def cost(op="sink_attention", path=GPU, step=FORWARD, units=2.0, **options) -> HostCost:
    return HostCost(host_of=op, path=path, step=step, host_us=20 * units, unit_us=20.0, **options)


@pytest.mark.parametrize(
    "measured, verdict",
    [
        (cost(units=2.5), "met"),
        (cost(units=2.6), "missed"),
        (cost(units=2.0, new_length_ratio=1.6), "missed"),
        (cost(step=TRAINING, units=7.9, new_length_ratio=1.5), "met"),
        (cost("lrea_attention", step=TRAINING, units=11.0), "met"),
        (cost("lrea_absorbed_attention", CPU, units=1.6), "missed"),
        (cost("refined_attention", CPU, step=TRAINING, units=50.0), None),
        (cost(reason="ValueError: no"), "failed"),
    ],
)
def test_verdicts(measured, verdict):
    assert measured.verdict == verdict
    assert (verdict or "–") in host.cells(measured)[-1] or measured.reason


# Forward, and forward and backward. More launches cost more than most kernels at small sizes.
MOST_LAUNCHES = {
    "sink_attention": (2, 5),
    "sink_attention, padded": (2, 5),
    "sink_attention, packed": (2, 5),
    "inter_sink_bias": (1, 2),
    "inter_sink_bias, then sink_attention": (3, 7),
    "refined_attention": (2, 4),
    "wasserstein_attention": (2, 4),
    "lrea_compress": (1, 3),
    "lrea_attention": (1, 4),
}
# Of PyTorch's operators. Zeros for the sinks that are ignored, under a profiler; the sum of bias_scale's gradient.
MOST_TORCH_LAUNCHES = {"inter_sink_bias, then sink_attention": 3}
MOST_TORCH_LAUNCHES |= dict.fromkeys(("sink_attention", "sink_attention, padded", "sink_attention, packed"), 1)


def test_the_program(tmp_path):
    """Without a GPU, every operator reaches its launches; the rows say how many, and what they cost."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.host_cost", "--repeats", "1", "--results", tmp_path / "rows.jsonl"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["path"], row["host_of"], row["step"]) for row in rows] == [
        (case.path, case.op, direction)
        for case in sorted(host_time.CASES, key=lambda case: case.path == GPU)
        for direction in case.directions
    ]
    for row in rows:
        assert row["reason"] is None and row["host_us"] > 0 and row["unit_us"] > 0 and row["device"]
        if row["path"] == GPU:
            assert 0 < row["triton_launches"] <= MOST_LAUNCHES[row["host_of"]][row["step"] == TRAINING], row
            assert row["torch_launches"] <= MOST_TORCH_LAUNCHES.get(row["host_of"], 0), row
    assert all(row["host_of"] in ran.stdout for row in rows) and "in units of SDPA's smallest call" in ran.stdout

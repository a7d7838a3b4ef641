"""The benchmark suite: what its gate refuses, what a direction times, and what the command writes."""

import io
import json
import math
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import run
from benchmarks.harness import memory, records, timing
from benchmarks.harness.ceilings import Ceilings, around
from benchmarks.harness.host_time import HostCost
from benchmarks.harness.registry import BACKWARD, DIRECTIONS, FORWARD, TRAINING, Cost
from benchmarks.harness.workloads import Workload
from benchmarks.report import table
from tests.helpers.suite_runs import CPU, run_all

ROOT = Path(run.__file__).parent.parent


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
    product.implementation("peer", unsupported_reason=lambda workload, device: f"no peer on {device}")(None)

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


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_fails_where_the_measurement_of_the_host_does(only_product, monkeypatch, tmp_path, status):
    quick = tuple(replace(workload, tier="quick") for workload in only_product.workloads)
    quick = replace(only_product, name="inter_sink_bias", workloads=quick)
    monkeypatch.setattr(run, "load_operators", lambda: {"inter_sink_bias": quick})
    asked, own = [], subprocess.run

    def measure(command, **options):
        if "benchmarks.host_cost" not in command:
            return own(command, **options)
        asked.append(command)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(run.subprocess, "run", measure)
    options = ["--op", "inter_sink_bias", "--quick", "--seconds", "0.01", "--device", "cpu", "--results", str(tmp_path)]
    assert run.main(options) == status
    assert len(records.read([tmp_path])) > 1
    (command,) = asked
    assert "inter_sink_bias" in command and "sink_attention" not in command


def test_every_row_has_every_field(only_product, tmp_path):
    assert run.main(["--workload", "small", "--quick", "--seconds", "0.01", "--results", str(tmp_path)]) == 0
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["direction"] for row in rows] == [FORWARD, TRAINING]
    common = {"device", "compute_capability", "threads", "platform", "python", "commit", "dirty", "started"}
    common |= {"recattn", "torch", "triton", "numpy", "cuda", "cudnn", "driver", "cpu_capability"}
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
    product.implementation("peer", unsupported_reason=lambda workload, device: "no peer here")(None)
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
    environment["TORCHDYNAMO_DISABLE"] = "1"  # what peers compile takes ten seconds
    command = [sys.executable, "-m", "benchmarks.run", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)


def test_quick_run_end_to_end(tmp_path):
    done = run_command(
        *("--quick", "--op", "sink_attention", "--offline", "--seconds", "0.05", "--results", str(tmp_path))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sink_attention · tiny" in done.stdout
    (file,) = tmp_path.glob("*.jsonl")
    timed = {row.impl for row, _ in records.read([file]) if row.status == records.TIMED}
    assert {"recattn", "eager", "SDPA, dense bias", "unbiased SDPA"} <= timed
    costs, shared = records.read_newest(HostCost, [tmp_path])
    assert {cost.host_of.partition(",")[0] for cost in costs} == {"sink_attention"}
    assert shared["threads"] == 1 and shared["device"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_cuda_device_says_so(capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err

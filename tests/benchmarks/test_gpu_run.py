"""`make gpu` and `make gpu-bench` without a GPU: the plans, a rehearsal, the dispatch table with made-up times.

Steps that hang or die are in test_gpu_steps.py.
"""

import contextlib
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness.goals import Outcome
from benchmarks.harness.records import Row
from benchmarks.harness.registry import Operator, load_operators
from benchmarks.harness.workloads import CUDA
from benchmarks.operators.sink_attention import PATHS
from benchmarks.tools import bounds, gpu, headline, profile, steps, tune_dispatch
from benchmarks.tools.headline import HEADLINES
from benchmarks.tools.steps import Stage, Step
from benchmarks.tools.tune_dispatch import Point
from recattn.ops import UNSUPPORTED_REASONS
from tests.cuda import gpu_sanitizer_targets

SANITIZER_TARGETS = dict(gpu_sanitizer_targets.cases(torch.device("cpu")))
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


# The plans


def both_plans(operators=tuple(gpu.OPERATORS), profile=False) -> dict[str, list[Stage]]:
    work, scratch = Path("work"), Path("scratch")
    return {
        "gpu": gpu.plan_checks(work, scratch, operators),
        "gpu-bench": gpu.plan_benchmarks(work, scratch, operators, profile),
    }


SELECTIONS = [tuple(gpu.OPERATORS), *((name,) for name in gpu.OPERATORS)]
PLANS = [
    pytest.param(plan, id=f"{command} {' '.join(selection) if len(selection) == 1 else 'all'}{' profile' * profile}")
    for selection in SELECTIONS
    for profile in (False, True)
    for command, plan in both_plans(selection, profile).items()
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_fits_its_time_and_downloads_nothing(plan):
    assert sum(stage.seconds for stage in plan) + steps.LEFT_BEHIND <= 300
    assert all(stage.seconds >= steps.LEFT_BEHIND for stage in plan)  # an overrun leaves the next one time
    names = [step.name for stage in plan for step in stage.steps]
    assert len(set(names)) == len(names) and "/" not in "".join(names)  # of log files
    assert "--no-index" in plan[0].steps[0].command and plan[0].steps[0].environment["RECATTN_BUILD"] == "none"
    for step in (step for stage in plan for step in stage.steps):
        assert ("benchmarks.run" in step.command) <= ("--offline" in step.command)
        if "--table" in step.command:  # the first of them is the one that recattn reads
            assert Path(step.command[step.command.index("--table") + 1]).exists()


@pytest.mark.parametrize("plan", PLANS)
def test_nothing_is_gated_or_timed_beside_another(plan):
    for stage in plan:
        for step in stage.steps if stage.together else ():
            assert (
                "benchmarks.tools.headline" not in step.command and "benchmarks.tools.tune_dispatch" not in step.command
            )
            assert ("benchmarks.run" in step.command) <= ("--fill" in step.command)


def test_the_check_comes_first_and_a_time_within_150_seconds():
    plan = both_plans()["gpu"]
    assert [step.name for step in plan[1].steps] == ["check", "build"]
    assert plan[0].seconds + 35 <= 60  # for the first verdict
    assert plan[2].steps[0].name == "sink_forward" and sum(stage.seconds for stage in plan[:2]) + 35 <= 150
    headlines = [step.name for stage in plan for step in stage.steps if step.name in HEADLINES]
    assert headlines == list(HEADLINES)
    checked = [word for stage in plan for step in stage.steps if "check" in step.command for word in step.command]
    assert set(checked) >= UNSUPPORTED_REASONS.keys()


def test_only_files_with_tests_for_a_gpu_are_collected():
    plan = both_plans()["gpu-bench"]
    files = [word for stage in plan for step in stage.steps for word in step.command if "/test_" in word]
    marked = [path for path in gpu.TESTS.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()]
    assert sorted(files) == sorted(map(str, set(marked) - {Path(__file__)}))
    for name, operator in gpu.OPERATORS.items():
        for pattern in operator.kernel_tests:
            assert gpu.test_files(pattern), (name, pattern)


@pytest.mark.parametrize("name", gpu.OPERATORS)
def test_what_is_measured_is_compiled_before(name):
    (measured,) = [stage for stage in both_plans([name])["gpu-bench"] if any(step.at_least for step in stage.steps)]
    filled = [step for stage in both_plans([name])["gpu-bench"] for step in stage.steps if "--fill" in step.command]
    pairs = [[step.command[i] for i in (7, 9)] for step in measured.steps]
    assert pairs and pairs == [[step.command[i] for i in (7, 9)] for step in filled]
    suite = load_operators()
    assert all(workload in [w.name for w in suite[operator].workloads] for operator, workload in pairs)


def test_ncu_takes_the_sanitizers_place():
    assert [step.name for step in both_plans(profile=True)["gpu-bench"][-1].steps] == ["profile"]
    sanitizers = both_plans(profile=False)["gpu-bench"][-1].steps
    assert [step.name for step in sanitizers] == ["memcheck", "racecheck", "initcheck"]


REHEARSED = {
    "install": (sys.executable, "-S", "-c", "raise SystemExit('error: externally-managed-environment')"),
    "build": ("nvcc-that-is-not-there",),
}


def on_the_cpu(step: Step) -> Step:
    """The same step on the CPU, if it needs a GPU."""
    command = list(REHEARSED.get(step.name, step.command))
    if "check" in command:
        command[command.index("cuda")] = "cpu"
        command.append("--quick")
    if "benchmarks.tools.headline" in command:
        command += ["--device", "cpu", "--workload", "tiny", "--seconds", "0.02"]
    return replace(step, command=command)


@WITHOUT_GPU
def test_make_gpu_rehearsed(tmp_path, monkeypatch, capsys):
    """Everything is checked and timed even without rich, and after the installation and the build failed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    planned = gpu.plan_checks
    monkeypatch.setattr(
        gpu,
        "plan_checks",
        lambda *arguments: [replace(s, steps=list(map(on_the_cpu, s.steps))) for s in planned(*arguments)],
    )
    (tmp_path / "rich.py").write_text("raise ImportError('no rich here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # half a minute
    status = gpu.main(["--results", str(tmp_path / "results"), "--op", "lrea_absorbed_attention"])
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "results" / "gpu.jsonl").read_text().splitlines()]
    statuses = {line["step"]: line["status"] for line in lines if "step" in line}
    assert statuses == {
        "install": steps.FAILED,
        "build": steps.FAILED,
        "check of lrea_absorbed_attention": steps.PASSED,
        "absorbed": steps.PASSED,
    }, printed
    assert status == 1 and "PIP_BREAK_SYSTEM_PACKAGES=1 make gpu" in printed
    timed, *_ = [line for line in lines if line.get("impl") == "recattn"]
    (kernels,) = [line for line in lines if line.get("kernels_of") == "recattn"]
    assert timed["p50_ms"] > 0 and "driver" in timed and "cudnn" in timed
    assert kernels["microseconds"]["recattn::lrea_absorbed_attention"] > 0
    measured = [line for line in lines if line.get("bounds_of") == "recattn"]
    assert [line["workload"] for line in measured] == ["tiny", HEADLINES["absorbed"].small]
    assert all(line["pass"] == "forward" and line["host_us"] > 0 and line["kernel_us"] > 0 for line in measured)
    assert "no CUDA graph: the tensors are not on a GPU" in printed
    with tarfile.open(tmp_path / "results" / "gpu-results.tar.gz") as archive:
        checked = json.load(archive.extractfile("gpu/check of lrea_absorbed_attention.json"))
    assert "lrea_absorbed_attention" in json.dumps(checked)


# The headline workloads


@pytest.mark.parametrize("name", HEADLINES)
def test_a_headline_is_measured_on_a_gpu(name):
    operator, workload, contestants = headline.find(HEADLINES[name], torch.device("cuda"))
    assert workload.devices == CUDA and workload.tier != "full"
    assert HEADLINES[name].small in {w.name for w in operator.workloads if w.tier == "default"}
    first, *later = headline.rounds(contestants)
    assert not any(i.compiled for i in first) and len(later) == 1 and later[0][0].name == "recattn"
    assert {i.name for i in first} | {i.name for i in later[0]} == {i.name for i in contestants}
    assert all(
        opponent in {i.name for i in contestants} for goal in goals_of(operator, name) for opponent in goal.against
    )


class Graph:
    """What a replay of a captured call costs."""

    def replay(self) -> None:
        pass


def test_host_and_gpu_are_told_apart_with_and_without_a_graph(monkeypatch):
    calls = []
    captured = contextlib.nullcontext()
    for name, stand_in in {
        "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "current_stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: captured,
        "graph": lambda graph, stream: captured,
        "CUDAGraph": Graph,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    host_ms = {True: 0.008, False: 0.060}
    monkeypatch.setattr(
        bounds.timing, "host_time", lambda call, calls: host_ms[isinstance(getattr(call(0), "__self__", None), Graph)]
    )
    measured = bounds.measure_bounds(
        lambda turn: lambda: calls.append(turn), 25.0, torch.device("cuda"), lambda replay: 0.024
    )
    assert calls == [0, 1]  # once to warm up, once in the capture
    assert measured == bounds.Bounds(25.0, 60.0, 24.0, 8.0)
    assert str(measured) == (
        "host 60.0 µs, kernels 25.0 µs: the host bounds it (2.4×); "
        "in a CUDA graph host 8.0 µs, GPU 24.0 µs: the GPU bounds it (3.0×)"
    )


def test_a_call_that_cannot_be_captured_says_why(monkeypatch):
    def refuse(call, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    monkeypatch.setattr(bounds, "capture", refuse)
    monkeypatch.setattr(bounds.timing, "host_time", lambda call, calls: 0.1)
    measured = bounds.measure_bounds(lambda turn: lambda: None, 200.0, torch.device("cuda"), lambda replay: 0.0)
    assert str(measured).endswith("; no CUDA graph: operation not permitted when stream is capturing")
    assert "the GPU bounds it (2.0×)" in str(measured)


def goals_of(operator: Operator, name: str):
    goals = operator.goals_of(
        headline.find(HEADLINES[name], torch.device("cuda"))[1], torch.device("cuda"), torch.bfloat16
    )
    return [goal for goal in goals if goal.direction in HEADLINES[name].directions]


def test_a_verdict_of_an_earlier_round_is_kept():
    same = {"op": "product", "workload": "small", "shape": {}, "dtype": "", "direction": "forward", "data": ""}
    before = [Row(**same, impl="recattn", goals=[Outcome("a", "met"), Outcome("b")])]
    after = [Row(**same, impl="recattn", goals=[Outcome("a"), Outcome("b", "missed")])]
    headline.keep_verdicts(after, before)
    assert [goal.verdict for goal in after[0].goals] == ["met", "missed"]


@WITHOUT_GPU
@pytest.mark.parametrize("module, arguments", [(gpu, ["--results", "nowhere"]), (tune_dispatch, [])])
def test_without_a_cuda_device_it_says_so(module, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(arguments)
    assert stopped.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err


# What compute-sanitizer runs


@pytest.mark.parametrize("name", SANITIZER_TARGETS)
def test_sanitizer_targets_are_valid_calls(name):
    SANITIZER_TARGETS[name]()


# The dispatch table


POINT = Point("bfloat16", 64, 1024, 0.1, False, False)


def test_the_choice_is_the_least_time_of_both_passes():
    times = {"triton": (0.1, 0.5), "correction:flash": (0.2, 0.4)}
    (row,) = tune_dispatch.measure_rows([POINT], lambda point: times, 10, now=lambda: 0.0)
    assert row == {
        "dtype": "bfloat16",
        "head_dim": 64,
        "length": 1024,
        "sink_share": 0.1,
        "causal": False,
        "packed": False,
        "choice": "correction:flash",
        "times_ms": {"triton": 0.5, "correction:flash": 0.4},
        "forward_ms": {"triton": 0.1, "correction:flash": 0.2},
    }


def test_measuring_ends_with_its_time():
    clock = iter(range(100))
    points = [POINT._replace(length=n) for n in (128, 256, 512, 1024)]
    rows = tune_dispatch.measure_rows(points, lambda point: {"triton": (1.0, 2.0)}, 3, now=lambda: next(clock))
    assert [row["length"] for row in rows] == [128, 256]


def test_a_point_that_no_path_serves_has_no_row():
    assert tune_dispatch.measure_rows([POINT], lambda point: {}, 10, now=lambda: 0.0) == []


def row(length: int, choice: str = "triton") -> dict:
    return POINT._replace(length=length)._asdict() | {"choice": choice, "times_ms": {choice: 1.0}, "forward_ms": {}}


def test_merging_keeps_other_devices_and_older_rows_of_the_same_versions():
    versions = {"torch": "2.11", "triton": "3.6"}
    other = {"torch": "2.9", "triton": "3.5", "rows": [row(64)]}
    table = {"A100": other, "H200": {**versions, "rows": [row(128), row(256)]}}
    merged = tune_dispatch.merge(table, "H200", versions, [row(512), row(256, "correction:flash")])
    assert merged["A100"] == other
    assert [(r["length"], r["choice"]) for r in merged["H200"]["rows"]] == [
        (128, "triton"),
        (256, "correction:flash"),
        (512, "triton"),
    ]
    newer = {"torch": "2.12", "triton": "3.6"}
    assert tune_dispatch.merge(table, "H200", newer, [row(512)])["H200"] == {**newer, "rows": [row(512)]}
    assert tune_dispatch.merge({}, "H200", versions, [row(512)]) == {"H200": {**versions, "rows": [row(512)]}}


def test_the_file_is_json_of_a_line_a_row():
    table = {device: {"torch": "2.11", "triton": None, "rows": [row(128), row(256)]} for device in ("A100", "H200")}
    text = tune_dispatch.to_json(table)
    assert json.loads(text) == table
    assert sum('"choice"' in line for line in text.splitlines()) == 4


def test_the_grid():
    points = tune_dispatch.grid()
    assert len(set(points)) == len(points)
    for point in points:
        workload = point.workload
        assert workload.packed == point.packed and workload.causal == point.causal
        assert workload.sinks / workload.length == pytest.approx(point.sink_share, rel=0.1)
        assert 4096 <= workload.batch * workload.length <= 2**17


def test_measures_with_the_gate_and_the_clocks_of_the_suite(monkeypatch):
    """On the CPU no path is supported, so nothing is timed."""
    monkeypatch.setattr(tune_dispatch, "TOKENS", 64)
    measure = tune_dispatch.contest_on(torch.device("cpu"), seconds=0.0)
    assert measure(Point("float32", 64, 32, 0.1, False, False)) == {}


def test_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        tune_dispatch, "contest_on", lambda device, seconds: lambda point: dict.fromkeys(PATHS, (1.0, 2.0))
    )
    environment = {"device": "a GPU", "torch": "2.11", "triton": "3.6", "commit": None}
    monkeypatch.setattr(tune_dispatch.records, "environment", lambda device: environment)
    monkeypatch.setattr(tune_dispatch, "limit_memory", lambda device: None)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(tune_dispatch.to_json({"another": {"torch": "2.9", "triton": "3.5", "rows": [row(64)]}}))
    assert tune_dispatch.main(["--table", str(old), str(new)]) == 0
    assert set(json.loads(old.read_text())) == {"a GPU", "another"}
    (entry,) = json.loads(new.read_text()).values()
    assert (entry["torch"], entry["triton"], len(entry["rows"])) == ("2.11", "3.6", len(tune_dispatch.grid()))


# The profile


def test_the_hottest_kernels_are_ours():
    times = {
        "flash_fwd_kernel": 9.0,
        "sink_attention_fwd_kernel": 2.0,
        "sink_attention_bwd_dq_kernel": 3.0,
        "inter_sink_bias_fwd_kernel": 0.5,
        "void (anonymous namespace)::mma::absorbed_attention_kernel<c10::BFloat16, 32>(Operands)": 1.0,
        "void at::native::sink<float>": 4.0,
    }
    kernels = profile.hottest(times, 3)
    assert kernels == ["sink_attention_bwd_dq_kernel", "sink_attention_fwd_kernel", "absorbed_attention_kernel"]
    command = profile.ncu_command(kernels, Path("report"), "sink_backward")
    assert command[command.index("--kernel-id") + 1] == f"::regex:^({'|'.join(kernels)})$:2"
    assert command[-2:] == ["sink_backward", "--calls"]

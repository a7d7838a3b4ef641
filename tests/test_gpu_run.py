"""`make gpu` and its parts, without a GPU: the driver with steps of its own, the dispatch table with made-up times."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_sanitizer_targets
from benchmarks import dispatch, gpu, profile
from benchmarks.dispatch import Point
from benchmarks.sink_attention import PATHS
from benchmarks.workloads import CUDA, REFINED, SINK

SANITIZER_TARGETS = dict(gpu_sanitizer_targets.cases(torch.device("cpu")))
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


# The driver


def python(name: str, code: str, seconds: float = 20, **environment: str) -> gpu.Step:
    return gpu.Step(name, (sys.executable, "-c", code), seconds, environment)


def test_goes_on_after_a_failure_and_says_so(tmp_path, capsys):
    planned = [
        [python("builds", "print('built')")],
        [python("breaks", "raise SystemExit('what went wrong')"), gpu.Step("absent", ("no-such-program",), 9)],
        [python("measures", "import os; print(os.environ['COLOUR'], 'TRITON_INTERPRET' in os.environ)", COLOUR="red")],
    ]
    outcomes = gpu.run(planned, tmp_path, seconds=60)
    statuses = {outcome.name: (outcome.status, outcome.returncode) for outcome in outcomes}
    assert statuses == {
        "builds": (gpu.PASSED, 0),
        "breaks": (gpu.FAILED, 1),
        "absent": (gpu.FAILED, 127),
        "measures": (gpu.PASSED, 0),
    }
    assert [outcome["name"] for outcome in json.loads((tmp_path / "gpu.json").read_text())] == list(statuses)
    log = (tmp_path / "gpu.log").read_text()
    assert "built" in log and "red False" in log and "no-such-program" in log
    printed = capsys.readouterr().out
    assert "what went wrong" in printed and "built" not in printed  # of those that passed, the log has the output
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.log", "gpu.json"}


def test_a_step_ends_with_its_time_and_all_with_theirs(tmp_path):
    sleep = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    started = time.monotonic()
    planned = [[python("slow", sleep, seconds=0.5), python("quick", "print(1)")], [python("slow too", sleep)]]
    outcomes = gpu.run(planned, tmp_path, seconds=2)
    assert [outcome.status for outcome in outcomes] == [gpu.OUT_OF_TIME, gpu.PASSED, gpu.OUT_OF_TIME]
    assert time.monotonic() - started < 20


def test_steps_of_a_stage_run_side_by_side(tmp_path):
    meet = """
import pathlib, sys, time
own, other = map(pathlib.Path, sys.argv[1:])
own.touch()
while not other.exists():
    time.sleep(0.01)
"""
    a, b = tmp_path / "a", tmp_path / "b"
    stage = [
        gpu.Step(own.name, (sys.executable, "-c", meet, str(own), str(other)), 30) for own, other in ((a, b), (b, a))
    ]
    assert [outcome.status for outcome in gpu.run([stage], tmp_path / "results", seconds=30)] == [gpu.PASSED] * 2


def test_told_to_end_it_ends_its_steps(tmp_path, monkeypatch):
    started = []

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        gpu, "start", lambda *arguments, start=gpu.start: started.append(start(*arguments)) or started[-1]
    )
    monkeypatch.setattr(gpu.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gpu.run([[gpu.Step("long", ("sleep", "60"), 60)]], tmp_path, seconds=60)
    assert started[0].returncode == -gpu.signal.SIGKILL


def test_a_managed_interpreter_is_explained(tmp_path, capsys):
    gpu.run([[python("build", "raise SystemExit('error: externally-managed-environment')")]], tmp_path, seconds=20)
    assert "PIP_BREAK_SYSTEM_PACKAGES=1 make gpu" in capsys.readouterr().out


def test_the_plan_fits_its_time_and_downloads_nothing(tmp_path):
    planned = gpu.stages(tmp_path, tmp_path, profile=False)
    assert gpu.SECONDS < 9 * 60
    assert sum(max(step.seconds for step in stage) for stage in planned) < 9 * 60 + 20
    names = [step.name for stage in planned for step in stage]
    assert len(set(names)) == len(names)
    assert [stage[0].name for stage in planned] == [
        "build",
        "GPU tests",
        "dispatch",
        "benchmark of sink_attention",
        "benchmark of refined_attention",
    ]
    assert "--no-index" in planned[0][0].command
    for step in planned[1] + planned[3] + planned[4]:
        if "benchmarks.run" in step.command:
            assert "--offline" in step.command
    filled = [word for step in planned[1] if step.name.startswith("compile") for word in step.command]
    assert {
        workload.name for workload in SINK + REFINED if workload.devices == CUDA and workload.tier != "full"
    } <= set(filled)
    refined = gpu.stages(tmp_path, tmp_path, profile=False, operators=["refined_attention"])
    assert [stage[0].name for stage in refined] == ["build", "GPU tests", "benchmark of refined_attention"]
    profiled = gpu.stages(tmp_path, tmp_path, profile=True)
    assert [step.name for step in profiled[-1]] == ["profile"] and len(profiled) == len(planned) + 1


def test_the_plan_names_tests_that_exist(tmp_path):
    commands = [step.command for stage in gpu.stages(tmp_path, tmp_path, profile=False) for step in stage]
    files = [Path(word) for command in commands for word in command if word.endswith(".py")]
    assert len(files) > 5
    assert [file for file in files if not file.exists()] == []


@WITHOUT_GPU
@pytest.mark.parametrize("module, arguments", [(gpu, ["--results", "nowhere"]), (dispatch, [])])
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
    (row,) = dispatch.measure_rows([POINT], lambda point: times, 10, now=lambda: 0.0)
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
    rows = dispatch.measure_rows(points, lambda point: {"triton": (1.0, 2.0)}, 3, now=lambda: next(clock))
    assert [row["length"] for row in rows] == [128, 256]


def test_a_point_that_no_path_serves_has_no_row():
    assert dispatch.measure_rows([POINT], lambda point: {}, 10, now=lambda: 0.0) == []


def row(length: int, choice: str = "triton") -> dict:
    return POINT._replace(length=length)._asdict() | {"choice": choice, "times_ms": {choice: 1.0}, "forward_ms": {}}


def test_merging_keeps_other_devices_and_older_rows_of_the_same_versions():
    versions = {"torch": "2.11", "triton": "3.6"}
    other = {"torch": "2.9", "triton": "3.5", "rows": [row(64)]}
    table = {"A100": other, "H200": {**versions, "rows": [row(128), row(256)]}}
    merged = dispatch.merge(table, "H200", versions, [row(512), row(256, "correction:flash")])
    assert merged["A100"] == other
    assert [(r["length"], r["choice"]) for r in merged["H200"]["rows"]] == [
        (128, "triton"),
        (256, "correction:flash"),
        (512, "triton"),
    ]
    newer = {"torch": "2.12", "triton": "3.6"}
    assert dispatch.merge(table, "H200", newer, [row(512)])["H200"] == {**newer, "rows": [row(512)]}
    assert dispatch.merge({}, "H200", versions, [row(512)]) == {"H200": {**versions, "rows": [row(512)]}}


def test_the_file_is_json_of_a_line_a_row():
    table = {device: {"torch": "2.11", "triton": None, "rows": [row(128), row(256)]} for device in ("A100", "H200")}
    text = dispatch.to_json(table)
    assert json.loads(text) == table
    assert sum('"choice"' in line for line in text.splitlines()) == 4


def test_the_grid():
    points = dispatch.grid()
    assert len(set(points)) == len(points)
    for point in points:
        workload = point.workload
        assert workload.packed == point.packed and workload.causal == point.causal
        assert workload.sinks / workload.length == pytest.approx(point.sink_share, rel=0.1)
        assert 4096 <= workload.batch * workload.length <= 2**17


def test_measures_with_the_gate_and_the_clocks_of_the_suite(monkeypatch):
    """On the CPU every path is refused, and so none is timed."""
    monkeypatch.setattr(dispatch, "TOKENS", 64)
    measure = dispatch.contest_on(torch.device("cpu"), seconds=0.0)
    assert measure(Point("float32", 64, 32, 0.1, False, False)) == {}


def test_writes_what_it_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "contest_on", lambda device, seconds: lambda point: dict.fromkeys(PATHS, (1.0, 2.0)))
    environment = {"device": "a GPU", "torch": "2.11", "triton": "3.6", "commit": None}
    monkeypatch.setattr(dispatch.results, "environment", lambda device: environment)
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(dispatch.to_json({"another": {"torch": "2.9", "triton": "3.5", "rows": [row(64)]}}))
    assert dispatch.main(["--table", str(old), str(new)]) == 0
    assert set(json.loads(old.read_text())) == {"a GPU", "another"}
    (entry,) = json.loads(new.read_text()).values()
    assert (entry["torch"], entry["triton"], len(entry["rows"])) == ("2.11", "3.6", len(dispatch.grid()))


# The profile


def test_the_hottest_kernels_are_ours():
    times = [
        ("flash_fwd_kernel", 9.0),
        ("sink_attention_fwd_kernel", 2.0),
        ("sink_attention_bwd_dq_kernel", 3.0),
        ("inter_sink_bias_fwd_kernel", 0.5),
        ("sink_attention_pairs_bwd_kernel", 1.0),
        ("void at::native::sink<float>", 4.0),
    ]
    kernels = profile.hottest(times, 3)
    assert kernels == ["sink_attention_bwd_dq_kernel", "sink_attention_fwd_kernel", "sink_attention_pairs_bwd_kernel"]
    command = profile.ncu_command(kernels, Path("report"), "headline", ["recattn triton"])
    assert command[command.index("--kernel-id") + 1] == f"::regex:^({'|'.join(kernels)})$:2"
    assert command[-5:] == ["--workload", "headline", "--impl", "recattn triton", "--calls"]

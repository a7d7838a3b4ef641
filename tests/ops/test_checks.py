"""`python -m recattn check`: planted faults are told apart, and the operators of this device pass."""

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from multiprocessing.util import Finalize

import pytest
import torch

import recattn
from recattn import __main__ as command_line
from recattn import _environment
from recattn.checks import command, report, supervisor, worker
from recattn.checks.cases import OPERATORS, Case, Operator
from recattn.checks.worker import CANNOT_RUN, CRASHED, FAILED, HUNG, PASSED, RAISED, Row
from recattn.testing import Error

# An operator whose implementations are right, wrong, and worse. Its processes import this file.


def double(x):
    return 2 * x


def planted(x, impl):
    if len(x) == 2:  # only the second case
        misbehave(impl)
    if impl == "refuses" or (impl == "refuses one" and len(x) == 2):
        raise NotImplementedError("planted cannot run impl='refuses' here: it never does")
    return 2 * x + {"is wrong": 1e-3, "is NaN": float("nan")}.get(impl, 0.0) * x.detach()


def misbehave(impl):
    if impl == "hangs":
        re.match(r"(a+)+$", "a" * 64 + "b")  # keeps the interpreter's lock for ever
    if impl == "does not leave":
        Finalize(None, time.sleep, args=(60,), exitpriority=1)
    if impl == "is stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if impl == "crashes":
        faulthandler._sigsegv()
    if impl == "exits":
        print("what it said", flush=True)
        sys.exit(3)
    if impl == "raises":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
    if impl == "poisons":
        worker.lost_device = lambda device: True  # as after an illegal memory access: nothing works any more
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def planted_cases(device, dtype):
    return [
        Case("one", lambda dtype: {"x": torch.randn(1, dtype=dtype)}, ["x"]),
        Case("two", lambda dtype: {"x": torch.randn(2, dtype=dtype)}),
    ]


def no_cases(device, dtype):
    raise ValueError("the cases cannot be drawn")


def planted_operator(*implementations, cases=planted_cases):
    return Operator("planted", planted, double, Choice(implementations), cases)


class Choice:
    def __init__(self, implementations):
        self.implementations = implementations

    def __call__(self, device):
        return {impl: "it is not built" if impl == "is missing" else None for impl in self.implementations}


def run(operator, **options):
    return {row.implementation: row for row in supervisor.run([operator], "cpu", quick=True, **options)}


# A process and its supervisor


def test_what_goes_wrong_is_told_apart():
    bad = ("is wrong", "is NaN", "crashes", "exits", "raises", "poisons", "refuses", "refuses one", "is missing")
    rows = run(planted_operator("is right", *bad, "is last"), timeout=30)
    assert {impl: row.status for impl, row in rows.items()} == {
        "is missing": CANNOT_RUN,
        "is right": PASSED,
        "is wrong": FAILED,
        "is NaN": FAILED,
        "crashes": CRASHED,
        "exits": CRASHED,
        "raises": RAISED,
        "poisons": CRASHED,
        "refuses": CANNOT_RUN,
        "refuses one": PASSED,
        "is last": PASSED,
    }
    assert rows["is right"].worst < 1 < rows["is wrong"].worst
    assert re.fullmatch("(one|two): output", rows["is wrong"].where)
    assert rows["is NaN"].worst != rows["is NaN"].worst
    assert rows["crashes"].reason.startswith("ended by SIGSEGV, in misbehave (test_checks.py:")
    assert "Segmentation fault" in rows["crashes"].output
    assert (rows["exits"].reason, rows["exits"].output) == ("ended with exit status 3", "what it said")
    assert rows["raises"].reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 1 TiB"
    assert rows["poisons"].reason == "RuntimeError: CUDA error: an illegal memory access was encountered"
    for impl in ("crashes", "exits", "raises", "poisons"):
        assert rows[impl].where == "two"
    assert rows["refuses"].reason == "planted cannot run impl='refuses' here: it never does"
    assert rows["is missing"].reason == "it is not built"
    assert [result.refused is None for result in rows["refuses one"].cases] == [True, False]


def test_a_hang_costs_its_time_and_one_row():
    started = time.monotonic()
    rows = run(planted_operator("hangs", "is right"), timeout=3)
    assert [row.status for row in rows.values()] == [HUNG, PASSED]
    assert (rows["hangs"].where, rows["hangs"].output.splitlines()[0]) == ("two", "Timeout (0:00:03)!")
    assert re.fullmatch(r"no answer within 3 s, in match \(.*\.py:\d+\)", rows["hangs"].reason)
    assert time.monotonic() - started < 30


def test_a_process_that_cannot_end_itself_is_ended(monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE", 0.2)
    rows = run(planted_operator("is stopped", "is right"), timeout=3)
    assert [row.status for row in rows.values()] == [HUNG, PASSED]
    assert rows["is stopped"].reason == "no answer within 3 s"


def test_a_process_that_does_not_leave_is_ended(monkeypatch):
    monkeypatch.setattr(supervisor, "GRACE", 0.2)
    rows = run(planted_operator("does not leave"), timeout=3)
    assert [row.status for row in rows.values()] == [PASSED]


def test_a_process_that_does_not_come_to_its_first_case():
    rows = run(planted_operator("is right", "is wrong", cases=no_cases))
    assert [(row.status, row.where) for row in rows.values()] == [(CRASHED, "before its first case")] * 2
    assert "the cases cannot be drawn" in rows["is right"].output


def test_processes_side_by_side_and_their_files(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor.tempfile, "tempdir", str(tmp_path))
    operators = [replace(planted_operator("is right"), name=f"planted {i}") for i in range(3)]
    rows = list(supervisor.run(operators, "cpu", jobs=2))
    assert sorted((row.operator, row.dtype) for row in rows) == sorted(
        (operator.name, dtype) for operator in operators for dtype in ("float32", "bfloat16", "float16")
    )
    assert {row.status for row in rows} == {PASSED}
    assert list(tmp_path.iterdir()) == []


def test_processes_end_with_the_run():
    rows = supervisor.run([planted_operator("is right", "hangs")], "cpu", timeout=600)
    assert next(rows).status == PASSED
    (process,) = supervisor.multiprocessing.active_children()
    rows.close()
    assert not process.is_alive()


def test_a_run_interrupted_before_its_process_has_begun_leaves_no_file(monkeypatch, tmp_path):
    """Ctrl-C while PyTorch is imported for the first process."""
    monkeypatch.setattr(supervisor.tempfile, "tempdir", str(tmp_path))

    def interrupt(_):
        assert len(list(tmp_path.rglob("*.log"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(supervisor.ForkServerContext.Process, "start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(supervisor.run([planted_operator("is right")], "cpu"))
    assert list(tmp_path.iterdir()) == []


def test_what_processes_are_forked_from_does_not_touch_cuda():
    """PyTorch refuses CUDA in a process whose parent has even counted the devices."""
    code = f"""
import torch

def touched(*_):
    raise AssertionError("CUDA was touched")

torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
torch._C._cuda_getDeviceCount = touched
for name in {("recattn.checks.worker", *supervisor.SLOW_IMPORTS)!r}:
    __import__(name)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


# Real operators


def slightly_off(*arguments, **options):
    return recattn.lrea_absorbed_attention(*arguments, **options) * 1.001


def test_a_wrong_kernel_of_a_real_operator_fails():
    absorbed = OPERATORS["lrea_absorbed_attention"]
    rows = run(replace(absorbed, function=slightly_off, implementations=Choice(["reference"])))
    assert rows["reference"].status == FAILED and rows["reference"].worst > 10


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_is_a_valid_call(name, device):
    """By the reference, for the cases of both devices; those of a GPU's lengths in one dtype."""
    operator = replace(OPERATORS[name], cases=lambda _, dtype: quick(OPERATORS[name].cases(device, dtype), dtype))
    for dtype in (torch.float32, torch.bfloat16):
        job = worker.Job(operator, dtype, "cpu", ("reference",), False, 60.0)
        row = worker.check(job, "reference", {}, lambda case: None)
        assert (row.status, row.reason) == (PASSED, "")
        assert [result.refused for result in row.cases] == [None] * len(job.cases)


def quick(cases, dtype):
    slow = ("real",) if dtype == torch.float32 else ("real", "long", "sorted")
    return [case for case in cases if case.name not in slow]


def test_a_correction_is_checked_with_every_backend():
    names = OPERATORS["sink_attention"].implementations("cuda")
    assert {"triton", "correction:cudnn", "correction:flash", "correction:efficient"} <= set(names)


# The command


def check(capsys, *arguments):
    code = run_command("check", *arguments)
    return code, capsys.readouterr()


def run_command(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["recattn", *map(str, arguments)])
        return command_line.main()


def test_passes_here(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    file = tmp_path / "deep" / "check.json"
    code, printed = check(
        capsys, "--device", "cpu", "--quick", "--op", "lrea_compress", "lrea_absorbed_attention", "--json", file
    )
    assert code == 0 and os.environ["TRITON_INTERPRET"] == "1"
    *_, last = printed.out.splitlines()
    assert re.fullmatch(r"2 passed, 2 cannot run; \d+ s", last)  # Triton's is not interpreted
    assert printed.out.startswith(f"recattn {recattn.__version__}, torch {torch.__version__}, ")
    found = json.loads(file.read_text())
    assert found["finished"] and found["quick"]
    versions = {"recattn", "commit", "torch", "cuda", "cudnn", "driver", "triton", "device", "compute_capability"}
    assert versions <= found["environment"].keys()
    passed = [row for row in found["rows"] if row["status"] == PASSED]
    assert [(row["operator"], row["dtype"]) for row in passed] == [
        ("lrea_compress", "float32"),
        ("lrea_absorbed_attention", "float32"),
    ]
    for row in passed:
        assert all(case["errors"][0]["max"] <= case["errors"][0]["max_bound"] for case in row["cases"])


def test_says_what_went_wrong(capsys, tmp_path, monkeypatch):
    operator = planted_operator("is right", "is wrong", "crashes", "hangs", "is NaN")
    monkeypatch.setattr(command, "OPERATORS", {"planted": operator})
    file = tmp_path / "check.json"
    code, printed = check(capsys, "--device", "cpu", "--quick", "--timeout", "3", "--json", file)
    assert code == 1
    table = [line.split()[:5] for line in printed.out.splitlines() if line.startswith("planted  ")]
    assert [" ".join(words) for words in table] == [
        "planted is right float32 passed",
        "planted is wrong float32 failed",
        "planted crashes float32 crashed two:",
        "planted hangs float32 hung two:",
        "planted is NaN float32 failed",
    ]
    assert "planted impl='is wrong' float32: failed" in printed.out
    assert "FAIL output: max" in printed.out
    assert "planted impl='crashes' float32: crashed, two: ended by SIGSEGV" in printed.out
    assert "Fatal Python error: Segmentation fault" in printed.out
    assert printed.out.splitlines()[-1].startswith("1 passed, 2 failed, 1 crashed, 1 hung; ")
    rows = {row["implementation"]: row for row in json.loads(file.read_text())["rows"]}
    assert rows["is NaN"]["worst"] == "nan"


def test_the_file_has_the_rows_so_far_when_it_is_interrupted(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "OPERATORS", {"planted": planted_operator("is right", "is wrong")})
    file = tmp_path / "check.json"
    seen = []

    def interrupt(rows):
        yield next(rows)
        seen.append(json.loads(file.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "shown", interrupt)
    code, printed = check(capsys, "--device", "cpu", "--quick", "--json", file)
    assert code == 130 and printed.out.splitlines()[-1].startswith("1 passed; ")
    (found,) = seen
    assert not found["finished"] and [row["status"] for row in found["rows"]] == [PASSED]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--device", "meta"], "must be cpu, cuda or cuda:N, got meta"),
        (["--device", "gpu"], "must be cpu, cuda or cuda:N, got gpu"),
        (["--device", "cuda:99"], "CUDA devices here, got cuda:99"),
        (["--op", "attention"], "invalid choice: 'attention'"),
        (["--timeout", "0"], "must be a positive number, got '0'"),
        (["--jobs", "two"], "must be a positive integer, got 'two'"),
    ],
)
def test_a_request_that_cannot_be_met(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_command("check", *arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


# What only a GPU would run


@pytest.fixture
def made_up_gpu(monkeypatch):
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_device_capability": (9, 0),
        "mem_get_info": (70 * 2**30, 80 * 2**30),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(_environment, "_printed", lambda *command: {"nvidia-smi": "580.65.06"}.get(command[0]))


def test_the_command_takes_the_gpu(made_up_gpu, monkeypatch, tmp_path, capsys):
    asked = []

    def run(operators, device, **options):
        asked.append((len(operators), device, options["jobs"] >= 1))
        return iter(ROWS)

    monkeypatch.setattr(command, "run", run)
    code, printed = check(capsys, "--json", tmp_path / "check.json")
    assert code == 1 and asked == [(len(OPERATORS), "cuda", True)]
    assert re.search("NVIDIA H100 80GB HBM3, compute_capability 9.0, .*driver 580.65.06", printed.out)
    environment = json.loads((tmp_path / "check.json").read_text())["environment"]
    assert (environment["driver"], environment["compute_capability"]) == ("580.65.06", "9.0")
    assert command._device("cuda:0") == torch.device("cuda:0")


@pytest.mark.parametrize("free, cores, jobs", [(70, 16, 8), (70, 4, 2), (9, 16, 2), (1, 16, 1), (70, 1, 1)])
def test_processes_at_a_time(made_up_gpu, monkeypatch, free, cores, jobs):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free * 2**30, 80 * 2**30))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert command._jobs(torch.device("cuda")) == jobs
    assert command._jobs(torch.device("cpu")) == 1


def test_a_cuda_error_that_sticks(monkeypatch):
    def synchronize(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert not worker.lost_device("cpu")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not worker.lost_device("cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert worker.lost_device("cuda")


# The table


ROWS = [
    Row("an_operator", "triton", "bfloat16", PASSED, worst=0.25, where="real: dq"),
    Row("an_operator", "cpu", "", CANNOT_RUN, reason="the tensors are on cuda"),
    Row("an_operator", "triton", "float32", CRASHED, where="odd", reason="ended by SIGSEGV"),
]


def test_plain_lines_without_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert list(report.shown(iter(ROWS))) == ROWS
    assert [line.split() for line in capsys.readouterr().out.splitlines()[1:]] == [
        ["an_operator", "triton", "bfloat16", "passed", "0.25", "real:", "dq"],
        ["an_operator", "cpu", "any", "cannot", "run", "the", "tensors", "are", "on", "cuda"],
        ["an_operator", "triton", "float32", "crashed", "odd:", "ended", "by", "SIGSEGV"],
    ]


def test_a_table_on_a_terminal(capsys):
    console = pytest.importorskip("rich.console").Console(force_terminal=True, width=120)
    assert list(report._as_table(iter(ROWS), console)) == ROWS
    printed = capsys.readouterr().out
    assert "real: dq" in printed and "\x1b[1;31m" in printed  # bold red


def test_the_heading_of_a_gpu():
    environment = {
        "recattn": "0.1.0",
        "torch": "2.11",
        "triton": None,
        "device": "NVIDIA H100",
        "compute_capability": "9.0",
        "driver": "580.1",
    }
    assert report.heading(environment) == (
        "recattn 0.1.0, torch 2.11, commit unknown\nNVIDIA H100, compute_capability 9.0, driver 580.1"
    )


def test_the_share_of_a_bound():
    assert Error("output", 1.0, 4.0, 1.0, 2.0).share == 0.5
    assert Error("output", 0.0, 0.0, 0.0, 0.0).share == 0.0
    assert Error("output", 1.0, 0.0, 0.0, 1.0).share == float("inf")
    nan = float("nan")
    assert Error("output", nan, 1.0, 0.0, 1.0).share != Error("output", nan, 1.0, 0.0, 1.0).share

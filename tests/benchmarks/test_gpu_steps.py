"""The runner of `make gpu`, rehearsed with steps that hang, crash, poison, run out of memory and overrun."""

import io
import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.tools import gpu, steps
from benchmarks.tools.steps import FAILED, NOT_STARTED, OUT_OF_TIME, PASSED, ROOT, Stage, Step

NAME = "rehearsal"


@pytest.fixture(autouse=True)
def little_grace(monkeypatch):
    monkeypatch.setattr(steps, "ENDING", ((0.0, signal.SIGINT), (0.4, signal.SIGABRT), (0.8, signal.SIGKILL)))
    monkeypatch.setattr(steps, "LEFT_BEHIND", 1.2)


def python(name: str, code: str, **options) -> Step:
    return Step(name, (sys.executable, "-S", "-c", code), **options)


def run(folder: Path, *plan: Stage) -> dict[str, steps.Outcome]:
    return {outcome.step: outcome for outcome in steps.run(plan, folder / "work", folder / "results", NAME)}


def log(folder: Path, name: str) -> str:
    return unpacked(folder / "results")[f"{NAME}/logs/{name}.log"]


def unpacked(results: Path) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO((results / f"{NAME}-results.tar.gz").read_bytes())) as archive:
        return {entry.name: archive.extractfile(entry).read().decode() for entry in archive}


AFTER = python("after", "print('goes on')")


def test_goes_on_after_a_failure_and_says_so(tmp_path, capsys):
    outcomes = run(
        tmp_path,
        Stage(20, [python("builds", "print('built')")]),
        Stage(20, [python("breaks", "raise SystemExit('what went wrong')"), Step("absent", ("no-such-program",))]),
        Stage(20, [python("measures", "import os; print(os.environ['COLOUR'])", environment={"COLOUR": "red"})]),
    )
    assert {name: (outcome.status, outcome.returncode) for name, outcome in outcomes.items()} == {
        "builds": (PASSED, 0),
        "breaks": (FAILED, 1),
        "absent": (FAILED, 127),
        "measures": (PASSED, 0),
    }
    assert "no-such-program" in log(tmp_path, "absent") and log(tmp_path, "measures") == "red\n"
    printed = capsys.readouterr().out
    assert "what went wrong" in printed and "\nbuilt" not in printed  # of those that passed, the archive has the output


def test_kernels_are_never_interpreted(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    run(tmp_path, Stage(20, [python("step", "import os; print('TRITON_INTERPRET' in os.environ)")]))
    assert log(tmp_path, "step") == "False\n"


HANGS = """
import signal, subprocess, sys, time
for number in {ignored}:
    signal.signal(number, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "30"])
print("child", child.pid)
def stuck():
    time.sleep(30)
stuck()
"""


@pytest.mark.parametrize("ignored", ["(2,)", "(2, 6)"], ids=["SIGINT ignored", "SIGABRT too"])
def test_one_that_hangs(tmp_path, ignored):
    outcomes = run(tmp_path, Stage(0.5, [python("hangs", HANGS.format(ignored=ignored))]), Stage(5, [AFTER]))
    assert (outcomes["hangs"].status, outcomes["after"].status) == (OUT_OF_TIME, PASSED)
    assert outcomes["hangs"].seconds < 10
    printed = log(tmp_path, "hangs")
    assert ("in stuck" in printed) == (ignored == "(2,)")  # by faulthandler, on SIGABRT
    assert not alive(int(printed.split()[1]))


def alive(pid: int) -> bool:
    """A zombie, which nobody waits for, does not count as alive."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_what_a_step_leaves_running_is_ended(tmp_path):
    code = "import subprocess; print('child', subprocess.Popen(['sleep', '30']).pid)"
    outcomes = run(tmp_path, Stage(10, [python("leaves", code)]))
    assert outcomes["leaves"].status == PASSED
    child, deadline = int(log(tmp_path, "leaves").split()[1]), time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(child)


class InTheDriver:
    """A process that no signal can end."""

    pid, returncode = 0, None

    def __init__(self, *arguments, **options):
        pass

    def poll(self):
        return None


def test_one_that_is_stuck_in_the_driver_is_left_behind(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(steps.os, "killpg", lambda pid, number: sent.append(number))
    with monkeypatch.context() as patched:
        patched.setattr(steps.subprocess, "Popen", InTheDriver)
        outcomes = run(tmp_path, Stage(0.1, [python("stuck", "")]))
    assert outcomes["stuck"].status == OUT_OF_TIME and outcomes["stuck"].seconds < 5
    assert sent[:3] == [signal.SIGINT, signal.SIGABRT, signal.SIGKILL]


def test_one_that_dies_by_sigsegv(tmp_path, capsys):
    code = "import ctypes\ndef reads_null():\n    ctypes.string_at(0)\nreads_null()"
    outcomes = run(tmp_path, Stage(10, [python("crashes", code)]), Stage(10, [AFTER]))
    assert (outcomes["crashes"].returncode, outcomes["after"].status) == (-signal.SIGSEGV, PASSED)
    assert "Segmentation fault" in log(tmp_path, "crashes") and "in reads_null" in log(tmp_path, "crashes")
    assert "crashes: failed by SIGSEGV" in capsys.readouterr().out


POISONS = """
import sys
lost = False
def call(i):
    global lost
    lost = lost or i == int(sys.argv[1])
    print(f"call {i}:", "an illegal memory access" if lost else "fine")
    return lost
sys.exit(any([call(i) for i in range(3)]))
"""


def test_one_that_poisons_its_context(tmp_path):
    """Later calls in the same process fail; the next step, a new process, works."""
    planned = [
        Stage(10, [Step(name, (sys.executable, "-S", "-c", POISONS, at))])
        for name, at in (("poisons", "1"), ("next", "9"))
    ]
    outcomes = run(tmp_path, *planned)
    assert (outcomes["poisons"].status, outcomes["next"].status) == (FAILED, PASSED)
    assert log(tmp_path, "poisons").count("illegal") == 2 and log(tmp_path, "next").count("fine") == 3


def test_one_that_runs_out_of_memory(tmp_path):
    """The step raises, or the system kills it. Either way only that step is lost, and its output so far is kept."""
    raises = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30)); print('began'); bytearray(2**40)"
    killed = "import os; print('began'); os.kill(os.getpid(), 9)"
    outcomes = run(
        tmp_path, Stage(10, [python("raises", raises)]), Stage(10, [python("killed", killed)]), Stage(9, [AFTER])
    )
    assert [outcome.returncode for outcome in outcomes.values()] == [1, -signal.SIGKILL, 0]
    assert "MemoryError" in log(tmp_path, "raises") and "began" in log(tmp_path, "killed")


OVERRUNS = """
import json, pathlib, sys, time
rows = pathlib.Path(sys.argv[1], "rows.jsonl").open("w")
try:
    for i in range(1000):
        print(json.dumps({"row": i}), file=rows, flush=True)
        time.sleep(0.05)
except KeyboardInterrupt:
    print("interrupted after", i)
"""


def test_one_that_overruns_ends_by_itself_and_keeps_what_it_had(tmp_path):
    step = Step("overruns", (sys.executable, "-S", "-c", OVERRUNS, str(tmp_path / "work")))
    outcomes = run(tmp_path, Stage(0.5, [step]))
    assert outcomes["overruns"].status == OUT_OF_TIME and "interrupted after" in log(tmp_path, "overruns")
    lines = [json.loads(line) for line in (tmp_path / "results" / f"{NAME}.jsonl").read_text().splitlines()]
    assert {"row": 0} in lines and {"step": "overruns", "status": OUT_OF_TIME}.items() <= lines[-1].items()


def test_tests_that_overrun_name_the_test_and_report_those_before(tmp_path, monkeypatch):
    """The time is up once faulthandler has printed where the slow test is."""
    sleep, running = time.sleep, []

    class Watched(steps.Running):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            running.append(self)

    def until_it_is_slow(seconds):
        sleep(seconds)
        if running and "Timeout (0:00:00.2" in running[0].output():
            running.pop().due = time.monotonic()

    monkeypatch.setattr(steps, "Running", Watched)
    monkeypatch.setattr(steps.time, "sleep", until_it_is_slow)
    monkeypatch.setattr(steps, "ENDING", ((0.0, signal.SIGINT), (30.0, signal.SIGKILL)))
    monkeypatch.setattr(steps, "LEFT_BEHIND", 60.0)
    file = tmp_path / "test_slow.py"
    file.write_text(
        "import time\ndef test_quick(): pass\ndef test_wrong(): assert 0\ndef test_slow():\n    time.sleep(60)\n"
    )
    *command, _ = gpu.run_tests("test_any.py", "not gpu").command
    command[command.index("faulthandler_timeout=40")] = "faulthandler_timeout=0.2"
    run(tmp_path, Stage(60, [Step("tests", (*command, str(file)), {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"})]))
    printed = log(tmp_path, "tests")
    assert "in test_slow" in printed  # so faulthandler
    assert "test_slow.py::test_slow" in printed and "KeyboardInterrupt" in printed
    assert "1 failed, 1 passed" in printed and "def test_wrong" in printed


def test_time_left_goes_to_later_stages(tmp_path):
    sleeps = python("sleeps", "import time; time.sleep(0.5)")
    outcomes = run(tmp_path, Stage(4, [AFTER]), Stage(0.1, [sleeps]))
    assert outcomes["sleeps"].status == PASSED


def test_a_step_has_limits_of_its_own_and_is_not_begun_in_vain(tmp_path):
    slow = python("slow", "import time; time.sleep(60)", at_most=0.3)
    long = python("long", "print(1)", at_least=30)
    outcomes = run(tmp_path, Stage(10, [slow, long, AFTER]))
    assert [outcome.status for outcome in outcomes.values()] == [OUT_OF_TIME, NOT_STARTED, PASSED]


MEETS = """
import pathlib, sys, time
own, other = map(pathlib.Path, sys.argv[1:])
own.touch()
while not other.exists():
    time.sleep(0.01)
print("met")
"""


def test_steps_side_by_side_and_what_they_print_as_it_comes(tmp_path, capsys):
    a, b = tmp_path / "a", tmp_path / "b"
    beside = [
        Step(own.name, (sys.executable, "-S", "-c", MEETS, str(own), str(other)), shown=True)
        for own, other in ((a, b), (b, a))
    ]
    outcomes = run(tmp_path, Stage(20, beside, together=True))
    assert [outcome.status for outcome in outcomes.values()] == [PASSED] * 2
    printed = capsys.readouterr().out
    assert printed.index("a | met") < printed.index("a: passed") and "b | met" in printed


def test_told_to_end_it_ends_its_steps_and_keeps_what_they_left(tmp_path, monkeypatch):
    pid = tmp_path / "pid"
    code = f"import os, time; print('began'); open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    sleep, told = time.sleep, []

    def until_it_runs(seconds):
        sleep(seconds)
        if pid.exists() and pid.read_text() and not told:
            told.append(True)
            raise SystemExit(1)

    monkeypatch.setattr(steps.time, "sleep", until_it_runs)
    with pytest.raises(SystemExit):
        run(tmp_path, Stage(60, [python("long", code)]))
    assert not alive(int(pid.read_text()))
    assert "began" in log(tmp_path, "long") and "KeyboardInterrupt" in log(tmp_path, "long")


def test_the_archive_has_every_step_that_is_over(tmp_path):
    """Even if the runner is killed: the second step finds the first one's output in the results folder."""
    archive = tmp_path / "results" / f"{NAME}-results.tar.gz"
    code = f"import tarfile; print(tarfile.open({str(archive)!r}).getnames())"
    run(tmp_path, Stage(10, [AFTER]), Stage(10, [Step("looks", (sys.executable, "-c", code))]))
    assert f"{NAME}/logs/after.log" in log(tmp_path, "looks")


def test_killed_in_the_middle_its_results_are_those_so_far(tmp_path):
    code = f"""
import sys
from pathlib import Path
from benchmarks.tools.steps import Stage, Step, run
stages = [Stage(20, [Step(name, command)]) for name, command in (("echo", ("echo", "done")), ("sleep", ("sleep", "3")))]
run(stages, Path(sys.argv[1], "work"), Path(sys.argv[1], "results"), "{NAME}")
"""
    runner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while "sleep: started" not in runner.stdout.readline():
        assert runner.poll() is None
    runner.kill()
    runner.communicate()
    results = tmp_path / "results"
    assert unpacked(results)[f"{NAME}/logs/echo.log"] == "done\n"
    assert json.loads((results / f"{NAME}.jsonl").read_text())["step"] == "echo"
    assert {path.name for path in results.iterdir()} == {f"{NAME}.jsonl", f"{NAME}-results.tar.gz"}


def test_two_files_a_command_whatever_the_steps_leave(tmp_path):
    """At most eight files can be copied back, from at most two folders deep."""
    code = "import os, sys; os.makedirs(sys.argv[1]); [open(f'{sys.argv[1]}/{i}.json', 'w') for i in range(20)]"
    for name in ("gpu", "gpu-bench"):
        work = tmp_path / name
        step = Step("leaves", (sys.executable, "-S", "-c", code, str(work / "a" / "b" / "c")))
        steps.run([Stage(10, [step])], work, tmp_path / "results", name)
    files = [path for path in (tmp_path / "results").rglob("*")]
    assert sorted(path.name for path in files) == [
        "gpu-bench-results.tar.gz",
        "gpu-bench.jsonl",
        "gpu-results.tar.gz",
        "gpu.jsonl",
    ]


def test_a_file_that_a_running_step_takes_away_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    (tmp_path / "there.json").write_text("{}")
    assert [path.name for path, _ in steps.contents(tmp_path)] == ["there.json"]

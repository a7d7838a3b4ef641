"""Runs a plan of steps, each a process with a limit of time, and keeps what they leave after every one of them.

A step that hangs, dies or poisons its CUDA context costs itself. One that is late is asked to end (SIGINT), then made
to say where it stands (SIGABRT, on which faulthandler prints every thread's traceback), then killed; one that not even
that ends, stuck in a driver, is left behind.
"""

import io
import json
import math
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks import ROOT

PASSED, FAILED, OUT_OF_TIME, NOT_STARTED = "passed", "failed", "out of time", "not started"
# Seconds after its time is up that a step is sent each signal, and that it is waited for no longer.
GRACE = 5.0
ENDING = ((0.0, signal.SIGINT), (GRACE, signal.SIGABRT), (GRACE + 1, signal.SIGKILL))
LEFT_BEHIND = GRACE + 3
SHOWN_LINES = 25  # of a failed step's output; the archive has all
TICK = 0.05


@dataclass(frozen=True, eq=False)
class Step:
    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    shown: bool = False  # its output is printed as it comes
    at_least: float = 0.0  # seconds, without which it is not started
    at_most: float = math.inf


@dataclass(frozen=True)
class Stage:
    """Steps one after another, or side by side. To its seconds comes what the stages before have left of theirs."""

    seconds: float
    steps: Sequence[Step]
    together: bool = False


@dataclass(frozen=True)
class Outcome:
    step: str
    status: str
    seconds: float
    returncode: int | None  # None: it was ended, or never started

    def __str__(self) -> str:
        killed_by = f" by {signal.Signals(-self.returncode).name}" if (self.returncode or 0) < 0 else ""
        return f"{self.step}: {self.status}{killed_by}, {self.seconds} s"


class Running:
    """A step's process, at the head of a group of its own, its output in a file."""

    def __init__(self, step: Step, log: Path, deadline: float) -> None:
        self.step, self.started, self.signals_sent, self.printed = step, time.monotonic(), 0, 0
        self.due, self.log = min(self.started + step.at_most, deadline), log
        with log.open("w") as output:
            try:
                self.process = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env=environment() | step.environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self.process = None
                output.write(f"{error}\n")

    def outcome(self) -> Outcome | None:
        """None while it runs. What is due to end gets the next signal."""
        late = time.monotonic() - self.due
        returncode = 127 if self.process is None else self.process.poll()
        if returncode is None and late < LEFT_BEHIND:
            while self.signals_sent < len(ENDING) and late >= ENDING[self.signals_sent][0]:
                self.signal(ENDING[self.signals_sent][1])
                self.signals_sent += 1
            return None
        self.signal(signal.SIGKILL)  # what it started and left
        ended = self.signals_sent > 0
        status = OUT_OF_TIME if ended else PASSED if returncode == 0 else FAILED
        seconds = round(time.monotonic() - self.started, 1)
        return Outcome(self.step.name, status, seconds, None if ended else returncode)

    def signal(self, number: int) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def show(self, prefix: str) -> None:
        """The whole lines that came since."""
        new = self.output()[self.printed :]
        whole = new[: new.rfind("\n") + 1]
        self.printed += len(whole)
        for line in whole.splitlines():
            print(prefix + line, flush=True)


def environment() -> dict[str, str]:
    """Kernels are compiled, never interpreted; who dies says where, and what is printed is not held back."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return own | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}


def run(plan: Sequence[Stage], work: Path, results: Path, name: str) -> list[Outcome]:
    """Every stage, whatever became of those before. What the steps write into `work` is kept in `results`."""
    outcomes: list[Outcome] = []
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def ended(outcome: Outcome) -> None:
        outcomes.append(outcome)
        with (work / "steps.jsonl").open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        keep(work, results, name)

    deadline = time.monotonic()
    for stage in plan:
        deadline += stage.seconds
        for steps in [stage.steps] if stage.together else [[step] for step in stage.steps]:
            run_together(steps, logs, deadline, ended)
    return outcomes


def run_together(steps: Sequence[Step], logs: Path, deadline: float, ended: Callable[[Outcome], None]) -> None:
    """The steps side by side, each until it ends or its time does. Interrupted, it ends them first."""
    running: list[Running] = []
    try:
        for step in steps:
            if deadline - time.monotonic() <= step.at_least:
                report(Outcome(step.name, NOT_STARTED, 0.0, None), "", ended)
            else:
                print(f"{step.name}: started", flush=True)
                running.append(Running(step, logs / f"{step.name}.log", deadline))
        look_after(running, ended)
    except BaseException:
        for one in running:
            one.due = min(one.due, time.monotonic())
        look_after(running, ended)
        raise


def look_after(running: list[Running], ended: Callable[[Outcome], None]) -> None:
    """Until all have ended; each leaves the list when it has."""
    side_by_side = len(running) > 1
    while running:
        for one in list(running):
            outcome = one.outcome()
            if one.step.shown:
                one.show(f"{one.step.name} | " if side_by_side else "")
            if outcome is not None:
                running.remove(one)
                report(outcome, "" if one.step.shown else one.output(), ended)
        time.sleep(TICK)


def report(outcome: Outcome, unseen: str, ended: Callable[[Outcome], None]) -> None:
    print(outcome, flush=True)
    if outcome.status != PASSED:
        for line in unseen.splitlines()[-SHOWN_LINES:]:
            print(line, flush=True)
    ended(outcome)


def keep(work: Path, results: Path, name: str) -> None:
    """All of `work` as one archive, and its JSON lines in one file beside it. Each is replaced whole."""
    results.mkdir(parents=True, exist_ok=True)
    lines = b"".join(content for path, content in contents(work) if path.suffix == ".jsonl")
    replace(results / f"{name}.jsonl", lines)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path, content in contents(work):
            entry = tarfile.TarInfo(f"{name}/{path.relative_to(work)}")
            entry.size, entry.mtime = len(content), time.time()
            archive.addfile(entry, io.BytesIO(content))
    replace(results / f"{name}-results.tar.gz", packed.getvalue())


def contents(folder: Path) -> Iterable[tuple[Path, bytes]]:
    """Files and what is in them; those that running steps take away meanwhile are left out."""
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError, IsADirectoryError):
            yield path, path.read_bytes()


def replace(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)

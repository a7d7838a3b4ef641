"""Runs a plan of steps, each a process with a time limit, and saves their results after every step.

A step that hangs, dies or loses its CUDA context fails alone. A late step gets SIGINT, then SIGABRT (faulthandler
prints every thread's traceback), then SIGKILL. A step that survives even that, stuck in a driver, is left behind.
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
from functools import partial
from pathlib import Path

from benchmarks import ROOT

PASSED, FAILED, OUT_OF_TIME, NOT_STARTED = "passed", "failed", "out of time", "not started"
# Seconds after its time limit at which a step gets each signal, and at which it is left behind.
GRACE = 5.0
ENDING = ((0.0, signal.SIGINT), (GRACE, signal.SIGABRT), (GRACE + 1, signal.SIGKILL))
LEFT_BEHIND = GRACE + 3
SHOWN_LINES = 25  # printed of a failed step's output; the archive has all of it
TICK = 0.05


@dataclass(frozen=True, eq=False)
class Step:
    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    shown: bool = False  # print its output as it comes
    at_least: float = 0.0  # do not start it with fewer seconds left
    at_most: float = math.inf


@dataclass(frozen=True)
class Stage:
    """Steps one after another, or side by side. Time that earlier stages did not use is added to `seconds`."""

    seconds: float
    steps: Sequence[Step]
    together: bool = False


@dataclass(frozen=True)
class Outcome:
    step: str
    status: str
    seconds: float
    returncode: int | None  # None if it was ended or never started

    def __str__(self) -> str:
        killed_by = f" by {signal.Signals(-self.returncode).name}" if (self.returncode or 0) < 0 else ""
        return f"{self.step}: {self.status}{killed_by}, {self.seconds} s"


class Running:
    """A step's process, the leader of its own process group, with its output in a file."""

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
                    # Started in the background of a script, this process ignores SIGINT. Its steps must not.
                    preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
                )
            except OSError as error:
                self.process = None
                output.write(f"{error}\n")

    def outcome(self) -> Outcome | None:
        """The outcome, or None while it runs. A late process gets the next signal."""
        late = time.monotonic() - self.due
        returncode = 127 if self.process is None else self.process.poll()
        if returncode is None and late < LEFT_BEHIND:
            while self.signals_sent < len(ENDING) and late >= ENDING[self.signals_sent][0]:
                self.signal(ENDING[self.signals_sent][1])
                self.signals_sent += 1
            return None
        self.signal(signal.SIGKILL)  # for processes that it started and left
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
        """Print the complete lines that are new."""
        new = self.output()[self.printed :]
        whole = new[: new.rfind("\n") + 1]
        self.printed += len(whole)
        for line in whole.splitlines():
            print(prefix + line, flush=True)


def environment() -> dict[str, str]:
    """Compiled kernels (no interpreter), tracebacks of crashes, and unbuffered output."""
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return own | {"PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}


def run(plan: Sequence[Stage], work: Path, results: Path, name: str) -> list[Outcome]:
    """Run every stage, even if earlier ones failed. What the steps write into `work` is saved in `results`."""
    outcomes: list[Outcome] = []
    logs = work / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def ended(outcome: Outcome) -> None:
        outcomes.append(outcome)
        with (work / "steps.jsonl").open("a") as file:
            file.write(json.dumps(asdict(outcome)) + "\n")
        save(work, results, name)

    deadline = time.monotonic()
    for stage in plan:
        deadline += stage.seconds
        for steps in [stage.steps] if stage.together else [[step] for step in stage.steps]:
            run_together(steps, logs, deadline, ended)
    return outcomes


def run_together(steps: Sequence[Step], logs: Path, deadline: float, ended: Callable[[Outcome], None]) -> None:
    """Run the steps side by side until each ends or is out of time. If interrupted, end them first."""
    running: list[Running] = []
    try:
        for step in steps:
            if deadline - time.monotonic() <= step.at_least:
                report(Outcome(step.name, NOT_STARTED, 0.0, None), "", ended)
            else:
                print(f"{step.name}: started", flush=True)
                running.append(Running(step, logs / f"{step.name}.log", deadline))
        wait_for(running, ended)
    except BaseException:
        for one in running:
            one.due = min(one.due, time.monotonic())
        wait_for(running, ended)
        raise


def wait_for(running: list[Running], ended: Callable[[Outcome], None]) -> None:
    """Wait until all have ended. Each is removed from the list when it has."""
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


def save(work: Path, results: Path, name: str) -> None:
    """Save all of `work` as one archive, and its JSON lines as one file. Each file is replaced atomically."""
    results.mkdir(parents=True, exist_ok=True)
    lines = b"".join(content for path, content in contents(work) if path.suffix == ".jsonl")
    replace_file(results / f"{name}.jsonl", lines)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for path, content in contents(work):
            entry = tarfile.TarInfo(f"{name}/{path.relative_to(work)}")
            entry.size, entry.mtime = len(content), time.time()
            archive.addfile(entry, io.BytesIO(content))
    replace_file(results / f"{name}-results.tar.gz", packed.getvalue())


def contents(folder: Path) -> Iterable[tuple[Path, bytes]]:
    """The files and their contents, without files that running steps delete meanwhile."""
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError, IsADirectoryError):
            yield path, path.read_bytes()


def replace_file(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.replace(path)

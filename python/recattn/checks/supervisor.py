"""Runs the check: one process per operator and dtype. A process that dies costs one row."""

import multiprocessing
import re
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

import torch

from recattn.checks.cases import Operator
from recattn.checks.worker import CANNOT_RUN, CRASHED, HUNG, Began, Job, Row, work

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}
START = 60.0  # seconds for a process to reach its first case
GRACE = 5.0  # seconds for a process to print a traceback after its timeout, and to end after it was killed
OUTPUT_LINES = 40
SLOW_IMPORTS = ("sympy", "triton")  # PyTorch and recattn delay them until the first backward or kernel


def run(
    operators: Sequence[Operator], device: str, *, quick: bool = False, timeout: float = 60.0, jobs: int = 1
) -> Iterator[Row]:
    """Yield rows as they finish, from `jobs` processes at a time. `quick`: one dtype, no real shapes."""
    kind = torch.device(device).type
    dtypes = DTYPES[kind][:1] if quick else DTYPES[kind]
    pending, unusable = [], []
    for operator in operators:
        reasons = operator.implementations(kind)
        usable = tuple(implementation for implementation, why in reasons.items() if why is None)
        pending += [Job(operator, dtype, device, usable, quick, timeout) for dtype in dtypes if usable]
        unusable += [Row(operator.name, name, "", CANNOT_RUN, reason=why) for name, why in reasons.items() if why]
    yield from _run(pending, jobs)
    yield from unusable


def _run(pending: list[Job], jobs: int) -> Iterator[Row]:
    running: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="recattn-check-") as outputs:
        try:
            while pending or running:
                running += [Worker(pending.pop(0), outputs) for _ in range(min(jobs - len(running), len(pending)))]
                wait([worker.connection for worker in running], timeout=0.5)
                for worker in list(running):
                    yield from worker.rows()
                    if worker.ended:
                        running.remove(worker)
                        if worker.remaining:
                            pending.insert(0, worker.job._replace(implementations=tuple(worker.remaining)))
        finally:
            for worker in running:
                worker.end()


class Worker:
    """A process that runs a job, and its progress. What it prints goes to a file in `outputs`."""

    def __init__(self, job: Job, outputs: str):
        self.job, self.remaining = job, list(job.implementations)
        self.at: Began | None = None
        self.deadline = time.monotonic() + START
        self.ended = False
        with tempfile.NamedTemporaryFile(suffix=".log", dir=outputs, delete=False) as file:
            self.output = Path(file.name)
        context = _context()
        self.connection, other_end = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(other_end, job, file.name), daemon=True)
        self.process.start()
        other_end.close()

    def rows(self) -> Iterator[Row]:
        """Yield the rows that it has sent, and one for the case in which it died or hangs."""
        try:
            while self.connection.poll():
                yield from self._take(self.connection.recv())
        except EOFError:
            # A process that ends between two rows is restarted with the rest; one that ends before its first row is
            # reported, so that restarts cannot go on forever.
            if self.remaining and (self.at or len(self.remaining) == len(self.job.implementations)):
                self.process.join(GRACE)
                printed = self._printed()
                hung = "Timeout (" in printed  # the words of faulthandler
                yield self._dead_row(HUNG if hung else CRASHED, printed)
            self.end()
            return
        if time.monotonic() > self.deadline:
            if self.remaining:  # else it hangs while it exits
                yield self._dead_row(HUNG, self._printed())
            self.end()

    def _take(self, message: Began | Row) -> Iterator[Row]:
        self.deadline = time.monotonic() + self.job.timeout + GRACE
        self.at = message if isinstance(message, Began) else None
        if isinstance(message, Row):
            self.remaining.remove(message.implementation)
            yield message if message.status != CRASHED else replace(message, output=self._printed())

    def _dead_row(self, status: str, printed: str) -> Row:
        reason = f"no answer within {self.job.timeout:g} s" if status == HUNG else _ending(self.process.exitcode)
        return Row(
            self.job.operator.name,
            self.remaining.pop(0),
            str(self.job.dtype).removeprefix("torch."),
            status,
            where=self.at.case if self.at else "before its first case",
            reason=reason + _innermost_frame(printed),
            output=printed,
        )

    def _printed(self) -> str:
        return "\n".join(self.output.read_text(errors="replace").splitlines()[:OUTPUT_LINES])

    def end(self) -> None:
        """Kill the process if it still runs. Waits only briefly: the driver may hold it."""
        self.process.kill()
        self.process.join(GRACE)
        self.connection.close()
        self.ended = True


def _context() -> ForkServerContext | SpawnContext:
    """Where the system can fork: forks of a process that has imported PyTorch but never used CUDA."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__, *SLOW_IMPORTS])
    return context


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}"
    return f"ended with exit status {exitcode}"


def _innermost_frame(printed: str) -> str:
    """From faulthandler's traceback: where the crashed thread was, else the main thread, which comes last."""
    _, _, current = printed.partition("Current thread")
    _, _, last = printed.rpartition("(most recent call first)")
    found = re.search(r'File "(.+)", line (\d+) in (\S+)', current or last)
    return f", in {found[3]} ({Path(found[1]).name}:{found[2]})" if found else ""

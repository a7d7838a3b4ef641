"""One process of the check: an operator in one dtype, each implementation compared with the float64 reference.

It sends each result at once, so that a process that dies loses only the case it was running.
"""

import faulthandler
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.checks.cases import REAL, Case, Inputs, Operator
from recattn.testing import Error, Oracle

PASSED, FAILED, RAISED, CRASHED, HUNG, CANNOT_RUN = "passed", "failed", "raised", "crashed", "hung", "cannot run"


class Job(NamedTuple):
    operator: Operator
    dtype: torch.dtype
    device: str
    implementations: tuple[str, ...]
    quick: bool  # skips the real case
    timeout: float  # seconds per case

    @property
    def cases(self) -> list[Case]:
        cases = self.operator.cases(torch.device(self.device).type, self.dtype)
        return [case for case in cases if not (self.quick and case.name == REAL)]


class Began(NamedTuple):
    """Sent before a case runs, so that the supervisor knows the case if the process dies or hangs."""

    implementation: str
    case: str


@dataclass
class CaseResult:
    case: str
    seconds: float
    errors: list[Error] = field(default_factory=list)
    refused: str | None = None  # why the implementation does not support the case


@dataclass
class Row:
    """The result of one implementation of an operator in one dtype."""

    operator: str
    implementation: str
    dtype: str
    status: str
    seconds: float = 0.0
    worst: float | None = None  # the largest error as a share of its bound: up to 1 passes
    where: str = ""  # the case and tensor of that error, or the case that ended the process
    reason: str = ""  # why a row neither passed nor failed
    cases: list[CaseResult] = field(default_factory=list)
    output: str = ""  # what the process printed before it crashed or hung, with a traceback


def work(connection: Connection, job: Job, output: str) -> None:
    """The main function of the process. What it prints goes to the file `output`."""
    try:
        printed = os.open(output, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:  # the run was interrupted before this process began
        return
    for stream in (1, 2):
        os.dup2(printed, stream)
    faulthandler.enable()
    problems: dict[str, Oracle] = {}
    for implementation in job.implementations:
        row = check(job, implementation, problems, lambda case, impl=implementation: begin(connection, job, impl, case))
        faulthandler.cancel_dump_traceback_later()
        connection.send(row)
        if row.status == CRASHED:
            os._exit(1)  # after its CUDA context is lost, nothing works in this process


def begin(connection: Connection, job: Job, implementation: str, case: str) -> None:
    connection.send(Began(implementation, case))
    faulthandler.dump_traceback_later(job.timeout, exit=True)  # works even if the GIL is held


def check(job: Job, implementation: str, problems: dict[str, Oracle], began: Callable[[str], None]) -> Row:
    """Run every case of an implementation. `problems` keeps the reference results for the next implementation."""
    row = Row(job.operator.name, implementation, str(job.dtype).removeprefix("torch."), PASSED)
    started = time.perf_counter()
    for case in job.cases:
        began(case.name)
        case_started = time.perf_counter()
        result = CaseResult(case.name, 0.0)
        try:
            if case.name not in problems:
                problems[case.name] = problem(job, case)
            result.errors = problems[case.name].errors(kernel(job, case, implementation))
        except NotImplementedError as error:
            result.refused = str(error)
        except Exception as error:
            lost = lost_device(job.device)
            row.status, row.where, row.reason = (
                CRASHED if lost else RAISED,
                case.name,
                f"{type(error).__name__}: {error}",
            )
            break
        finally:
            row.seconds = time.perf_counter() - started
            result.seconds = time.perf_counter() - case_started
            row.cases.append(result)
    return row if row.status != PASSED else judged(row)


def problem(job: Job, case: Case) -> Oracle:
    torch.manual_seed(0)
    inputs = {name: x.to(job.device) if isinstance(x, Tensor) else x for name, x in case.draw(job.dtype).items()}
    return Oracle.of(job.operator.reference, inputs, grads=case.grads)


def kernel(job: Job, case: Case, implementation: str) -> Callable[..., Tensor]:
    options = {**case.hints, "impl": implementation}

    def call(**inputs: Inputs) -> Tensor:
        return job.operator.function(**inputs, **options)

    return call


def lost_device(device: str) -> bool:
    """Whether the CUDA context is lost, so that every later call would fail too."""
    if torch.device(device).type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def judged(row: Row) -> Row:
    """The row with its verdict: by the worst error of its cases, or CANNOT_RUN if it supported none."""
    errors = [(error.share, result.case, error) for result in row.cases for error in result.errors]
    if not errors:
        row.status, row.reason = CANNOT_RUN, row.cases[0].refused or "there is no case"
        return row
    row.worst, case, error = max(errors, key=lambda found: (found[0] != found[0], found[0]))  # NaN is the worst
    row.where = f"{case}: {error.name}"
    if not all(error.passed for _, _, error in errors):
        row.status = FAILED
    return row

"""Runs one operator on one workload: check, time, judge. Every implementation gives rows, even if it fails."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.data.movielens import Histories
from benchmarks.harness import timing
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.correctness import Error, Gate, gradients, passes
from benchmarks.harness.goals import Goal, Measured, NeverSlowerGoal, Outcome
from benchmarks.harness.memory import peak_memory
from benchmarks.harness.records import FAILED, NOT_RUN, REFUSED, Row, dtype_name
from benchmarks.harness.registry import BACKWARD, FORWARD, Implementation, Inputs, Operator, Outputs
from benchmarks.harness.workloads import Draw, Workload
from recattn.testing import largest

# Enough sets of inputs rotate that this many bytes pass through the caches.
ROTATED_BYTES = 128 * 2**20
MAX_INPUT_SETS = 8


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    histories: Histories
    ceilings: Callable[[], Ceilings]  # of the time since its last call
    clock: Callable[[Callable[[], object]], float]
    seconds: float  # for timing all implementations of a workload in one direction
    directions: tuple[str, ...]
    progress: Callable[[str, float], None] = lambda doing, done: None  # current step, share done


@dataclass
class Contest:
    """Compares the implementations of an operator on a workload."""

    operator: Operator
    workload: Workload
    implementations: Sequence[Implementation]
    settings: Settings
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)  # by implementation and direction

    def run(self) -> list[Row]:
        """A row for each implementation and direction."""
        self._add_rows()
        gate = Gate(self.operator, self._draw(self.workload.gate, seed=0))
        passed = [implementation for implementation in self.implementations if self._passes(gate, implementation)]
        del gate  # frees its inputs and references
        if passed:
            sets = self._input_sets()
            taken = {
                direction: self._time(direction, [i for i in passed if (i.name, direction) in self.rows], sets)
                for direction in self.settings.directions
            }
            ceilings = self.settings.ceilings()
            for direction, samples in taken.items():
                self._record(direction, samples, sets[0], ceilings)
        return list(self.rows.values())

    def _add_rows(self) -> None:
        for implementation in self.implementations:
            possible = self.operator.directions(implementation, self.settings.device)
            for direction in (d for d in self.settings.directions if d in possible):
                self.rows[implementation.name, direction] = Row(
                    op=self.operator.name,
                    workload=self.workload.name,
                    shape=self.workload.shape,
                    dtype=dtype_name(self.settings.dtype),
                    impl=implementation.name,
                    direction=direction,
                    data=self.settings.histories.source if self.workload.histories else "drawn",
                    goals=[Outcome(str(goal)) for goal in self._goals(direction, implementation.name)],
                )

    def _goals(self, direction: str, implementation: str | None = None) -> list[Goal]:
        return [
            goal
            for goal in self.operator.goals_of(self.workload, self.settings.device, self.settings.dtype)
            if goal.direction == direction and implementation in (None, goal.implementation)
        ]

    def _passes(self, gate: Gate, implementation: Implementation) -> bool:
        """Whether the implementation may be timed. If not, its rows say why."""
        self.settings.progress(f"checking {implementation.name}", 0)
        own = {direction: row for (name, direction), row in self.rows.items() if name == implementation.name}
        if not own:  # only the backward was asked for, and it has none
            return False
        reason = implementation.unsupported_reason(self.workload, self.settings.device)
        if reason is not None:
            _mark(own.values(), NOT_RUN, reason)
            return False
        try:
            errors = gate.check(implementation, tuple(own))
        except Exception as error:  # a broken implementation does not end the run
            _mark(own.values(), *_outcome(error))
            return False
        for row in own.values():
            row.gate_shape = self.workload.gate.shape
            row.errors = {error.name: _recorded(error) for error in errors}
            row.max_error = timing.finite(largest(error.max for error in errors if error.name.startswith("output")))
            row.error_share = timing.finite(largest(error.share for error in errors))
        if not passes(implementation, errors):
            _mark(own.values(), REFUSED, "; ".join(str(error) for error in errors if not error.passed))
            return False
        return True

    def _time(
        self, direction: str, contestants: Sequence[Implementation], sets: Sequence[Inputs]
    ) -> dict[str, timing.Samples]:
        """Samples by implementation. The rows get peak memory and host time."""
        calls = {}
        for implementation in contestants:
            row = self.rows[implementation.name, direction]
            self.settings.progress(f"{direction}: warming up {implementation.name}", 0)
            try:
                call = timed_call(self.operator, implementation, direction, sets)
                call(0)()
                row.peak_bytes = peak_memory(call(0), self.settings.device)
                if self.settings.device.type == "cuda":
                    row.host_ms = timing.host_time(call)
            except Exception as error:  # out of memory, most likely
                _mark([row], *_outcome(error))
            else:
                calls[implementation.name] = call
        return timing.measure(
            calls,
            self.settings.clock,
            self.settings.seconds,
            judged={
                name
                for goal in self._goals(direction)
                for name in (goal.implementation, *(() if isinstance(goal, NeverSlowerGoal) else goal.against))
            },
            rivals={
                name for goal in self._goals(direction) if isinstance(goal, NeverSlowerGoal) for name in goal.against
            },
            progress=lambda done: self.settings.progress(f"{direction}: timing", done),
        )

    def _record(self, direction: str, samples: dict[str, timing.Samples], inputs: Inputs, ceilings: Ceilings) -> None:
        """Write times and verdicts into the rows."""
        cost = self.operator.cost_of(self.workload, inputs, direction)
        measured = {}
        for name, taken in samples.items():
            row = self.rows[name, direction]
            row.p10_ms, row.p50_ms, row.p90_ms = (taken.percentile(p) for p in (10, 50, 90))
            row.samples, row.spread, row.waiting = len(taken.times), timing.finite(taken.spread), taken.waiting
            row.tflops, row.gbs = cost.flops / row.p50_ms / 1e9, cost.bytes / row.p50_ms / 1e6
            row.ceilings = ceilings.of(self.settings.dtype)
            row.ceiling_fraction = ceilings.fraction(cost, self.settings.dtype, row.p50_ms)
            measured[name] = Measured(taken, row.peak_bytes, row.host_ms, row.ceiling_fraction)
        lost = {name for (name, d), row in self.rows.items() if d == direction and row.status in (REFUSED, FAILED)}
        for name in measured:
            goals = self._goals(direction, name)
            self.rows[name, direction].goals = [_judged(goal, measured, lost) for goal in goals]

    def _input_sets(self) -> list[Inputs]:
        first = self._draw(self.workload, seed=1)
        size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
        count = min(max(math.ceil(ROTATED_BYTES / size), 2), MAX_INPUT_SETS)
        return [first, *(self._draw(self.workload, seed) for seed in range(2, count + 1))]

    def _draw(self, workload: Workload, seed: int) -> Inputs:
        draw = Draw(seed, self.settings.dtype, self.settings.device, self.settings.histories)
        return self.operator.inputs(workload, draw)


def call_each(
    operator: Operator,
    workload: Workload,
    implementations: Sequence[Implementation],
    directions: Sequence[str],
    draw: Draw,
) -> Iterator[tuple[Implementation, str]]:
    """Call each implementation once in every direction, unchecked and untimed, to fill the compilers' caches.

    Yields the implementations that failed, with the reason.
    """
    inputs = operator.inputs(workload, draw)
    for implementation in implementations:
        if implementation.unsupported_reason(workload, draw.device) is not None:
            continue
        possible = operator.directions(implementation, draw.device)
        try:
            for direction in (d for d in directions if d in possible):
                timed_call(operator, implementation, direction, [dict(inputs)])(0)()
        except Exception as error:  # the others are still called
            status, reason = _outcome(error)
            if status == FAILED:
                yield implementation, reason


def timed_call(
    operator: Operator, implementation: Implementation, direction: str, sets: Sequence[Inputs]
) -> Callable[[int], Callable[[], None]]:
    """Turn number -> the function to time on that turn's set of inputs. It releases its results before it returns.

    For a backward alone, a fresh forward runs outside the timed function each time. A graph kept for several backwards
    would hold memory that a backward normally releases, and compiled graphs cannot be kept.
    """
    prepared = [dict(implementation.prepare(inputs)) for inputs in sets]

    def forward(inputs: Inputs) -> None:
        with torch.no_grad():
            implementation.run(**inputs)

    if direction == FORWARD:
        return lambda turn: partial(forward, prepared[turn % len(prepared)])

    names = gradients(operator, implementation, prepared[0])
    for inputs in prepared:
        inputs.update({name: inputs[name].detach().requires_grad_() for name in names})
    with torch.no_grad():
        outputs = implementation.run(**prepared[0])
        incoming = [torch.randn_like(x) for x in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def differentiate(outputs: Outputs, inputs: Inputs) -> None:
        torch.autograd.grad(outputs, [inputs[name] for name in names], incoming)

    def backward(turn: int) -> Callable[[], None]:
        inputs = prepared[turn % len(prepared)]
        return partial(differentiate, implementation.run(**inputs), inputs)

    def forward_and_backward(turn: int) -> Callable[[], None]:
        inputs = prepared[turn % len(prepared)]
        return lambda: differentiate(implementation.run(**inputs), inputs)

    return backward if direction == BACKWARD else forward_and_backward


def _judged(goal: Goal, measured: dict[str, Measured], lost: set[str]) -> Outcome:
    """`lost`: implementations that were refused or failed. One of them might have been the best opponent."""
    missing = [name for name in goal.against if name in lost]
    others = {name: measured[name] for name in goal.against if name in measured}
    if missing and others:
        return Outcome(str(goal), timing.NO_VERDICT, ", ".join(missing))
    return goal.judge(measured[goal.implementation], others) if others or not goal.against else Outcome(str(goal))


def _mark(rows, status: str, reason: str) -> None:
    for row in rows:
        row.status, row.reason = status, reason


def _outcome(error: Exception) -> tuple[str, str]:
    """Status and reason of an implementation that raised."""
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    if isinstance(error, AssertionError):  # the gate, on an output of the wrong shape
        return REFUSED, reason
    # Out of memory, or a call that the implementation says it does not support, is a result and not a failure.
    return (NOT_RUN if isinstance(error, (torch.OutOfMemoryError, NotImplementedError)) else FAILED), reason


def _recorded(error: Error) -> dict[str, float | None]:
    return {name: timing.finite(getattr(error, name)) for name in ("max", "max_bound", "mean", "mean_bound")}

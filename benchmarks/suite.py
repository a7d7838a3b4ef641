"""Runs one operator on one workload: gate, time, judge. Every implementation gives rows, whatever becomes of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.ceilings import Ceilings
from benchmarks.correctness import Error, check, gradients, passes, share_of_bound
from benchmarks.memory import peak_memory
from benchmarks.movielens import Histories
from benchmarks.registry import FORWARD, Implementation, Inputs, Operator
from benchmarks.results import FAILED, NOT_RUN, REFUSED, Row
from benchmarks.workloads import Draw, Workload

# Sets of inputs rotate until this much has passed through the caches.
ROTATED_BYTES = 128 * 2**20
MAX_INPUT_SETS = 8


@dataclass(frozen=True)
class Settings:
    device: torch.device
    dtype: torch.dtype
    histories: Histories
    ceilings: Ceilings
    clock: Callable[[Callable[[], object]], float]
    seconds: float  # of timing for all implementations of a workload in one direction
    progress: Callable[[str, float], None] = lambda doing, done: None  # what is being done, and how much of it is


@dataclass
class Contest:
    """The implementations of an operator against each other on a workload."""

    operator: Operator
    workload: Workload
    implementations: Sequence[Implementation]
    settings: Settings
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)  # by implementation and direction

    def run(self) -> list[Row]:
        """A row for each implementation and direction."""
        self._enter()
        passed = [implementation for implementation in self.implementations if self._passes_gate(implementation)]
        if passed:
            sets = self._input_sets()
            for direction in sorted({direction for _, direction in self.rows}):
                self._time(direction, [i for i in passed if (i.name, direction) in self.rows], sets)
        return list(self.rows.values())

    def _enter(self) -> None:
        for implementation in self.implementations:
            for direction in self.operator.directions(implementation, self.settings.device):
                goal = self.operator.goal(self.workload.name, direction, implementation.name)
                self.rows[implementation.name, direction] = Row(
                    op=self.operator.name,
                    workload=self.workload.name,
                    shape=self.workload.shape,
                    dtype=str(self.settings.dtype).removeprefix("torch."),
                    impl=implementation.name,
                    direction=direction,
                    data=self.settings.histories.source if self.workload.histories else "drawn",
                    goal=None if goal is None else str(goal),
                )

    def _passes_gate(self, implementation: Implementation) -> bool:
        """Whether it may be timed; if not, its rows say why."""
        self.settings.progress(f"checking {implementation.name}", 0)
        own = {direction: row for (name, direction), row in self.rows.items() if name == implementation.name}
        unavailable = implementation.unavailable(self.workload, self.settings.device)
        if unavailable is not None:
            _give_up(own.values(), NOT_RUN, unavailable)
            return False
        try:
            errors = check(self.operator, implementation, tuple(own), self._draw(self.workload.gate, seed=0))
        except Exception as error:  # a contestant that breaks does not end the run
            _give_up(own.values(), *_outcome(error))
            return False
        for row in own.values():
            row.gate_shape = self.workload.gate.shape
            row.errors = {error.name: _recorded(error) for error in errors}
            row.max_error = _finite(max(error.max for error in errors if error.name.startswith("output")))
            row.error_share = _finite(max(map(share_of_bound, errors)))
        if not passes(implementation, errors):
            _give_up(own.values(), REFUSED, "; ".join(str(error) for error in errors if not error.passed))
            return False
        return True

    def _time(self, direction: str, contestants: Sequence[Implementation], sets: Sequence[Inputs]) -> None:
        calls = {}
        for implementation in contestants:
            row = self.rows[implementation.name, direction]
            self.settings.progress(f"{direction}: warming up {implementation.name}", 0)
            try:
                call = timed_call(self.operator, implementation, direction, sets)
                call(0)
                row.peak_bytes = peak_memory(lambda call=call: call(0), self.settings.device)
            except Exception as error:  # out of memory, most likely
                _give_up([row], *_outcome(error))
            else:
                calls[implementation.name] = call
        samples = timing.measure(
            calls,
            self.settings.clock,
            self.settings.seconds,
            judged=self.operator.judged(self.workload.name, direction),
            progress=lambda done: self.settings.progress(f"{direction}: timing", done),
        )
        for name, taken in samples.items():
            self._record(self.rows[name, direction], taken, sets[0])
            self._judge(self.rows[name, direction], samples)

    def _record(self, row: Row, taken: timing.Samples, inputs: Inputs) -> None:
        cost = self.operator.cost(self.workload, inputs, row.direction)
        row.p10_ms, row.p50_ms, row.p90_ms = (taken.percentile(p) for p in (10, 50, 90))
        row.samples, row.spread, row.waiting = len(taken.times), _finite(taken.spread), taken.waiting
        row.tflops, row.gbs = cost.flops / row.p50_ms / 1e9, cost.bytes / row.p50_ms / 1e6
        row.ceiling_fraction = self.settings.ceilings.fraction(cost, self.settings.dtype, row.p50_ms)

    def _judge(self, row: Row, samples: Mapping[str, timing.Samples]) -> None:
        goal = self.operator.goal(row.workload, row.direction, row.impl)
        if goal is None:
            return
        if goal.against not in samples:
            row.verdict = "no verdict"
            return
        ratio, spread = timing.time_ratio(samples[row.impl], samples[goal.against])
        row.time_ratio, row.time_ratio_spread = ratio, _finite(spread)
        row.verdict = timing.verdict(ratio, spread, row.waiting, goal.time_ratio)

    def _input_sets(self) -> list[Inputs]:
        first = self._draw(self.workload, seed=1)
        size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
        count = min(max(math.ceil(ROTATED_BYTES / size), 2), MAX_INPUT_SETS)
        return [first, *(self._draw(self.workload, seed) for seed in range(2, count + 1))]

    def _draw(self, workload: Workload, seed: int) -> Inputs:
        draw = Draw(seed, self.settings.dtype, self.settings.device, self.settings.histories)
        return self.operator.inputs(workload, draw)


def timed_call(
    operator: Operator, implementation: Implementation, direction: str, sets: Sequence[Inputs]
) -> Callable[[int], None]:
    """One call on the set of inputs whose turn it is; its results are released before it returns."""
    prepared = [dict(implementation.prepare(inputs)) for inputs in sets]

    if direction == FORWARD:

        def forward(turn: int) -> None:
            with torch.no_grad():
                implementation.run(**prepared[turn % len(prepared)])

        return forward

    names = gradients(operator, implementation, prepared[0])
    for inputs in prepared:
        inputs.update({name: inputs[name].detach().requires_grad_() for name in names})
    with torch.no_grad():
        incoming = torch.randn_like(implementation.run(**prepared[0]))

    def forward_and_backward(turn: int) -> None:
        inputs = prepared[turn % len(prepared)]
        torch.autograd.grad(implementation.run(**inputs), [inputs[name] for name in names], incoming)

    return forward_and_backward


def _give_up(rows, status: str, reason: str) -> None:
    for row in rows:
        row.status, row.reason = status, reason


def _outcome(error: Exception) -> tuple[str, str]:
    """Status and reason of a contestant that raised."""
    reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    if isinstance(error, AssertionError):  # the gate, on an output of the wrong shape
        return REFUSED, reason
    # Too little memory, and an implementation that says it does not serve this call, are findings and no failures.
    return (NOT_RUN if isinstance(error, (torch.OutOfMemoryError, NotImplementedError)) else FAILED), reason


def _recorded(error: Error) -> dict[str, float | None]:
    return {name: _finite(getattr(error, name)) for name in ("max", "max_bound", "mean", "mean_bound")}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""What is measured: operators, each with its implementations, workloads and goals. One file an operator."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.workloads import Draw, Workload

FORWARD, TRAINING = "forward", "forward+backward"

Inputs = dict[str, object]
# Of a device type: implementation -> why it cannot run there, best first.
Availability = Callable[[str], dict[str, str | None]]
OPERATORS: dict[str, "Operator"] = {}


class Cost(NamedTuple):
    """What one call must compute and move, however it is implemented."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Implementation:
    """A contestant. `run` takes what `prepare` (untimed) makes of the operator's inputs."""

    name: str
    run: Callable[..., Tensor]
    # Whether the workload is one that it is for.
    applies: Callable[[Workload], bool] = lambda workload: True
    # Why it cannot run such a workload on this device; None if it can.
    unavailable: Callable[[Workload, torch.device], str | None] = lambda workload, device: None
    # A layout of its own, and the way back to the operator's for the correctness gate.
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    restore: Callable[[Tensor, Inputs], Tensor] = lambda output, inputs: output
    # A limit computes less than the operator: it answers to its own reference, for the inputs it uses.
    reference: Callable[..., Tensor] | None = None
    grads: tuple[str, ...] | None = None
    forward_only: Callable[[torch.device], bool] = lambda device: False
    tier: str = "quick"
    ours: bool = False


@dataclass(frozen=True)
class Goal:
    """time of `implementation` ≤ time_ratio · time of `against`."""

    workload: str
    direction: str
    against: str
    time_ratio: float
    implementation: str = "recattn"

    def __str__(self) -> str:
        if self.time_ratio >= 1:
            return f"{self.direction} ≤ {self.time_ratio:.2f}× the time of {self.against}"
        return f"{self.direction} ≥ {1 / self.time_ratio:.1f}× as fast as {self.against}"


@dataclass(frozen=True)
class Operator:
    name: str
    reference: Callable[..., Tensor]  # the specification, in any dtype
    inputs: Callable[[Workload, Draw], Inputs]
    cost: Callable[[Workload, Inputs, str], Cost]  # by direction
    grads: tuple[str, ...]  # inputs that need a gradient; none: an inference operator
    baseline: str  # the implementation that speed-ups are relative to
    workloads: tuple[Workload, ...]
    goals: tuple[Goal, ...] = ()
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def implementation(self, name: str, **options) -> Callable:
        """Decorator: the function is one more implementation of this operator."""

        def add(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            self.implementations[name] = Implementation(name, run, **options)
            return run

        return add

    def add_recattn(self, function: Callable[..., Tensor], availability: Availability) -> None:
        """`recattn` as a user calls it, and a row for each other implementation that recattn has."""
        self.implementation("recattn", ours=True)(function)
        for impl in availability("cpu"):
            if impl != "reference":
                unavailable = partial(_unavailable_in_recattn, availability, impl)
                self.implementation(f"recattn {impl}", unavailable=unavailable, ours=True)(partial(function, impl=impl))

    def directions(self, implementation: Implementation, device: torch.device) -> tuple[str, ...]:
        trainable = self.grads and not implementation.forward_only(device)
        return (FORWARD, TRAINING) if trainable else (FORWARD,)

    def goal(self, workload: str, direction: str, implementation: str) -> Goal | None:
        wanted = (workload, direction, implementation)
        return next((g for g in self.goals if (g.workload, g.direction, g.implementation) == wanted), None)

    def judged(self, workload: str, direction: str) -> set[str]:
        """The implementations whose times the verdicts on a workload rest on."""
        goals = [goal for goal in self.goals if (goal.workload, goal.direction) == (workload, direction)]
        return {name for goal in goals for name in (goal.implementation, goal.against)}


def _unavailable_in_recattn(
    availability: Availability, impl: str, workload: Workload, device: torch.device
) -> str | None:
    refusals = availability(device.type)
    if refusals[impl] is None and impl == next(name for name, why in refusals.items() if why is None):
        return "it is what the row recattn runs here"
    return refusals[impl]


def register(operator: Operator) -> Operator:
    OPERATORS[operator.name] = operator
    return operator


def load_operators() -> dict[str, Operator]:
    """Import every operator's file; importing registers."""
    for file in sorted(Path(__file__).parent.glob("*_attention.py")):
        importlib.import_module(f"benchmarks.{file.stem}")
    return OPERATORS

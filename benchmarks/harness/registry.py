"""What is measured: operators, each with its implementations, workloads and goals. One file an operator."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import benchmarks.operators
from benchmarks.harness.goals import Goal
from benchmarks.harness.workloads import Draw, Workload

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
# What is measured unless asked otherwise. On a CPU a backward on its own says little that the other two do not.
DIRECTIONS = {"cpu": (FORWARD, TRAINING), "cuda": (FORWARD, BACKWARD, TRAINING)}
# What runs are in unless asked otherwise, and their goals always.
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

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
    cpu_tier: str | None = None  # where it is another on a CPU
    devices: tuple[str, ...] = ("cpu", "cuda")  # takes part on these; elsewhere only if named
    compiled: bool = False  # by torch.compile, for every shape: seconds at the first call
    ours: bool = False

    def tier_on(self, device: str) -> str:
        return self.cpu_tier or self.tier if device == "cpu" else self.tier


@dataclass(frozen=True)
class Operator:
    name: str
    reference: Callable[..., Tensor]  # the specification, in any dtype
    inputs: Callable[[Workload, Draw], Inputs]
    cost: Callable[[Workload, Inputs, str], Cost]  # of the forward, and of both together
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
        """What can be measured of it."""
        trainable = self.grads and not implementation.forward_only(device)
        return (FORWARD, BACKWARD, TRAINING) if trainable else (FORWARD,)

    def cost_of(self, workload: Workload, inputs: Inputs, direction: str) -> Cost:
        if direction != BACKWARD:
            return self.cost(workload, inputs, direction)
        both, forward = (self.cost(workload, inputs, d) for d in (TRAINING, FORWARD))
        return Cost(both.flops - forward.flops, both.bytes - forward.bytes)

    def goals_of(self, workload: Workload, device: torch.device, dtype: torch.dtype) -> list[Goal]:
        if dtype != DTYPES[device.type]:
            return []
        return [goal for goal in self.goals if (goal.workload, goal.device) == (workload.name, device.type)]


def _unavailable_in_recattn(
    availability: Availability, impl: str, workload: Workload, device: torch.device
) -> str | None:
    refusals = availability(device.type)
    if refusals[impl] is None and impl == next(name for name, why in refusals.items() if why is None):
        return "same as the recattn row on this device"
    return refusals[impl]


def register(operator: Operator) -> Operator:
    OPERATORS[operator.name] = operator
    return operator


def load_operators() -> dict[str, Operator]:
    """Import every file of benchmarks/operators, which registers it. By name, whatever was imported before."""
    for module in pkgutil.iter_modules(benchmarks.operators.__path__):
        importlib.import_module(f"benchmarks.operators.{module.name}")
    return dict(sorted(OPERATORS.items()))

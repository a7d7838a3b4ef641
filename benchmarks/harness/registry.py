"""What is measured: operators, each with its implementations, workloads and goals."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import benchmarks.operators
from benchmarks.harness.compiled import compiled
from benchmarks.harness.goals import Goal, NeverSlowerGoal
from benchmarks.harness.workloads import Draw, Workload
from recattn._environment import cpu_capability

FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward+backward"
# The directions measured by default. On a CPU the backward alone adds little to the other two.
DIRECTIONS = {"cpu": (FORWARD, TRAINING), "cuda": (FORWARD, BACKWARD, TRAINING)}
# The default dtype of a run; goals are only judged in it.
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

# The names of implementations that several operators have.
EAGER, COMPILED = "eager", "eager, torch.compile"

Inputs = dict[str, object]
Outputs = Tensor | tuple[Tensor, ...]
# Device type -> for each implementation, best first, why it cannot run there (None if it can).
UnsupportedReasons = Callable[[str], dict[str, str | None]]
OPERATORS: dict[str, "Operator"] = {}


class Cost(NamedTuple):
    """The least that one call must compute and move, whatever the implementation."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Implementation:
    """One way to compute the operator. `run` takes the result of `prepare`, which is not timed."""

    name: str
    run: Callable[..., Outputs]
    # Whether it is meant for the workload.
    applies: Callable[[Workload], bool] = lambda workload: True
    # Why it cannot run the workload on this device; None if it can.
    unsupported_reason: Callable[[Workload, torch.device], str | None] = lambda workload, device: None
    # Converts the inputs to its own layout, and what it returns to one tensor for the correctness gate.
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs
    restore: Callable[[Outputs, Inputs], Tensor] = lambda output, inputs: output
    # A limit computes less than the operator. It has its own reference, and gradients only for the inputs it uses.
    reference: Callable[..., Tensor] | None = None
    grads: tuple[str, ...] | None = None
    forward_only: Callable[[torch.device], bool] = lambda device: False
    tier: str = "quick"
    cpu_tier: str | None = None  # the tier on a CPU, if different
    devices: tuple[str, ...] = ("cpu", "cuda")  # runs on these by default; elsewhere only if named
    compiled: bool = False  # by torch.compile, anew for every shape: the first call takes seconds
    ours: bool = False

    def tier_on(self, device: str) -> str:
        return self.cpu_tier or self.tier if device == "cpu" else self.tier


@dataclass(frozen=True)
class Operator:
    name: str
    reference: Callable[..., Tensor]  # the specification, in any dtype
    inputs: Callable[[Workload, Draw], Inputs]
    cost: Callable[[Workload, Inputs, str], Cost]  # of the forward, and of forward+backward
    grads: tuple[str, ...]  # inputs that need a gradient; none for an inference operator
    workloads: tuple[Workload, ...]
    baseline: str = EAGER  # the implementation that speedups are relative to
    goals: tuple[Goal, ...] = ()
    implementations: dict[str, Implementation] = field(default_factory=dict)

    def implementation(self, name: str, **options) -> Callable:
        """Decorator: register the function as an implementation of this operator."""

        def add(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
            self.implementations[name] = Implementation(name, run, **options)
            return run

        return add

    def add_recattn(self, function: Callable[..., Tensor], unsupported_reasons: UnsupportedReasons) -> None:
        """Register `recattn` with its default options, and as one more row each implementation that `impl=` selects."""
        self.implementation("recattn", ours=True)(function)
        for impl in unsupported_reasons("cpu"):
            if impl != "reference":
                options = {"unsupported_reason": partial(_why_not_run, unsupported_reasons, impl), "ours": True}
                self.implementation(f"recattn {impl}", **options)(partial(function, impl=impl))

    def add_compiled(self, name: str, function: Callable[..., Tensor], **options) -> None:
        """Register torch.compile of a function."""
        options = {"cpu_tier": "full", **options}
        self.implementation(name, compiled=True, **options)(lambda **inputs: compiled(function)(**inputs))

    def directions(self, implementation: Implementation, device: torch.device) -> tuple[str, ...]:
        """The directions in which the implementation can be measured."""
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
        return [
            goal
            for goal in self.goals
            if (goal.workload, goal.device) == (workload.name, device.type) and goal.holds_at(cpu_capability())
        ]

    def with_goals_of_all_workloads(self) -> "Operator":
        """The operator, on a CPU never slower than the best PyTorch formulation: a goal for each of its workloads."""
        cpu = torch.device("cpu")
        goals = [
            NeverSlowerGoal(workload=workload.name, direction=direction, against=peers)
            for workload in self.workloads
            if "cpu" in workload.devices and workload.tier != "quick"
            for direction in DIRECTIONS["cpu"]
            if (
                peers := tuple(
                    name
                    for name, i in self.implementations.items()
                    if not i.ours
                    and i.reference is None
                    and "cpu" in i.devices
                    and i.applies(workload)
                    and direction in self.directions(i, cpu)
                )
            )
        ]
        return replace(self, goals=(*self.goals, *goals))


def _why_not_run(
    unsupported_reasons: UnsupportedReasons, impl: str, workload: Workload, device: torch.device
) -> str | None:
    """Why recattn's `impl` gets no row of its own on a device; None if it does."""
    reasons = unsupported_reasons(device.type)
    chosen = next(name for name, reason in reasons.items() if reason is None)
    return "same as the recattn row on this device" if impl == chosen else reasons[impl]


def register(name: str, reference: Callable[..., Tensor], inputs: Callable, cost: Callable, **options) -> Operator:
    """Create an Operator and add it to those that the suite runs."""
    OPERATORS[name] = Operator(name, reference, inputs, cost, **options)
    return OPERATORS[name]


def load_operators() -> dict[str, Operator]:
    """Import every file of benchmarks/operators, which registers it. By name, whatever was imported before."""
    for module in pkgutil.iter_modules(benchmarks.operators.__path__):
        importlib.import_module(f"benchmarks.operators.{module.name}")
    return {name: operator.with_goals_of_all_workloads() for name, operator in sorted(OPERATORS.items())}

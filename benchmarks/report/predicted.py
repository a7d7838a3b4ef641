"""The predicted times on GPUs, as a table: corrected by what the last measured GPU took, once there is one."""

import statistics
from collections.abc import Iterator

import torch

from benchmarks.harness.records import Row
from benchmarks.harness.registry import BACKWARD, DTYPES, FORWARD, Operator
from benchmarks.harness.workloads import CUDA, Workload
from benchmarks.report import cost_model, instructions, table
from benchmarks.report.devices import GPUS, Device
from benchmarks.report.stages import MODELS

DTYPE = DTYPES["cuda"]
OURS = "recattn"

# An operator, one of its implementations, and a direction.
Kind = tuple[str, str, str]


def predicted_workloads(operators: dict[str, Operator]) -> Iterator[tuple[Operator, str, Workload, str]]:
    """Each operator and implementation that has a model, with the workloads meant for a GPU and its directions."""
    for operator in operators.values():
        own = [impl for name, impl, type in MODELS if (name, type) == (operator.name, "cuda")]
        # Of an operator with several, each: not what `recattn` chooses among them.
        several = [impl for impl in own if impl != OURS] or own
        trainable = BACKWARD in operator.directions(operator.implementations[OURS], torch.device("cuda"))
        for implementation in several:
            for workload in operator.workloads:
                if workload.devices == CUDA and workload.tier != "full":
                    for direction in (FORWARD, BACKWARD)[: 1 + trainable]:
                        yield operator, implementation, workload, direction


def measured_row(machine, operator: str, implementation: str, workload: str, direction: str) -> Row | None:
    """The fastest row of an implementation, over its backends."""
    contest = machine.contests.get((operator, workload, direction), {})
    own = [name for name in contest if name == implementation or name.startswith(f"{implementation}:")]
    rows = [machine.row(operator, workload, direction, name) for name in own]
    return min((row for row in rows if row is not None and row.ceilings), key=lambda row: row.p50_ms, default=None)


def ratios(operators: dict[str, Operator], machine) -> dict[Kind, dict[str, float]]:
    """Measured over predicted time on a GPU, by kind and workload."""
    found: dict[Kind, dict[str, float]] = {}
    for operator, implementation, workload, direction in predicted_workloads(operators):
        row = measured_row(machine, operator.name, implementation, workload.name, direction)
        if row is not None:
            time = cost_model.predict(operator, workload, direction, machine.device(row), DTYPE, implementation)
            if time is not None:
                found.setdefault((operator.name, implementation, direction), {})[workload.name] = row.p50_ms / time
    return found


def lines(operators: dict[str, Operator], gpu=None) -> tuple[list[str], list[list[str]]]:
    """Columns and rows. `gpu`, a measured machine: times are multiplied by its median ratio for their kind."""
    measured = ratios(operators, gpu) if gpu else {}
    columns = ["operator", "workload", "pass", *(f"{known.name} ms" for known in GPUS), f"{GPUS[0].name}'s time"]
    rows = []
    for operator, implementation, workload, direction in predicted_workloads(operators):
        own = measured.get((operator.name, implementation, direction), {})
        correction = statistics.median(own.values()) if own else 1.0
        call = operator, workload, direction
        times = [_time(*call, known, implementation, correction) for known in GPUS]
        name = operator.name if implementation == OURS else f"{operator.name}, {implementation.removeprefix(OURS)[1:]}"
        row = [name, workload.name, direction, *times, _shares(*call, implementation)]
        rows.append(row + ([f"{own[workload.name]:.2f}" if workload.name in own else "–"] if gpu else []))
    return columns + ([f"measured / predicted, {gpu.title}"] if gpu else []), rows


def _time(operator, workload, direction, device: Device, implementation: str, correction: float) -> str:
    time = correction * cost_model.predict(operator, workload, direction, device, DTYPE, implementation)
    floor = cost_model.floor(operator, workload, direction, device, DTYPE)
    return f"{table.significant(time)} ({floor / time:.0%})"


def _shares(operator, workload, direction, implementation: str) -> str:
    """What takes the time, where it is a tenth or more."""
    parts = cost_model.parts(operator, workload, direction, GPUS[0], DTYPE, implementation)
    total = sum(parts.values())
    return ", ".join(f"{name} {part / total:.0%}" for name, part in parts.items() if part >= total / 10)


def introduction(gpu=None) -> str:
    corrected = (
        f" Times are corrected: multiplied by the median of measured / predicted on {gpu.title} over the workloads of "
        "the same operator, implementation and pass."
        if gpu
        else ""
    )
    return (
        f"{instructions.__doc__}\nIn bfloat16, from the counts of Triton 3.7.1. In brackets: the share of the floor, "
        "the time of the least arithmetic, bytes or exponentials of the equation, whichever is longest. The shares of "
        f"the {GPUS[0].name}'s time: tensor cores, the unit that is busiest beside them, memory, launches.{corrected}\n"
    )

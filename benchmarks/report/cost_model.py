"""Predicts how long recattn's kernels should take.

A call is a sequence of stages. A stage multiplies matrices, takes softmaxes, moves bytes and is launched:

    t = launches · t_launch + max(FLOPs / matmul rate + elements / softmax rate, bytes / copy rate)

The rates are measured on the device (`benchmarks.harness.ceilings`). For a device that nobody has measured they come
from its datasheet, times the share of it that similar devices reach. Matmul and softmax do not overlap: that predicts
the best attention on an H100 at head dim 64. No rate is fitted to a measurement of recattn. Where measured and
predicted times differ, `benchmarks.report.reasons` says why. On a GPU recattn's own kernels are predicted from their
instructions instead: `benchmarks.report.instructions`.
"""

from collections import Counter
from collections.abc import Iterator

import torch

from benchmarks.harness.registry import BACKWARD, FORWARD, TRAINING, Inputs, Operator
from benchmarks.harness.workloads import Workload
from benchmarks.report import cpu_models, gpu_models
from benchmarks.report.devices import GPUS, Device
from benchmarks.report.instructions import Launch
from benchmarks.report.stages import MODELS, Stage, lengths_of, shapes, softmaxes_of, visible

__all__ = ["GPUS", "MODELS", "TOLERANCE", "Device", "cpu_models", "floor", "gpu_models", "parts", "predict", "shapes"]

# A measured time that differs more from the prediction needs a reason.
TOLERANCE = 0.25
OURS = "recattn"


def predict(
    operator: Operator,
    workload: Workload,
    direction: str,
    device: Device,
    dtype: torch.dtype,
    implementation: str = OURS,
) -> float | None:
    """Predicted milliseconds of a call of recattn; None if it has no model."""
    if (operator.name, implementation, device.type) not in MODELS or (device.type == "cuda" and not device.processors):
        return None
    steps = _steps(operator, workload, direction, device, dtype, implementation)
    return sum(step.milliseconds(device, dtype) for step in steps)


def parts(
    operator: Operator,
    workload: Workload,
    direction: str,
    device: Device,
    dtype: torch.dtype,
    implementation: str = OURS,
) -> dict[str, float]:
    """The predicted milliseconds by what takes them, the most first."""
    total = Counter()
    for step in _steps(operator, workload, direction, device, dtype, implementation):
        total.update(step.parts(device, dtype))
    return dict(total.most_common())


def _steps(operator, workload, direction, device, dtype, implementation) -> Iterator[Stage | Launch]:
    inputs = shapes(operator.inputs, workload, dtype)
    for one in (FORWARD, BACKWARD) if direction == TRAINING else (direction,):
        yield from MODELS[operator.name, implementation, device.type](workload, inputs, one, device)


def floor(operator: Operator, workload: Workload, direction: str, device: Device, dtype: torch.dtype) -> float:
    """Milliseconds that no implementation can beat: of the least arithmetic, bytes or exponentials, the longest.

    A backward takes the exponentials again.
    """
    inputs = shapes(operator.inputs, workload, dtype)
    cost = operator.cost_of(workload, inputs, direction)
    passes = 2 if direction == TRAINING else 1
    ceilings = device.ceilings
    return max(
        cost.flops / ceilings.tflops[dtype] / 1e9,
        cost.bytes / ceilings.gbs / 1e6,
        passes * exponentials(operator.name, workload, inputs) / ceilings.gsoftmax / 1e6,
    )


def exponentials(operator: str, workload: Workload, inputs: Inputs) -> float:
    """Of a forward."""
    if operator.startswith("lrea"):
        return 0.0
    if operator == "inter_sink_bias":
        return workload.heads * visible(inputs["sink_mask"].sum(1), workload.causal)
    refined = operator == "refined_attention"
    causal = workload.causal if operator in ("sink_attention", "bert_layer") else True
    pairs = workload.heads * visible(lengths_of(workload, inputs), causal)
    return pairs * (softmaxes_of(workload) if refined else 1)

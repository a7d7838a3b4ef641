"""A call of recattn as a sequence of stages; the models of operators; and what they count."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.data import movielens
from benchmarks.harness.registry import Inputs
from benchmarks.harness.workloads import Draw, Workload
from benchmarks.report.devices import Device
from benchmarks.report.instructions import LAUNCHES, MEMORY, MMA, MUFU, Launch


@dataclass(frozen=True)
class Stage:
    """What is not one of recattn's Triton kernels: a part of a CPU kernel, or what PyTorch runs on a GPU."""

    flops: float
    bytes: float
    softmaxes: float = 0.0  # elements
    launches: int = 1

    def milliseconds(self, device: Device, dtype: torch.dtype) -> float:
        ceilings = device.ceilings
        matrix = self.flops / ceilings.tflops[dtype] / 1e9
        softmax = self.softmaxes / ceilings.gsoftmax / 1e6
        return self.launches * ceilings.launch_us / 1e3 + max(matrix + softmax, self.bytes / ceilings.gbs / 1e6)

    def parts(self, device: Device, dtype: torch.dtype) -> dict[str, float]:
        """Milliseconds by what takes them, as of a Launch."""
        matrix = Stage(self.flops, 0, launches=0).milliseconds(device, dtype)
        launching = self.launches * device.ceilings.launch_us / 1e3
        rest = self.milliseconds(device, dtype) - launching
        computing = {MMA: matrix, MUFU: rest - matrix}
        softmax = Stage(0, 0, self.softmaxes, launches=0).milliseconds(device, dtype)
        return {LAUNCHES: launching, **(computing if rest <= matrix + softmax else {MEMORY: rest})}


class ShapeDraw(Draw):
    """Draws the structure of a workload (lengths, positions, offsets) without its values."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(0, dtype, torch.device("cpu"), _histories())

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def embeddings(self, histories, dim: int, padding_side: str = "right") -> Tensor:
        return self.normal(len(histories), max(map(len, histories)), dim)


_histories = cache(movielens.drawn)


@cache
def shapes(draw: Callable[[Workload, Draw], Inputs], workload: Workload, dtype: torch.dtype) -> Inputs:
    return draw(workload, ShapeDraw(dtype))


# The stages and launches of a forward or of a backward alone, on a device.
Model = Callable[[Workload, Inputs, str, Device], list[Stage | Launch]]
MODELS: dict[tuple[str, str, str], Model] = {}  # by operator, implementation and type of device


def models(operator: str, type: str, implementation: str = "recattn") -> Callable[[Model], Model]:
    """Decorator: the function models an operator's implementation on a type of device."""

    def add(model: Model) -> Model:
        MODELS[operator, implementation, type] = model
        return model

    return add


def bytes_of(inputs: Inputs, *names: str) -> float:
    return float(sum(inputs[name].nbytes for name in names if name in inputs))


def lengths_of(workload: Workload, inputs: Inputs) -> Tensor:
    """[B] tokens of each sequence."""
    if inputs.get("cu_seqlens") is not None:
        return inputs["cu_seqlens"].diff().long()
    lengths = inputs.get("seq_lens")
    return torch.full((workload.batch,), workload.length) if lengths is None else lengths


def visible(lengths: Tensor, causal: bool) -> float:
    """(query, key) pairs that see each other."""
    n = lengths.double()
    return float((n * (n + 1) / 2 if causal else n * n).sum())


def computed(lengths: Tensor, block: int) -> float:
    """(query, key) pairs computed by a causal attention that processes keys in blocks."""
    whole = lengths // block  # query blocks with a whole key block on the diagonal
    rest = lengths - block * whole
    return float((block * block * whole * (whole + 1) // 2 + rest * lengths).double().sum())


def softmaxes_of(workload: Workload) -> int:
    """Softmaxes of a refined attention."""
    return (1 if workload.mechanism == "simple" else 2) + (workload.source == "weights")

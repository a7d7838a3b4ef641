"""Devices for the cost model: GPUs by their datasheets, and any device by its measured ceilings."""

from dataclasses import dataclass, replace

import torch

from benchmarks.harness.ceilings import Ceilings


@dataclass(frozen=True)
class Device:
    name: str
    type: str
    ceilings: Ceilings
    architecture: int = 0  # of a GPU: 80, 90
    processors: int = 0


def gpu(name: str, tflops: float, gbs: float, architecture: int, processors: int, ghz: float) -> Device:
    """Rates of bfloat16 matmul and copy, 16 exponentials per clock and multiprocessor, and 2 µs per kernel."""
    ceilings = Ceilings({torch.bfloat16: tflops}, gbs, 16 * processors * ghz, launch_us=2.0)
    return Device(name, "cuda", ceilings, architecture, processors)


# A large matmul and a large copy in PyTorch reached 80% and 90% of the datasheet on an H100 and an H200. The A100 is
# assumed to do the same. Clocks are the datasheets' boost clocks.
GPUS = (
    gpu("H100", 798, 3000, 90, 132, 1.98),
    gpu("H200", 788, 4300, 90, 132, 1.98),
    gpu("A100", 0.8 * 312, 0.9 * 2039, 80, 108, 1.41),
)


def measured(name: str, type: str, ceilings: Ceilings) -> Device:
    """A device with these ceilings. A GPU that is not one of GPUS has no architecture, and no prediction."""
    known = next((gpu for gpu in GPUS if type == gpu.type and gpu.name in name), None)
    return replace(known, name=name, ceilings=ceilings) if known else Device(name, type, ceilings)

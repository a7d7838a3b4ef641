"""The best rates of this machine, measured before and after each workload: a large matmul, a large copy, softmax of
cached data, and the shortest call."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

from benchmarks.harness.registry import Cost


@dataclass(frozen=True)
class Ceilings:
    tflops: dict[torch.dtype, float]
    gbs: float
    gsoftmax: float  # billions of elements per second, from cached data
    launch_us: float  # of a kernel that does almost nothing; on a CPU, of such a call

    def of(self, dtype: torch.dtype) -> dict[str, float]:
        """The form in which a row records them."""
        return {**asdict(self), "tflops": self.tflops[dtype]}

    def fraction(self, cost: Cost, dtype: torch.dtype, ms: float) -> float:
        """The shortest possible time (of arithmetic or of memory traffic, whichever is longer) divided by `ms`."""
        least = max(cost.flops / self.tflops[dtype] / 1e9, cost.bytes / self.gbs / 1e6)
        return least / ms

    def best(self, other: "Ceilings") -> "Ceilings":
        """The better of the two in each figure. Both must have the same dtypes."""
        return Ceilings(
            {dtype: max(rate, other.tflops[dtype]) for dtype, rate in self.tflops.items()},
            max(self.gbs, other.gbs),
            max(self.gsoftmax, other.gsoftmax),
            min(self.launch_us, other.launch_us),
        )


def around(measure: Callable[[], Ceilings]) -> Callable[[], Ceilings]:
    """Measure now and at every call of the result, which returns the better of its own and the previous measurement.

    On a shared machine a single measurement may fall into seconds at half speed.
    """
    last = measure()

    def measured() -> Ceilings:
        nonlocal last
        before, last = last, measure()
        return before.best(last)

    return measured


def measure_ceilings(
    device: torch.device, dtypes: Iterable[torch.dtype], clock: Callable[[Callable[[], object]], float], quick: bool
) -> Ceilings:
    tflops = {dtype: _matmul_tflops(device, dtype, clock, enough_ms=2 if quick else 20) for dtype in dtypes}
    size = (2**26 if quick else 2**30 if device.type == "cuda" else 2**28) // 4
    source, target = torch.randn(2, size, device=device)
    gbs = 2 * source.nbytes / _best(lambda: target.copy_(source), clock) / 1e6
    one = torch.zeros(1, device=device)
    launch_us = 1e3 * _best(lambda: one.add_(1), clock, calls=100)
    return Ceilings(tflops, gbs, _gsoftmax(device, clock), launch_us)


def _gsoftmax(device: torch.device, clock: Callable[[Callable[[], object]], float]) -> float:
    if device.type == "cuda":
        # PyTorch's softmax would be bound by memory. Since Volta a multiprocessor computes 16 exponentials per clock.
        properties = torch.cuda.get_device_properties(device)
        return 16 * properties.multi_processor_count * properties.clock_rate / 1e6
    scores, weights = torch.randn(2, 512, 512)
    return scores.numel() / _best(lambda: torch.softmax(scores, -1, out=weights), clock, calls=100) / 1e6


def _matmul_tflops(device, dtype, clock, enough_ms: float) -> float:
    """TFLOP/s of the first matmul that takes long enough. (A dtype without hardware support is slow at any size.)"""
    for n in (512, 1024, 2048, 4096, 8192):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        ms = _best(lambda a=a, b=b: a @ b, clock)
        if ms >= enough_ms:
            break
    return 2 * n**3 / ms / 1e9


def _best(call: Callable[[], object], clock: Callable[[Callable[[], object]], float], calls: int = 6) -> float:
    return min(clock(call) for _ in range(calls))

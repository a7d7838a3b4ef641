"""What this machine reaches at best, measured around what is held against it: a large matrix product, a large copy,
softmax of what is at hand, and the least time of a call."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

from benchmarks.harness.registry import Cost


@dataclass(frozen=True)
class Ceilings:
    tflops: dict[torch.dtype, float]
    gbs: float
    gsoftmax: float  # billions of elements a second, of data at hand
    launch_us: float  # of a kernel that does nothing; on a CPU, of such a call

    def of(self, dtype: torch.dtype) -> dict[str, float]:
        """As a row records them."""
        return {**asdict(self), "tflops": self.tflops[dtype]}

    def fraction(self, cost: Cost, dtype: torch.dtype, ms: float) -> float:
        """The least time the work could take here (its arithmetic or its traffic, whichever takes longer) over `ms`."""
        least = max(cost.flops / self.tflops[dtype] / 1e9, cost.bytes / self.gbs / 1e6)
        return least / ms

    def best(self, other: "Ceilings") -> "Ceilings":
        """Of each the better. Both are of the same dtypes."""
        return Ceilings(
            {dtype: max(rate, other.tflops[dtype]) for dtype, rate in self.tflops.items()},
            max(self.gbs, other.gbs),
            max(self.gsoftmax, other.gsoftmax),
            min(self.launch_us, other.launch_us),
        )


def around(measure: Callable[[], Ceilings]) -> Callable[[], Ceilings]:
    """Measures now and at every call, which returns the better of that and the one before: those of what ran between.

    A machine that others share loses half its pace for seconds: one measurement alone may fall there.
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
        # A softmax of PyTorch's would be bound by memory. Since Volta a multiprocessor has had sixteen exponentials a
        # clock.
        properties = torch.cuda.get_device_properties(device)
        return 16 * properties.multi_processor_count * properties.clock_rate / 1e6
    scores, weights = torch.randn(2, 512, 512)
    return scores.numel() / _best(lambda: torch.softmax(scores, -1, out=weights), clock, calls=100) / 1e6


def _matmul_tflops(device, dtype, clock, enough_ms: float) -> float:
    """Of the first product that takes long enough: a dtype without hardware for it is slow at any size."""
    for n in (512, 1024, 2048, 4096, 8192):
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        ms = _best(lambda a=a, b=b: a @ b, clock)
        if ms >= enough_ms:
            break
    return 2 * n**3 / ms / 1e9


def _best(call: Callable[[], object], clock: Callable[[Callable[[], object]], float], calls: int = 6) -> float:
    return min(clock(call) for _ in range(calls))

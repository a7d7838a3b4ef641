"""Which of the two bounds a call, the host or the GPU, as it is and in a CUDA graph."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.harness import timing

CALLS = 10

Calls = Callable[[int], Callable[[], object]]  # as `contest.timed_call` returns them


@dataclass(frozen=True)
class Bounds:
    """Microseconds of a call. Those of its graph are None if it was not captured."""

    kernel_us: float  # all its kernels
    host_us: float  # until it returns; the GPU is idle before
    graph_us: float | None = None  # a replay on the GPU
    graph_host_us: float | None = None  # until a replay returns
    not_captured: str | None = None

    def __str__(self) -> str:
        called = f"host {self.host_us:.1f} µs, kernels {self.kernel_us:.1f} µs: {bound(self.host_us, self.kernel_us)}"
        if self.graph_us is None:
            return f"{called}; no CUDA graph: {self.not_captured}"
        replayed = bound(self.graph_host_us, self.graph_us)
        return f"{called}; in a CUDA graph host {self.graph_host_us:.1f} µs, GPU {self.graph_us:.1f} µs: {replayed}"


def bound(host_us: float, gpu_us: float) -> str:
    """Who is waited for, and how many times longer that one takes."""
    if host_us > gpu_us:
        return f"the host bounds it ({host_us / max(gpu_us, 0.1):.1f}×)"
    return f"the GPU bounds it ({gpu_us / max(host_us, 0.1):.1f}×)"


def measure_bounds(
    call: Calls, kernel_us: float, device: torch.device, clock: Callable[[Callable[[], object]], float]
) -> Bounds:
    """`call`: a forward, or forward and backward. `clock`: the device's time of a call in milliseconds."""
    if device.type != "cuda":
        host_ms = timing.percentile([timing.CpuClock()(call(turn)) for turn in range(CALLS)], 50)
        return Bounds(kernel_us, 1e3 * host_ms, not_captured="the tensors are not on a GPU")
    host_us = 1e3 * timing.host_time(call, CALLS)
    try:
        graph = capture(call, device)
    except RuntimeError as error:  # CUDA's, where a call waits for the device
        return Bounds(kernel_us, host_us, not_captured=str(error).partition("\n")[0])
    graph_us = 1e3 * timing.percentile([clock(graph.replay) for _ in range(CALLS)], 50)
    return Bounds(kernel_us, host_us, graph_us, 1e3 * timing.host_time(lambda turn: graph.replay, CALLS))


def capture(call: Calls, device: torch.device) -> torch.cuda.CUDAGraph:
    """A call as a graph. It first runs on the graph's stream, where its kernels are compiled and its memory found."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call(0)()
        timed = call(1)
        with torch.cuda.graph(graph, stream=stream):
            timed()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph

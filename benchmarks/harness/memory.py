"""Peak memory of a call, beyond its inputs, measured outside the timed calls; and the most that any may take."""

from collections.abc import Callable
from itertools import accumulate

import torch

# Of a GPU: what does not fit is a row that says so, on a large card as on a small one.
MOST_BYTES = 60 * 10**9


def limit_memory(device: torch.device) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(MOST_BYTES / total, 1.0), device)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that tensors allocated by `call` held at one time, whatever library allocated them."""
    return _cuda_peak(call, device) if device.type == "cuda" else _cpu_peak(call)


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(call: Callable[[], object]) -> int:
    return max(accumulate(cpu_allocations(call)), default=0)


def cpu_allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of every allocation (positive) and release (negative) of torch's CPU allocator during `call`, in order."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=False) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]

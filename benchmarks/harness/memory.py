"""Peak memory of a call, not counting its inputs, measured outside the timed calls; and a limit for every process."""

from collections.abc import Callable
from itertools import accumulate

import torch

# Of GPU memory. A workload that needs more becomes a row that says so, on every card alike.
MOST_BYTES = 60 * 10**9


def limit_memory(device: torch.device) -> None:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        # It takes no device without an index. None is the current device, which "cuda" means too.
        torch.cuda.set_per_process_memory_fraction(min(MOST_BYTES / total, 1.0), device.index)


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes in use at one time by tensors that `call` allocates, in any library."""
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

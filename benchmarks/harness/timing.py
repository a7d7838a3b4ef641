"""Times implementations against each other: interleaved, warmed up, one call at a time."""

import gc
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

NO_VERDICT = "no verdict"
# A goal gets no verdict if either of these is exceeded.
MAX_SPREAD = 0.03
MAX_WAITING = 0.03
# With fewer rounds the median has no 95% confidence interval.
MIN_ROUNDS = 6
# When the time is up, an implementation stops after FEW_ROUNDS, or after JUDGED_ROUNDS if a verdict depends on it. All
# stop after PATIENCE times the time.
FEW_ROUNDS = 3
JUDGED_ROUNDS = 15
PATIENCE = 8
MAX_ROUNDS = 500
WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Samples:
    """Milliseconds of each call. Calls 2i and 2i + 1 belong to round i."""

    times: tuple[float, ...]
    waiting: float = 0.0  # share of the time that the threads waited for a core used by other programs

    def percentile(self, percent: int) -> float:
        return percentile(self.times, percent)

    @property
    def spread(self) -> float:
        return spread(self.rounds)

    @property
    def rounds(self) -> list[float]:
        return [first + second for first, second in zip(self.times[::2], self.times[1::2], strict=True)]


def percentile(values: Sequence[float], percent: int) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low, high = ordered[math.floor(rank)], ordered[math.ceil(rank)]
    return low + (high - low) * (rank - math.floor(rank))


def spread(values: Sequence[float]) -> float:
    """Half the width of the median's 95% confidence interval (order statistics), relative to the median."""
    n = len(values)
    if n < MIN_ROUNDS:
        return math.inf
    ordered = sorted(values)
    outside = int((n - 1.96 * math.sqrt(n)) / 2)  # order statistics outside, on each side
    return (ordered[n - 1 - outside] - ordered[outside]) / 2 / percentile(values, 50)


def time_ratio(contestant: Samples, against: Samples) -> tuple[float, float]:
    """Median over rounds of time(contestant) / time(against), and its spread.

    Within a round the two run next to each other, so a temporary slowdown of the machine cancels.
    """
    ratios = [ours / theirs for ours, theirs in zip(contestant.rounds, against.rounds, strict=True)]
    return percentile(ratios, 50), spread(ratios)


def finite(value: float) -> float | None:
    """The value, or None if it is not finite and JSON cannot hold it."""
    return value if math.isfinite(value) else None


def verdict(ratio: float, ratio_spread: float, waiting: float, goal: float) -> str:
    # Waiting for a core slows an implementation more the more often it synchronises its threads. That biases the ratio
    # without widening its spread, so it is checked on its own.
    if not (ratio_spread <= MAX_SPREAD and waiting <= MAX_WAITING and math.isfinite(ratio)):  # also false for NaN
        return NO_VERDICT
    return "met" if ratio <= goal else "missed"


def interleaved(names: Sequence[str], rounds: int) -> Iterator[str]:
    """A B C C B A in every round, so that a steady drift of the machine affects all equally."""
    for _ in range(rounds):
        yield from names
        yield from reversed(names)


def contestants_of_round(names: Sequence[str], judged: Collection[str], finished: int, done: float) -> list[str]:
    """Names that take part in the next round, after `finished` rounds and the share `done` of the time."""
    if finished > 0 and done >= PATIENCE:
        return []
    if done < 1 or finished < FEW_ROUNDS:
        return list(names)
    return [name for name in names if name in judged and finished < JUDGED_ROUNDS]


def measure(
    calls: Mapping[str, Callable[[int], Callable[[], object]]],
    clock: Callable[[Callable[[], object]], float],
    seconds: float,
    judged: Collection[str] = (),
    rivals: Collection[str] = (),
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Samples]:
    """Time each call for about `seconds` in all. As many rounds as a verdict needs get the calls in `judged`, and the
    fastest of those in `rivals`: the fastest when the time is up.

    Each entry of `calls` takes a turn number, which selects a set of inputs, and returns the function to time. Turns
    are counted over all entries, so that none finds its inputs in the cache of the one before.
    """
    if not calls:
        return {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn = 0
    for name in interleaved(list(calls), WARM_UP_CALLS // 2):
        calls[name](turn)()
        turn += 1
    gc.collect()
    gc.disable()
    try:
        waited, start, done = seconds_waited(), time.perf_counter(), 0.0
        for finished in range(MAX_ROUNDS):
            if rivals and finished >= FEW_ROUNDS and done >= 1:
                timed = [name for name in rivals if name in times]
                fastest = sorted(timed, key=lambda name: percentile(times[name], 50))[:1]
                judged, rivals = {*judged, *fastest}, ()
            names = contestants_of_round(list(calls), judged, finished, done)
            if not names:
                break
            for name in interleaved(names, 1):
                times[name].append(clock(calls[name](turn)))
                turn += 1
            done = (time.perf_counter() - start) / max(seconds, 1e-9)
            progress(min(done, 1.0))
    finally:
        gc.enable()
    elapsed = (time.perf_counter() - start) * torch.get_num_threads()
    waiting = (seconds_waited() - waited) / elapsed
    return {name: Samples(tuple(values), waiting) for name, values in times.items()}


def seconds_waited() -> float:
    """Seconds that this process's threads were ready to run but had no core (0 if the system does not report it)."""
    nanoseconds = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has just ended
            nanoseconds += int(thread.read_text().split()[1])
    return nanoseconds / 1e9


class CpuClock:
    """Wall-clock milliseconds of a call."""

    def __call__(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


class CudaClock:
    """Milliseconds between two events around a call, after the L2 cache was flushed.

    The flush reads memory; after writes, dirty cache lines would be written back while the call runs. It keeps the
    device busy for about half a millisecond, in which the host can launch the call. So the device's time is measured,
    unless the host (`host_time`) takes longer than that.
    """

    FLUSH_BYTES = 2**31

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.zeros(self.FLUSH_BYTES // 4, device=device)
        self.sum = torch.zeros((), device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self.flush, dim=0, out=self.sum)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)


def host_time(call: Callable[[int], Callable[[], object]], calls: int = 3) -> float:
    """Median milliseconds until a call on an idle CUDA device returns (its results are not ready by then)."""
    times = []
    for turn in range(calls):
        timed = call(turn)
        torch.cuda.synchronize()
        times.append(CpuClock()(timed))
    return percentile(times, 50)


def clock_for(device: torch.device) -> Callable[[Callable[[], object]], float]:
    return CudaClock(device) if device.type == "cuda" else CpuClock()

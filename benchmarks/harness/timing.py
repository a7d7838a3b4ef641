"""Times contestants against each other: interleaved, warmed up, one call at a time."""

import gc
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

NO_VERDICT = "no verdict"
# Over either of these there is none on a goal.
MAX_SPREAD = 0.03
MAX_WAITING = 0.03
# Fewer rounds than this leave the median without a 95% confidence interval.
MIN_ROUNDS = 6
# Once the time is up, contestants stop after FEW_ROUNDS, those a verdict rests on after JUDGED_ROUNDS, and all stop
# after PATIENCE times that time.
FEW_ROUNDS = 3
JUDGED_ROUNDS = 15
PATIENCE = 8
MAX_ROUNDS = 500
WARM_UP_CALLS = 2


@dataclass(frozen=True)
class Samples:
    """Milliseconds of each call; calls 2i and 2i + 1 are those of round i."""

    times: tuple[float, ...]
    waiting: float = 0.0  # share of the time that the threads waited for a core taken by other programs

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
    outside = int((n - 1.96 * math.sqrt(n)) / 2)  # order statistics on each side of the interval
    return (ordered[n - 1 - outside] - ordered[outside]) / 2 / percentile(values, 50)


def time_ratio(contestant: Samples, against: Samples) -> tuple[float, float]:
    """The median over rounds of time(contestant) / time(against), and its spread.

    The two are measured next to each other in a round, so whatever slows the machine for a while cancels.
    """
    ratios = [ours / theirs for ours, theirs in zip(contestant.rounds, against.rounds, strict=True)]
    return percentile(ratios, 50), spread(ratios)


def finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return value if math.isfinite(value) else None


def verdict(ratio: float, ratio_spread: float, waiting: float, goal: float) -> str:
    # Waiting for a core slows whoever synchronises its threads more often: it biases a ratio and may not spread it.
    if not (ratio_spread <= MAX_SPREAD and waiting <= MAX_WAITING and math.isfinite(ratio)):  # NaN is none either
        return NO_VERDICT
    return "met" if ratio <= goal else "missed"


def interleaved(names: Sequence[str], rounds: int) -> Iterator[str]:
    """A B C C B A in every round: a steady drift of the machine adds the same to each."""
    for _ in range(rounds):
        yield from names
        yield from reversed(names)


def contestants_of_round(names: Sequence[str], judged: Collection[str], finished: int, done: float) -> list[str]:
    """Who takes part in the round after `finished` rounds, when `done` of the time is used."""
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
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Samples]:
    """Samples of each call within about `seconds`; those whose times a verdict rests on get all the rounds it takes.

    A call takes its turn's number, to pick a set of inputs by, and returns what is timed. The turn counts over all
    contestants, so none finds in the cache what the one before it has read.
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
    """The time that this process's threads have been ready to run without a core (0 where the system does not say)."""
    nanoseconds = 0
    for thread in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has just ended
            nanoseconds += int(thread.read_text().split()[1])
    return nanoseconds / 1e9


class CpuClock:
    """Wall time of a call, in milliseconds."""

    def __call__(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3


class CudaClock:
    """Time between two events around a call, in milliseconds, the L2 cache flushed before.

    It is flushed by reading: what a write leaves in the cache, up to all of it, would be written back to memory while
    the call runs. The device reads for about half a millisecond, the lead that the host has for launching: what is
    timed is the device's work, however long the host took to ask for it (`host_time`), unless that is longer still.
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
    """Milliseconds until a call on an idle CUDA device returns, which is before its results are there: the median."""
    times = []
    for turn in range(calls):
        timed = call(turn)
        torch.cuda.synchronize()
        times.append(CpuClock()(timed))
    return percentile(times, 50)


def clock_for(device: torch.device) -> Callable[[Callable[[], object]], float]:
    return CudaClock(device) if device.type == "cuda" else CpuClock()

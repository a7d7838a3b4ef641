"""Goals: what an implementation must reach against the best of several others, and what became of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.harness import timing

NOT_MEASURED = "not measured"


class Measured(NamedTuple):
    """What goals are judged by."""

    samples: timing.Samples
    peak_bytes: int
    host_ms: float | None = None
    ceiling_fraction: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a goal. None: it does not apply, or was not measured."""

    goal: str
    verdict: str = NOT_MEASURED
    against: str | None = None  # the one that it was decided against, or those that were missing
    time_ratio: float | None = None
    spread: float | None = None  # of the ratio
    extra_bytes: int | None = None
    memory_ratio: float | None = None
    milliseconds: float | None = None
    ceiling_fraction: float | None = None

    @property
    def undecided(self) -> bool:
        """Whether nothing was measured that decides it, for want of the opponents in `against`."""
        figures = (self.time_ratio, self.extra_bytes, self.memory_ratio, self.milliseconds, self.ceiling_fraction)
        return self.verdict == timing.NO_VERDICT and all(figure is None for figure in figures)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A goal against the best of those in `against` that were measured: each of them must be matched. None: absolute.

    It is stated for one kind of device, and for the dtype that runs on it are in by default.
    """

    workload: str
    direction: str
    against: tuple[str, ...] = ()
    implementation: str = "recattn"
    device: str = "cpu"

    @property
    def opponents(self) -> str:
        return self.against[0] if len(self.against) == 1 else f"the best of {', '.join(self.against)}"


@dataclass(frozen=True, kw_only=True)
class TimeGoal(Goal):
    """Time ≤ time_ratio · time of the best."""

    time_ratio: float

    def __str__(self) -> str:
        if self.time_ratio >= 1:
            return f"{self.direction} ≤ {self.time_ratio:.2f}× the time of {self.opponents}"
        return f"{self.direction} ≥ {1 / self.time_ratio:.1f}× as fast as {self.opponents}"

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        # The best is one opponent for the whole run: the fastest of each round, which nobody can choose, would be a
        # minimum over noise. The ratio to it is still taken round by round.
        ratios = {name: timing.time_ratio(own.samples, other.samples) for name, other in others.items()}
        best = max(ratios, key=ratios.get)
        ratio, spread = ratios[best]
        verdict = timing.verdict(ratio, spread, own.samples.waiting, self.time_ratio)
        return Outcome(str(self), verdict, best, ratio, timing.finite(spread))


@dataclass(frozen=True, kw_only=True)
class ExtraMemoryGoal(Goal):
    """Peak memory beyond the inputs ≤ that of the leanest + extra_bytes."""

    extra_bytes: int

    def __str__(self) -> str:
        return f"{self.direction} ≤ {self.extra_bytes / 1e6:.0f} MB more than {self.opponents}"

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        leanest, peak = _leanest(others)
        extra = own.peak_bytes - peak
        return Outcome(str(self), "met" if extra <= self.extra_bytes else "missed", leanest, extra_bytes=extra)


@dataclass(frozen=True, kw_only=True)
class MemoryGoal(Goal):
    """Peak memory beyond the inputs ≤ memory_ratio · that of the leanest."""

    memory_ratio: float

    def __str__(self) -> str:
        share = "" if self.memory_ratio == 1 else f"1/{1 / self.memory_ratio:.0f} of "
        return f"{self.direction} ≤ {share}the memory of {self.opponents}"

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        leanest, peak = _leanest(others)
        ratio = own.peak_bytes / peak
        return Outcome(str(self), "met" if ratio <= self.memory_ratio else "missed", leanest, memory_ratio=ratio)


@dataclass(frozen=True, kw_only=True)
class LatencyGoal(Goal):
    """One call alone ≤ milliseconds: the device's time, and the host's before it where `host`."""

    milliseconds: float
    host: bool = False

    def __str__(self) -> str:
        return f"{'host + device' if self.host else 'device'} ≤ {1e3 * self.milliseconds:g} µs a call"

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        taken = own.samples.percentile(50) + (own.host_ms or 0.0 if self.host else 0.0)
        spread = own.samples.spread
        verdict = timing.verdict(taken / self.milliseconds, spread, own.samples.waiting, 1.0)
        return Outcome(str(self), verdict, spread=timing.finite(spread), milliseconds=taken)


@dataclass(frozen=True, kw_only=True)
class CeilingGoal(Goal):
    """The least time that the work could take here, by the measured ceilings, ≥ fraction of the time it takes."""

    fraction: float

    def __str__(self) -> str:
        return f"{self.direction} ≥ {self.fraction:.0%} of the ceiling"

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        spread = own.samples.spread
        verdict = timing.verdict(self.fraction / own.ceiling_fraction, spread, own.samples.waiting, 1.0)
        return Outcome(str(self), verdict, spread=timing.finite(spread), ceiling_fraction=own.ceiling_fraction)


def _leanest(others: Mapping[str, Measured]) -> tuple[str, int]:
    name = min(others, key=lambda name: others[name].peak_bytes)
    return name, others[name].peak_bytes

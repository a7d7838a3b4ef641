"""Goals: what an implementation must reach against the best of several others, and whether it did."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.harness import timing

NOT_MEASURED = "not measured"
# What the C++ kernels may use of a processor, as they name it, and as it is written in tables.
CAPABILITIES = {"baseline": "baseline", "avx2": "AVX2", "avx512": "AVX-512", "avx512_bf16": "AVX-512 with BF16"}
AVX2, AVX512 = ("avx2",), ("avx512", "avx512_bf16")


class Measured(NamedTuple):
    """What goals are judged by."""

    samples: timing.Samples
    peak_bytes: int
    host_ms: float | None = None
    ceiling_fraction: float | None = None


class Wording(NamedTuple):
    """A goal in words: as one sentence, which identifies it in the records, and as two cells of a table."""

    sentence: str
    quantity: str  # what is compared
    target: str  # the value to reach


@dataclass(frozen=True)
class Outcome:
    """The result of a goal. A field is None if it does not apply or was not measured."""

    goal: str
    verdict: str = NOT_MEASURED
    against: str | None = None  # the opponent that decided it, or the opponents that are missing
    time_ratio: float | None = None
    spread: float | None = None  # of the ratio
    extra_bytes: int | None = None
    memory_ratio: float | None = None
    milliseconds: float | None = None
    ceiling_fraction: float | None = None

    @property
    def undecided(self) -> bool:
        """Whether nothing could be measured because the opponents in `against` are missing."""
        figures = (self.time_ratio, self.extra_bytes, self.memory_ratio, self.milliseconds, self.ceiling_fraction)
        return self.verdict == timing.NO_VERDICT and all(figure is None for figure in figures)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """A goal against the best of the measured implementations in `against`; an absolute one if that is empty.

    A goal belongs to one type of device and to that device's default dtype. `capabilities`: of the CPU, where it does
    not hold for all of them. Subclasses word and judge it.
    """

    workload: str
    direction: str
    against: tuple[str, ...] = ()
    implementation: str = "recattn"
    device: str = "cpu"
    capabilities: tuple[str, ...] = ()

    def holds_at(self, capability: str | None) -> bool:
        return not self.capabilities or capability in self.capabilities

    @property
    def opponents(self) -> str:
        return self.against[0] if len(self.against) == 1 else f"the best of {', '.join(self.against)}"

    @property
    def wording(self) -> Wording:
        raise NotImplementedError

    def __str__(self) -> str:
        return self.wording.sentence

    def _absolute(self, ratio: float, own: Measured, **figures: float) -> Outcome:
        """The outcome of a goal without opponents: met where `ratio` is at most 1."""
        spread = own.samples.spread
        verdict = timing.verdict(ratio, spread, own.samples.waiting, 1.0)
        return Outcome(str(self), verdict, spread=timing.finite(spread), **figures)


@dataclass(frozen=True, kw_only=True)
class TimeGoal(Goal):
    """Time ≤ time_ratio · time of the best."""

    time_ratio: float

    @property
    def wording(self) -> Wording:
        speed = 1 / self.time_ratio
        if speed <= 1 or not math.isclose(speed, round(speed, 2)):  # 0.95 is no round speedup
            target, comparison, quantity = f"≤ {self.time_ratio:.2f}×", "the time of", "time vs"
        else:
            digits = 1 if math.isclose(speed, round(speed, 1)) else 2
            target, comparison, quantity = f"≥ {speed:.{digits}f}×", "as fast as", "speedup over"
        where = f" at {CAPABILITIES[self.capabilities[0]]}" if self.capabilities else ""
        sentence = f"{self.direction} {target} {comparison} {self.opponents}{where}"
        return Wording(sentence, f"{quantity} {self.opponents}", f"{target}{where}")

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        # One opponent for the whole run: the one with the worst ratio. The fastest of each round would be a minimum
        # over noise. The ratio itself is taken round by round.
        ratios = {name: timing.time_ratio(own.samples, other.samples) for name, other in others.items()}
        best = max(ratios, key=ratios.get)
        ratio, spread = ratios[best]
        verdict = timing.verdict(ratio, spread, own.samples.waiting, self.time_ratio)
        return Outcome(str(self), verdict, best, ratio, timing.finite(spread))


@dataclass(frozen=True, kw_only=True)
class NeverSlowerGoal(TimeGoal):
    """Time ≤ that of the fastest in `against`: all PyTorch formulations of the same result."""

    time_ratio: float = 1.0

    @property
    def opponents(self) -> str:
        return "the best PyTorch formulation"

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        # Only the fastest is timed in as many rounds as recattn.
        rounds = len(own.samples.times)
        fully = {name: other for name, other in others.items() if len(other.samples.times) == rounds}
        best = min(fully, key=lambda name: fully[name].samples.percentile(50))
        return super().judge(own, {best: fully[best]})


@dataclass(frozen=True, kw_only=True)
class ExtraMemoryGoal(Goal):
    """Peak memory beyond the inputs ≤ that of the leanest opponent + extra_bytes."""

    extra_bytes: int

    @property
    def wording(self) -> Wording:
        target = f"≤ {self.extra_bytes / 1e6:.0f} MB"
        sentence = f"{self.direction} {target} more than {self.opponents}"
        return Wording(sentence, f"memory beyond {self.opponents}", target)

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        leanest, peak = _leanest(others)
        extra = own.peak_bytes - peak
        return Outcome(str(self), "met" if extra <= self.extra_bytes else "missed", leanest, extra_bytes=extra)


@dataclass(frozen=True, kw_only=True)
class MemoryGoal(Goal):
    """Peak memory beyond the inputs ≤ memory_ratio · that of the leanest opponent."""

    memory_ratio: float

    @property
    def wording(self) -> Wording:
        share = f"{self.memory_ratio:g}" if self.memory_ratio >= 1 else f"1/{1 / self.memory_ratio:.0f}"
        amount = "" if self.memory_ratio == 1 else f"{share}× " if self.memory_ratio > 1 else f"{share} of "
        sentence = f"{self.direction} ≤ {amount}the memory of {self.opponents}"
        return Wording(sentence, f"memory vs {self.opponents}", f"≤ {share}")

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        leanest, peak = _leanest(others)
        ratio = own.peak_bytes / peak
        return Outcome(str(self), "met" if ratio <= self.memory_ratio else "missed", leanest, memory_ratio=ratio)


@dataclass(frozen=True, kw_only=True)
class LatencyGoal(Goal):
    """One call ≤ milliseconds: the device's time, plus the host's time before it if `host`."""

    milliseconds: float
    host: bool = False

    @property
    def wording(self) -> Wording:
        clocks, target = "host + device" if self.host else "device", f"≤ {1e3 * self.milliseconds:g} µs"
        return Wording(f"{clocks} {target} a call", f"time of one call, {clocks}", target)

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        taken = own.samples.percentile(50) + (own.host_ms or 0.0 if self.host else 0.0)
        return self._absolute(taken / self.milliseconds, own, milliseconds=taken)


@dataclass(frozen=True, kw_only=True)
class CeilingGoal(Goal):
    """The shortest time that the measured ceilings allow ≥ fraction · the time taken."""

    fraction: float

    @property
    def wording(self) -> Wording:
        share = f"{self.fraction:.0%}"
        return Wording(f"{self.direction} ≥ {share} of the ceiling", "share of the ceiling", f"≥ {share}")

    def judge(self, own: Measured, others: Mapping[str, Measured]) -> Outcome:
        return self._absolute(self.fraction / own.ceiling_fraction, own, ceiling_fraction=own.ceiling_fraction)


@dataclass(frozen=True)
class HostGoal:
    """The host's time of a call ≤ units · that of SDPA's smallest call."""

    units: float

    def __str__(self) -> str:
        return f"≤ {self.units:g}"

    def judge(self, units: float) -> str:
        return "met" if units <= self.units else "missed"


def _leanest(others: Mapping[str, Measured]) -> tuple[str, int]:
    name = min(others, key=lambda name: others[name].peak_bytes)
    return name, others[name].peak_bytes

"""Runs of the benchmark suite that its tests share."""

import torch

from benchmarks.harness import contest, timing
from benchmarks.harness.goals import (
    Measured,
)

CPU = torch.device("cpu")


def run_all(operator, settings):
    own = contest.Contest(operator, operator.workloads[0], list(operator.implementations.values()), settings)
    return {(row.impl, row.direction): row for row in own.run()}


def measured(*milliseconds: float, peak: int = 0) -> Measured:
    """Eight rounds of the same times."""
    return Measured(timing.Samples(milliseconds * 8), peak)

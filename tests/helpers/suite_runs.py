"""Runs of the benchmark suite and of SASRec that their tests share."""

import torch

from benchmarks.data.movielens import Histories
from benchmarks.harness import contest, timing
from benchmarks.harness.goals import Measured
from benchmarks.quality.sasrec import Hyperparameters

CPU = torch.device("cpu")
SMALL_SASREC = Hyperparameters(length=8, dim=16, heads=2, batch=16, learning_rate=1e-2)


def run_all(operator, settings):
    own = contest.Contest(operator, operator.workloads[0], list(operator.implementations.values()), settings)
    return {(row.impl, row.direction): row for row in own.run()}


def measured(*milliseconds: float, peak: int = 0) -> Measured:
    """Eight rounds with the same times."""
    return Measured(timing.Samples(milliseconds * 8), peak)


def histories_by_steps() -> Histories:
    """Each user walks around a circle of 30 items, one after another."""
    generator = torch.Generator().manual_seed(0)
    starts, lengths = torch.randint(15, (2, 48), generator=generator)
    return Histories([1 + torch.arange(s, s + n + 12) % 30 for s, n in zip(starts, lengths, strict=True)], "steps")

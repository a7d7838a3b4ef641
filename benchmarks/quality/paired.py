"""The effect of one arm over another: paired by seed, with intervals by bootstrap over users and seeds.

For one seed, all arms see the same batches, and they are tested on the same users. An effect could have come out
otherwise with other users and with other seeds, so a replicate of the bootstrap draws both again.
"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

REPLICATES = 2000
LEVEL = 0.95
# Standard errors between 0 and an effect that a two-sided test at 5% finds four times out of five: 1.96 + 0.84.
DETECTED = 2.80


class Metric(Protocol):
    """A metric of one training, of users that count with the given weights."""

    @property
    def users(self) -> int: ...

    def of(self, weights: Tensor) -> Tensor:
        """Weights [B, U] -> metrics [B]."""
        ...


class Mean(NamedTuple):
    """Σ sums / Σ counts over the users."""

    sums: Tensor  # [U]
    counts: Tensor  # [U]

    @property
    def users(self) -> int:
        return len(self.counts)

    def of(self, weights: Tensor) -> Tensor:
        return (weights @ self.sums) / (weights @ self.counts)


class AreaUnderCurve(NamedTuple):
    """AUC over the samples of all users: pairs won of all pairs of a positive and a negative."""

    wins: Tensor  # [U, U] pairs of a positive of the row's user and a negative of the column's that the positive wins
    positives: Tensor  # [U]
    negatives: Tensor  # [U]

    @property
    def users(self) -> int:
        return len(self.wins)

    def of(self, weights: Tensor) -> Tensor:
        won = ((weights @ self.wins) * weights).sum(1)
        return won / ((weights @ self.positives) * (weights @ self.negatives))


class Estimate(NamedTuple):
    """`effect` with its 95% interval, and the smallest effect that this many users and seeds would show."""

    effect: float
    low: float
    high: float
    detectable: float


# --- Metrics by user ---


def mean_of_users(values: Tensor) -> Mean:
    """The mean of a value per user."""
    return Mean(values.double(), torch.ones(len(values), dtype=torch.float64))


def log_loss(logits: Tensor, labels: Tensor, users: Tensor) -> Mean:
    """Mean binary cross-entropy in nats. Samples [S]; users [S] are numbers from 0."""
    losses = F.binary_cross_entropy_with_logits(logits.double(), labels.double(), reduction="none")
    return Mean(_sum_by_user(losses, users), _sum_by_user(torch.ones_like(losses), users))


def area_under_curve(scores: Tensor, labels: Tensor, users: Tensor) -> AreaUnderCurve:
    """Ties count half. Samples [S]; users [S] are numbers from 0. Raises ValueError if a score is not finite."""
    if not scores.isfinite().all():
        raise ValueError(f"scores must be finite, got {int((~scores.isfinite()).sum())} of {len(scores)} that are not")
    positive = labels > 0
    count = int(users.max()) + 1
    order = scores[~positive].argsort()
    sorted_scores, sorted_users = scores[~positive][order], users[~positive][order]
    # wins[u, v] = Σ over positives p of u of the negatives of v below p: by a running count of each user's negatives.
    below = torch.zeros(len(order) + 1, count, dtype=torch.float64)
    below[1:] = F.one_hot(sorted_users, count).cumsum(0)
    strictly, at_most = (
        below[torch.searchsorted(sorted_scores, scores[positive], right=right)] for right in (False, True)
    )
    wins = torch.zeros(count, count, dtype=torch.float64).index_add_(0, users[positive], (strictly + at_most) / 2)
    positives = _sum_by_user(positive.double(), users)
    return AreaUnderCurve(wins, positives, _sum_by_user((~positive).double(), users))


def _sum_by_user(values: Tensor, users: Tensor) -> Tensor:
    return torch.zeros(int(users.max()) + 1, dtype=torch.float64).index_add_(0, users, values.double())


# --- Effects ---


def value(metric: Metric) -> float:
    """The metric, each user counted once."""
    return metric.of(torch.ones(1, metric.users, dtype=torch.float64)).item()


def estimate(method: Sequence[Metric], baseline: Sequence[Metric]) -> Estimate:
    """The mean over seeds of method - baseline. A metric per seed each, in the same order.

    A replicate draws as many users as there are, and one seed less than there are: so its variance is that of a mean
    over seeds, and not smaller by the factor (S - 1) / S.
    """
    generator = torch.Generator().manual_seed(0)
    seeds, users = len(method), method[0].users
    effect = statistics.mean(value(m) - value(b) for m, b in zip(method, baseline, strict=True))
    by_user = _times_drawn(users, users, generator)
    by_seed = _times_drawn(seeds, max(seeds - 1, 1), generator)
    differences = [m.of(by_user) - b.of(by_user) for m, b in zip(method, baseline, strict=True)]
    replicates = (torch.stack(differences, dim=1) * by_seed).sum(1) / by_seed.sum(1)
    tail = (1 - LEVEL) / 2
    low, high = replicates.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Estimate(effect, low, high, DETECTED * replicates.std().item())


def _times_drawn(count: int, draws: int, generator: torch.Generator) -> Tensor:
    """[REPLICATES, count] how often each of `count` is among `draws` draws with replacement."""
    drawn = torch.randint(count, (REPLICATES, draws), generator=generator)
    ones = torch.ones(REPLICATES, draws, dtype=torch.float64)
    return torch.zeros(REPLICATES, count, dtype=torch.float64).scatter_add_(1, drawn, ones)

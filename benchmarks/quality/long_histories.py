"""`python -m benchmarks.quality.long_histories`: planted signals in synthetic histories of 512: which are found?

SYNTHETIC, drawn anew from a seed. Items belong to topics. A user clicks a candidate if its topic is one of

    main     two topics, 30% of the history each
    rare     one topic with 1, 4 or 16 behaviours, anywhere
    recent   one topic with 8 behaviours, all among the newest 32

and does not if it is `expired`, with 8 behaviours among the oldest 32, or absent from the history. All other behaviours
are of topics that no candidate has. A test metric is the AUC of one kind of candidates against absent ones (recent:
against expired ones), over users that no training saw; 0.5 is chance.

What to expect: all should find `main`. Full attention can find `rare`; a mean dilutes it, and LREA compresses by
position, so that a behaviour at a random place is one of L / r that share a row of its state (the critics' case). Only
LREA knows positions, so only LREA can tell `recent` from `expired`.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality import experiment, paired
from benchmarks.quality.din import DIN, DOT, LREA_RANKS, MEAN, SOFTMAX, Batch, Hyperparameters, Ranker, fit_batches
from benchmarks.quality.experiment import Experiment, Trained
from benchmarks.quality.paired import Metric
from benchmarks.quality.training import TrainingRow, count_parameters

ARMS = (MEAN, DOT, SOFTMAX, DIN, *LREA_RANKS)
TOPICS, OTHER_TOPICS, ITEMS_PER_TOPIC = 48, 16, 4  # candidates are of the first ones only
RARE_COUNTS = (1, 4, 16)
FEW, EDGE = 8, 32  # behaviours of a recent or an expired topic, and how many of the newest or oldest they are among
MAIN_SHARE = 0.3
KINDS = ("main", "rare", "recent", "expired", "absent")
CANDIDATES = (2, 2, 2, 2, 4)  # per user, by kind
USERS = (4096, 512, 1024)  # of the training, the validation and the test


@dataclass(frozen=True)
class Histories:
    items: Tensor  # [U, L] oldest first
    candidates: Tensor  # [U, n]
    kinds: Tensor  # [n] numbers of KINDS
    rare_counts: Tensor  # [U]

    def __len__(self) -> int:
        return len(self.items)

    @property
    def labels(self) -> Tensor:
        """[U, n]"""
        clicked = self.kinds < KINDS.index("expired")
        return clicked.float().expand(len(self), -1)

    def batch(self, users: Tensor) -> Batch:
        history = self.items[users]
        lengths = torch.full((len(users),), history.shape[1])
        return Batch(self.candidates[users], self.labels[users], history, torch.zeros_like(history), lengths)


@dataclass(frozen=True)
class Parts:
    training: Histories
    validation: Histories
    test: Histories
    source: str


def draw(users: int, length: int, seed: int) -> Histories:
    generator = torch.Generator().manual_seed(seed)
    items, candidates, rare_counts = [], [], []
    for _ in range(users):
        topics = torch.randperm(TOPICS, generator=generator)
        main, rare, recent, expired, absent = topics.split([2, 1, 1, 1, TOPICS - 5])
        count = RARE_COUNTS[int(torch.randint(len(RARE_COUNTS), (), generator=generator))]
        history = TOPICS + torch.randint(OTHER_TOPICS, (length,), generator=generator)
        share = torch.rand(length, generator=generator)
        for number, topic in enumerate(main):
            history[(share >= number * MAIN_SHARE) & (share < (number + 1) * MAIN_SHARE)] = topic
        newest = length - EDGE + torch.randperm(EDGE, generator=generator)[:FEW]
        oldest = torch.randperm(EDGE, generator=generator)[:FEW]
        between = EDGE + torch.randperm(length - 2 * EDGE, generator=generator)[:count]
        history[newest], history[oldest], history[between] = recent, expired, rare
        kinds = zip((main, rare, recent, expired, absent), CANDIDATES, strict=True)
        asked = [own[torch.randint(len(own), (number,), generator=generator)] for own, number in kinds]
        items.append(_items_of(history, generator))
        candidates.append(_items_of(torch.cat(asked), generator))
        rare_counts.append(count)
    kinds = torch.arange(len(KINDS)).repeat_interleave(torch.tensor(CANDIDATES))
    return Histories(torch.stack(items), torch.stack(candidates), kinds, torch.tensor(rare_counts))


def _items_of(topics: Tensor, generator: torch.Generator) -> Tensor:
    """A random item, numbered from 1, of each topic."""
    return 1 + topics * ITEMS_PER_TOPIC + torch.randint(ITEMS_PER_TOPIC, topics.shape, generator=generator)


def load(offline: bool = False) -> Parts:
    parts = (draw(users, HYPER.length, seed) for seed, users in enumerate(USERS))
    return Parts(*parts, "synthetic long histories")


# --- Training and test ---


@torch.no_grad()
def scores(ranker: Ranker, histories: Histories) -> Tensor:
    """[U, n]"""
    users = torch.arange(len(histories))
    return torch.cat([ranker(histories.batch(part))[0] for part in users.split(64)])


def validation_auc(ranker: Ranker, histories: Histories) -> float:
    own = scores(ranker, histories)
    everyone = torch.zeros(own.numel(), dtype=torch.long)
    return paired.value(paired.area_under_curve(own.flatten(), histories.labels.flatten(), everyone))


def train(model: str, seed: int, hyper: Hyperparameters, parts: Parts, device: torch.device) -> Trained:
    torch.manual_seed(seed)
    ranker = Ranker(model, hyper)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Batch]:
        for users in torch.randperm(len(parts.training), generator=generator).split(hyper.batch):
            yield parts.training.batch(users)

    fitted = fit_batches(ranker, hyper, batches, lambda: validation_auc(ranker, parts.validation))
    row = TrainingRow(parameters=count_parameters(ranker), **fitted._asdict())
    test = parts.test
    return Trained(row, {"scores": scores(ranker, test), "kinds": test.kinds, "rare_counts": test.rare_counts})


def metrics(tested: dict[str, Tensor]) -> dict[str, Metric]:
    own, kinds, rare_counts = tested["scores"], tested["kinds"], tested["rare_counts"]
    everyone = torch.ones(len(own), dtype=torch.bool)
    found = {"main": _against(own, kinds, "main", "absent", everyone)}
    for count in RARE_COUNTS:
        found[f"rare, {count}"] = _against(own, kinds, "rare", "absent", rare_counts == count)
    return found | {"recent": _against(own, kinds, "recent", "expired", everyone)}


def _against(own: Tensor, kinds: Tensor, kind: str, others: str, chosen: Tensor) -> Metric:
    """AUC of a kind of candidates of the chosen users against those of another kind of all users."""
    positive, negative = (own[:, kinds == KINDS.index(name)] for name in (kind, others))
    rows = torch.arange(len(own))
    users = [rows[:, None].expand_as(x) for x in (positive, negative)]
    taken = [chosen[:, None].expand_as(positive), torch.ones_like(negative, dtype=torch.bool)]
    values, users = (
        torch.cat([x[keep] for x, keep in zip(pair, taken, strict=True)]) for pair in ((positive, negative), users)
    )
    labels = torch.arange(len(values)) < int(taken[0].sum())
    return paired.area_under_curve(values, labels, users)


# --- The experiment ---

HYPER = Hyperparameters(length=512, batch=32, epochs=20, patience=5, weight_decay=0.0)


def search(model: str) -> dict[str, Sequence[object]]:
    common = {"learning_rate": (1e-3, 3e-3, 1e-2)}
    return common | {"nonnegativity": (1e-3, 1e-2, 1e-1)} if model in LREA_RANKS else common


EXPERIMENT = Experiment(
    name="long_histories",
    op="lrea_attention",
    arms=ARMS,
    hyper=HYPER,
    search=search,
    comparisons=tuple((lrea, baseline) for baseline in (MEAN, SOFTMAX, DIN) for lrea in LREA_RANKS),
    load=load,
    train=train,
    metrics=metrics,
    budget=3,
    seeds=5,
)


if __name__ == "__main__":
    sys.exit(experiment.main(EXPERIMENT, None, __doc__))

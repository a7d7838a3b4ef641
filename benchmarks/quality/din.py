"""`python -m benchmarks.quality.din`: target attention over MovieLens-100k, full and compressed: is LREA as good?

Each rating is a sample: is it 4 or more, given the movie and the user's earlier ratings (at most 200)? The last tenth
of each user's ratings is the test, the tenth before it the validation. All models share the embeddings and the layers
after the attention. The epoch with the best validation AUC counts. LREA is trained in the restored form and also served
from its absorbed states, in float32 and int8. `benchmarks.quality.din_serving` measures the time to serve.
"""

import copy
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.data import movielens
from benchmarks.harness.timing import finite
from benchmarks.quality import experiment, paired
from benchmarks.quality.experiment import Experiment, Trained
from benchmarks.quality.paired import Metric
from benchmarks.quality.training import TrainingRow, batches_of_similar_lengths, count_parameters, timed_epoch
from recattn.nn import LREA, Fidelity, TargetAttention

MEAN, DOT, SOFTMAX, DIN = "mean", "dot product", "softmax", "DIN"
LREA_RANKS = {f"LREA {rank}": rank for rank in (4, 8, 16, 32)}
MODELS = (MEAN, DOT, SOFTMAX, DIN, *LREA_RANKS)
CPU = torch.device("cpu")
LIKED = 4  # the lowest rating that counts as liked
CANDIDATES = 200  # per user, for the fidelity
# How a trained LREA is served: dtype of the states, and orientation. Training depends on neither.
SERVED = {
    "float32": (torch.float32, "scores"),
    "int8": (torch.int8, "scores"),
    "weights": (torch.float32, "weights"),
}


@dataclass(frozen=True)
class Hyperparameters:
    length: int = 200
    dim: int = 16
    activation_units: int = 36  # of DIN, its authors' value
    hidden: int = 64
    batch: int = 512
    learning_rate: float = 3e-3
    weight_decay: float = 1e-5
    nonnegativity: float = 1e-2
    epochs: int = 12
    patience: int = 2


@dataclass(kw_only=True)
class Row(TrainingRow):
    """One training. Only LREA has `served_auc` and `fidelity` (also of smaller ranks), by the names in SERVED."""

    served_auc: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, list[dict[str, object]]] = field(default_factory=dict)


# --- Data ---


class Batch(NamedTuple):
    items: Tensor  # [U, n] the candidates
    labels: Tensor  # [U, n]
    history: Tensor  # [U, L] items, oldest first
    liked: Tensor  # [U, L]
    lengths: Tensor  # [U]


class Ratings:
    """Every user's items and whether they were liked, in time order, padded right. A sample is (user, position)."""

    def __init__(self, items: Sequence[Tensor], liked: Sequence[Tensor], source: str) -> None:
        self.items, self.liked = (nn.utils.rnn.pad_sequence(list(x), batch_first=True) for x in (items, liked))
        self.counts = torch.tensor([len(x) for x in items])
        self.source = source

    def samples(self, start: float, stop: float) -> Tensor:
        """[S, 2] samples between two fractions of each user's ratings, except the first rating: it has no history."""
        bounds = zip((self.counts * start).long().tolist(), (self.counts * stop).long().tolist(), strict=True)
        return torch.tensor([(user, p) for user, (low, high) in enumerate(bounds) for p in range(max(low, 1), high)])

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """The samples of the training, the validation and the test."""
        return tuple(self.samples(*part) for part in ((0, 0.8), (0.8, 0.9), (0.9, 1)))

    def before_the_test(self) -> Tensor:
        """[U, 2] the first test sample of each user. Its history is everything before the test."""
        return torch.stack([torch.arange(len(self.counts)), (self.counts * 0.9).long()], dim=1)

    def first(self, users: int) -> "Ratings":
        """The ratings of the first users."""
        counts = self.counts[:users].tolist()
        items, liked = ([x[user, :n] for user, n in enumerate(counts)] for x in (self.items, self.liked))
        return Ratings(items, liked, self.source)

    def batch(self, samples: Tensor, length: int) -> Batch:
        """The samples as a batch. The history of a sample is the newest `length` ratings before it."""
        users, positions = samples.unbind(1)
        lengths = positions.clamp(max=length)
        columns = torch.arange(int(lengths.max()))
        taken = ((positions - lengths)[:, None] + columns).clamp(max=self.items.shape[1] - 1)
        padding = columns >= lengths[:, None]
        history, liked = (x[users[:, None], taken].masked_fill(padding, 0) for x in (self.items, self.liked))
        item, label = (x[users, positions][:, None] for x in (self.items, self.liked))
        return Batch(item, label.float(), history, liked, lengths)


def load(offline: bool = False) -> Ratings:
    """MovieLens-100k. Without the data: drawn items, each liked with a drawn probability."""
    users = movielens.events(offline)
    if users is None:
        histories = movielens.load(offline)
        generator = torch.Generator().manual_seed(1)
        taste = torch.rand(movielens.ITEMS + 1, generator=generator)
        liked = [(torch.rand(len(x), generator=generator) < taste[x]).long() for x in histories.items]
        return Ratings(histories.items, liked, f"{histories.source}, drawn ratings")
    items = [torch.tensor([event.item for event in own]) for own in users]
    liked = [torch.tensor([int(event.rating >= LIKED) for event in own]) for own in users]
    return Ratings(items, liked, "MovieLens-100k")


# --- Models: [U, n, d] targets, [U, L, d] behaviours, [U] lengths -> [U, n, d] ---


def shares(seq_lens: Tensor, length: int) -> Tensor:
    """[U, L] weights of a mean: 1 / seq_len for each behaviour, 0 at padding."""
    valid = torch.arange(length) < seq_lens[:, None]
    return valid / seq_lens.clamp(min=1)[:, None]


class MeanPooling(nn.Module):
    def forward(self, targets: Tensor, behaviors: Tensor, *, seq_lens: Tensor) -> Tensor:
        mean = shares(seq_lens, behaviors.shape[1])[:, None] @ behaviors  # [U, 1, d]
        return mean.expand_as(targets)


class DotProductAttention(nn.Module):
    """LREA's attention without the compression: mean over l of φ(q·k_l/√d) v_l."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, targets: Tensor, behaviors: Tensor, *, seq_lens: Tensor) -> Tensor:
        return self.attend(targets, self.key(behaviors), self.value(behaviors), shares(seq_lens, behaviors.shape[1]))

    def attend(self, targets: Tensor, keys: Tensor, values: Tensor, shares: Tensor) -> Tensor:
        scores = self.query(targets) @ keys.mT * keys.shape[-1] ** -0.5
        return F.leaky_relu(scores) * shares[:, None] @ values


class SoftmaxAttention(DotProductAttention):
    """Target attention as most rankers have it: Σ_l softmax(q·k/√d)_l v_l."""

    def attend(self, targets: Tensor, keys: Tensor, values: Tensor, shares: Tensor) -> Tensor:
        visible = (shares > 0)[:, None].expand(-1, targets.shape[1], -1)
        return F.scaled_dot_product_attention(self.query(targets), keys, values, attn_mask=visible)


class Ranker(nn.Module):
    """Embeddings, attention, and an MLP over [target, h, target·h]. A behaviour is an item and whether it was liked."""

    def __init__(self, model: str, hyper: Hyperparameters) -> None:
        super().__init__()
        self.items = nn.Embedding(movielens.ITEMS + 1, hyper.dim)
        self.opinions = nn.Embedding(2, hyper.dim)
        for table in (self.items, self.opinions):
            nn.init.normal_(table.weight, std=hyper.dim**-0.5)
        # Scale of a disliked or liked item. Without it the mean of a history does not show which items were liked.
        self.factors = nn.Parameter(torch.ones(2, hyper.dim))
        self.attention = new_attention(model, hyper)
        self.norm = nn.LayerNorm(hyper.dim)
        self.layers = nn.Sequential(nn.Linear(3 * hyper.dim, hyper.hidden), nn.ReLU(), nn.Linear(hyper.hidden, 1))

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        history = self.items(batch.history) * self.factors[batch.liked] + self.opinions(batch.liked)
        return self.items(batch.items), history

    def forward(self, batch: Batch, nonnegativity: float = 0.0) -> tuple[Tensor, Tensor]:
        """Logits [U, n], and LREA's penalty per user."""
        targets, behaviors = self.embed(batch)
        if not isinstance(self.attention, LREA):
            h = self.attention(targets, behaviors, seq_lens=batch.lengths)
            return self.score(h, targets), targets.new_zeros(())
        compressed = self.attention.compress(behaviors, batch.lengths)
        h = self.attention(targets, behaviors, seq_lens=batch.lengths, compressed=compressed)
        penalty = nonnegativity * self.attention.loss(compressed, "sum") / len(behaviors)
        return self.score(h, targets), penalty

    def score(self, h: Tensor, targets: Tensor) -> Tensor:
        h = self.norm(h)
        return self.layers(torch.cat([targets, h, targets * h], dim=-1)).squeeze(-1)

    def loss(self, batch: Batch, nonnegativity: float) -> Tensor:
        logits, penalty = self(batch, nonnegativity)
        return F.binary_cross_entropy_with_logits(logits, batch.labels) + penalty


def new_attention(model: str, hyper: Hyperparameters) -> nn.Module:
    if model == MEAN:
        return MeanPooling()
    if model in (DOT, SOFTMAX):
        return (DotProductAttention if model == DOT else SoftmaxAttention)(hyper.dim)
    if model == DIN:
        return TargetAttention(hyper.dim, (hyper.activation_units,), pooling="mean")
    return LREA(hyper.dim, hyper.length, LREA_RANKS[model])


# --- Training and evaluation ---


@torch.no_grad()
def scored(
    ratings: Ratings, samples: Tensor, hyper: Hyperparameters, score: Callable[[Batch], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The scores, labels and users of the samples, [S] each, sorted by the length of the history."""
    by_length = samples[samples[:, 1].argsort()]
    parts = [(score(batch), batch.labels) for batch in (ratings.batch(s, hyper.length) for s in by_length.split(1024))]
    scores, labels = (torch.cat(x).flatten() for x in zip(*parts, strict=True))
    return scores, labels, by_length[:, 0]


def auc(ratings: Ratings, samples: Tensor, hyper: Hyperparameters, score: Callable[[Batch], Tensor]) -> float:
    """Of all samples together; NaN if a score is not finite."""
    scores, labels, _ = scored(ratings, samples, hyper, score)
    if not scores.isfinite().all():
        return math.nan
    everyone = paired.area_under_curve(scores, labels, torch.zeros(len(scores), dtype=torch.long))
    return paired.value(everyone)


@torch.no_grad()
def served_score(ranker: Ranker, batch: Batch, dtype: torch.dtype) -> Tensor:
    targets, behaviors = ranker.embed(batch)
    state = ranker.attention.export_state(behaviors, batch.lengths, dtype=dtype)
    return ranker.score(ranker.attention.attend(targets, state), targets)


class Fitted(NamedTuple):
    validation: float
    best_epoch: int
    epoch_seconds: float


def fit(ranker: Ranker, seed: int, ratings: Ratings, hyper: Hyperparameters) -> Fitted:
    """`fit_batches` over the ratings. The batches depend only on the seed."""
    train_samples, validation, _ = ratings.split()
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Batch]:
        for chosen in batches_of_similar_lengths(train_samples[:, 1], hyper.batch, generator):
            yield ratings.batch(train_samples[chosen], hyper.length)

    return fit_batches(ranker, hyper, batches, lambda: auc(ratings, validation, hyper, lambda batch: ranker(batch)[0]))


def fit_batches(
    ranker: Ranker, hyper: Hyperparameters, batches: Callable[[], Iterable[Batch]], validate: Callable[[], float]
) -> Fitted:
    """Train, and leave the ranker with the weights of its best epoch. `batches()` are those of the next epoch."""
    optimizer = torch.optim.Adam(ranker.parameters(), hyper.learning_rate, weight_decay=hyper.weight_decay)
    seconds, best, best_epoch, best_weights = [], 0.0, 0, None
    for epoch in range(1, hyper.epochs + 1):
        with timed_epoch(seconds):
            for batch in batches():
                loss = ranker.loss(batch, hyper.nonnegativity)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        reached = validate()
        if reached > best:
            best, best_epoch, best_weights = reached, epoch, copy.deepcopy(ranker.state_dict())
        if epoch - best_epoch >= hyper.patience:
            break
    if best_weights is None:
        raise ValueError(f"the training diverged: the AUC of the validation was never above 0, at last {reached}")
    ranker.load_state_dict(best_weights)
    return Fitted(best, best_epoch, statistics.median(seconds))


def train(model: str, seed: int, hyper: Hyperparameters, ratings: Ratings, device: torch.device = CPU) -> Trained:
    return trained(model, seed, ratings, hyper)[1]


def trained(model: str, seed: int, ratings: Ratings, hyper: Hyperparameters) -> tuple[Ranker, Trained]:
    torch.manual_seed(seed)
    ranker = Ranker(model, hyper)
    fitted = fit(ranker, seed, ratings, hyper)
    *_, test = ratings.split()
    row = Row(parameters=count_parameters(ranker), **fitted._asdict())
    scores, labels, users = scored(ratings, test, hyper, lambda batch: ranker(batch)[0])
    if model in LREA_RANKS:
        row.learned = reconstruction(ranker, ratings, hyper)
        for name, (dtype, orientation) in SERVED.items():
            ranker.attention.orientation = orientation
            row.served_auc[name] = auc(ratings, test, hyper, lambda batch, d=dtype: served_score(ranker, batch, d))
            row.fidelity[name] = fidelity(ranker, ratings, hyper, dtype)
        ranker.attention.orientation = "scores"
    return ranker, Trained(row, {"scores": scores, "labels": labels, "users": users})


@torch.no_grad()
def fidelity(ranker: Ranker, ratings: Ratings, hyper: Hyperparameters, dtype: torch.dtype) -> list[dict[str, object]]:
    """LREA.fidelity over every user's history before the test, with the same candidates, scored by the whole model."""
    batch = ratings.batch(ratings.before_the_test(), hyper.length)
    items = drawn_items(CANDIDATES)
    targets, behaviors = ranker.embed(batch._replace(items=items.expand(len(batch.lengths), -1)))
    report = ranker.attention.fidelity(
        targets,
        behaviors,
        seq_lens=batch.lengths,
        ranks=[rank for rank in LREA_RANKS.values() if rank <= ranker.attention.rank][::-1],
        dtype=dtype,
        score=ranker.score,
    )
    return [as_json(figures) for figures in report]


@torch.no_grad()
def reconstruction(ranker: Ranker, ratings: Ratings, hyper: Hyperparameters) -> dict[str, list[float]]:
    """The relative error of a restored history, ‖E - Ê‖ / ‖E‖ over users with full histories: by position from the
    oldest, and over all positions the smallest that any two matrices of this rank could reach.
    """
    batch = ratings.batch(ratings.before_the_test(), hyper.length)
    full = batch.lengths == hyper.length
    if not full.any():
        return {}
    _, behaviors = ranker.embed(batch)
    e = behaviors[full].double()  # [U, L, d]
    lrea = ranker.attention
    restored = lrea.w_decomp.double().T @ (lrea.w_comp.double().T @ e)
    by_position = (e - restored).square().sum((0, 2)) / e.square().sum((0, 2))
    spectrum = torch.linalg.eigvalsh(torch.einsum("uld,umd->lm", e, e))  # ascending
    best = spectrum[: -lrea.rank].sum() / spectrum.sum()
    return {
        "error by position": [round(x, 4) for x in by_position.sqrt().tolist()],
        "error, best": [round(best.sqrt().item(), 4)],
    }


def drawn_items(count: int) -> Tensor:
    return 1 + torch.randperm(movielens.ITEMS, generator=torch.Generator().manual_seed(0))[:count]


def as_json(figures: Fidelity) -> dict[str, object]:
    """The figures, with None for numbers that are not finite and that JSON cannot hold."""
    numbers = {name: value for name, value in figures._asdict().items() if name != "dtype"}
    return {name: finite(value) for name, value in numbers.items()}


# --- The experiment ---


def search(model: str) -> dict[str, Sequence[object]]:
    common = {"learning_rate": (3e-3, 6e-3, 1.2e-2), "weight_decay": (1e-5, 1e-4, 1e-3)}
    return common | {"nonnegativity": (1e-3, 1e-2, 1e-1)} if model in LREA_RANKS else common


def click_metrics(tested: dict[str, Tensor]) -> dict[str, Metric]:
    scores, labels, users = (tested[name] for name in ("scores", "labels", "users"))
    return {
        "AUC": paired.area_under_curve(scores, labels, users),
        "log loss": paired.log_loss(scores, labels, users),
    }


EXPERIMENT = Experiment(
    name="din",
    op="lrea_attention",
    arms=MODELS,
    hyper=Hyperparameters(),
    search=search,
    comparisons=(
        *((full, MEAN) for full in (DOT, SOFTMAX, DIN)),
        *((lrea, baseline) for baseline in (MEAN, DOT, SOFTMAX, DIN) for lrea in LREA_RANKS),
    ),
    load=load,
    train=train,
    metrics=click_metrics,
    budget=8,
    seeds=20,
)


if __name__ == "__main__":
    sys.exit(experiment.main(EXPERIMENT, None, __doc__))

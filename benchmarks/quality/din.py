"""`python -m benchmarks.quality.din`: target attention over MovieLens-100k, full and compressed: AUC, serving time.

Each rating is a sample: is it 4 or more, given the movie and the user's earlier ratings (at most 200)? The last tenth
of each user's ratings is the test, the tenth before it the validation. All models share the embeddings and the layers
after the attention. The epoch with the best validation AUC counts. LREA is trained in the restored form and also served
from its absorbed states, in float32 and int8.
"""

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.data import movielens
from benchmarks.harness import records
from benchmarks.harness.timing import CpuClock, finite, measure, percentile
from benchmarks.quality import training
from benchmarks.quality.training import TrainingRow, count_parameters, mean_and_spread, new_table, timed_epoch
from recattn.nn import LREA, Fidelity, LREAState, TargetAttention

MEAN, DOT, DIN = "mean", "dot product", "DIN"
LREA_RANKS = {f"LREA {rank}": rank for rank in (4, 8, 16, 32)}
MODELS = (MEAN, DOT, DIN, *LREA_RANKS)
QUALITY, SERVING = "din", "din serving"
CPU = torch.device("cpu")
LIKED = 4  # the lowest rating that counts as liked
CANDIDATES = 200  # per user, for the fidelity
SERVED_CANDIDATES = 1000
SERVED_LENGTHS = (200, 10_000)
CACHED_ELEMENTS = 2**18  # scores or hidden units in a block of candidates
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

    op: str = "lrea_attention"
    workload: str = QUALITY
    model: str
    auc: float
    validation_auc: float
    served_auc: dict[str, float] = field(default_factory=dict)
    fidelity: dict[str, list[dict[str, object]]] = field(default_factory=dict)


@dataclass(kw_only=True)
class ServingRow:
    """The attention of one user and `candidates`, from what is stored per user; without the layers after it."""

    op: str = "lrea_attention"
    workload: str = SERVING
    model: str
    dtype: str
    length: int
    candidates: int
    dim: int
    bytes_per_user: int
    p50_ms: float
    spread: float | None  # of the median; None after too few rounds
    waiting: float


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


def batches_of_similar_lengths(samples: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Random batches, each cut from 16 batches' worth of samples sorted by length, to save padding."""
    shuffled = samples[torch.randperm(len(samples), generator=generator)]
    batches = [batch for pool in shuffled.split(16 * size) for batch in pool[pool[:, 1].argsort()].split(size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


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
    if model == DOT:
        return DotProductAttention(hyper.dim)
    if model == DIN:
        return TargetAttention(hyper.dim, (hyper.activation_units,), pooling="mean")
    return LREA(hyper.dim, hyper.length, LREA_RANKS[model])


# --- Training and evaluation ---


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Probability that a positive scores above a negative; ties count half. NaN if a score is not finite."""
    if not scores.isfinite().all():
        return math.nan
    _, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]
    positive = labels > 0
    p, n = int(positive.sum()), int((~positive).sum())
    return ((ranks[positive].sum() - p * (p + 1) / 2) / (p * n)).item()


@torch.no_grad()
def auc(ratings: Ratings, samples: Tensor, hyper: Hyperparameters, score: Callable[[Batch], Tensor]) -> float:
    by_length = samples[samples[:, 1].argsort()]
    scored = [(score(batch), batch.labels) for batch in (ratings.batch(s, hyper.length) for s in by_length.split(1024))]
    return area_under_curve(*(torch.cat(parts).flatten() for parts in zip(*scored, strict=True)))


def served_score(ranker: Ranker, batch: Batch, dtype: torch.dtype) -> Tensor:
    targets, behaviors = ranker.embed(batch)
    state = ranker.attention.export_state(behaviors, batch.lengths, dtype=dtype)
    return ranker.score(ranker.attention.attend(targets, state), targets)


class Fitted(NamedTuple):
    validation_auc: float
    best_epoch: int
    epoch_seconds: float


def fit(ranker: Ranker, seed: int, ratings: Ratings, hyper: Hyperparameters) -> Fitted:
    """Train, and leave the ranker with the weights of its best epoch. The batches depend only on the seed."""
    train_samples, validation, _ = ratings.split()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(ranker.parameters(), hyper.learning_rate, weight_decay=hyper.weight_decay)
    seconds, best, best_epoch, best_weights = [], 0.0, 0, None
    for epoch in range(1, hyper.epochs + 1):
        with timed_epoch(seconds):
            for samples in batches_of_similar_lengths(train_samples, hyper.batch, generator):
                loss = ranker.loss(ratings.batch(samples, hyper.length), hyper.nonnegativity)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        reached = auc(ratings, validation, hyper, lambda batch: ranker(batch)[0])
        if reached > best:
            best, best_epoch, best_weights = reached, epoch, copy.deepcopy(ranker.state_dict())
        if epoch - best_epoch >= hyper.patience:
            break
    if best_weights is None:
        raise ValueError(f"the training diverged: the AUC of the validation was never above 0, at last {reached}")
    ranker.load_state_dict(best_weights)
    return Fitted(best, best_epoch, statistics.median(seconds))


def train(model: str, seed: int, ratings: Ratings, hyper: Hyperparameters) -> Row:
    return trained(model, seed, ratings, hyper)[1]


def trained(model: str, seed: int, ratings: Ratings, hyper: Hyperparameters) -> tuple[Ranker, Row]:
    torch.manual_seed(seed)
    ranker = Ranker(model, hyper)
    fitted = fit(ranker, seed, ratings, hyper)
    *_, test = ratings.split()
    row = Row(
        model=model,
        seed=seed,
        shape=asdict(hyper),
        data=ratings.source,
        parameters=count_parameters(ranker),
        auc=auc(ratings, test, hyper, lambda batch: ranker(batch)[0]),
        **fitted._asdict(),
    )
    if model in LREA_RANKS:
        for name, (dtype, orientation) in SERVED.items():
            ranker.attention.orientation = orientation
            row.served_auc[name] = auc(ratings, test, hyper, lambda batch, d=dtype: served_score(ranker, batch, d))
            row.fidelity[name] = fidelity(ranker, ratings, hyper, dtype)
        ranker.attention.orientation = "scores"
    return ranker, row


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


def drawn_items(count: int) -> Tensor:
    return 1 + torch.randperm(movielens.ITEMS, generator=torch.Generator().manual_seed(0))[:count]


def as_json(figures: Fidelity) -> dict[str, object]:
    """The figures, with None for numbers that are not finite and that JSON cannot hold."""
    numbers = {name: value for name, value in figures._asdict().items() if name != "dtype"}
    return {name: finite(value) for name, value in numbers.items()}


# --- Serving ---


def serving_calls(length: int, candidates: int, hyper: Hyperparameters) -> dict[tuple[str, str], tuple[int, Callable]]:
    """(model, dtype) -> bytes stored per user, and a call that attends for all candidates of one user. Random weights.

    The dot product stores projected keys and values. Both full attentions process the candidates in blocks, so that
    intermediate results stay in the cache.
    """
    torch.manual_seed(0)
    targets, behaviors = torch.randn(1, candidates, hyper.dim), torch.randn(1, length, hyper.dim)
    dot, din = (new_attention(model, hyper) for model in (DOT, DIN))
    keys, values, even = dot.key(behaviors), dot.value(behaviors), shares(torch.tensor([length]), length)

    calls = {
        (DOT, "float32"): (
            size_of(keys, values),
            lambda: in_blocks(lambda part: dot.attend(part, keys, values, even), targets, length),
        ),
        (DIN, "float32"): (
            size_of(behaviors),
            lambda: in_blocks(lambda part: din(part, behaviors), targets, length * hyper.activation_units),
        ),
    }
    for model, rank in LREA_RANKS.items():
        attention = LREA(hyper.dim, length, rank)
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            state = attention.export_state(behaviors, dtype=dtype)
            served = targets if dtype == torch.int8 else targets.to(dtype)
            call = lambda a=attention, s=state, t=served: a.attend(t, s)  # noqa: E731
            calls[model, records.dtype_name(dtype)] = served_bytes(state), call
    return calls


def in_blocks(attend: Callable[[Tensor], Tensor], targets: Tensor, per_candidate: int) -> Tensor:
    """Attend for blocks of candidates small enough that the intermediate results stay in the cache."""
    block = max(1, CACHED_ELEMENTS // per_candidate)
    return torch.cat([attend(part) for part in targets.split(block, dim=1)], dim=1)


def size_of(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def served_bytes(state: LREAState) -> int:
    return size_of(state.keys, state.values, state.key_scales, state.value_scales)


@torch.no_grad()
def measure_serving(
    seconds: float, hyper: Hyperparameters, lengths: Sequence[int] = SERVED_LENGTHS
) -> list[ServingRow]:
    """Calls interleave, in two groups: full attention would evict LREA's states from the cache."""
    rows = []
    for length in lengths:
        calls = serving_calls(length, SERVED_CANDIDATES, hyper)
        full = {key: call for key, call in calls.items() if key[0] not in LREA_RANKS}
        for group in (full, {key: call for key, call in calls.items() if key not in full}):
            timed = measure({key: lambda turn, c=call: c for key, (_, call) in group.items()}, CpuClock(), seconds)
            rows += [
                ServingRow(
                    model=model,
                    dtype=dtype,
                    length=length,
                    candidates=SERVED_CANDIDATES,
                    dim=hyper.dim,
                    bytes_per_user=group[model, dtype][0],
                    p50_ms=percentile(samples.times, 50),
                    spread=finite(samples.spread),
                    waiting=samples.waiting,
                )
                for (model, dtype), samples in timed.items()
            ]
    return rows


# --- The command ---


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.din", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="all by default")
    training.add_arguments(parser, Hyperparameters.epochs)
    parser.add_argument(
        "--nonnegativity",
        type=float,
        default=Hyperparameters.nonnegativity,
        help="weight of LREA's loss, which is divided by the users of a batch",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each serving measurement")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--serving-only", action="store_true", help="measure the serving without training")
    only.add_argument("--training-only", action="store_true", help="do not measure the serving")
    chosen = parser.parse_args(arguments)
    training.check_arguments(parser, chosen, CPU)
    if not (0 <= chosen.nonnegativity < math.inf and 0 < chosen.seconds < math.inf):
        parser.error("--nonnegativity must be finite and at least 0, --seconds finite and above 0")
    return chosen


def quality_table(rows: Sequence[Row]) -> Table:
    """AUC of each model; for LREA also the AUC of each way to serve it."""
    table = new_table(("attention",), ("AUC", *(f"served, {way}" for way in SERVED), "s per epoch", "parameters"))
    for model, own in by_model(rows):
        served = [mean_and_spread([row.served_auc[way] for row in own]) if own[0].served_auc else "" for way in SERVED]
        seconds = statistics.median(row.epoch_seconds for row in own)
        auc = mean_and_spread([row.auc for row in own])
        table.add_row(model, auc, *served, f"{seconds:.2f}", f"{own[0].parameters:,}")
    return table


def fidelity_table(rows: Sequence[Row]) -> Table:
    """Median over seeds (empty if a value is not finite) for the rank of each model, and below it for smaller ranks."""
    columns = [name for name in Fidelity._fields if name not in ("rank", "dtype")]
    table = new_table(("states",), ("rank", *(name.replace("_", " ") for name in columns)))
    for model, own in by_model([row for row in rows if row.fidelity]):
        for way in SERVED:
            for of_seeds in zip(*(row.fidelity[way] for row in own), strict=True):
                figures = ([x[name] for x in of_seeds] for name in columns)
                cells = ("" if None in values else f"{statistics.median(values):.4f}" for values in figures)
                table.add_row(f"{model}, {way}", str(of_seeds[0]["rank"]), *cells)
    return table


def serving_table(rows: Sequence[ServingRow]) -> Table:
    table = new_table(("attention", "states"), ("history", "ms", "spread", "waiting", "bytes per user"))
    for row in rows:
        share = ("" if x is None else f"{100 * x:.0f}%" for x in (row.spread, row.waiting))
        table.add_row(row.model, row.dtype, f"{row.length:,}", f"{row.p50_ms:.3f}", *share, f"{row.bytes_per_user:,}")
    return table


def by_model(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    for model in MODELS:
        if own := [row for row in rows if row.model == model]:
            yield model, own


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    chosen = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    hyper = Hyperparameters(epochs=chosen.epochs, nonnegativity=chosen.nonnegativity)
    torch.set_num_threads(1)
    common, path = training.begin("din", chosen, CPU)

    if not chosen.serving_only:
        ratings = load(chosen.offline)
        rows = []
        finished = training.train_all(train, chosen.models, chosen.seeds, chosen.jobs, ratings, hyper)
        total = chosen.seeds * len(chosen.models)
        for row in track(finished, "DIN", total, console=console, transient=True):
            records.append([row], common, path)
            rows.append(row)
        console.print(f"AUC on {ratings.source}, {chosen.seeds} seeds, {common['device']}")
        console.print(quality_table(rows))
        if any(row.fidelity for row in rows):
            console.print(f"absorbed vs restored, {CANDIDATES} candidates per user, median over seeds")
            console.print(fidelity_table(rows))
    if not chosen.training_only:
        served = measure_serving(chosen.seconds, hyper)
        records.append(served, common, path)
        console.print(f"attention of 1 user and {SERVED_CANDIDATES} candidates, d = {hyper.dim}, one thread")
        console.print(serving_table(served))
    console.print(f"rows in {path}, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

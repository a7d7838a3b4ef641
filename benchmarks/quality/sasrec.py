"""`python -m benchmarks.quality.sasrec`: SASRec on MovieLens-100k, plain and refined: quality, and seconds per epoch.

Leave-one-out: the last item of each user is the test, the one before it the validation. Every item outside the user's
history is ranked. The epoch with the best validation NDCG@10 counts; its test HR@10 and NDCG@10 are reported. For the
first seed, every mechanism is also trained for some epochs with the reference, and the loss curves are compared.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.data import movielens
from benchmarks.data.movielens import Histories
from benchmarks.harness import records
from benchmarks.quality import training
from benchmarks.quality.training import TrainingRow, count_parameters, mean_and_spread, new_table, timed_epoch
from recattn.nn import RefinedSelfAttention
from recattn.testing import largest

PLAIN = "plain"
ATTENTIONS = (PLAIN, "simple", "value", "additive", "stochastic")
EVALUATE_EVERY = 10
QUALITY, PARITY = "sasrec", "sasrec parity"
# Training amplifies rounding differences, faster with larger steps. So few epochs, at SASRec's own learning rate.
PARITY_EPOCHS, PARITY_LEARNING_RATE = 10, 1e-3


@dataclass(frozen=True)
class Hyperparameters:
    """SASRec's, except three times its learning rate and fewer epochs. No dropout inside the attention."""

    length: int = 50
    dim: int = 50
    heads: int = 1
    blocks: int = 2
    dropout: float = 0.2
    batch: int = 128
    learning_rate: float = 3e-3
    epochs: int = 40


@dataclass(kw_only=True)
class Row(TrainingRow):
    """One training. `curve_difference`, for impl="reference": largest |loss of impl None - loss| / loss over epochs."""

    attention: str
    impl: str | None
    dtype: str
    hr10: float
    ndcg10: float
    validation_ndcg10: float
    losses: list[float]
    curve_difference: float | None = None
    op: str = "refined_attention"
    workload: str = QUALITY


# --- Data ---


def pad_left(sequences: Sequence[Tensor], length: int) -> Tensor:
    """[len(sequences), length]: the newest items at the end, 0 before them."""
    padded = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, items in zip(padded, sequences, strict=True):
        newest = items[-length:]
        row[length - len(newest) :] = newest
    return padded


class Split:
    """Leave-one-out split: training inputs and targets, and queries with answers for validation and test."""

    def __init__(self, histories: Sequence[Tensor], length: int, device: torch.device) -> None:
        histories = [items for items in histories if len(items) >= 4]
        training = [items[:-2] for items in histories]
        self.items = max(int(items.max()) for items in histories)
        self.inputs = pad_left([items[:-1] for items in training], length).to(device)
        self.targets = pad_left([items[1:] for items in training], length).to(device)
        self.trained_on = self._membership(training).to(device)  # [users, items + 1]
        self.validation = (pad_left(training, length).to(device), self._answers(histories, -2).to(device))
        self.test = (
            pad_left([items[:-1] for items in histories], length).to(device),
            self._answers(histories, -1).to(device),
        )

    def _membership(self, sequences: Sequence[Tensor]) -> Tensor:
        member = torch.zeros(len(sequences), self.items + 1, dtype=torch.bool)
        for row, items in zip(member, sequences, strict=True):
            row[items] = True
        return member

    @staticmethod
    def _answers(histories: Sequence[Tensor], position: int) -> Tensor:
        return torch.stack([items[position] for items in histories])

    def draw_negatives(self, users: Tensor, generator: torch.Generator) -> Tensor:
        """[len(users), length] items drawn uniformly from those not in the user's training history."""
        shape = len(users), self.inputs.shape[1]
        device = self.inputs.device
        seen = self.trained_on[users]
        negatives = torch.randint(1, self.items + 1, shape, generator=generator).to(device)
        while (taken := seen.gather(1, negatives)).any():
            drawn = torch.randint(1, self.items + 1, shape, generator=generator).to(device)
            negatives = torch.where(taken, drawn, negatives)
        return negatives


# --- Model ---


class Block(nn.Module):
    """Attention of the normalised states over the states, then a point-wise feed-forward, both with a residual."""

    def __init__(self, attention: nn.Module, dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(dim, eps=1e-8)
        self.forward_norm = nn.LayerNorm(dim, eps=1e-8)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, dim), nn.Dropout(dropout), nn.ReLU(), nn.Linear(dim, dim), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        queries = self.attention_norm(x)
        x = self.forward_norm(queries + self._attend(queries, x, padding))
        return x + self.feed_forward(x)

    def _attend(self, queries: Tensor, x: Tensor, padding: Tensor) -> Tensor:
        if isinstance(self.attention, RefinedSelfAttention):
            return self.attention(queries, x, x, key_padding_mask=padding, is_causal=True)[0]
        # nn.MultiheadAttention returns NaN for a query that sees no key, so padding sees itself.
        n, heads = x.shape[1], self.attention.num_heads
        ones = torch.ones(n, n, dtype=torch.bool, device=x.device)
        hidden = (ones.triu(1) | padding[:, None, :]) & ~ones.diag().diag()  # [B, N, N]
        return self.attention(queries, x, x, attn_mask=hidden.repeat_interleave(heads, 0), need_weights=False)[0]


class SASRec(nn.Module):
    """Item and position embeddings, then blocks. An item's score is the product with its embedding."""

    def __init__(self, items: int, hyper: Hyperparameters, new_attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.items = nn.Embedding(items + 1, hyper.dim, padding_idx=0)
        self.positions = nn.Embedding(hyper.length, hyper.dim)
        for table in (self.items, self.positions):
            nn.init.xavier_normal_(table.weight)
        nn.init.zeros_(self.items.weight[0].detach())
        self.dropout = nn.Dropout(hyper.dropout)
        self.blocks = nn.ModuleList(Block(new_attention(), hyper.dim, hyper.dropout) for _ in range(hyper.blocks))
        self.norm = nn.LayerNorm(hyper.dim, eps=1e-8)

    def forward(self, sequences: Tensor) -> Tensor:
        """[B, N] items -> [B, N, dim]."""
        padding = sequences == 0
        x = self.items(sequences) * math.sqrt(self.items.embedding_dim) + self.positions.weight
        x = self.dropout(x).masked_fill(padding[..., None], 0)
        for block in self.blocks:
            x = block(x, padding).masked_fill(padding[..., None], 0)
        return self.norm(x)

    def loss(self, inputs: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """Binary cross-entropy of the next item and of a negative, over all positions."""
        states, tokens = self(inputs), inputs != 0
        positive, negative = ((states * self.items(items)).sum(-1)[tokens] for items in (targets, negatives))
        return (F.softplus(-positive) + F.softplus(negative)).mean()


def attention_factory(name: str, hyper: Hyperparameters, impl: str | None) -> Callable[[], nn.Module]:
    if name == PLAIN:
        return lambda: nn.MultiheadAttention(hyper.dim, hyper.heads, batch_first=True)
    return lambda: RefinedSelfAttention(hyper.dim, hyper.heads, max_len=hyper.length, mechanism=name, impl=impl)


# --- Training and ranking ---


def ranking_quality(scores: Tensor, answers: Tensor, candidates: Tensor, cutoff: int = 10) -> tuple[float, float]:
    """HR and NDCG at the cutoff. One answer per row, [U], among candidates, [U, items]; ties rank above the answer."""
    answer = scores.gather(1, answers[:, None])
    rivals = candidates & ~(scores < answer)  # NaN counts as a rival
    rank = rivals.scatter(1, answers[:, None], False).sum(dim=1)
    hit = rank < cutoff
    return hit.double().mean().item(), (hit / torch.log2(rank + 2.0)).double().mean().item()


@torch.no_grad()
def evaluate(model: SASRec, queries: Tensor, answers: Tensor, seen: Tensor) -> tuple[float, float]:
    model.eval()
    scores = model(queries)[:, -1] @ model.items.weight.T
    model.train()
    candidates = ~seen
    candidates[:, 0] = False
    return ranking_quality(scores, answers, candidates)


def train(
    attention: str,
    impl: str | None,
    seed: int,
    dtype: torch.dtype,
    histories: Histories,
    hyper: Hyperparameters,
    device: torch.device,
) -> Row:
    split = Split(histories.items, hyper.length, device)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)  # the same batches and negatives for every attention
    model = SASRec(split.items, hyper, attention_factory(attention, hyper, impl)).to(device, dtype)
    optimizer = torch.optim.Adam(model.parameters(), hyper.learning_rate, betas=(0.9, 0.98))
    seen_by_test = split.trained_on.scatter(1, split.validation[1][:, None], True)
    losses, seconds = [], []
    best, best_epoch, hr, ndcg = -1.0, 0, 0.0, 0.0
    for epoch in range(1, hyper.epochs + 1):
        with timed_epoch(seconds):
            losses.append(train_epoch(model, optimizer, split, hyper.batch, generator))
        if epoch % EVALUATE_EVERY == 0 or epoch == hyper.epochs:
            _, validation = evaluate(model, *split.validation, split.trained_on)
            if validation > best:
                best, best_epoch = validation, epoch
                hr, ndcg = evaluate(model, *split.test, seen_by_test)
    return Row(
        attention=attention,
        impl=impl,
        dtype=records.dtype_name(dtype),
        seed=seed,
        shape=asdict(hyper),
        data=histories.source,
        parameters=count_parameters(model),
        hr10=hr,
        ndcg10=ndcg,
        validation_ndcg10=best,
        best_epoch=best_epoch,
        epoch_seconds=statistics.median(seconds),
        losses=losses,
    )


def train_epoch(
    model: SASRec, optimizer: torch.optim.Optimizer, split: Split, batch: int, generator: torch.Generator
) -> float:
    """Train on each user once. Returns the mean loss."""
    total = torch.zeros((), dtype=torch.float64, device=split.inputs.device)
    order = torch.randperm(len(split.inputs), generator=generator)
    for users in order.split(batch):
        users = users.to(split.inputs.device)
        loss = model.loss(split.inputs[users], split.targets[users], split.draw_negatives(users, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() * len(users)
    return total.item() / len(order)


def curve_difference(curve: Sequence[float], other: Sequence[float]) -> float:
    """Largest relative difference; NaN if a curve holds NaN."""
    return largest(abs(a - b) / abs(a) for a, b in zip(curve, other, strict=True))


# --- The command ---


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.sasrec", description=__doc__.partition("\n")[0])
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=ATTENTIONS, help="all by default")
    training.add_arguments(parser, Hyperparameters.epochs)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a CUDA device where there is one")
    chosen = parser.parse_args(arguments)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    chosen.device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    training.check_arguments(parser, chosen, chosen.device)
    return chosen


def quality_table(rows: Sequence[Row]) -> Table:
    dtypes = ("float32", "float64")
    curves = [f"loss curve, {dtype}" for dtype in dtypes]
    table = new_table(("attention",), ("HR@10", "NDCG@10", "s per epoch", "parameters", *curves))
    for attention in sorted({row.attention for row in rows}, key=ATTENTIONS.index):
        own = [row for row in rows if row.attention == attention]
        trained = [row for row in own if row.workload == QUALITY]
        differences = {row.dtype: row.curve_difference for row in own if row.curve_difference is not None}
        table.add_row(
            attention,
            *(mean_and_spread([getattr(row, name) for row in trained]) for name in ("hr10", "ndcg10")),
            f"{statistics.median(row.epoch_seconds for row in trained):.3f}",
            f"{own[0].parameters:,}",
            *(f"{differences[dtype]:.1e}" if dtype in differences else "" for dtype in dtypes),
        )
    return table


def train_with_reference(
    attention: str, seed: int, histories: Histories, hyper: Hyperparameters, device: torch.device
) -> list[Row]:
    """A training. For the first seed of a refined attention, also the trainings that compare its loss curve."""
    rows = [train(attention, None, seed, torch.float32, histories, hyper, device)]
    if attention == PLAIN or seed > 0:
        return rows
    gentle = replace(hyper, epochs=min(hyper.epochs, PARITY_EPOCHS), learning_rate=PARITY_LEARNING_RATE)
    for dtype in (torch.float32, torch.float64):
        fast, reference = (
            train(attention, impl, seed, dtype, histories, gentle, device) for impl in (None, "reference")
        )
        fast.workload = reference.workload = PARITY
        reference.curve_difference = curve_difference(fast.losses, reference.losses)
        rows += [fast, reference]
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    chosen = parse_arguments(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    histories = movielens.load(chosen.offline)
    hyper = Hyperparameters(epochs=chosen.epochs)
    common, path = training.begin("sasrec", chosen, chosen.device)
    rows: list[Row] = []
    arguments = histories, hyper, chosen.device
    finished = training.train_all(train_with_reference, chosen.attention, chosen.seeds, chosen.jobs, *arguments)
    total = chosen.seeds * len(chosen.attention)
    for own in track(finished, "SASRec", total, console=console, transient=True):
        records.append(own, common, path)
        rows += own

    console.print(f"SASRec on {histories.source}, {hyper.epochs} epochs, {chosen.seeds} seeds, {common['device']}")
    console.print(quality_table(rows))
    console.print(f"loss curve: largest difference between impl None and the reference over {PARITY_EPOCHS} epochs")
    console.print(f"{len(rows)} rows in {path}, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

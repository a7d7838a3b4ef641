"""`python -m benchmarks.quality.sasrec`: SASRec on MovieLens-100k, plain and refined: does refinement rank better?

The last five items of each user are the test, the three before them the validation, each ranked after all that the user
rated before it, among all items outside that history. The epoch with the best validation NDCG@10 counts.
"""

import copy
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.data import movielens
from benchmarks.data.movielens import Histories
from benchmarks.quality import experiment, paired
from benchmarks.quality.experiment import Experiment, Trained
from benchmarks.quality.paired import Metric
from benchmarks.quality.training import TrainingRow, count_parameters, timed_epoch
from recattn._typing import RefinedAttentionImpl, Source
from recattn.nn import RefinedSelfAttention

PLAIN = "plain"
REFINED = ("simple", "value", "additive", "stochastic")
# A control: refinement's matrices know positions, and so does this, with N numbers per head.
RELATIVE = "relative bias"
ARMS = (PLAIN, *REFINED, RELATIVE)
COMPARISONS = (*((arm, PLAIN) for arm in ARMS[1:]), *((arm, RELATIVE) for arm in REFINED))
EVALUATE_EVERY = 5
CUTOFF = 10
# Of each user. One item each, as is usual, leaves effects below 7% of NDCG@10 in the noise.
TESTED, VALIDATED = 5, 3


@dataclass(frozen=True)
class Hyperparameters:
    """SASRec's, except a larger learning rate and fewer blocks and epochs. No dropout inside the attention.

    `source` is that of a refinement: whether it refines the scores or their softmax.
    """

    length: int = 50
    dim: int = 50
    heads: int = 1
    blocks: int = 1
    dropout: float = 0.5
    batch: int = 128
    learning_rate: float = 6e-3
    source: Source = "logits"
    epochs: int = 40


@dataclass(kw_only=True)
class Row(TrainingRow):
    losses: list[float]  # of every epoch


# --- Data ---


def pad_left(sequences: Sequence[Tensor], length: int) -> Tensor:
    """[len(sequences), length]: the newest items at the end, 0 before them."""
    padded = torch.zeros(len(sequences), length, dtype=torch.long)
    for row, items in zip(padded, sequences, strict=True):
        newest = items[-length:]
        row[length - len(newest) :] = newest
    return padded


class HeldOut(NamedTuple):
    """Items to rank, each after all that the user rated before it: k per user, user after user."""

    queries: Tensor  # [U k, N]
    answers: Tensor  # [U k]
    seen: Tensor  # [U k, items + 1] what is not ranked: the history


class Split:
    """The last TESTED items of each user are the test, the VALIDATED before them the validation, the others train."""

    def __init__(self, histories: Sequence[Tensor], length: int, device: torch.device) -> None:
        histories = [items for items in histories if len(items) >= TESTED + VALIDATED + 2]
        training = [items[: -TESTED - VALIDATED] for items in histories]
        self.items = max(int(items.max()) for items in histories)
        self.inputs = pad_left([items[:-1] for items in training], length).to(device)
        self.targets = pad_left([items[1:] for items in training], length).to(device)
        self.trained_on = self._membership(training).to(device)  # [U, items + 1]
        self.validation = self._held_out(histories, TESTED + VALIDATED, VALIDATED, length, device)
        self.test = self._held_out(histories, TESTED, TESTED, length, device)

    def _held_out(
        self, histories: Sequence[Tensor], before_end: int, count: int, length: int, device: torch.device
    ) -> HeldOut:
        positions = [(items, len(items) - before_end + i) for items in histories for i in range(count)]
        before = [items[:position] for items, position in positions]
        answers = torch.stack([items[position] for items, position in positions])
        return HeldOut(*(x.to(device) for x in (pad_left(before, length), answers, self._membership(before))))

    def _membership(self, sequences: Sequence[Tensor]) -> Tensor:
        member = torch.zeros(len(sequences), self.items + 1, dtype=torch.bool)
        for row, items in zip(member, sequences, strict=True):
            row[items] = True
        return member

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


def bias_by_distance(b: Tensor) -> Tensor:
    """[heads, N] -> [heads, N, N]: b[i - j] of query i and key j <= i."""
    positions = torch.arange(b.shape[1], device=b.device)
    return b[:, (positions[:, None] - positions).clamp(min=0)]


def hidden_keys(padding: Tensor) -> Tensor:
    """[B, N, N] later and padding keys. Padding sees itself: the softmax of a query that sees no key is NaN."""
    n = padding.shape[1]
    ones = torch.ones(n, n, dtype=torch.bool, device=padding.device)
    return (ones.triu(1) | padding[:, None, :]) & ~ones.diag().diag()


class RelativeBiasAttention(nn.MultiheadAttention):
    """softmax(Q Kᵀ/√D + b[i - j]) V with a learned b [heads, N], as in T5."""

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__(dim, heads, batch_first=True)
        self.by_distance = nn.Parameter(torch.zeros(heads, length))


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
        mask = hidden_keys(padding).repeat_interleave(self.attention.num_heads, 0)
        if isinstance(self.attention, RelativeBiasAttention):
            mask = bias_by_distance(self.attention.by_distance).repeat(len(x), 1, 1).masked_fill(mask, -math.inf)
        return self.attention(queries, x, x, attn_mask=mask, need_weights=False)[0]


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

    def scores(self, sequences: Tensor) -> Tensor:
        """[B, items + 1] of the item after each sequence."""
        return self(sequences)[:, -1] @ self.items.weight.T

    def loss(self, inputs: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """Binary cross-entropy of the next item and of a negative, over all positions."""
        states, tokens = self(inputs), inputs != 0
        positive, negative = ((states * self.items(items)).sum(-1)[tokens] for items in (targets, negatives))
        return (F.softplus(-positive) + F.softplus(negative)).mean()


def attention_factory(name: str, hyper: Hyperparameters, impl: str | None) -> Callable[[], nn.Module]:
    if name == PLAIN:
        return lambda: nn.MultiheadAttention(hyper.dim, hyper.heads, batch_first=True)
    if name == RELATIVE:
        return lambda: RelativeBiasAttention(hyper.dim, hyper.heads, hyper.length)
    return lambda: RefinedSelfAttention(
        hyper.dim, hyper.heads, max_len=hyper.length, mechanism=name, source=hyper.source, impl=impl
    )


# --- Training and ranking ---


def ranks(scores: Tensor, answers: Tensor, candidates: Tensor) -> Tensor:
    """[U] ranks from 0. One answer per row, [U], among candidates, [U, items]; ties rank above the answer."""
    answer = scores.gather(1, answers[:, None])
    rivals = candidates & ~(scores < answer)  # NaN counts as a rival
    return rivals.scatter(1, answers[:, None], False).sum(dim=1)


def gains(ranks: Tensor) -> Tensor:
    """The NDCG@10 of each rank: there is one answer, so the ideal is 1."""
    return (ranks < CUTOFF) / torch.log2(ranks + 2.0)


def ranking_metrics(tested: dict[str, Tensor]) -> dict[str, Metric]:
    own = tested["ranks"]  # [U, TESTED]
    values = {"NDCG@10": gains(own), "HR@10": own < CUTOFF}
    return {name: paired.mean_of_users(x.double().mean(1)) for name, x in values.items()}


@torch.no_grad()
def evaluate(model: nn.Module, held_out: HeldOut) -> Tensor:
    """[U k] ranks of the answers among the items outside the history. `model.scores(queries)`: [U k, items + 1]."""
    model.eval()
    scores = model.scores(held_out.queries)
    model.train()
    candidates = ~held_out.seen
    candidates[:, 0] = False
    return ranks(scores, held_out.answers, candidates)


def train(
    attention: str,
    seed: int,
    hyper: Hyperparameters,
    histories: Histories,
    device: torch.device,
    impl: RefinedAttentionImpl | None = None,
    dtype: torch.dtype = torch.float32,
) -> Trained:
    split = Split(histories.items, hyper.length, device)
    torch.manual_seed(seed)
    model = SASRec(split.items, hyper, attention_factory(attention, hyper, impl)).to(device, dtype)
    fitted = fit(model, split, seed, hyper)
    queries = split.test.queries[::TESTED]
    full = queries[(queries != 0).all(1)]
    row = Row(
        parameters=count_parameters(model),
        learned=weights_by_lag(model, full),
        **fitted.figures,
    )
    return Trained(row, {"ranks": fitted.ranks})


class Fitted(NamedTuple):
    figures: dict[str, Any]  # of a Row
    ranks: Tensor  # [U, TESTED] at the best epoch


def fit(model: nn.Module, split: Split, seed: int, hyper: Hyperparameters) -> Fitted:
    """Train, and test at the best epoch, whose weights the model then has. Batches and negatives depend on the seed
    alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), hyper.learning_rate, betas=(0.9, 0.98))
    losses, seconds = [], []
    best, best_epoch, best_weights = -1.0, 0, None
    for epoch in range(1, hyper.epochs + 1):
        with timed_epoch(seconds):
            losses.append(train_epoch(model, optimizer, split, hyper.batch, generator))
        if epoch % EVALUATE_EVERY == 0 or epoch == hyper.epochs:
            reached = gains(evaluate(model, split.validation)).double().mean().item()
            if reached > best:
                best, best_epoch, best_weights = reached, epoch, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    figures = {
        "validation": best,
        "best_epoch": best_epoch,
        "epoch_seconds": statistics.median(seconds),
        "losses": losses,
    }
    return Fitted(figures, evaluate(model, split.test).view(-1, TESTED).cpu())


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, batch: int, generator: torch.Generator
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


# --- What the attention learned ---


@torch.no_grad()
def weights_by_lag(model: SASRec, sequences: Tensor) -> dict[str, list[float]]:
    """Mean weights of the last token by how many items ago: [N] per block.

    Sequences [B, N] without padding. "raw" is softmax(Q Kᵀ/√D), "used" what the attention makes of it.
    """
    inputs: list[tuple[Tensor, Tensor]] = []
    hooks = [
        block.attention.register_forward_pre_hook(lambda module, args: inputs.append(args[:2]))
        for block in model.blocks
    ]
    model.eval()
    model(sequences)
    model.train()
    for hook in hooks:
        hook.remove()
    curves = {}
    for number, (block, (queries, keys)) in enumerate(zip(model.blocks, inputs, strict=True)):
        attention = block.attention
        w_q, w_k, _ = attention.in_proj_weight.chunk(3)
        b_q, b_k, _ = attention.in_proj_bias.chunk(3)
        q, k = (
            x.unflatten(-1, (attention.num_heads, -1))
            for x in (F.linear(queries[:, -1:], w_q, b_q), F.linear(keys, w_k, b_k))
        )
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        curves[f"block {number}, raw"] = as_curve(scores.softmax(-1).mean((0, 1, 2)))
        if isinstance(attention, RefinedSelfAttention):
            _, used = attention(queries, keys, keys, is_causal=True, need_weights=True)
            curves[f"block {number}, used"] = as_curve(used[:, -1].mean(0))
        if isinstance(attention, RelativeBiasAttention):
            used = (scores + bias_by_distance(attention.by_distance)[:, -1:]).softmax(-1)
            curves[f"block {number}, used"] = as_curve(used.mean((0, 1, 2)))
    return curves


def as_curve(by_position: Tensor) -> list[float]:
    """The newest first, five digits."""
    return [round(x, 5) for x in by_position.flip(0).tolist()]


# --- The experiment ---


def search(attention: str) -> dict[str, Sequence[object]]:
    common = {"learning_rate": (3e-3, 6e-3, 1e-2), "dropout": (0.3, 0.5, 0.7), "blocks": (1, 2)}
    return common if attention in (PLAIN, RELATIVE) else common | {"source": ("logits", "weights")}


EXPERIMENT = Experiment(
    name="sasrec",
    op="refined_attention",
    arms=ARMS,
    hyper=Hyperparameters(),
    search=search,
    comparisons=COMPARISONS,
    load=movielens.load,
    train=train,
    metrics=ranking_metrics,
    budget=8,
    seeds=20,
)


if __name__ == "__main__":
    sys.exit(experiment.main(EXPERIMENT, None, __doc__))

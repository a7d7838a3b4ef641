"""`python -m benchmarks.quality.stosa`: STOSA on MovieLens-100k, plain and refined: does refinement rank better?

STOSA (WWW 2022): an item is a Gaussian with a diagonal covariance, and attention and ranking go by squared
2-Wasserstein distances. Data, split, training and metrics are those of `benchmarks.quality.sasrec`.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.data import movielens
from benchmarks.data.movielens import Histories
from benchmarks.quality import experiment
from benchmarks.quality.experiment import Experiment, Trained
from benchmarks.quality.sasrec import (
    ARMS,
    COMPARISONS,
    PLAIN,
    RELATIVE,
    Row,
    Split,
    bias_by_distance,
    fit,
    hidden_keys,
    ranking_metrics,
)
from benchmarks.quality.training import count_parameters
from recattn import refined_attention
from recattn._typing import Mechanism, Source
from recattn.nn import StochasticRefinedSelfAttention

LEFT = {"causal": True, "padding_side": "left"}


@dataclass(frozen=True)
class Hyperparameters:
    """Those of STOSA's README, except fewer heads, a larger learning rate and fewer epochs. No attention dropout."""

    length: int = 50
    dim: int = 48
    heads: int = 2
    blocks: int = 1
    dropout: float = 0.3
    batch: int = 128
    learning_rate: float = 2e-3
    margin: float = 0.005  # weight of the loss that keeps a positive nearer to the next than to the negative
    source: Source = "logits"
    epochs: int = 30


# --- Model ---


def distances(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> Tensor:
    """Squared 2-Wasserstein distances of Gaussians with diagonal covariances, [..., d] -> [...]."""
    return (mean - other_mean).square().sum(-1) + (cov.sqrt() - other_cov.sqrt()).square().sum(-1)


def positive(x: Tensor) -> Tensor:
    """STOSA's covariance of an unconstrained value."""
    return F.elu(x) + 1 + 1e-6


class DistanceSelfAttention(nn.Module):
    """STOSA's attention with the weights P of a subclass: P for the means, P∘P for the covariances."""

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__()
        self.maps = StochasticRefinedSelfAttention(dim, heads, max_len=length, refine=False, **LEFT)
        self.heads, self.scale = heads, (dim // heads) ** -0.5

    def weights(self, queries: Tensor, keys: Tensor, seq_lens: Tensor) -> Tensor:
        """[B, H, N, D'] each -> P [B, H, N, N]. `queries` @ `keys`ᵀ is -W²."""
        raise NotImplementedError

    def forward(self, mean: Tensor, cov: Tensor, *, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.maps
        mean_q, mean_k, mean_v = self._heads(maps.mean_in_proj(mean))
        cov_q, cov_k, cov_v = (positive(x) for x in self._heads(maps.cov_in_proj(cov)))
        x, y = torch.cat([mean_q, cov_q.sqrt()], -1), torch.cat([mean_k, cov_k.sqrt()], -1)
        # -‖x - y‖² is the dot product of (2x, -‖x‖², -1) and (y, 1, ‖y‖²).
        x_squared, y_squared = (z.square().sum(-1, keepdim=True) for z in (x, y))
        one = torch.ones_like(x_squared)
        queries, keys = torch.cat([2 * x, -x_squared, -one], -1), torch.cat([y, one, y_squared], -1)
        weights = self.weights(queries, keys, seq_lens)
        mean, cov = weights @ mean_v, weights.square() @ cov_v
        return tuple(
            proj(z.transpose(1, 2).flatten(-2)) for proj, z in ((maps.mean_out_proj, mean), (maps.cov_out_proj, cov))
        )

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, N, 3 E] -> three of [B, H, N, D]."""
        return x.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class DistanceRefinedSelfAttention(DistanceSelfAttention):
    """Refined as `recattn.refined_attention` refines SASRec's: its A is -W²/√D here."""

    def __init__(self, dim: int, heads: int, length: int, mechanism: Mechanism, source: Source) -> None:
        super().__init__(dim, heads, length)
        self.mechanism, self.source = mechanism, source
        count = 2 if mechanism == "simple" else 3
        # The sum of the squares of a row of A: see StochasticRefinedSelfAttention.reset_parameters.
        squares = length * dim // heads if source == "logits" else 1
        self.matrices = nn.ParameterList(torch.randn(length, length) * squares**-0.5 for _ in range(count))

    def weights(self, queries: Tensor, keys: Tensor, seq_lens: Tensor) -> Tensor:
        identity = torch.eye(keys.shape[2], dtype=keys.dtype, device=keys.device).expand(*keys.shape[:2], -1, -1)
        return refined_attention(
            queries,
            keys,
            identity,
            *self.matrices,
            mechanism=self.mechanism,
            source=self.source,
            seq_lens=seq_lens,
            scale=self.scale,
            **LEFT,
        )


class DistanceBiasSelfAttention(DistanceSelfAttention):
    """P = softmax(-W²/√D + FASTER b[i - j]) with a learned b [heads, N]: the control, as in SASRec."""

    # A row of scores has a standard deviation of 2. At the learning rate of the rest the bias would end below 0.2.
    FASTER = 10

    def __init__(self, dim: int, heads: int, length: int) -> None:
        super().__init__(dim, heads, length)
        self.by_distance = nn.Parameter(torch.zeros(heads, length))

    def weights(self, queries: Tensor, keys: Tensor, seq_lens: Tensor) -> Tensor:
        n = keys.shape[2]
        padding = torch.arange(n, device=keys.device) < n - seq_lens[:, None]
        scores = queries @ keys.mT * self.scale + bias_by_distance(self.FASTER * self.by_distance)
        return scores.masked_fill(hidden_keys(padding)[:, None], -math.inf).softmax(-1)


class FeedForward(nn.Module):
    """LayerNorm(x + dropout(W₂ elu(W₁ x)))."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ELU(), nn.Linear(4 * dim, dim), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layers(x))


class Block(nn.Module):
    """Attention between Gaussians, then a feed-forward of the means and one of the covariances."""

    def __init__(self, attention: nn.Module, dim: int, dropout: float) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.feed_forwards = nn.ModuleList(FeedForward(dim, dropout) for _ in range(2))

    def forward(self, mean: Tensor, cov: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        attended = self.attention(mean, cov, seq_lens=lengths)
        return tuple(
            feed_forward(norm(x + self.dropout(y)))
            for x, y, norm, feed_forward in zip((mean, cov), attended, self.norms, self.feed_forwards, strict=True)
        )


class STOSA(nn.Module):
    """Means and covariances of items and positions, then blocks. An item's score is minus its distance."""

    def __init__(self, items: int, hyper: Hyperparameters, attention: str) -> None:
        super().__init__()
        self.items, self.item_covs = (nn.Embedding(items + 1, hyper.dim, padding_idx=0) for _ in range(2))
        self.positions, self.position_covs = (nn.Embedding(hyper.length, hyper.dim) for _ in range(2))
        for table in (self.items, self.item_covs, self.positions, self.position_covs):
            nn.init.normal_(table.weight, std=0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(hyper.dim) for _ in range(2))
        self.dropout = nn.Dropout(hyper.dropout)
        self.blocks = nn.ModuleList(
            Block(new_attention(attention, hyper), hyper.dim, hyper.dropout) for _ in range(hyper.blocks)
        )
        self.margin = hyper.margin

    def forward(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N] items -> means and covariances, [B, N, dim]."""
        tables = (self.items, self.positions), (self.item_covs, self.position_covs)
        mean, cov = (
            F.elu(self.dropout(norm(of_items(sequences) + of_positions.weight)))
            for (of_items, of_positions), norm in zip(tables, self.norms, strict=True)
        )
        cov = cov + 1
        lengths = (sequences != 0).sum(1)
        for block in self.blocks:
            mean, cov = block(mean, cov, lengths)
        return mean, positive(cov)

    def scores(self, sequences: Tensor) -> Tensor:
        """[B, items + 1] of the item after each sequence."""
        mean, cov = (x[:, -1] for x in self(sequences))
        state = torch.cat([mean, cov.sqrt()], -1)
        items = torch.cat([self.items.weight, positive(self.item_covs.weight).sqrt()], -1)
        return -torch.cdist(state, items).square()

    def loss(self, inputs: Tensor, targets: Tensor, negatives: Tensor) -> Tensor:
        """-log σ(distance to the negative - distance to the next item), over all positions, and STOSA's margin loss:
        the next item should be nearer to the state than to the negative."""
        tokens = inputs != 0
        mean, cov = (x[tokens] for x in self(inputs))
        (next_mean, next_cov), (other_mean, other_cov) = (
            (self.items(items), positive(self.item_covs(items))) for items in (targets[tokens], negatives[tokens])
        )
        near = distances(mean, cov, next_mean, next_cov)
        far = distances(mean, cov, other_mean, other_cov)
        between = distances(next_mean, next_cov, other_mean, other_cov)
        return (F.softplus(near - far) + self.margin * F.relu(near - between)).mean()


def new_attention(name: str, hyper: Hyperparameters) -> nn.Module:
    if name in (PLAIN, "stochastic"):
        options = {"refine": name != PLAIN, "source": hyper.source, **LEFT}
        return StochasticRefinedSelfAttention(hyper.dim, hyper.heads, max_len=hyper.length, **options)
    if name == RELATIVE:
        return DistanceBiasSelfAttention(hyper.dim, hyper.heads, hyper.length)
    return DistanceRefinedSelfAttention(hyper.dim, hyper.heads, hyper.length, name, hyper.source)


# --- The experiment ---


def train(attention: str, seed: int, hyper: Hyperparameters, histories: Histories, device: torch.device) -> Trained:
    split = Split(histories.items, hyper.length, device)
    torch.manual_seed(seed)
    model = STOSA(split.items, hyper, attention).to(device)
    fitted = fit(model, split, seed, hyper)
    return Trained(Row(parameters=count_parameters(model), **fitted.figures), {"ranks": fitted.ranks})


def search(attention: str) -> dict[str, Sequence[object]]:
    common = {"learning_rate": (1e-3, 2e-3, 4e-3), "dropout": (0.1, 0.3, 0.5)}
    return common if attention in (PLAIN, RELATIVE) else common | {"source": ("logits", "weights")}


EXPERIMENT = Experiment(
    name="stosa",
    op="wasserstein_attention",
    arms=ARMS,
    hyper=Hyperparameters(),
    search=search,
    comparisons=COMPARISONS,
    load=movielens.load,
    train=train,
    metrics=ranking_metrics,
    budget=6,
    seeds=20,
)


if __name__ == "__main__":
    sys.exit(experiment.main(EXPERIMENT, None, __doc__))

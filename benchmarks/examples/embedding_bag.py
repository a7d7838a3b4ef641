"""`python -m benchmarks.examples.embedding_bag`: target attention over items that are bags of genres (nn.EmbeddingBag).

Ranker, samples and training are those of `benchmarks.quality.din`. An item (target or behaviour) is embedded by its id,
by the mean of its genres, or by the sum of both; `--attention` selects the attention over the behaviours. Only genres
are known of an item that nobody has rated yet, so the AUC is also reported over items with few ratings in the training.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.data import movielens
from benchmarks.data.movielens import Item
from benchmarks.quality import din
from benchmarks.quality.din import DIN, LREA_RANKS, Hyperparameters, Ranker, Ratings
from benchmarks.quality.training import count_parameters, new_table

IDS, GENRES, BOTH = "ids", "genres", "ids + genres"
QUICK_USERS = 60
RARE = 20  # most training ratings of a rare item


class GenreEmbedding(nn.Module):
    """Item ids [...] -> [..., dim]: the mean of the embeddings of the item's genres; zeros for id 0, the padding."""

    def __init__(self, items: Mapping[int, Item], dim: int) -> None:
        super().__init__()
        self.names = sorted({genre for item in items.values() for genre in item.genres})
        self.bag = nn.EmbeddingBag(len(self.names), dim, mode="mean")
        nn.init.normal_(self.bag.weight, std=dim**-0.5)
        bags = [items[i].genres if i in items else () for i in range(max(items) + 1)]
        self.register_buffer("genres", torch.tensor([self.names.index(genre) for bag in bags for genre in bag]))
        self.register_buffer("offsets", torch.tensor([0, *map(len, bags[:-1])]).cumsum(0))

    def forward(self, items: Tensor) -> Tensor:
        # A batch holds most items many times: compute every bag once, then look up its rows.
        return F.embedding(items, self.bag(self.genres, self.offsets))


class SumOfEmbeddings(nn.ModuleList):
    def forward(self, items: Tensor) -> Tensor:
        return sum(embedding(items) for embedding in self)


def new_ranker(features: str, attention: str, items: Mapping[int, Item], hyper: Hyperparameters) -> Ranker:
    torch.manual_seed(0)
    ranker = Ranker(attention, hyper)
    if features != IDS:
        genres = GenreEmbedding(items, hyper.dim)
        ranker.items = genres if features == GENRES else SumOfEmbeddings([ranker.items, genres])
    return ranker


def rare(ratings: Ratings, samples: Tensor) -> Tensor:
    """The samples whose item has at most RARE ratings in the training."""
    training, *_ = ratings.split()
    known, wanted = (ratings.items[tuple(part.T)] for part in (training, samples))
    return samples[known.bincount(minlength=movielens.ITEMS + 1)[wanted] <= RARE]


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    prog, description = "python -m benchmarks.examples.embedding_bag", __doc__.partition("\n")[0]
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--attention", choices=(DIN, *LREA_RANKS), default="LREA 16", help="LREA 16 by default")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_USERS} users, one epoch: seconds")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(1)
    try:
        items = movielens.items()
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    ratings, hyper = din.load(), Hyperparameters(epochs=4)
    if chosen.quick:
        ratings, hyper = ratings.first(QUICK_USERS), replace(hyper, epochs=1)

    *_, test = ratings.split()
    parts = test, rare(ratings, test)
    figures = ("AUC", f"AUC, items of at most {RARE} ratings", "s per epoch", "parameters")
    table = new_table(("item features",), figures)
    for features in track((IDS, GENRES, BOTH), "training", console=console, transient=True):
        ranker = new_ranker(features, chosen.attention, items, hyper)
        fitted = din.fit(ranker, 0, ratings, hyper)
        aucs = (din.auc(ratings, part, hyper, lambda batch, ranker=ranker: ranker(batch)[0]) for part in parts)
        epoch_seconds, parameters = f"{fitted.epoch_seconds:.2f}", f"{count_parameters(ranker):,}"
        table.add_row(features, *(f"{x:.4f}" for x in aucs), epoch_seconds, parameters)
    console.print(f"{chosen.attention} on {ratings.source}, one seed, {len(parts[0]):,} and {len(parts[1]):,} samples")
    console.print(table)
    console.print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.examples.sasrec`: SASRec with nn.MultiheadAttention, and the same model patched for refinement.

Model, split, negatives and ranking are those of `benchmarks.quality.sasrec`. Both trainings start from the same weights
and see the same batches. HR@10 and NDCG@10 are test metrics after the last epoch. `benchmarks.quality.sasrec` compares
them over twenty seeds, and [QUALITY.md](../QUALITY.md) says what came of it.
"""

import argparse
import copy
import functools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from benchmarks.data import movielens
from benchmarks.quality import sasrec
from benchmarks.quality.sasrec import PLAIN, REFINED, Hyperparameters, SASRec, Split
from benchmarks.quality.training import count_parameters, new_table, timed_epoch
from recattn.integrations.patching import patch
from recattn.nn import RefinedSelfAttention

EPOCHS, QUICK_EPOCHS = 30, 4


@dataclass(frozen=True)
class Trained:
    """One training. `epoch_seconds`: the median, without waiting for a core used by other programs."""

    hr10: float
    ndcg10: float
    epoch_seconds: float
    parameters: int
    losses: list[float]


def train(model: SASRec, split: Split, hyper: Hyperparameters, console: Console, name: str) -> Trained:
    torch.manual_seed(0)  # the same dropout for every model
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), hyper.learning_rate, betas=(0.9, 0.98))
    losses, seconds = [], []
    for _ in track(range(hyper.epochs), name, console=console, transient=True):
        with timed_epoch(seconds):
            losses.append(sasrec.train_epoch(model, optimizer, split, hyper.batch, generator))
    ranks = sasrec.evaluate(model, split.test)
    hr, ndcg = ((x.double().mean().item()) for x in (ranks < sasrec.CUTOFF, sasrec.gains(ranks)))
    return Trained(hr, ndcg, statistics.median(seconds), count_parameters(model), losses)


def compare(
    mechanism: str, split: Split, hyper: Hyperparameters, device: torch.device, console: Console
) -> dict[str, Trained]:
    """Train the model as it is, and a copy with its attention replaced."""
    torch.manual_seed(0)
    plain = SASRec(split.items, hyper, sasrec.attention_factory(PLAIN, hyper, None)).to(device)
    refined = copy.deepcopy(plain)
    refinement = functools.partial(RefinedSelfAttention, max_len=hyper.length, mechanism=mechanism)
    handle = patch(refined, {nn.MultiheadAttention: refinement})
    console.print(f"patched: {', '.join(handle.replaced)}")
    models = {"nn.MultiheadAttention": plain, f"patched, {mechanism}": refined}
    return {name: train(model, split, hyper, console, name) for name, model in models.items()}


def table(rows: dict[str, Trained]) -> Table:
    drawn = new_table(("SASRec",), ("HR@10", "NDCG@10", "s per epoch", "parameters", "last loss"))
    for name, row in rows.items():
        figures = f"{row.hr10:.4f}", f"{row.ndcg10:.4f}", f"{row.epoch_seconds:.3f}", f"{row.parameters:,}"
        drawn.add_row(name, *figures, f"{row.losses[-1]:.4f}")
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.examples.sasrec", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--mechanism", choices=REFINED, default=REFINED[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_EPOCHS} epochs instead of {EPOCHS}")
    parser.add_argument("--device", help="a CUDA device if there is one")
    parser.add_argument("--offline", action="store_true", help="do not download MovieLens-100k; draw its items")
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    hyper = Hyperparameters(epochs=QUICK_EPOCHS if chosen.quick else EPOCHS)
    console = Console(width=None if sys.stdout.isatty() else 120)
    histories = movielens.load(chosen.offline)
    rows = compare(chosen.mechanism, Split(histories.items, hyper.length, device), hyper, device, console)
    console.print(table(rows))
    console.print(
        f"{histories.source}, {hyper.epochs} epochs, {device}, {torch.get_num_threads()} threads, "
        f"{time.perf_counter() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

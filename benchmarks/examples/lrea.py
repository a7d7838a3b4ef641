"""`python -m benchmarks.examples.lrea`: LREA in place of DIN's attention, trained, and served from a state table.

Ranker, samples and training are those of `benchmarks.quality.din`; the two rankers differ only in their attention. The
states of all users are then put into a `recattn.serving.StateTable`. The attention of one user over 1000 candidates is
timed from that table, and in full over the history.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness.records import dtype_name
from benchmarks.harness.timing import CpuClock, finite, measure
from benchmarks.quality import din, din_serving, paired
from benchmarks.quality.din import DIN, SERVED, Hyperparameters, Ranker, Ratings, Row
from benchmarks.quality.din_serving import SERVED_CANDIDATES, ServingRow
from benchmarks.quality.experiment import Trained
from benchmarks.quality.training import new_table
from recattn.nn import Fidelity
from recattn.serving import StateTable

LREA = "LREA 16"
QUICK_USERS = 60
DTYPES = (torch.float32, torch.int8)


def state_table(ranker: Ranker, ratings: Ratings, hyper: Hyperparameters, dtype: torch.dtype) -> StateTable:
    """The state of every user before the test, under the user's number in the ratings."""
    batch = ratings.batch(ratings.before_the_test(), hyper.length)
    lrea, (_, behaviors) = ranker.attention, ranker.embed(batch)
    state = lrea.export_state(behaviors, batch.lengths, dtype=dtype)
    sizes = {"heads": lrea.num_heads, "rank": lrea.rank, "dim": lrea.target_dim, "value_dim": lrea.head_dim}
    table = StateTable(len(behaviors), **sizes, dtype=dtype)
    table.put(torch.arange(len(behaviors)), state)
    return table


def from_table(ranker: Ranker, table: StateTable, user: int, candidates: Tensor) -> Tensor:
    """h [n, d] of one user. State and candidate embeddings are read in place, without a gather."""
    return table.attend(
        ranker.items.weight.unsqueeze(1),
        torch.tensor([user]),
        torch.tensor([0, len(candidates)]),
        item_ids=candidates,
        negative_slope=ranker.attention.negative_slope,
    ).squeeze(1)


def from_history(ranker: Ranker, behaviors: Tensor, candidates: Tensor) -> Tensor:
    """h [n, d] of one user by the full attention, from the embedded behaviours [L, d]."""
    attend = partial(ranker.attention, behaviors=behaviors[None])
    per_candidate = len(behaviors) * ranker.attention.hidden[0]
    return din_serving.in_blocks(attend, ranker.items(candidates)[None], per_candidate).squeeze(0)


@torch.no_grad()
def serve(
    full: Ranker, compressed: Ranker, ratings: Ratings, hyper: Hyperparameters, seconds: float
) -> list[ServingRow]:
    """The attention over all candidates of the user with the longest history, from what is held of the user."""
    candidates = din.drawn_items(SERVED_CANDIDATES)
    user = int(ratings.counts.argmax())
    batch = ratings.batch(ratings.before_the_test()[user, None], hyper.length)
    (behaviors,) = full.embed(batch)[1]
    tables = [state_table(compressed, ratings, hyper, dtype) for dtype in DTYPES]
    calls = {(DIN, torch.float32): lambda: from_history(full, behaviors, candidates)}
    held = {(DIN, torch.float32): behaviors.nbytes}
    for table in tables:
        calls[LREA, table.dtype] = lambda table=table: from_table(compressed, table, user, candidates)
        held[LREA, table.dtype] = table.nbytes // (table.capacity + 1)
    timed = measure({key: lambda turn, c=call: c for key, call in calls.items()}, CpuClock(), seconds)
    return [
        ServingRow(
            model=model,
            dtype=dtype_name(dtype),
            length=len(behaviors),
            candidates=len(candidates),
            dim=hyper.dim,
            bytes_per_user=held[model, dtype],
            p50_ms=samples.percentile(50),
            spread=finite(samples.spread),
            waiting=samples.waiting,
        )
        for (model, dtype), samples in timed.items()
    ]


def quality_table(trainings: Mapping[str, Trained]) -> Table:
    """AUC of each model; for LREA also the AUC of each way to serve it."""
    table = new_table(("attention",), ("AUC", *(f"served, {way}" for way in SERVED), "s per epoch", "parameters"))
    for model, (row, tested) in trainings.items():
        auc = paired.value(din.click_metrics(tested)["AUC"])
        served = (f"{row.served_auc[way]:.4f}" if row.served_auc else "" for way in SERVED)
        table.add_row(model, f"{auc:.4f}", *served, f"{row.epoch_seconds:.2f}", f"{row.parameters:,}")
    return table


def fidelity_table(row: Row) -> Table:
    """For the rank of the model and smaller ones; empty where a value is not finite."""
    columns = [name for name in Fidelity._fields if name not in ("rank", "dtype")]
    table = new_table(("states",), ("rank", *(name.replace("_", " ") for name in columns)))
    for way, reports in row.fidelity.items():
        for figures in reports:
            cells = ("" if figures[name] is None else f"{figures[name]:.4f}" for name in columns)
            table.add_row(f"{LREA}, {way}", str(figures["rank"]), *cells)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.examples.lrea", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_USERS} users, one epoch: seconds")
    parser.add_argument("--offline", action="store_true", help="do not download MovieLens-100k; draw its ratings")
    chosen = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(1)
    ratings, hyper, seconds = din.load(chosen.offline), Hyperparameters(epochs=5), 5.0
    if chosen.quick:
        ratings, hyper, seconds = ratings.first(QUICK_USERS), replace(hyper, epochs=1), 0.5

    models = DIN, LREA
    rankers, trainings = zip(*(din.trained(model, 0, ratings, hyper) for model in models), strict=True)
    console.print(f"AUC on {ratings.source}, one seed, at most {hyper.epochs} epochs")
    console.print(quality_table(dict(zip(models, trainings, strict=True))))
    console.print(f"absorbed vs restored, {din.CANDIDATES} candidates per user")
    console.print(fidelity_table(trainings[1].row))
    console.print(f"attention of 1 user and {SERVED_CANDIDATES} candidates, d = {hyper.dim}, one thread")
    console.print(din_serving.serving_table(serve(*rankers, ratings, hyper, seconds)))
    console.print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

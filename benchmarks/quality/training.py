"""What the quality runs share: the row of a training, trainings side by side, tables."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from benchmarks.harness.timing import seconds_waited

T = TypeVar("T")


@dataclass(kw_only=True)
class TrainingRow:
    """What a training reports. `epoch_seconds`: the median, without evaluation and without waiting for a core."""

    parameters: int
    validation: float  # the metric that chooses the epoch and the hyperparameters; higher is better
    best_epoch: int
    epoch_seconds: float
    learned: dict[str, list[float]] = field(default_factory=dict)  # curves that a figure shows


@contextmanager
def timed_epoch(seconds: list[float]) -> Iterator[None]:
    """Append the seconds of the block to the list, without the time spent waiting for a core."""
    started, waited = time.perf_counter(), seconds_waited()
    yield
    seconds.append(time.perf_counter() - started - (seconds_waited() - waited))


def batches_of_similar_lengths(lengths: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """Random batches of numbers of samples, each cut from 16 batches' worth sorted by length, to save padding."""
    shuffled = torch.randperm(len(lengths), generator=generator)
    batches = [batch for pool in shuffled.split(16 * size) for batch in pool[lengths[pool].argsort()].split(size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train_all(train: Callable[..., T], calls: Sequence[tuple], jobs: int, *arguments: object) -> Iterator[T]:
    """train(*call, *arguments) of every call, `jobs` at a time on one thread each, as they finish."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawned, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(train, *call, *arguments) for call in calls]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # a failure starts no other


def new_table(names: Sequence[str], figures: Sequence[str]) -> Table:
    """A table with columns of names, then right-aligned columns of figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in names:
        table.add_column(column)
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{spread}"

"""What the quality runs share: the row of a training, trainings side by side, arguments and tables."""

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import torch
from rich import box
from rich.table import Table
from torch import nn

from benchmarks.harness import records
from benchmarks.harness.timing import seconds_waited

T = TypeVar("T")


@dataclass(kw_only=True)
class TrainingRow:
    """One training. `epoch_seconds`: the median, without evaluation and without waiting for a core."""

    op: str
    workload: str
    seed: int
    shape: dict[str, object]
    data: str
    parameters: int
    best_epoch: int
    epoch_seconds: float


@contextmanager
def timed_epoch(seconds: list[float]) -> Iterator[None]:
    """Append the seconds of the block to the list, without the time spent waiting for a core."""
    started, waited = time.perf_counter(), seconds_waited()
    yield
    seconds.append(time.perf_counter() - started - (seconds_waited() - waited))


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def train_all(train: Callable[..., T], names: Sequence[str], seeds: int, jobs: int, *arguments: object) -> Iterator[T]:
    """train(name, seed, *arguments) for every name and seed, `jobs` at a time on one thread each, as they finish."""
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, spawned, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(train, name, seed, *arguments) for seed in range(seeds) for name in names]
        for future in as_completed(futures):
            yield future.result()


def add_arguments(parser: argparse.ArgumentParser, epochs: int) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each model, 5 by default")
    parser.add_argument("--epochs", type=int, default=epochs, help="at most, %(default)s by default")
    parser.add_argument("--jobs", type=int, help="trainings at a time, one CPU thread each; one per core, 1 on CUDA")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the JSON lines")
    parser.add_argument("--offline", action="store_true", help="do not download MovieLens-100k; draw its items")


def check_arguments(parser: argparse.ArgumentParser, chosen: argparse.Namespace, device: torch.device) -> None:
    """Refuse counts below 1, and set the default number of jobs."""
    if min(chosen.seeds, chosen.epochs, chosen.jobs or 1) < 1:
        parser.error("--seeds, --epochs and --jobs must be at least 1")
    chosen.jobs = chosen.jobs or (len(os.sched_getaffinity(0)) if device.type == "cpu" else 1)


def begin(name: str, chosen: argparse.Namespace, device: torch.device) -> tuple[dict[str, object], Path]:
    """What the rows of a run share, and the file they go to."""
    common = records.environment(device) | {"threads": 1, "jobs": chosen.jobs}
    return common, chosen.results / f"{datetime.now():%Y%m%d-%H%M%S}-{name}-{device.type}.jsonl"


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

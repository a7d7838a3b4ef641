"""A paired experiment: every arm is tuned with the same budget, then trained with the same seeds, then compared.

Every finished training is a file, so that an interrupted run goes on where it stopped. A file is used again while arm,
seed, hyperparameters, data, device and the version of torch are the same: remove the folder after a change of the code.
"""

import argparse
import hashlib
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.harness import records
from benchmarks.quality import paired
from benchmarks.quality.paired import Metric
from benchmarks.quality.training import TrainingRow, new_table, train_all

TUNING_SEED = 1000  # no seed of a comparison


class Trained(NamedTuple):
    row: TrainingRow
    tested: dict[str, Tensor]  # what the metrics of the test are computed from


Train = Callable[[str, int, Any, Any, torch.device], Trained]
Metrics = Callable[[dict[str, Tensor]], dict[str, Metric]]


class Task(NamedTuple):
    arm: str
    seed: int
    hyper: Any  # a dataclass of hyperparameters


@dataclass(frozen=True)
class Experiment:
    """`train(arm, seed, hyper, data, device)` trains one arm, and `metrics` makes metrics of what it tested."""

    name: str
    op: str
    arms: tuple[str, ...]
    hyper: Any  # the defaults, and the first draw of every arm
    search: Callable[[str], Mapping[str, Sequence[object]]]  # values to try of the hyperparameters of an arm
    comparisons: tuple[tuple[str, str], ...]  # (method, baseline)
    load: Callable[[bool], Any]  # the data; True: without a download
    train: Train
    metrics: Metrics
    budget: int  # draws of hyperparameters per arm; 1: the defaults
    seeds: int


@dataclass(kw_only=True)
class Effect:
    """metric(method) - metric(baseline), a mean over seeds, with its 95% interval over users and seeds."""

    effect_of: str  # the method
    over: str  # the baseline
    op: str
    workload: str
    metric: str
    seeds: int
    users: int
    data: str
    baseline: float  # mean over seeds
    effect: float
    low: float
    high: float
    detectable: float  # the smallest effect that these users and seeds would show


# --- Tuning ---


def draws(experiment: Experiment, arm: str) -> list[Any]:
    """The hyperparameters to try: the defaults, then random ones.

    What all arms choose among is the same in the same draw, and differs between draws. An arm's own options are drawn
    beside it, within the same budget.
    """
    space = experiment.search(arm)
    shared = set.intersection(*(set(experiment.search(other)) for other in experiment.arms))
    tried = {tuple(getattr(experiment.hyper, name) for name in sorted(shared)): experiment.hyper}
    for number in range(1, 1000):
        if len(tried) == experiment.budget:
            break
        chosen = {
            name: random.Random(f"{experiment.name} {name} {number}").choice(values) for name, values in space.items()
        }
        common = tuple(chosen[name] for name in sorted(shared))
        tried.setdefault(common, replace(experiment.hyper, **chosen))
    return list(tried.values())


# --- Trainings ---


def run_task(
    task: Task, known: dict, path: Path, train: Train, metrics: Metrics, common: dict, data: Any, device: torch.device
) -> None:
    """Train, and write the row (`known` and what the training reports), what all rows share, and what was tested."""
    trained = train(*task, data, device)
    test = {name: paired.value(metric) for name, metric in metrics(trained.tested).items()}
    row = {**known, **asdict(trained.row), "test": test}
    part = path.with_suffix(".part")  # renamed when complete
    torch.save({"row": row, "common": common, "tested": trained.tested}, part)
    part.rename(path)


class Run:
    """The trainings of an experiment: those that are there are read, the others trained."""

    def __init__(self, experiment: Experiment, chosen: argparse.Namespace, console: Console) -> None:
        self.experiment, self.chosen, self.console = experiment, chosen, console
        self.data = experiment.load(chosen.offline)
        self.source: str = self.data.source
        self.folder = chosen.results / experiment.name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.common = records.environment(chosen.device) | {"threads": 1, "jobs": chosen.jobs}
        self.common["torch"] = str(torch.__version__)  # not a TorchVersion, which torch.load refuses

    def path(self, task: Task) -> Path:
        device = [self.common[name] for name in ("device", "cpu_capability", "torch")]
        same = [task.arm, task.seed, asdict(task.hyper), self.source, device]
        digest = hashlib.sha256(repr(same).encode()).hexdigest()[:12]
        return self.folder / f"{task.arm.replace(' ', '-')}-{task.seed}-{digest}.pt"

    def known(self, task: Task) -> dict[str, object]:
        """What a row says before the training."""
        of_run = {"op": self.experiment.op, "workload": self.experiment.name, "data": self.source}
        return of_run | {"arm": task.arm, "seed": task.seed, "shape": asdict(task.hyper)}

    def train(self, what: str, tasks: Sequence[Task]) -> dict[Task, dict]:
        paths = {task: self.path(task) for task in tasks}
        missing = [(task, self.known(task), path) for task, path in paths.items() if not path.exists()]
        shared = self.experiment.train, self.experiment.metrics, self.common, self.data, self.chosen.device
        finished = train_all(run_task, missing, self.chosen.jobs, *shared)
        label = f"{self.experiment.name}, {what}"
        for _ in track(finished, label, len(missing), console=self.console, transient=True):
            pass
        return {task: torch.load(path, weights_only=True) for task, path in paths.items()}

    def tune(self) -> tuple[dict[str, Any], list[dict]]:
        """The best hyperparameters of each arm, and the trainings that showed it."""
        tried = {arm: draws(self.experiment, arm) for arm in self.chosen.arms}
        if self.experiment.budget == 1:
            return {arm: own[0] for arm, own in tried.items()}, []
        tasks = [Task(arm, TUNING_SEED, hyper) for arm, own in tried.items() for hyper in own]
        trained = self.train("tuning", tasks)
        for one in trained.values():
            one["row"]["workload"] += " tuning"
        best = {
            arm: max((task for task in tasks if task.arm == arm), key=lambda t: trained[t]["row"]["validation"])
            for arm in tried
        }
        return {arm: task.hyper for arm, task in best.items()}, list(trained.values())


def effects(experiment: Experiment, trained: Mapping[str, Sequence[dict]]) -> Iterator[Effect]:
    """The comparisons of arms that were trained. `trained[arm]` is in the order of the seeds."""
    metrics = {arm: [experiment.metrics(one["tested"]) for one in own] for arm, own in trained.items()}
    for method, baseline in experiment.comparisons:
        if method not in trained or baseline not in trained:
            continue
        for name in metrics[baseline][0]:
            both = ([of_seed[name] for of_seed in metrics[arm]] for arm in (method, baseline))
            yield Effect(
                effect_of=method,
                over=baseline,
                op=experiment.op,
                workload=experiment.name,
                metric=name,
                seeds=len(trained[method]),
                users=metrics[method][0][name].users,
                data=trained[method][0]["row"]["data"],
                baseline=statistics.mean(one["row"]["test"][name] for one in trained[baseline]),
                **paired.estimate(*both)._asdict(),
            )


# --- The command ---


def parse_arguments(experiment: Experiment, arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.quality.{experiment.name}", description=description.partition("\n")[0]
    )
    arms = experiment.arms
    parser.add_argument("--arms", nargs="+", choices=arms, default=arms, help="all by default")
    parser.add_argument("--seeds", type=int, default=experiment.seeds, help="%(default)s by default")
    budget = "sets of hyperparameters tried per arm, %(default)s by default; 1: the defaults"
    parser.add_argument("--budget", type=int, default=experiment.budget, help=budget)
    parser.add_argument("--epochs", type=int, default=experiment.hyper.epochs, help="at most, %(default)s by default")
    parser.add_argument("--jobs", type=int, help="trainings at a time, one CPU thread each; one per core, 1 on CUDA")
    where = "folder of the trainings and the record, %(default)s by default"
    parser.add_argument("--results", type=Path, default=Path("results/quality"), help=where)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="a CUDA device where there is one")
    parser.add_argument("--offline", action="store_true", help="do not download the data; draw it")
    chosen = parser.parse_args(arguments)
    if min(chosen.seeds, chosen.budget, chosen.epochs, chosen.jobs or 1) < 1:
        parser.error("--seeds, --budget, --epochs and --jobs must be at least 1")
    if chosen.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    chosen.device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen.jobs = chosen.jobs or (len(os.sched_getaffinity(0)) if chosen.device.type == "cpu" else 1)
    return chosen


def main(experiment: Experiment, arguments: Sequence[str] | None, description: str) -> int:
    started = time.perf_counter()
    chosen = parse_arguments(experiment, arguments, description)
    experiment = replace(
        experiment, budget=chosen.budget, hyper=replace(experiment.hyper, epochs=chosen.epochs), seeds=chosen.seeds
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    run = Run(experiment, chosen, console)
    hyper, tuning = run.tune()
    finished = run.train("seeds", [Task(arm, seed, hyper[arm]) for seed in range(chosen.seeds) for arm in chosen.arms])
    trained = {arm: [one for task, one in finished.items() if task.arm == arm] for arm in chosen.arms}
    compared = list(effects(experiment, trained))

    path = chosen.results / f"{datetime.now():%Y%m%d-%H%M%S}-{experiment.name}-{chosen.device.type}.jsonl"
    for one in [*tuning, *(one for own in trained.values() for one in own)]:
        records.append_lines([one["row"]], one["common"], path)
    records.append(compared, run.common, path)
    console.print(f"{experiment.name} on {run.source}, {chosen.seeds} seeds, {run.common['device']}")
    console.print(arms_table(trained, experiment.hyper, hyper))
    console.print(effects_table(compared))
    console.print(f"{path}, {time.perf_counter() - started:.0f} s")
    return 0


def arms_table(trained: Mapping[str, Sequence[dict]], defaults: Any, tuned: Mapping[str, Any]):
    metrics = next(iter(trained.values()))[0]["row"]["test"]
    table = new_table(("arm", "tuned"), (*metrics, "s per epoch", "parameters"))
    for arm, own in trained.items():
        rows = [one["row"] for one in own]
        changed = {name: x for name, x in asdict(tuned[arm]).items() if x != getattr(defaults, name)}
        figures = (f"{statistics.mean(row['test'][name] for row in rows):.4f}" for name in metrics)
        seconds = statistics.median(row["epoch_seconds"] for row in rows)
        settings = ", ".join(f"{name} {x}" for name, x in changed.items())
        table.add_row(arm, settings or "defaults", *figures, f"{seconds:.2f}", f"{rows[0]['parameters']:,}")
    return table


def effects_table(compared: Sequence[Effect]):
    table = new_table(("arm", "over", "metric"), ("effect", "95% interval", "detectable"))
    for e in compared:
        interval = f"[{e.low:+.4f}, {e.high:+.4f}]"
        table.add_row(e.effect_of, e.over, e.metric, f"{e.effect:+.4f}", interval, f"{e.detectable:.4f}")
    return table

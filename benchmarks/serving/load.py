"""`python -m benchmarks.serving.load`: stores of user states under load, and with --faults what faults do to them.

Client processes ask a StateCache, each its own, for Zipf users with ragged candidates, while another process rewrites
users. Every answer is compared with the direct computation, bit for bit, outside the timed part. In between, every
client times `get_many` of uniformly drawn users, and the store's own floor: its engine's calls for as many keys, and
one copy. The exit status is 1 if an answer was wrong, an acknowledged write lost, or a fault had another outcome than
documented.
"""

import argparse
import contextlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before PyTorch is loaded: the clients are forked

import numpy as np
import torch
from rich.console import Console

from benchmarks.harness import records
from benchmarks.report import serving as report
from benchmarks.serving import faults, traffic
from benchmarks.serving.outcomes import Fault, StoreLoad
from benchmarks.serving.reads import floor, time_reads
from benchmarks.serving.servers import REASON, RedisCluster, RedisServer
from benchmarks.serving.traffic import BATCH, SCHEMA, Truth
from recattn.serving import LMDBStore, RedisStore, StateCache, StateStore
from recattn.serving.stores.records import Kind, RecordFormat

STORES = ("lmdb", "redis", "cluster")
MAX_AGE = 10.0
REWRITTEN, REWRITE_EVERY = 64, 0.05  # users, seconds
WARM_UP = 300.0  # seconds that it may take
READS = 4  # of get_many and of the floor, per request
# A million states and their log; rewriting the log would need as much again.
REDIS = {"auto_aof_rewrite_percentage": 0}


@dataclass(frozen=True)
class Client:
    """What one process does."""

    store: str
    address: str
    folder: Path
    users: int
    capacity: int
    seconds: float
    max_age: float
    seed: int

    def open(self) -> StateStore:
        if self.store == "lmdb":
            return LMDBStore(self.address, SCHEMA)
        return RedisStore(self.address, SCHEMA, cluster=self.store == "cluster", socket_timeout=5.0)

    def truth(self) -> Truth:
        return Truth(self.folder, self.users)


class Measured(NamedTuple):
    """By one client. Times in seconds."""

    requests: list[float]
    reads: list[float]
    floors: list[float]
    targets: int = 0
    hits: int = 0
    misses: int = 0
    wrong: int = 0
    private_mb: float = 0.0


# --- The processes ---

_together: "multiprocessing.synchronize.Barrier"


def _join(barrier: "multiprocessing.synchronize.Barrier") -> None:
    global _together
    _together = barrier


def ask(client: Client) -> Measured:
    """Warm a cache with the most popular users, then ask and time."""
    rng, truth = np.random.default_rng(client.seed), client.truth()
    measured = Measured([], [], [])
    targets = wrong = 0
    with client.open() as store, floor(client.store, client.address, store) as read_floor:
        cache = StateCache(store, client.capacity, max_age=client.max_age)
        for start in range(0, client.capacity - 2 * BATCH, BATCH):
            popular = traffic.by_popularity(np.arange(start, start + BATCH), client.users)
            with cache.request(torch.from_numpy(popular)):
                pass
        _together.wait(WARM_UP)
        before, end = cache.stats(), time.monotonic() + client.seconds
        while time.monotonic() < end:
            question = traffic.draw_question(rng, traffic.draw_zipf(rng, client.users, BATCH))
            users, low = torch.from_numpy(question.users), truth.oldest(question.users, client.max_age)
            began = time.perf_counter()
            with cache.request(users) as request:
                answer = question.attend(request)
            measured.requests.append(time.perf_counter() - began)
            judged = traffic.judge(question, answer, request.found, low, truth.started[question.users])
            wrong += int((judged.wrong | judged.missing).sum())
            targets += len(question.item_ids)
            for _ in range(READS):
                time_reads(
                    store, read_floor, rng.integers(client.users, size=(2, BATCH)), measured.reads, measured.floors
                )
        after = cache.stats()
        cache.close()
    hits, misses = (after[name] - before[name] for name in ("hits", "misses"))
    return measured._replace(targets=targets, hits=hits, misses=misses, wrong=wrong, private_mb=_private_mb())


def read_alone(client: Client, store: StateStore) -> Measured:
    """The reads of `ask`, while nothing else is done."""
    rng, measured, end = np.random.default_rng(0), Measured([], [], []), time.monotonic() + client.seconds / 2
    with floor(client.store, client.address, store) as read_floor:
        while time.monotonic() < end:
            time_reads(store, read_floor, rng.integers(client.users, size=(2, BATCH)), measured.reads, measured.floors)
    return measured


def rewrite(client: Client) -> float:
    """Rewrite users, popular and other ones, at a low rate. Returns users per second."""
    rng, truth, written = np.random.default_rng(client.seed), client.truth(), 0
    with client.open() as store:
        _together.wait(WARM_UP)
        began = time.monotonic()
        while (now := time.monotonic()) < began + client.seconds:
            drawn = (
                traffic.draw_zipf(rng, client.users, REWRITTEN // 2),
                rng.integers(client.users, size=REWRITTEN // 2),
            )
            users = truth.settled(np.concatenate(drawn), client.max_age)
            if len(users):
                truth.write(store.put_many, users)
                written += len(users)
            time.sleep(max(0.0, now + REWRITE_EVERY - time.monotonic()))
    return written / client.seconds


def _private_mb() -> float:
    """Memory that is this process' own: LMDB's pages are the page cache's."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise LookupError("RssAnon is not in /proc/self/status: this needs Linux")


# --- A store under load ---


class Running(NamedTuple):
    """An engine that is up."""

    address: str
    nodes: list[RedisServer]
    folder: Path

    def engine_mb(self) -> float:
        used = 0
        for node in self.nodes:
            with node.client() as client:
                used += client.info("memory")["used_memory"]
        return used / 2**20

    def disk_mb(self) -> float:
        folders = [node.folder for node in self.nodes] or [self.folder]
        files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
        return sum(file.stat().st_blocks * 512 for file in files) / 2**20


@contextlib.contextmanager
def engine(store: str, folder: Path) -> Iterator[Running]:
    states = folder / "states"
    if store == "lmdb":
        yield Running(str(states), [], states)
    elif store == "redis":
        with RedisServer(**REDIS) as server:
            yield Running(server.url, [server], states)
    else:
        with RedisCluster(nodes=3, **REDIS) as cluster:
            yield Running(cluster.url, cluster.nodes, states)


def measure(store: str, *, users: int, seconds: float, clients: int, folder: Path) -> StoreLoad:
    capacity, max_age = max(users // 10, 4 * BATCH), min(MAX_AGE, seconds / 2)
    with engine(store, folder) as running:
        each = [
            Client(store, running.address, folder, users, capacity, seconds, max_age, seed)
            for seed in range(clients + 1)
        ]
        truth = each[0].truth()
        with each[0].open() as opened:
            written_per_s = truth.fill(opened)
            alone = read_alone(each[0], opened)
        traffic.pool(), traffic._popularity(users), traffic._popularity(traffic.ITEMS)  # shared by the fork
        fork = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(clients + 1, fork, _join, (fork.Barrier(clients + 1),)) as processes:
            rewriting = processes.submit(rewrite, each[0])
            found = list(processes.map(ask, each[1:]))
            rewritten_per_s = rewriting.result()
        with each[0].open() as opened:
            lost = truth.lost(opened)
        requests, reads, floors = ([t for one in found for t in one[part]] for part in range(3))
        hits, misses = (sum(getattr(one, name) for one in found) for name in ("hits", "misses"))
        return StoreLoad(
            load_of=store,
            users=users,
            record_bytes=RecordFormat(SCHEMA, Kind.STATE).nbytes,
            clients=clients,
            capacity=capacity,
            max_age=max_age,
            zipf=traffic.ZIPF,
            written_per_s=written_per_s,
            rewritten_per_s=rewritten_per_s,
            floor_alone_ms=_percentiles(alone.floors),
            get_many_alone_ms=_percentiles(alone.reads),
            floor_ms=_percentiles(floors),
            get_many_ms=_percentiles(reads),
            request_ms=_percentiles(requests),
            reads_alone=len(alone.reads),
            reads=len(reads),
            requests=len(requests),
            targets=sum(one.targets for one in found) / len(requests),
            requests_per_s=sum(len(one.requests) / sum(one.requests) for one in found),
            hit_rate=hits / (hits + misses),
            client_mb=max(one.private_mb for one in found),
            engine_mb=running.engine_mb(),
            disk_mb=running.disk_mb(),
            wrong_answers=sum(one.wrong for one in found),
            lost_writes=lost,
        )


def _percentiles(times: list[float]) -> dict[str, float]:
    return {f"p{share:g}": float(np.percentile(times, share)) * 1e3 for share in (50, 99, 99.9)}


# --- The command ---


@contextlib.contextmanager
def temporary(parent: Path | None) -> Iterator[Path]:
    """A folder for everything that the engines write, removed afterwards."""
    folder, before = Path(tempfile.mkdtemp(prefix="recattn-load-", dir=parent)), tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield folder
    finally:
        tempfile.tempdir = before
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.load", description=__doc__.partition("\n")[0])
    parser.add_argument("--store", nargs="*", choices=STORES, default=STORES, metavar="STORE", help="%(default)s")
    parser.add_argument("--users", type=int, default=1_000_000, help="%(default)s; 0: faults alone")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load on each store")
    parser.add_argument("--clients", type=int, default=2, help="processes")
    parser.add_argument("--faults", action="store_true", help="also provoke faults")
    parser.add_argument("--fault-users", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where the stores' files are meanwhile: 9 GB for a million users")
    parser.add_argument("--out", type=Path, help="file to add the rows to, as JSON lines")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if REASON and set(chosen.store) != {"lmdb"}:
        parser.error(f"--store: {REASON}")
    common = records.environment(torch.device("cpu")) | {"cores": len(os.sched_getaffinity(0))}
    console, failed = Console(width=None if sys.stdout.isatty() else 200), False
    for row in _rows(chosen):
        failed |= not row.as_expected
        if chosen.out:
            records.append_lines([asdict(row)], common, chosen.out)
        console.print(report.tables(row))
    return int(failed)


def _rows(chosen: argparse.Namespace) -> Iterator[StoreLoad | Fault]:
    sizes = {"users": chosen.users, "seconds": chosen.seconds, "clients": chosen.clients}
    runs = [partial(measure, store, **sizes) for store in chosen.store if chosen.users]
    runs += [partial(fault, users=chosen.fault_users) for fault in faults.of(chosen.store) if chosen.faults]
    for run in runs:
        with temporary(chosen.folder) as folder:
            row = run(folder=folder)
        yield row


if __name__ == "__main__":
    sys.exit(main())

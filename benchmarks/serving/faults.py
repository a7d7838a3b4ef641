"""What may go wrong with a store, done to it under load: no wrong answer, no lost acknowledged write, a clear error or
the documented default for what is missing."""

import contextlib
import multiprocessing
import os
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from redis.crc import key_slot

from benchmarks.serving.outcomes import Fault
from benchmarks.serving.servers import SLOTS, RedisCluster, RedisServer
from benchmarks.serving.threads import USERS, Traffic
from benchmarks.serving.traffic import SCHEMA, Truth
from recattn.serving import LMDBStore, RedisStore, StateCache, StateStore, StoreError
from recattn.serving.stores.records import HEADER, Kind

UNAVAILABLE, FULL, REFUSED = "StoreUnavailableError", "StoreFullError", "StateRefusedError"
MAX_AGE = 0.1  # so that the caches ask the store all the time
KILLS = 5
Provoke = Callable[[Path, int], Fault]


def of(stores: Sequence[str]) -> list[Provoke]:
    """The faults of some stores, each by default and by the option that the docs name."""
    found: list[Provoke] = []
    if "lmdb" in stores:
        found += [writer_killed, file_full, disk_full]
        found += [partial(corrupt_record, "lmdb", setting) for setting in ("raise", "missing")]
        found += [evicted_in_flight, partial(deleted, "lmdb")]
    if "redis" in stores:
        found += [partial(redis_killed, setting) for setting in ("raise", "missing")]
        found += [memory_full, redis_disk_full]
        found += [partial(corrupt_record, "redis", setting) for setting in ("raise", "missing")]
        found += [partial(deleted, "redis")]
    if "cluster" in stores:
        found += [partial(node_lost, setting) for setting in ("raise", "missing")]
    return found


# --- Engines that end ---


def redis_killed(setting: str, folder: Path, users: int) -> Fault:
    with RedisServer() as server, RedisStore(server.url, SCHEMA) as store, RedisStore(server.url, SCHEMA) as writes_to:
        truth, cache = _filled(folder, users, store), _cache(store, users, on_unavailable=setting)
        everyone = np.arange(users)
        may_miss = everyone if setting == "missing" else None
        with Traffic(cache, truth, writes_to, readers=[everyone] * 2, may_miss=may_miss) as load:
            load.wait("whole")
            server.kill()
            load.wait("errors")
            load.wait("missing" if setting == "missing" else UNAVAILABLE)
            back_s = _restart(server.start, load)
            load.wait("writes", more=2)
        errors = {UNAVAILABLE}
        return _outcome("redis", "server killed and restarted", setting, load, truth.lost(store), errors, back_s)


def node_lost(setting: str, folder: Path, users: int) -> Fault:
    """One reader asks for all users, another for those of the live nodes, who must see no error and miss nobody."""
    with (
        RedisCluster(nodes=3) as cluster,
        RedisStore(cluster.url, SCHEMA, cluster=True) as store,
        RedisStore(cluster.url, SCHEMA, cluster=True) as writes_to,
    ):
        truth, cache = _filled(folder, users, store), _cache(store, users, on_unavailable=setting)
        everyone = np.arange(users)
        nodes = np.array([key_slot(b"recattn:{%d}" % user) * 3 // SLOTS for user in everyone])
        may_miss = everyone[nodes == 2] if setting == "missing" else None
        with (
            Traffic(cache, truth, writes_to, readers=[everyone], may_miss=may_miss) as load,
            Traffic(cache, truth, readers=[everyone[nodes != 2]]) as live,
        ):
            load.wait("whole")
            live.wait("whole")
            cluster.kill(2)
            load.wait("missing" if setting == "missing" else UNAVAILABLE)
            live.wait("whole")
            back_s = _restart(lambda: cluster.start(2), load)
            load.wait("writes", more=2)
        lost = truth.lost(store)
        fault = _outcome("cluster", "one of three nodes lost and restarted", setting, load, lost, {UNAVAILABLE}, back_s)
        fault.answers += live.counts["answers"]
        fault.wrong_answers += live.counts["wrong"]
        if live.errors or live.counts["wrong"]:
            return _unexpected(fault, f"users of live nodes: {dict(live.counts)}")
        fault.outcome += f"; users of live nodes served all the time ({live.counts['answers']} requests)"
        return fault


def _restart(start: Callable[[], None], load: Traffic) -> float:
    """Seconds until answers are whole again."""
    began = time.perf_counter()
    start()
    load.wait("whole", more=1)
    back_s = time.perf_counter() - began
    load.wait("whole")
    return back_s


def writer_killed(folder: Path, users: int) -> Fault:
    """SIGKILL in the middle of put_many, several times, while this process reads; another process writes on."""
    fork = multiprocessing.get_context("fork")
    turns = [fork.Event() for _ in range(KILLS + 1)]
    writers = [fork.Process(target=_write_in_turn, args=(folder, users, turn), daemon=True) for turn in turns]
    truth, waits = Truth(folder, users), []
    for writer in writers:  # before anything here has threads or the environment open
        writer.start()
    try:
        with LMDBStore(folder / "states", SCHEMA) as store:
            truth.fill(store)
            with Traffic(_cache(store, users), truth, readers=[np.arange(users)] * 2) as load:
                for writer, turn in zip(writers, turns, strict=True):
                    began, acknowledged = time.perf_counter(), truth.acknowledged.sum()
                    turn.set()
                    _wait_until(lambda: truth.acknowledged.sum() > acknowledged)  # noqa: B023
                    waits.append(time.perf_counter() - began)
                    _wait_until(lambda: (truth.started != truth.acknowledged).any())
                    writer.kill()
                    writer.join()
                    load.wait("whole", more=5)
            lost = truth.lost(store)
    finally:
        for writer in writers:
            writer.kill()
    fault = _outcome(
        "lmdb", f"writer killed in put_many, {KILLS + 1} times", "default", load, lost, set(), max(waits[1:])
    )
    fault.outcome += "; back: the next writer's first acknowledged write"
    return fault


def _write_in_turn(folder: Path, users: int, turn) -> None:
    turn.wait()
    truth, rng = Truth(folder, users), np.random.default_rng(os.getpid())
    with LMDBStore(folder / "states", SCHEMA) as store:
        while True:
            chosen = truth.settled(rng.integers(users, size=1024), MAX_AGE)
            if len(chosen):
                truth.write(store.put_many, chosen)
            else:
                time.sleep(0.001)


# --- Engines that are full ---


def file_full(folder: Path, users: int) -> Fault:
    """LMDB's max_bytes: reads go on, and writes do after it was opened with more."""

    def more() -> StateStore:
        return LMDBStore(folder / "states", SCHEMA)

    return _full("lmdb", "max_bytes reached", folder, users, partial(LMDBStore, folder / "states", SCHEMA), more)


def disk_full(folder: Path, users: int) -> Fault:
    path = folder / "disk" / "states"
    with _small_disk(folder / "disk", 8192 * users * 3 // 4) as (what, enlarge):

        def more() -> StateStore:
            enlarge()
            return LMDBStore(path, SCHEMA)

        return _full("lmdb", f"disk full ({what})", folder, users, lambda max_bytes: LMDBStore(path, SCHEMA), more)


def memory_full(folder: Path, users: int) -> Fault:
    with RedisServer(maxmemory=4096 * users // 2 + (2 << 20), maxmemory_policy="noeviction") as server:

        def more() -> StateStore:
            with server.client() as client:
                client.config_set("maxmemory", 0)
            return RedisStore(server.url, SCHEMA)

        return _full(
            "redis", "maxmemory reached", folder, users, lambda max_bytes: RedisStore(server.url, SCHEMA), more
        )


def redis_disk_full(folder: Path, users: int) -> Fault:
    """A Redis that cannot write its log ends; once there is room it starts with all that it acknowledged."""
    disk = folder / "disk"
    with (
        _small_disk(disk, 4096 * users // 2) as (what, enlarge),
        RedisServer(dir=disk) as server,
        RedisStore(server.url, SCHEMA) as store,
    ):

        def start() -> None:
            enlarge()
            server.start()

        truth, batches = Truth(folder, users), _batches(users)
        truth.write(store.put_many, batches[0])
        with Traffic(_cache(store, users), truth, readers=[batches[0]] * 2) as load:
            load.wait("whole")
            refused = _write_until_refused(truth, store, batches[1:])
            server.process.wait(10)
            load.wait(UNAVAILABLE)
            written, back_s = int((truth.acknowledged > 0).sum()), _restart(start, load)
        truth.write(store.put_many, batches[-1])
        lost = truth.lost(store)
    load.counts.update(refused)
    fault = _outcome("redis", f"disk full ({what})", "default", load, lost, {UNAVAILABLE}, back_s)
    fault.outcome += f" after {written} users, as Redis ends"
    return fault


def _full(
    name: str,
    fault: str,
    folder: Path,
    users: int,
    small: Callable[..., StateStore],
    more: Callable[[], StateStore],
) -> Fault:
    """Write users until there is no room, under load of those who are there; then make room and write on."""
    truth = Truth(folder, users)
    with small(max_bytes=8192 * users // 2) as store:
        batches = _batches(users)
        truth.write(store.put_many, batches[0])
        with Traffic(_cache(store, users), truth, readers=[batches[0]] * 2) as load:
            load.wait("whole")
            refused = _write_until_refused(truth, store, batches[1:])
            load.wait("whole")
        lost = truth.lost(store)
    written = int((truth.acknowledged > 0).sum())
    began = time.perf_counter()
    with more() as store:
        truth.write(store.put_many, batches[-1])
        back_s = time.perf_counter() - began
        lost += truth.lost(store)
    load.counts.update(refused)
    found = _outcome(name, fault, "default", load, lost, {FULL}, back_s)
    found.outcome += f" after {written} users; back: a write once there was room"
    return found


def _batches(users: int) -> list[np.ndarray]:
    return [np.arange(start, min(start + 256, users)) for start in range(0, users, 256)]


def _write_until_refused(truth: Truth, store: StateStore, batches: Sequence[np.ndarray]) -> dict[str, int]:
    for batch in batches:
        try:
            truth.write(store.put_many, batch)
        except StoreError as error:
            return {type(error).__name__: 1}
    return {}


@contextlib.contextmanager
def _small_disk(path: Path, size: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """A tmpfs of some bytes; where this user may not mount one, a limit on the size of files."""
    path.mkdir()
    options = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run([*options, f"size={size}", "tmpfs", str(path)], capture_output=True).returncode == 0:
        try:
            yield (
                "ENOSPC of a tmpfs",
                lambda: subprocess.run([*options, f"remount,size={4 * size}", "tmpfs", str(path)], check=True),
            )
        finally:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield "EFBIG by RLIMIT_FSIZE", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- States that change or are not what they were ---


def corrupt_record(name: str, setting: str, folder: Path, users: int) -> Fault:
    """A byte of one user's record is flipped in the engine: its requests, and no others, are refused or miss it."""
    damaged = users // 2
    with contextlib.ExitStack() as stack:
        if name == "lmdb":
            store = stack.enter_context(LMDBStore(folder / "states", SCHEMA))
            flip = partial(_flip_in_lmdb, store, damaged)
        else:
            server = stack.enter_context(RedisServer())
            store = stack.enter_context(RedisStore(server.url, SCHEMA))
            flip = partial(_flip_in_redis, server, damaged)
        truth, cache = _filled(folder, users, store), _cache(store, users, on_invalid=setting)
        others = np.delete(np.arange(users), damaged)
        may_miss = np.array([damaged]) if setting == "missing" else None
        with (
            Traffic(cache, truth, store, readers=[others], writes=others) as healthy,
            Traffic(cache, truth, readers=[np.array([damaged])], may_miss=may_miss) as load,
        ):
            load.wait("whole")
            flip()
            load.wait("missing" if setting == "missing" else REFUSED)
            healthy.wait("whole")
            began = time.perf_counter()
            truth.write(store.put_many, np.array([damaged]))
            load.wait("whole", more=1)
            back_s = time.perf_counter() - began
        lost = truth.lost(store)
    fault = _outcome(name, "a byte of a record flipped", setting, load, lost, {REFUSED}, back_s)
    fault.answers += healthy.counts["answers"]
    fault.wrong_answers += healthy.counts["wrong"]
    if healthy.errors or healthy.counts["wrong"]:
        return _unexpected(fault, f"other users: {dict(healthy.counts)}")
    fault.outcome += "; other users served; back: after it was written again"
    return fault


def _flip_in_lmdb(store: LMDBStore, user: int) -> None:
    key = user.to_bytes(8, "big")
    with store._env.begin(store._databases[Kind.STATE], write=True) as txn:
        record = bytearray(txn.get(key))
        record[HEADER.itemsize + 5] ^= 16
        txn.put(key, bytes(record))


def _flip_in_redis(server: RedisServer, user: int) -> None:
    key, offset = b"recattn:{%d}" % user, HEADER.itemsize + 5
    with server.client() as client:
        client.setrange(key, offset, bytes([client.getrange(key, offset, offset)[0] ^ 16]))


def evicted_in_flight(folder: Path, users: int) -> Fault:
    """A cache that holds little more than the requests at a time: rows in use never change."""
    threads = 8
    with LMDBStore(folder / "states", SCHEMA) as store:
        truth = _filled(folder, users, store)
        cache = StateCache(store, 2 * threads * USERS, max_age=MAX_AGE)
        with Traffic(cache, truth, store, readers=[np.arange(users)] * threads) as load:
            load.wait("whole", more=100)
        lost, evictions = truth.lost(store), cache.stats()["evictions"]
    fault = _outcome("lmdb", "users evicted while requests read others", f"{threads} threads", load, lost, set())
    fault.outcome += f"; {evictions} evictions"
    return fault if evictions > 0 else _unexpected(fault, "nobody was evicted")


def deleted(name: str, folder: Path, users: int) -> Fault:
    """Users are deleted through the cache: no request that begins after `delete_many` returned finds them."""
    with contextlib.ExitStack() as stack:
        if name == "lmdb":
            store = stack.enter_context(LMDBStore(folder / "states", SCHEMA))
        else:
            store = stack.enter_context(RedisStore(stack.enter_context(RedisServer()).url, SCHEMA))
        truth, cache = _filled(folder, users, store), StateCache(store, users)
        gone, stays = np.arange(0, users, 2), np.arange(1, users, 2)
        deleted, seen = np.zeros(users, bool), dict.fromkeys(("answers", "found", "checked"), 0)
        over = threading.Event()

        def read() -> None:
            rng = np.random.default_rng(0)
            while not over.is_set():
                asked = rng.choice(gone, USERS)
                before = deleted[asked]
                with cache.request(torch.from_numpy(asked)) as request:
                    seen["found"] += int(request.found.numpy()[before].sum())
                seen["answers"] += 1
                seen["checked"] += int(before.sum())

        reader = threading.Thread(target=read)
        with Traffic(cache, truth, readers=[stays]) as load:
            reader.start()
            load.wait("whole", more=5)
            for chosen in np.array_split(np.random.default_rng(1).permutation(gone), 50):
                cache.delete_many(torch.from_numpy(chosen))
                deleted[chosen] = True
                load.wait("whole", more=1)
            _wait_until(lambda: seen["checked"] > 1000 or not reader.is_alive())
            over.set()
            reader.join()
        truth.acknowledged[gone] = 0
        lost = truth.lost(store) + int(store.info_many(torch.from_numpy(gone)).found.sum())
    fault = _outcome(name, f"{len(gone)} users deleted under load", "default", load, lost, set())
    fault.answers += seen["answers"]
    fault.wrong_answers += seen["found"]
    fault.outcome += f"; none found afterwards ({seen['checked']} look-ups of deleted users)"
    return fault if seen["found"] == 0 < seen["checked"] else _unexpected(fault, f"{seen['found']} found afterwards")


# --- What they share ---


def _filled(folder: Path, users: int, store: StateStore) -> Truth:
    truth = Truth(folder, users)
    truth.fill(store)
    return truth


def _cache(store: StateStore, users: int, **options: str) -> StateCache:
    return StateCache(store, max(users // 10, 8 * USERS), max_age=MAX_AGE, **options)


def _outcome(
    name: str, fault: str, setting: str, load: Traffic, lost: int, expected: set[str], back_s: float | None = None
) -> Fault:
    """What the load saw, and whether it is what the setting promises."""
    serves_missing = setting == "missing"
    missing, wrong = load.counts["missing"], load.counts["wrong"]
    seen = "served as missing" if serves_missing else " and ".join(load.errors) or "no error"
    found = Fault(
        fault_of=name,
        fault=fault,
        setting=setting,
        outcome=seen,
        answers=load.counts["answers"],
        wrong_answers=wrong,
        missing=missing,
        lost_writes=lost,
        errors=load.errors,
        back_s=back_s,
    )
    needed = set() if serves_missing else expected
    if wrong or lost or not needed <= load.errors.keys() <= expected or (serves_missing and not missing):
        return _unexpected(found, f"errors {load.errors}, expected {expected}")
    return found


def _unexpected(fault: Fault, why: str) -> Fault:
    fault.outcome, fault.as_expected = f"not as documented: {why}", False
    return fault


def _wait_until(holds: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s")
        time.sleep(0.0005)

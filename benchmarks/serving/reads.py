"""Timed reads of many users: `get_many`, and the store's own floor."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import redis
import torch

from recattn.serving import StateStore
from recattn.serving.stores.records import Kind

Prepare = Callable[[np.ndarray], Callable[[], object]]  # of user ids: a read of them


def time_reads(
    store: StateStore, read_floor: Prepare, users: np.ndarray, reads: list[float], floors: list[float]
) -> None:
    """get_many and the floor, of users of their own each, by turns in either order."""
    kinds = [(reads, _get_many(store), users[0]), (floors, read_floor, users[1])]
    for times, prepare, own in kinds[:: 1 if len(reads) % 2 else -1]:
        read = prepare(own)
        began = time.perf_counter()
        read()
        times.append(time.perf_counter() - began)


def _get_many(store: StateStore) -> Prepare:
    return lambda users: partial(store.get_many, torch.from_numpy(users))


@contextlib.contextmanager
def floor(name: str, address: str, store: StateStore) -> Iterator[Prepare]:
    """The least that the engine takes for some users: their keys are ready, and values are joined unseen."""
    if name == "lmdb":
        # A process may open a folder only once.
        read = partial(_lmdb_get, store._env, store._databases[Kind.STATE])
        yield _floor(read, lambda user: user.to_bytes(8, "big"))
        return
    connect = redis.RedisCluster if name == "cluster" else redis.Redis
    with connect.from_url(address, socket_timeout=5.0) as engine:
        yield _cluster_floor(engine) if name == "cluster" else _floor(partial(_redis_get, engine), _redis_key)


def _floor(read: Callable[[list[bytes]], bytearray], key_of: Callable[[int], bytes]) -> Prepare:
    return lambda users: partial(read, [key_of(user) for user in users.tolist()])


def _lmdb_get(environment, database, keys: list[bytes]) -> bytearray:
    with environment.begin(database, buffers=True) as txn:
        return bytearray().join([txn.get(key) for key in keys])


def _redis_get(engine, keys: list[bytes]) -> bytearray:
    return bytearray().join(engine.mget(keys))


def _redis_key(user: int) -> bytes:
    return b"recattn:{%d}" % user


def _cluster_floor(engine: redis.RedisCluster) -> Prepare:
    """A connection to each node: to all of them at once, without redis-py's pipeline of a cluster, which is slower."""
    connections = {node.name: node.redis_connection.connection_pool.get_connection() for node in engine.get_nodes()}

    def prepare(users: np.ndarray) -> Callable[[], bytearray]:
        gets = {name: [] for name in connections}
        for key in map(_redis_key, users.tolist()):
            gets[engine.get_node_from_key(key).name].append(("GET", key))
        return partial(_cluster_get, [(connections[name], commands) for name, commands in gets.items()])

    return prepare


def _cluster_get(gets: list[tuple]) -> bytearray:
    for connection, commands in gets:
        connection.send_packed_command(connection.pack_commands(commands))
    return bytearray().join([connection.read_response() for connection, commands in gets for _ in commands])

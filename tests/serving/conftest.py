"""Engines for the tests of the stores: real servers, started once."""

import time
from types import SimpleNamespace

import pytest

from tests.helpers.stores import ENGINES, Engine


@pytest.fixture(scope="session")
def servers():
    """benchmarks.serving.servers, where redis-py and redis-server are installed."""
    pytest.importorskip("redis")
    from benchmarks.serving import servers

    if servers.REASON:
        pytest.skip(servers.REASON)
    return servers


@pytest.fixture(scope="session")
def redis_server(servers):
    """A server for tests that leave it running: each has a namespace of its own."""
    with servers.RedisServer() as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(servers):
    """A cluster of three nodes for tests that leave it whole: each has a namespace of its own."""
    with servers.RedisCluster(nodes=3) as cluster:
        yield cluster


def make_engine(name, request, folder):
    if name == "memory":
        return Engine(name)
    if name == "lmdb":
        pytest.importorskip("lmdb")
        return Engine(name, folder / "states")
    return Engine(name, request.getfixturevalue(f"redis_{name}" if name == "cluster" else "redis_server").url)


@pytest.fixture(params=ENGINES)
def engine(request, tmp_path):
    """Each engine in turn: a folder or namespace of the test's own."""
    engine = make_engine(request.param, request, tmp_path)
    yield engine
    engine.close()


@pytest.fixture(params=["lmdb", "redis"])
def record_engine(request, tmp_path):
    """Those that hold records, whose bytes a test may change."""
    engine = make_engine(request.param, request, tmp_path)
    yield engine
    engine.close()


@pytest.fixture
def clock(monkeypatch):
    """The time that stores read, to be moved: `clock.now += 10`."""
    clock = SimpleNamespace(now=time.time())
    clock.time = lambda: clock.now
    monkeypatch.setattr("recattn.serving.stores.store.time", clock)
    return clock

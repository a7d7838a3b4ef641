"""Engines for the tests of the stores: real servers, started once."""

import pytest


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

"""benchmarks/serving/servers.py: what the tests of the stores stand on."""

import pytest


def test_a_killed_server_has_all_that_it_answered_when_it_is_started_again(servers):
    with servers.RedisServer() as server:
        folder, process = server.folder, server.process
        with server.client() as client:
            client.set("user", b"state")
        server.kill()
        assert process.returncode == -9
        server.start()
        with server.client() as client:
            assert client.get("user") == b"state"
    assert not folder.exists()
    assert server.process.returncode == -9


def test_a_server_that_cannot_start_says_why(servers):
    with pytest.raises(RuntimeError, match=r"(?s)redis-server ended: .*maxmemory.*plenty"):
        servers.RedisServer(maxmemory="plenty")


def test_a_cluster_has_all_slots_on_its_nodes(redis_cluster):
    assert len(redis_cluster.nodes) == 3
    owners = set()
    for node in redis_cluster.nodes:
        with node.client() as client:
            owners.add(client.execute_command("CLUSTER MYID"))
            slots = client.execute_command("CLUSTER SLOTS")
        assert sum(last - first + 1 for first, last, *_ in slots) == 16384
    assert len(owners) == 3

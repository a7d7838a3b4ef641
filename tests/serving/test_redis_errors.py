"""What Redis refuses is told apart: not available for now, without room, or wrong."""

import shutil

import pytest
import torch

from recattn.nn.lrea import LREAState
from recattn.serving import StateSchema, StoreError, StoreFullError, StoreUnavailableError

SCHEMA = StateSchema(heads=1, rank=4, dim=8, value_dim=8, dtype=torch.float32, model="m")
USERS = torch.arange(3)


def without_replicas(client, _):
    client.config_set("min-replicas-to-write", 1)


def replica(client, _):
    client.execute_command("REPLICAOF 127.0.0.1 1")


def without_memory(client, _):
    client.config_set("maxmemory", 1)


def without_a_disk(client, servers):
    client.config_set("save", "900 1")
    shutil.rmtree(client.config_get("dir")["dir"])
    client.bgsave()
    servers.wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err", "a failed BGSAVE")


def without_permission(client, _):
    client.acl_setuser("default", commands=["-SET"])


@pytest.fixture
def server(servers):
    with servers.RedisServer(appendonly="no") as server:
        yield server


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without_replicas, StoreUnavailableError, "Redis is not available: NOREPLICAS Not enough good replicas"),
        (replica, StoreUnavailableError, "Redis is not available: You can't write against a read only replica"),
        (without_memory, StoreFullError, "Redis has no room: command not allowed when used memory > 'maxmemory'"),
        (without_a_disk, StoreFullError, "Redis has no room: MISCONF Redis is configured to save RDB snapshots"),
        (without_permission, StoreError, "Redis refused a command: .*no permissions"),
    ],
)
def test_put_says_what_redis_lacks(change, error, message, servers, server):
    from recattn.serving import RedisStore

    state = LREAState(torch.ones(3, 1, 4, 8), torch.ones(3, 1, 4, 8), None, None)
    with RedisStore(server.url, SCHEMA) as store, server.client() as client:
        assert store.put_many(USERS, state).all()
        change(client, servers)
        with pytest.raises(error, match=f"^{message}") as raised:
            store.put_many(USERS, state)
        assert type(raised.value) is error and "GETRANGE" not in str(raised.value)
        assert store.get_many(USERS).found.all()

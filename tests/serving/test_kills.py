"""kill -9 of a writer, or of Redis, at any moment: what was acknowledged is there, and nothing is half-written."""

import random
import time

import pytest
import torch

from recattn.serving import StoreUnavailableError
from tests.helpers.processes import Writer
from tests.helpers.stores import E, make_schema, stamped_state, stamps_of

USERS = torch.arange(40)
SCHEMA = make_schema(rank=16, embed_dim=E)
SECONDS = 0.06  # several batches


def put_versions(acknowledge, store):
    """Write all users, again and again, each time with the next version in every entry and as newest event."""
    version = int(store.info_many(USERS).event_ids.max())
    acknowledge(version)
    while True:
        version += 1
        state = stamped_state([version] * len(USERS), SCHEMA)
        try:
            written = store.put_many(USERS, state, event_ids=torch.full_like(USERS, version), ttl=1000)
        except StoreUnavailableError:
            return
        assert written.all()
        acknowledge(version)


def versions_of(store):
    """The version of each user. Fails if a state, history or header is of another, damaged or missing."""
    stored = store.get_many(USERS, histories=True)
    assert stored.found.all()
    stamps = stamps_of(stored)
    assert stored.info.event_ids.tolist() == stamps
    return stamps


@pytest.mark.parametrize("engine", ["lmdb", "redis"], indirect=True)
def test_a_writer_killed_at_twenty_random_moments_loses_nothing_acknowledged(engine):
    store = engine.open(SCHEMA)
    store.put_many(USERS, stamped_state([0] * len(USERS), SCHEMA), event_ids=torch.zeros_like(USERS))
    moments = random.Random(0)
    for _ in range(20):
        with Writer(put_versions, store) as writer:
            writer.wait()  # it has begun
            writer.kill_after(moments.uniform(0, SECONDS))  # of the first batch that it acknowledged
        last = writer.acknowledged[-1]
        versions = versions_of(store)
        assert set(versions) <= {last, last + 1}
        if engine.name == "lmdb":
            assert len(set(versions)) == 1  # a batch is a transaction
    assert len(engine.records()) == (3 if engine.name == "lmdb" else 2) * len(USERS)


def test_redis_killed_while_it_is_written_to_loses_nothing_acknowledged(servers):
    from recattn.serving import RedisStore

    moments = random.Random(1)
    with servers.RedisServer() as server, RedisStore(server.url, SCHEMA, socket_timeout=30) as store:
        store.put_many(USERS, stamped_state([0] * len(USERS), SCHEMA), event_ids=torch.zeros_like(USERS))
        for _ in range(5):
            with Writer(put_versions, store) as writer:
                writer.wait()
                time.sleep(moments.uniform(0, SECONDS))
                server.kill()
                writer.join()
            server.start()
            last = writer.acknowledged[-1]
            assert set(versions_of(store)) <= {last, last + 1}

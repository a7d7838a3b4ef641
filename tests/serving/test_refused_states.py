"""A record of another schema, of another user or damaged is refused by name, and never computed with."""

import numpy as np
import pytest
import torch

from recattn.serving import StateRefusedError
from tests.helpers.state_tables import ids
from tests.helpers.stores import E, make_schema, random_state, stamped_state, stamps_of

USERS = ids(7, 8)


def assert_refused(store, reason, histories=False):
    """User 8 is refused with the reason or missing, and user 7 is served."""
    with pytest.raises(StateRefusedError, match=f"the state of user 8 {reason}.*refused: 1") as raised:
        store.get_many(USERS, histories=histories)
    assert str(store.schema) in str(raised.value) and "on_invalid" in str(raised.value)
    stored = store.get_many(USERS, histories=histories, on_invalid="missing")
    assert stored.found.tolist() == [True, False]
    assert stamps_of(stored) == [1, 0]
    assert stored.info.versions[1] == 0 and stored.info.event_ids[1] == -1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "another"}, "has model 'another', not 'a model'"),
        ({"dtype": torch.bfloat16}, "has dtype torch.bfloat16, not torch.float32"),
        ({"rank": 5}, "has rank 5, not 4"),
        ({"embed_dim": 0}, "has embed_dim 0, not 6"),
    ],
)
def test_a_state_of_another_schema_is_refused(record_engine, change, reason):
    ours = {"embed_dim": E}
    other = record_engine.open(make_schema(**(ours | change)))
    other.put_many(ids(8), random_state(1, other.schema))
    store = record_engine.open(make_schema(**ours))
    store.put_many(ids(7), stamped_state([1], store.schema))
    assert store.info_many(USERS).found.tolist() == [True, False]
    assert_refused(store, reason)
    store.put_many(ids(8), stamped_state([2], store.schema))  # as a new build does
    assert stamps_of(store.get_many(USERS, histories=True)) == [1, 2]


def damaged(record, at):
    record = bytearray(record)
    record[at] ^= 1
    return bytes(record)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: b"", "is not a record of recattn"),
        (lambda record: b"another's value", "is not a record of recattn"),
        (lambda record: bytes(len(record)), "is not a record of recattn"),
        (lambda record: record[:-1], "is damaged: its checksum does not match"),
        (lambda record: record[:64], "is damaged: its checksum does not match"),
        (lambda record: record + b"\0", "is damaged: its checksum does not match"),
        (lambda record: damaged(record, 0), "is damaged: its checksum does not match"),
        (lambda record: damaged(record, 60), "is damaged: its checksum does not match"),
        (lambda record: damaged(record, 64), "is damaged: its checksum does not match"),
        (lambda record: damaged(record, -1), "is damaged: its checksum does not match"),
        (lambda record: damaged(record, 10), "has version 0, not 1"),
    ],
)
def test_a_record_that_is_not_whole_is_refused(record_engine, change, reason):
    store = record_engine.open(make_schema(rank=3))  # the last byte is padding
    store.put_many(USERS, stamped_state([1, 2], store.schema), ttl=1000)
    record_engine.write_record(8, change(record_engine.record(8)))
    assert_refused(store, reason)
    assert store.delete_many(USERS) == 2
    assert not any(key for key in record_engine.records() if "expiries" not in key)


def test_every_byte_of_a_record_is_covered(record_engine):
    store = record_engine.open(make_schema(torch.int8, rank=1))
    store.put_many(ids(8), random_state(1, store.schema))
    record = record_engine.record(8)
    for at in np.random.default_rng(0).permutation(len(record))[:60]:
        record_engine.write_record(8, damaged(record, at))
        with pytest.raises(StateRefusedError):
            store.get_many(ids(8))
    record_engine.write_record(8, record)
    assert store.get_many(ids(8)).found.all()


def test_a_record_of_another_user_is_refused(record_engine):
    store = record_engine.open(make_schema())
    store.put_many(USERS, stamped_state([1, 2], store.schema))
    record_engine.write_record(8, record_engine.record(7))
    assert_refused(store, "is that of user 7")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda history, state: damaged(history, 70), "has a history that is damaged"),
        (lambda history, state: history[:-4], "has a history that is damaged"),
        (lambda history, state: state, "has a history that has kind 0, not 1"),
    ],
)
def test_a_history_that_is_not_whole_is_refused(record_engine, change, reason):
    store = record_engine.open(make_schema(embed_dim=E))
    store.put_many(USERS, stamped_state([1, 2], store.schema))
    history = record_engine.record(8, history=True)
    record_engine.write_record(8, change(history, record_engine.record(8)), history=True)
    assert_refused(store, reason, histories=True)
    assert stamps_of(store.get_many(USERS)) == [1, 2]  # the state itself is whole

"""append_events: the states of a store, with each event in them once, whoever sends it again or at the same time."""

import threading

import pytest
import torch

import recattn
from recattn.serving import MemoryStore, StateSchema, StoreError, append_events
from tests.helpers.state_tables import ids

DIM, LONGEST = 8, 12


@pytest.fixture(params=["memory", "lmdb"])
def store(request, lrea, tmp_path):
    schema = StateSchema.of(lrea, torch.float32, appendable=True)
    if request.param == "memory":
        return MemoryStore(schema)
    return pytest.importorskip("recattn.serving.stores.lmdb").LMDBStore(tmp_path, schema)


@pytest.fixture
def lrea():
    torch.manual_seed(0)
    return recattn.nn.LREA(DIM, LONGEST, 4, num_heads=2)


def build(store, lrea, histories: dict[int, torch.Tensor], **options):
    padded = torch.nn.utils.rnn.pad_sequence(list(histories.values()), batch_first=True)
    state = lrea.export_state(padded, torch.tensor([len(history) for history in histories.values()]))
    store.put_many(ids(*histories), state, **options)


def assert_histories(store, lrea, histories: dict[int, torch.Tensor]):
    """The stored states are those of the histories, up to the rounding of `LREA.append`."""
    stored = store.get_many(ids(*histories), histories=True)
    padded = torch.nn.utils.rnn.pad_sequence(list(histories.values()), batch_first=True)
    lengths = torch.tensor([len(history) for history in histories.values()])
    assert stored.state.lengths.tolist() == lengths.tolist()
    for actual, expected in zip(stored.state, lrea.export_state(padded, lengths), strict=True):
        if expected is not None:
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_each_event_is_in_the_state_once(store, lrea):
    histories = {user: torch.randn(length, DIM) for user, length in ((3, 4), (7, 1), (9, 11))}
    build(store, lrea, histories, event_ids=torch.tensor([10, 10, 10]), ttl=1000, build="first")
    before = store.info_many(ids(3, 7, 9))
    # 5 has no state, 10 and 8 are not newer, 30 comes twice, 9 has room for one.
    users = ids(7, 3, 5, 3, 3, 7, 9, 7, 9, 7)
    events = torch.tensor([30, 12, 20, 10, 11, 8, 12, 30, 11, 20])
    behaviors = torch.randn(10, DIM)
    outcome = append_events(store, lrea, users, events, behaviors)
    assert outcome.applied.nonzero().flatten().tolist() in ([0, 1, 4, 8, 9], [1, 4, 7, 8, 9])
    assert outcome.not_found.nonzero().flatten().tolist() == [2]
    assert outcome.full.nonzero().flatten().tolist() == [6]
    assert (torch.stack(outcome).sum(0) == 1).all()
    first = 0 if outcome.applied[0] else 7
    histories[3] = torch.cat([histories[3], behaviors[[4, 1]]])
    histories[7] = torch.cat([histories[7], behaviors[[9, first]]])
    histories[9] = torch.cat([histories[9], behaviors[[8]]])
    assert_histories(store, lrea, histories)
    after = store.info_many(ids(3, 7, 9))
    assert after.event_ids.tolist() == [12, 30, 11]
    assert torch.equal(after.expires, before.expires) and torch.equal(after.builds, before.builds)
    again = append_events(store, lrea, users, events, behaviors)
    assert not again.applied.any()
    assert_histories(store, lrea, histories)


def test_no_event_of_writers_at_the_same_time_is_lost(store, lrea):
    """Two writers send the same batches, in other orders of users: every event is applied by one of them."""
    histories = {user: torch.randn(2, DIM) for user in range(4)}
    build(store, lrea, histories)
    behaviors = torch.randn(6, 4, DIM)
    applied, errors = [torch.zeros(6, 4, dtype=torch.bool) for _ in range(2)], []

    def send(writer: int):
        try:
            for event in range(6):
                order = torch.arange(4).roll(writer)
                outcome = append_events(
                    store, lrea, order, torch.full((4,), event), behaviors[event][order], attempts=1000
                )
                applied[writer][event][order] = outcome.applied
        except Exception as error:  # fails the test in its thread
            errors.append(error)

    threads = [threading.Thread(target=send, args=(writer,)) for writer in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == [] and (applied[0] ^ applied[1]).all()
    assert_histories(store, lrea, {user: torch.cat([histories[user], behaviors[:, user]]) for user in range(4)})


def test_gives_up_when_others_always_write_first(lrea):
    class Contested(MemoryStore):
        def put_many(self, user_ids, state, *, replaces=None, **options):
            if replaces is not None:
                super().put_many(user_ids, state)
            return super().put_many(user_ids, state, replaces=replaces, **options)

    store = Contested(StateSchema.of(lrea, torch.float32, appendable=True))
    build(store, lrea, {1: torch.randn(2, DIM)})
    with pytest.raises(StoreError, match="other writers changed the same states 3 times"):
        append_events(store, lrea, ids(1), torch.tensor([5]), torch.randn(1, DIM), attempts=3)


def test_arguments(lrea):
    store = MemoryStore(StateSchema.of(lrea, torch.float32, appendable=True))
    build(store, lrea, {1: torch.randn(2, DIM)})
    events, behaviors = torch.tensor([5]), torch.randn(1, DIM)
    empty = append_events(store, lrea, ids(), torch.empty(0, dtype=torch.int64), torch.empty(0, DIM))
    assert empty.applied.shape == (0,)
    served_only = MemoryStore(StateSchema.of(lrea, torch.float32))
    for arguments, message in (
        ((served_only, lrea, ids(1), events, behaviors), "store must be of a schema with embed_dim"),
        ((store, lrea, ids(1), events[:0], behaviors), r"event_ids must be \[E\] = \[1\], got \[0\]"),
        ((store, lrea, ids(1), events, behaviors[:, 1:]), "behaviors must be"),
        ((store, lrea, ids(1), -events, behaviors), "event_ids must be"),
        ((store, lrea, ids(1), events, behaviors * torch.nan), "of user 1 must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            append_events(*arguments)
    assert store.info_many(ids(1)).event_ids.tolist() == [-1]

"""Every engine keeps states as StateStore says, bit for bit."""

import threading
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from recattn import lrea_absorbed_attention
from recattn.functional import lrea_quantize
from recattn.serving import StateSchema
from tests.helpers.lrea_module import LENGTHS, LMAX, module
from tests.helpers.lrea_module import E as BEHAVIOR_DIM
from tests.helpers.state_tables import INVALID, ids
from tests.helpers.stores import (
    DTYPES,
    D,
    E,
    H,
    R,
    assert_same_bits,
    make_schema,
    named,
    random_state,
    rows_of,
    stamped_state,
    stamps_of,
)


def as_stored(state, dtype):
    if dtype == torch.int8:
        (keys, key_scales), (values, value_scales) = lrea_quantize(state.keys), lrea_quantize(state.values)
        return state._replace(keys=keys, values=values, key_scales=key_scales, value_scales=value_scales)
    return state._replace(keys=state.keys.to(dtype), values=state.values.to(dtype))


# What is put is what is read


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_read_with_the_bits_that_were_put(engine, dtype):
    schema = make_schema(dtype, embed_dim=E)
    store = engine.open(schema)
    state = random_state(5, schema)
    users = ids(3, -7, 2**62, 0, -(2**63))
    assert store.put_many(users, state).tolist() == [True] * 5
    stored = store.get_many(users, histories=True)
    assert stored.found.all()
    assert_same_bits(stored.state, as_stored(state, dtype))
    assert_same_bits(store.get_many(users).state, as_stored(state, dtype)._replace(compressed=None, lengths=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_state_in_the_stores_dtype_is_put_as_it_is(engine, dtype):
    store = engine.open(make_schema(dtype))
    state = as_stored(random_state(3, store.schema), dtype)
    store.put_many(ids(1, 2, 3), state)
    assert_same_bits(store.get_many(ids(1, 2, 3)).state, state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_from_a_store_are_those_of_a_table_and_of_the_state_itself(engine, dtype):
    schema = make_schema(dtype)
    state, users, offsets = random_state(3, schema), ids(11, 5, 8), torch.tensor([0, 40, 41, 90])
    targets = torch.randn(90, H, D)

    def scores(keys, values, key_scales=None, value_scales=None):
        scales = {"key_scales": key_scales, "value_scales": value_scales}
        return lrea_absorbed_attention(targets, keys, values, torch.arange(3), offsets, **scales)

    store, table = engine.open(schema), schema.make_table(8)
    store.put_many(users, state)
    table.put(users, state)
    direct = scores(**named(as_stored(state, dtype)))
    assert torch.equal(scores(**named(store.get_many(users).state)), direct)
    assert torch.equal(table.attend(targets, users, offsets), direct)


def test_users_who_are_missing_twice_negative_or_nobody(engine):
    store = engine.open(make_schema(embed_dim=E))
    state = random_state(2, store.schema)
    store.put_many(torch.tensor([-1, 4], dtype=torch.int32), state, event_ids=ids(50, 60))
    stored = store.get_many(torch.tensor([4, 9, -1, 4, 0], dtype=torch.int32), histories=True)
    assert stored.found.tolist() == [True, False, True, True, False]
    assert stored.info.event_ids.tolist() == [60, -1, 50, 60, -1]
    assert stored.info.versions[[1, 4]].tolist() == [0, 0]
    assert_same_bits(rows_of(stored.state, [2, 0]), state)
    for tensor in named(rows_of(stored.state, [1, 4])).values():
        assert not tensor.any()
    nobody = ids()
    assert store.get_many(nobody, histories=True).state.keys.shape == (0, H, R, D)
    assert store.put_many(nobody, random_state(0, store.schema)).tolist() == []
    assert store.delete_many(nobody) == 0
    assert store.info_many(nobody).found.tolist() == []


def test_of_a_user_put_twice_the_last_state_counts(engine):
    store = engine.open(make_schema(embed_dim=E))
    assert store.put_many(ids(5, 6, 5), stamped_state([1, 2, 3], store.schema)).all()
    assert stamps_of(store.get_many(ids(5, 6), histories=True)) == [3, 2]
    store.put_many(ids(5), stamped_state([4], store.schema))
    assert stamps_of(store.get_many(ids(5, 6), histories=True)) == [4, 2]


def test_append_goes_on_from_a_stored_history(engine):
    lrea = module(dtype=torch.float32)
    store = engine.open(StateSchema.of(lrea, appendable=True))
    behaviors, newest = torch.randn(4, LMAX, BEHAVIOR_DIM), torch.randn(4, BEHAVIOR_DIM)
    state = lrea.export_state(behaviors, LENGTHS.clamp(max=LMAX - 1))
    store.put_many(ids(0, 1, 2, 3), state)
    stored = store.get_many(ids(0, 1, 2, 3), histories=True)
    appended = lrea.append(stored.state, newest)
    assert_same_bits(appended, lrea.append(state, newest))
    store.put_many(ids(0, 1, 2, 3), appended, replaces=stored.info)
    assert_same_bits(store.get_many(ids(0, 1, 2, 3), histories=True).state, appended)


# Marks, and writes that compare


def test_a_state_has_its_newest_event_expiry_and_build(engine, clock):
    clock.now = 2_000_000_000.5
    store = engine.open(make_schema())
    store.put_many(ids(1, 2), random_state(2, store.schema), event_ids=ids(7, 0), ttl=10, build="monday")
    store.put_many(ids(3), random_state(1, store.schema))
    info = store.info_many(ids(1, 2, 3, 4))
    assert info.found.tolist() == [True, True, True, False]
    assert info.event_ids.tolist() == [7, 0, -1, -1]
    assert info.expires.tolist() == [2_000_000_011, 2_000_000_011, 0, 0]
    assert info.builds[0] == info.builds[1] > 0 and info.builds[2:].tolist() == [0, 0]
    for read, expected in zip(store.get_many(ids(1, 2, 3, 4)).info, info, strict=True):
        assert torch.equal(read, expected)


@pytest.mark.parametrize("embed_dim", [0, E])
def test_replaces_writes_where_the_state_is_still_the_one_that_was_read(engine, embed_dim):
    store = engine.open(make_schema(embed_dim=embed_dim))
    users = ids(1, 2, 3)
    store.put_many(users[:2], stamped_state([1, 1], store.schema), event_ids=ids(5, 5), build="b", ttl=1000)
    read = store.info_many(users)
    store.put_many(users[:1], stamped_state([2], store.schema), event_ids=ids(5))  # by another process
    written = store.put_many(users, stamped_state([3, 3, 3], store.schema), event_ids=ids(6, 6, 6), replaces=read)
    assert written.tolist() == [False, True, True]
    assert stamps_of(store.get_many(users, histories=embed_dim > 0)) == [2, 3, 3]
    info = store.info_many(users)
    assert info.event_ids.tolist() == [5, 6, 6]
    assert info.expires.tolist() == [0, read.expires[1], 0] and info.builds.tolist() == [0, read.builds[1], 0]
    assert not store.put_many(users, stamped_state([4, 4, 4], store.schema), replaces=read).any()


def test_two_threads_that_compare_and_set_lose_no_update(engine):
    store = engine.open(make_schema())
    store.put_many(ids(1), stamped_state([0], store.schema), event_ids=ids(0))
    conflicts = []

    def add(count):
        for _ in range(count):
            while True:
                stored = store.get_many(ids(1))
                new = stamped_state([stamps_of(stored)[0] + 1], store.schema)
                event = stored.info.event_ids + 1
                if store.put_many(ids(1), new, event_ids=event, replaces=stored.info).all():
                    break
                conflicts.append(1)

    threads = [threading.Thread(target=add, args=(25,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stamps_of(store.get_many(ids(1))) == [50]
    assert store.info_many(ids(1)).event_ids.tolist() == [50]


# Expiry and deletion


def test_a_state_is_there_until_it_expires(engine, clock):
    store = engine.open(make_schema())
    store.put_many(ids(1), stamped_state([1], store.schema), ttl=100)
    store.put_many(ids(2), stamped_state([2], store.schema))
    expires = store.info_many(ids(1)).expires.item()
    assert clock.now + 100 <= expires < clock.now + 101
    clock.now = expires - 0.001
    assert stamps_of(store.get_many(ids(1, 2))) == [1, 2]
    clock.now = expires
    assert store.get_many(ids(1, 2)).found.tolist() == [False, True]
    assert stamps_of(store.get_many(ids(1, 2))) == [0, 2]
    gone = store.info_many(ids(1))
    assert not gone.found.any() and gone.versions.tolist() == [0]


@pytest.mark.parametrize("engine", ["memory", "lmdb"], indirect=True)
def test_delete_expired_deletes_what_has_expired_and_nothing_else(engine, clock):
    store = engine.open(make_schema(embed_dim=E))
    store.put_many(ids(1, 2, -3, 4), stamped_state([1, 2, 3, 4], store.schema), ttl=100)
    store.put_many(ids(2), stamped_state([5], store.schema))  # now without an expiry
    store.put_many(ids(4), stamped_state([6], store.schema), ttl=200)
    assert store.delete_expired() == 0
    clock.now += 102
    assert store.put_many(ids(1), stamped_state([7], store.schema), replaces=store.info_many(ids(1))).all()
    assert store.delete_expired() == 1
    assert stamps_of(store.get_many(ids(1, 2, -3, 4), histories=True)) == [7, 5, 0, 6]
    clock.now += 100
    assert store.delete_expired() == 1
    assert stamps_of(store.get_many(ids(1, 2, -3, 4), histories=True)) == [7, 5, 0, 0]
    if engine.name == "lmdb":
        assert len(engine.records()) == 4  # two states, two histories


@pytest.mark.parametrize("engine", ["redis", "cluster"], indirect=True)
@pytest.mark.parametrize("embed_dim", [0, E])
def test_redis_lets_go_of_what_has_expired(engine, embed_dim):
    store = engine.open(make_schema(embed_dim=embed_dim))
    store.put_many(ids(1, 2), random_state(2, store.schema), ttl=0.01)  # at the next full second
    end = time.monotonic() + 10
    while engine.records() and time.monotonic() < end:
        time.sleep(0.02)
    assert engine.records() == {}
    assert not store.get_many(ids(1, 2)).found.any()


@pytest.mark.parametrize("engine", ["lmdb", "redis", "cluster"], indirect=True)
def test_nothing_of_a_deleted_user_is_left_in_the_engine(engine):
    store = engine.open(make_schema(embed_dim=E))
    store.put_many(ids(1, 2), random_state(2, store.schema), ttl=100)
    kept = engine.records()
    store.put_many(ids(3, -4), random_state(2, store.schema), ttl=100)
    store.put_many(ids(3), random_state(1, store.schema), ttl=200)
    assert len(engine.records()) > len(kept)
    assert store.delete_many(ids(3, -4, 3, 9)) == 2
    assert engine.records() == kept
    assert store.delete_many(ids(1, 2)) == 2
    assert engine.records() == {}


def test_a_deleted_user_is_not_found(engine):
    store = engine.open(make_schema(embed_dim=E))
    store.put_many(ids(1, 2), stamped_state([1, 2], store.schema))
    assert store.delete_many(torch.tensor([2, 3], dtype=torch.int32)) == 1
    assert stamps_of(store.get_many(ids(1, 2), histories=True)) == [1, 0]
    assert store.put_many(ids(2), stamped_state([3], store.schema), replaces=store.info_many(ids(2))).all()
    assert stamps_of(store.get_many(ids(1, 2), histories=True)) == [1, 3]


# States that are not valid, arguments that do not fit


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_that_the_dtype_cannot_hold_is_refused_or_deletes_its_user(engine, dtype):
    store = engine.open(make_schema(dtype))
    store.put_many(ids(1, 2, 3), stamped_state([1, 2, 3], store.schema))
    old = store.get_many(ids(1, 2, 3))
    for worst in INVALID[dtype]:
        state = stamped_state([4, 5], store.schema)
        keys = state.keys.double().clone()
        keys[1, 0, 1, 2] = worst
        state = state._replace(keys=keys)
        with pytest.raises(ValueError, match="keys of user 2 must be finite"):
            store.put_many(ids(1, 2), state)
        assert torch.equal(store.info_many(ids(1, 2, 3)).versions, old.info.versions)
    with pytest.raises(ValueError, match="event_ids"):
        store.put_many(ids(1, 2), state, on_invalid="missing", event_ids=ids(-1, 2))
    assert torch.equal(store.info_many(ids(1, 2, 3)).versions, old.info.versions)
    assert store.put_many(ids(1, 2), state, on_invalid="missing").tolist() == [True, False]
    assert store.get_many(ids(1, 2, 3)).found.tolist() == [True, False, True]


def test_a_user_whose_last_state_is_invalid_is_missing(engine):
    store = engine.open(make_schema())
    state = stamped_state([1, 2, 3, 4], store.schema)
    state = state._replace(values=state.values.clone())
    state.values[1:3] = torch.nan
    written = store.put_many(ids(1, 1, 2, 2), state, on_invalid="missing")
    assert written.tolist() == [False, False, False, True]
    assert stamps_of(store.get_many(ids(1, 2))) == [0, 4]


def test_arguments_that_do_not_fit_are_named(engine):
    schema = make_schema()
    store = engine.open(schema)
    state = random_state(2, schema)
    for call, message in [
        (lambda: store.put_many(ids(1), state), r"keys must be \[U, H, r, d\] = \[1, 2, 4, 8\], got \[2, 2, 4, 8\]"),
        (lambda: store.put_many(ids(1, 2), state.keys), "state must be an LREAState, got Tensor"),
        (lambda: store.put_many([1, 2], state), "user_ids must be a torch.Tensor, got list"),
        (lambda: store.put_many(torch.tensor([1.0, 2.0]), state), "user_ids must be int64 or int32, got float32"),
        (lambda: store.put_many(ids(1, 2), state, event_ids=ids(1)), r"event_ids must be \[U\] = \[2\], got \[1\]"),
        (lambda: store.put_many(ids(1, 2), state, event_ids=ids(-2, 1)), "event_ids must be at least 0, got -2"),
        (lambda: store.put_many(ids(1, 2), state, ttl=0), "ttl must be a positive number of seconds, got 0"),
        (lambda: store.put_many(ids(1, 2), state, ttl=float("nan")), "ttl must be a positive number"),
        (lambda: store.put_many(ids(1, 2), state, replaces=ids(1, 2)), "replaces must be a StateInfo, got Tensor"),
        (lambda: store.put_many(ids(1, 2), state, replaces=store.info_many(ids(1))), "replaces.versions must be"),
        (lambda: store.put_many(ids(1, 2), state, on_invalid="skip"), "on_invalid must be 'raise' or 'missing'"),
        (lambda: store.get_many(ids(1), histories=True), "histories must be False: the schema has no embed_dim"),
        (lambda: store.get_many(ids(1), on_invalid="skip"), "on_invalid must be 'raise' or 'missing'"),
        (lambda: store.delete_many(1), "user_ids must be a torch.Tensor, got int"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert not store.info_many(ids(1, 2)).found.any()


def test_a_store_of_histories_needs_them(engine):
    store = engine.open(make_schema(embed_dim=E))
    state = random_state(2, store.schema)
    for wrong, message in [
        ({"compressed": None}, "state.compressed must be a torch.Tensor, got NoneType"),
        ({"compressed": torch.zeros(2, R, E + 1)}, "state.compressed must be"),
        ({"compressed": torch.zeros(2, R, E).double()}, "state.compressed must be float32, got float64"),
        ({"lengths": torch.zeros(2)}, "state.lengths must be int64 or int32, got float32"),
    ]:
        with pytest.raises(ValueError, match=message):
            store.put_many(ids(1, 2), state._replace(**wrong))
    assert not store.info_many(ids(1, 2)).found.any()


# Against a model


class AgainstADict(RuleBasedStateMachine):
    """A store holds what a dict holds: a stamp and the newest event of each user."""

    users = st.lists(st.integers(-2, 4), min_size=1, max_size=5)

    def __init__(self, engine):
        super().__init__()
        self.store = engine.store
        self.store.delete_many(torch.arange(-2, 5))
        self.states = {}
        self.stamp = 0

    def new_states(self, users):
        stamps = [self.stamp + 1 + position for position in range(len(users))]
        self.stamp = stamps[-1]
        return ids(*users), stamped_state(stamps, self.store.schema), ids(*stamps), stamps

    @rule(users=users)
    def put(self, users):
        where, state, events, stamps = self.new_states(users)
        assert self.store.put_many(where, state, event_ids=events).all()
        self.states.update(zip(users, stamps, strict=True))

    @rule(users=users, changed=users)
    def replace(self, users, changed):
        users = sorted(set(users))
        read = self.store.info_many(ids(*users))
        self.put(changed)
        where, state, events, stamps = self.new_states(users)
        written = self.store.put_many(where, state, event_ids=events, replaces=read).tolist()
        assert written == [user not in changed for user in users]
        self.states.update((user, stamp) for user, stamp in zip(users, stamps, strict=True) if user not in changed)

    @rule(users=users)
    def delete(self, users):
        assert self.store.delete_many(ids(*users)) == len(self.states.keys() & set(users))
        for user in users:
            self.states.pop(user, None)

    @rule(users=users)
    def get(self, users):
        stored = self.store.get_many(ids(*users), histories=True)
        assert stamps_of(stored) == [self.states.get(user, 0) for user in users]
        assert stored.info.event_ids.tolist() == [self.states.get(user, -1) for user in users]
        for read, expected in zip(self.store.info_many(ids(*users)), stored.info, strict=True):
            assert torch.equal(read, expected)

    def teardown(self):
        self.get(list(range(-2, 5)))


def test_a_store_holds_what_a_dict_holds(engine):
    engine.open(make_schema(embed_dim=E))
    run_state_machine_as_test(
        lambda: AgainstADict(engine), settings=settings(max_examples=8, stateful_step_count=20, deadline=None)
    )

"""StateCache: a table in front of a store. Its answers are those of the store, whoever changes it, and when."""

import threading

import pytest
import torch

from recattn.nn.lrea import LREAState
from recattn.serving import MemoryStore, StateCache, StateRefusedError, StateSchema, StoreUnavailableError
from recattn.serving import state_cache as state_cache_module
from recattn.serving.stores import store as store_module
from tests.helpers.state_tables import DV, D, H, R, ids, stamped, stamps_of

SCHEMA = StateSchema(heads=H, rank=R, dim=D, value_dim=DV, dtype=torch.float32, model="test")


class Store(MemoryStore):
    """A MemoryStore of users 0 .. 9 with stamps 100 .. 109. It notes its reads, and does as told before an answer."""

    def __init__(self) -> None:
        super().__init__(SCHEMA)
        self.reads: list[list[int]] = []
        self.before_answer = lambda: None
        put(self, *range(10))

    def get_many(self, user_ids, **options):
        self.reads.append(user_ids.tolist())
        stored = super().get_many(user_ids, **options)
        self.before_answer()
        return stored


def put(store, *users: int, stamp: int = 100, **options):
    keys, values = stamped([stamp + user for user in users])
    return store.put_many(ids(*users), LREAState(keys, values, None, None), **options)


def served(cache: StateCache, *users: int) -> list[int]:
    with cache.request(ids(*users)) as request:
        assert request.found.tolist() == [stamp != 0 for stamp in stamps_of(request)]
        return stamps_of(request)


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves: `clock[0] += seconds`."""
    now = [1e9]
    for module in (state_cache_module, store_module):
        monkeypatch.setattr(module.time, "time", lambda: now[0])
    return now


def test_reads_only_what_the_table_lacks_each_user_once():
    store = Store()
    cache = StateCache(store, 8)
    assert served(cache, 3, 4, 3, 77) == [103, 104, 103, 0]
    assert served(cache, 4, 5) == [104, 105]
    assert store.reads == [[3, 4, 77], [5]]
    assert served(cache) == []
    assert cache.stats() == {"hits": 1, "misses": 5, "not_found": 1, "unavailable": 0, "evictions": 0}


def test_scores_are_those_of_the_states_to_the_bit():
    store, targets, offsets = Store(), torch.randn(6, H, D), torch.tensor([0, 1, 1, 6])
    users = ids(8, 77, 2)
    direct = SCHEMA.make_table(4)
    direct.put(ids(8, 2), *stamped([108, 102]))
    assert torch.equal(StateCache(store, 8).attend(targets, users, offsets), direct.attend(targets, users, offsets))


def test_slots_go_where_a_graph_reads_them_also_after_a_fill():
    cache, out = StateCache(Store(), 8), torch.empty(2, dtype=torch.int64)
    with cache.request(ids(1, 2), out=out) as request:
        assert request.slots is out and stamps_of(request) == [101, 102]


def test_prefetch_makes_the_next_request_a_hit():
    store = Store()
    cache = StateCache(store, 8)
    cache.prefetch(ids(1, 2)).result(10)
    assert served(cache, 2, 1) == [102, 101] and len(store.reads) == 1
    cache.close()


def test_evicts_but_never_a_user_of_a_request():
    cache = StateCache(Store(), 4)
    with cache.request(ids(0, 1)) as request:
        for user in range(2, 10):
            assert served(cache, user) == [100 + user]
        assert stamps_of(request) == [100, 101]
        with pytest.raises(RuntimeError, match="pin"), cache.request(ids(*range(10))):
            pass
        assert stamps_of(request) == [100, 101]
    assert cache.stats()["evictions"] > 0


def test_a_change_made_elsewhere_is_seen_after_max_age(clock):
    store = Store()
    cache = StateCache(store, 8, max_age=5)
    assert served(cache, 1, 2) == [101, 102]
    put(store, 1, stamp=200)
    store.delete_many(ids(2))
    clock[0] += 4.9
    assert served(cache, 1, 2) == [101, 102]
    clock[0] += 0.1
    assert served(cache, 1, 2) == [201, 0]
    assert store.reads == [[1, 2], [1, 2]]


def test_a_state_is_not_served_beyond_its_expiry(clock):
    store = Store()
    put(store, 1, ttl=3)
    cache = StateCache(store, 8)
    assert served(cache, 1, 2) == [101, 102]
    clock[0] += 3
    assert served(cache, 1, 2) == [0, 102]


def test_a_change_through_the_cache_is_seen_at_once():
    store = Store()
    cache = StateCache(store, 8)
    assert served(cache, 1, 2, 3) == [101, 102, 103]
    keys, values = stamped([201])
    assert cache.put_many(ids(1), LREAState(keys, values, None, None)).tolist() == [True]
    assert cache.delete_many(ids(2, 77)) == 1
    store.delete_many(ids(3))
    cache.forget(ids(3))
    assert served(cache, 1, 2, 3) == [201, 0, 0]
    assert not store.info_many(ids(2)).found


def test_what_a_failed_write_has_written_is_seen_at_once():
    class HalfWritten(Store):
        def put_many(self, user_ids, state, **options):
            written = super().put_many(user_ids, state, **options)
            if options:
                raise StoreUnavailableError("the others are not written")
            return written

    cache = StateCache(HalfWritten(), 8)
    assert served(cache, 1, 2) == [101, 102]
    keys, values = stamped([201])
    with pytest.raises(StoreUnavailableError):
        cache.put_many(ids(1), LREAState(keys, values, None, None), ttl=100)
    assert served(cache, 1, 2) == [201, 102]


def test_a_state_deleted_while_it_is_read_does_not_enter_the_table():
    store = Store()
    cache = StateCache(store, 8)

    def delete():
        store.before_answer = lambda: None
        cache.delete_many(ids(1))

    store.before_answer = delete
    assert served(cache, 1, 2) == [0, 102]
    assert store.reads == [[1, 2], [1, 2]]
    store.before_answer = lambda: cache.forget(ids(9))  # of no concern: read once
    assert served(cache, 3) == [103] and len(store.reads) == 3


@pytest.mark.parametrize("fill_first", [False, True])
def test_an_unavailable_store_raises_or_its_users_are_missing(fill_first, clock):
    def fail():
        raise StoreUnavailableError("down")

    for on_unavailable in ("raise", "missing"):
        store = Store()
        cache = StateCache(store, 8, on_unavailable=on_unavailable, max_age=5)
        assert served(cache, 1, 2) == [101, 102]
        store.before_answer = fail
        assert served(cache, 1, 2) == [101, 102]  # a hit asks no store
        clock[0] += 5 * fill_first
        users = (1, 2) if fill_first else (1, 3)
        if on_unavailable == "raise":
            with pytest.raises(StoreUnavailableError, match="down"):
                served(cache, *users)
        else:  # not even a state that was served before, once it is too old
            assert served(cache, *users) == ([0, 0] if fill_first else [101, 0])
            assert cache.stats()["unavailable"] == (2 if fill_first else 1)
        store.before_answer = lambda: None
        assert served(cache, *users) == [100 + user for user in users]


def test_threads_see_whole_states_and_no_older_ones():
    """While a writer rewrites all users: no row mixes states, none is missing, and none is older than the last write
    that had returned before the request began."""
    store = Store()
    cache, written, failures = StateCache(store, 24), [100] * 10, []
    done = threading.Event()

    def write():
        for round_ in range(2, 40):
            for user in range(10):
                keys, values = stamped([100 * round_ + user])
                cache.put_many(ids(user), LREAState(keys, values, None, None))
                written[user] = 100 * round_
        done.set()

    def read(first: int):
        users = [first, first + 1, first + 2]
        try:
            while not done.is_set():
                least = [written[user] for user in users]
                for user, low, stamp in zip(users, least, served(cache, *users), strict=True):
                    if stamp % 100 != user or stamp - user < low:
                        failures.append((user, low, stamp))
        except Exception as error:  # would end the thread unseen
            failures.append(error)

    threads = [threading.Thread(target=write), *(threading.Thread(target=read, args=(first,)) for first in (0, 3, 6))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert done.is_set() and failures == []


def test_arguments():
    for wrong, message in (
        ({"store": "redis://"}, "store must be a StateStore, got str"),
        ({"max_age": 0}, "max_age must be a positive number of seconds, got 0"),
        ({"on_invalid": "skip"}, "on_invalid must be"),
        ({"on_unavailable": "zeros"}, "on_unavailable must be"),
    ):
        with pytest.raises(ValueError, match=message):
            StateCache(**{"store": Store(), "capacity": 4, **wrong})


def test_refused_states_raise_or_are_missing(tmp_path):
    lmdb_store = pytest.importorskip("recattn.serving.stores.lmdb").LMDBStore
    with lmdb_store(tmp_path, StateSchema(H, R, D, DV, torch.float32, "other")) as others:
        put(others, 1)
    with lmdb_store(tmp_path, SCHEMA) as store:
        put(store, 2)
        with pytest.raises(StateRefusedError, match="user 1 has model 'other', not 'test'"):
            served(StateCache(store, 8), 1, 2)
        assert served(StateCache(store, 8, on_invalid="missing"), 1, 2) == [0, 102]

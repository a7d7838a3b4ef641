"""StateTable against a model of it: growth, eviction and reuse never mix two users' states."""

import threading
import time
from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.helpers.state_tables import INVALID, ids, make_table, stamped, stamps_of

pytestmark = pytest.mark.skipif(find_spec("recattn._slot_map") is None, reason="recattn has no compiled SlotMap here")


# The contract, against a model

USERS = range(9)
batches = st.lists(st.sampled_from(USERS), min_size=1, max_size=6)


class AgainstAModel(RuleBasedStateMachine):
    """A user's row holds the last state put until it is erased or evicted; a request keeps the rows it found."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 4
        self.table = make_table(self.capacity, self.dtype)
        self.states: dict[int, int] = {}  # the last stamp of every user who is there
        self.requests: list[tuple[object, object, list[int]]] = []  # context, request, the stamps it found
        self.last_stamp = 0
        self.evictions = 0

    def pinned(self) -> set[int]:
        return {stamp for _, _, stamps in self.requests for stamp in stamps if stamp != 0}

    def put(self, users, stamps, missing=(), **options):
        """Of each user the last stamp, and of those `missing` none any more."""
        states = {user: stamp for user, stamp in zip(users, stamps, strict=True) if user not in missing}
        pinned = self.pinned()
        retired = pinned - set(self.states.values())
        needed = max(0, len(states) - (self.capacity - len(self.states) - len(retired)))
        evictable = {user for user, stamp in self.states.items() if stamp not in pinned}
        if needed > len(evictable):
            with pytest.raises(RuntimeError, match="no room"):
                self.table.put(ids(*users), **options)
            return
        assert set(self.table.put(ids(*users), **options).tolist()) == set(missing)
        self.evictions += needed
        there = {user for user in USERS if self.table.contains(ids(user))}
        gone = self.states.keys() - there - set(missing)
        assert gone <= evictable - set(users)
        evicted = min(needed, len(evictable - states.keys()))
        assert evicted - len(missing) <= len(gone) <= evicted  # those missing may have been evicted before
        self.states = {user: stamp for user, stamp in self.states.items() if user in there}
        self.states.update(states)
        assert there == self.states.keys()

    def new_stamps(self, users):
        stamps = [self.last_stamp + 1 + i for i in range(len(users))]
        self.last_stamp = stamps[-1]
        return stamps

    @rule(users=batches)
    def put_states(self, users):
        stamps = self.new_stamps(users)
        keys, values = stamped(stamps)
        self.put(users, stamps, keys=keys, values=values)

    @rule(users=batches, data=st.data(), on_invalid=st.sampled_from(["raise", "missing"]))
    def put_invalid_states(self, users, data, on_invalid):
        stamps = self.new_stamps(users)
        states = dict(zip(("keys", "values"), (x.double().clone() for x in stamped(stamps)), strict=True))
        invalid = data.draw(st.sets(st.integers(0, len(users) - 1), min_size=1))
        for position in invalid:
            state = states[data.draw(st.sampled_from(["keys", "values"]))][position].view(-1)
            state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.sampled_from(INVALID[self.dtype]))
        last = {user: position for position, user in enumerate(users)}
        missing = {user for user, position in last.items() if position in invalid}
        if missing and on_invalid == "raise":
            with pytest.raises(ValueError, match=r"(keys|values) of user \d must be finite"):
                self.table.put(ids(*users), **states)
        else:
            self.put(users, stamps, missing, **states, on_invalid=on_invalid)

    @rule()
    def save_and_load(self):
        table = make_table(max(len(self.states), 1), self.dtype)
        table.load_state_dict(self.table.state_dict())
        with table.request(ids(*USERS)) as request:
            assert stamps_of(request) == [self.states.get(user, 0) for user in USERS]

    @rule(users=batches)
    def begin_request(self, users):
        context = self.table.request(ids(*users))
        request = context.__enter__()
        expected = [self.states.get(user, 0) for user in users]
        assert request.found.tolist() == [stamp != 0 for stamp in expected]
        self.requests.append((context, request, expected))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def end_request(self, data):
        context, _, _ = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        context.__exit__(None, None, None)

    @rule(users=batches)
    def erase(self, users):
        assert self.table.erase(ids(*users)) == len(self.states.keys() & set(users))
        for user in users:
            self.states.pop(user, None)

    @precondition(lambda self: self.capacity < 8)
    @rule(more=st.integers(0, 2))
    def grow(self, more):
        self.capacity += more
        self.table.grow(self.capacity)

    @invariant()
    def every_read_gives_that_users_last_state(self):
        with self.table.request(ids(*USERS)) as request:
            assert stamps_of(request) == [self.states.get(user, 0) for user in USERS]

    @invariant()
    def requests_keep_what_they_found(self):
        for _, request, expected in self.requests:
            assert stamps_of(request) == expected

    @invariant()
    def counts(self):
        assert len(self.table) == len(self.states) and self.table.capacity == self.capacity
        assert self.table.stats()["evictions"] == self.evictions


class AgainstAModelInFloat16(AgainstAModel):
    dtype = torch.float16


class AgainstAModelInInt8(AgainstAModel):
    dtype = torch.int8


# A dtype changes only how a state is written and which ones are refused.
for machine, examples in ((AgainstAModel, 40), (AgainstAModelInFloat16, 12), (AgainstAModelInInt8, 12)):
    machine.TestCase.settings = settings(max_examples=examples, stateful_step_count=40)
    machine.TestCase.pytestmark = pytestmark
TestAgainstAModel = AgainstAModel.TestCase
TestAgainstAModelInFloat16 = AgainstAModelInFloat16.TestCase
TestAgainstAModelInInt8 = AgainstAModelInInt8.TestCase


def test_threads_never_see_another_users_state():
    """Readers check whose rows they read while writers put, erase and grow."""
    users, seconds = 48, 2.0
    table = make_table(16)
    ends, failures, counts = time.monotonic() + seconds, [], Counter()

    def thread(work):
        def run(seed: int):
            random = torch.Generator().manual_seed(seed)
            try:
                while time.monotonic() < ends and not failures:
                    work(torch.randint(users, (6,), generator=random))
                    counts[work.__name__] += 1
            except BaseException as error:
                failures.append(error)

        return run

    def read(batch):
        with table.request(batch) as request:
            for _ in range(3):
                stamps = torch.tensor(stamps_of(request))
                assert torch.equal(stamps % 64, torch.where(request.found, batch + 1, 0)), "another user's state"
                time.sleep(0)
            counts["found"] += int(request.found.sum())

    def put(batch):
        counts["stamp"] += 1  # the user in the low six bits of a stamp, some number above
        try:
            table.put(batch, *stamped((batch + 1 + 64 * (counts["stamp"] % 1000)).tolist()))
        except RuntimeError as error:
            assert "no room" in str(error)
            counts["no room"] += 1

    def erase(batch):
        table.erase(batch[:2])
        time.sleep(0.001)

    def grow(_):
        if table.capacity < 40:
            table.grow(table.capacity + 1)
        time.sleep(0.05)

    threads = [
        threading.Thread(target=thread(work), args=(seed,))
        for seed, work in enumerate([read, read, read, put, put, erase, grow])
    ]
    for started in threads:
        started.start()
    for started in threads:
        started.join()
    assert not failures, failures[0]
    assert table.capacity > 16 and counts["found"] > 100 and counts["put"] > 100, counts
    assert table.stats()["evictions"] > 0 and counts["erase"] > 10, counts

"""State machines against dicts: SlotMap here; StateTable's and the stores' are those of tests/serving."""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from recattn.serving import SlotMap

IDS = (0, 1, 2, 3, -1, 2**63 - 1, -(2**63), 7)
batches = st.lists(st.sampled_from(IDS), min_size=1, max_size=5)


class SlotMapIsADict(RuleBasedStateMachine):
    """Rows by id, with pins and with reservations that are published late, in parts, in any order or never.

    `slots` holds the published row of each id. A row is free, reserved, published, or retired: replaced or erased, and
    still pinned. No row is two of these, and a pinned row stays what it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.capacity = 3
        self.map = SlotMap(self.capacity)
        self.slots: dict[int, int] = {}
        self.reserved: dict[int, int] = {}  # the id for which each row is reserved
        self.order: dict[int, int] = {}  # when: of two rows of an id the later reservation counts
        self.pins: list[int] = []
        self.time = 0

    def used(self) -> set[int]:
        return {*self.slots.values(), *self.reserved, *self.pins}

    @rule(ids=batches)
    def reserve(self, ids):
        needed = len(set(ids))
        free = self.capacity - len(self.used())
        evictable = {id for id, slot in self.slots.items() if slot not in self.pins}
        if needed > free + len(evictable):
            with pytest.raises(RuntimeError, match="no room"):
                self.map.reserve(ids)
            return
        slots = self.map.reserve(ids).tolist()
        last = {id: position for position, id in enumerate(ids)}
        assert [slot == -1 for slot in slots] == [last[id] != position for position, id in enumerate(ids)]
        given = [slot for slot in slots if slot != -1]
        evicted = {id for id, slot in self.slots.items() if not self.map.contains([id])[0]}
        assert len(given) == len(set(given)) and len(evicted) == max(0, needed - free) and evicted <= evictable
        for id in evicted:
            del self.slots[id]
        assert not self.used() & set(given), "a row that is in use"
        for id, slot in zip(ids, slots, strict=True):
            if slot != -1:
                self.time += 1
                self.reserved[slot], self.order[slot] = id, self.time

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), publish=st.booleans())
    def publish_or_abandon(self, data, publish):
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.reserved)), min_size=1, unique=True))
        (self.map.publish if publish else self.map.abandon)(chosen)
        for slot in chosen:
            id = self.reserved.pop(slot)
            if publish:
                self.slots[id] = slot

    @rule(ids=batches)
    def acquire(self, ids):
        slots = self.map.acquire(ids).tolist()
        assert slots == [self.slots.get(id, -1) for id in ids]
        self.pins += [slot for slot in slots if slot != -1]

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def release(self, data):
        chosen = data.draw(st.permutations(self.pins))[: data.draw(st.integers(1, len(self.pins)))]
        self.map.release([*chosen, -1])
        for slot in chosen:
            self.pins.remove(slot)

    @rule(ids=batches)
    def erase(self, ids):
        assert self.map.erase(ids) == len(self.slots.keys() & set(ids))
        for id in ids:
            self.slots.pop(id, None)

    @precondition(lambda self: self.capacity < 9)
    @rule(more=st.integers(0, 2))
    def grow(self, more):
        self.capacity += more
        self.map.grow(self.capacity)

    @rule(slot=st.integers(-2, 9), method=st.sampled_from(("publish", "abandon", "release")))
    def refuse(self, slot, method):
        allowed = self.pins if method == "release" else self.reserved
        if slot not in allowed and slot != -1:
            with pytest.raises(ValueError, match="slots must be"):
                getattr(self.map, method)(np.array([slot]))

    @invariant()
    def holds_what_the_dict_holds(self):
        assert len(self.map) == len(self.slots) and self.map.capacity == self.capacity
        assert set(self.map.ids().tolist()) == self.slots.keys()
        assert self.map.contains(list(IDS)).tolist() == [id in self.slots for id in IDS]


def run_slot_map(options: settings) -> None:
    run_state_machine_as_test(SlotMapIsADict, settings=options)


def run_state_tables(options: settings) -> None:
    from tests.serving import test_state_table_contract as contract

    for machine in (contract.AgainstAModel, contract.AgainstAModelInFloat16, contract.AgainstAModelInInt8):
        run_state_machine_as_test(machine, settings=options)


def run_stores(options: settings) -> None:
    """In every engine that is installed."""
    from tests.helpers.stores import E, make_schema
    from tests.serving.test_stores import AgainstADict

    with contextlib.ExitStack() as opened:
        for engine in engines(opened):
            engine.open(make_schema(embed_dim=E))
            opened.callback(engine.close)
            run_state_machine_as_test(functools.partial(AgainstADict, engine), settings=options)


def engines(opened: contextlib.ExitStack) -> Iterator:
    """With Redis as one server, and as a cluster of three."""
    from tests.helpers.stores import Engine

    yield Engine("memory")
    if find_spec("lmdb"):
        yield Engine("lmdb", Path(opened.enter_context(tempfile.TemporaryDirectory())) / "states")
    if find_spec("redis") and shutil.which("redis-server"):
        from benchmarks.serving import servers

        yield Engine("redis", opened.enter_context(servers.RedisServer()).url)
        yield Engine("cluster", opened.enter_context(servers.RedisCluster(nodes=3)).url)


class Machine(NamedTuple):
    """As `properties.Property`: what is fuzzed."""

    operator: str
    run: Callable[[settings], None]
    impl: str = "dict"
    kind: str = "machines"

    def test(self, options: settings, tried: Callable[[], None] = lambda: None) -> Callable[[], None]:
        def holds():
            self.run(settings(options, stateful_step_count=40))
            for _ in range(options.max_examples):
                tried()

        return holds

    @property
    def id(self) -> str:
        return f"{self.operator}-{self.impl}"


MACHINES = [
    Machine("SlotMap", run_slot_map),
    Machine("StateTable", run_state_tables),
    Machine("StateStore", run_stores),
]

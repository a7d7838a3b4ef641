"""SlotMap: every method, and threads under the sanitizers.

Its contract against a model, with the states, is in test_state_table_contract.py.
"""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from recattn.serving import SlotMap
from tests.helpers.sanitizers import run_slot_map_stress

pytestmark = pytest.mark.skipif(find_spec("recattn._slot_map") is None, reason="recattn has no compiled SlotMap here")


def insert(slot_map: SlotMap, *ids: int) -> list[int]:
    slots = slot_map.reserve(ids)
    slot_map.publish(slots)
    return slots.tolist()


def lookup(slot_map: SlotMap, *ids: int) -> list[int]:
    slots = slot_map.acquire(ids)
    slot_map.release(slots)
    return slots.tolist()


def test_any_int64_is_an_id():
    ids = [0, -1, 1, 2**63 - 1, -(2**63), 2**32]
    slot_map = SlotMap(len(ids))
    slots = insert(slot_map, *ids)
    assert sorted(slots) == list(range(len(ids)))
    assert lookup(slot_map, *ids) == slots
    assert sorted(slot_map.ids().tolist()) == sorted(ids)
    assert lookup(slot_map, 7, 0) == [-1, slots[0]]


@pytest.mark.parametrize("stride", [1, 2**20, 2**40 + 1])
def test_many_ids_inserted_erased_and_inserted_again(stride):
    """More than one block of lookups. Erasing moves entries of the index and must lose none."""
    rng = np.random.default_rng(0)
    capacity = 5000
    slot_map, model = SlotMap(capacity), {}
    universe = rng.permutation(2 * capacity) * stride
    for _ in range(30):
        ids = rng.choice(universe, 700, replace=False)
        erased = sum(model.pop(id, None) is not None for id in ids[:300].tolist())
        assert slot_map.erase(ids[:300]) == erased
        ids = ids[300 : 300 + capacity - len(model)]
        insert(slot_map, *ids)
        model.update(zip(ids.tolist(), lookup(slot_map, *ids), strict=True))
        slots = lookup(slot_map, *universe)
        assert dict(zip(universe.tolist(), slots, strict=True)) == {id: model.get(id, -1) for id in universe.tolist()}
        assert len(slot_map) == len(model)
    assert len(set(model.values())) == len(model) and slot_map.stats()["evictions"] == 0


def test_nobody_finds_a_reserved_row():
    slot_map = SlotMap(2)
    slots = slot_map.reserve([5])
    assert lookup(slot_map, 5) == [-1] and not slot_map.contains([5])[0] and len(slot_map) == 0
    slot_map.publish(slots)
    assert lookup(slot_map, 5) == slots.tolist() and slot_map.contains([5])[0] and len(slot_map) == 1


def test_an_abandoned_row_is_given_out_again():
    slot_map = SlotMap(1)
    slot_map.abandon(slot_map.reserve([5]))
    assert insert(slot_map, 6) == [0] and lookup(slot_map, 5, 6) == [-1, 0]
    assert slot_map.stats()["evictions"] == 0


def test_an_update_leaves_the_pinned_row_alone():
    slot_map = SlotMap(2)
    insert(slot_map, 5)
    read = slot_map.acquire([5])
    written = slot_map.reserve([5])
    assert written[0] != read[0] and slot_map.acquire([5])[0] == read[0]  # a second pin
    slot_map.publish(written)
    assert lookup(slot_map, 5) == written.tolist() and len(slot_map) == 1
    slot_map.release(read)
    pinned = slot_map.acquire([5])
    with pytest.raises(RuntimeError, match="no room for 1 users: of 2 rows 0 are free and 0 can be evicted"):
        slot_map.reserve([6])
    slot_map.release(read)  # the last pin of the old row
    assert slot_map.reserve([6]).tolist() == read.tolist()
    slot_map.release(pinned)


def test_of_an_id_given_twice_the_last_gets_a_row():
    slot_map = SlotMap(2)
    slots = slot_map.reserve([5, 6, 5, 6, 5]).tolist()
    assert slots[:3] == [-1, -1, -1] and sorted(slots[3:]) == [0, 1]
    slot_map.publish(slots)
    assert lookup(slot_map, 6, 5) == slots[3:] and len(slot_map) == 2
    slot_map.abandon(slot_map.reserve([5, 5]))
    assert lookup(slot_map, 5, 6) == [slots[4], -1]


def test_an_id_given_twice_evicts_no_more_than_given_once():
    slot_map = SlotMap(4)
    insert(slot_map, 1, 2, 3, 4)
    insert(slot_map, 7, 7, 7, 7)
    assert len(slot_map) == 4 and slot_map.stats()["evictions"] == 1
    with pytest.raises(RuntimeError, match="no room for 5 users: of 4 rows"):
        slot_map.reserve([1, 2, 3, 4, 5, 5])


def test_the_last_row_of_an_id_counts():
    slot_map = SlotMap(3)
    first, second, third = (slot_map.reserve([id])[0] for id in (5, 6, 5))
    slot_map.publish([first, second, -1, third])
    assert lookup(slot_map, 5, 6) == [third, second] and len(slot_map) == 2
    assert insert(slot_map, 7) == [first]


def test_an_id_found_twice_is_pinned_twice():
    slot_map = SlotMap(1)
    insert(slot_map, 5)
    slots = slot_map.acquire([5, 5])
    slot_map.release(slots[:1])
    with pytest.raises(RuntimeError, match="no room"):
        slot_map.reserve([6])
    slot_map.release(slots[1:])
    assert slot_map.reserve([6]).tolist() == [0]


def test_an_erased_row_outlives_its_pins_only():
    slot_map = SlotMap(1)
    insert(slot_map, 5)
    slots = slot_map.acquire([5])
    assert slot_map.erase([5, 5, 9]) == 1 and len(slot_map) == 0 and lookup(slot_map, 5) == [-1]
    with pytest.raises(RuntimeError, match="no room"):
        slot_map.reserve([6])
    slot_map.release(slots)
    assert insert(slot_map, 6) == [0] and slot_map.stats()["evictions"] == 0


def test_evicts_who_was_not_looked_up():
    slot_map = SlotMap(100)
    insert(slot_map, *range(100))
    lookup(slot_map, *range(0, 100, 2))
    insert(slot_map, *range(100, 150))
    assert set(slot_map.ids().tolist()) == {*range(0, 100, 2), *range(100, 150)}
    assert slot_map.stats() == {"hits": 50, "misses": 0, "evictions": 50}


def test_a_look_up_counts_for_one_round():
    slot_map = SlotMap(2)
    insert(slot_map, 1, 2)
    lookup(slot_map, 1)
    insert(slot_map, 3)
    assert set(slot_map.ids().tolist()) == {1, 3}
    insert(slot_map, 4)
    assert set(slot_map.ids().tolist()) == {3, 4}


def test_an_update_keeps_the_reference():
    slot_map = SlotMap(3)
    insert(slot_map, 1, 2)
    lookup(slot_map, 1)
    insert(slot_map, 1)  # to the last row
    for id in (3, 4, 5, 6):  # 3 to the first, which is free; 4, 5 and 6 as the hand goes
        insert(slot_map, id)
    assert set(slot_map.ids().tolist()) == {1, 5, 6}


def test_updates_evict_others_first_and_themselves_at_last():
    slot_map = SlotMap(4)
    insert(slot_map, 1, 2, 3, 4)
    slots = slot_map.reserve([1, 2])
    assert slot_map.contains([1, 2, 3, 4]).tolist() == [True, True, False, False]
    slot_map.publish(slots)
    insert(slot_map, 1, 2, 5, 6)
    insert(slot_map, 1, 2, 5, 6)
    assert set(slot_map.ids().tolist()) == {1, 2, 5, 6}


def test_no_room_changes_nothing():
    slot_map = SlotMap(4)
    slots = insert(slot_map, 1, 2, 3)
    pinned = slot_map.acquire([1])
    with pytest.raises(RuntimeError, match="no room for 4 users: of 4 rows 1 are free and 2 can be evicted"):
        slot_map.reserve([7, 8, 9, 10])
    with pytest.raises(RuntimeError, match="no room for 5 users"):
        slot_map.reserve([7, 8, 9, 10, 11])
    assert lookup(slot_map, 1, 2, 3, 7) == [*slots, -1] and slot_map.stats()["evictions"] == 0
    slot_map.release(pinned)
    insert(slot_map, 7, 8, 9, 10)
    assert set(slot_map.ids().tolist()) == {7, 8, 9, 10}


def test_growth_keeps_rows_pins_and_reservations():
    slot_map = SlotMap(4)
    slots = insert(slot_map, 1, 2, 3)
    pinned = slot_map.acquire([1, 2])
    slot_map.erase([2])
    reserved = slot_map.reserve([4])
    slot_map.grow(5)
    assert slot_map.capacity == 5 and lookup(slot_map, 1, 2, 3, 4) == [slots[0], -1, slots[2], -1]
    slot_map.publish(reserved)
    assert lookup(slot_map, 4) == reserved.tolist()
    assert sorted(insert(slot_map, 5, 6, 7)) == sorted([slots[2], *reserved.tolist(), 4])  # 1 and 2 are still read
    assert lookup(slot_map, 1) == [slots[0]]
    slot_map.release(pinned)
    assert insert(slot_map, 8) == [slots[1]]


@pytest.mark.parametrize("method", ["publish", "abandon"])
@pytest.mark.parametrize("slots", [[0, 1], [0, 0], [0, -2], [0, 3], [2], [-1, 2]])
def test_only_reserved_rows_are_published_or_abandoned(method, slots):
    slot_map = SlotMap(3)
    reserved = slot_map.reserve([5, 6])
    slot_map.publish(reserved[1:])
    with pytest.raises(ValueError, match="slots must be reserved rows, each once, got"):
        getattr(slot_map, method)(slots)
    slot_map.publish(reserved[:1])
    assert lookup(slot_map, 5, 6) == [0, 1]


@pytest.mark.parametrize("slots", [[0, 0], [0, 1], [0, 2], [0, -2]])
def test_only_pinned_rows_are_released(slots):
    slot_map = SlotMap(2)
    insert(slot_map, 5, 6)
    pinned = slot_map.acquire([5])
    with pytest.raises(ValueError, match="slots must be pinned rows or -1, got"):
        slot_map.release(slots)
    slot_map.erase([5, 6])
    assert slot_map.reserve([7]).tolist() == [1]  # row 0 is pinned as before
    slot_map.release(pinned)
    assert slot_map.reserve([8]).tolist() == [0]


def test_batches_are_any_integers():
    slot_map = SlotMap(8)
    slots = insert(slot_map, 3, 1, 2)
    for ids in (
        torch.tensor([3, 1, 2]),
        np.array([3, 1, 2], np.int32),
        (3, 1, 2),
        np.array([3, 0, 1, 0, 2, 0])[::2],
    ):
        found = slot_map.acquire(ids)
        assert found.dtype == np.int64 and found.tolist() == slots
        slot_map.release(found)
    assert slot_map.acquire([]).tolist() == [] and slot_map.reserve(torch.tensor([]).long()).tolist() == []


@pytest.mark.parametrize(
    "ids, got",
    [
        ([1.0], r"float64 \[1\]"),
        ([[1]], r"int64 \[1, 1\]"),
        (1, r"int64 \[\]"),
        (np.array([1], np.uint64), r"uint64 \[1\]"),
        ([True], r"bool \[1\]"),
        (["a"], r"<U1 \[1\]"),
    ],
)
@pytest.mark.parametrize("method", ["acquire", "contains", "reserve", "erase"])
def test_refuses_other_ids(method, ids, got):
    with pytest.raises(ValueError, match=f"ids must be int64 \\[n\\], got {got}"):
        getattr(SlotMap(2), method)(ids)


def test_refuses_what_is_no_array():
    with pytest.raises(ValueError, match="inhomogeneous"):
        SlotMap(2).acquire([[1], [1, 2]])


@pytest.mark.parametrize("capacity", [0, -1, 2**40 + 1])
def test_refuses_other_capacities(capacity):
    with pytest.raises(ValueError, match=rf"capacity must be between 1 and 2\*\*40, got {capacity}"):
        SlotMap(capacity)


def test_does_not_shrink():
    slot_map = SlotMap(3)
    with pytest.raises(ValueError, match=r"capacity must be between 3 and 2\*\*40, got 2"):
        slot_map.grow(2)
    assert slot_map.capacity == 3


def test_threads_do_not_race(tmp_path):
    run_slot_map_stress("thread", tmp_path)

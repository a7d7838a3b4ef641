"""KeyboardInterrupt at any moment: whoever goes on with the same store or table finds nothing half-written.

Processes that are killed are in test_kills.py, builds that are killed in test_state_builder.py.
"""

import random
import signal
import sys
import time
from functools import partial

import pytest
import torch

from benchmarks.harness import records
from recattn.serving import MemoryStore, StateTable
from tests.helpers.stores import E, make_schema, stamped_state, stamps_of

USERS = torch.arange(40)
SCHEMA = make_schema(rank=16, embed_dim=E)


def was_interrupted(call, *, after):
    """Run the call. KeyboardInterrupt comes after so many seconds, if it has not ended by then."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return False


# Not Redis: interrupted in hiredis.pack_command, the process died once of a segmentation fault.
@pytest.mark.parametrize("engine", ["lmdb"], indirect=True)
def test_a_store_goes_on_after_its_calls_were_interrupted(engine):
    store = engine.open(SCHEMA)

    def put(version):
        store.put_many(USERS, stamped_state([version] * len(USERS), SCHEMA), event_ids=torch.full_like(USERS, version))

    def put_and_get(version):
        put(version)
        store.get_many(USERS, histories=True)

    put(1)
    start = time.perf_counter()
    assert set(stamps_of(store.get_many(USERS, histories=True))) == {1}
    put(2)
    seconds, moments, last, interrupted = time.perf_counter() - start, random.Random(0), 2, 0
    for _ in range(200):
        interrupted += was_interrupted(partial(put_and_get, last + 1), after=moments.uniform(0, seconds))
        stored = store.get_many(USERS, histories=True)
        assert stored.found.all() and set(stamps_of(stored)) <= {last, last + 1}
        last += 1
        put(last)
        assert set(stamps_of(store.get_many(USERS, histories=True))) == {last}
        if interrupted == 10:
            return
    raise AssertionError(f"interrupted {interrupted} times in 200")


def lines_of(function, call, *, interrupt_at=None):
    """How many lines of `function` the call runs. At the given one it is interrupted."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code is not function.__code__:
            return None
        if event == "line":
            lines += 1
            if lines == interrupt_at:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return lines


def test_a_memory_store_interrupted_at_any_line_holds_no_parts_of_two_states():
    store = MemoryStore(SCHEMA)

    def put(version):
        store.put_many(USERS[:2], stamped_state([version] * 2, SCHEMA))

    count = lines_of(MemoryStore._put, lambda: put(1))
    for line in range(1, count - 2):  # the last three publish the entries, unlock and return
        with pytest.raises(KeyboardInterrupt):
            lines_of(MemoryStore._put, lambda: put(2), interrupt_at=line)
        assert stamps_of(store.get_many(USERS[:2], histories=True)) == [1, 1]


def test_a_write_interrupted_at_any_line_keeps_no_row():
    table = StateTable(2, heads=1, rank=2, dim=3)

    def put(stamp):
        states = torch.full((2, 1, 2, 3), float(stamp))
        table.put(torch.tensor([5, 6]), states, states)

    count = lines_of(StateTable._write, lambda: put(1))
    assert count >= 8
    for line in range(1, count + 1):
        with pytest.raises(KeyboardInterrupt):
            lines_of(StateTable._write, lambda: put(2), interrupt_at=line)
        put(3)  # needs both rows
        with table.request(torch.tensor([5, 6])) as request:
            assert request.found.all() and table._tables.keys[request.slots].eq(3).all()


def test_interrupted_results_have_no_part_of_a_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.append_lines([{"a": 1}], {}, path)

    def rows():
        yield {"a": 2}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.append_lines(rows(), {}, path)
    assert path.read_text() == '{"a": 1}\n'

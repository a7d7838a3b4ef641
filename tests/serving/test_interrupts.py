"""KeyboardInterrupt at any moment: whoever goes on with the same store or table finds nothing half-written.

Processes that are killed are in test_kills.py, builds that are killed in test_state_builder.py.
"""

import random
import signal
import sys
import time
from contextlib import contextmanager

import pytest
import torch

from benchmarks.harness import records
from recattn.serving import MemoryStore, StateTable
from tests.helpers.stores import E, make_schema, stamped_state, stamps_of

USERS = torch.arange(40)
SCHEMA = make_schema(rank=16, embed_dim=E)


@contextmanager
def interrupt_after(seconds):
    """KeyboardInterrupt in this thread after so long. Yields a list, which holds it if the block did not end before."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before, interrupts = signal.signal(signal.SIGALRM, interrupt), []
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield interrupts
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt as error:
        interrupts.append(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Not Redis: interrupted in hiredis.pack_command, the process died once of a segmentation fault.
@pytest.mark.parametrize("engine", ["lmdb"], indirect=True)
def test_a_store_goes_on_after_its_calls_were_interrupted(engine):
    store = engine.open(SCHEMA)

    def put(version):
        store.put_many(USERS, stamped_state([version] * len(USERS), SCHEMA), event_ids=torch.full_like(USERS, version))

    put(1)
    start = time.perf_counter()
    assert set(stamps_of(store.get_many(USERS, histories=True))) == {1}
    put(2)
    seconds, moments, last, interrupted = time.perf_counter() - start, random.Random(0), 2, 0
    for _ in range(200):
        with interrupt_after(moments.uniform(0, seconds)) as interrupts:
            put(last + 1)
            store.get_many(USERS, histories=True)
        interrupted += len(interrupts)
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

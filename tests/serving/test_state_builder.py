"""build_states: every user of a dataset once, whatever its files look like and whenever the build ends by a signal."""

import random
import signal
import time

import pytest
import torch

import recattn
from recattn.serving import MemoryStore, StateSchema, build_states
from tests.helpers.processes import Writer
from tests.helpers.state_tables import ids

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

DIM, LONGEST, ITEMS = 8, 12, 50
LISTS = pyarrow.list_(pyarrow.int32())


@pytest.fixture(scope="module")
def lrea():
    torch.manual_seed(0)
    return recattn.nn.LREA(DIM, LONGEST, 4, num_heads=2)


@pytest.fixture(scope="module")
def items():
    return torch.randn(ITEMS, DIM, generator=torch.Generator().manual_seed(1))


def draw_histories(users: int, seed: int = 0) -> dict[int, list[int]]:
    """Histories from empty to longer than LONGEST, of users whose ids are in no order."""
    draw = random.Random(seed)
    user_ids = draw.sample(range(-1000, 10 * users), users)
    return {user: draw.choices(range(ITEMS), k=draw.randint(0, LONGEST + 4)) for user in user_ids}


def write(folder, histories, files: int = 1, history_type=LISTS, **columns) -> str:
    """Parquet files of row groups of 7 rows."""
    table = pyarrow.table(
        {
            "user_id": pyarrow.array([user for user, _ in histories], pyarrow.int64()),
            "item_ids": pyarrow.array(
                [history for _, history in histories], history_type or pyarrow.list_(pyarrow.int32())
            ),
            **columns,
        }
    )
    rows = -(-len(table) // files)
    for file in range(files):
        parquet.write_table(table.slice(file * rows, rows), folder / f"{file}.parquet", row_group_size=7)
    return str(folder)


def assert_built(store, lrea, items, histories: dict[int, list[int]]):
    stored = store.get_many(ids(*histories))
    assert stored.found.all()
    newest = [torch.tensor(history[-LONGEST:], dtype=torch.int64) for history in histories.values()]
    padded = torch.nn.utils.rnn.pad_sequence(newest, batch_first=True)
    expected = lrea.export_state(items, torch.tensor([len(history) for history in newest]), item_ids=padded)
    torch.testing.assert_close(stored.state.keys, expected.keys, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(stored.state.values, expected.values, atol=1e-6, rtol=1e-5)


def make_store(lrea, **options) -> MemoryStore:
    return MemoryStore(StateSchema.of(lrea, torch.float32, **options))


@pytest.mark.parametrize("batch_size", [1, 10, 1000])
@pytest.mark.parametrize("files", [1, 3])
def test_states_are_those_of_the_newest_behaviours(lrea, items, tmp_path, files, batch_size):
    histories = draw_histories(40)
    store, said = make_store(lrea), []
    options = {
        "items": items,
        "build": "b",
        "batch_size": batch_size,
        "on_progress": lambda done: said.append(str(done)),
    }
    progress = build_states(write(tmp_path, list(histories.items()), files), lrea, store, **options)
    assert (progress.total, progress.built, progress.skipped, progress.invalid) == (40, 40, 0, 0)
    assert_built(store, lrea, items, histories)
    assert said[-1].startswith("40 of 40 users, ") and said[-1].endswith(" s in all")
    assert len(said) == 1 or said[0].endswith(" s left")


@pytest.mark.parametrize("history_type", [pyarrow.large_list(pyarrow.int64()), pyarrow.list_(pyarrow.uint16())])
def test_lists_of_any_integers_and_null_for_no_history(lrea, items, tmp_path, history_type):
    histories = {5: [1, 2, 3], -7: None, 9: []}
    store = make_store(lrea)
    build_states(write(tmp_path, list(histories.items()), 1, history_type), lrea, store, items=items, build="b")
    assert_built(store, lrea, items, {5: [1, 2, 3], -7: [], 9: []})


def test_the_first_row_of_a_user_counts(lrea, items, tmp_path):
    rows = [(5, [1, 2]), (6, [3]), (5, [4]), *((user, [0]) for user in range(10, 20)), (6, [5])]
    store = make_store(lrea)
    progress = build_states(write(tmp_path, rows), lrea, store, items=items, build="b", batch_size=4)
    assert (progress.built, progress.skipped) == (12, 2)
    assert_built(store, lrea, items, {5: [1, 2], 6: [3]})


def test_a_build_of_the_same_name_goes_on_and_of_another_begins(lrea, items, tmp_path):
    class StopError(Exception):
        pass

    def stop(progress):
        if progress.done >= 20:
            raise StopError

    histories = draw_histories(60)
    store, path = make_store(lrea), write(tmp_path, list(histories.items()), 2)
    options = {"items": items, "batch_size": 8}
    with pytest.raises(StopError):
        build_states(path, lrea, store, build="monday", on_progress=stop, **options)
    before = int(store.info_many(ids(*histories)).found.sum())
    assert 20 <= before < 60
    progress = build_states(path, lrea, store, build="monday", **options)
    assert (progress.skipped, progress.built) == (before, 60 - before)
    assert build_states(path, lrea, store, build="monday", **options).built == 0
    assert build_states(path, lrea, store, build="tuesday", **options).built == 60
    assert_built(store, lrea, items, histories)


def test_events_expiry_and_histories_are_stored(lrea, items, tmp_path):
    histories = {5: [1, 2, 3], 7: [4]}
    path = write(tmp_path, list(histories.items()), newest=pyarrow.array([30, 12]))
    store = make_store(lrea, appendable=True)
    build_states(path, lrea, store, items=items, build="b", event_column="newest", ttl=1000)
    info = store.info_many(ids(5, 7))
    assert info.event_ids.tolist() == [30, 12] and (info.expires > 0).all()
    behaviors = items[[6, 7, 8]]
    outcome = recattn.serving.append_events(store, lrea, ids(5, 5, 7), torch.tensor([30, 31, 12]), behaviors)
    assert outcome.applied.tolist() == [False, True, False] and outcome.repeated.tolist() == [True, False, True]
    assert_built(store, lrea, items, {5: [1, 2, 3, 7], 7: [4]})


def test_a_state_that_the_dtype_cannot_hold_is_counted_and_deleted(lrea, items, tmp_path):
    items = items.clone()
    items[3] = torch.inf
    store, path = make_store(lrea), write(tmp_path, [(5, [1, 2]), (6, [3]), (7, [4])])
    store.put_many(ids(6), lrea.export_state(torch.zeros(1, 1, DIM)))
    progress = build_states(path, lrea, store, items=items, build="b")
    assert (progress.built, progress.invalid) == (2, 1)
    assert store.info_many(ids(5, 6, 7)).found.tolist() == [True, False, True]


def test_what_does_not_fit_is_named(lrea, items, tmp_path):
    path = write(tmp_path, [(5, [1]), (6, [2, ITEMS]), (7, [])], names=pyarrow.array(["a", "b", "c"]))
    store = make_store(lrea)
    for options, message in (
        (
            {"user_column": "user"},
            "column user must be one of the dataset, user_id, item_ids, names, got no such",
        ),
        ({"user_column": "names"}, "column names must be integers without nulls, got string, 0 nulls"),
        ({"history_column": "user_id"}, "column user_id must be lists of integers, got int64"),
        ({}, f"item_ids of user 6 must be between 0 and {ITEMS - 1}, the rows of items, got {ITEMS}"),
        ({"workers": 2}, "workers must be None without Ray"),
        ({"items": None}, "items must be a torch.Tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            build_states(path, lrea, store, **{"items": items, "build": "b", **options})
    assert not store.info_many(ids(5, 6, 7)).found.any()


def build(acknowledge, path, store, lrea, items):
    """Work of a Writer: tells how many users were written after every batch, and at the end how many in all."""
    options = {"items": items, "build": "b", "batch_size": 16}
    acknowledge(0)

    def on_progress(progress):
        acknowledge(progress.built)
        time.sleep(0.005)  # lest it ends before it is killed

    done = build_states(path, lrea, store, on_progress=on_progress, **options)
    acknowledge((done.built, done.skipped))


@pytest.mark.parametrize("by, times", [(signal.SIGKILL, 20), (signal.SIGINT, 5)])
def test_killed_at_random_moments_it_loses_and_doubles_nobody(lrea, items, tmp_path, by, times):
    lmdb_store = pytest.importorskip("recattn.serving.stores.lmdb").LMDBStore
    histories = draw_histories(2000)
    (tmp_path / "parquet").mkdir()
    path, users = write(tmp_path / "parquet", list(histories.items())), ids(*histories)
    moments, acknowledged = random.Random(0), 0
    with lmdb_store(tmp_path / "states", StateSchema.of(lrea, torch.float32)) as store:
        for _ in range(times):
            with Writer(build, path, store, lrea, items) as writer:
                writer.wait()  # it has begun
                writer.kill_after(moments.uniform(0, 0.03), by)  # of its first batch
            acknowledged += writer.acknowledged[-1]
            found = store.get_many(users).found
            assert acknowledged <= int(found.sum()) < len(users)
            assert bool(found[:acknowledged].all())  # in the order of the files
        with Writer(build, path, store, lrea, items) as writer:
            writer.join()
        built, skipped = writer.acknowledged[-1]
        assert skipped == int(found.sum()) and built == len(users) - skipped
        assert_built(store, lrea, items, histories)

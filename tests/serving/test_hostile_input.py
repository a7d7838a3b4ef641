"""What somebody else wrote is refused: records, saved tables, Parquet files, names and paths, changed in any way."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recattn.nn import LREA
from recattn.serving import MemoryStore, StateSchema, StateTable, StoreError, append_events, build_states
from tests.helpers.state_tables import ids
from tests.helpers.stores import E, make_schema, stamped_state, stamps_of

records = pytest.importorskip("recattn.serving.stores.records")
HEADER, Kind, RecordFormat = records.HEADER, records.Kind, records.RecordFormat
SCHEMAS = [make_schema(rank=1), make_schema(torch.int8, rank=1, embed_dim=E)]
USER = 7
ENDS = (-(2**63), -1, 0, 2**63 - 1)


# Records


def record_of(schema: StateSchema, kind: Kind, user: int = USER) -> tuple[RecordFormat, bytes]:
    """A format, and a right record of it."""
    record_format = RecordFormat(schema, kind)
    torch.manual_seed(0)
    packed = np.zeros((1, record_format.nbytes), np.uint8)
    packed[:] = np.random.default_rng(0).integers(0, 256, packed.shape)
    headers = packed[:, : HEADER.itemsize].view(HEADER)[:, 0]
    headers[:] = record_format._header
    headers["user_id"] = user
    headers["checksum"] = record_format._checksums(packed.reshape(-1).data)
    return record_format, packed.tobytes()


def is_refused(record_format: RecordFormat, record: bytes) -> bool:
    """Whether a record is refused, with zeros in its place, beside a right one that is served."""
    _, right = record_of(record_format.schema, Kind(int(record_format._header["kind"][0])), 8)
    unpacked = record_format.unpack(np.array([USER, 8]), [record, right])
    assert unpacked.found[1] and unpacked.found[0] == (0 not in unpacked.refusals)
    if not unpacked.found[0]:
        assert not any(x[0].ne(0).any() for x in unpacked.tensors.values())
    return not unpacked.found[0]


RECORDS = [(schema, kind) for schema in SCHEMAS for kind in Kind if kind == Kind.STATE or schema.appendable]


@pytest.mark.parametrize(("schema", "kind"), RECORDS)
def test_a_record_cut_at_any_length_is_refused(schema, kind):
    record_format, record = record_of(schema, kind)
    assert not is_refused(record_format, record)
    for length in range(len(record)):
        assert is_refused(record_format, record[:length]), length


@pytest.mark.parametrize(("schema", "kind"), RECORDS)
def test_a_record_with_a_bit_of_any_byte_flipped_is_refused(schema, kind):
    record_format, record = record_of(schema, kind)
    for at in range(len(record)):
        changed = bytearray(record)
        changed[at] ^= 1 << at % 8
        assert is_refused(record_format, bytes(changed)), at


@settings(max_examples=100)
@given(data=st.data(), schema=st.sampled_from(SCHEMAS))
def test_a_record_spliced_with_any_bytes_is_refused(data, schema):
    record_format, record = record_of(schema, Kind.STATE)
    start = data.draw(st.integers(0, len(record)))
    stop = data.draw(st.integers(start, len(record)))
    changed = record[:start] + data.draw(st.binary(max_size=2 * len(record))) + record[stop:]
    assert changed == record or is_refused(record_format, changed)


FIELDS = [name for name in HEADER.names if name not in ("checksum", "event_id", "expires", "build")]


@settings(max_examples=150)
@given(data=st.data(), name=st.sampled_from(FIELDS), schema=st.sampled_from(SCHEMAS))
def test_a_header_that_says_anything_else_is_refused_whatever_its_checksum(data, name, schema):
    """Other dtype codes and huge sizes, by somebody who computes the checksum too."""
    record_format, record = record_of(schema, Kind.STATE)
    changed = np.frombuffer(bytearray(record), np.uint8).reshape(1, -1)
    header = changed[:, : HEADER.itemsize].view(HEADER)[:, 0]
    field = HEADER.fields[name][0]
    header[name] = np.frombuffer(data.draw(st.binary(min_size=field.itemsize, max_size=field.itemsize)), field)
    header["checksum"] = record_format._checksums(changed.reshape(-1).data)
    same = changed[:, 8:].tobytes() == record[8:]
    assert same or is_refused(record_format, changed.tobytes())


CUTS = (0, 1, 39, 40, 63, 64, 65)


@pytest.mark.parametrize("cut", CUTS)
def test_users_beside_one_whose_record_was_cut_are_served_by_every_call(record_engine, cut):
    schema = make_schema(embed_dim=E)
    store = record_engine.open(schema)
    store.put_many(ids(7, 8, 9), stamped_state([1, 2, 3], schema), event_ids=ids(10, 10, 10))
    record_engine.write_record(8, record_engine.record(8)[:cut])
    info = store.info_many(ids(7, 8, 9))
    # From 64 bytes on the header is whole: reading the state then finds the rest missing.
    assert info.found.tolist() == [True, cut >= 64, True] and info.event_ids.tolist()[::2] == [10, 10]
    assert stamps_of(store.get_many(ids(7, 8, 9), on_invalid="missing")) == [1, 0, 3]
    assert store.put_many(ids(8), stamped_state([5], schema), event_ids=ids(10)).all()
    assert stamps_of(store.get_many(ids(7, 8, 9), histories=True)) == [1, 5, 3]
    record_engine.write_record(8, record_engine.record(8)[:cut])
    assert store.delete_many(ids(7, 8, 9)) == 3


@pytest.mark.parametrize("length", [-1, -(2**63), 21, 2**63 - 1])
def test_a_history_that_claims_a_length_out_of_range_reaches_no_row_of_the_model(length):
    lrea = LREA(8, 20, 4)
    store = MemoryStore(StateSchema.of(lrea, appendable=True), capacity=2)
    state = lrea.export_state(torch.randn(1, 5, 8))
    store.put_many(ids(7), state._replace(lengths=torch.tensor([length])))
    try:
        appended = append_events(store, lrea, ids(7), ids(1), torch.randn(1, 8))
    except ValueError as error:
        assert "state.lengths must be between 0 and 20" in str(error)
    else:
        assert appended.full.all()


# Names, ids and paths


@pytest.mark.parametrize("namespace", ["a\r\nFLUSHALL\r\n", "a\0b", "*", "a:b", "", "x" * 70_000, "ключ"])
def test_any_namespace_keeps_its_users_apart(redis_server, namespace):
    from recattn.serving import RedisStore

    options = {"socket_timeout": 30, "socket_connect_timeout": 30}
    schema = make_schema()
    with (
        RedisStore(redis_server.url, schema, namespace=namespace, **options) as store,
        RedisStore(redis_server.url, schema, namespace=namespace + "a", **options) as other,
    ):
        store.put_many(torch.tensor(ENDS), stamped_state([1, 2, 3, 4], schema))
        assert not other.get_many(torch.tensor(ENDS)).found.any()
        assert other.delete_many(torch.tensor(ENDS)) == 0
        assert stamps_of(store.get_many(torch.tensor(ENDS))) == [1, 2, 3, 4]
        assert store.delete_many(torch.tensor(ENDS)) == 4


@pytest.mark.parametrize("namespace", ["{a", "a}", "{}", None, b"a"])
def test_a_namespace_with_braces_or_that_is_no_string_is_refused(namespace):
    pytest.importorskip("redis")
    from recattn.serving import RedisStore

    with pytest.raises(ValueError, match="namespace must be a string without braces"):
        RedisStore("redis://127.0.0.1:1", make_schema(), namespace=namespace)


def test_ids_at_the_ends_of_int64_are_users_like_others(engine):
    schema = make_schema(embed_dim=E)
    store = engine.open(schema)
    store.put_many(torch.tensor(ENDS), stamped_state([1, 2, 3, 4], schema), ttl=1000)
    assert stamps_of(store.get_many(torch.tensor(ENDS), histories=True)) == [1, 2, 3, 4]
    assert store.info_many(torch.tensor(ENDS)).found.all()
    assert store.delete_many(torch.tensor(ENDS[:1])) == 1
    assert stamps_of(store.get_many(torch.tensor(ENDS))) == [0, 2, 3, 4]


@pytest.fixture
def open_lmdb(tmp_path, monkeypatch):
    pytest.importorskip("lmdb")
    from recattn.serving import LMDBStore

    monkeypatch.chdir(tmp_path)
    return lambda path, **options: LMDBStore(path, make_schema(), **options)


@pytest.mark.parametrize("path", ["a\0b", b"a", None, 3])
def test_a_path_that_is_none_makes_no_folder(open_lmdb, tmp_path, path):
    """LMDB ends a path at a NUL: it made the folder before."""
    with pytest.raises((ValueError, TypeError)):
        open_lmdb(path)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("make", ["file", "dangling", "no/parent", "x" * 300, "", "garbage", "short"])
def test_a_path_that_is_no_store_is_a_store_error(open_lmdb, tmp_path, make):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, content in (("garbage", os.urandom(8192)), ("short", b"x")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(content)
    with pytest.raises(StoreError, match=r"LMDB in .*: "):
        open_lmdb(make)


def test_a_link_to_a_folder_is_the_folder(open_lmdb, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with open_lmdb(tmp_path / "link") as store:
        store.put_many(ids(7), stamped_state([1], store.schema))
    with open_lmdb(tmp_path / "real") as store:
        assert stamps_of(store.get_many(ids(7))) == [1]


# Saved tables

SIZES = {"heads": 2, "rank": 3, "dim": 4, "value_dim": 5}


def saved_table() -> dict[str, torch.Tensor]:
    pytest.importorskip("recattn._slot_map")
    table = StateTable(3, **SIZES)
    table.put(torch.tensor([1, 2]), torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 5))
    return table.state_dict()


def huge(x: torch.Tensor) -> torch.Tensor:
    """2^40 users in a few bytes of a file: a stride of 0."""
    return x[:1].expand(1 << 40, *x.shape[1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {name: huge(state[name]) for name in ("user_ids", "keys", "values")},
        lambda state: {"keys": huge(state["keys"])},
        lambda state: {"checksum": huge(torch.zeros(1))},
        lambda state: {"format_version": huge(torch.ones(1))},
        lambda state: {"keys": state["keys"].to("meta")},
        lambda state: {"checksum": state["checksum"].to("meta")},
        lambda state: {"format_version": state["format_version"].to("meta")},
        lambda state: {"keys": state["keys"].to_sparse()},
        lambda state: {"keys": state["keys"].to(torch.complex64)},
        lambda state: {"user_ids": state["user_ids"].sum()},
    ],
)
def test_a_saved_table_of_claims_is_refused_before_they_are_believed(change):
    saved = saved_table()
    table = StateTable(3, **SIZES)
    with pytest.raises(ValueError, match=r"(of state|capacity|keys) must be"):
        table.load_state_dict({**saved, **change(saved)})
    assert len(table) == 0


# Parquet


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"user_id": list(range(40)), "item_ids": [list(range(user % 7)) for user in range(40)]}
    path = tmp_path_factory.mktemp("histories") / "histories.parquet"
    parquet.write_table(pyarrow.table(rows), path, compression="none")
    return path


def build(path) -> MemoryStore:
    torch.manual_seed(0)
    lrea = LREA(8, 5, 4)
    store = MemoryStore(StateSchema.of(lrea, model="a model"), capacity=64)
    options = {"build": "today", "batch_size": 16, "device": "cpu", "on_progress": None}
    build_states(str(path), lrea, store, items=torch.randn(10, 8), **options)
    return store


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_parquet_file_is_an_error_or_a_build_of_finite_states(histories, data):
    content = bytearray(histories.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    damaged = histories.with_name("damaged.parquet")
    damaged.write_bytes(content)
    try:
        store = build(damaged)
    except Exception as error:
        assert not isinstance(error, MemoryError | AssertionError), error
    else:
        state = store.get_many(torch.arange(40), on_invalid="missing").state
        assert state.keys.isfinite().all() and state.values.isfinite().all()


@pytest.mark.parametrize("column", ["user_id", "event_id"])
def test_an_unsigned_id_that_int64_lacks_is_refused(tmp_path, column):
    """2^64 - 5 was built as the state of user -5."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {"user_id": [1, 2], "event_id": [1, 2]} | {column: [1, 2**64 - 5]}
    table = pyarrow.table({name: pyarrow.array(x, pyarrow.uint64()) for name, x in rows.items()})
    parquet.write_table(table.append_column("item_ids", pyarrow.array([[1], [2]])), tmp_path / "rows.parquet")
    lrea = LREA(8, 5, 4)
    store = MemoryStore(StateSchema.of(lrea), capacity=64)
    with pytest.raises(ValueError, match=rf"column {column} must be below 2\^63, got 18446744073709551611"):
        build_states(
            str(tmp_path / "rows.parquet"), lrea, store, items=torch.randn(10, 8), build="b", event_column="event_id"
        )
    assert not store.get_many(ids(-5)).found.any()

"""States in LMDB: one machine, crash-safe, larger than memory. Readers of any process never wait for the writer."""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from recattn._check import expect, expect_count
from recattn._imports import importing
from recattn.serving.stores.record_store import RecordStore
from recattn.serving.stores.records import CHECKSUM, EXPIRES, HEADER, Buffer, Kind, Unpacked
from recattn.serving.stores.schema import StateSchema
from recattn.serving.stores.store import Marks, StoreError, StoreFullError, alive

with importing("LMDB", module="lmdb", extra="lmdb", user="recattn.serving.LMDBStore"):
    import lmdb

# LMDB calls a write that was cut short EIO, as the first one on a full disk is.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class LMDBStore(RecordStore):
    """States in an LMDB environment, a folder.

    `put_many` is one transaction, on disk when it returns: a process or machine that stops at any moment loses nothing
    that was acknowledged, and a reader sees all of a transaction or nothing. Any number of processes of one machine may
    read, while one at a time writes. Open a folder once per process.

    A store can be sent to another process: it is opened there. Do not use one after a fork.

    Args:
        path: of the folder, made if it is not there.
        schema: of its states.
        max_bytes: the most that the file may grow to. It is address space, not memory.
        readonly: open for reading only.

    Raises:
        ImportError: lmdb or xxhash is not installed.
        StoreError: the environment cannot be opened.
        ValueError: the path has a NUL in it, or max_bytes is negative.
    """

    def __init__(
        self, path: str | Path, schema: StateSchema, *, max_bytes: int = 1 << 40, readonly: bool = False
    ) -> None:
        super().__init__(schema)
        path = os.fspath(path)
        # LMDB would end the path there.
        expect(isinstance(path, str) and "\0" not in path, "path", "a string or Path without NUL", repr(path))
        expect_count("max_bytes", max_bytes)
        self._arguments = (path, schema, max_bytes, readonly)
        with _as_store_errors(path):
            # Without readahead: users are asked for in no order, and a state is two or three pages.
            self._env = lmdb.open(
                path, map_size=max_bytes, max_dbs=3, max_readers=1024, readonly=readonly, readahead=False
            )
            self._env.reader_check()  # what readers that were killed left behind keeps pages from being reused
            names = {Kind.STATE: b"states", Kind.HISTORY: b"histories"}
            # open_db's own would wait for a writer with Python's lock held. One that only reads does not wait.
            with contextlib.nullcontext() if readonly else self._env.begin(write=True) as txn:
                options = {"txn": txn, "create": not readonly}
                self._databases = {kind: self._env.open_db(name, **options) for kind, name in names.items()}
                self._expiries = self._env.open_db(b"expiries", **options)

    def delete_expired(self) -> int:
        deleted = 0
        with self._writing() as txn, txn.cursor(self._expiries) as cursor:
            entries = map(bytes, cursor.iternext(values=False))  # the first to expire first
            for entry in list(itertools.takewhile(lambda entry: not alive(int.from_bytes(entry[:4], "big")), entries)):
                txn.delete(entry, db=self._expiries)
                if not alive(self._expires(txn, key := entry[4:])):  # the state may be another by now
                    deleted += self._forget(txn, key)
        return deleted

    def close(self) -> None:
        self._env.close()

    def __reduce__(self):
        path, schema, max_bytes, readonly = self._arguments
        return _open, (path, schema, max_bytes, readonly)

    def _read(self, ids: np.ndarray, kinds: Sequence[Kind]) -> tuple[list[Unpacked], dict[int, Exception]]:
        keys = _keys(ids)
        with self._reading() as txn:
            records = ([txn.get(key, None, self._databases[kind]) for key in keys] for kind in kinds)
            return [self._formats[kind].unpack(ids, own) for kind, own in zip(kinds, records, strict=True)], {}

    def _read_headers(self, ids: np.ndarray) -> list[Buffer | None]:
        with self._reading() as txn:
            records = (txn.get(key, None, self._databases[Kind.STATE]) for key in _keys(ids))
            return [None if record is None else bytes(record[: HEADER.itemsize]) for record in records]

    def _write(self, ids: np.ndarray, records: list[np.ndarray], marks: Marks) -> np.ndarray:
        written = np.ones(len(ids), bool)
        keys = _keys(ids)
        states, histories = records[0], records[1] if len(records) > 1 else None
        with self._writing() as txn:
            for position in np.argsort(ids, kind="stable").tolist():  # neighbours share pages of the tree
                key = keys[position]
                if marks.replaces is not None and self._version(txn, key) != marks.replaces[position]:
                    written[position] = False
                    continue
                self._forget(txn, key)
                txn.put(key, states[position].data, db=self._databases[Kind.STATE])
                if histories is not None:
                    txn.put(key, histories[position].data, db=self._databases[Kind.HISTORY])
                if expires := int(marks.expires[position]):
                    txn.put(_expiry_key(expires, key), b"", db=self._expiries)
        return written

    def _delete(self, ids: np.ndarray) -> int:
        with self._writing() as txn:
            return sum(self._forget(txn, key) for key in _keys(ids))

    def _version(self, txn: lmdb.Transaction, key: bytes) -> int:
        record = txn.get(key, db=self._databases[Kind.STATE])
        if record is None or not alive(self._expires(txn, key)):
            return 0
        return int.from_bytes(record[CHECKSUM], "little", signed=True)

    def _expires(self, txn: lmdb.Transaction, key: bytes) -> int:
        record = txn.get(key, b"", self._databases[Kind.STATE])
        return int.from_bytes(record[EXPIRES], "little")

    def _forget(self, txn: lmdb.Transaction, key: bytes) -> bool:
        """Delete a user's records and its entry among the expiries."""
        if expires := self._expires(txn, key):
            txn.delete(_expiry_key(expires, key), db=self._expiries)
        txn.delete(key, db=self._databases[Kind.HISTORY])
        return txn.delete(key, db=self._databases[Kind.STATE])

    @contextlib.contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction]:
        with _as_store_errors(self._arguments[0]), self._env.begin(buffers=True) as txn:
            yield txn

    @contextlib.contextmanager
    def _writing(self) -> Iterator[lmdb.Transaction]:
        with _as_store_errors(self._arguments[0]), self._env.begin(write=True, buffers=True) as txn:
            yield txn


def _open(path: str, schema: StateSchema, max_bytes: int, readonly: bool) -> LMDBStore:
    return LMDBStore(path, schema, max_bytes=max_bytes, readonly=readonly)


def _keys(ids: np.ndarray) -> list[bytes]:
    """Big endian, so that users lie in the order of their ids (those below 0 last)."""
    return ids.astype(">i8").view("V8").tolist()


def _expiry_key(expires: int, key: bytes) -> bytes:
    return expires.to_bytes(4, "big") + key


@contextlib.contextmanager
def _as_store_errors(path: str | Path) -> Iterator[None]:
    try:
        yield
    except lmdb.MapFullError as error:
        raise StoreFullError(f"the store in {path} has reached its max_bytes: reopen it with more") from error
    except lmdb.Error as error:
        if error.code in DISK_ERRORS:
            raise StoreFullError(f"the disk of {path} is full or failed: {error}") from error
        raise StoreError(f"LMDB in {path}: {error}") from error
    except OSError as error:  # of the folder
        raise StoreError(f"LMDB in {path}: {error}") from error

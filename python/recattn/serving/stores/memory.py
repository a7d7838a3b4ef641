"""States in this process: a StateTable, and beside it what the table does not hold."""

import itertools
import threading
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from recattn.serving.stores.schema import StateSchema, as_state
from recattn.serving.stores.store import NO_EVENT, Marks, StateInfo, StateStore, StoredStates, alive


class _Entry(NamedTuple):
    event_id: int
    expires: int
    build: int
    version: int
    length: int
    compressed: Tensor | None


_NOBODY = _Entry(NO_EVENT, 0, 0, 0, 0, None)


class MemoryStore(StateStore):
    """States in the memory of this process, for tests and for services whose users fit: a StateTable that grows.

    Nothing outlives the process, and no user is evicted.
    """

    def __init__(self, schema: StateSchema, capacity: int = 1024) -> None:
        self.schema = schema
        self._table = schema.make_table(capacity)
        self._entries: dict[int, _Entry] = {}
        self._versions = itertools.count(1)
        self._lock = threading.RLock()  # table and entries change together

    def __reduce__(self) -> NoReturn:
        raise TypeError("a MemoryStore is the memory of this process: use LMDBStore or RedisStore to share states")

    def _get(self, ids: np.ndarray, histories: bool) -> tuple[StoredStates, dict[int, str]]:
        with self._lock, self._table.request(torch.from_numpy(ids)) as request:
            info = self._info(ids)
            slots = request.slots.where(info.found, self._table.capacity)
            tensors = {name: table.index_select(0, slots) for name, table in request.tables.named().items()}
            entries = [self._entries.get(user, _NOBODY) for user in ids.tolist()] if histories else []
        state = as_state(tensors)
        if histories:
            nothing = torch.zeros(self.schema.rank, self.schema.embed_dim)
            rows = [nothing if entry.compressed is None else entry.compressed for entry in entries]
            compressed = torch.stack(rows) if rows else nothing.new_empty(0, *nothing.shape)
            lengths = torch.tensor([entry.length for entry in entries], dtype=torch.int64)
            state = state._replace(compressed=compressed, lengths=lengths)
        return StoredStates(state, info), {}

    def _put(self, ids: np.ndarray, tensors: dict[str, Tensor], marks: Marks) -> np.ndarray:
        compressed, lengths = tensors.get("compressed"), tensors.get("lengths")
        with self._lock:
            written = np.ones(len(ids), bool)
            if marks.replaces is not None:
                written = self._info(ids).versions.numpy() == marks.replaces
            needed = len(self._table) + len(ids)  # an update takes a second row until it is published
            if needed > self._table.capacity:
                self._table.grow(max(needed, 2 * self._table.capacity))
            rows = torch.from_numpy(written.nonzero()[0])
            states = as_state({name: tensors[name][rows] for name in self.schema.fields})
            entries = {}
            for row in rows.tolist():
                length = 0 if lengths is None else int(lengths[row])
                history = None if compressed is None else compressed[row].clone()
                event_id, expires, build = (int(column[row]) for column in marks[:3])
                entries[int(ids[row])] = _Entry(event_id, expires, build, next(self._versions), length, history)
            # Side by side, so that an interrupt leaves no state with another's history.
            self._table.put(torch.from_numpy(ids)[rows], states)
            self._entries.update(entries)
        return written

    def _delete(self, ids: np.ndarray) -> int:
        with self._lock:
            for user in ids.tolist():
                self._entries.pop(user, None)
            return self._table.erase(torch.from_numpy(ids))

    def delete_expired(self) -> int:
        with self._lock:
            over = [user for user, entry in self._entries.items() if not alive(entry.expires)]
            return self._delete(np.array(over, np.int64))

    def _info(self, ids: np.ndarray) -> StateInfo:
        with self._lock:
            entries = [self._entries.get(user) for user in ids.tolist()]
        columns = np.array([(_NOBODY if entry is None else entry)[:4] for entry in entries], np.int64).reshape(-1, 4)
        found = np.fromiter((entry is not None for entry in entries), bool, len(ids)) & alive(columns[:, 1])
        columns[~found] = _NOBODY[:4]
        return StateInfo(torch.from_numpy(found), *torch.from_numpy(columns).unbind(1))

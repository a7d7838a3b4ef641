"""What the stores share that hold states as records: a record of the state and one of the history per user."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from recattn.serving.stores.records import HEADER, Buffer, Kind, RecordFormat, Unpacked
from recattn.serving.stores.schema import StateSchema, as_state
from recattn.serving.stores.store import (
    NO_EVENT,
    Marks,
    StateInfo,
    StateStore,
    StoredStates,
    StoreUnavailableError,
    alive,
)


class RecordStore(StateStore):
    def __init__(self, schema: StateSchema) -> None:
        self.schema = schema
        self._formats = {kind: RecordFormat(schema, kind) for kind in Kind}

    def _get(self, ids: np.ndarray, histories: bool) -> tuple[StoredStates, dict[int, str]]:
        kinds = (Kind.STATE, Kind.HISTORY) if histories else (Kind.STATE,)
        (read, *rest), unread = self._read(ids, kinds)
        found, refusals = read.found & alive(read.headers["expires"]), dict(read.refusals)
        state = as_state(read.tensors)
        if histories:
            history = rest[0]
            # Two reads of Redis may see two versions. An append then finds that the state is another one by now.
            state = state._replace(**history.tensors)
            found &= history.found
            refusals |= {position: f"has a history that {reason}" for position, reason in history.refusals.items()}
        if not found.all():
            missing = torch.from_numpy(~found)
            for tensor in state:
                if tensor is not None:
                    tensor[missing] = 0
        stored = StoredStates(state, _info(read.headers, found))
        if unread:
            position, error = min(unread.items())
            raise StoreUnavailableError(
                f"the states of {len(unread)} of {len(ids)} users cannot be read (one is {ids[position]}): {error}",
                torch.from_numpy(np.unique(ids[list(unread)])),
                stored,
            ) from error
        return stored, refusals

    def _put(self, ids: np.ndarray, tensors: dict[str, Tensor], marks: Marks) -> np.ndarray:
        kinds = (Kind.STATE, Kind.HISTORY) if self.schema.appendable else (Kind.STATE,)
        records = [self._formats[kind].pack(ids, tensors, marks) for kind in kinds]
        return self._write(ids, records, marks)

    def _info(self, ids: np.ndarray) -> StateInfo:
        heads = self._read_headers(ids)
        found = np.fromiter((self._formats[Kind.STATE].has_identity(head) for head in heads), bool, len(ids))
        nobody = bytes(HEADER.itemsize)
        joined = b"".join(head if here and head else nobody for head, here in zip(heads, found, strict=True))
        headers = np.frombuffer(joined, HEADER)
        found &= alive(headers["expires"])
        return _info(headers, found)

    @abstractmethod
    def _read(self, ids: np.ndarray, kinds: Sequence[Kind]) -> tuple[list[Unpacked], dict[int, Exception]]:
        """The records of each kind, and why those at some positions could not be read."""

    @abstractmethod
    def _read_headers(self, ids: np.ndarray) -> list[Buffer | None]:
        """The first 64 bytes of each state's record, or None."""

    @abstractmethod
    def _write(self, ids: np.ndarray, records: list[np.ndarray], marks: Marks) -> np.ndarray:
        """Write each user's records (a state, and a history or none) together. Returns which were written."""


def _info(headers: np.ndarray, found: np.ndarray) -> StateInfo:
    """Columns of the headers, as of nobody where a user is not found."""
    columns = [headers[name].astype(np.int64) for name in ("event_id", "expires", "build", "checksum")]
    if not found.all():
        for column, missing in zip(columns, (NO_EVENT, 0, 0, 0), strict=True):
            column[~found] = missing
    return StateInfo(torch.from_numpy(found), *map(torch.from_numpy, columns))

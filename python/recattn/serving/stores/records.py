"""States as bytes: one record per user, 64 bytes that say what it is, then the tensors of its state.

Little endian, as on every processor that PyTorch runs on. The history of a user is a record of its own.
"""

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recattn._imports import importing
from recattn.serving.stores.layout import RowLayout
from recattn.serving.stores.schema import DTYPE_CODES, FORMAT_VERSION, MODEL_BYTES, StateSchema
from recattn.serving.stores.store import Marks

with importing("xxhash", module="xxhash", extra="lmdb", user="a store of recattn.serving"):
    from xxhash import xxh3_64_digest

HEADER = np.dtype(
    [
        ("checksum", "<u8"),  # XXH3-64 of all that follows
        ("magic", "S2"),
        ("version", "<u2"),
        ("kind", "u1"),
        ("dtype", "u1"),
        ("heads", "<u2"),
        ("rank", "<u2"),
        ("dim", "<u2"),
        ("value_dim", "<u2"),
        ("embed_dim", "<u2"),
        ("model", f"S{MODEL_BYTES}"),
        ("user_id", "<i8"),
        ("event_id", "<i8"),  # of the newest event in the state, -1 for none
        ("expires", "<u4"),  # seconds since 1970, 0 for never
        ("build", "<u4"),  # CRC-32 of the name of the build that wrote it, 0 for none
    ]
)
MAGIC = b"RS"
_OFFSETS = {name: offset for name, (_, offset, *_) in (HEADER.fields or {}).items()}
IDENTITY = slice(_OFFSETS["magic"], _OFFSETS["user_id"])  # what all records of a schema share
CHECKSUM = slice(0, _OFFSETS["magic"])  # also the version of a state
EXPIRES = slice(_OFFSETS["expires"], _OFFSETS["build"])
Buffer = Any  # bytes, bytearray or memoryview


class Kind(IntEnum):
    STATE = 0
    HISTORY = 1


class Unpacked(NamedTuple):
    headers: np.ndarray  # [U] of HEADER
    tensors: dict[str, Tensor]  # views of one buffer, [U, ...]; zeros where a record is missing or invalid
    found: np.ndarray  # [U] bool: a valid record
    refusals: dict[int, str]  # what is wrong with the record at a position


class RecordFormat:
    """The records of one kind and schema: `nbytes` each."""

    def __init__(self, schema: StateSchema, kind: Kind) -> None:
        self.schema = schema
        fields = schema.fields
        if kind == Kind.HISTORY:
            rows = (torch.float32, (schema.rank, schema.embed_dim))
            fields = {"lengths": (torch.int64, ()), "compressed": rows}
        self._layout = RowLayout(fields, HEADER.itemsize)
        self.nbytes = self._layout.nbytes
        header = np.zeros(1, HEADER)
        header["magic"], header["version"], header["kind"] = MAGIC, FORMAT_VERSION, kind
        header["dtype"], header["model"] = DTYPE_CODES[schema.dtype], schema.model.encode()
        for name in ("heads", "rank", "dim", "value_dim", "embed_dim"):
            header[name] = getattr(schema, name)
        self._header = header
        self._identity = header.tobytes()[IDENTITY]
        self._missing = bytes(self.nbytes)

    def pack(self, user_ids: np.ndarray, tensors: dict[str, Tensor], marks: Marks) -> np.ndarray:
        """Records [U, nbytes] of uint8. The tensors have the schema's shapes and dtypes, on the CPU."""
        records = np.zeros((len(user_ids), self.nbytes), np.uint8)
        headers = records[:, : HEADER.itemsize].view(HEADER)[:, 0]
        headers[:] = self._header
        headers["user_id"], headers["event_id"] = user_ids, marks.event_ids
        headers["expires"], headers["build"] = marks.expires, marks.builds
        for name, view in self.views(torch.from_numpy(records)).items():
            view.copy_(tensors[name])
        headers["checksum"] = self._checksums(records.reshape(-1).data)
        return records

    def unpack(self, user_ids: np.ndarray, records: Sequence[Buffer | None]) -> Unpacked:
        """One copy of all records, and what is wrong with those of another schema or user and with damaged ones."""
        try:
            joined = bytearray().join(records)  # type: ignore[arg-type]
        except TypeError:  # None is among them: cheaper than to look for it
            parts = (self._missing if record is None else record for record in records)
            joined = bytearray().join(parts)
        if len(joined) == len(records) * self.nbytes:
            rows, headers, right = self._verify(joined, user_ids)
            if right.all() or all(records[position] is None for position in (~right).nonzero()[0].tolist()):
                return Unpacked(headers, self.views(torch.from_numpy(rows)), right, {})
        return self._unpack_without_refused(user_ids, records)

    def _unpack_without_refused(self, user_ids: np.ndarray, records: Sequence[Buffer | None]) -> Unpacked:
        parts = (self._missing if record is None or len(record) != self.nbytes else record for record in records)
        rows, headers, right = self._verify(bytearray().join(parts), user_ids)
        refusals = {}
        for position in (~right).nonzero()[0].tolist():
            if (record := records[position]) is not None:
                header = bytes(record[: HEADER.itemsize])
                refusals[position] = self._describe_refusal(header, int(user_ids[position]))
            rows[position] = 0
        return Unpacked(headers, self.views(torch.from_numpy(rows)), right, refusals)

    def _verify(self, joined: bytearray, user_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [U, nbytes], their headers [U], and whether each is a whole record of the schema and its user."""
        rows = np.frombuffer(joined, np.uint8).reshape(len(user_ids), self.nbytes)
        headers = rows[:, : HEADER.itemsize].view(HEADER)[:, 0]
        right = (headers["user_id"] == user_ids) & (headers["checksum"] == self._checksums(joined))
        right &= (rows[:, IDENTITY] == np.frombuffer(self._identity, np.uint8)).all(1)
        return rows, headers, right

    def has_identity(self, record: Buffer | None) -> bool:
        """Whether a record, or its first 64 bytes, is of this kind and schema."""
        return record is not None and len(record) >= HEADER.itemsize and record[IDENTITY] == self._identity

    @property
    def empty(self) -> bytes:
        """A record of nobody: `nbytes` long, with the identity that all records share, and zeros."""
        return self._header.tobytes().ljust(self.nbytes, b"\0")

    def views(self, records: Tensor) -> dict[str, Tensor]:
        """The tensors in records [U, nbytes] of uint8, each [U, ...], without a copy."""
        return self._layout.views(records)

    def _checksums(self, joined: Buffer) -> np.ndarray:
        """[U] of the records in one buffer, each of all that follows its own checksum."""
        hashed = map(memoryview(joined).__getitem__, _hashed_slices(len(joined) // self.nbytes, self.nbytes))
        # Digests are big endian. NumPy reads bytes several times faster than Python's integers.
        return np.frombuffer(b"".join(map(xxh3_64_digest, hashed)), ">u8")

    def _describe_refusal(self, header: bytes, user_id: int) -> str:
        """What a record with this header is, instead of a record of the schema."""
        if len(header) < HEADER.itemsize or header[IDENTITY][: len(MAGIC)] != MAGIC:
            return "is not a record of recattn"
        got, expected = np.frombuffer(header, HEADER)[0], self._header[0]
        for name in ("version", "model", "dtype", "heads", "rank", "dim", "value_dim", "embed_dim", "kind"):
            if got[name] != expected[name]:
                return f"has {name} {_printable(name, got[name])}, not {_printable(name, expected[name])}"
        if got["user_id"] != user_id:
            return f"is that of user {got['user_id']}"
        return "is damaged: its checksum does not match"


@lru_cache
def _hashed_slices(records: int, nbytes: int) -> list[slice]:
    return [slice(start + CHECKSUM.stop, start + nbytes) for start in range(0, records * nbytes, nbytes)]


def _printable(name: str, value: Any) -> str:
    if name == "dtype":
        return next((str(dtype) for dtype, code in DTYPE_CODES.items() if code == value), f"number {value}")
    if name == "model":
        return repr(bytes(value).decode(errors="replace"))
    return str(value)

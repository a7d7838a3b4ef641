"""The states read by `lrea_absorbed_attention`, one row per user, in preallocated tensors."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from recattn._check import expect, expect_choice, expect_dtype, expect_shape, expect_tensors
from recattn._typing import LreaAbsorbedImpl
from recattn.functional import lrea_absorbed_attention
from recattn.nn.lrea import LREAState
from recattn.serving import saved_table
from recattn.serving.slot_map import SlotMap
from recattn.serving.state_values import (
    STATE_DTYPES,
    as_stored,
    invalid_positions,
    raise_invalid,
    user_ids_on_host,
)


class Tables(NamedTuple):
    """The tensors of a StateTable. Their last row is zeros and serves all users who are not in the table."""

    keys: Tensor  # [S + 1, H, r, d]
    values: Tensor  # [S + 1, H, r, dv]
    key_scales: Tensor | None  # [S + 1, H, r], for int8 states
    value_scales: Tensor | None

    def named(self) -> dict[str, Tensor]:
        return {name: table for name, table in self._asdict().items() if table is not None}


class Request:
    """The rows of some users, pinned until the `with` block of `StateTable.request` ends.

    Attributes:
        slots: [U] int64 on the table's device, the row of each user in `tables`; the last row, zeros, for a user who is
            not in the table.
        found: [U] bool on the CPU, whether the user is in the table.
        tables: keys, values and, for int8 states, key_scales and value_scales: arguments of `lrea_absorbed_attention`.
    """

    def __init__(self, tables: Tables, rows: Tensor, out: Tensor | None) -> None:
        self.tables = tables
        self.found = rows >= 0
        slots = rows.where(self.found, len(tables.keys) - 1)
        self._rows = slots.numpy()
        if out is None:
            self.slots = _to_device(slots, tables.keys.device)
        else:
            self.slots = out.copy_(_pinned(slots, out.device), non_blocking=True)
        self._ended = False

    def attend(
        self,
        targets: Tensor,
        target_offsets: Tensor,
        *,
        item_ids: Tensor | None = None,
        negative_slope: float = 0.01,
        invalid: Tensor | None = None,
        impl: LreaAbsorbedImpl | None = None,
    ) -> Tensor:
        """`recattn.lrea_absorbed_attention` of the targets over the states of these users, in the order of the request.

        It has no gradient, whatever requires one, so that the compiled kernel runs: train with `recattn.nn.LREA`.
        Float32 targets are served from a table of any dtype.

        With the counter `invalid`, item ids and offsets out of range are counted and their targets give zeros, instead
        of an error for the whole batch. Keep one counter for the life of the service:

            invalid = torch.zeros(1, dtype=torch.int64, device=table.device)
            scores = request.attend(targets, target_offsets, item_ids=item_ids, invalid=invalid)

        Returns:
            [T, H, dv] in the dtype of `targets`; zeros for the (finite) targets of a user who is not in the table.

        Raises:
            RuntimeError: the `with` block has ended.
            ValueError, NotImplementedError: as in `lrea_absorbed_attention`.
        """
        if self._ended:
            raise RuntimeError("this request is over: its rows may be other users' by now")
        keys, values, key_scales, value_scales = self.tables
        scales = {"key_scales": key_scales, "value_scales": value_scales}
        options = {"negative_slope": negative_slope, "invalid": invalid, "impl": impl}
        with torch.no_grad():
            return lrea_absorbed_attention(
                targets, keys, values, self.slots, target_offsets, item_ids=item_ids, **scales, **options
            )


class StateTable:
    """The absorbed states of up to `capacity` users, in the layout of `lrea_absorbed_attention`:

        keys [S, H, r, d],  values [S, H, r, dv],  int8 also key_scales, value_scales [S, H, r]

    `put` writes a state to a row that no request reads and then publishes it, so a request sees the latest complete
    state of a user, or none. If no row is free, `put` evicts users that no request asked for recently (CLOCK). An
    update needs a second row until it is published: in a full table it evicts another user.

    All methods are thread-safe. Writers run one at a time; a request never waits for a state to be copied.

    On a CUDA device reads and writes are ordered by the current stream. If you use several streams, a reading stream
    must wait for the stream of `put` and `grow`, and must have finished its reads before the `with` block of the
    request ends.

    Source: our own.

    Args:
        capacity: S, the number of users; one more row, of zeros, is allocated.
        heads, rank, dim: H, r, d.
        value_dim: dv, dim by default.
        dtype: float32, bfloat16, float16, or int8 with one scale per row (`lrea_quantize`).
        device: device of the tensors. The map from users to rows stays on the host.

    Raises:
        ValueError: a size or dtype is not supported.
        NotImplementedError: recattn was installed without its compiled host module.
    """

    def __init__(
        self,
        capacity: int,
        *,
        heads: int,
        rank: int,
        dim: int,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = dim if value_dim is None else value_dim
        self._sizes = {"H": heads, "r": rank, "d": dim, "dv": value_dim}
        sizes = {"capacity": capacity, "heads": heads, "rank": rank, "dim": dim, "value_dim": value_dim}
        for name, size in sizes.items():
            expect(isinstance(size, int) and size > 0, name, "a positive integer", size)
        expect(dtype in STATE_DTYPES, "dtype", f"one of {', '.join(map(str, STATE_DTYPES))}", dtype)
        self.dtype = dtype
        self._slot_map = SlotMap(capacity)
        self._writing = threading.Lock()
        self._tables = self._allocate(capacity, torch.device(device))

    def put(
        self,
        user_ids: Tensor,
        keys: Tensor | LREAState,
        values: Tensor | None = None,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
        *,
        on_invalid: Literal["raise", "missing"] = "raise",
    ) -> Tensor:
        """Write states of users, replacing their previous ones. If a user is given twice, the last state counts.

            table.put(user_ids, lrea.export_state(behaviors, seq_lens, dtype=table.dtype))

        A state is invalid if the table cannot hold it: an entry is NaN or infinite, or overflows in the table's dtype,
        or a scale is negative. The check takes one pass over the states and, on CUDA, a synchronisation.

        Args:
            user_ids: [U] int64 or int32 on the CPU, any numbers.
            keys: a state of U users from `LREA.export_state` or `append`, or its keys: [U, H, r, d] floating on any
                device, rounded to the table's dtype (int8: by `lrea_quantize`); or int8 with scales.
            values: [U, H, r, dv], as keys; these and the scales are None beside a state.
            key_scales, value_scales: [U, H, r] float32, the scales of int8 keys and values.
            on_invalid: "raise", or "missing" to erase users with an invalid state, including their previous state, and
                put the others.

        Returns:
            int64 on the CPU, the users erased because their state is invalid; empty with "raise".

        Raises:
            ValueError: a shape or dtype does not match, or a state is invalid with on_invalid="raise". The table is
                unchanged.
            RuntimeError: more users than rows, or requests pin too many rows. The table is unchanged.
        """
        expect_choice("on_invalid", on_invalid, ("raise", "missing"))
        ids = user_ids_on_host(user_ids)
        given = {"keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales}
        if isinstance(keys, LREAState):
            for name in ("values", "key_scales", "value_scales"):
                expect(given[name] is None, name, "None beside a state, which has it", "both")
            given = {name: getattr(keys, name) for name in given}
        else:
            expect(isinstance(keys, Tensor), "keys", "a torch.Tensor or an LREAState", type(keys).__name__)
        states = as_stored(given, {"U": len(ids), **self._sizes}, self.dtype, self.device)
        missing = torch.empty(0, dtype=torch.int64)
        if invalid := invalid_positions(states, self.dtype):
            ids = ids.tolist()
            last = {user: position for position, user in enumerate(ids)}
            invalid = [position for position in invalid if last[ids[position]] == position]
            if invalid and on_invalid == "raise":
                raise_invalid(ids[invalid[0]], invalid[0], given, states, self.dtype, len(invalid))
            missing = torch.tensor([ids[position] for position in invalid], dtype=torch.int64)
            kept = sorted(set(last.values()).difference(invalid))
            ids, states = [ids[position] for position in kept], {name: state[kept] for name, state in states.items()}
        with self._writing:
            self._write(ids, states)
            if len(missing):
                self._slot_map.erase(missing)
        return missing

    @contextmanager
    def request(self, user_ids: Tensor, *, out: Tensor | None = None) -> Iterator[Request]:
        """Pin the rows of users while a request reads them:

            with table.request(user_ids) as request:
                scores = request.attend(targets, target_offsets)

        On CUDA nothing here waits for the device. A CUDA graph reads its slots from one place: `out`. Capture it anew
        after `grow`.

            slots = torch.empty(users, dtype=torch.int64, device=table.device)
            with table.request(user_ids, out=slots) as request, torch.cuda.graph(graph):
                scores = request.attend(targets, target_offsets)
            with table.request(other_ids, out=slots):
                graph.replay()

        Args:
            user_ids: [U] int64 or int32 on the CPU; a user may appear twice.
            out: [U] int64 on the table's device, to be filled and used as the request's `slots`.

        Raises:
            ValueError: `out` has another shape, dtype or device.
        """
        ids = user_ids_on_host(user_ids)
        if out is not None:
            expect_tensors(out=out)
            expect_shape({"U": len(ids)}, "out", out, "U")
            expect_dtype("out", out, (torch.int64,))
            expect(out.device == self.device, "out", f"on {self.device}", out.device)
        rows = self._slot_map.acquire(ids)
        try:
            # Read self._tables after pinning: if `grow` ran in between, only its new tables are sure to have the rows.
            request = Request(self._tables, torch.from_numpy(rows), out)
            try:
                yield request
            finally:
                request._ended = True
        finally:
            self._slot_map.release(rows)

    def attend(self, targets: Tensor, user_ids: Tensor, target_offsets: Tensor, **options: Any) -> Tensor:
        """`Request.attend` in a request for this call only."""
        with self.request(user_ids) as request:
            return request.attend(targets, target_offsets, **options)

    def contains(self, user_ids: Tensor) -> Tensor:
        """Whether each user is in the table, [U] bool on the CPU. Does not count as a use of the user for eviction."""
        return torch.from_numpy(self._slot_map.contains(user_ids_on_host(user_ids)))

    def erase(self, user_ids: Tensor) -> int:
        """Remove users. Returns how many were in the table."""
        return self._slot_map.erase(user_ids_on_host(user_ids))

    def grow(self, capacity: int) -> None:
        """Increase the capacity by copying all rows to new tensors.

        Requests in progress keep the old tensors, so both are in memory until they end.
        """
        expect(isinstance(capacity, int), "capacity", "an integer", capacity)
        with self._writing:
            expect(capacity >= self.capacity, "capacity", f"at least {self.capacity}", capacity)
            tables = self._allocate(capacity, self.device)
            for name, table in tables.named().items():
                table[: self.capacity].copy_(getattr(self._tables, name)[: self.capacity])
            # Tables before the slot map, so that no request gets a row that its tables lack.
            self._tables = tables
            self._slot_map.grow(capacity)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all states on the CPU, to be saved with `torch.save` or in any store of tensors:

            user_ids [U],  keys [U, H, r, d],  values [U, H, r, dv],  int8 also key_scales, value_scales [U, H, r]
            format_version [],  checksum []

        The checksum covers all other tensors; `load_state_dict` raises if it does not match.
        """
        user_ids = torch.from_numpy(self._slot_map.ids())
        with self.request(user_ids) as request:
            rows = request.slots[request.found.to(self.device)]
            states = {name: table[rows].cpu() for name, table in request.tables.named().items()}
        return saved_table.add_checksum({"user_ids": user_ids[request.found], **states})

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put all states from the `state_dict` of a table with the same dtype and sizes.

        Capacity and device may differ. Users of this table who are not in `state` stay as long as there is room, as in
        `put`.

        Raises:
            ValueError: another format version, a damaged state, another dtype or other sizes, or more users than the
                capacity. The table is unchanged.
            RuntimeError: requests pin too many rows. The table is unchanged.
        """
        tables = self._tables.named()
        states = saved_table.select(state, ("user_ids", *tables))
        # Sizes before the checksum, which reads every entry: a damaged file may claim any number of them.
        user_ids = states["user_ids"]
        _expect_saved("user_ids", user_ids, torch.int64, [user_ids.numel()])
        needed = f"at least {len(user_ids)}, the users of state (grow the table)"
        expect(len(user_ids) <= self.capacity, "capacity", needed, self.capacity)
        for name, table in tables.items():
            _expect_saved(name, states[name], table.dtype, [len(user_ids), *table.shape[1:]])
        saved_table.verify_checksum(state)
        states.pop("user_ids")
        self.put(user_ids.cpu(), **states)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a StateTable cannot be pickled, copied or sent to another process: its rows belong to the requests and "
            "the lock of this one; send state_dict() and load_state_dict() it into a StateTable made there"
        )

    def stats(self) -> dict[str, int]:
        """Counts since construction: users found by requests, not found by requests, and evicted by `put`."""
        return self._slot_map.stats()

    def __len__(self) -> int:
        return len(self._slot_map)

    @property
    def capacity(self) -> int:
        return self._slot_map.capacity

    @property
    def device(self) -> torch.device:
        return self._tables.keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(table.nbytes for table in self._tables.named().values())

    def _allocate(self, capacity: int, device: torch.device) -> Tables:
        heads, rank, dim, value_dim = self._sizes.values()
        shape = (capacity + 1, heads, rank)
        scaled = self.dtype == torch.int8
        tables = Tables(
            torch.empty(*shape, dim, dtype=self.dtype, device=device),
            torch.empty(*shape, value_dim, dtype=self.dtype, device=device),
            torch.empty(shape, device=device, dtype=torch.float32) if scaled else None,
            torch.empty(shape, device=device, dtype=torch.float32) if scaled else None,
        )
        for table in tables.named().values():
            table[-1].zero_()
        return tables

    def _write(self, ids: object, states: dict[str, Tensor]) -> None:
        """Write to rows that no request reads, then publish them. If a user is given twice, the last state counts."""
        rows = None
        try:
            rows = self._slot_map.reserve(ids)
            last = rows >= 0
            if np.count_nonzero(last) < len(rows):
                states = {name: state[torch.from_numpy(last).to(state.device)] for name, state in states.items()}
                rows = rows[last]
            index = _to_device(torch.from_numpy(rows), self.device)
            for name, state in states.items():
                _write_rows(getattr(self._tables, name), index, state)
            self._slot_map.publish(rows)
        except BaseException:
            if rows is not None:
                with suppress(ValueError):  # interrupted after they were published
                    self._slot_map.abandon(rows)
            raise


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, to be copied to a device without waiting: PyTorch reuses pinned memory after the copy."""
    return tensor if device.type == "cpu" else tensor.pin_memory()


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return _pinned(tensor, device).to(device, non_blocking=True)


def _write_rows(table: Tensor, index: Tensor, rows: Tensor) -> None:
    width, offset = (size * rows.element_size() for size in (rows.shape[-1], rows.storage_offset()))
    if len(index) >= 16 and width % 16 == 0 and offset % 16 == 0 and rows.is_contiguous() and rows.is_cpu:
        # index_copy_ on a CPU copies entry by entry: view the rows as fewer, larger entries.
        table, rows = table.view(torch.complex128), rows.view(torch.complex128)
    table.index_copy_(0, index, rows)


def _expect_saved(name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int]) -> None:
    got = f"{tensor.dtype} {list(tensor.shape)}"
    expected = f"{dtype} {shape}"
    expect(got == expected, f"{name} of state", f"{expected} (load it into a table like the one that was saved)", got)

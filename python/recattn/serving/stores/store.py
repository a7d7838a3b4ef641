"""What a service needs of a store of states, whatever engine holds them."""

import math
import time
import zlib
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recattn._check import expect, expect_choice, expect_dtype, expect_index, expect_shape, expect_tensors
from recattn.nn.lrea import LREAState
from recattn.serving.state_values import (
    as_stored,
    event_ids_on_host,
    invalid_positions,
    raise_invalid,
    user_ids_on_host,
)
from recattn.serving.stores.schema import STATE_TENSORS, StateSchema

NO_EVENT = -1
OnInvalid = Literal["raise", "missing"]


class StoreError(RuntimeError):
    """A store did not do what it was asked to. What it acknowledged before is safe."""


class StoreUnavailableError(StoreError):
    """The engine cannot be reached, or does not answer; or a node of a cluster, and with it some of the users.

    Attributes:
        user_ids: from `get_many`, else None: [N] int64, the users whose states could not be read.
        stored: from `get_many`, else None: what was read of the others, as with on_invalid="missing".
    """

    def __init__(self, message: str, user_ids: Tensor | None = None, stored: "StoredStates | None" = None) -> None:
        super().__init__(message)
        self.user_ids, self.stored = user_ids, stored


class StoreFullError(StoreError):
    """The engine has no room."""


class StateRefusedError(StoreError):
    """A record that is damaged, or of another format version, model, dtype or size than the store's schema."""


class StateInfo(NamedTuple):
    """What a store knows of users' states."""

    found: Tensor  # [U] bool
    event_ids: Tensor  # [U] int64, the newest event in each state, -1 for none
    expires: Tensor  # [U] int64, seconds since 1970, 0 for never
    builds: Tensor  # [U] int64, `build_number` of the build that wrote it, 0 for none
    versions: Tensor  # [U] int64, which changes with every change of a state, 0 if there is none


class StoredStates(NamedTuple):
    """What `get_many` read, in the order of the user ids."""

    state: LREAState  # zeros for users who were not found; compressed and lengths if the histories were asked for
    info: StateInfo

    @property
    def found(self) -> Tensor:
        """[U] bool."""
        return self.info.found


class Marks(NamedTuple):
    """What is written beside a state."""

    event_ids: np.ndarray
    expires: np.ndarray
    builds: np.ndarray
    replaces: np.ndarray | None  # versions of the states to replace

    def of(self, positions: np.ndarray) -> "Marks":
        events, expires, builds, replaces = self
        replaces = None if replaces is None else replaces[positions]
        return Marks(events[positions], expires[positions], builds[positions], replaces)


class StateStore(ABC):
    """States of users in an engine: `get_many`, `put_many`, `delete_many`, and `info_many` for who is there.

    All methods are thread-safe. What `put_many` and `delete_many` did when they return is acknowledged: it survives the
    end of this process, and that of the engine if that is set up to (see docs/serving.md).

    Source: our own.

    Attributes:
        schema: of all states that it holds.
    """

    schema: StateSchema

    def get_many(self, user_ids: Tensor, *, histories: bool = False, on_invalid: OnInvalid = "raise") -> StoredStates:
        """The states of users, packed: [U, H, r, d] and so on, zeros where one is not found or has expired.

        Args:
            user_ids: [U] int64 or int32 on the CPU; a user may appear twice.
            histories: also read `compressed` and `lengths`, which `LREA.append` needs.
            on_invalid: what to do with a state that is damaged or of another schema: "raise", or "missing" to treat it
                as not found.

        Raises:
            StateRefusedError: such a state, with on_invalid="raise". The message names user, record and schema.
            StoreUnavailableError: the engine, or its part that has some of the users, cannot be reached. The error has
                the states of the others.
            ValueError: an argument does not fit; histories of a schema without them.
        """
        expect_choice("on_invalid", on_invalid, ("raise", "missing"))
        expect(self.schema.appendable or not histories, "histories", "False: the schema has no embed_dim", histories)
        ids = user_ids_on_host(user_ids).astype(np.int64)
        stored, refusals = self._get(ids, histories)
        if refusals and on_invalid == "raise":
            position, reason = min(refusals.items())
            raise StateRefusedError(
                f"the state of user {ids[position]} {reason} (refused: {len(refusals)}; the schema here: "
                f"{self.schema}): build it anew, open the store with the schema that it was written with, or treat "
                'such states as missing by on_invalid="missing"'
            )
        return stored

    def put_many(
        self,
        user_ids: Tensor,
        state: LREAState,
        *,
        event_ids: Tensor | None = None,
        ttl: float | None = None,
        build: str | None = None,
        replaces: StateInfo | None = None,
        on_invalid: OnInvalid = "raise",
    ) -> Tensor:
        """Write the states of users. Each user's state is replaced whole, or not at all.

        Args:
            user_ids: [U] int64 or int32 on the CPU. If a user appears twice, the last state counts.
            state: as from `LREA.export_state`; floating keys and values are cast to the schema's dtype, or quantized.
                `compressed` and `lengths` are stored if the schema has an embed_dim.
            event_ids: [U] int64, not negative: the newest event in each state.
            ttl: seconds, rounded up, until the states expire; never by default.
            build: name of the build that writes them.
            replaces: what `get_many` or `info_many` said of these users, each once: write a state only where the stored
                one is still that. Without `ttl` it keeps its expiry, without `build` its build.
            on_invalid: what to do with states that the schema's dtype cannot hold, NaN and overflow included: "raise",
                or "missing" to delete what is stored of those users.

        Returns:
            [U] bool: whether each state was written: False for an invalid one, and where `replaces` did not match.

        Raises:
            ValueError: an argument does not fit, or a state is invalid. Nothing is written.
            StoreUnavailableError, StoreFullError: some states may be written, others not: put all of them again.
        """
        expect_choice("on_invalid", on_invalid, ("raise", "missing"))
        ids = user_ids_on_host(user_ids).astype(np.int64)
        users = len(ids)
        expect(isinstance(state, LREAState), "state", "an LREAState", type(state).__name__)
        given = {name: getattr(state, name) for name in STATE_TENSORS}
        tensors = as_stored(given, {"U": users, **self.schema.sizes}, self.schema.dtype, torch.device("cpu"))
        invalid = invalid_positions(tensors, self.schema.dtype)
        if invalid and on_invalid == "raise":
            raise_invalid(int(ids[invalid[0]]), invalid[0], given, tensors, self.schema.dtype, len(invalid))
        if self.schema.appendable:
            tensors |= self._histories(state, users)
        marks = _marks(users, event_ids, ttl, build, replaces)
        written = np.ones(users, bool)
        if invalid:
            last = {user: position for position, user in enumerate(ids.tolist())}
            missing = np.array([ids[position] for position in invalid if last[ids[position]] == position], np.int64)
            self._delete(missing)
            written[invalid] = False
            written &= ~np.isin(ids, missing)
        valid = written.nonzero()[0]
        if len(valid) < users:
            ids, marks = ids[valid], marks.of(valid)
            tensors = {name: tensor[torch.from_numpy(valid)] for name, tensor in tensors.items()}
        if len(valid):
            written[valid] = self._put(ids, tensors, marks)
        return torch.from_numpy(written)

    def delete_many(self, user_ids: Tensor) -> int:
        """Delete all that is stored of users. Returns how many of them were there.

        Raises:
            StoreUnavailableError: the engine cannot be reached. Delete again.
        """
        return self._delete(np.unique(user_ids_on_host(user_ids).astype(np.int64)))

    def info_many(self, user_ids: Tensor) -> StateInfo:
        """Which users have a state of this schema, without reading it (nor whether it is damaged)."""
        return self._info(user_ids_on_host(user_ids).astype(np.int64))

    def delete_expired(self) -> int:
        """Delete the states whose time is over, and return how many: run it now and then. `get_many` never returns
        them, but they take room until then. Redis does this itself."""
        return 0

    def close(self) -> None:  # noqa: B027
        """Let go of the engine."""

    def __enter__(self):
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _histories(self, state: LREAState, users: int) -> dict[str, Tensor]:
        compressed, lengths = state.compressed, state.lengths
        expect_tensors(**{"state.compressed": compressed})
        sizes = {"U": users, "r": self.schema.rank, "embed_dim": self.schema.embed_dim}
        expect_shape(sizes, "state.compressed", compressed, "U r embed_dim")
        expect_dtype("state.compressed", compressed, (torch.float32,))
        expect_index(sizes, "state.lengths", lengths, "U")
        return {"compressed": compressed.cpu(), "lengths": lengths.cpu().long()}

    @abstractmethod
    def _get(self, ids: np.ndarray, histories: bool) -> tuple[StoredStates, dict[int, str]]:
        """The states, and what is wrong with those at some positions, which count as not found."""

    @abstractmethod
    def _put(self, ids: np.ndarray, tensors: dict[str, Tensor], marks: Marks) -> np.ndarray:
        """Write states, with their histories if the schema has them. Returns which were written."""

    @abstractmethod
    def _delete(self, ids: np.ndarray) -> int: ...

    @abstractmethod
    def _info(self, ids: np.ndarray) -> StateInfo: ...


def build_number(build: str | None) -> int:
    """The number that records carry for the name of a build."""
    return 0 if build is None else zlib.crc32(build.encode()) or 1


def alive(expires: Any) -> Any:
    """Whether an expiry, or each of an array, is not over."""
    return (expires == 0) | (expires > time.time())


def _marks(
    users: int, event_ids: Tensor | None, ttl: float | None, build: str | None, replaces: StateInfo | None
) -> Marks:
    events = np.full(users, NO_EVENT) if event_ids is None else event_ids_on_host(event_ids, "U", users)
    expires, builds, versions = np.zeros(users, np.int64), np.full(users, build_number(build)), None
    if replaces is not None:
        expect(isinstance(replaces, StateInfo), "replaces", "a StateInfo", type(replaces).__name__)
        expect_shape({"U": users}, "replaces.versions", replaces.versions, "U")
        versions, expires = replaces.versions.numpy(), replaces.expires.numpy()
        builds = replaces.builds.numpy() if build is None else builds
    if ttl is not None:
        expect(isinstance(ttl, int | float) and 0 < ttl < 1 << 31, "ttl", "a positive number of seconds", ttl)
        expires = np.full(users, math.ceil(time.time() + ttl))
    return Marks(events, expires, builds, versions)

"""A table of the states in use, on the device that scores, in front of a store of all of them."""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from recattn._check import expect, expect_choice
from recattn.nn.lrea import LREAState
from recattn.serving.state_table import Request, StateTable
from recattn.serving.state_values import user_ids_on_host
from recattn.serving.stores.store import OnInvalid, StateStore, StoredStates, StoreUnavailableError


class StateCache:
    """Read-through: a request finds its users' states in a `StateTable`, and reads those that are missing from a store.

        cache = StateCache(store, capacity=1_000_000, device="cuda")
        with cache.request(user_ids) as request:
            scores = request.attend(targets, target_offsets)

    A hit costs what it costs in the table: states are read in place, without a copy. States are evicted by CLOCK. All
    methods are thread-safe.

    A change that goes through this cache is seen by its next request. One made elsewhere, a deletion too, is seen after
    `max_age` seconds at the latest, or after `forget`. A state is never served beyond its own expiry.

    Source: our own.

    Args:
        store: where the states are.
        capacity: users in the table. It must hold the users of all requests at a time, twice, as an update needs a
            second row; a request that finds no row raises RuntimeError.
        device: of the table.
        max_age: seconds after which a state is read again.
        on_invalid: "raise", or "missing" to serve users whose stored state is refused as users without a state.
        on_unavailable: "raise" StoreUnavailableError, or "missing" to serve users that the store cannot answer for as
            users without a state: zeros, `found` False, and counted by `stats`. Users in the table who are not older
            than max_age are served either way.
    """

    def __init__(
        self,
        store: StateStore,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        max_age: float = 60.0,
        on_invalid: OnInvalid = "raise",
        on_unavailable: Literal["raise", "missing"] = "raise",
    ) -> None:
        expect(isinstance(store, StateStore), "store", "a StateStore", type(store).__name__)
        expect(isinstance(max_age, int | float) and max_age > 0, "max_age", "a positive number of seconds", max_age)
        expect_choice("on_invalid", on_invalid, ("raise", "missing"))
        expect_choice("on_unavailable", on_unavailable, ("raise", "missing"))
        self.store, self.max_age = store, max_age
        self.table: StateTable = store.schema.make_table(capacity, device)
        self._on_invalid: OnInvalid = on_invalid
        self._on_unavailable = on_unavailable
        self._deadlines = np.zeros(capacity + 1)  # of each row, in seconds since 1970; the last is of missing users
        # Who holds it may write to the table, so that nothing is evicted between a fill and its request.
        self._filling = threading.Lock()
        self._forgotten: dict[object, set[int]] = {}  # by fill in progress: users whose states it must read again
        self._counts: dict[str, int] = dict.fromkeys(("hits", "misses", "not_found", "unavailable"), 0)
        self._counting = threading.Lock()
        self._prefetcher = ThreadPoolExecutor(1, thread_name_prefix="recattn-prefetch")

    @contextlib.contextmanager
    def request(self, user_ids: Tensor, *, out: Tensor | None = None) -> Iterator[Request]:
        """As `StateTable.request`, once the states that the table lacks, or has had for too long, are read.

        Raises:
            StateRefusedError, StoreUnavailableError: as the cache was told to.
            RuntimeError: the requests at this time have more users than the table has rows.
            ValueError: as in `StateTable.request`.
        """
        with contextlib.ExitStack() as pins:
            request = pins.enter_context(self.table.request(user_ids, out=out))
            stale = self._deadlines[request._rows] <= time.time()
            misses = int(np.count_nonzero(stale))
            self._count(hits=len(stale) - misses, misses=misses)
            if misses:
                with pins.pop_all():  # what the first request found stays while the rest is read
                    request = self._fill(user_ids, stale, out, pins)
            yield request

    def attend(self, targets: Tensor, user_ids: Tensor, target_offsets: Tensor, **options: Any) -> Tensor:
        """`Request.attend` in a request for this call only."""
        with self.request(user_ids) as request:
            return request.attend(targets, target_offsets, **options)

    def prefetch(self, user_ids: Tensor) -> "Future[None]":
        """Read what a later request will ask for, in a thread of the cache. The future ends when it is in the table."""

        def fill() -> None:
            with self.request(user_ids):
                pass

        return self._prefetcher.submit(fill)

    def put_many(self, user_ids: Tensor, state: LREAState, **options: Any) -> Tensor:
        """`StateStore.put_many`, and `forget`, also after an error: some states may be written."""
        try:
            return self.store.put_many(user_ids, state, **options)
        finally:
            self.forget(user_ids)

    def delete_many(self, user_ids: Tensor) -> int:
        """`StateStore.delete_many`, and `forget`: no request that begins later sees the states."""
        try:
            return self.store.delete_many(user_ids)
        finally:
            self.forget(user_ids)

    def forget(self, user_ids: Tensor) -> None:
        """Drop users from the table, and from what is being read for it: their states changed in the store."""
        with self._filling:
            for forgotten in self._forgotten.values():
                forgotten.update(user_ids.tolist())
            self.table.erase(user_ids)

    def stats(self) -> dict[str, int]:
        """Counts of users in requests since construction:

        hits         served from the table
        misses       asked of the store, of which: not_found, without a state there (a refused one, if told to);
                     unavailable, of whom the store could not answer
        evictions    from the table
        """
        with self._counting:
            return {**self._counts, "evictions": self.table.stats()["evictions"]}

    def close(self) -> None:
        """End the thread of `prefetch`. The store stays open."""
        self._prefetcher.shutdown()

    def _fill(self, user_ids: Tensor, stale: np.ndarray, out: Tensor | None, pins: contextlib.ExitStack) -> Request:
        """Read the stale users, put them into the table, and pin all users of the request."""
        ids = user_ids_on_host(user_ids)
        while True:
            users, positions = np.unique(ids[stale], return_inverse=True)
            deadline = time.time() + self.max_age
            with self._noting_forgotten() as forgotten:
                stored = self._read(users)
                with self._filling, contextlib.ExitStack() as attempt:
                    if not forgotten.isdisjoint(users.tolist()):
                        continue
                    deadlines = self._write(users, stored, deadline)
                    request = attempt.enter_context(self.table.request(user_ids, out=out))
                    self._deadlines[request._rows[stale]] = deadlines[positions]
                    lost = ~request.found.numpy() & ~stale  # found before, and forgotten since
                    if not lost.any():
                        pins.enter_context(attempt.pop_all())
                        return request
                    stale = stale | lost

    @contextlib.contextmanager
    def _noting_forgotten(self) -> Iterator[set[int]]:
        """The users that `forget` is called with until the block ends."""
        key, forgotten = object(), set()
        with self._filling:
            self._forgotten[key] = forgotten
        try:
            yield forgotten
        finally:
            with self._filling:
                del self._forgotten[key]

    def _read(self, users: np.ndarray) -> StoredStates | None:
        """What the store has of users. None: it is unavailable, and all of them are to be missing."""
        unread = 0
        try:
            stored = self.store.get_many(torch.from_numpy(users), on_invalid=self._on_invalid)
        except StoreUnavailableError as error:
            if self._on_unavailable == "raise":
                raise
            stored, unread = error.stored, len(users) if error.user_ids is None else len(error.user_ids)
        missing = len(users) if stored is None else int((~stored.found).sum())
        self._count(unavailable=unread, not_found=missing - unread)
        return stored

    def _write(self, users: np.ndarray, stored: StoredStates | None, deadline: float) -> np.ndarray:
        """Put what was found into the table and drop the others. Returns each user's deadline, 0 for those."""
        ids = torch.from_numpy(users)
        if stored is None:
            self.table.erase(ids)
            return np.zeros(len(users))
        state, info = stored
        if not info.found.all():
            self.table.erase(ids[~info.found])
            ids = ids[info.found]
            state = state.map(lambda x: x[info.found])
        self.table.put(ids, state)
        expires = info.expires.numpy()
        deadlines = np.where(expires > 0, np.minimum(expires, deadline), deadline)
        return np.where(info.found.numpy(), deadlines, 0)

    def _count(self, **counts: int) -> None:
        with self._counting:
            for name, count in counts.items():
                self._counts[name] += count

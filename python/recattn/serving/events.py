"""New behaviours of users whose states are in a store."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recattn._check import expect, expect_shape, expect_tensors
from recattn.nn.lrea import LREA, LREAState
from recattn.serving.state_values import event_ids_on_host, user_ids_on_host
from recattn.serving.stores.store import StateInfo, StateStore, StoreError

APPLIED, REPEATED, NOT_FOUND, FULL, PENDING = range(5)


class AppendedEvents(NamedTuple):
    """What became of each event, [E] bool each; exactly one is True."""

    applied: Tensor  # the behaviour is in the state
    repeated: Tensor  # it was already: the state has this event or a newer one
    not_found: Tensor  # the user has no state, or none with a history: the next build gives it one
    full: Tensor  # the history has max_len behaviours: build it anew from the newest


def append_events(
    store: StateStore,
    model: LREA,
    user_ids: Tensor,
    event_ids: Tensor,
    behaviors: Tensor,
    *,
    ttl: float | None = None,
    attempts: int = 16,
) -> AppendedEvents:
    """Add behaviours to the states of a store by `LREA.append`, each event once:

        append_events(store, lrea, user_ids, event_ids, embedding(item_ids))

    The ids of a user's events ascend, as a log's offsets or the microseconds of a clock do. An event that is not newer
    than the newest in the user's state is left out, so a batch may be sent again after an error, and all events since
    a snapshot after a build. Events of a user in one batch are applied in the order of their ids.

    Several processes may append at a time: a state is written only if it is still the one that was read; if not, it is
    read again.

    Source: our own.

    Args:
        store: of a schema with embed_dim, so that it keeps histories.
        model: the LREA whose states these are.
        user_ids: [E] integer on the CPU; a user may have several events.
        event_ids: [E] integer, not negative.
        behaviors: [E, embed_dim], the embedding of each event's item.
        ttl: seconds until the changed states expire. By default they keep their expiry.
        attempts: how often a state that others change at the same time is read again.

    Raises:
        ValueError: an argument does not fit, or the store keeps no histories.
        StoreError: the store failed, or others changed a state at each attempt. Send the batch again.
    """
    expect(store.schema.appendable, "store", "of a schema with embed_dim, to append events", str(store.schema))
    users = user_ids_on_host(user_ids).astype(np.int64)
    events = event_ids_on_host(event_ids, "E", len(users))
    expect_tensors(behaviors=behaviors)
    expect_shape({"E": len(users), "embed_dim": model.embed_dim}, "behaviors", behaviors, "E embed_dim")
    outcome = np.full(len(users), PENDING)
    for _ in range(attempts):
        pending = (outcome == PENDING).nonzero()[0]
        if not len(pending):
            return AppendedEvents(*(torch.from_numpy(outcome == code) for code in (APPLIED, REPEATED, NOT_FOUND, FULL)))
        order = pending[np.lexsort((events[pending], users[pending]))]
        outcome[order] = _append_once(store, model, users[order], events[order], behaviors[order], ttl)
    raise StoreError(f"other writers changed the same states {attempts} times while events were appended to them")


def _append_once(
    store: StateStore, model: LREA, users: np.ndarray, events: np.ndarray, behaviors: Tensor, ttl: float | None
) -> np.ndarray:
    """What became of events, sorted by user and id: PENDING where another writer was faster, and of a second copy."""
    owners, owner = np.unique(users, return_inverse=True)
    stored = store.get_many(torch.from_numpy(owners), histories=True)
    outcome = np.full(len(users), PENDING)
    outcome[events <= stored.info.event_ids.numpy()[owner]] = REPEATED
    outcome[~stored.found.numpy()[owner]] = NOT_FOUND
    is_copy = np.zeros(len(users), bool)
    is_copy[1:] = (users[1:] == users[:-1]) & (events[1:] == events[:-1])
    is_new = (outcome == PENDING) & ~is_copy
    # How many new events of its user come before each.
    count = np.cumsum(is_new)
    before = count - is_new
    rank = before - before[np.searchsorted(users, users)]
    fits = is_new & (stored.state.lengths.numpy()[owner] + rank < model.max_len)
    outcome[is_new & ~fits] = FULL
    changed = np.unique(owner[fits])
    if not len(changed):
        return outcome
    state = _append_in_turn(model, stored.state, owner[fits], rank[fits], behaviors[torch.from_numpy(fits)])
    newest = np.zeros(len(owners), np.int64)
    np.maximum.at(newest, owner[fits], events[fits])
    rows = torch.from_numpy(changed)
    written = np.zeros(len(owners), bool)
    written[changed] = store.put_many(
        torch.from_numpy(owners)[rows],
        state.map(lambda x: x[rows]),
        event_ids=torch.from_numpy(newest)[rows],
        ttl=ttl,
        replaces=StateInfo(*(column[rows] for column in stored.info)),
    ).numpy()
    outcome[fits & written[owner]] = APPLIED
    outcome[(outcome == FULL) & np.isin(owner, changed) & ~written[owner]] = PENDING
    return outcome


def _append_in_turn(model: LREA, state: LREAState, owner: np.ndarray, rank: np.ndarray, behaviors: Tensor) -> LREAState:
    """The states after their behaviours, those of a rank at a time: no user has two of them."""
    device = model.w_comp.device
    for turn in range(rank.max() + 1):
        chosen = torch.from_numpy((rank == turn).nonzero()[0])
        rows = torch.from_numpy(owner)[chosen]
        before = state.map(lambda x: x[rows].to(device))  # noqa: B023
        after = model.append(before, behaviors[chosen].to(device))
        for tensor, appended in zip(state, after, strict=True):
            if tensor is not None and appended is not None:
                tensor[rows] = appended.to(tensor.device)
    return state

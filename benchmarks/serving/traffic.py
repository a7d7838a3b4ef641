"""Users, requests and writes of the load on a store, and what every answer must be.

User u's write number n is state (u * HASH + n) % POOL of a pool, and its event id is n. So an answer can be compared
with the direct computation over the pool, bit for bit, for any number of users.
"""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import recattn
from recattn.nn.lrea import LREAState
from recattn.serving import StateSchema, StateStore

POOL, HASH = 4096, 2654435761
ITEMS, DIM, RANK, HISTORY = 10_000, 64, 32, 64
BATCH, MEAN_CANDIDATES, MOST_CANDIDATES = 256, 40, 200
ZIPF = 1.0
SCHEMA = StateSchema(heads=1, rank=RANK, dim=DIM, value_dim=DIM, dtype=torch.int8, model="load")


@cache
def pool() -> LREAState:
    """States of POOL random histories."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lrea = recattn.nn.LREA(embed_dim=DIM, max_len=HISTORY, rank=RANK)
    lengths = torch.randint(1, HISTORY + 1, (POOL,), generator=generator)
    behaviors = torch.randint(ITEMS, (POOL, HISTORY), generator=generator)
    with torch.no_grad():
        state = lrea.export_state(items()[:, 0], lengths, item_ids=behaviors, dtype=torch.int8)
    return state._replace(compressed=None, lengths=None)


@cache
def items() -> Tensor:
    """Item embeddings [I, 1, d]."""
    return torch.randn(ITEMS, 1, DIM, generator=torch.Generator().manual_seed(1))


@cache
def _popularity(size: int) -> np.ndarray:
    """Cumulative share of the most popular, by rank."""
    shares = np.cumsum(1 / np.arange(1, size + 1) ** ZIPF)
    return shares / shares[-1]


def by_popularity(ranks: np.ndarray, size: int) -> np.ndarray:
    """Ids of some ranks: popular ones lie anywhere. HASH is prime."""
    return ranks * HASH % size


def draw_zipf(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    return by_popularity(np.searchsorted(_popularity(size), rng.random(count)), size)


class Question(NamedTuple):
    """Users of a request, and their candidates, ragged."""

    users: np.ndarray  # [U] int64
    item_ids: Tensor  # [T]
    offsets: Tensor  # [U + 1]

    def attend(self, request) -> Tensor:
        return request.attend(items(), self.offsets, item_ids=self.item_ids)


def draw_question(rng: np.random.Generator, users: np.ndarray) -> Question:
    counts = rng.geometric(1 / MEAN_CANDIDATES, len(users)).clip(1, MOST_CANDIDATES)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    return Question(users, torch.from_numpy(draw_zipf(rng, ITEMS, int(offsets[-1]))), offsets)


def slots(users: np.ndarray, numbers: np.ndarray) -> Tensor:
    return torch.from_numpy((users * HASH + numbers) % POOL)


def states(users: np.ndarray, numbers: np.ndarray) -> LREAState:
    rows = slots(users, numbers)
    return pool().map(lambda tensor: tensor[rows])


class Judgement(NamedTuple):
    wrong: np.ndarray  # [U] bool
    missing: np.ndarray  # [U] bool: answered as a user without a state


def judge(question: Question, answer: Tensor, found: Tensor, low: np.ndarray, high: np.ndarray) -> Judgement:
    """An answer is right if all of it is that of one write from `low` to `high`, or zeros where it says "not found"."""
    numbers, missing = low.copy(), ~found.numpy()
    wrong = _differs(question, answer, _expected(question, numbers))
    while (later := wrong & ~missing & (numbers < high)).any():
        numbers[later] += 1
        wrong &= _differs(question, answer, _expected(question, numbers))
    if missing.any():
        wrong[missing] = _differs(question, answer, torch.zeros_like(answer))[missing]
    return Judgement(wrong, missing)


def _expected(question: Question, numbers: np.ndarray) -> Tensor:
    state, rows = pool(), slots(question.users, numbers)
    scales = {"key_scales": state.key_scales, "value_scales": state.value_scales}
    options = {"item_ids": question.item_ids, **scales}
    return recattn.lrea_absorbed_attention(items(), state.keys, state.values, rows, question.offsets, **options)


def _differs(question: Question, got: Tensor, expected: Tensor) -> np.ndarray:
    """[U] bool: a bit of the user's targets differs."""
    differs = (got.view(torch.int32) != expected.view(torch.int32)).flatten(1).any(1)
    owner = torch.repeat_interleave(torch.diff(question.offsets))
    users = torch.zeros(len(question.users), dtype=torch.bool)
    users[owner[differs]] = True
    return users.numpy()


class Truth:
    """What was written, in files that all processes of a run share.

    A user's newest write is number `acknowledged` or, if one was not acknowledged, any up to `started`.
    """

    def __init__(self, folder: Path, users: int) -> None:
        self.users = users
        self._arrays = {}
        for name, dtype in (("started", "i8"), ("acknowledged", "i8"), ("before", "i8"), ("at", "f8")):
            path = folder / name
            self._arrays[name] = np.memmap(path, dtype, "r+" if path.exists() else "w+", shape=users)
        self.started, self.acknowledged, self._before, self._at = self._arrays.values()

    def write(self, put_many: Callable, users: np.ndarray) -> None:
        """Write the next states of users. Each appears once."""
        numbers = self.started[users] + 1
        self.started[users] = numbers
        put_many(torch.from_numpy(users), states(users, numbers), event_ids=torch.from_numpy(numbers))
        # In this order: who reads `acknowledged` first never takes a lower bound that is too high.
        self._before[users] = self.acknowledged[users]
        self._at[users] = time.time()
        self.acknowledged[users] = numbers

    def oldest(self, users: np.ndarray, max_age: float) -> np.ndarray:
        """The oldest write that a request may see that begins now, in a cache of this max_age."""
        acknowledged = self.acknowledged[users]
        return np.where(self._at[users] > time.time() - max_age, self._before[users], acknowledged)

    def settled(self, users: np.ndarray, max_age: float) -> np.ndarray:
        """Of some users, those whose newest write no cache is behind: with one more, `oldest` stays right."""
        users = np.unique(users)
        return users[self._at[users] < time.time() - max_age - 0.1]

    def fill(self, store: StateStore, batch: int = 8192) -> float:
        """Write every user once. Returns users per second."""
        began = time.perf_counter()
        for start in range(0, self.users, batch):
            self.write(store.put_many, np.arange(start, min(start + batch, self.users)))
        return self.users / (time.perf_counter() - began)

    def lost(self, store: StateStore, batch: int = 8192) -> int:
        """Read every user. Returns how many lack what was acknowledged, or have what was never written."""
        lost = 0
        for start in range(0, self.users, batch):
            users = np.arange(start, min(start + batch, self.users))
            state, info = store.get_many(torch.from_numpy(users), on_invalid="missing")
            numbers = info.event_ids.numpy()
            right = (numbers >= self.acknowledged[users]) & (numbers <= self.started[users])
            for got, expected in zip(state[:4], states(users, numbers)[:4], strict=True):
                right &= (got == expected).flatten(1).all(1).numpy()
            lost += int((~right & (self.acknowledged[users] > 0)).sum())
        return lost

"""Threads that ask a cache and rewrite users while a fault comes and goes, and count what they see."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from benchmarks.serving import traffic
from benchmarks.serving.traffic import Truth
from recattn.serving import StateCache, StateStore, StoreError

USERS = 32  # of a request and of a write: small, so that many come in a second
PAUSE = 0.005  # after an error, in seconds


class Traffic:
    """Readers of `cache`, and a writer if a store is given, until the `with` block ends.

    Args:
        readers: the users that each of them asks for.
        writes: the users that the writer rewrites, all by default.
        may_miss: the users who may be served as without a state, nobody by default.

    Attributes:
        counts: "answers" (requests), "wrong" and "missing" (users in them), "whole" (requests with all users found),
            "writes" (acknowledged), and errors by class.
    """

    def __init__(
        self,
        cache: StateCache,
        truth: Truth,
        writes_to: StateStore | None = None,
        *,
        readers: Sequence[np.ndarray],
        writes: np.ndarray | None = None,
        may_miss: np.ndarray | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._cache, self._truth = cache, truth
        self._written = np.arange(truth.users) if writes is None else writes
        self._may_miss = np.zeros(truth.users, bool)
        self._may_miss[[] if may_miss is None else may_miss] = True
        self._changed, self._over = threading.Condition(), threading.Event()
        runs = [(self._read, users) for users in readers]
        runs += [] if writes_to is None else [(self._write, writes_to)]
        self._threads = [threading.Thread(target=self._loop, args=(*run, seed)) for seed, run in enumerate(runs)]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait(self, what: str, more: int = 10, seconds: float = 30.0) -> None:
        """Until there are some more of what `counts` counts, "errors" being any of them."""
        with self._changed:
            enough = self._total(what) + more
            if not self._changed.wait_for(lambda: self._total(what) >= enough or self._dead(), seconds) or self._dead():
                raise TimeoutError(f"waited {seconds:g} s for {more} more {what}: {dict(self.counts)}")

    @property
    def errors(self) -> dict[str, int]:
        return {name: count for name, count in self.counts.items() if name.endswith("Error")}

    def _total(self, what: str) -> int:
        return sum(self.errors.values()) if what == "errors" else self.counts[what]

    def _dead(self) -> bool:
        return not all(thread.is_alive() for thread in self._threads)

    def _loop(self, act: Callable, of: object, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not self._over.is_set():
            try:
                seen = act(of, rng)
            except StoreError as error:
                seen = {type(error).__name__: 1}
                self._over.wait(PAUSE)
            with self._changed:
                self.counts.update(seen)
                self._changed.notify_all()

    def _read(self, users: np.ndarray, rng: np.random.Generator) -> dict[str, int]:
        question = traffic.draw_question(rng, rng.choice(users, USERS))
        low = self._truth.oldest(question.users, self._cache.max_age)
        with self._cache.request(torch.from_numpy(question.users)) as request:
            answer = question.attend(request)
            again = question.attend(request)
        judged = traffic.judge(question, answer, request.found, low, self._truth.started[question.users])
        wrong = judged.wrong | (judged.missing & ~self._may_miss[question.users])
        changed, missing = not torch.equal(answer, again), int(judged.missing.sum())
        return {"answers": 1, "whole": not missing, "wrong": int(wrong.sum()) + changed, "missing": missing}

    def _write(self, store: StateStore, rng: np.random.Generator) -> dict[str, int]:
        users = self._truth.settled(rng.choice(self._written, USERS), self._cache.max_age)
        if len(users):
            self._truth.write(store.put_many, users)
        self._over.wait(PAUSE)
        return {"writes": 1}

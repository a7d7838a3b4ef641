"""Build the states of all users from their histories: Parquet or Ray Data in, a StateStore out."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recattn._check import expect, expect_tensors
from recattn._imports import importing
from recattn.nn.lrea import LREA
from recattn.serving.stores.store import StateStore, build_number

if TYPE_CHECKING:
    import pyarrow


@dataclass
class BuildProgress:
    """How far `build_states` is.

    Attributes:
        total: rows of the dataset.
        built: users whose state was written.
        skipped: rows of users whose state this build had written before: until it was killed, or for an earlier row.
        invalid: users whose state the dtype cannot hold. They have no state now.
        seconds: since the start.
    """

    total: int
    built: int = 0
    skipped: int = 0
    invalid: int = 0
    seconds: float = 0.0

    @property
    def done(self) -> int:
        return self.built + self.skipped + self.invalid

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        return (self.total - self.done) / self.rate if self.rate else float("inf")

    def __str__(self) -> str:
        others = "".join(f", {count:,} {name}" for name in ("skipped", "invalid") if (count := getattr(self, name)))
        left = f"{self.seconds_left:,.0f} s left" if self.done < self.total else f"{self.seconds:,.0f} s in all"
        return f"{self.done:,} of {self.total:,} users{others}, {self.rate:,.0f}/s, {left}"


class StateBuilder:
    """Builds and writes the states of a batch of users, a pyarrow Table. `build_states` drives it; a Ray actor is one.

    Args: as in `build_states`.
    """

    def __init__(
        self,
        model: LREA,
        store: StateStore,
        *,
        items: Tensor,
        build: str,
        user_column: str,
        history_column: str,
        event_column: str | None,
        ttl: float | None,
        device: torch.device | str | None,
    ) -> None:
        expect_tensors(items=items)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._items = copy.deepcopy(model).to(device), items.detach().to(device)
        self._store, self._build, self._ttl = store, build, ttl
        self._user_column, self._history_column, self._event_column = user_column, history_column, event_column

    def __call__(self, batch: "pyarrow.Table") -> dict[str, np.ndarray]:
        """Counts of built, skipped and invalid rows, each [1]. The states are written when it returns."""
        user_ids = self._integers(batch, self._user_column)
        _, first = np.unique(user_ids, return_index=True)
        ids = torch.from_numpy(user_ids[first])
        builds = self._store.info_many(ids).builds.numpy()
        rows = np.sort(first[builds != build_number(self._build)])
        written = np.empty(0, bool)
        if len(rows):
            batch = batch if len(rows) == len(user_ids) else batch.take(rows)
            written = self._build_rows(torch.from_numpy(user_ids[rows]), batch).numpy()
        counts = {"built": written.sum(), "skipped": len(user_ids) - len(rows), "invalid": (~written).sum()}
        return {name: np.array([count]) for name, count in counts.items()}

    def _build_rows(self, user_ids: Tensor, batch: "pyarrow.Table") -> Tensor:
        item_ids, cu_seqlens = self._histories(user_ids, batch)
        events = None
        if self._event_column is not None:
            events = torch.from_numpy(self._integers(batch, self._event_column))
        device = self._items.device
        state = self._model.export_state(
            self._items,
            item_ids=torch.from_numpy(item_ids).to(device),
            cu_seqlens=torch.from_numpy(cu_seqlens).to(device),
            max_seqlen=int(np.diff(cu_seqlens).max(initial=1)),
            dtype=self._store.schema.dtype,
        )
        return self._store.put_many(
            user_ids, state, event_ids=events, ttl=self._ttl, build=self._build, on_invalid="missing"
        )

    def _histories(self, user_ids: Tensor, batch: "pyarrow.Table") -> tuple[np.ndarray, np.ndarray]:
        """Item ids [T] and cu_seqlens [U + 1] of the newest `max_len` behaviours of each user."""
        from pyarrow import types

        column = batch.column(self._history_column).combine_chunks()
        is_list = types.is_list(column.type) or types.is_large_list(column.type)
        fits = is_list and types.is_integer(column.type.value_type)
        expect(fits, f"column {self._history_column}", "lists of integers", column.type)
        lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        item_ids = column.flatten()
        nulls = item_ids.null_count
        expect(not nulls, f"column {self._history_column}", "lists without nulls in them", f"{nulls} nulls")
        item_ids = item_ids.to_numpy(zero_copy_only=False).astype(np.int64)
        ends = np.cumsum(lengths)
        kept = np.minimum(lengths, self._model.max_len)
        cu_seqlens = np.concatenate([[0], np.cumsum(kept)])
        if len(item_ids) > cu_seqlens[-1]:
            item_ids = item_ids[np.arange(cu_seqlens[-1]) + np.repeat(ends - cu_seqlens[1:], kept)]
        wrong = (item_ids < 0) | (item_ids >= len(self._items))
        if wrong.any():
            position = int(wrong.argmax())
            user = user_ids[int(np.searchsorted(cu_seqlens, position, "right")) - 1].item()
            expected = f"between 0 and {len(self._items) - 1}, the rows of items"
            raise ValueError(f"{self._history_column} of user {user} must be {expected}, got {item_ids[position]}")
        return item_ids, cu_seqlens

    @staticmethod
    def _integers(batch: "pyarrow.Table", name: str) -> np.ndarray:
        from pyarrow import types

        column = batch.column(name)
        integers = types.is_integer(column.type) and not column.null_count
        expect(integers, f"column {name}", "integers without nulls", f"{column.type}, {column.null_count} nulls")
        values = column.to_numpy()
        largest = values.max(initial=0)
        # An unsigned id would become another user's.
        expect(largest < 1 << 63, f"column {name}", "below 2^63", largest)
        return values.astype(np.int64)


def build_states(
    dataset: Any,
    model: LREA,
    store: StateStore,
    *,
    items: Tensor,
    build: str,
    user_column: str = "user_id",
    history_column: str = "item_ids",
    event_column: str | None = None,
    ttl: float | None = None,
    batch_size: int = 4096,
    device: torch.device | str | None = None,
    workers: int | None = None,
    on_progress: Callable[[BuildProgress], object] | None = print,
) -> BuildProgress:
    """Compress, absorb and store the history of every user of a dataset:

        build_states("histories/", lrea, store, items=embedding.weight, build="2026-11-29")

    A row is a user: its id, and the list of the item ids of its behaviours, the oldest first, of which the newest
    `max_len` count. A state is written by one `put_many` with others of its batch, and says which build wrote it. A
    build that was killed goes on where you start it again under its name: users whose state it wrote are skipped, so
    none is lost or done twice. If a user has two rows, the first counts; by Ray, one of them.

    From Parquet everything runs in this process. A Ray dataset (`ray.data.read_parquet`, or any other) is built by
    actors, one per GPU of the cluster, or else per CPU, or `workers` of them. Each opens the store, so it must be one
    that can be sent there: LMDBStore on one machine, RedisStore anywhere.

    After a build from yesterday's histories, send the events since then to `append_events` again: those that a state
    has already are left out, if the dataset told the newest event of each user in `event_column`.

    Source: our own.

    Args:
        dataset: path or paths of Parquet files or folders, a pyarrow dataset, or a Ray dataset.
        model: the LREA whose states these are.
        store: where they go, in the dtype of its schema.
        items: [I, embed_dim], the embedding of each item.
        build: names this build, such as a date.
        user_column, history_column: names of the columns: integers, and lists of integers.
        event_column: of the newest event in each history, integers that are not negative, or None.
        ttl: seconds until the states expire; never by default.
        batch_size: users at a time.
        device: of the computation, a GPU if there is one.
        workers: number of Ray actors.
        on_progress: called after every batch. print says "412,000 of 1,000,000 users, 21,300/s, 28 s left".

    Returns:
        What was done in all.

    Raises:
        ValueError: a column is missing or has another type, or an item id is out of range. The message names the user.
        StoreError: the store failed. What it acknowledged stays; start the build again.
        ImportError: pyarrow, or for a Ray dataset ray, is not installed.
    """
    with importing("PyArrow", module="pyarrow", extra="parquet", user="recattn.serving.build_states"):
        from pyarrow import dataset as parquet
    options = {
        "build": build,
        "user_column": user_column,
        "history_column": history_column,
        "event_column": event_column,
        "ttl": ttl,
        "device": device,
    }
    columns = [name for name in dict.fromkeys((user_column, history_column, event_column)) if name is not None]
    start = time.monotonic()
    if hasattr(dataset, "map_batches"):
        _expect_columns(dataset.columns(), columns)
        dataset, total = dataset.select_columns(columns), dataset.count()
        counts = _built_by_ray(dataset, model, store, items, options, batch_size, workers)
    else:
        expect(workers is None, "workers", "None without Ray: this process builds", workers)
        if not isinstance(dataset, parquet.Dataset):
            dataset = parquet.dataset(dataset, format="parquet")
        _expect_columns(dataset.schema.names, columns)
        builder = StateBuilder(model, store, items=items, **options)
        total, counts = dataset.count_rows(), map(builder, _batches(dataset, columns, batch_size))
    progress = BuildProgress(total)
    for counted in counts:
        for name, count in counted.items():
            setattr(progress, name, getattr(progress, name) + int(np.sum(count)))
        progress.seconds = time.monotonic() - start
        if on_progress is not None:
            on_progress(progress)
    return progress


def _expect_columns(present: list[str], columns: list[str]) -> None:
    for name in columns:
        expect(name in present, f"column {name}", f"one of the dataset, {', '.join(present)}", "no such column")


def _batches(dataset: Any, columns: list[str], batch_size: int) -> "Iterator[pyarrow.Table]":
    """Tables of at least `batch_size` rows, but for the last: row groups may be smaller."""
    import pyarrow

    pending, rows = [], 0
    for batch in dataset.to_batches(columns=columns, batch_size=batch_size):
        pending.append(batch)
        rows += len(batch)
        if rows >= batch_size:
            yield pyarrow.Table.from_batches(pending)
            pending, rows = [], 0
    if rows:
        yield pyarrow.Table.from_batches(pending)


def _built_by_ray(
    dataset: Any,
    model: LREA,
    store: StateStore,
    items: Tensor,
    options: dict[str, Any],
    batch_size: int,
    workers: int | None,
) -> Iterable[dict[str, np.ndarray]]:
    """The counts of each batch, as actors finish them."""
    with importing("Ray", module="ray", extra="ray", user="recattn.serving.build_states of a Ray dataset"):
        import ray
        import ray.data

    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0)) if options["device"] != "cpu" else 0
    counts = dataset.map_batches(
        _RayBuilder,
        fn_constructor_args=(copy.deepcopy(model).cpu(), store, ray.put(items.detach().cpu()), options),
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers or gpus or int(resources["CPU"])),
        num_cpus=0.5,  # of what Ray counts: the other half is for the tasks that read, which need little
        num_gpus=1 if gpus else 0,
    )
    return counts.iter_batches(batch_size=None, batch_format="numpy")


class _RayBuilder(StateBuilder):
    """A StateBuilder whose items come from Ray's object store, where all actors of a machine share them."""

    def __init__(self, model: LREA, store: StateStore, items: Any, options: dict[str, Any]) -> None:
        import ray

        super().__init__(model, store, items=ray.get(items), **options)

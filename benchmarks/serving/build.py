"""`python -m benchmarks.serving.build`: the states of a million users, from Parquet and by Ray, then a table of them.

Histories are Zipf-ragged, items Zipf-popular. Afterwards every state is read into a StateTable through a StateCache,
and those of a batch are compared with the direct computation, bit for bit.
"""

import argparse
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from rich.console import Console

from benchmarks.harness import records
from benchmarks.report import serving as report
from benchmarks.serving.outcomes import StateBuild
from recattn.nn import LREA
from recattn.serving import LMDBStore, StateCache, StateSchema, build_states

RANK, DIM, LONGEST, ITEMS = 32, 64, 200, 20_000
ROWS_PER_FILE, BATCH = 50_000, 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--by", nargs="+", choices=("parquet", "ray"), default=("parquet", "ray"))
    parser.add_argument("--folder", type=Path, help="where Parquet files and states are kept meanwhile")
    parser.add_argument("--out", type=Path, help="append the record to this file")
    arguments = parser.parse_args()
    common = records.environment(torch.device("cpu")) | {"cores": len(os.sched_getaffinity(0))}
    builds = []
    for by in arguments.by:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            builds.append(measure(by, arguments.users, Path(folder)))
    Console(width=160).print(report.build_table(builds))
    if arguments.out:
        records.append_lines(map(asdict, builds), common, arguments.out)


def measure(by: str, users: int, folder: Path) -> StateBuild:
    torch.manual_seed(0)
    lrea, items = LREA(DIM, LONGEST, RANK), torch.randn(ITEMS, DIM)
    (folder / "histories").mkdir()
    behaviors = write_histories(folder / "histories", users)
    schema = StateSchema.of(lrea, torch.int8, items=items)
    with LMDBStore(folder / "states", schema) as store:
        start = time.perf_counter()
        build_states(dataset(by, folder / "histories"), lrea, store, items=items, build="a", on_progress=Progress())
        build_s = time.perf_counter() - start
        user_ids = torch.arange(users)
        start = time.perf_counter()
        cache = StateCache(store, users + BATCH, max_age=3600)
        for batch in user_ids.split(BATCH):
            cache.prefetch(batch).result()
        load_s = time.perf_counter() - start
        assert len(cache.table) == users and cache.stats()["not_found"] == 0
        cache.close()
        equal = equals_direct(cache, folder / "histories", lrea, items)
    disk_mb = sum(file.stat().st_size for file in (folder / "states").iterdir()) / 1e6
    return StateBuild(
        built_by=by, users=users, behaviors=behaviors, build_s=build_s, load_s=load_s, disk_mb=disk_mb, equal=equal
    )


def write_histories(folder: Path, users: int) -> float:
    """Parquet files. Returns the mean length of a history."""
    draw, count = np.random.default_rng(0), 0
    for first in range(0, users, ROWS_PER_FILE):
        rows = min(ROWS_PER_FILE, users - first)
        lengths = 8 * np.minimum(draw.zipf(1.3, rows), 2 * LONGEST // 8)  # a draw may be as large as int64
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        item_ids = (draw.zipf(1.2, offsets[-1]) % ITEMS).astype(np.int32)
        histories = pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(item_ids))
        table = pyarrow.table({"user_id": np.arange(first, first + rows), "item_ids": histories})
        pyarrow.parquet.write_table(table, folder / f"{first:09}.parquet", row_group_size=BATCH)
        count += len(item_ids)
    return count / users


def dataset(by: str, folder: Path):
    if by == "parquet":
        return str(folder)
    import ray

    ray.init(include_dashboard=False, ignore_reinit_error=True, log_to_driver=False, object_store_memory=1 << 30)
    return ray.data.read_parquet(str(folder))


class Progress:
    """Prints how far a build is, every ten seconds."""

    def __init__(self) -> None:
        self._next = 0.0

    def __call__(self, progress) -> None:
        if time.monotonic() >= self._next or progress.done == progress.total:
            print(progress, flush=True)
            self._next = time.monotonic() + 10


def equals_direct(cache: StateCache, folder: Path, lrea: LREA, items: torch.Tensor) -> bool:
    """Whether the states of the first batch are those of the direct computation of that batch, bit for bit."""
    table = pyarrow.parquet.ParquetFile(sorted(folder.iterdir())[0]).read_row_group(0)
    histories = [torch.tensor(history[-LONGEST:]) for history in table["item_ids"].to_pylist()]
    offsets = torch.tensor([0, *map(len, histories)]).cumsum(0)
    expected = lrea.export_state(items, item_ids=torch.cat(histories), cu_seqlens=offsets, dtype=torch.int8)
    with cache.request(torch.from_numpy(table["user_id"].to_numpy().copy())) as request:
        rows = [x[request.slots] for x in request.tables.named().values()]
    return all(torch.equal(row, right) for row, right in zip(rows, expected[:4], strict=True))


if __name__ == "__main__":
    main()

"""A row of results, and the files of JSON lines that rows are written to, one per line."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from benchmarks.harness.goals import Outcome
from recattn import _environment

Kind = TypeVar("Kind")
TIMED, NOT_RUN, REFUSED, FAILED = "timed", "not run", "refused: wrong", "failed"

# Records written before a name or a sentence changed keep the old one; they are read as the new one.
RENAMED = {("refined_attention", "recattn cuda"): "recattn chunked"}
REWORDED = {"it is what the row recattn runs here": "same as the recattn row on this device"}


@dataclass(kw_only=True)
class Row:
    """One implementation of one operator on one workload in one direction. A field is None if it was not measured."""

    op: str
    workload: str
    shape: dict[str, object]
    dtype: str
    impl: str
    direction: str
    data: str  # source of the sequence lengths and items
    status: str = TIMED
    reason: str | None = None  # why the status is not TIMED
    p10_ms: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    host_ms: float | None = None  # host time of a call on an idle GPU: until it returns, not until it has finished
    samples: int = 0
    spread: float | None = None  # half the 95% confidence interval of the median time, relative to it
    waiting: float | None = None  # share of the time that threads waited for a core used by other programs
    tflops: float | None = None
    gbs: float | None = None
    ceiling_fraction: float | None = None
    peak_bytes: int | None = None  # most memory in use at one time, not counting the inputs
    max_error: float | None = None  # of the output, against float64
    error_share: float | None = None  # largest error of output and gradients, as a share of its bound
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    gate_shape: dict[str, object] | None = None
    ceilings: dict[str, float] = field(default_factory=dict)  # the better of the measurements before and after
    goals: list[Outcome] = field(default_factory=list)


class Record(NamedTuple):
    """A row, and what all rows of its run share (device, versions, commit)."""

    row: Row
    run: dict[str, object]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device) -> dict[str, object]:
    """What all rows of a run share: the machine, versions, the commit, and when it started."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        **_environment.describe(device),
        "dirty": bool(_environment.git("status", "--porcelain")),
        "started": started,
    }


def append(rows: Iterable[Row], common: dict[str, object], path: Path) -> None:
    """Write one JSON object per row. What the rows of a run share is repeated in each."""
    append_lines(map(asdict, rows), common, path)


def append_lines(records: Iterable[dict[str, object]], common: dict[str, object], path: Path) -> None:
    lines = "".join(json.dumps({**record, **common}, allow_nan=False) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:  # written at once: an interrupt leaves no part of a line
        file.write(lines)


def read(paths: Iterable[Path]) -> list[Record]:
    """The rows of `benchmarks.run` in the given files, and in the files of the given folders, sorted by file name.

    Raises ValueError if a file does not hold such rows, or if there are no rows at all.
    """
    paths = list(paths)
    records = []
    for file in (file for path in paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])):
        try:
            written = [json.loads(line) for line in file.read_text().splitlines()]
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: expected JSON lines of benchmarks.run, got {error}") from error
        records += [_record(fields_of) for fields_of in written if "direction" in fields_of]
    if not records:
        raise ValueError(f"{', '.join(map(str, paths))}: expected rows of benchmarks.run, found none")
    return records


def read_newest(kind: type[Kind], paths: Iterable[Path]) -> tuple[list[Kind], dict[str, object]]:
    """The rows of a dataclass that `append_lines` wrote, of the newest run in the files of the given folders, and what
    they share. The dataclass' first field has a name that no other kind of row has.
    """
    own = [f.name for f in fields(kind)]
    written = [
        json.loads(line)
        for path in paths
        for file in sorted(path.glob("*.jsonl"))
        for line in file.read_text().splitlines()
        if f'"{own[0]}"' in line
    ]
    if not written:
        return [], {}
    newest = max(row["started"] for row in written)
    rows = [row for row in written if row["started"] == newest]
    found = [kind(**{name: row[name] for name in own if name in row}) for row in rows]
    return found, {name: value for name, value in rows[0].items() if name not in own}


def _record(written: dict[str, object]) -> Record:
    own = {f.name for f in fields(Row)} & written.keys()
    row = Row(**{name: written[name] for name in own})
    row.impl = RENAMED.get((row.op, row.impl), row.impl)
    row.reason = REWORDED.get(row.reason, row.reason)
    row.goals = [Outcome(**goal) for goal in row.goals]
    return Record(row, {name: value for name, value in written.items() if name not in own})

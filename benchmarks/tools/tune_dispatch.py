"""`python -m benchmarks.tools.tune_dispatch`: measure the fastest path of sink_attention for each shape, and record it.

Every path that supports a shape is checked against float64 and timed, forward alone and forward+backward. The choice is
the path with the least forward+backward time, because the backward must run on the path of the forward. The file has
for each device

    {"torch": …, "triton": …, "rows": [{"dtype": …, "head_dim": …, "length": …, "sink_share": …, "causal": …,
     "packed": …, "choice": …, "times_ms": {path: …}, "forward_ms": {path: …}}, …]}

times_ms is forward+backward. A path is "triton", or "correction:" followed by its backend. `length` is that of the
longest sequence, `sink_share` the sinks of a sequence divided by its length.
"""

import argparse
import json
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import torch

from benchmarks import DISPATCH_TABLE
from benchmarks.data import movielens
from benchmarks.harness import records
from benchmarks.harness.ceilings import measure_ceilings
from benchmarks.harness.contest import Contest, Settings
from benchmarks.harness.memory import limit_memory
from benchmarks.harness.registry import FORWARD, TRAINING
from benchmarks.harness.timing import clock_for
from benchmarks.harness.workloads import SinkWorkload, gpu_sink_workload
from benchmarks.operators.sink_attention import PATHS, SINK_ATTENTION
from recattn.ops.sink_attention.dispatch import Shape

TOKENS = 16384
WARM_UP = 0.4  # estimated share of the time spent compiling and checking


class Point(namedtuple("Point", [name for name in Shape._fields if name != "device"])):
    """What a row of the table says about a shape: everything the choice depends on except the device."""

    @property
    def workload(self) -> SinkWorkload:
        sinks = max(1, round(self.sink_share * self.length))
        options = {"causal": self.causal, "gate_batch": 1}
        if self.packed:
            options |= {"ragged": True, "batch": TOKENS // 256, "gate_batch": 4}
        return gpu_sink_workload("dispatch", TOKENS, self.length, self.head_dim, sinks, **options)


# For a point: the milliseconds of each path that supports it, forward alone and forward+backward.
Measure = Callable[[Point], Mapping[str, tuple[float, float]]]


def grid() -> list[Point]:
    """The most important shapes first, because time may run out."""
    dense = [
        Point("bfloat16", dim, length, share, causal, False)
        for length, dim, causal, share in product((1024, 512, 2048, 4096, 256, 8192), (64, 128), (False, True), (0.1,))
    ]
    packed = [
        Point("bfloat16", dim, length, 0.1, causal, True)
        for length, dim, causal in product((2048, 512), (64, 128), (False, True))
    ]
    shares = [
        Point("bfloat16", 64, length, share, causal, False)
        for length, share, causal in product((512, 2048, 8192), (0.02, 0.3), (False, True))
    ]
    others = [
        Point(dtype, dim, 1024, 0.1, causal, False)
        for (dtype, dim), causal in product((("float32", 64), ("bfloat16", 32), ("bfloat16", 256)), (False, True))
    ]
    return dense + packed + shares + others


def contest_on(device: torch.device, seconds: float) -> Measure:
    """Measure a point with the gate and the clocks of the suite, timing each direction for `seconds`."""
    clock, histories = clock_for(device), movielens.load(offline=True)
    dtypes = {point.dtype: getattr(torch, point.dtype) for point in grid()}
    ceilings = measure_ceilings(device, dtypes.values(), clock, quick=True)
    contestants = [SINK_ATTENTION.implementations[f"recattn {path}"] for path in PATHS]

    def measure(point: Point) -> dict[str, tuple[float, float]]:
        settings = Settings(
            device, dtypes[point.dtype], histories, lambda: ceilings, clock, seconds, (FORWARD, TRAINING)
        )
        rows = Contest(SINK_ATTENTION, point.workload, contestants, settings).run()
        times: dict[str, dict[str, float | None]] = {}
        for row in rows:
            times.setdefault(row.impl.removeprefix("recattn "), {})[row.direction] = row.p50_ms
            if row.status in (records.REFUSED, records.FAILED):
                print(f"{point}: {row.impl} {row.status}: {row.reason}", file=sys.stderr)
        return {path: (own[FORWARD], own[TRAINING]) for path, own in times.items() if None not in own.values()}

    return measure


def measure_rows(points: Iterable[Point], measure: Measure, seconds: float, now: Callable[[], float]) -> list[dict]:
    """A row for each point that some path supports, until the time is up."""
    deadline = now() + seconds
    rows = []
    for point in points:
        if now() >= deadline:
            break
        times = measure(point)
        if times:
            rows.append(
                point._asdict()
                | {
                    "choice": min(times, key=lambda path: times[path][1]),
                    "times_ms": {path: round(training, 4) for path, (_, training) in times.items()},
                    "forward_ms": {path: round(forward, 4) for path, (forward, _) in times.items()},
                }
            )
            print(f"{point}: {rows[-1]['choice']} {rows[-1]['times_ms']}", flush=True)
    return rows


def merge(table: Mapping[str, dict], device: str, versions: Mapping[str, str | None], rows: Sequence[dict]) -> dict:
    """The table with the rows merged in. Older rows of the device stay if their torch and triton are the same."""

    def point(row: dict) -> Point:
        return Point(*(row[name] for name in Point._fields))

    old = table.get(device, {})
    same = all(old.get(name) == version for name, version in versions.items())
    merged = {point(row): row for row in [*(old["rows"] if same and old else []), *rows]}
    return {**table, device: {**versions, "rows": [merged[key] for key in sorted(merged)]}}


def to_json(table: Mapping[str, dict]) -> str:
    """JSON with one line per row."""
    devices = []
    for device, entry in sorted(table.items()):
        versions = "".join(f"{json.dumps(k)}: {json.dumps(v)}, " for k, v in entry.items() if k != "rows")
        rows = ",\n".join(f"    {json.dumps(row)}" for row in entry["rows"])
        devices.append(f'  {json.dumps(device)}: {{{versions}"rows": [\n{rows}\n  ]}}')
    return "{\n" + ",\n".join(devices) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.tune_dispatch", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=85.0, help="time for all measurements, 85 by default")
    parser.add_argument("--table", type=Path, nargs="+", default=[DISPATCH_TABLE], help="files to merge into")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device here; on a CPU there is nothing to choose")
    device, points = torch.device("cuda"), grid()
    limit_memory(device)
    measure = contest_on(device, seconds=chosen.seconds * (1 - WARM_UP) / len(points) / 2)
    rows = measure_rows(points, measure, chosen.seconds, time.monotonic)
    environment = records.environment(device)
    versions = {name: environment[name] for name in ("torch", "triton")}
    for path in chosen.table:
        table = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(to_json(merge(table, environment["device"], versions, rows)))
    print(f"{len(rows)} of {len(points)} points in {', '.join(map(str, chosen.table))}")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.quality.din_serving`: the time to serve target attention, full and from LREA's states.

One user and 1000 candidates on one thread: the interest alone, without the layers after it. Weights are random. The dot
product has its keys and values cached.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import records
from benchmarks.harness.timing import CpuClock, finite, measure, percentile
from benchmarks.quality.din import DIN, DOT, LREA_RANKS, Hyperparameters, new_attention, shares
from benchmarks.quality.training import new_table
from recattn.nn import LREA, LREAState

SERVING = "din serving"
SERVED_CANDIDATES = 1000
SERVED_LENGTHS = (200, 10_000)
CACHED_ELEMENTS = 2**18  # scores or hidden units in a block of candidates


@dataclass(kw_only=True)
class ServingRow:
    """The attention of one user and `candidates`, from what is stored per user; without the layers after it."""

    op: str = "lrea_attention"
    workload: str = SERVING
    model: str
    dtype: str
    length: int
    candidates: int
    dim: int
    bytes_per_user: int
    p50_ms: float
    spread: float | None  # of the median; None after too few rounds
    waiting: float


def serving_calls(length: int, candidates: int, hyper: Hyperparameters) -> dict[tuple[str, str], tuple[int, Callable]]:
    """(model, dtype) -> bytes stored per user, and a call that attends for all candidates of one user. Random weights.

    The dot product stores projected keys and values. Both full attentions process the candidates in blocks, so that
    intermediate results stay in the cache.
    """
    torch.manual_seed(0)
    targets, behaviors = torch.randn(1, candidates, hyper.dim), torch.randn(1, length, hyper.dim)
    dot, din = (new_attention(model, hyper) for model in (DOT, DIN))
    keys, values, even = dot.key(behaviors), dot.value(behaviors), shares(torch.tensor([length]), length)

    calls = {
        (DOT, "float32"): (
            size_of(keys, values),
            lambda: in_blocks(lambda part: dot.attend(part, keys, values, even), targets, length),
        ),
        (DIN, "float32"): (
            size_of(behaviors),
            lambda: in_blocks(lambda part: din(part, behaviors), targets, length * hyper.activation_units),
        ),
    }
    for model, rank in LREA_RANKS.items():
        attention = LREA(hyper.dim, length, rank)
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            state = attention.export_state(behaviors, dtype=dtype)
            served = targets if dtype == torch.int8 else targets.to(dtype)
            call = lambda a=attention, s=state, t=served: a.attend(t, s)  # noqa: E731
            calls[model, records.dtype_name(dtype)] = served_bytes(state), call
    return calls


def in_blocks(attend: Callable[[Tensor], Tensor], targets: Tensor, per_candidate: int) -> Tensor:
    """Attend for blocks of candidates small enough that the intermediate results stay in the cache."""
    block = max(1, CACHED_ELEMENTS // per_candidate)
    return torch.cat([attend(part) for part in targets.split(block, dim=1)], dim=1)


def size_of(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def served_bytes(state: LREAState) -> int:
    return size_of(state.keys, state.values, state.key_scales, state.value_scales)


@torch.no_grad()
def measure_serving(seconds: float, hyper: Hyperparameters) -> list[ServingRow]:
    """Calls interleave, in two groups: full attention would evict LREA's states from the cache."""
    rows = []
    for length in SERVED_LENGTHS:
        calls = serving_calls(length, SERVED_CANDIDATES, hyper)
        full = {key: call for key, call in calls.items() if key[0] not in LREA_RANKS}
        for group in (full, {key: call for key, call in calls.items() if key not in full}):
            timed = measure({key: lambda turn, c=call: c for key, (_, call) in group.items()}, CpuClock(), seconds)
            rows += [
                ServingRow(
                    model=model,
                    dtype=dtype,
                    length=length,
                    candidates=SERVED_CANDIDATES,
                    dim=hyper.dim,
                    bytes_per_user=group[model, dtype][0],
                    p50_ms=percentile(samples.times, 50),
                    spread=finite(samples.spread),
                    waiting=samples.waiting,
                )
                for (model, dtype), samples in timed.items()
            ]
    return rows


def serving_table(rows: Sequence[ServingRow]) -> Table:
    table = new_table(("attention", "states"), ("history", "ms", "spread", "waiting", "bytes per user"))
    for row in rows:
        share = ("" if x is None else f"{100 * x:.0f}%" for x in (row.spread, row.waiting))
        table.add_row(row.model, row.dtype, f"{row.length:,}", f"{row.p50_ms:.3f}", *share, f"{row.bytes_per_user:,}")
    return table


# --- The command ---


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.din_serving", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="time for each measurement")
    parser.add_argument("--results", type=Path, default=Path("results/quality"), help="folder of the record")
    chosen = parser.parse_args(arguments)
    if not 0 < chosen.seconds < math.inf:
        parser.error("--seconds must be finite and above 0")
    torch.set_num_threads(1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    hyper = Hyperparameters()
    served = measure_serving(chosen.seconds, hyper)
    path = chosen.results / f"{datetime.now():%Y%m%d-%H%M%S}-din-serving-cpu.jsonl"
    records.append(served, records.environment(torch.device("cpu")) | {"threads": 1}, path)
    console.print(f"attention of 1 user and {SERVED_CANDIDATES} candidates, d = {hyper.dim}, one thread")
    console.print(serving_table(served))
    console.print(f"rows in {path}, {time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

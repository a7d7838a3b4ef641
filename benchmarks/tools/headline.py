"""`python -m benchmarks.tools.headline sink_forward`: recattn and its peers on one workload, with times of all kernels.

Implementations that need no compilation run first, and are printed before those of torch.compile start. For recattn's,
the host's time is printed beside the kernels', with and without a CUDA graph, there and on a small batch. Rows,
microseconds per kernel and those bounds are written as JSON lines. Needs only PyTorch and recattn.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.data import movielens
from benchmarks.harness import records
from benchmarks.harness.ceilings import around, measure_ceilings
from benchmarks.harness.contest import Contest, Settings, timed_call
from benchmarks.harness.goals import NOT_MEASURED
from benchmarks.harness.memory import limit_memory
from benchmarks.harness.records import TIMED, Row
from benchmarks.harness.registry import (
    BACKWARD,
    DTYPES,
    FORWARD,
    TRAINING,
    Implementation,
    Inputs,
    Operator,
    load_operators,
)
from benchmarks.harness.timing import clock_for
from benchmarks.harness.workloads import Draw, Workload
from benchmarks.tools.bounds import measure_bounds

CALLS = 3
SHOWN_KERNELS = 6


@dataclass(frozen=True)
class Headline:
    operator: str
    workload: str
    directions: tuple[str, ...]
    small: str  # a workload that takes a GPU so little time that the host may bound it


HEADLINES = {
    "sink_forward": Headline("sink_attention", "gpu_2k_d64_causal", (FORWARD,), "ctr_sink"),
    "sink_backward": Headline("sink_attention", "gpu_2k_d64_causal", (BACKWARD,), "ctr_sink"),
    "refined": Headline("refined_attention", "gpu_50", (FORWARD, TRAINING), "sasrec"),
    "absorbed": Headline("lrea_absorbed_attention", "gpu_1000x200", (FORWARD,), "256x100"),
}


def find(headline: Headline, device: torch.device) -> tuple[Operator, Workload, list[Implementation]]:
    """The operator, the workload, and the implementations that take part."""
    operator = load_operators()[headline.operator]
    (workload,) = (w for w in operator.workloads if w.name == headline.workload)
    contestants = [
        i
        for i in operator.implementations.values()
        if i.applies(workload) and device.type in i.devices and i.tier_on(device.type) != "full"
    ]
    return operator, workload, contestants


def rounds(contestants: Sequence[Implementation]) -> list[list[Implementation]]:
    """First the implementations that need no compilation, then the compiled ones. `recattn` is in both rounds."""
    at_hand = [i for i in contestants if not i.compiled]
    compiled = [i for i in contestants if i.compiled]
    return [at_hand, [*(i for i in at_hand if i.name == "recattn"), *compiled]] if compiled else [at_hand]


def keep_verdicts(rows: Sequence[Row], before: Sequence[Row]) -> None:
    """Copy the verdicts of goals whose opponents ran in an earlier round."""
    reached = {(row.impl, row.direction, goal.goal): goal for row in before for goal in row.goals}
    for row in rows:
        row.goals = [
            reached.get((row.impl, row.direction, goal.goal), goal) if goal.verdict == NOT_MEASURED else goal
            for goal in row.goals
        ]


def kernel_times(call: Callable[[int], Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Microseconds of each kernel in a call, longest first; on a CPU, of each PyTorch operator."""
    on_cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_cuda else torch.profiler.ProfilerActivity.CPU
    timed = [call(turn) for turn in range(CALLS)]  # runs the forward of a backward, outside the profile
    with torch.profiler.profile(activities=[activity]) as profile:
        for each in timed:
            each()
        if on_cuda:
            torch.cuda.synchronize(device)
    total = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    times = {event.key: getattr(event, total) / CALLS for event in profile.key_averages()}
    return {name: times[name] for name in sorted(times, key=times.get, reverse=True) if times[name]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.headline", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("headline", choices=HEADLINES)
    parser.add_argument("--device", type=torch.device, default="cuda", help="cuda by default")
    parser.add_argument("--workload", help="another workload of the operator")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each direction, 1 by default")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the JSON lines")
    chosen = parser.parse_args(arguments)
    device, headline = chosen.device, HEADLINES[chosen.headline]
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device here")
    limit_memory(device)
    headline = replace(headline, workload=chosen.workload or headline.workload)
    operator, workload, contestants = find(headline, device)
    dtype, histories, clock = DTYPES[device.type], movielens.load(offline=True), clock_for(device)
    ceilings = around(partial(measure_ceilings, device, [dtype], clock, quick=True))
    settings = Settings(device, dtype, histories, ceilings, clock, chosen.seconds, headline.directions, print_step)
    common = records.environment(device)
    path = chosen.results / f"headline-{chosen.headline}.jsonl"
    inputs = operator.inputs(workload, Draw(1, dtype, device, histories))
    rows: list[Row] = []
    for taking_part in rounds(contestants):
        own = Contest(operator, workload, taking_part, settings).run()
        keep_verdicts(own, rows)
        records.append(own, common, path)
        print(*map(format_row, own), sep="\n", flush=True)
        profiled = {(row.impl, row.direction) for row in rows}
        rows += own
        for row in (row for row in own if row.status == TIMED and (row.impl, row.direction) not in profiled):
            call = timed_call(operator, operator.implementations[row.impl], row.direction, [dict(inputs)])
            times = kernel_times(call, device)
            print_kernels(row, times)
            about = {"kernels_of": row.impl, "op": row.op, "workload": row.workload, "pass": row.direction}
            records.append_lines([{**about, "microseconds": times}], common, path)
            if operator.implementations[row.impl].ours:
                found = report_bounds(operator, workload, row.impl, row.direction, inputs, clock)
                records.append_lines([found], common, path)
    small = next(w for w in operator.workloads if w.name == headline.small)
    inputs = operator.inputs(small, Draw(1, dtype, device, histories))
    for direction in headline.directions:
        records.append_lines([report_bounds(operator, small, "recattn", direction, inputs, clock)], common, path)
    broke = {row.impl for row in rows if row.status in (records.REFUSED, records.FAILED)}
    return int(any(operator.implementations[name].ours for name in broke))


def report_bounds(
    operator: Operator,
    workload: Workload,
    implementation: str,
    direction: str,
    inputs: Inputs,
    clock: Callable[[Callable[[], object]], float],
) -> dict[str, object]:
    """Print which of host and GPU bounds a workload, and return it for the records."""
    device = next(x.device for x in inputs.values() if isinstance(x, torch.Tensor))
    # A backward is captured with its forward, whose results it reads.
    step = TRAINING if direction == BACKWARD else direction
    call = timed_call(operator, operator.implementations[implementation], step, [dict(inputs)])
    for turn in range(CALLS):
        call(turn)()
    bounds = measure_bounds(call, sum(kernel_times(call, device).values()), device, clock)
    print(f"{workload.name} {step} {implementation}: {bounds}", flush=True)
    about = {"bounds_of": implementation, "op": operator.name, "workload": workload.name, "pass": step}
    return about | asdict(bounds)


def print_step(doing: str, done: float) -> None:
    """Print the current step, so that a process that dies or hangs shows where."""
    if not done:
        print(f"  {doing}", flush=True)


def format_row(row: Row) -> str:
    """A row as one printed line."""
    what = f"{row.workload} {row.direction} {row.impl:28}"
    if row.status != TIMED:
        return f"{what} {row.status}: {row.reason}"
    verdicts = [f"{goal.verdict}: {goal.goal}" for goal in row.goals]
    figures = [f"{what} {1e3 * row.p50_ms:9.1f} µs", f"{row.ceiling_fraction:.0%} of the ceiling", *verdicts]
    return "; ".join(figures)


def print_kernels(row: Row, times: dict[str, float]) -> None:
    print(f"{row.impl}, {row.direction}: {sum(times.values()):.1f} µs in {len(times)} kernels", flush=True)
    for name, time in list(times.items())[:SHOWN_KERNELS]:
        print(f"  {time:9.1f} µs  {name[:80]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

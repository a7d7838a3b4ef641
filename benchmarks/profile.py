"""`python -m benchmarks.profile`: where sink_attention's time goes on a GPU, and what ncu says of the hottest kernels.

PyTorch's profiler ranks the kernels of a training call; ncu then measures one launch of each of recattn's first three.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks import movielens
from benchmarks.registry import TRAINING
from benchmarks.sink_attention import SINK_ATTENTION
from benchmarks.suite import timed_call
from benchmarks.workloads import Draw

CALLS = 3


def run_calls(workload: str, implementations: Iterable[str]) -> None:
    (chosen,) = (w for w in SINK_ATTENTION.workloads if w.name == workload)
    draw = Draw(0, torch.bfloat16, torch.device("cuda"), movielens.load(offline=True))
    inputs = [SINK_ATTENTION.inputs(chosen, draw)]
    for name in implementations:
        call = timed_call(SINK_ATTENTION, SINK_ATTENTION.implementations[name], TRAINING, inputs)
        for turn in range(CALLS):
            call(turn)()
    torch.cuda.synchronize()


def hottest(times: Iterable[tuple[str, float]], count: int) -> list[str]:
    """recattn's kernels by the time they take."""
    ours = [(time, name) for name, time in times if re.fullmatch(r"\w*sink\w*_kernel", name)]
    return [name for _, name in sorted(ours, reverse=True)[:count]]


def ncu_command(kernels: Sequence[str], report: Path, workload: str, implementations: Sequence[str]) -> list[str]:
    """The second launch of each: the first may have compiled."""
    selected = f"::regex:^({'|'.join(kernels)})$:2"
    ncu = ["ncu", "--clock-control", "none", "--set", "full", "--kernel-id", selected, "--force-overwrite"]
    inner = [sys.executable, "-m", "benchmarks.profile", "--workload", workload, "--impl", *implementations, "--calls"]
    return [*ncu, "--export", str(report), *inner]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", default="gpu_2k_d64_causal")
    parser.add_argument("--impl", nargs="+", default=["recattn triton", "recattn correction:flash"])
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the report")
    parser.add_argument("--calls", action="store_true", help="only run the calls, for a profiler around this program")
    chosen = parser.parse_args(arguments)
    run_calls(chosen.workload, chosen.impl)
    if chosen.calls:
        return 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run_calls(chosen.workload, chosen.impl)
    print(profile.key_averages().table(sort_by="self_device_time_total", row_limit=20, max_name_column_width=80))
    kernels = hottest(((event.key, event.self_device_time_total) for event in profile.key_averages()), 3)
    report = (chosen.results / "profile.ncu-rep").resolve()
    report.parent.mkdir(parents=True, exist_ok=True)
    measured = subprocess.run(ncu_command(kernels, report, chosen.workload, chosen.impl)).returncode
    shown = subprocess.run(["ncu", "--import", str(report), "--page", "details"]).returncode
    return measured or shown


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks.tools.profile sink_backward`: ncu on the slowest recattn kernels of a headline workload.

PyTorch's profiler ranks the kernels; ncu then measures one launch of each of the three slowest.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.data import movielens
from benchmarks.harness.contest import timed_call
from benchmarks.harness.workloads import Draw
from benchmarks.tools.headline import CALLS, HEADLINES, find, kernel_times

DEVICE = torch.device("cuda")
# recattn's kernels have one of these in their names.
OWN_KERNELS = ("sink", "refined", "wasserstein", "lrea", "absorbed")


def own_calls(name: str) -> Iterator[tuple[str, object]]:
    """recattn's implementations of a headline that run here, and the call of each in the headline's last direction."""
    headline = HEADLINES[name]
    operator, workload, contestants = find(headline, DEVICE)
    inputs = operator.inputs(workload, Draw(0, torch.bfloat16, DEVICE, movielens.load(offline=True)))
    for implementation in contestants:
        if implementation.ours and implementation.unsupported_reason(workload, DEVICE) is None:
            direction = headline.directions[-1]
            yield implementation.name, timed_call(operator, implementation, direction, [dict(inputs)])


def hottest(times: Mapping[str, float], count: int) -> list[str]:
    """Names in the source of recattn's kernels, slowest first."""
    own = re.compile(rf"\b\w*(?:{'|'.join(OWN_KERNELS)})\w*_kernel\b")
    found = [(time, match[0]) for name, time in times.items() if (match := own.search(name))]
    return list(dict.fromkeys(name for _, name in sorted(found, reverse=True)))[:count]


def ncu_command(kernels: Sequence[str], report: Path, headline: str) -> list[str]:
    """Profile the second launch of each kernel: the first may have compiled it."""
    selected = f"::regex:^({'|'.join(kernels)})$:2"
    ncu = ["ncu", "--clock-control", "none", "--set", "full", "--kernel-id", selected, "--force-overwrite"]
    return [*ncu, "--export", str(report), sys.executable, "-m", "benchmarks.tools.profile", headline, "--calls"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tools.profile", description=__doc__.partition("\n\n")[0]
    )
    parser.add_argument("headline", choices=HEADLINES)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the report")
    parser.add_argument("--calls", action="store_true", help="only run the calls, for an outer profiler")
    chosen = parser.parse_args(arguments)
    times: dict[str, float] = {}
    for name, call in own_calls(chosen.headline):
        for turn in range(CALLS):
            call(turn)()
        torch.cuda.synchronize()
        if not chosen.calls:
            measured = kernel_times(call, DEVICE)
            print(f"{name}: {sum(measured.values()):.1f} µs", flush=True)
            times |= measured
    if chosen.calls:
        return 0
    report = (chosen.results / "profile.ncu-rep").resolve()
    report.parent.mkdir(parents=True, exist_ok=True)
    measured = subprocess.run(ncu_command(hottest(times, 3), report, chosen.headline)).returncode
    shown = subprocess.run(["ncu", "--import", str(report), "--page", "details"]).returncode
    return measured or shown


if __name__ == "__main__":
    sys.exit(main())

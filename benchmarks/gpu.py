"""`make gpu`: what needs a GPU, in one go and in under nine minutes: build, check, choose paths, measure.

Nothing is downloaded: it runs on the interpreter that it is started with. What is wrong comes out before what is slow,
a step that fails does not keep the later ones from running, and the exit status is 1 if any failed. The folder of
results gets gpu.log (every step's output), gpu.json (what became of each), the dispatch table, the benchmark's rows.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 530.0
PASSED, FAILED, OUT_OF_TIME = "passed", "failed", "out of time"
SHOWN_LINES = 25  # of a failed step's output; the log has all
MANAGED = "externally-managed-environment"
REMEDY = (
    "pip may not install into this interpreter. Put a virtual environment on top of it "
    "(python3 -m venv --system-site-packages DIR; PYTHON=DIR/bin/python make gpu) or allow it "
    "(PIP_BREAK_SYSTEM_PACKAGES=1 make gpu)."
)


@dataclass(frozen=True, eq=False)
class Step:
    name: str
    command: Sequence[str]
    seconds: float  # at most
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str
    seconds: float
    returncode: int | None


# The operators, each with the patterns of its tests. They are not marked, for they run on a CPU too.
KERNEL_TESTS = {
    "sink_attention": ("triton_sink_*", "inter_sink_bias", "sink_attention", "base_attention"),
    "refined_attention": (
        "triton_refined_*",
        "triton_wasserstein_*",
        "refined_attention_long",
        "refined_attention_paths",
    ),
    "lrea_attention": ("triton_lrea_*",),
}
# What is measured together with an operator.
BESIDE = {
    "sink_attention": ("inter_sink_bias",),
    "refined_attention": ("wasserstein_attention",),
    "lrea_attention": ("lrea_compress", "lrea_compress_items", "lrea_absorbed_attention"),
}
# Those that fit in the time together; another is named.
TOGETHER = ("sink_attention", "refined_attention")


def stages(results: Path, scratch: Path, profile: bool, operators: Sequence[str] = TOGETHER) -> list[list[Step]]:
    """One after another; the steps of a stage side by side. Measurements have the machine to themselves."""
    from benchmarks import workloads as suite

    python = (sys.executable, "-m")
    pip = (*python, "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    pytest = (*python, "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", "-n", "6")
    patterns = [pattern for operator in operators for pattern in KERNEL_TESTS[operator]]
    kernel_tests = sorted(str(file) for pattern in patterns for file in ROOT.glob(f"tests/test_{pattern}.py"))
    tests = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    own = ("sink", "refined", "wasserstein", "lrea", "absorbed")
    own_kernels = [word for name in own for word in ("--kernel-name", f"kernel_substring={name}")]
    sanitizer = ("compute-sanitizer", "--error-exitcode", "1", *own_kernels, "--tool")
    targets = (sys.executable, str(ROOT / "tests" / "gpu_sanitizer_targets.py"))
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    bench = (*python, "benchmarks.run", "--device", "cuda", "--offline", "--op")
    groups = {
        "sink_attention": (*suite.SINK, *suite.INTER_SINK_BIAS),
        "refined_attention": (*suite.REFINED, *suite.WASSERSTEIN),
        "lrea_attention": (*suite.LREA_RESTORED, *suite.LREA_COMPRESS, *suite.LREA_ABSORBED),
    }
    workloads = {
        name: [w.name for w in groups[name] if w.devices == suite.CUDA and w.tier != "full"] for name in operators
    }
    measured = {name: (name, *BESIDE[name]) for name in operators}
    # Compiling takes longer than timing: the compilers' caches are filled while the tests run.
    slow_to_compile = {
        "sink_attention": ("FlexAttention", "recattn triton", "recattn correction:flash"),
        "refined_attention": ("eager, torch.compile", "recattn"),
        "lrea_attention": ("eager, torch.compile", "eager, factored, torch.compile", "recattn"),
    }
    filling = ("--seconds", "0", "--results", str(scratch), "--impl")
    fills = [
        (*bench, *measured[name], *filling, *slow_to_compile[name], "--workload", *workloads[name][i::3])
        for name in operators
        for i in range(3)
    ]
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "2"}
    measuring = ("--seconds", "0.8", "--results", str(results), "--workload")
    table = results / "sink_attention_dispatch.json"
    installed = ROOT / "python" / "recattn" / "ops" / table.name
    dispatch = (*python, "benchmarks.dispatch", "--seconds", "60", "--table", str(installed), str(table))
    planned = [
        [Step("build", (*pip, "--editable", str(ROOT)), 100)],
        [
            Step("GPU tests", (*pytest, "-m", "gpu", str(ROOT / "tests")), 170, tests),
            Step("kernel tests", (*pytest, "-m", "not gpu", *kernel_tests), 170, tests),
            Step("memcheck", (*sanitizer, "memcheck", *targets), 170, uncached),
            Step("racecheck", (*sanitizer, "racecheck", *targets), 170, uncached),
            *(Step(f"compile {i + 1}", command, 170, threads) for i, command in enumerate(fills)),
        ],
    ]
    if "sink_attention" in operators:  # measured by the table that is written first
        planned.append([Step("dispatch", dispatch, 80)])
    for name in operators:
        seconds = {"sink_attention": 150, "refined_attention": 55, "lrea_attention": 110}[name]
        planned.append([Step(f"benchmark of {name}", (*bench, *measured[name], *measuring, *workloads[name]), seconds)])
    if profile:
        planned.append([Step("profile", (*python, "benchmarks.profile", "--results", str(results)), 120)])
    return planned


def run_stage(steps: Sequence[Step], logs: Path, deadline: float) -> list[Outcome]:
    """The steps side by side, each until it ends or its time does; their output in a file each."""
    started = time.monotonic()
    running = {step: start(step, logs / f"{step.name}.log") for step in steps}
    outcomes = {}
    try:
        while len(outcomes) < len(steps):
            for step, process in running.items():
                if step not in outcomes:
                    now = time.monotonic()
                    late = now > min(started + step.seconds, deadline)
                    status, returncode = look_after(process, late)
                    if status is not None:
                        outcomes[step] = Outcome(step.name, status, round(now - started, 1), returncode)
            time.sleep(0.05)
    finally:
        for process in running.values():
            look_after(process, late=True)
    return [outcomes[step] for step in steps]


def start(step: Step, log: Path) -> subprocess.Popen | None:
    """The process, at the head of a group of its own; None if there is no such program."""
    with log.open("w") as output:
        try:
            return subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**environment(), **step.environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            output.write(f"{error}\n")
            return None


def look_after(process: subprocess.Popen | None, late: bool) -> tuple[str | None, int | None]:
    """Status (None: it goes on) and exit status; ends it with all that it started if it is late."""
    returncode = 127 if process is None else process.poll()
    if returncode is not None:
        return (PASSED if returncode == 0 else FAILED), returncode
    if not late:
        return None, None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return OUT_OF_TIME, None


def environment() -> dict[str, str]:
    """Kernels are compiled, never interpreted."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run(planned: Sequence[Sequence[Step]], results: Path, seconds: float) -> list[Outcome]:
    """Every stage whatever became of those before, the log and the outcomes kept up to date."""
    results.mkdir(parents=True, exist_ok=True)
    log, outcomes, deadline = results / "gpu.log", [], time.monotonic() + seconds
    log.write_text("")
    with tempfile.TemporaryDirectory(dir=results, prefix="running-") as folder:
        for steps in planned:
            for outcome in run_stage(steps, Path(folder), deadline):
                output = (Path(folder) / f"{outcome.name}.log").read_text(errors="replace")
                with log.open("a") as file:
                    file.write(f"===== {outcome.name}: {outcome.status}, {outcome.seconds} s\n{output}\n")
                report(outcome, output)
                outcomes.append(outcome)
            (results / "gpu.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return outcomes


def report(outcome: Outcome, output: str) -> None:
    print(f"{outcome.name}: {outcome.status}, {outcome.seconds} s", flush=True)
    if outcome.status != PASSED:
        print(*output.splitlines()[-SHOWN_LINES:], sep="\n")
        if MANAGED in output:
            print(REMEDY)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the log and the records")
    parser.add_argument(
        "--op", nargs="+", choices=KERNEL_TESTS, default=TOGETHER, help=f"{' and '.join(TOGETHER)} by default"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"until what still runs is ended, {SECONDS}")
    parser.add_argument("--profile", action="store_true", help="also profile the hottest kernels with ncu")
    chosen = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device here")
    # Told to end, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results = chosen.results.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run(stages(results, Path(scratch), chosen.profile, chosen.op), results, chosen.seconds)
    log = results / "gpu.log"
    print(f"{sum(o.status == PASSED for o in outcomes)} of {len(outcomes)} steps passed; output in {log}")
    return int(any(outcome.status != PASSED for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

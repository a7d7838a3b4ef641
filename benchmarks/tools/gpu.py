"""`make gpu` and `make gpu-bench`: everything that needs a GPU, in two commands of at most five minutes each.

`make gpu` checks every operator and times the headline workloads. `make gpu-bench` (--bench) runs the tests that need a
GPU, measures the dispatch table and more workloads, and ends with compute-sanitizer. Both use the interpreter they are
started with and download nothing. The exit status is 1 if a step failed or ran out of time.
"""

import argparse
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import DISPATCH_TABLE, ROOT
from benchmarks.tools.steps import NOT_STARTED, PASSED, Stage, Step, run

SECONDS = 285.0  # for either command; ending a late step takes up to LEFT_BEHIND more
MANAGED = "externally-managed-environment"
REMEDY = (
    "pip may not install into this interpreter. Put a virtual environment on top of it "
    "(python3 -m venv --system-site-packages DIR; PYTHON=DIR/bin/python make gpu) or allow it "
    "(PIP_BREAK_SYSTEM_PACKAGES=1 make gpu)."
)
MODULE = (sys.executable, "-m")
TESTS = ROOT / "tests"


@dataclass(frozen=True)
class Operator:
    """What exists for an operator of `recattn check`."""

    headlines: tuple[str, ...] = ()  # names in benchmarks.tools.headline
    benchmarked: tuple[tuple[str, str], ...] = ()  # operator and workload, when all operators run
    kernel_tests: tuple[str, ...] = ()  # patterns in tests/; without a GPU these tests run interpreted
    gpu_tests: tuple[str, ...] = ()  # files in tests/ that have tests marked "gpu"
    built: bool = False  # has a CUDA C++ kernel


OPERATORS = {
    "sink_attention": Operator(
        ("sink_forward", "sink_backward"),
        (("sink_attention", "gpu_4k_d128_causal"), ("sink_attention", "gpu_many_short")),
        ("triton/test_sink_*.py",),
        ("ops/test_backends_on_gpu.py", "ops/test_sink_attention_paths.py", "concurrency/test_streams.py"),
    ),
    "inter_sink_bias": Operator(kernel_tests=("ops/test_inter_sink_bias.py",)),
    "refined_attention": Operator(
        ("refined",),
        (("refined_attention", "gpu_200"),),
        ("triton/test_refined_*.py", "ops/test_refined_attention_long.py", "ops/test_refined_attention_paths.py"),
    ),
    "wasserstein_attention": Operator((), (("wasserstein_attention", "gpu_stosa"),), ("triton/test_wasserstein_*.py",)),
    "lrea_compress": Operator(kernel_tests=("triton/test_lrea_attention.py",)),
    "lrea_attention": Operator((), (("lrea_attention", "gpu_16k"),), ("triton/test_lrea_attention.py",)),
    "lrea_absorbed_attention": Operator(
        ("absorbed",),
        (("lrea_absorbed_attention", "gpu_1x1000"),),
        (),
        (
            "cuda/test_lrea_absorbed_attention.py",
            "cuda/test_lrea_absorbed_attention_bad_values.py",
            "ops/test_lrea_export.py",
            "serving/test_state_table.py",
        ),
        built=True,
    ),
}
BENCHMARKED_WITH = {"lrea_compress": ("lrea_compress_items",)}


def install() -> Stage:
    """Install without compiling: the Triton kernels are ready in seconds."""
    pip = (*MODULE, "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    return Stage(25, [Step("install", (*pip, "--editable", str(ROOT)), {"RECATTN_BUILD": "none"})])


def build(scratch: Path) -> Step:
    """Build the C++ and CUDA kernels in place. Processes that have already imported recattn go on without them."""
    folders = ("--build-temp", str(scratch / "objects"), "--build-lib", str(scratch / "built"))
    command = (sys.executable, "setup.py", "build_ext", "--inplace", *folders)
    return Step("build", command, {"RECATTN_BUILD": "cuda", "MAX_JOBS": "8"})


def check(name: str, work: Path, operators: Sequence[str]) -> Step:
    """`recattn check`, with blocking launches: an error is raised at the launch that caused it."""
    command = (*MODULE, "recattn", "check", "--device", "cuda", "--json", str(work / f"{name}.json"))
    return Step(name, (*command, "--op", *operators), {"CUDA_LAUNCH_BLOCKING": "1"}, shown=True)


def plan_checks(work: Path, scratch: Path, operators: Sequence[str]) -> list[Stage]:
    """The plan of `make gpu`. Built kernels compile while other operators are checked, and are checked afterwards."""
    built = [name for name in operators if OPERATORS[name].built]
    others = [name for name in operators if not OPERATORS[name].built]
    beside = [check("check", work, others)] if others else []
    plan = [install(), Stage(90, [*beside, *([build(scratch)] if built else [])], together=True)]
    for name in operators:
        if name in built:
            plan.append(Stage(15, [check(f"check of {name}", work, [name])]))
        for headline in OPERATORS[name].headlines:
            seconds = 35 if name in built else 40
            command = (*MODULE, "benchmarks.tools.headline", headline, "--results", str(work))
            plan.append(Stage(seconds, [Step(headline, command, shown=True)]))
    return plan


def plan_benchmarks(work: Path, scratch: Path, operators: Sequence[str], profile: bool) -> list[Stage]:
    """The plan of `make gpu-bench`. What measurements and sanitizers need is compiled while the tests run."""
    every = len(operators) == len(OPERATORS)
    first, after_build = [], []
    for name in operators:
        own = OPERATORS[name]
        (after_build if own.built else first).extend(run_tests(file, "gpu") for file in own.gpu_tests)
        if not every:
            first += [run_tests(file, "not gpu") for pattern in own.kernel_tests for file in test_files(pattern)]
    planned = workloads(operators, every)
    targets = (sys.executable, str(TESTS / "cuda" / "gpu_sanitizer_targets.py"))
    beside = [*compile_steps(planned), Step("sanitizer targets", targets)]
    plan = [install(), Stage(90, [*first, *([build(scratch)] if after_build else []), *beside], together=True)]
    if after_build:
        plan.append(Stage(20, after_build, together=True))
    if every:
        # Tests of the clocks: nothing runs beside them.
        plan.append(Stage(15, [run_tests("benchmarks/test_suite.py", "gpu")]))
    if "sink_attention" in operators:  # its workloads use the table written here
        plan.append(Stage(35, [dispatch(work)]))
    last = [profile_step(work, operators)] if profile else sanitizers(targets)
    left = SECONDS - sum(stage.seconds for stage in plan) - 40
    plan.append(Stage(left, [measure(*one, work) for one in planned]))
    return [*plan, Stage(40, last, together=True)]


def test_files(pattern: str) -> list[str]:
    return sorted(path.relative_to(TESTS).as_posix() for path in TESTS.glob(pattern))


def run_tests(file: str, marked: str) -> Step:
    """One process per test file, so that a lost CUDA context fails no other. `file` is relative to tests/.

    The log shows which test hangs, and where.
    """
    pytest = (*MODULE, "pytest", "-v", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=40")
    command = (*pytest, "--durations=10", "-m", marked, str(TESTS / file))
    own = {"OMP_NUM_THREADS": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return Step(f"{file.removesuffix('.py').replace('/', ' ')}, {marked}", command, own)


def workloads(operators: Sequence[str], every: bool) -> list[tuple[str, str]]:
    """A few workloads of each operator, or all workloads of the operators that are named."""
    if every:
        return [pair for name in operators for pair in OPERATORS[name].benchmarked]
    from benchmarks.harness.registry import load_operators

    suite = load_operators()
    names = [each for name in operators for each in (name, *BENCHMARKED_WITH.get(name, ()))]
    return [
        (name, w.name) for name in names for w in suite[name].workloads if w.devices == ("cuda",) and w.tier != "full"
    ]


def benchmark(name: str, workload: str, *options: str) -> tuple[str, ...]:
    own = ("--device", "cuda", "--offline", "--op", name, "--workload", workload)
    return (*MODULE, "benchmarks.run", *own, *options)


def compile_steps(planned: Sequence[tuple[str, str]]) -> list[Step]:
    return [
        Step(f"compile {name} {w}", benchmark(name, w, "--fill"), {"TORCHINDUCTOR_COMPILE_THREADS": "2"})
        for name, w in planned
    ]


def measure(name: str, workload: str, work: Path) -> Step:
    command = benchmark(name, workload, "--seconds", "0.5", "--results", str(work))
    return Step(f"{name} {workload}", command, shown=True, at_least=8, at_most=40)


def dispatch(work: Path) -> Step:
    tables = (str(DISPATCH_TABLE), str(work / "sink_attention_dispatch.json"))
    return Step("dispatch", (*MODULE, "benchmarks.tools.tune_dispatch", "--seconds", "22", "--table", *tables))


def sanitizers(targets: Sequence[str]) -> list[Step]:
    from benchmarks.tools.profile import OWN_KERNELS

    own = [word for name in OWN_KERNELS for word in ("--kernel-name", f"kernel_substring={name}")]
    # initcheck must see what PyTorch's kernels write, too.
    seen = {"memcheck": own, "racecheck": own, "initcheck": []}
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Step(tool, ("compute-sanitizer", "--error-exitcode", "1", *kernels, "--tool", tool, *targets), uncached)
        for tool, kernels in seen.items()
    ]


def profile_step(work: Path, operators: Sequence[str]) -> Step:
    headline = next((h for name in operators for h in reversed(OPERATORS[name].headlines)), "sink_backward")
    return Step("profile", (*MODULE, "benchmarks.tools.profile", headline, "--results", str(work)), shown=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="folder of the archive and the JSON lines")
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=list(OPERATORS), help="all")
    parser.add_argument("--bench", action="store_true", help="the tests and measurements of make gpu-bench")
    parser.add_argument("--profile", action="store_true", help="with --bench: ncu in the sanitizers' place")
    chosen = parser.parse_args(arguments)

    import torch

    if not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device here")
    # When terminated, end the running steps too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    results, name = chosen.results.resolve(), "gpu-bench" if chosen.bench else "gpu"
    with tempfile.TemporaryDirectory() as temporary:
        work, scratch = Path(temporary, "work"), Path(temporary, "scratch")
        scratch.mkdir()
        plan = (
            plan_benchmarks(work, scratch, chosen.op, chosen.profile)
            if chosen.bench
            else plan_checks(work, scratch, chosen.op)
        )
        outcomes = run(plan, work, results, name)
        print_remedy(work / "logs" / "install.log")
    counts = Counter(outcome.status for outcome in outcomes)
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; all output is in {results}")
    return int(counts.keys() - {PASSED, NOT_STARTED} != set())


def print_remedy(log: Path) -> None:
    if MANAGED in log.read_text(errors="replace"):
        print(REMEDY)


if __name__ == "__main__":
    sys.exit(main())

"""Fuzz for some minutes: python -m tests.fuzz --minutes 60 [--only sink_attention cpu]

Prints how many inputs were tried. Exit status 1 if one was found that is wrong, with the command that tries it again.
What needs an environment of its own, C++ at a lower instruction set and an older Triton, runs in a second and a third
process, one after another.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
OLDER_TRITON = Path(sys.prefix) / "triton-3.6.0"
# What differs, what runs there (None: everything), and which share of the time it gets.
PROCESSES = {
    "": ({}, None, 0.6),
    "baseline": ({"RECATTN_CPU_CAPABILITY": "baseline"}, "cpu", 0.2),
    "Triton 3.6.0": ({"PYTHONPATH": str(OLDER_TRITON)}, "triton", 0.2),
}
SLOWEST = 900  # seconds that the inputs of one turn may take
KINDS = {
    "reference": "against float64",
    "NaN": "NaN and infinity",
    "changes": "changed calls",
    "machines": "machines of 40 steps",
}


def main(options: argparse.Namespace) -> int:
    tried, finds = Counter(), 0
    for name, (environment, impl, share) in PROCESSES.items():
        if name.startswith("Triton") and not OLDER_TRITON.exists():
            print(f"{name} is not at {OLDER_TRITON}: left out")
            continue
        with tempfile.TemporaryDirectory() as folder:
            counts = Path(folder) / "counts.json"
            command = [sys.executable, "-m", "tests.fuzz", "--minutes", str(share * options.minutes)]
            command += ["--counts", str(counts), "--only", *options.only, *([impl] if impl else [])]
            print(f"{name or 'This processor and Triton'}, {share * options.minutes:.1f} minutes", flush=True)
            finds += subprocess.run(command, cwd=ROOT, env=os.environ | environment).returncode != 0
            for row, kinds in json.loads(counts.read_text()).items() if counts.exists() else ():
                tried.update({(f"{row}, {name}" if name else row, kind): count for kind, count in kinds.items()})
    print_table(tried)
    print("found what is wrong: see above" if finds else "nothing found")
    return int(finds > 0)


def print_table(tried: Counter) -> None:
    print(f"\n| inputs tried | {' | '.join(KINDS.values())} |\n|---|{'---|' * len(KINDS)}")
    for row in sorted({row for row, _ in tried}):
        print(f"| {row} | {' | '.join(str(tried[row, kind]) for kind in KINDS)} |")
    print()


def fuzz(options: argparse.Namespace) -> int:
    """In this process, each property in turn for a few seconds, until the time is over."""
    prepare()
    signal.signal(signal.SIGALRM, does_not_end)
    from tests.fuzz.machines import MACHINES
    from tests.fuzz.properties import PROPERTIES, unsupported_reason

    ends, tried, found = time.monotonic() + 60 * options.minutes, {}, set()
    chosen = [p for p in (*PROPERTIES.values(), *MACHINES) if all(word in p.id.split("-") for word in options.only)]
    chosen = [p for p in chosen if unsupported_reason(p.impl) is None]
    while time.monotonic() < ends and len(found) < len(chosen):
        for one in random.sample(chosen, len(chosen)):
            if time.monotonic() > ends:
                break
            row = tried.setdefault(f"{one.operator} {one.impl}", Counter())
            if one.id not in found and not holds(one, lambda row=row, kind=one.kind: row.update([kind])):
                found.add(one.id)
    if options.counts:
        Path(options.counts).write_text(json.dumps(tried))
    return int(bool(found))


def holds(one, tried) -> bool:
    """Whether a property holds of some new inputs."""
    from hypothesis import Phase, seed, settings

    from tests.fuzz.properties import INTERPRETED, PROPERTIES, QUIET

    # Without shrinking, which may take longer than all that is asked for.
    options = settings(
        QUIET, max_examples=3 if one.impl in INTERPRETED else 40, phases=[Phase.generate], print_blob=True
    )
    try:
        signal.setitimer(signal.ITIMER_REAL, SLOWEST, SLOWEST)  # again, as Hypothesis repeats what failed
        seed(random.getrandbits(64))(one.test(options, tried))()
    except Exception as error:
        traceback.print_exc()
        print(*getattr(error, "__notes__", []), sep="\n")
        if one.id in PROPERTIES:
            print(f"Again: python -m tests.fuzz --again {one.id} BLOB, of @reproduce_failure above", flush=True)
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return True


def does_not_end(*_) -> None:
    raise TimeoutError(f"more than {SLOWEST} seconds: does a kernel end?")


def again(name: str, blob: str) -> int:
    """Try a found input again."""
    prepare()
    import hypothesis

    from tests.fuzz.properties import PROPERTIES, QUIET

    reproduce = hypothesis.reproduce_failure(hypothesis.__version__, blob.encode())
    try:
        reproduce(PROPERTIES[name].test(hypothesis.settings(QUIET)))()
    except hypothesis.errors.DidNotReproduce:
        print("it holds now")
    return 0


def prepare() -> None:
    """As tests/conftest.py does for the tests: Triton's interpreter, and memory that is not written is NaN."""
    import torch

    from tests import conftest  # noqa: F401 (sets TRITON_INTERPRET)

    warnings.filterwarnings("ignore")  # numpy's, of the interpreter's infinities
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="how long (60)")
    parser.add_argument("--only", nargs="*", default=[], help="an operator, an implementation, a property")
    parser.add_argument("--counts", help="fuzz in this process alone, and write what was tried to this file")
    parser.add_argument("--again", nargs=2, metavar=("PROPERTY", "BLOB"), help="try one input again")
    arguments = parser.parse_args()
    if arguments.again:
        sys.exit(again(*arguments.again))
    sys.exit(fuzz(arguments) if arguments.counts else main(arguments))

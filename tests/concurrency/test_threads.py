"""Many threads call every operator at once, forward and backward: the results are a single thread's, bit for bit."""

import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.operator_cases import CASES, Case

THREADS = 8
ON_GPU = torch.cuda.is_available()
# Dropout draws its seed from a generator that all threads share; Triton's interpreter keeps its grid in a global.
SHARED = [name for name, case in CASES.items() if "dropout_p" in case.options]
SHARED += [] if ON_GPU else [name for name, case in CASES.items() if case.options.get("impl") == "triton"]
OWN = [name for name in CASES if name not in SHARED]


def call(case: Case, device: str = "cpu") -> list[Tensor]:
    """The outputs, and the gradients of every floating input that can have one."""
    inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in case.inputs().items()}
    outs = outputs(case, inputs)
    leaves = [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
    trained = outputs(case, inputs)
    return outs + list(torch.autograd.grad([x.sum() for x in trained], leaves, allow_unused=True))


def outputs(case: Case, inputs: dict) -> list[Tensor]:
    out = case.function(**inputs)
    return list(out) if isinstance(out, tuple) else [out]


def same(a: list[Tensor | None], b: list[Tensor | None]) -> bool:
    return all(x is y if x is None or y is None else x.equal(y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def switching():
    """The interpreter changes threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def drawn_once(names: Iterable[str]) -> dict[str, Case]:
    """The cases with inputs that are drawn here and copied in the threads, whose torch.manual_seed is one of all."""
    drawn = {name: CASES[name].inputs() for name in names}
    return {name: Case(CASES[name].function, lambda own=own: copies(own), {}) for name, own in drawn.items()}


def copies(inputs: dict) -> dict:
    return {name: x.detach().clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_operator_at_once_gives_a_single_threads_bits(switching):
    cases = drawn_once(OWN)
    expected = {name: call(case) for name, case in cases.items()}
    with ThreadPoolExecutor(THREADS) as pool:
        # Each thread starts at another operator, so that all run beside all.
        order = [OWN[(start * 5 + i) % len(OWN)] for start in range(THREADS) for i in range(len(OWN))]
        results = pool.map(lambda name: (name, call(cases[name])), order)
        different = {name for name, result in results if not same(result, expected[name])}
    assert different == set()


FIRST = """
import sys, threading
sys.path.insert(0, sys.argv[1])
sys.setswitchinterval(1e-6)
from tests.concurrency import test_threads as own
cases = own.drawn_once(("sink", "refined", "gaussian", "items"))
start, results = threading.Barrier(8), []
def first(name):
    start.wait()
    results.append((name, own.call(cases[name])))
threads = [threading.Thread(target=first, args=(name,)) for name in (*cases, *cases)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(sum(own.same(result, own.call(cases[name])) for name, result in results))
"""


def test_the_first_call_may_come_from_many_threads():
    """What a process loads, compiles and caches at its first call, it may do in several threads."""
    command = [sys.executable, "-W", "ignore", "-c", FIRST, str(Path(__file__).parents[2])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.stdout == "8\n", result.stderr[-3000:]

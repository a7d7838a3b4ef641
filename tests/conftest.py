"""Settings that must be made before any kernel is imported, and fixtures for every test."""

import gc
import importlib.util
import os

import pytest
import torch
from hypothesis import settings

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Triton reads this when a kernel is decorated: without a GPU its interpreter runs them on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests.helpers.interpreted import read_scalars, speed_up_interpreter, splat_masks

        speed_up_interpreter()
        read_scalars()
        splat_masks()

settings.register_profile("recattn", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("recattn")


@pytest.fixture(scope="module", autouse=True)
def frozen_heap():
    """What imports and the files before have made stays: collecting garbage need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    # Without a GPU torch.manual_seed formats the stack each time, 1% of all tests' time.
    torch.manual_seed(0) if ON_GPU else torch.default_generator.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Fill uninitialised memory with NaN (integers: the largest value), in Python and in C++."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=ON_GPU)
def context_that_works():
    """Report a kernel's error in the test that launched it, and stop if the CUDA context is lost."""
    yield
    end_if_context_is_lost()


def end_if_context_is_lost():
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        pytest.exit(f"the CUDA context is lost: {error}", returncode=pytest.ExitCode.TESTS_FAILED)


# The CUDA kernels, emulated where there is no GPU.


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory):
    from tests.helpers import emulated_cuda

    emulated_cuda.load_library(tmp_path_factory)


@pytest.fixture
def cuda_kernels(request, monkeypatch):
    """Make impl="cuda" of lrea_absorbed_attention run, emulated on CPU tensors if there is no GPU."""
    from recattn._extension import MISSING
    from tests.helpers import emulated_cuda

    if not ON_GPU:
        request.getfixturevalue("emulated_library")
        emulated_cuda.route(monkeypatch)
    elif "cuda" in MISSING:
        pytest.skip(MISSING["cuda"])


# The benchmark suite on an operator of its own.


@pytest.fixture(scope="session")
def histories():
    from benchmarks.data import movielens

    return movielens.drawn()


@pytest.fixture
def suite_settings(histories):
    from benchmarks.harness import contest, timing
    from benchmarks.harness.ceilings import Ceilings
    from benchmarks.harness.registry import DIRECTIONS

    cpu, ceilings = torch.device("cpu"), Ceilings({torch.float32: 0.1}, 10.0, 1.0, 5.0)
    return contest.Settings(cpu, torch.float32, histories, lambda: ceilings, timing.CpuClock(), 0.01, DIRECTIONS["cpu"])


@pytest.fixture
def product():
    """An operator, x @ w, with an eager implementation."""
    from benchmarks.harness.goals import TimeGoal
    from benchmarks.harness.registry import FORWARD, TRAINING, Cost, Operator
    from benchmarks.harness.workloads import Workload

    def draw_inputs(workload, draw):
        return {"x": draw.normal(workload.batch, 8), "w": draw.normal(8, 3)}

    def cost(workload, inputs, direction):
        passes = 1 if direction == FORWARD else 3
        return Cost(passes * 48 * workload.batch, passes * 44 * workload.batch)

    operator = Operator(
        "product",
        lambda x, w: x @ w,
        draw_inputs,
        cost,
        grads=("x", "w"),
        baseline="eager",
        workloads=(Workload(name="small", batch=16, gate_batch=4),),
        goals=(TimeGoal(workload="small", direction=TRAINING, against=("eager",), time_ratio=1.5),),
    )
    operator.implementation("eager")(lambda x, w: x @ w)
    return operator


@pytest.fixture
def only_product(product, monkeypatch, histories):
    """Make `product` the suite's only operator."""
    from benchmarks import run
    from benchmarks.data import movielens

    monkeypatch.setattr(run, "load_operators", lambda: {"product": product})
    monkeypatch.setattr(movielens, "load", lambda offline: histories)
    return product


def pytest_collection_modifyitems(items):
    if not ON_GPU:
        for item in items:
            if item.get_closest_marker("gpu"):  # a keyword would be a folder's name, too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

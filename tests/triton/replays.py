"""Launches found in C++ are those of Triton's own search, and replays those of the function: run as a script.

python tests/triton/replays.py           all but the last of these
python tests/triton/replays.py search    the compiled kernel that `launch` finds is the one that Triton finds
python tests/triton/replays.py sizes     calls replayed for other sizes launch what the functions launch
python tests/triton/replays.py hooks     a profiler's hooks hear of every launch
python tests/triton/replays.py threads    many threads record and replay at once
python tests/triton/replays.py memory    neither tensors nor traced sizes are kept
python tests/triton/replays.py without    everything goes on without recattn._host
"""

import collections
import ctypes
import gc
import importlib
import os
import pkgutil
import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.pop("TRITON_INTERPRET", None)
if sys.argv[1:] == ["without"]:
    sys.modules["recattn._host"] = None

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

import recattn
import recattn.ops
from benchmarks.harness import dry_driver, host_time
from recattn.ops._plans import Traced
from recattn.triton_kernels.common.launch import launch
from recattn.triton_kernels.common.tiles import bhnd

RUNS: list[tuple[dry_driver.DryKernel, tuple]] = []


def install() -> None:
    dry_driver.install()

    def run(self, *args) -> None:
        RUNS.append((self, args))
        for number, pointer in enumerate(pointers(args[9:])):
            ctypes.c_int32.from_address(pointer).value = 1000 * len(RUNS) + number

    dry_driver.DryKernel.run = run


def pointers(arguments: object) -> list[int]:
    """An integer beyond any size is a pointer."""
    if isinstance(arguments, tuple):
        return [pointer for field in arguments for pointer in pointers(field)]
    value = arguments.data_ptr() if isinstance(arguments, Tensor) else arguments
    return [value] if isinstance(value, int) and value > 2**44 else []


# --- The search ---


@triton.jit(do_not_specialize=["N", "flag"])
def searched_kernel(x, y, seed, stride, N, flag, scale, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """Never runs."""


def test_search() -> None:
    """Of arguments that differ in all that Triton specializes on, and in what it does not."""
    draw = random.Random(0)
    storage = torch.empty(4096, dtype=torch.float32)
    kernels = set()
    for _ in range(3000):
        dtype = draw.choice([torch.float32, torch.float16, torch.int64])
        size, offset = draw.choice([1, 3, 16]), draw.choice([0, 0, 1, 2, 4])
        x = storage.view(dtype)[offset : offset + 4 * size].view(2, 2, size, 1).transpose(1, 2)
        y = draw.choice([None, storage[draw.choice([0, 1, 4]) :], (storage, 1, None, 16)])
        seed = draw.choice([None, storage])
        numbers = (draw.choice([0, 1, 2, 16, 2**31, 2**31 + 1]), draw.choice([1, 2, 16, 2**40]), draw.choice([0, 1]))
        constants = {"WIDTH": draw.choice([1, 16, 32]), "WIDE": draw.choice([True, False])}
        options = {"num_warps": draw.choice([4, 8]), "num_stages": draw.choice([1, 2])}
        arguments = (bhnd(x), y, seed, *numbers, 0.5)
        launch(searched_kernel, (1,), *arguments, **constants, **options)
        found = RUNS[-1][0]
        assert found is searched_kernel[(1,)](*arguments, **constants, **options, enable_fp_fusion=True), arguments
        assert values(RUNS[-2][1][9:]) == values(RUNS[-1][1][9:]), arguments
        kernels.add(found)
    assert len(kernels) > 300  # the arguments did differ


def values(arguments: object) -> object:
    """Tensors as the pointers that a kernel gets."""
    if isinstance(arguments, tuple):
        return tuple(map(values, arguments))
    return arguments.data_ptr() if isinstance(arguments, Tensor) else arguments


# --- Replays ---


def replayed_functions() -> list[Callable]:
    modules = pkgutil.walk_packages(recattn.ops.__path__, "recattn.ops.")
    members = [member for module in modules for member in vars(importlib.import_module(module.name)).values()]
    return list({id(member): member for member in members if hasattr(member, "known")}.values())


def launched(case: host_time.Case, sizes: host_time.Sizes, length: int, layout: Callable[[Tensor], Tensor]) -> tuple:
    """A call's launches, with names for pointers, its results' layouts, and which pointer of which launch each is.

    Each launch writes numbers to the memory of its pointers: a result has that of the last.
    """
    torch.manual_seed(length)
    call = case.make(sizes, length)
    arguments = {name: relaid(x, layout) for name, x in call.arguments.items()}
    leaves = [arguments[name] for name in call.leaves]
    RUNS.clear()
    outs = call.function(**arguments, **({"impl": case.impl} if case.impl else {}))
    outs = outs if isinstance(outs, tuple) else (outs,)
    gradients = torch.autograd.grad(outs, leaves, call.douts)
    named = {x.data_ptr(): name for name, x in arguments.items() if isinstance(x, Tensor)}
    named |= {x.data_ptr(): f"dout{i}" for i, x in enumerate(call.douts)}
    launches = [(kernel.name, args[:3], args[9:]) for kernel, args in RUNS]
    results = (*outs, *gradients)
    written = [ctypes.c_int32.from_address(x.data_ptr()).value if x.numel() > 1 else 0 for x in results]
    layouts = [(x.shape, x.stride(), x.dtype) for x in results]
    return by_name(launches, named), layouts, [number if number < 1000 * (len(RUNS) + 1) else 0 for number in written]


def relaid(x: object, layout: Callable[[Tensor], Tensor]) -> object:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() != 4:
        return x
    return layout(x.detach()).requires_grad_(x.requires_grad)


def heads_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-2)[..., 0, :]


def by_name(value: object, named: dict[int, str]) -> object:
    """Launches with names for pointers."""
    if isinstance(value, list | tuple):
        return tuple(by_name(field, named) for field in value)
    pointer = pointers(value)
    if pointer:
        return named.get(pointer[0], "internal")
    return 0 if isinstance(value, Tensor) else value  # an empty one


def test_sizes() -> None:
    draw = random.Random(1)
    functions = replayed_functions()
    cases = [case for case in host_time.CASES if case.path == host_time.GPU]
    replays = 0
    for case in cases:
        drawn = []
        for _ in range(12):
            sizes = host_time.Sizes(
                *(draw.choice([1, 2, 5]), draw.choice([1, 4]), draw.choice([1, 3, 16])),
                dtype=draw.choice([torch.float32, torch.bfloat16]),
                dim=draw.choice([16, 64, 40]),
            )
            layout = draw.choice([Tensor.contiguous, heads_last, strided])
            drawn.append((sizes, draw.choice([1, 16, 17, 33, 64, 100]) + sizes.sinks, layout))
        expected = []
        for sizes, length, layout in drawn:
            for function in functions:
                function.known.clear()
            expected.append(launched(case, sizes, length, layout))  # of the functions
        for i in range(2 * len(drawn)):  # recorded, then replayed
            recorded = sum(len(plans.plans) for function in functions for plans in function.known.values())
            sizes, length, layout = drawn[i % len(drawn)]
            got = launched(case, sizes, length, layout)
            *got, written = got
            *wanted, expected_written = expected[i % len(drawn)]
            assert [name for name, *_ in got[0]] == [name for name, *_ in wanted[0]], (case.op, sizes, length, layout)
            for of_replay, of_function in zip(got, wanted, strict=True):
                different = [pair for pair in zip(of_replay, of_function, strict=True) if pair[0] != pair[1]]
                assert not different, (case.op, sizes, length, layout, different)
            for of_replay, of_function in zip(written, expected_written, strict=True):
                # PyTorch makes the other results, of what the launches wrote.
                assert of_replay == of_function or min(of_replay, of_function) < 1000, (case.op, sizes, length)
            now = sum(len(plans.plans) for function in functions for plans in function.known.values())
            replays += now == recorded
    assert replays > len(cases) * len(drawn) // 2
    # None is kept, as in a cache of what depends on a size.
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is Traced]


# --- Hooks ---


def test_hooks() -> None:
    case = host_time.CASES[0]
    call = case.make(case.sizes, 16).in_direction(host_time.TRAINING, case.impl)
    for _ in range(3):
        call()
    RUNS.clear()
    call()
    assert len(RUNS) == 5 and all(args[6:9] == (None, None, None) for _, args in RUNS)
    heard = []
    knobs.runtime.launch_enter_hook.add(heard.append)
    call()
    assert len(RUNS) == 10 and all(args[7] is knobs.runtime.launch_enter_hook for _, args in RUNS[5:])
    knobs.runtime.launch_enter_hook.remove(heard.append)
    call()
    assert len(RUNS) == 15 and all(args[6:9] == (None, None, None) for _, args in RUNS[10:])


# --- Threads ---


def test_threads() -> None:
    case = host_time.CASES[0]
    calls = [case.make(case.sizes, length).in_direction(host_time.FORWARD, case.impl) for length in range(8, 72)]

    def run(seed: int) -> None:
        order = random.Random(seed)
        with torch.no_grad():
            for _ in range(300):
                order.choice(calls)()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(run, range(8)))
    kernels = collections.Counter(kernel.name for kernel, _ in RUNS)
    assert kernels == {"sink_attention_streams_kernel": 2400, "sink_attention_fwd_kernel": 2400}


# --- Memory ---


def test_memory() -> None:
    cases = [case for case in host_time.CASES if case.path == host_time.GPU]
    for case in cases:
        call = case.make(case.sizes, 32)
        for direction in case.directions:
            for _ in range(3):
                call.in_direction(direction, case.impl)()
            RUNS.clear()
            tensors = [x for x in call.arguments.values() if isinstance(x, Tensor)]
            before = [sys.getrefcount(x) for x in tensors]
            for _ in range(100):
                call.in_direction(direction, case.impl)()
            RUNS.clear()
            assert [sys.getrefcount(x) for x in tensors] == before, case.op
        del call, tensors
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is Traced]


# --- Without the extension ---


def test_without() -> None:
    assert not replayed_functions()
    for case in [case for case in host_time.CASES if case.path == host_time.GPU]:
        RUNS.clear()
        call = case.make(case.sizes, 16)
        for _ in range(2):
            call.in_direction(case.directions[-1], case.impl)()
        assert RUNS, case.op
    try:
        recattn.sink_attention(torch.zeros(2, 3, 4), *[torch.zeros(2, 1, 3, 4)] * 4)
    except ValueError as error:
        assert str(error) == "q must be [B, Hq, N, D], got [2, 3, 4]", error


if __name__ == "__main__":
    install()
    tests = {"search": test_search, "sizes": test_sizes, "hooks": test_hooks, "threads": test_threads}
    tests |= {"memory": test_memory}
    for name in sys.argv[1:] or tests:
        RUNS.clear()
        (tests | {"without": test_without})[name]()

"""Calls of every operator's C++ kernels, forward and backward, for a process with guarded memory or a sanitizer:
odd sizes in every dtype, indices out of range, and operator_cases by several threads.

python tests/helpers/odd_calls.py

Nothing is compared: that is for tests/cpu. What is read or written outside ends the process.
"""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.*, where this file is run as a script

import torch
from torch import Tensor

import recattn
from tests.helpers import lrea_inputs, sink_inputs, wasserstein_inputs
from tests.helpers.operator_cases import CASES

Calls = Iterator[tuple[Callable, dict[str, Any]]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def odd_calls(length: int, dim: int, dtype: torch.dtype) -> Calls:
    """One call of each operator, every size off by one from a vector's and a tile's, causal and by seq_lens."""
    lengths = {"seq_lens": torch.tensor([length, 0, length // 2 + 1])}
    sizes = {"batch": 3, "heads": 2, "kv_heads": 1, "length": length, "dim": dim, "value_dim": dim + 2}
    for causal in (False, True):
        sinks = sink_inputs.draw(**sizes, sinks=min(length, 1 + length // 2), dtype=dtype)
        yield recattn.sink_attention, {**sinks, "causal": causal}
        refined = {name: torch.randn(3, 2, length, dim, dtype=dtype) for name in "qkv"}
        refined |= {name: torch.randn(length + 2, dim + 1, dtype=dtype) / 10 for name in ("w_q", "w_k")}
        yield recattn.refined_attention, {**refined, **lengths, "causal": causal, "source": "weights"}
        yield recattn.refined_attention, {**refined, **lengths, "causal": causal, "mechanism": "stochastic"}
        gaussians = wasserstein_inputs.draw(b=3, n=length, d=dim, dv=dim + 2, dtype=dtype)
        yield recattn.wasserstein_attention, {**gaussians, **lengths, "causal": causal, "dropout_p": 0.3}
        bias = {name: torch.randn(3, 2, length, dim, dtype=dtype) for name in ("q_s", "k_s")}
        yield recattn.inter_sink_bias, {**bias, "causal": causal}
    rank = {"rank": dim // 2 + 1, "dtype": dtype}
    history = lrea_inputs.draw_compress(length=length, dim=dim, **rank) | lengths
    yield recattn.lrea_compress, history
    yield recattn.lrea_compress, lrea_inputs.by_item_id(history, "behaviors")
    counts = {"counts": (length, 0, 1), "dim": dim, "value_dim": dim + 2}
    yield recattn.lrea_attention, lrea_inputs.draw_restored(**counts, **rank, length=length) | lengths
    states = lrea_inputs.draw_absorbed(**counts, **rank)
    yield recattn.lrea_absorbed_attention, states
    yield recattn.lrea_absorbed_attention, lrea_inputs.by_item_id(states, "targets")
    for name in ("key", "value"):
        states[f"state_{name}s"], states[f"{name}_scales"] = recattn.lrea_quantize(states[f"state_{name}s"])
    yield recattn.lrea_absorbed_attention, states


def run(function: Callable, inputs: dict[str, Any]) -> list[Tensor]:
    """The outputs, and where a kernel has a backward the gradients of all that can have one."""
    outs = function(**inputs)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    without = function is recattn.lrea_absorbed_attention or "item_ids" in inputs  # of serving
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point() and not without]
    if leaves:
        leaves = [x.requires_grad_() for x in leaves]
        outs = function(**inputs)
        outs = list(outs) if isinstance(outs, tuple) else [outs]
        outs += torch.autograd.grad([x.sum() for x in outs], leaves, allow_unused=True)
    return outs


def odd_sizes() -> None:
    several_blocks = (300, 17, torch.float32)
    for length, dim, dtype in [*product((1, 9, 33), (1, 17), DTYPES), several_blocks]:
        for function, inputs in odd_calls(length, dim, dtype):
            run(function, {name: x for name, x in inputs.items() if x is not None})


def out_of_range() -> None:
    from tests.cpu.test_wild_indices import test_wild_indices_are_refused_or_stay_inside

    test_wild_indices_are_refused_or_stay_inside()


def by_threads() -> None:
    """Four threads call every case at once."""
    cases = [case for case in CASES.values() if case.options.get("impl") not in ("triton", "reference")]

    def call(case) -> None:
        run(case.function, case.inputs())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, [case for case in cases for _ in range(4)]))


if __name__ == "__main__":
    torch.manual_seed(0)
    for part in (odd_sizes, out_of_range, by_threads):
        part()
        print(part.__name__, "done", flush=True)

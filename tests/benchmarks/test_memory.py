"""How the suite limits its use of GPU memory, and which calls it makes only to compile."""

from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import run
from benchmarks.data import movielens
from benchmarks.harness import contest
from benchmarks.harness.memory import MOST_BYTES, limit_memory, peak_memory
from benchmarks.harness.registry import Operator, load_operators
from benchmarks.harness.workloads import CUDA, Draw, SinkWorkload, Workload
from recattn.testing import Oracle


@cache
def draw() -> Draw:
    return Draw(0, torch.bfloat16, torch.device("cpu"), movielens.drawn())


def gate_bytes(operator: Operator, workload: Workload) -> float:
    """Memory of the gate's float64 run, scaled up from a smaller problem by query-key pairs (LREA: by users)."""
    small = replace(workload, name="small", batch=1, gate_batch=None)
    if hasattr(workload, "heads"):
        length = min(workload.length, 256)
        small = replace(small, heads=1, length=length, dim=16)
    if isinstance(workload, SinkWorkload):
        small = replace(small, kv_heads=1, sinks=length // 5, ragged=False)
    return float64_bytes(operator.name, small) * size(operator, workload.gate) / size(operator, small)


@cache
def float64_bytes(name: str, workload: Workload) -> int:
    operator = load_operators()[name]
    inputs = operator.inputs(workload, draw())
    references = {
        (i.reference or operator.reference, tuple(name for name in i.grads or operator.grads if name in inputs))
        for i in operator.implementations.values()
        if i.applies(workload)
    }
    return max(
        peak_memory(partial(Oracle.of, function, inputs, grads=grads), draw().device) for function, grads in references
    )


def size(operator: Operator, workload: Workload) -> float:
    if not hasattr(workload, "heads"):
        return workload.batch
    if getattr(workload, "ragged", False):
        lengths = operator.inputs(replace(workload, heads=1, kv_heads=1, dim=1), draw())["cu_seqlens"].diff()
        return workload.heads * float(lengths.double().square().sum())
    return workload.batch * workload.heads * workload.length**2


@pytest.mark.parametrize("name", ["sink_attention", "refined_attention", "wasserstein_attention", "lrea_attention"])
def test_no_gate_takes_more_memory_than_there_is(name):
    operator = load_operators()[name]
    chosen = [w for w in operator.workloads if w.devices == CUDA and w.tier != "full"]
    taken = {workload.name: gate_bytes(operator, workload) for workload in chosen}
    assert taken and max(taken.values()) < 0.9 * MOST_BYTES, taken


def test_a_process_is_kept_from_more_memory(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**11))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: limits.append(share))
    limit_memory(torch.device("cuda"))
    limit_memory(torch.device("cpu"))
    assert limits == [0.6]


def test_filling_calls_what_is_compiled_and_gates_nothing(only_product, tmp_path, monkeypatch):
    calls = []

    def implement(name, **options):
        only_product.implementation(name, **options)(lambda x, w: calls.append((name, x.requires_grad)) or x @ w)

    implement("peer")
    implement("compiled", compiled=True)
    implement("recattn", ours=True)
    monkeypatch.setattr(contest, "Gate", None)
    monkeypatch.setattr(run, "measure_ceilings", None)
    assert run.main(["--fill", "--quick", "--workload", "small", "--device", "cpu", "--results", str(tmp_path)]) == 0
    assert {name for name, _ in calls} == {"compiled", "recattn"}
    assert {("compiled", True), ("compiled", False)} <= set(calls)
    assert not list(tmp_path.iterdir())
    only_product.implementation("broken peer", compiled=True)(lambda x, w: x @ x)
    assert run.main(["--fill", "--quick", "--workload", "small", "--device", "cpu"]) == 0
    only_product.implementation("recattn broken", ours=True)(lambda x, w: x @ x)
    assert run.main(["--fill", "--quick", "--workload", "small", "--device", "cpu"]) == 1


def test_what_torch_compile_makes_is_marked():
    for operator in load_operators().values():
        for implementation in operator.implementations.values():
            code = getattr(implementation.run, "__code__", None)
            assert implementation.compiled == (code is not None and "compiled" in code.co_names), implementation.name

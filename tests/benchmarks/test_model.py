"""The cost model: what it counts, and how close it comes to published times."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.data import movielens
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.registry import BACKWARD, FORWARD, TRAINING, load_operators
from benchmarks.harness.workloads import CPU, CUDA, Draw, SinkWorkload
from benchmarks.operators.sink_attention import SINK_ATTENTION
from benchmarks.report import cost_model, reasons

OPERATORS = load_operators()
H100 = next(gpu for gpu in cost_model.GPUS if gpu.name == "H100")
SIMPLE = cost_model.Device("simple", "cuda", Ceilings({torch.bfloat16: 2.0}, 100.0, 4.0, launch_us=3.0))


def test_a_stage_is_the_slower_of_computing_and_moving_and_is_launched():
    # 1 ms of products, 0.5 ms of softmax, 1 ms of traffic, 3 µs a launch
    computing = cost_model.Stage(2e9, 1e8, 2e6)
    assert computing.milliseconds(SIMPLE, torch.bfloat16) == pytest.approx(1.503)
    moving = cost_model.Stage(2e9, 2e8, 2e6, launches=2)
    assert moving.milliseconds(SIMPLE, torch.bfloat16) == pytest.approx(2.006)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim, published", [(64, (420, 476)), (128, (579, 638))])
def test_attention_on_an_h100_is_near_flash_attention_3(dim, published, causal):
    """TFLOP/s of the forward at 4,096 tokens, causal and not, as published by its authors."""
    shape = {"heads": 2048 // dim, "kv_heads": 2048 // dim, "length": 4096, "dim": dim, "sinks": 0, "causal": causal}
    workload = SinkWorkload(name="", batch=4, **shape)
    milliseconds = cost_model.predict(SINK_ATTENTION, workload, FORWARD, H100, torch.bfloat16)
    inputs = cost_model.shapes(SINK_ATTENTION.inputs, workload, torch.bfloat16)
    tflops = SINK_ATTENTION.cost(workload, inputs, FORWARD).flops / milliseconds / 1e9
    assert 1 / (1 + cost_model.TOLERANCE) < tflops / published[not causal] < 1 + cost_model.TOLERANCE


def test_without_sinks_it_is_the_arithmetic_of_attention():
    workload = SinkWorkload(name="", batch=2, heads=4, kv_heads=2, length=100, dim=16, sinks=0)
    inputs = cost_model.shapes(SINK_ATTENTION.inputs, workload, torch.float32)
    forward, correction = cost_model.sink_attention_on_a_gpu(workload, inputs, FORWARD)
    cost = SINK_ATTENTION.cost(workload, inputs, FORWARD)
    assert forward.flops == cost.flops == 4 * 16 * 2 * 4 * 100**2
    assert forward.bytes == cost.bytes + 4 * 2 * 4 * 100
    assert (correction.flops, correction.bytes, correction.softmaxes) == (0, 0, 0)
    backward = sum(stage.flops for stage in cost_model.sink_attention_on_a_gpu(workload, inputs, BACKWARD))
    assert forward.flops + backward == SINK_ATTENTION.cost(workload, inputs, TRAINING).flops


def test_a_tenth_of_sinks_adds_a_hundredth_of_the_arithmetic():
    workload = SinkWorkload(name="", batch=2, heads=4, kv_heads=4, length=1000, dim=16, sinks=100)
    attention, correction = cost_model.sink_attention_on_a_gpu(
        workload, cost_model.shapes(SINK_ATTENTION.inputs, workload, torch.float32), FORWARD
    )
    assert correction.flops == pytest.approx(attention.flops / 100)
    assert correction.bytes < attention.bytes / 5


def test_a_causal_attention_computes_whole_blocks_of_keys():
    lengths = torch.tensor([3, 7, 8, 0, 17])
    blocks = [sum(min(n, 4 * (i // 4 + 1)) for i in range(n)) for n in lengths.tolist()]
    assert cost_model._computed(lengths, 4) == sum(blocks)


def cases():
    for operator in OPERATORS.values():
        for workload in operator.workloads:
            yield pytest.param(operator, workload, id=f"{operator.name}-{workload.name}")


@pytest.mark.parametrize("operator", OPERATORS.values(), ids=OPERATORS)
def test_shapes_are_those_of_the_inputs(operator):
    histories = movielens.drawn()
    for workload in (w for w in operator.workloads if w.tier == "quick"):
        drawn = operator.inputs(workload, Draw(1, torch.float32, torch.device("cpu"), histories))
        shapes = cost_model.shapes(operator.inputs, workload, torch.float32)
        assert shapes.keys() == drawn.keys()
        for name, value in drawn.items():
            if isinstance(value, Tensor) and not value.is_floating_point():
                assert torch.equal(shapes[name], value)
            elif isinstance(value, Tensor):
                assert shapes[name].is_meta
                assert (shapes[name].shape, shapes[name].dtype) == (value.shape, value.dtype)
            else:
                assert shapes[name] == value


@pytest.mark.parametrize("operator, workload", list(cases()))
def test_every_workload_has_a_prediction(operator, workload):
    if CUDA[0] in workload.devices:
        for direction in operator.directions(operator.implementations["recattn"], torch.device("cuda")):
            times = {
                g.name: cost_model.predict(operator, workload, direction, g, torch.bfloat16) for g in cost_model.GPUS
            }
            assert all(math.isfinite(time) and time > 1e-3 for time in times.values())
            assert times["A100"] >= times["H100"] >= times["B200"]
    if CPU[0] in workload.devices:
        slow = cost_model.Device("slow", "cpu", Ceilings({torch.float32: 0.1}, 10.0, 1.0, 5.0))
        fast = cost_model.Device("fast", "cpu", Ceilings({torch.float32: 0.2}, 20.0, 2.0, 2.5))
        forward, both = (
            [cost_model.predict(operator, workload, direction, device, torch.float32) for device in (slow, fast)]
            for direction in (FORWARD, TRAINING)
        )
        assert forward[0] == pytest.approx(2 * forward[1])
        assert both[0] > 2 * forward[0] or not operator.grads


def test_what_nobody_has_explained_is_an_error(monkeypatch):
    known = reasons.Reason("it is slow", workloads=("small",))
    monkeypatch.setitem(reasons.REASONS, ("product", "cpu"), (known,))
    assert reasons.reason("product", "small", "cpu") == "it is slow"
    for operator, workload, kind in (
        ("product", "large", "cpu"),
        ("product", "small", "cuda"),
        ("other", "small", "cpu"),
    ):
        with pytest.raises(LookupError, match=f"{operator}, {workload}"):
            reasons.reason(operator, workload, kind)


@pytest.mark.parametrize("operator, kind", reasons.REASONS)
def test_reasons_name_what_exists(operator, kind):
    assert (operator, kind) in cost_model.MODELS
    *special, last = reasons.REASONS[operator, kind]
    existing = {workload.name for workload in OPERATORS[operator].workloads}
    assert all(known.workloads and set(known.workloads) <= existing for known in special)  # none hides the next
    assert set(last.workloads) <= existing

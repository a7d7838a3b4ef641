"""The cost model: what it counts, and how close it comes to published times."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.data import movielens
from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.registry import BACKWARD, FORWARD, TRAINING, load_operators
from benchmarks.harness.workloads import CPU, CUDA, Draw, SinkWorkload
from benchmarks.operators.sink_attention import SINK_ATTENTION
from benchmarks.report import cost_model, devices, reasons
from benchmarks.report.cpu_models import sink_attention_on_a_cpu
from benchmarks.report.gpu_models import rounds_of
from benchmarks.report.instructions import Kernel, Launch, find
from benchmarks.report.stages import Stage, computed

OPERATORS = load_operators()
H100 = next(gpu for gpu in cost_model.GPUS if gpu.name == "H100")
# 2 TFLOP/s, 100 GB/s, 16 · 4 quarters at 1/16 GHz, a processor.
SIMPLE = cost_model.Device("simple", "cuda", Ceilings({torch.bfloat16: 2.0}, 100.0, 4.0, launch_us=3.0), 90, 1)


def test_a_stage_is_the_slower_of_computing_and_moving_and_is_launched():
    # 1 ms of products, 0.5 ms of softmax, 1 ms of traffic, 3 µs a launch
    computing = Stage(2e9, 1e8, 2e6)
    assert computing.milliseconds(SIMPLE, torch.bfloat16) == pytest.approx(1.503)
    moving = Stage(2e9, 2e8, 2e6, launches=2)
    assert moving.milliseconds(SIMPLE, torch.bfloat16) == pytest.approx(2.006)


def test_what_takes_a_stage_adds_up():
    for stage in (Stage(2e9, 1e8, 2e6), Stage(2e9, 2e8, 2e6, launches=2), Stage(0, 0)):
        parts = stage.parts(SIMPLE, torch.bfloat16)
        assert sum(parts.values()) == pytest.approx(stage.milliseconds(SIMPLE, torch.bfloat16))
    assert Stage(2e9, 1e8, 2e6).parts(SIMPLE, torch.bfloat16) == pytest.approx(
        {"launches": 0.003, "tensor cores": 1.0, "special functions": 0.5}
    )
    assert Stage(2e9, 2e8, 2e6).parts(SIMPLE, torch.bfloat16) == pytest.approx({"launches": 0.003, "memory": 2.0})


# --- Kernels by their instructions ---

LOOP = {"mma": 4, "flops": 1000, "instructions": 100, "mufu": 5, "fma": 50, "alu": 20, "shared": 10}
ALL = {"mma": 8, "flops": 2000, "instructions": 1000, "mufu": 20, "fma": 100, "alu": 100, "shared": 50}
COUNTS = {"serialized": 0, "loop_wgmma": 4, **ALL, **{f"loop_{unit}": count for unit, count in LOOP.items()}}


def kernel(name: str = "a_kernel sm_90 bfloat16 D=64 128x32 warps=4 stages=3", **counts: int) -> Kernel:
    return Kernel.of(name, COUNTS | counts)


def test_reads_a_configuration():
    found = Kernel.of("a_kernel sm_90 bfloat16 simple D=64 64x128 stage 1 warps=8 stages=2", COUNTS)
    assert (found.name, found.architecture, found.warps, found.tile) == ("a_kernel", 90, 8, (64, 128))
    assert found.sizes["D"] == 64 and found.sizes["stage"] == 1
    assert found.words == {"bfloat16", "simple", "stage"}


def test_every_instruction_runs_once_and_the_loop_as_often_as_it_has_rounds():
    """The code holds two rounds of the loop, by its products."""
    launch = Launch(kernel(), blocks=2, bytes=0, rounds=10)
    assert launch.executed() == {unit: 4 * (2 * ALL[unit] + 6 * LOOP[unit]) for unit in ALL}


def test_no_less_is_executed_than_the_loop():
    short = Launch(kernel(instructions=100), blocks=2, bytes=0, rounds=2)
    assert short.executed()["instructions"] == 8 * LOOP["instructions"]


def test_without_products_the_code_holds_one_round():
    launch = Launch(kernel(flops=0, loop_flops=0), blocks=2, bytes=0, rounds=10)
    assert launch.executed()["mufu"] == 4 * (2 * ALL["mufu"] + 8 * LOOP["mufu"])


def test_the_time_of_a_launch():
    launch = Launch(kernel(), blocks=2, bytes=1e6, rounds=10)
    executed = launch.executed()
    quarters = 4 * 4e9 / 16 / 1e3  # clocks in a millisecond
    parts = launch.parts(SIMPLE, torch.bfloat16)
    expected = {"launches": 0.003, "tensor cores": 40_000 / 2e9, "issue": executed["instructions"] / quarters}
    assert parts == pytest.approx(expected)
    assert launch.milliseconds(SIMPLE, torch.bfloat16) == pytest.approx(sum(expected.values()))

    moving = replace(launch, bytes=1e8)
    assert moving.parts(SIMPLE, torch.bfloat16) == pytest.approx({"launches": 0.003, "memory": 1.0})
    two = replace(SIMPLE, processors=2)  # of three blocks one processor has two: 4/3 of the average
    uneven = replace(launch, blocks=3).parts(two, torch.bfloat16)
    even = replace(launch, blocks=3).parts(SIMPLE, torch.bfloat16)
    assert uneven["tensor cores"] == pytest.approx(4 / 3 * even["tensor cores"])


def test_what_slows_the_products_of_a_launch():
    def products(device=SIMPLE, **counts: int) -> float:
        return Launch(kernel(**counts), 2, 0, 10).parts(device, torch.bfloat16)["tensor cores"]

    assert products(loop_wgmma=0) == pytest.approx(products() / 0.62)
    assert products(replace(SIMPLE, architecture=80), loop_wgmma=0) == pytest.approx(products())
    waits = 32 * 8 * (8 + 3 * 4) / (4e6 * 4.0 / 16)
    assert products(serialized=1) == pytest.approx(products() + waits)


@pytest.mark.parametrize(
    ("unit", "count", "clocks", "ampere"),
    [
        ("mufu", 2000, 8, 8),
        ("alu", 2000, 2, 2),
        ("fma", 2000, 1, 2),
        ("shared", 2000, 4, 4),
    ],
)
def test_the_busiest_unit(unit, count, clocks, ampere):
    names = {"mufu": "special functions", "alu": "integers", "fma": "FP32", "shared": "shared memory"}
    launch = Launch(kernel(**{unit: count}), 2, 0, 4)
    for device, each in ((SIMPLE, clocks), (replace(SIMPLE, architecture=80), ampere)):
        parts = launch.parts(device, torch.bfloat16)
        assert parts[names[unit]] == pytest.approx(each * 8 * count / 1e6)


def test_finds_the_configuration_that_suffices():
    for architecture in (80, 90):
        for dim in (16, 64, 100, 128):
            found = find("sink_attention_fwd_kernel", architecture, D=dim)
            assert found.sizes["D"] == max(64, 64 * math.ceil(dim / 64)) or found.sizes["D"] == 32
            assert found.sizes["D"] >= dim and found.words == {"bfloat16"}
    with pytest.raises(LookupError, match=r"has no a_kernel sm_90 padded"):
        find("a_kernel", 90, "padded")


@pytest.mark.parametrize("causal", [False, True])
def test_counts_the_rounds_of_tiles(causal):
    rows, keys, block_m, block_n = 7, 21, 2, 4
    spread = [(i + 1) * keys / rows for i in range(8)]
    lasts = [min(keys, spread[2 * i + 1]) if causal else keys for i in range(4)]
    assert rounds_of(rows, keys, block_m, block_n, causal) == sum(math.ceil(last / 4) for last in lasts)


def test_a_measured_gpu_is_known_by_its_name():
    ceilings = Ceilings({torch.bfloat16: 700.0}, 4000.0, 4000.0, launch_us=2.5)
    known = devices.measured("NVIDIA H200 NVL", "cuda", ceilings)
    assert (known.architecture, known.processors, known.ceilings) == (90, 132, ceilings)
    unknown = devices.measured("NVIDIA T4", "cuda", ceilings)
    workload = next(w for w in SINK_ATTENTION.workloads if w.name == "gpu_1k_d64")
    assert cost_model.predict(SINK_ATTENTION, workload, FORWARD, unknown, torch.bfloat16) is None


# --- Attention ---


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim, published", [(64, (420, 476)), (128, (579, 638))])
@pytest.mark.parametrize("implementation, least", [("recattn", 0.8), ("recattn triton", 0.5)])
def test_attention_on_an_h100_is_near_flash_attention_3(implementation, least, dim, published, causal):
    """TFLOP/s of the forward at 4,096 tokens, causal and not, as published by its authors.

    By FLOPs, for recattn corrects a flash attention; and by the instructions of recattn's own kernel.
    """
    shape = {"heads": 2048 // dim, "kv_heads": 2048 // dim, "length": 4096, "dim": dim, "sinks": 0, "causal": causal}
    workload = SinkWorkload(name="", batch=4, **shape)
    milliseconds = cost_model.predict(SINK_ATTENTION, workload, FORWARD, H100, torch.bfloat16, implementation)
    inputs = cost_model.shapes(SINK_ATTENTION.inputs, workload, torch.bfloat16)
    tflops = SINK_ATTENTION.cost(workload, inputs, FORWARD).flops / milliseconds / 1e9
    assert least < tflops / published[not causal] < 1 + cost_model.TOLERANCE


def test_without_sinks_it_is_the_arithmetic_of_attention():
    workload = SinkWorkload(name="", batch=2, heads=4, kv_heads=2, length=100, dim=16, sinks=0)
    inputs = cost_model.shapes(SINK_ATTENTION.inputs, workload, torch.float32)
    (forward,) = sink_attention_on_a_cpu(workload, inputs, FORWARD, SIMPLE)
    cost = SINK_ATTENTION.cost(workload, inputs, FORWARD)
    assert forward.flops == cost.flops == 4 * 16 * 2 * 4 * 100**2
    assert forward.bytes == cost.bytes + 4 * 2 * 4 * 100
    backward = sum(stage.flops for stage in sink_attention_on_a_cpu(workload, inputs, BACKWARD, SIMPLE))
    assert forward.flops + backward == SINK_ATTENTION.cost(workload, inputs, TRAINING).flops


def test_sinks_add_the_bytes_of_their_bias():
    shape = {"name": "", "batch": 2, "heads": 4, "kv_heads": 4, "length": 1000, "dim": 16}
    for direction, times in ((FORWARD, 1), (BACKWARD, 2)):
        without, with_sinks = (
            sink_attention_on_a_cpu(w, cost_model.shapes(SINK_ATTENTION.inputs, w, torch.float32), direction, SIMPLE)[0]
            for w in (SinkWorkload(**shape, sinks=sinks) for sinks in (0, 100))
        )
        assert with_sinks == replace(without, bytes=without.bytes + times * 2 * 100**2 * 4)


def test_a_causal_attention_computes_whole_blocks_of_keys():
    lengths = torch.tensor([3, 7, 8, 0, 17])
    blocks = [sum(min(n, 4 * (i // 4 + 1)) for i in range(n)) for n in lengths.tolist()]
    assert computed(lengths, 4) == sum(blocks)


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
            # The H200 has the faster memory and the slower clock under load.
            assert times["A100"] >= times["H100"] >= 0.98 * times["H200"]
            for gpu in cost_model.GPUS:
                call = operator, workload, direction, gpu, torch.bfloat16
                assert sum(cost_model.parts(*call).values()) == pytest.approx(times[gpu.name])
                assert 0 < cost_model.floor(*call) < times[gpu.name]
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
    assert (operator, "recattn", kind) in cost_model.MODELS
    *special, last = reasons.REASONS[operator, kind]
    existing = {workload.name for workload in OPERATORS[operator].workloads}
    assert all(known.workloads and set(known.workloads) <= existing for known in special)  # none hides the next
    assert set(last.workloads) <= existing

"""A bad index or scale spoils its own targets of lrea_absorbed_attention and nothing else, in every implementation."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import recattn
from tests.helpers.emulated_cuda import DEVICE
from tests.helpers.lrea_inputs import (
    DTYPES,
    assert_compiles,
    assert_refuses,
    by_item_id,
    compiled_kernels,
    draw_absorbed,
)

ON_CUDA = [pytest.mark.gpu] if DEVICE == "cuda" else []
IMPLS = ["reference", pytest.param("cpu", marks=compiled_kernels), pytest.param("cuda", marks=ON_CUDA)]
every_impl = pytest.mark.parametrize("impl", IMPLS, indirect=True)
COUNTS = (3, 0, 40, 1, 63)
USER = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))  # of each target
# For tensor cores and for multiply-adds.
SIZES = [(16, 16, 48), (7, 20, 12)]


@pytest.fixture
def impl(request):
    if request.param == "cuda":
        request.getfixturevalue("cuda_kernels")
    return request.param


def draw(rank=16, dim=16, value_dim=48, **options) -> dict[str, Tensor]:
    return draw_absorbed(COUNTS, rank=rank, dim=dim, value_dim=value_dim, **options)


def quantized(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    keys, key_scales = recattn.lrea_quantize(inputs["state_keys"])
    values, value_scales = recattn.lrea_quantize(inputs["state_values"])
    return {
        **inputs,
        "state_keys": keys,
        "state_values": values,
        "key_scales": key_scales,
        "value_scales": value_scales,
    }


def attend(impl: str, inputs: dict[str, Tensor], **options) -> Tensor:
    if impl == "cuda":
        inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    return recattn.lrea_absorbed_attention(**inputs, **options, impl=impl).cpu()


def counting(impl: str, inputs: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The output, and how many entries were out of range."""
    invalid = torch.full((1,), 1000)
    invalid = invalid.to(DEVICE) if impl == "cuda" else invalid
    out = attend(impl, inputs, invalid=invalid)
    return out, invalid.item() - 1000


def are_close(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding: products of other sizes are summed in another order."""
    return bool((actual - expected).abs().max() <= 0.02 * expected.abs().max())


def is_one_of(actual: Tensor, candidates: Tensor, impl: str) -> bool:
    """Whether a target's output is one of the candidates [n, H, dv]; on CUDA, checked number by number."""
    is_close = (actual - candidates).abs() <= 0.02 * candidates.abs().amax((1, 2), keepdim=True)
    # Nothing orders two blocks that write the same target.
    return bool(is_close.any(0).all() if impl == "cuda" else is_close.all((1, 2)).any())


# --- Scales of int8 states ---


@every_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["key_scales", "value_scales"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("among", ["alone", "finite", "zeros"])
def test_a_scale_that_is_not_finite_is_never_served_as_a_number(impl, dtype, sizes, name, bad, among):
    inputs = draw(*sizes, dtype=dtype)
    inputs["slots"] = torch.tensor([4, 0, 2, 6, 1])
    inputs = quantized(inputs)
    good = attend(impl, inputs)
    scales = inputs[name][2]  # of the third user
    if among == "alone":
        scales.fill_(bad)
    else:
        scales.mul_(among == "finite")[..., 3] = bad
    out = attend(impl, inputs)
    spoilt = USER == 2
    assert not out[spoilt].isfinite().any()
    assert bad == bad or out[spoilt].isnan().all()
    assert out[~spoilt].equal(good[~spoilt])


# --- Indices out of range, counted ---


@every_impl
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("sizes, dtype", [(SIZES[0], torch.bfloat16), (SIZES[1], torch.float32)])
def test_slots_and_item_ids_out_of_range_are_zeros_and_counted(impl, sizes, dtype, index_dtype, int8):
    inputs = by_item_id(draw(*sizes, dtype=dtype), "targets")
    inputs = quantized(inputs) if int8 else inputs
    names = ("slots", "item_ids", "target_offsets")
    inputs |= {name: inputs[name].to(index_dtype) for name in names}
    expected = attend(impl, inputs)
    out, count = counting(impl, inputs)
    assert out.equal(expected) and count == 0

    most = torch.iinfo(index_dtype).max
    # Of users without targets too; of a target of a user whose slot is bad as well.
    for i, slot in ((0, 7), (1, -1), (3, most)):
        inputs["slots"][i] = slot
    bad_ids = {1: -1, 3: 11, 42: -most, 50: most, 106: 11}
    for i, item in bad_ids.items():
        inputs["item_ids"][i] = item
    out, count = counting(impl, inputs)
    wrong = (USER == 0) | (USER == 3)
    wrong[[*bad_ids]] = True
    assert not out[wrong].any()
    assert out[~wrong].equal(expected[~wrong])
    assert count == 3 + len(bad_ids)


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before, behind", [(5, 0), (0, 70), (2, 9)])
def test_targets_before_the_first_offset_and_behind_the_last_are_zeros(impl, dtype, before, behind):
    inputs = draw(dtype=dtype)
    expected = attend(impl, inputs)
    out, count = counting(impl, {**inputs, "target_offsets": inputs["target_offsets"].clamp(before, 107 - behind)})
    assert not out[:before].any() and not out[107 - behind :].any()
    assert are_close(out[before : 107 - behind], expected[before : 107 - behind])
    assert count == (before > 0) + (behind > 0)


@every_impl
@pytest.mark.parametrize("huge", [1 << 40, -(1 << 40), 1 << 62, -(1 << 62)])
def test_targets_of_no_user_at_all(impl, huge):
    inputs = draw()
    out, count = counting(impl, {**inputs, "target_offsets": torch.full((6,), huge)})
    assert not out.any() and count == 2


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "offsets",
    [
        [0, 90, 30, 60, 20, 107],
        [107, 80, 60, 40, 20, 0],
        [50, 0, 107, 0, 107, 20],
        [0, 1 << 62, -(1 << 62), 64, 63, 107],
        [0, 40, 40, 39, 40, 107],
    ],
)
def test_offsets_out_of_order_serve_every_target_to_a_user_who_has_it(impl, dtype, offsets):
    inputs = draw(dtype=dtype)
    ends = torch.tensor(offsets).clamp(0, 107).tolist()
    whole = {**inputs, "target_offsets": torch.tensor([0, 107])}
    alone = torch.stack([attend(impl, {**whole, "slots": slot[None]}) for slot in inputs["slots"]])
    out, count = counting(impl, {**inputs, "target_offsets": torch.tensor(offsets)})
    assert count > 0
    for t in range(107):
        owners = [user for user in range(5) if ends[user] <= t < ends[user + 1]]
        zeros = [torch.zeros_like(out[t])] if t < ends[0] or t >= ends[-1] else []
        assert is_one_of(out[t], torch.stack([*alone[owners, t], *zeros]), impl), (t, owners)


@every_impl
def test_tables_of_nothing_serve_zeros(impl):
    inputs = by_item_id(draw(), "targets")
    for name in ("state_keys", "state_values", "targets"):
        without = {**inputs, name: inputs[name][:0]}
        if name != "targets":
            without |= {other: inputs[other][:0] for other in ("state_keys", "state_values")}
        out, count = counting(impl, without)
        assert out.shape == (107, 2, 48) and not out.any()
        assert count == (107 if name == "targets" else 5)


@every_impl
def test_the_counter_is_checked(impl):
    inputs = {**draw(), "impl": impl}
    inputs = {name: x.to(DEVICE) if impl == "cuda" and isinstance(x, Tensor) else x for name, x in inputs.items()}
    device = inputs["slots"].device
    function = recattn.lrea_absorbed_attention
    message = "invalid must be int64, got int32"
    assert_refuses(function, inputs, "invalid", torch.zeros(1, dtype=torch.int32, device=device), message)
    message = "invalid must be [1], got [2]"
    assert_refuses(function, inputs, "invalid", torch.zeros(2, dtype=torch.int64, device=device), message)
    inputs |= {"slots": inputs["slots"][:0], "target_offsets": inputs["target_offsets"][:1]}
    message = "target_offsets must be offsets from 0 to 107, got offsets of no user"
    assert_refuses(function, inputs, "invalid", torch.zeros(1, dtype=torch.int64, device=device), message)


@compiled_kernels
@pytest.mark.parametrize("name", ["slots", "target_offsets"])
def test_counting_in_a_compiled_graph(name):
    draws = [draw_absorbed((3, 9, 5)), draw_absorbed((30, 4), rank=9, table=9)]
    for inputs in draws:
        inputs[name][0] = 7 if name == "slots" else 2
        inputs["invalid"] = torch.zeros(1, dtype=torch.int64)
    draws[1][name][1] = 99
    assert_compiles(recattn.lrea_absorbed_attention, draws, [])
    # By the compiled call and by the one beside it: once, and once or twice.
    assert [inputs["invalid"].item() for inputs in draws] == [2, 2 if name == "slots" else 4]


@compiled_kernels
def test_opcheck_with_a_counter():
    inputs = draw()
    inputs["slots"][0] = 7
    op = torch.ops.recattn.lrea_absorbed_attention.counting
    torch.library.opcheck(op, [*inputs.values(), 0.01, None, None, None, torch.zeros(1, dtype=torch.int64)])


def test_counting_has_a_gradient_by_the_reference():
    inputs = by_item_id(draw(), "targets")
    inputs["item_ids"][7] = 11
    inputs["state_values"].requires_grad_()
    invalid = torch.zeros(1, dtype=torch.int64)
    out = recattn.lrea_absorbed_attention(**inputs, invalid=invalid)
    (gradient,) = torch.autograd.grad(out.square().sum(), inputs["state_values"])
    assert gradient.isfinite().all() and gradient.any()
    assert not out[7].any() and invalid == 1


# --- Indices that another thread writes ---

RACE = """
import threading, torch, recattn
torch.manual_seed(0)
over = threading.Event()
def write(indices, good):
    while not over.is_set():
        indices.fill_(2**40)
        indices.copy_(good)
def race(indices, call):
    writer = threading.Thread(target=write, args=(indices, indices.clone()))
    writer.start()
    for _ in range(300):
        try:
            call()
        except ValueError:
            pass
    over.set()
    writer.join()
    over.clear()
items, offsets = torch.randn(9, 1, 8), torch.tensor([0, 2000])
states = torch.randn(5, 1, 4, 8)
ids, slots = torch.randint(9, (2000,)), torch.randint(5, (2000,))
race(ids, lambda: recattn.lrea_absorbed_attention(items, states, states, slots[:1], offsets, item_ids=ids))
every = torch.arange(2001)
race(slots, lambda: recattn.lrea_absorbed_attention(items[ids, :], states, states, slots, every))
race(every, lambda: recattn.lrea_absorbed_attention(items[ids, :], states, states, slots, every))
histories = torch.randint(9, (20, 100))
race(histories, lambda: recattn.lrea_compress(items[:, 0], torch.randn(100, 4), item_ids=histories))
print("alive")
"""


@compiled_kernels
def test_indices_written_during_the_call_read_nothing_outside():
    result = subprocess.run([sys.executable, "-c", RACE], capture_output=True, text=True)
    assert result.returncode == 0 and "alive" in result.stdout, result.stderr

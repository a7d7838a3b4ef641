"""The C++ kernels of LREA: every instruction set, gathered rows, int8 states, odd sizes, threads, bad input."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import recattn
from recattn import reference
from recattn._extension import MISSING
from recattn.testing import assert_matches_reference, measure_error
from tests.helpers.instruction_sets import CAPABILITIES, results_at

pytestmark = pytest.mark.skipif("cpu" in MISSING, reason="needs the compiled extension")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# r, d, dv: below and beside the registers' widths, odd (half a pair), the common one last.
SIZES = [(1, 1, 1), (4, 16, 37), (20, 37, 16), (33, 64, 129), (7, 129, 64), (3, 256, 5), (32, 64, 64)]
COUNTS = (3, 0, 1, 0, 63)
attend = functools.partial(recattn.lrea_absorbed_attention, impl="cpu")
compress = functools.partial(recattn.lrea_compress, impl="cpu")


def draw(rank, dim, value_dim, dtype=torch.float32, quantized=False, counts=COUNTS, heads=2, table=7, **replaced):
    inputs = {
        "targets": torch.randn(sum(counts), heads, dim).to(dtype),
        "state_keys": (torch.randn(table, heads, rank, dim) / dim**0.5).to(dtype),
        "state_values": torch.randn(table, heads, rank, value_dim).to(dtype),
        "slots": torch.randint(table, (len(counts),)),
        "target_offsets": torch.tensor([0, *counts]).cumsum(0),
        "negative_slope": 0.1,
    }
    if quantized:
        for name in ("key", "value"):
            state, scales = recattn.lrea_quantize(inputs[f"state_{name}s"].float())
            inputs |= {f"state_{name}s": state, f"{name}_scales": scales}
    return {**inputs, **replaced}


def draw_compress(dtype=torch.float32, items=50, seq_lens=(100, 0, 63, 1), **replaced):
    ids = torch.randint(items, (len(seq_lens), 100))
    for row, length in zip(ids, seq_lens, strict=True):
        row[length:] = torch.iinfo(torch.int64).max
    return {
        "behaviors": torch.randn(items, 45).to(dtype),
        "w_comp": torch.randn(120, 9).to(dtype),
        "seq_lens": torch.tensor(seq_lens),
        "item_ids": ids,
        **replaced,
    }


def strided(tensor: Tensor) -> Tensor:
    """The same values with every axis strided."""
    wide = tensor.new_full([2 * size for size in tensor.shape], torch.nan if tensor.is_floating_point() else 99)
    return wide[tuple(slice(None, None, 2) for _ in tensor.shape)].copy_(tensor)


# --- Errors, for every instruction set ---


def rounding_bound(inputs) -> Tensor:
    """|h - h64| where VNNI serves int8 states: q, and the weights of the int8 rows, are rounded to 15 bits and a sign.

    Half a step of q, through the keys and φ, weighs the values; half a step of the weights, every int8 row. With s a
    step as a share of the row's largest entry: s_q/2 max|q| Σ|k| for a score, s_w/2 max|w| Σ|v| for an output.
    """
    h = torch.zeros(*inputs["targets"].shape[:2], inputs["state_values"].shape[-1], dtype=torch.float64)
    ends = inputs["target_offsets"].tolist()
    for user, slot in enumerate(inputs["slots"].tolist()):
        rows = slice(ends[user], ends[user + 1])
        q = inputs["targets"][rows].double().transpose(0, 1)  # [H, n, d]
        keys = inputs["state_keys"][slot].double() * inputs["key_scales"][slot].double()[..., None]  # [H, r, d]
        values = inputs["state_values"][slot].double()
        value_scales = inputs["value_scales"][slot].double()[:, None]  # [H, 1, r]
        weights = torch.nn.functional.leaky_relu(q @ keys.mT, inputs["negative_slope"]) * value_scales  # [H, n, r]
        score_bound = half_step(keys.shape[-1]) * q.abs().amax(-1, keepdim=True) * keys.abs().sum(-1)[:, None]
        weight_bound = half_step(keys.shape[-2]) * weights.abs().amax(-1, keepdim=True)
        float32 = 8 * torch.finfo(torch.float32).eps * (weights.abs() + q.abs() @ keys.abs().mT * value_scales)
        bound = (score_bound * value_scales * 1.01 + weight_bound * 1.01 + float32) @ values.abs()
        h[rows] = bound.transpose(0, 1)
    return h


def half_step(products: int) -> float:
    """Half a quantization step of a vector whose largest entry is 1. Sums of so many products with int8 fit int32."""
    return 0.5 / min(2**15 - 1, (2**31 - 1) // (128 * max(products, 1)))


def assert_within_bounds(inputs, out: Tensor, capability: str):
    exact = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}
    h = reference.lrea_absorbed_attention(**exact)
    if out.dtype == torch.float64:
        torch.testing.assert_close(out, h, rtol=1e-12, atol=1e-12)
        return
    by_integers = "key_scales" in inputs and inputs["targets"].dtype in (torch.float32, torch.float16)
    if not (by_integers and capability == "avx512_bf16"):
        assert_matches_reference(lambda **_: out, reference.lrea_absorbed_attention, inputs)
        return
    error, bound = (out.double() - h).abs(), rounding_bound(inputs)
    assert (error <= bound + h.abs() * torch.finfo(out.dtype).eps).all()
    assert bound.mean() < 1e-2 * h.abs().mean()


def run_each(cases):
    """What attend, or compress, gives of each case."""
    return [(attend if "targets" in case else compress)(**case) for case in cases]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set(capability, tmp_path):
    cases = [draw(*size, dtype, quantized) for size in SIZES for dtype in DTYPES for quantized in (False, True)]
    compressions = [draw_compress(dtype) for dtype in DTYPES]
    outputs = results_at(capability, run_each, [*cases, *compressions], tmp_path)
    for inputs, out in zip(cases, outputs[: len(cases)], strict=True):
        assert_within_bounds(inputs, out, capability)
    for inputs, out in zip(compressions, outputs[len(cases) :], strict=True):
        assert_matches_reference(lambda out=out, **_: out, reference.lrea_compress, inputs)


def test_unknown_instruction_set():
    environment = {**os.environ, "RECATTN_CPU_CAPABILITY": "avx1024"}
    command = [sys.executable, "-c", "import torch, recattn; torch.ops.recattn.cpu_capability()"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "must be baseline or avx2 or avx512 or avx512_bf16, got avx1024" in run.stderr


# --- Gathered rows ---


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [37, 64])
def test_gathered_targets(dtype, quantized, dim):
    inputs = draw(20, dim, 33, dtype, quantized, targets=torch.randn(11, 2, dim).to(dtype))
    ids = torch.randint(11, (sum(COUNTS),))
    expected = attend(**{**inputs, "targets": inputs["targets"][ids]})
    for item_ids in (ids, ids.int(), strided(ids)):
        assert attend(**inputs, item_ids=item_ids).equal(expected)
    assert attend(**{**inputs, "targets": strided(inputs["targets"])}, item_ids=ids).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantized", [False, True])
def test_one_target_for_every_head(dtype, quantized):
    inputs = draw(20, 36, 33, dtype, quantized)
    shared = inputs["targets"][:, :1].expand(-1, 2, -1)
    expected = attend(**{**inputs, "targets": shared.contiguous()})
    assert attend(**{**inputs, "targets": shared}).equal(expected)
    ids = torch.arange(sum(COUNTS))
    assert attend(**{**inputs, "targets": shared}, item_ids=ids).equal(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gathered_behaviors(dtype):
    inputs = draw_compress(dtype)
    dense = {**inputs, "behaviors": inputs["behaviors"][inputs["item_ids"].clamp(max=49)], "item_ids": None}
    expected = compress(**dense)
    assert compress(**inputs).equal(expected)
    assert compress(**{**inputs, "behaviors": strided(inputs["behaviors"])}).equal(expected)
    assert compress(**{**inputs, "item_ids": strided(inputs["item_ids"])}).equal(expected)
    full = torch.randint(50, (4, 100), dtype=torch.int32)
    every = {**inputs, "seq_lens": None}
    expected = compress(**{**every, "behaviors": inputs["behaviors"][full.long()], "item_ids": None})
    assert compress(**{**every, "item_ids": full}).equal(expected)


# --- Layouts, edges, threads ---


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype, quantized):
    inputs = draw(20, 36, 33, dtype, quantized)
    expected = attend(**inputs)
    assert attend(**{name: strided(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}).equal(expected)
    odd_rows = {  # rows contiguous, an odd number of entries apart
        name: torch.cat([x, x[..., : 1 + x.shape[-1] % 2]], -1)[..., : x.shape[-1]]
        for name, x in inputs.items()
        if name in ("targets", "state_keys", "state_values")
    }
    assert attend(**{**inputs, **odd_rows}).equal(expected)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(dtype, quantized):
    for counts in ((), (0, 0)):
        assert attend(**draw(4, 8, 6, dtype, quantized, counts)).shape == (0, 2, 6)
        none = torch.zeros(0, dtype=torch.int64)
        inputs = draw(4, 8, 6, dtype, quantized, counts, targets=torch.zeros(0, 2, 8, dtype=dtype), item_ids=none)
        assert attend(**inputs).shape == (0, 2, 6)
    no_rank = draw(1, 8, 6, dtype, quantized)
    for name in ("state_keys", "state_values", "key_scales", "value_scales"):
        if name in no_rank:
            no_rank[name] = no_rank[name][:, :, :0]
    assert (attend(**no_rank) == 0).all()
    no_dim = draw(4, 8, 6, dtype, quantized)
    no_dim |= {name: no_dim[name][..., :0] for name in ("targets", "state_keys")}
    assert (attend(**no_dim) == 0).all()
    assert attend(**draw(4, 8, 6, dtype, quantized, heads=0)).shape == (67, 0, 6)
    assert (compress(**draw_compress(dtype, seq_lens=(0, 0))) == 0).all()


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_agree(dtype, quantized):
    inputs = draw(20, 37, 33, dtype, quantized, counts=(1000, 3, 0, 700))
    behaviors = draw_compress(dtype, seq_lens=tuple(range(37, 101)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = attend(**inputs), compress(**behaviors)
        torch.set_num_threads(4)
        together = attend(**inputs), compress(**behaviors)
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_targets_that_are_no_numbers_show(dtype, worst):
    inputs = draw(20, 37, 33, dtype, quantized=True)
    expected = attend(**inputs)
    inputs["targets"][5, 1, 30] = worst
    out = attend(**inputs)
    assert not out[5, 1].isfinite().any()
    out[5, 1] = expected[5, 1]
    assert out.equal(expected)


def test_rows_of_zeros_and_of_one_size():
    inputs = draw(32, 1000, 16, quantized=True)  # so long that int32 holds no sum of the largest int16 products
    inputs["targets"].fill_(3.0)
    inputs["targets"][7] = 0
    inputs["targets"][9] = 1e-38
    inputs["state_keys"].fill_(127)
    out = attend(**inputs)
    assert (out[7] == 0).all()
    low = reference.lrea_absorbed_attention(**inputs)
    ref64 = reference.lrea_absorbed_attention(**{**inputs, "targets": inputs["targets"].double()})
    assert measure_error("output", out, low, ref64, eps=2**-13).passed


# --- Bad input ---


@pytest.mark.parametrize("value", [11, -1, 2**40, -(2**63)])
def test_item_ids_out_of_range(value):
    inputs = draw(4, 8, 6, targets=torch.randn(11, 2, 8))
    ids = torch.randint(11, (sum(COUNTS),))
    ids[66] = value
    with pytest.raises(ValueError, match=rf"item_ids must be rows of a table of 11, got {value} at index \[66\]"):
        attend(**inputs, item_ids=ids)
    inputs = draw_compress(items=11)
    inputs["item_ids"][2, 62] = value
    with pytest.raises(ValueError, match=rf"item_ids must be rows of a table of 11, got {value} at index \[2, 62\]"):
        compress(**inputs)


def test_refusals_of_the_operators():
    absorbed = torch.ops.recattn.lrea_absorbed_attention.default
    inputs = draw(4, 8, 6)
    whole = [*(x.long() if name == "targets" else x for name, x in inputs.items()), None, None, None]
    for index in (1, 2):
        whole[index] = whole[index].long()
    with pytest.raises(ValueError, match="targets must be float64 or float32 or bfloat16 or float16, got int64"):
        absorbed(*whole)
    with pytest.raises(ValueError, match="negative_slope must be finite, got inf"):
        absorbed(*[*inputs.values()][:5], float("inf"), None, None, None)
    behaviors, w_comp = torch.randn(50, 45), torch.randn(120, 9)
    for arguments, message in (
        ((behaviors, w_comp, None, None, None), "behaviors must be [U, L, d]"),
        ((behaviors, w_comp, None, None, torch.zeros(3, 4)), "item_ids must be int64 or int32, got float32"),
        ((behaviors, w_comp, None, None, torch.zeros(3)), "item_ids must be [U, L]"),
        (
            (behaviors, w_comp, None, None, torch.zeros(3, 130).long()),
            "Lmax of w_comp must be at least L = 130, got 120",
        ),
        ((behaviors, w_comp.half(), None, None, torch.zeros(3, 4).long()), "w_comp must have the dtype of behaviors"),
        ((behaviors, w_comp, torch.ones(2).long(), None, torch.zeros(3, 4).long()), "seq_lens must be [U] = [3], got"),
    ):
        with pytest.raises(ValueError) as error:
            torch.ops.recattn.lrea_compress(*arguments)
        assert message in str(error.value)

"""LREA: the reference against formulas written apart from it, every implementation against the reference."""

import functools
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import recattn
from recattn import reference
from recattn._extension import MISSING
from recattn.ops import lrea_attention as ops
from recattn.testing import assert_matches_reference
from tests.helpers.memory import LargestTensor
from tests.helpers.strategies import ragged_lengths, seeds

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESTORED_GRADS = ["targets", "keys", "values", "w_decomp"]
absorbed_cpu = functools.partial(recattn.lrea_absorbed_attention, impl="cpu")
compress_cpu = functools.partial(recattn.lrea_compress, impl="cpu")
compiled_kernels = pytest.mark.skipif("cpu" in MISSING, reason=MISSING.get("cpu", ""))


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def draw_compress(users=3, length=100, dim=17, rank=8, longest=None, seq_lens=None, dtype=torch.float32):
    return {
        "behaviors": torch.randn(users, length, dim, dtype=dtype),
        "w_comp": torch.randn(longest or length, rank, dtype=dtype),
        "seq_lens": None if seq_lens is None else torch.tensor(seq_lens),
    }


def draw_restored(counts=(3, 0, 1, 63), heads=2, rank=8, dim=16, value_dim=12, length=100, seq_lens=None, **options):
    dtype = options.get("dtype", torch.float32)
    users = len(counts)
    return {
        "targets": torch.randn(sum(counts), heads, dim, dtype=dtype),
        "keys": torch.randn(users, heads, rank, dim, dtype=dtype),
        "values": torch.randn(users, heads, rank, value_dim, dtype=dtype),
        "w_decomp": torch.randn(rank, length, dtype=dtype),
        "target_offsets": offsets_of(list(counts)),
        "seq_lens": None if seq_lens is None else torch.tensor(seq_lens),
    }


def draw_absorbed(counts=(3, 0, 1, 63), heads=2, rank=8, dim=16, value_dim=12, table=7, dtype=torch.float32):
    return {
        "targets": torch.randn(sum(counts), heads, dim, dtype=dtype),
        "state_keys": torch.randn(table, heads, rank, dim, dtype=dtype),
        "state_values": torch.randn(table, heads, rank, value_dim, dtype=dtype),
        "slots": torch.randint(table, (len(counts),)),
        "target_offsets": offsets_of(list(counts)),
    }


def strided(tensor: Tensor) -> Tensor:
    """The same values, every axis strided."""
    wide = tensor.new_full([2 * size for size in tensor.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


# --- The reference, beside loops in numpy ---


def leaky(x: np.ndarray | float, slope: float):
    return np.where(x > 0, x, slope * x)


def by_loops_restored(targets, keys, values, w_decomp, target_offsets, seq_lens, slope, scale):
    q, k, v, w = (x.numpy() for x in (targets, keys, values, w_decomp))
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for u in range(len(k)):
        seen = w.shape[1] if seq_lens is None else int(seq_lens[u])
        for t in range(int(target_offsets[u]), int(target_offsets[u + 1])):
            for h in range(q.shape[1]):
                for i in range(seen):
                    key = sum(w[a, i] * k[u, h, a] for a in range(w.shape[0]))
                    value = sum(w[a, i] * v[u, h, a] for a in range(w.shape[0]))
                    out[t, h] += leaky(scale * np.dot(q[t, h], key), slope) * value
    return torch.from_numpy(out)


def by_loops_absorbed(targets, state_keys, state_values, slots, target_offsets, slope):
    q, k, v = (x.numpy() for x in (targets, state_keys, state_values))
    out = np.zeros((*q.shape[:2], v.shape[-1]))
    for u, slot in enumerate(slots.tolist()):
        for t in range(int(target_offsets[u]), int(target_offsets[u + 1])):
            for h in range(q.shape[1]):
                out[t, h] = sum(
                    leaky(np.dot(q[t, h], a), slope) * b for a, b in zip(k[slot, h], v[slot, h], strict=True)
                )
    return torch.from_numpy(out)


def assert_close_float64(actual: Tensor, expected: Tensor):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seq_lens", [None, [9, 0, 4]])
def test_reference_restored(seq_lens):
    inputs = draw_restored(counts=(2, 1, 3), length=9, seq_lens=seq_lens, dtype=torch.float64)
    expected = by_loops_restored(**inputs, slope=0.2, scale=0.3)
    assert_close_float64(reference.lrea_attention(**inputs, negative_slope=0.2, scale=0.3), expected)
    default = by_loops_restored(**inputs, slope=0.01, scale=16**-0.5)
    assert_close_float64(reference.lrea_attention(**inputs), default)


def test_reference_absorbed():
    inputs = draw_absorbed(dtype=torch.float64)
    assert_close_float64(
        reference.lrea_absorbed_attention(**inputs, negative_slope=0.2), by_loops_absorbed(**inputs, slope=0.2)
    )


@pytest.mark.parametrize("seq_lens", [None, [20, 0, 7]])
def test_reference_compress(seq_lens):
    inputs = draw_compress(length=20, longest=25, seq_lens=seq_lens, dtype=torch.float64)
    e, w = inputs["behaviors"].numpy(), inputs["w_comp"].numpy()
    expected = np.zeros((3, 8, 17))
    for u, length in enumerate(seq_lens or [20] * 3):
        for i in range(length):
            expected[u] += np.outer(w[i], e[u, i])
    assert_close_float64(reference.lrea_compress(**inputs), torch.from_numpy(expected))


@pytest.mark.parametrize("orientation", ["scores", "weights"])
@pytest.mark.parametrize("seq_lens", [None, [11, 0, 4, 11]])
@pytest.mark.parametrize("absorb", [reference.lrea_absorb, recattn.lrea_absorb])
def test_absorb(absorb, seq_lens, orientation):
    inputs = draw_restored(length=11, dtype=torch.float64)
    keys, values, w = (inputs[name] for name in RESTORED_GRADS[1:])
    lengths = None if seq_lens is None else torch.tensor(seq_lens)
    options = {"seq_lens": lengths, "scale": 0.3, "orientation": orientation, "negative_slope": 0.2}
    state_keys, state_values = absorb(keys, values, w, **options)
    expected = np.zeros(values.shape)
    slope = 0.2 if orientation == "weights" else 1.0
    for u in range(4):
        for i in range(11 if seq_lens is None else seq_lens[u]):
            column = w[:, i].numpy()
            expected[u] += np.einsum("a,b,hbe->hae", leaky(column, slope), column, values[u].numpy())
    assert_close_float64(state_keys, 0.3 * keys)
    assert_close_float64(state_values, torch.from_numpy(expected))


def test_nonnegativity_loss():
    w, c = torch.randn(4, 9, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    expected = sum(x * x for x in [*w.flatten().tolist(), *c.flatten().tolist()] if x < 0)
    assert_close_float64(recattn.lrea_nonnegativity_loss(w, c), torch.tensor(expected, dtype=torch.float64))
    assert recattn.lrea_nonnegativity_loss(w.abs(), c.abs()) == 0
    leaves = [w.requires_grad_(), c.requires_grad_()]
    assert torch.autograd.gradcheck(recattn.lrea_nonnegativity_loss, leaves)


def gradcheck(function, inputs, names):
    leaves = {name: inputs[name].requires_grad_() for name in names}
    assert torch.autograd.gradcheck(
        lambda *xs: function(**{**inputs, **dict(zip(names, xs, strict=True))}), [*leaves.values()]
    )


@pytest.mark.parametrize("seq_lens", [None, [6, 0, 3]])
@pytest.mark.parametrize("function", [reference.lrea_attention, recattn.lrea_attention])
def test_gradcheck_restored(function, seq_lens):
    sizes = {"heads": 2, "rank": 3, "dim": 4, "value_dim": 2, "length": 6}
    gradcheck(
        function, draw_restored(counts=(2, 1, 3), **sizes, seq_lens=seq_lens, dtype=torch.float64), RESTORED_GRADS
    )


@pytest.mark.parametrize("function", [reference.lrea_compress, recattn.lrea_compress])
def test_gradcheck_compress(function):
    inputs = draw_compress(length=6, longest=8, dim=3, rank=2, seq_lens=[6, 0, 4], dtype=torch.float64)
    gradcheck(function, inputs, ["behaviors", "w_comp"])


def test_gradcheck_absorbed():
    inputs = draw_absorbed(counts=(2, 0, 1), rank=3, dim=4, value_dim=2, table=2, dtype=torch.float64)
    gradcheck(recattn.lrea_absorbed_attention, inputs, ["targets", "state_keys", "state_values"])


@pytest.mark.parametrize("orientation", ["scores", "weights"])
def test_gradcheck_absorb(orientation):
    inputs = draw_restored(rank=3, dim=2, value_dim=2, length=6, seq_lens=[6, 0, 3, 6], dtype=torch.float64)
    inputs = {name: inputs[name] for name in ("keys", "values", "w_decomp", "seq_lens")}
    gradcheck(lambda **x: recattn.lrea_absorb(**x, orientation=orientation), inputs, ["keys", "values", "w_decomp"])


# --- Embeddings by item id, states in int8 ---


def by_item_id(inputs: dict, name: str, items: int = 11) -> dict:
    """The inputs with `name` replaced by a table of items, and the ids."""
    x = inputs[name]
    ids = torch.randint(items, x.shape[: 1 if name == "targets" else 2])
    return {**inputs, name: torch.randn(items, *x.shape[ids.dim() :], dtype=x.dtype), "item_ids": ids}


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
def test_embeddings_are_read_by_item_id(impl):
    inputs = by_item_id(draw_absorbed(), "targets")
    gathered = {**inputs, "targets": inputs["targets"][inputs["item_ids"]]}
    del gathered["item_ids"]
    expected = recattn.lrea_absorbed_attention(**gathered, impl=impl)
    assert recattn.lrea_absorbed_attention(**inputs, impl=impl).equal(expected)
    inputs["item_ids"] = inputs["item_ids"].int()
    assert recattn.lrea_absorbed_attention(**inputs, impl=impl).equal(expected)

    inputs = by_item_id(draw_compress(seq_lens=[100, 0, 63]), "behaviors")
    gathered = {**inputs, "behaviors": inputs["behaviors"][inputs["item_ids"]]}
    del gathered["item_ids"]
    inputs["item_ids"][1:, 63:] = -99  # padding: any number may stand there
    expected = recattn.lrea_compress(**gathered, impl=impl)
    assert recattn.lrea_compress(**inputs, impl=impl).equal(expected)


def test_by_item_id_only_the_reference_has_a_gradient():
    inputs = by_item_id(draw_compress(seq_lens=[100, 0, 63]), "behaviors")
    table = inputs["behaviors"].requires_grad_()
    (gradient,) = torch.autograd.grad(recattn.lrea_compress(**inputs).sum(), table)
    expected = reference.lrea_compress(table[inputs["item_ids"]], inputs["w_comp"], inputs["seq_lens"])
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected.sum(), table))
    if "cpu" not in MISSING:
        with pytest.raises(NotImplementedError, match="impl='cpu' here: it has no gradient"):
            recattn.lrea_compress(**inputs, impl="cpu")


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_quantize(dtype):
    state = torch.randn(5, 2, 8, 33, dtype=dtype)
    state[2, 1, 3] = 0
    rows, scales = recattn.lrea_quantize(state)
    assert rows.dtype == torch.int8 and rows.shape == state.shape
    assert scales.dtype == torch.float32 and scales.shape == (5, 2, 8)
    assert scales[2, 1, 3] == 0 and (rows[2, 1, 3] == 0).all()
    largest = state.abs().amax(-1)
    torch.testing.assert_close(scales.to(dtype) * 127, largest)
    assert (rows.abs().amax(-1).where(largest > 0, 127) == 127).all()
    steps = scales.double()[..., None]
    assert ((steps * rows - state.double()).abs() <= steps * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
@pytest.mark.parametrize("name", ["state_keys", "state_values"])
@pytest.mark.parametrize("entry", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_what_int8_cannot_hold_is_never_served_as_numbers(entry, name, impl):
    inputs = draw_absorbed(rank=16, dim=32, value_dim=32)
    inputs[name] = inputs[name].double()
    inputs[name][:, :, 3, 5] = entry
    (keys, key_scales), (values, value_scales) = (
        recattn.lrea_quantize(inputs.pop(state)) for state in ("state_keys", "state_values")
    )
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    for dtype in (torch.float32, torch.bfloat16):
        quantized = {**inputs, "targets": inputs["targets"].to(dtype), "state_keys": keys, "state_values": values}
        assert recattn.lrea_absorbed_attention(**quantized, **scales, impl=impl).isnan().all()


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
def test_int8_states_stand_for_their_rows(impl):
    """Rows and scales that bfloat16 and float32 hold exactly, so that only what the kernel does can differ."""
    inputs = draw_absorbed(rank=16, dim=32, value_dim=32)
    keys, values = (
        torch.randint(-127, 128, inputs[name].shape).to(torch.int8) for name in ("state_keys", "state_values")
    )
    scales = {name: 2.0 ** torch.randint(-9, -4, keys.shape[:3]) for name in ("key_scales", "value_scales")}
    quantized = {**inputs, "state_keys": keys, "state_values": values, **scales}
    inputs["state_keys"], inputs["state_values"] = (
        x * s[..., None] for x, s in zip((keys, values), scales.values(), strict=True)
    )
    expected = reference.lrea_absorbed_attention(**inputs)
    # Targets and scores may have been rounded to 8 bits, each by at most 1/254 of the largest.
    step = 1 / 127 if impl == "cpu" else 1e-6
    bound = (
        step
        * inputs["targets"].abs().max()
        * 127
        * 32
        * 16
        * scales["key_scales"].max()
        * 127
        * scales["value_scales"].max()
    )
    actual = recattn.lrea_absorbed_attention(**quantized, impl=impl)
    assert (actual - expected).abs().max() <= bound
    cosine = torch.cosine_similarity(actual, expected, dim=-1)
    assert cosine.min() > 0.99 and cosine.mean() > 0.999


# --- The absorbed form beside the restored ---


@pytest.mark.parametrize("orientation", ["scores", "weights"])
@pytest.mark.parametrize("seq_lens", [None, [100, 0, 7, 64]])
def test_absorbed_is_restored_for_a_linear_phi(orientation, seq_lens):
    inputs = draw_restored(seq_lens=seq_lens, dtype=torch.float64)
    restored = recattn.lrea_attention(**inputs, negative_slope=1.0)
    state = recattn.lrea_absorb(
        *(inputs[name] for name in RESTORED_GRADS[1:]),
        seq_lens=inputs["seq_lens"],
        orientation=orientation,
        negative_slope=1.0,
    )
    absorbed = recattn.lrea_absorbed_attention(
        inputs["targets"], *state, torch.arange(4), inputs["target_offsets"], negative_slope=1.0
    )
    assert_close_float64(absorbed, restored)


def draw_one_score_entry():
    """One column of W_decomp, whose score each rank row of z makes up: values restore to exactly 1."""
    rank = 16
    w = torch.rand(rank, 1, dtype=torch.float64)
    keys = torch.eye(rank, dtype=torch.float64)[None, None]  # q is z itself
    values = (w / w.square().sum())[None, None]  # Wᵀ values = 1
    z = torch.randn(50, 1, rank, dtype=torch.float64)
    return z, keys, values, w, torch.tensor([0, 50])


@pytest.mark.parametrize("orientation", ["scores", "weights"])
def test_error_of_absorption(orientation):
    z, keys, values, w, offsets = draw_one_score_entry()
    slope = 0.1
    restored = recattn.lrea_attention(z, keys, values, w, offsets, negative_slope=slope, scale=1.0)
    state = recattn.lrea_absorb(keys, values, w, scale=1.0, orientation=orientation, negative_slope=slope)
    served_slope = slope if orientation == "scores" else 1.0
    absorbed = recattn.lrea_absorbed_attention(z, *state, torch.tensor([0]), offsets, negative_slope=served_slope)
    positive, negative = (part @ w for part in (z.clamp(min=0), (-z).clamp(min=0)))  # [50, 1, 1]
    if orientation == "scores":
        expected = -(1 - slope) * torch.minimum(positive, negative)
    else:
        expected = (1 - slope) * (negative - positive).clamp(min=0)
    assert_close_float64(restored - absorbed, expected)


def test_absorption_in_half_precision_rounds_once():
    inputs = draw_restored(seq_lens=[100, 0, 7, 64], dtype=torch.bfloat16)
    arguments = {name: inputs[name] for name in ("keys", "values", "w_decomp", "seq_lens")}
    assert_matches_reference(
        recattn.lrea_absorb, reference.lrea_absorb, arguments, grads=["keys", "values", "w_decomp"]
    )


# --- Every implementation against the reference ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 100, 129, 700])
def test_restored(length, dtype):
    lengths = [length, 0, length // 2, 1, length]
    inputs = draw_restored(counts=(3, 5, 0, 129, 1), length=length, seq_lens=lengths, dtype=dtype)
    assert_matches_reference(recattn.lrea_attention, reference.lrea_attention, inputs, grads=RESTORED_GRADS)


@pytest.mark.parametrize("counts", [(63,), (100, 1), (9, 9, 9), (300, 7, 0, 40)])
def test_restored_full_histories(counts):
    inputs = draw_restored(counts=counts, rank=33, dim=5, value_dim=3, length=192)
    kernel, expected = (
        functools.partial(module.lrea_attention, negative_slope=0.3, scale=0.5) for module in (recattn, reference)
    )
    assert_matches_reference(kernel, expected, inputs, grads=RESTORED_GRADS)


@compiled_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 63, 100, 129])
def test_compress(length, dtype):
    inputs = draw_compress(users=4, length=length, longest=150, dtype=dtype, seq_lens=[length, 0, length // 2, 1])
    assert_matches_reference(
        compress_cpu,
        reference.lrea_compress,
        inputs,
        grads=["behaviors", "w_comp"],
    )


@compiled_kernels
def test_compress_in_chunks(monkeypatch):
    monkeypatch.setattr(ops, "_CHUNK_ELEMENTS", 2000)
    inputs = draw_compress(users=7, seq_lens=[100, 3, 0, 99, 64, 1, 100])
    assert_matches_reference(recattn.lrea_compress, reference.lrea_compress, inputs, grads=["behaviors", "w_comp"])


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
def test_compress_ignores_padding(impl):
    inputs = draw_compress(seq_lens=[100, 40, 0])
    inputs["behaviors"][1, 40:] = inputs["behaviors"][2] = float("nan")
    leaves = [inputs["behaviors"].requires_grad_(), inputs["w_comp"].requires_grad_()]
    out = recattn.lrea_compress(**inputs, impl=impl)
    assert out.isfinite().all() and (out[2] == 0).all()
    dbehaviors, dw_comp = torch.autograd.grad(out.sum(), leaves)
    assert dw_comp.isfinite().all()
    assert (dbehaviors[1, 40:] == 0).all() and (dbehaviors[2] == 0).all()


@compiled_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank, dim, value_dim", [(1, 1, 1), (32, 64, 64), (63, 129, 100), (8, 16, 33)])
def test_absorbed(rank, dim, value_dim, dtype):
    counts = (1, 0, 2, 100, 63, 129, 0)
    inputs = draw_absorbed(counts, rank=rank, dim=dim, value_dim=value_dim, dtype=dtype)
    assert_matches_reference(absorbed_cpu, reference.lrea_absorbed_attention, inputs)


@compiled_kernels
@pytest.mark.parametrize("operator", ["absorbed", "compress"])
def test_float64(operator):
    if operator == "absorbed":
        inputs = draw_absorbed(counts=(7, 0, 50), rank=9, dim=13, value_dim=11, dtype=torch.float64)
        actual, expected = recattn.lrea_absorbed_attention(**inputs), reference.lrea_absorbed_attention(**inputs)
    else:
        inputs = draw_compress(dtype=torch.float64, seq_lens=[100, 0, 63])
        actual, expected = recattn.lrea_compress(**inputs), reference.lrea_compress(**inputs)
    assert_close_float64(actual, expected)


@compiled_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_contiguous(dtype):
    inputs = draw_absorbed(dtype=dtype)
    views = {name: strided(x) for name, x in inputs.items() if x.is_floating_point()}
    wide_slots = inputs["slots"].repeat_interleave(2)[::2]
    expected = recattn.lrea_absorbed_attention(**inputs)
    assert recattn.lrea_absorbed_attention(**{**inputs, **views, "slots": wide_slots}).equal(expected)
    rows = {name: strided(x.mT.contiguous()).mT for name, x in views.items()}
    assert recattn.lrea_absorbed_attention(**{**inputs, **rows}).equal(expected)

    inputs = draw_compress(dtype=dtype, seq_lens=[100, 1, 50])
    views = {name: strided(inputs[name]) for name in ("behaviors", "w_comp")}
    assert recattn.lrea_compress(**{**inputs, **views}).equal(recattn.lrea_compress(**inputs))


def test_restored_non_contiguous():
    inputs = draw_restored(seq_lens=[100, 0, 7, 64])
    inputs |= {name: strided(inputs[name]) for name in RESTORED_GRADS}
    assert_matches_reference(recattn.lrea_attention, reference.lrea_attention, inputs, grads=RESTORED_GRADS)


@compiled_kernels
@given(
    counts=ragged_lengths(70, 8), heads=st.integers(1, 3), rank=st.integers(1, 40), dim=st.integers(1, 40), seed=seeds
)
def test_absorbed_ragged(counts, heads, rank, dim, seed):
    torch.manual_seed(seed)
    inputs = draw_absorbed(counts, heads=heads, rank=rank, dim=dim, value_dim=dim + 1)
    inputs["slots"], inputs["target_offsets"] = inputs["slots"].int(), inputs["target_offsets"].int()
    assert_matches_reference(absorbed_cpu, reference.lrea_absorbed_attention, inputs)


@given(
    counts=ragged_lengths(40),
    lengths=st.data(),
    rank=st.integers(1, 9),
    length=st.sampled_from((1, 63, 513)),
    seed=seeds,
)
def test_restored_ragged(counts, lengths, rank, length, seed):
    torch.manual_seed(seed)
    drawn = lengths.draw(st.lists(st.integers(0, length), min_size=len(counts), max_size=len(counts)))
    inputs = draw_restored(counts, rank=rank, dim=7, value_dim=5, length=length, seq_lens=drawn)
    inputs["target_offsets"], inputs["seq_lens"] = inputs["target_offsets"].int(), inputs["seq_lens"].int()
    assert_matches_reference(recattn.lrea_attention, reference.lrea_attention, inputs, grads=RESTORED_GRADS)


# --- Edges ---


@pytest.mark.parametrize("impl", [None, "reference"])
def test_empty(impl):
    for counts in ((), (0, 0)):
        inputs = draw_restored(counts)
        leaves = [inputs[name].requires_grad_() for name in RESTORED_GRADS]
        out = recattn.lrea_attention(**inputs, impl=impl)
        assert out.shape == (0, 2, 12)
        gradients = torch.autograd.grad(out.sum(), leaves, allow_unused=True)
        assert all(gradient is None or (gradient == 0).all() for gradient in gradients)
        with torch.no_grad():
            assert recattn.lrea_absorbed_attention(**draw_absorbed(counts), impl=impl).shape == (0, 2, 12)
    for inputs in (draw_compress(users=0), draw_compress(length=0, longest=3), draw_compress(seq_lens=[0, 0, 0])):
        out = recattn.lrea_compress(**inputs, impl=impl)
        assert out.shape == (len(inputs["behaviors"]), 8, 17) and (out == 0).all()
    no_users = draw_restored(())
    keys, values, w = (no_users[name] for name in RESTORED_GRADS[1:])
    for state, shape in zip(recattn.lrea_absorb(keys, values, w), (keys.shape, values.shape), strict=True):
        assert state.shape == shape
    recattn.lrea_absorb(keys, values, w, seq_lens=torch.zeros(0, dtype=torch.int64))


def test_users_without_history_or_targets():
    inputs = draw_restored(counts=(3, 0, 2), seq_lens=[0, 100, 100])
    leaves = {name: inputs[name].requires_grad_() for name in RESTORED_GRADS}
    out = recattn.lrea_attention(**inputs)
    assert (out[:3] == 0).all() and (out[3:] != 0).all()
    gradients = dict(zip(leaves, torch.autograd.grad(out.sum(), [*leaves.values()]), strict=True))
    assert (gradients["targets"][:3] == 0).all()
    assert (gradients["keys"][:2] == 0).all() and (gradients["values"][:2] == 0).all()


@compiled_kernels
def test_threads_share_one_user_and_agree():
    inputs = draw_absorbed(counts=(1000,), rank=32, dim=64, value_dim=64)
    compressed = draw_compress(users=64, length=129, seq_lens=list(range(64, 128)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = recattn.lrea_absorbed_attention(**inputs), recattn.lrea_compress(**compressed)
        torch.set_num_threads(4)
        together = recattn.lrea_absorbed_attention(**inputs), recattn.lrea_compress(**compressed)
    finally:
        torch.set_num_threads(threads)
    assert all(a.equal(b) for a, b in zip(alone, together, strict=True))


def test_reruns_are_bitwise_equal():
    def run():
        torch.manual_seed(1)
        inputs = draw_restored(counts=(300, 1, 77), seq_lens=[100, 3, 64])
        leaves = [inputs[name].requires_grad_() for name in RESTORED_GRADS]
        out = recattn.lrea_attention(**inputs)
        compressed = draw_compress(seq_lens=[100, 1, 50])
        w_comp = compressed["w_comp"].requires_grad_()
        state = recattn.lrea_compress(**compressed)
        with torch.no_grad():
            absorbed = recattn.lrea_absorbed_attention(**draw_absorbed())
        return (
            out,
            absorbed,
            state,
            *torch.autograd.grad(out.square().sum(), leaves),
            *torch.autograd.grad(state.sum(), w_comp),
        )

    assert all(first.equal(second) for first, second in zip(run(), run(), strict=True))


CAPABILITY = """
import sys, torch, recattn
inputs, dout = torch.load(sys.argv[1])
leaves = [inputs[name].requires_grad_() for name in ("targets", "keys", "values", "w_decomp")]
out = recattn.lrea_attention(**inputs, impl="cpu")
gradients = torch.autograd.grad(out, leaves, dout)
torch.save((torch.ops.recattn.cpu_capability(), out.detach(), gradients), sys.argv[2])
"""


@compiled_kernels
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(capability, tmp_path):
    inputs, dout = draw_restored((1, 5, 100), rank=19, length=150, seq_lens=[150, 1, 63]), torch.randn(106, 2, 12)
    torch.save((inputs, dout), tmp_path / "inputs")
    environment = {**os.environ, "RECATTN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", CAPABILITY, str(tmp_path / "inputs"), str(tmp_path / "outputs")]
    subprocess.run(command, env=environment, check=True)
    used, out, gradients = torch.load(tmp_path / "outputs")
    if used != capability:
        pytest.skip(f"this processor has {used} at most")

    def with_gradients(**inputs):
        leaves = [inputs[name].detach().requires_grad_() for name in RESTORED_GRADS]
        expected = reference.lrea_attention(**{**inputs, **dict(zip(RESTORED_GRADS, leaves, strict=True))})
        return expected.detach(), *torch.autograd.grad(expected, leaves, dout.to(expected.dtype))

    assert_matches_reference(lambda **_: (out, *gradients), with_gradients, inputs)


@pytest.mark.parametrize("lengths", [None, [2000, 1000]])
def test_restored_never_holds_a_score_for_every_target_and_behavior(lengths, monkeypatch):
    # What they consist of: a dispatch mode does not see inside an operator.
    for name in ("user_matmul", "user_outer", "middle_factor_fwd", "middle_factor_bwd"):
        monkeypatch.setattr(ops, f"lrea_{name}", getattr(ops, f"_{name}"))
    inputs = draw_restored(counts=(500, 500), heads=1, rank=4, dim=4, value_dim=4, length=2000, seq_lens=lengths)
    leaves = [inputs[name].requires_grad_() for name in RESTORED_GRADS]
    with LargestTensor() as largest:
        torch.autograd.grad(recattn.lrea_attention(**inputs).sum(), leaves)
    assert largest.elements <= max(x.numel() for x in leaves)


# --- Operators and compilation ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [None, [100, 0, 7, 64]])
def test_opcheck_restored(lengths, dtype):
    inputs = draw_restored(seq_lens=lengths, dtype=dtype)
    offsets, w, seq_lens = inputs["target_offsets"], inputs["w_decomp"], inputs["seq_lens"]
    torch.library.opcheck(ops.lrea_user_matmul, [inputs["targets"], inputs["keys"].mT, offsets])
    z = ops.lrea_user_matmul(inputs["targets"], inputs["keys"].mT, offsets)
    torch.library.opcheck(ops.lrea_user_outer, [z, inputs["targets"], offsets])
    torch.library.opcheck(ops.lrea_middle_factor_fwd, [z, w, offsets, seq_lens, 0.01])
    torch.library.opcheck(ops.lrea_middle_factor_bwd, [z, strided(z), strided(w), offsets, seq_lens, 0.01])


@compiled_kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_compiled_kernels(dtype):
    absorbed = draw_absorbed(dtype=dtype)
    op = torch.ops.recattn.lrea_absorbed_attention.default
    torch.library.opcheck(op, [*absorbed.values(), 0.01, None, None, None])
    views = [strided(x) if x.is_floating_point() else x for x in absorbed.values()]
    torch.library.opcheck(op, [*views, 0.01, None, None, None])
    for seq_lens in (None, [100, 0, 7]):
        inputs = draw_compress(seq_lens=seq_lens, dtype=dtype)
        torch.library.opcheck(torch.ops.recattn.lrea_compress.default, [*inputs.values(), None])
        gradient = torch.randn(3, 8, 17, dtype=dtype)
        torch.library.opcheck(ops.lrea_compress_bwd_w_comp, [gradient, inputs["behaviors"], inputs["seq_lens"]])


def assert_compiles(function, draws, grads):
    """One graph, and one compilation for all sizes but the first."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, inputs in enumerate(draws):
        leaves = [inputs[name].requires_grad_() for name in grads]
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            out = compiled(**inputs)
        expected = function(**inputs)
        assert out.equal(expected)
        if grads:
            got, want = (torch.autograd.grad(result.square().sum(), leaves) for result in (out, expected))
            assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def test_restored_compiles():
    draws = [
        draw_restored((3, 9, 5), length=40, seq_lens=[40, 7, 0]),
        draw_restored((3, 0, 30, 6), length=70, rank=9, seq_lens=[0, 70, 5, 1]),
        draw_restored((100, 2, 5, 6), length=600, dim=8, seq_lens=[600, 513, 512, 1]),
    ]
    assert_compiles(recattn.lrea_attention, draws, RESTORED_GRADS)


def test_restored_compiles_with_one_tensor_for_keys_and_values():
    inputs = draw_restored((3, 9, 5), length=40)
    del inputs["values"]
    grads = [name for name in RESTORED_GRADS if name != "values"]
    assert_compiles(lambda keys, **rest: recattn.lrea_attention(keys=keys, values=keys, **rest), [inputs], grads)


@compiled_kernels
def test_compress_compiles():
    draws = [
        draw_compress(users, length, seq_lens=[length // 2] * users) for users, length in ((2, 20), (3, 63), (5, 30))
    ]
    assert_compiles(recattn.lrea_compress, draws, ["behaviors", "w_comp"])


@compiled_kernels
def test_absorbed_compiles():
    draws = [draw_absorbed((3, 9, 5)), draw_absorbed((30, 4), rank=9, table=9), draw_absorbed((1, 2, 3, 4), dim=8)]
    assert_compiles(recattn.lrea_absorbed_attention, draws, [])


# --- Which implementation runs ---


@compiled_kernels
def test_absorbed_has_no_compiled_gradient():
    inputs = draw_absorbed()
    inputs["state_keys"].requires_grad_()
    assert recattn.lrea_absorbed_attention(**inputs).requires_grad
    with pytest.raises(NotImplementedError, match="cannot run impl='cpu' here: it has no gradient"):
        recattn.lrea_absorbed_attention(**inputs, impl="cpu")
    with torch.no_grad():
        recattn.lrea_absorbed_attention(**inputs, impl="cpu")


def test_explicit_implementations_say_why_not(monkeypatch):
    with pytest.raises(NotImplementedError, match="cannot run impl='cuda' here: the tensors are on cpu"):
        recattn.lrea_absorbed_attention(**draw_absorbed(), impl="cuda")
    with pytest.raises(NotImplementedError, match="lrea_absorbed_attention has no impl='triton'"):
        recattn.lrea_absorbed_attention(**draw_absorbed(), impl="triton")
    monkeypatch.setitem(MISSING, "cpu", "installed without them")
    for function, inputs in (
        (recattn.lrea_absorbed_attention, draw_absorbed()),
        (recattn.lrea_attention, draw_restored()),
        (recattn.lrea_compress, draw_compress()),
    ):
        with pytest.raises(NotImplementedError, match="installed without them"):
            function(**inputs, impl="cpu")
        assert function(**inputs).equal(getattr(reference, function.__name__)(**inputs))
    assert ops.availability("cpu")["cpu"] == "installed without them"


# --- Bad input ---


def assert_refuses(function, inputs, name, value, message):
    with pytest.raises(ValueError) as error:
        function(**{**inputs, name: value})
    assert message in str(error.value)


def indices(*values: int) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("targets", torch.randn(67, 16), "targets must be [T, H, d] = [T, H, d], got [67, 16]"),
        (
            "targets",
            torch.randint(3, (67, 2, 16)),
            "targets must be float64 or float32 or bfloat16 or float16, got int64",
        ),
        ("keys", torch.randn(4, 3, 8, 16), "keys must be [U, H, r, d] = [4, 2, 8, 16], got [4, 3, 8, 16]"),
        ("keys", torch.randn(4, 2, 8, 15), "keys must be [U, H, r, d] = [4, 2, 8, 16], got [4, 2, 8, 15]"),
        ("keys", torch.randn(4, 2, 8, 16).half(), "keys must have the dtype of targets, float32, got float16"),
        ("values", torch.randn(4, 2, 9, 12), "values must be [U, H, r, dv] = [4, 2, 8, 12], got [4, 2, 9, 12]"),
        ("values", None, "values must be a torch.Tensor, got NoneType"),
        ("w_decomp", torch.randn(7, 100), "w_decomp must be [r, Lmax] = [8, 100], got [7, 100]"),
        ("w_decomp", torch.randn(8, 100, device="meta"), "w_decomp must be on the device of targets, cpu, got meta"),
        ("target_offsets", indices(0, 3, 67), "target_offsets must be [U+1] = [5], got [3]"),
        ("target_offsets", torch.randn(5), "target_offsets must be int64 or int32, got float32"),
        ("target_offsets", indices(0, 4, 3, 4, 67), "target_offsets must be ascending, got 3 at index [2]"),
        (
            "target_offsets",
            indices(0, 3, 3, 4, 66),
            "target_offsets must be offsets from 0 to 67, got offsets from 0 to 66",
        ),
        (
            "target_offsets",
            indices(1, 3, 3, 4, 67),
            "target_offsets must be offsets from 0 to 67, got offsets from 1 to 67",
        ),
        ("seq_lens", indices(1, 2, 3), "seq_lens must be [U] = [4], got [3]"),
        ("seq_lens", torch.ones(4), "seq_lens must be int64 or int32, got float32"),
        ("seq_lens", indices(1, 2, 101, 3), "seq_lens must be between 0 and 100, got 101 at index [2]"),
        ("seq_lens", indices(1, -2, 10, 3), "seq_lens must be between 0 and 100, got -2 at index [1]"),
        ("scale", float("nan"), "scale must be finite, got nan"),
        ("negative_slope", float("inf"), "negative_slope must be finite, got inf"),
        ("impl", "fast", "impl must be None or one of"),
    ],
)
def test_restored_refuses(impl, name, value, message):
    assert_refuses(recattn.lrea_attention, {**draw_restored(), "impl": impl}, name, value, message)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("targets", torch.randn(67, 16), "targets must be [T, H, d] = [T, H, d], got [67, 16]"),
        ("state_keys", torch.randn(7, 1, 8, 16), "state_keys must be [S, H, r, d] = [7, 2, 8, 16], got [7, 1, 8, 16]"),
        (
            "state_values",
            torch.randn(6, 2, 8, 12),
            "state_values must be [S, H, r, dv] = [7, 2, 8, 12], got [6, 2, 8, 12]",
        ),
        (
            "state_values",
            torch.randn(7, 2, 8, 12).double(),
            "state_values must have the dtype of state_keys, float32, got float64",
        ),
        ("slots", indices(0, 1, 2), "target_offsets must be [U+1] = [4], got [5]"),
        ("slots", torch.zeros(4), "slots must be int64 or int32, got float32"),
        ("slots", indices(0, 1, 7, 2), "slots must be rows of a table of 7, got 7 at index [2]"),
        ("slots", indices(0, 1, -1, 2), "slots must be rows of a table of 7, got -1 at index [2]"),
        ("target_offsets", indices(0, 4, 3, 4, 67), "target_offsets must be ascending, got 3 at index [2]"),
        (
            "target_offsets",
            indices(0, 3, 3, 4, 66),
            "target_offsets must be offsets from 0 to 67, got offsets from 0 to 66",
        ),
        ("negative_slope", float("nan"), "negative_slope must be finite, got nan"),
        ("item_ids", torch.zeros(67), "item_ids must be int64 or int32, got float32"),
        ("item_ids", torch.zeros(1, 67).long(), "item_ids must be [T] = [T], got [1, 67]"),
        ("item_ids", torch.arange(1, 68), "item_ids must be rows of a table of 67, got 67 at index [66]"),
        (
            "item_ids",
            indices(0, 1, 2),
            "target_offsets must be offsets from 0 to 3, got offsets from 0 to 67",
        ),
        (
            "key_scales",
            torch.ones(7, 2, 8),
            "must be both given with int8 states, neither with others, got float32 states and 1 of them",
        ),
        (
            "state_keys",
            torch.ones(7, 2, 8, 16, dtype=torch.int8),
            "state_values must have the dtype of state_keys, int8, got float32",
        ),
    ],
)
def test_absorbed_refuses(impl, name, value, message):
    assert_refuses(recattn.lrea_absorbed_attention, {**draw_absorbed(), "impl": impl}, name, value, message)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("key_scales", torch.ones(7, 2, 9), "key_scales must be [S, H, r] = [7, 2, 8], got [7, 2, 9]"),
        ("value_scales", torch.ones(7, 2, 8).double(), "value_scales must be float32, got float64"),
        (
            "value_scales",
            None,
            "must be both given with int8 states, neither with others, got int8 states and 1 of them",
        ),
    ],
)
def test_absorbed_refuses_scales(impl, name, value, message):
    inputs = draw_absorbed()
    states = {name: torch.ones(inputs[name].shape, dtype=torch.int8) for name in ("state_keys", "state_values")}
    scales = {name: torch.ones(7, 2, 8) for name in ("key_scales", "value_scales")}
    function = functools.partial(recattn.lrea_absorbed_attention, impl=impl)
    assert_refuses(function, {**inputs, **states, **scales}, name, value, message)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
def test_compress_refuses_item_ids(impl):
    inputs = {**by_item_id(draw_compress(seq_lens=[100, 40, 0]), "behaviors"), "impl": impl}
    ids = inputs["item_ids"]
    assert_refuses(recattn.lrea_compress, inputs, "item_ids", ids.float(), "item_ids must be int64 or int32")
    ids = ids.clone()
    ids[1, 39] = 11
    message = "item_ids must be rows of a table of 11, got 11 at index [1, 39]"
    assert_refuses(recattn.lrea_compress, inputs, "item_ids", ids, message)
    message = "behaviors must be [I, d] = [I, d], got [3, 100, 17]"
    assert_refuses(recattn.lrea_compress, inputs, "behaviors", torch.randn(3, 100, 17), message)


def test_quantize_refuses():
    for value, message in (
        (torch.zeros(3, 4, dtype=torch.int8), "state must be float64 or float32 or bfloat16 or float16, got int8"),
        (torch.zeros(3, 0), "state must be [..., r, d] with d of at least 1, got [3, 0]"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            recattn.lrea_quantize(value)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=compiled_kernels)])
@pytest.mark.parametrize(
    "name, value, message",
    [
        ("behaviors", torch.randn(100, 17), "behaviors must be [U, L, d] = [U, L, d], got [100, 17]"),
        ("w_comp", torch.randn(99, 8), "Lmax of w_comp must be at least L = 100, got 99"),
        ("w_comp", torch.randn(100, 8).half(), "w_comp must have the dtype of behaviors, float32, got float16"),
        ("seq_lens", indices(1, 2), "seq_lens must be [U] = [3], got [2]"),
        ("seq_lens", indices(1, 2, 101), "seq_lens must be between 0 and 100, got 101 at index [2]"),
        ("seq_lens", indices(-1, 2, 1), "seq_lens must be between 0 and 100, got -1 at index [0]"),
    ],
)
def test_compress_refuses(impl, name, value, message):
    assert_refuses(recattn.lrea_compress, {**draw_compress(), "impl": impl}, name, value, message)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("keys", torch.randn(8, 16), "keys must be [U, H, r, d] = [U, H, r, d], got [8, 16]"),
        ("values", torch.randn(4, 2, 9, 12), "values must be [U, H, r, dv] = [4, 2, 8, 12], got [4, 2, 9, 12]"),
        ("w_decomp", torch.randn(9, 100), "w_decomp must be [r, Lmax] = [8, 100], got [9, 100]"),
        ("seq_lens", indices(0, 1, 2, 200), "seq_lens must be between 0 and 100, got 200 at index [3]"),
        ("orientation", "keys", "orientation must be 'scores' or 'weights', got 'keys'"),
    ],
)
def test_absorb_refuses(name, value, message):
    inputs = draw_restored()
    inputs = {name: inputs[name] for name in ("keys", "values", "w_decomp", "seq_lens")}
    assert_refuses(recattn.lrea_absorb, inputs, name, value, message)


def test_nonnegativity_loss_refuses():
    inputs = {"w_decomp": torch.randn(8, 10), "compressed": torch.randn(3, 8, 4)}
    message = "compressed must be [U, r, d] = [3, 8, 4], got [3, 7, 4]"
    assert_refuses(recattn.lrea_nonnegativity_loss, inputs, "compressed", torch.randn(3, 7, 4), message)


@compiled_kernels
@pytest.mark.parametrize("name", ["targets", "state_keys", "state_values", "slots", "target_offsets"])
def test_the_operator_itself_checks_what_it_reads(name):
    inputs = draw_absorbed()
    inputs[name] = inputs[name][..., :-1]
    if name == "state_values":  # its last axis is free
        inputs[name] = inputs[name][:, :, :-1]
    with pytest.raises(ValueError, match="must"):
        torch.ops.recattn.lrea_absorbed_attention(*inputs.values(), 0.01, None, None, None)

"""LREA: the reference beside formulas written apart from it, int8 states, the absorbed form beside the restored."""

import functools

import numpy as np
import pytest
import torch

import recattn
from recattn import reference
from recattn._extension import MISSING
from recattn.testing import assert_matches_reference
from tests.helpers.lrea_inputs import (
    DTYPES,
    RESTORED_GRADS,
    assert_close_float64,
    by_item_id,
    compiled_kernels,
    draw_absorbed,
    draw_compress,
    draw_restored,
)

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
    of_w, of_users = (sum(x * x for x in entries.flatten().tolist() if x < 0) for entries in (w, c))
    for reduction, expected in (("mean", of_w + of_users / 3), ("sum", of_w + of_users)):
        loss = functools.partial(recattn.lrea_nonnegativity_loss, reduction=reduction)
        assert_close_float64(loss(w, c), torch.tensor(expected, dtype=torch.float64))
        assert loss(w.abs(), c.abs()) == 0 and loss(w.abs(), c[:0]) == 0
        assert torch.autograd.gradcheck(loss, [w.clone().requires_grad_(), c.clone().requires_grad_()])


def test_nonnegativity_loss_warns_that_it_is_a_mean_now():
    w, c = torch.randn(4, 9), torch.randn(3, 4, 5)
    with pytest.warns(FutureWarning, match="now the mean over users; it was their sum. Pass reduction=") as warned:
        assert recattn.lrea_nonnegativity_loss(w, c).equal(recattn.lrea_nonnegativity_loss(w, c, reduction="mean"))
    assert [warning.filename for warning in warned] == [__file__]


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
    """bfloat16 and float32 hold the rows and scales exactly, so that only the kernel's work can differ."""
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

"""sink_attention: the reference against a formula written apart from it, what runs on a CPU against the reference."""

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

import recattn
from recattn import reference
from recattn.testing import assert_matches_reference
from tests.helpers.sink_inputs import draw, draw_packed
from tests.helpers.strategies import lengths, ragged_lengths, seeds

GRADS = ["q", "k", "v", "inter_sink_bias"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def by_loops(q, k, v, sink_positions, inter_sink_bias, sink_logits, causal, valid, scale):
    """The equation, one row at a time, with Python's own sums: [B, Hq, N, Dv] in float64."""
    batch, heads, length, _ = q.shape
    out = torch.zeros(batch, heads, length, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        sink_of = {p: s for s, p in enumerate(sink_positions[b].tolist()) if p >= 0}
        for h in range(heads):
            g = h // (heads // k.shape[1])
            bias = inter_sink_bias[b, h if inter_sink_bias.shape[1] > 1 else 0]
            for i in range(length):
                keys = [j for j in range(length) if valid[b][j] and valid[b][i] and (j <= i or not causal)]
                terms = {}
                for j in keys:
                    score = scale * float(torch.dot(q[b, h, i], k[b, g, j]))
                    if i in sink_of and j in sink_of:
                        score += float(bias[sink_of[i], sink_of[j]])
                    terms[j] = math.exp(score)
                total = math.fsum(terms.values())
                if sink_logits is not None and keys:
                    total += math.exp(float(sink_logits[h]))
                for j, term in terms.items():
                    out[b, h, i] += term / total * v[b, g, j]
    return out


def windows_of(lengths: list[int], starts: list[int] | None) -> dict:
    return {"seq_lens": torch.tensor(lengths), "seq_starts": None if starts is None else torch.tensor(starts)}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_logits", [False, True])
@pytest.mark.parametrize("layout", ["right", "left", "window"])
def test_reference_is_the_equation(causal, with_logits, layout):
    inputs = draw(
        batch=3, heads=4, kv_heads=2, length=9, dim=5, value_dim=3, sinks=4, bias_heads=4, dtype=torch.float64
    )
    inputs["inter_sink_bias"] = inputs["inter_sink_bias"].double()
    inputs["sink_positions"][1, 2:] = -1
    logits = torch.randn(4, dtype=torch.float64) if with_logits else None
    starts = {"right": [0, 0, 0], "left": [0, 3, 9], "window": [0, 2, 4]}[layout]
    valid = [[start <= p < start + n for p in range(9)] for start, n in zip(starts, (9, 6, 0), strict=True)]
    windows = windows_of([9, 6, 0], starts if layout == "window" else None)
    if layout != "window":
        windows["padding_side"] = layout
    expected = by_loops(**inputs, sink_logits=logits, causal=causal, valid=valid, scale=0.3)
    got = reference.sink_attention(**inputs, sink_logits=logits, causal=causal, scale=0.3, **windows)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_gradients(causal):
    inputs = draw(heads=2, kv_heads=1, length=6, dim=3, sinks=3, dtype=torch.float64)
    inputs["inter_sink_bias"] = inputs["inter_sink_bias"].double()
    leaves = [inputs.pop(name).requires_grad_() for name in GRADS]
    logits = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, bias, sink_logits):
        return reference.sink_attention(
            q,
            k,
            v,
            **inputs,
            inter_sink_bias=bias,
            sink_logits=sink_logits,
            causal=causal,
            seq_lens=torch.tensor([6, 4]),
        )

    assert torch.autograd.gradcheck(function, (*leaves, logits))


@pytest.mark.parametrize("scale", [0.125, 0.3])
@pytest.mark.parametrize("dim", [50, 128])
def test_weights_of_the_backward_sum_to_one(dim, scale):
    """As in the forward, up to a few roundings of scores in the tens, for any scale."""
    q, k = torch.randn(2, 1, 4, dim, dim)
    v = torch.zeros(1, 4, dim, dim, requires_grad=True)
    out = recattn.sink_attention(q, k, v, torch.empty(1, 0, dtype=torch.long), torch.empty(1, 1, 0, 0), scale=scale)
    (weights,) = torch.autograd.grad(out, v, torch.eye(dim).expand_as(out))  # transposed
    assert (weights.double().sum(-2) - 1).abs().max() <= 10 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"length": 1, "sinks": 1},
        {"length": 63, "sinks": 0},
        {"length": 63, "sinks": 63, "bias_scale": 30.0},
        {"length": 129, "sinks": 60, "kv_heads": 2, "bias_heads": 4},
        {"length": 192, "sinks": 40, "kv_heads": 1, "dim": 50, "value_dim": 20},
        {"length": 64, "sinks": 20, "dim": 8, "value_dim": 24, "bias_scale": 5.0},
    ],
    ids=str,
)
def test_dense(dtype, causal, shape):
    assert_matches_reference(
        recattn.sink_attention, reference.sink_attention, {**draw(**shape, dtype=dtype), "causal": causal}, grads=GRADS
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [-50.0, 200.0, -math.inf, 1e-6])
@pytest.mark.parametrize("sinks", [30, 100])
def test_extreme_bias(dtype, causal, bias, sinks):
    """Rows with almost all softmax sum on suppressed sinks, rows that lose every key, overflow of exp(β), a tiny β."""
    inputs = draw(batch=3, sinks=sinks, kv_heads=2, dtype=dtype)
    chosen = torch.rand(inputs["inter_sink_bias"].shape) < 0.5
    inputs["inter_sink_bias"] = torch.where(chosen, bias, 0.0)
    inputs["inter_sink_bias"][:, :, 3] = bias
    assert_matches_reference(
        recattn.sink_attention, reference.sink_attention, {**inputs, "causal": causal}, grads=GRADS
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("starts", [None, [0, 50, 5, 20, 36, 1]], ids=str)
def test_padded(dtype, causal, starts):
    inputs = draw(batch=6, sinks=30, bias_scale=3.0, bias_heads=4, kv_heads=2, dtype=dtype)
    inputs["sink_positions"][1, 20:] = -1
    inputs |= windows_of([100, 0, 37, 1, 63, 64], starts) | {"causal": causal}
    assert_matches_reference(recattn.sink_attention, reference.sink_attention, inputs, grads=GRADS)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_left_padding_is_windows_at_the_end(impl):
    inputs = draw(batch=3, heads=2, kv_heads=1, length=33, sinks=9) | {"causal": True, "impl": impl}
    lengths = torch.tensor([33, 0, 20])
    left = with_gradients(recattn.sink_attention, inputs | {"seq_lens": lengths, "padding_side": "left"})
    windows = with_gradients(recattn.sink_attention, inputs | {"seq_lens": lengths, "seq_starts": 33 - lengths})
    assert all(map(torch.equal, left, windows))


def with_gradients(function, inputs: dict, grads=GRADS) -> list[torch.Tensor]:
    """The output and gradients of a call."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in grads}
    out = function(**(inputs | leaves))
    out = out[0] if isinstance(out, tuple) else out
    return [out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))]


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("packed", [False, True])
def test_without_sinks_it_is_plain_attention(packed, impl):
    q, k, v = (torch.randn(3, heads, 20, 8) for heads in (4, 2, 2))
    expected = with_gradients(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        {"q": q, "k": k, "v": v},
        grads="qkv",
    )
    inputs = {"q": q, "k": k, "v": v, "causal": True, "impl": impl}
    if packed:
        inputs |= {name: inputs[name].transpose(1, 2).flatten(0, 1) for name in "qkv"}
        inputs["cu_seqlens"] = torch.arange(4) * 20
    results = with_gradients(recattn.sink_attention, inputs, grads="qkv")
    if packed:
        results = [x.unflatten(0, (3, 20)).transpose(1, 2) for x in results]
    for got, want in zip(results, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_nested_is_packed(compiled):
    """To the bit, with the log-sum-exp and every gradient, in one graph for batches of any size."""
    call = functools.partial(recattn.sink_attention, causal=True, return_lse=True)
    torch._dynamo.reset()
    on_nested = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    for seq_lens, sinks in (([7, 0, 12], [3, 0, 5]), ([9, 1], [4, 1])):
        inputs = draw_packed(seq_lens, sinks, heads=4, kv_heads=2, dim=8) | {"sink_logits": torch.randn(4)}
        offsets = inputs.pop("cu_seqlens")
        leaves = {name: inputs[name].requires_grad_() for name in (*GRADS, "sink_logits")}
        nested = {name: torch.nested.nested_tensor_from_jagged(inputs[name], offsets).transpose(1, 2) for name in "qkv"}
        out, lse = on_nested(**inputs | nested)
        expected, expected_lse = call(**inputs, cu_seqlens=offsets)
        assert out.shape[:2] == lse.shape[:2] == (len(seq_lens), 4) and out.is_nested
        assert torch.equal(out.transpose(1, 2).values(), expected) and torch.equal(lse.values(), expected_lse)
        gradients = torch.autograd.grad(out.values().square().sum(), list(leaves.values()))
        assert all(map(torch.equal, gradients, torch.autograd.grad(expected.square().sum(), list(leaves.values()))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ["dense", "padded", "packed"])
def test_sink_logits(dtype, causal, form):
    if form == "packed":
        inputs = draw_packed([129, 0, 63, 1], [30, 0, 63, 1], dtype=dtype)
    else:
        inputs = draw(heads=16, bias_scale=3.0, dtype=dtype)
    if form == "padded":
        inputs["seq_lens"] = torch.tensor([41, 100])
    inputs |= {"sink_logits": torch.randn(inputs["q"].shape[-3 if form != "packed" else 1]), "causal": causal}
    assert_matches_reference(recattn.sink_attention, reference.sink_attention, inputs, grads=[*GRADS, "sink_logits"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_packed(dtype, causal):
    inputs = draw_packed([129, 0, 63, 1, 70], [30, 0, 63, 1, 0], dtype=dtype)
    assert_matches_reference(
        recattn.sink_attention, reference.sink_attention, {**inputs, "causal": causal}, grads=GRADS
    )


@given(length=lengths, data=st.data(), seed=seeds, causal=st.booleans(), left=st.booleans())
def test_packed_equals_padded_equals_alone(length, data, seed, causal, left):
    """One sequence's result does not depend on the batch it sits in, nor on how the batch is laid out."""
    torch.manual_seed(seed)
    seq_lens = data.draw(ragged_lengths(length))
    sinks = data.draw(st.integers(0, length))
    inputs = draw(batch=len(seq_lens), length=length, sinks=sinks, kv_heads=2, dim=8)
    padded, lse = recattn.sink_attention(
        **inputs,
        causal=causal,
        seq_lens=torch.tensor(seq_lens),
        padding_side="left" if left else "right",
        return_lse=True,
    )
    for b, n in enumerate(seq_lens):
        start = length - n if left else 0
        own = slice(start, start + n)
        positions = inputs["sink_positions"][b] - start
        kept = (positions >= 0) & (positions < n)
        alone = {name: inputs[name][b : b + 1, :, own] for name in ("q", "k", "v")}
        alone["sink_positions"] = positions[kept].unsqueeze(0)
        alone["inter_sink_bias"] = inputs["inter_sink_bias"][b : b + 1, :, kept][..., kept]
        expected, expected_lse = recattn.sink_attention(**alone, causal=causal, return_lse=True)
        torch.testing.assert_close(padded[b, :, own], expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[b, :, own], expected_lse[0], rtol=1e-5, atol=1e-5)
        outside = torch.ones(length, dtype=torch.bool)
        outside[own] = False
        assert (padded[b, :, outside] == 0).all() and (lse[b, :, outside] == -math.inf).all()


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_may_hold_anything(impl, causal):
    inputs = {**draw(sinks=30), "seq_lens": torch.tensor([40, 77]), "causal": causal, "impl": impl}
    dirty = {name: inputs[name].clone() for name in ("q", "k", "v", "inter_sink_bias")}
    for b, n in enumerate((40, 77)):
        for name in ("q", "k", "v"):
            dirty[name][b, :, n:] = math.nan
        padded_sinks = inputs["sink_positions"][b] >= n
        dirty["inter_sink_bias"][b, :, padded_sinks] = math.nan
        dirty["inter_sink_bias"][b, :, :, padded_sinks] = math.nan
    results = []
    for values in ({}, dirty):
        leaves = {name: {**inputs, **values}[name].clone().requires_grad_() for name in GRADS}
        out = recattn.sink_attention(**{**inputs, **leaves})
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))))
    for clean, other in zip(*results, strict=True):
        torch.testing.assert_close(clean, other, rtol=0, atol=0)


def test_float64_is_kept():
    inputs = draw(length=63, dtype=torch.float64, bias_scale=3.0)
    out, lse = recattn.sink_attention(**inputs, return_lse=True)
    expected, expected_lse = reference.sink_attention(**inputs, return_lse=True)
    assert lse.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)


def test_zero_bias_is_plain_attention():
    inputs = draw(length=129, sinks=129)
    inputs["inter_sink_bias"] = torch.zeros_like(inputs["inter_sink_bias"])
    plain = torch.nn.functional.scaled_dot_product_attention(inputs["q"], inputs["k"], inputs["v"])
    torch.testing.assert_close(recattn.sink_attention(**inputs), plain)


def test_views_that_are_not_contiguous():
    inputs = draw(length=63)
    views = {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.randn(2, 4, 16, 63).transpose(2, 3),
        "v": torch.randn(2, 8, 63, 32)[:, ::2, :, ::2],
        "inter_sink_bias": torch.randn(2, 20, 20, 1).permute(0, 3, 2, 1),
    }
    assert_matches_reference(recattn.sink_attention, reference.sink_attention, {**inputs, **views}, grads=GRADS)


def test_expanded_gradient():
    """out.sum() sends back a gradient of stride 0."""
    inputs = draw(length=63)
    leaves = {name: inputs[name].requires_grad_() for name in GRADS}
    recattn.sink_attention(**inputs).sum().backward()
    expected = torch.autograd.grad(reference.sink_attention(**inputs).sum(), list(leaves.values()))
    for leaf, gradient in zip(leaves.values(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_empty_batches(batch, length):
    inputs = {
        "q": torch.zeros(batch, 2, length, 4, requires_grad=True),
        "k": torch.zeros(batch, 2, length, 4),
        "v": torch.zeros(batch, 2, length, 4),
        "sink_positions": torch.full((batch, 1), -1),
        "inter_sink_bias": torch.zeros(batch, 1, 1, 1),
    }
    out = recattn.sink_attention(**inputs)
    out.sum().backward()
    assert out.shape == (batch, 2, length, 4) and inputs["q"].grad.shape == inputs["q"].shape


def test_empty_packed_batch():
    inputs = draw_packed([0, 0], [0, 0])
    out, lse = recattn.sink_attention(**inputs, return_lse=True)
    assert out.shape == (0, 4, 16) and lse.shape == (4, 0)


def test_dropout_keeps_the_mean():
    inputs = draw(length=20, sinks=5, dim=4)
    mean = torch.stack([recattn.sink_attention(**inputs, dropout_p=0.5) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, recattn.sink_attention(**inputs), rtol=0.1, atol=0.1)


def test_reruns_agree_to_the_bit():
    inputs = draw(length=129, sinks=60, bias_scale=10.0, kv_heads=2)
    runs = []
    for _ in range(2):
        leaves = {name: inputs[name].clone().requires_grad_() for name in GRADS}
        out = recattn.sink_attention(**{**inputs, **leaves})
        runs.append((out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def op_inputs(form: str, dtype=torch.float32):
    packed = form == "packed"
    inputs = (
        draw_packed([20, 0, 13], [5, 0, 3], dtype=dtype)
        if packed
        else draw(length=20, sinks=5, kv_heads=2, dtype=dtype)
    )
    seq_lens = torch.tensor([20, 7]) if form == "padded" else None
    seq_starts = torch.tensor([0, 9]) if form == "padded" else None
    arguments = [inputs[name] for name in ("q", "k", "v", "sink_positions", "inter_sink_bias")]
    return [
        *arguments,
        torch.randn(4),
        seq_lens,
        seq_starts,
        inputs.get("cu_seqlens"),
        None,
        True,
        0.25,
        0.0,
        None,
        None,
        None,
    ]


@pytest.mark.parametrize("form", ["dense", "padded", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(form, dtype):
    arguments = op_inputs(form, dtype)
    torch.library.opcheck(torch.ops.recattn.sink_attention_fwd.default, arguments)
    results = torch.ops.recattn.sink_attention_fwd(*arguments)
    torch.library.opcheck(
        torch.ops.recattn.sink_attention_bwd.default,
        [torch.ones_like(results[0]), *arguments[:3], *results, *arguments[3:]],
    )


def test_opcheck_permuted():
    arguments = op_inputs("dense")
    arguments[0] = torch.randn(2, 20, 4, 16).transpose(1, 2)
    arguments[2] = torch.randn(2, 2, 6, 20).transpose(2, 3)
    torch.library.opcheck(torch.ops.recattn.sink_attention_fwd.default, arguments)


@pytest.mark.parametrize("layout", ["dense", "window"])
def test_compiles_to_one_graph_without_recompiling(layout):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **inputs: recattn.sink_attention(**inputs, causal=True),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for batch, length, sinks in ((2, 40, 5), (3, 63, 9), (5, 100, 30)):
        inputs = draw(batch=batch, length=length, sinks=sinks)
        if layout == "window":
            inputs["seq_lens"] = torch.randint(length + 1, (batch,))
            inputs["seq_starts"] = (length - inputs["seq_lens"]) // 2
        leaves = {name: inputs[name].requires_grad_() for name in GRADS}
        with torch.compiler.set_stance("fail_on_recompile" if batch > 2 else "default"):
            out = compiled(**inputs)
        expected = recattn.sink_attention(**inputs, causal=True)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
        for got, want in zip(
            torch.autograd.grad(out.sum(), list(leaves.values())),
            torch.autograd.grad(expected.sum(), list(leaves.values())),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_compiles_with_one_tensor_for_q_k_and_v():
    inputs = draw(length=20, sinks=5)
    del inputs["k"], inputs["v"]

    def itself(q, **others):
        return recattn.sink_attention(q, q, q, **others)

    leaf = inputs["q"].requires_grad_()
    out = torch.compile(itself, fullgraph=True, backend="aot_eager")(**inputs)
    expected = itself(**inputs)
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(x.sum(), leaf)[0] for x in (out, expected)))


BAD = {
    "q must be a torch.Tensor, got list": {"q": [1.0]},
    r"q must be \[B, Hq, N, D\], got \[4, 100, 16\]": {"q": torch.zeros(4, 100, 16)},
    r"k must be \[B, Hkv, N, D\] = \[2, 4, 100, 16\], got \[2, 4, 99, 16\]": {"k": torch.zeros(2, 4, 99, 16)},
    r"v must be \[B, Hkv, N, Dv\] = \[2, 4, 100, 16\], got \[3, 4, 100, 16\]": {"v": torch.zeros(3, 4, 100, 16)},
    r"\(Hq, Hkv\) of q and k must be a multiple and its divisor, got \(4, 3\)": {
        "k": torch.zeros(2, 3, 100, 16),
        "v": torch.zeros(2, 3, 100, 16),
    },
    "D of q, k and v must be at least 1, got 0": {"q": torch.zeros(2, 4, 100, 0), "k": torch.zeros(2, 4, 100, 0)},
    "q must be float64 or float32 or bfloat16 or float16, got int64": {
        "q": torch.zeros(2, 4, 100, 16, dtype=torch.long)
    },
    "k must have the dtype of q, float32, got float16": {"k": torch.zeros(2, 4, 100, 16, dtype=torch.half)},
    r"sink_positions must be \[B, M\] = \[2, 3\], got \[3, 3\]": {
        "sink_positions": torch.zeros(3, 3, dtype=torch.long)
    },
    "sink_positions must be int64 or int32, got float32": {"sink_positions": torch.zeros(2, 20)},
    r"inter_sink_bias must be \[B, 1 or Hq, M, M\] = \[2, 1 or 4, 20, 20\], got \[2, 4, 20, 19\]": {
        "inter_sink_bias": torch.zeros(2, 4, 20, 19)
    },
    "inter_sink_bias must be float64 .* got int64": {"inter_sink_bias": torch.zeros(2, 1, 20, 20, dtype=torch.long)},
    r"sink_logits must be \[Hq\] = \[4\], got \[2\]": {"sink_logits": torch.zeros(2)},
    "k must be a torch.Tensor, got NoneType": {"k": None},
    "sink_positions must be a torch.Tensor, got list": {"sink_positions": [3]},
    "inter_sink_bias must be a torch.Tensor, got list": {"inter_sink_bias": [[0.0]]},
    "sink_positions must be given with inter_sink_bias, got None": {"sink_positions": None},
    "inter_sink_bias must be given with sink_positions, got None": {"inter_sink_bias": None},
    "sink_logits must be a torch.Tensor, got list": {"sink_logits": [0.0] * 4},
    "seq_lens must be a torch.Tensor, got list": {"seq_lens": [3, 4]},
    "cu_seqlens must be a torch.Tensor, got list": {"cu_seqlens": [0, 3]},
    r"seq_lens must be \[B\] = \[2\], got \[3\]": {"seq_lens": torch.zeros(3, dtype=torch.long)},
    "seq_lens must be int64 or int32, got float32": {"seq_lens": torch.zeros(2)},
    "seq_lens must be between 0 and 100, got 101 at index": {"seq_lens": torch.tensor([3, 101])},
    "padding_side must be 'right' or 'left', got 'top'": {"padding_side": "top"},
    "seq_lens must be given with seq_starts, got None": {"seq_starts": torch.zeros(2).long()},
    r"seq_starts must be \[B\] = \[2\], got \[3\]": windows_of([3, 4], [0, 0, 0]),
    "seq_starts must be int64 or int32, got float32": {"seq_lens": torch.ones(2).long(), "seq_starts": torch.zeros(2)},
    "seq_starts.* must be between 0 and .*, got (-1|2) ": windows_of([3, 4], [-1, 0]),
    "seq_starts.* must be between 0 and .*, got (97|101) ": windows_of([3, 4], [0, 97]),
    "padding_side must be 'right', the default, beside seq_starts": {
        **windows_of([3, 4], [0, 1]),
        "padding_side": "left",
    },
    "seq_starts must be None beside cu_seqlens": {
        "seq_starts": torch.ones(2).long(),
        "cu_seqlens": torch.tensor([0, 1, 2]),
    },
    "dropout_p must be at least 0 and below 1, got 1.0": {"dropout_p": 1.0},
    "scale must be finite, got nan": {"scale": math.nan},
    "impl must be None or one of .* got 'fast'": {"impl": "fast"},
    "seq_lens must be None beside cu_seqlens": {"seq_lens": torch.ones(2).long(), "cu_seqlens": torch.tensor([0, 1])},
    "sink_positions must be below the sequence length 100, got 100": {
        "sink_positions": torch.arange(81, 101).repeat(2, 1)
    },
    "sink_positions must be token positions, or -1 for padding, got -2": {
        "sink_positions": torch.arange(-2, 18).repeat(2, 1)
    },
    "sink_positions must be strictly ascending, padded with -1 at the end, got 3": {
        "sink_positions": torch.tensor([[*range(19), 3]] * 2)
    },
    "k must be on the device of q, cpu, got meta": {"k": torch.zeros(2, 4, 100, 16, device="meta")},
}


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, impl):
    bad = BAD[message]
    inputs = {"impl": impl, **draw(), **bad}
    if r"= \[2, 3\]" in message:
        message = message.replace(r"\[2, 3\]", r"\[2, \d+\]")
    with pytest.raises(ValueError, match=message):
        recattn.sink_attention(**inputs)


@pytest.mark.parametrize(
    "cu_seqlens, message",
    [
        ([0, 5, 20], "cu_seqlens must be offsets from 0 to 33, got offsets from 0 to 20"),
        ([0, 34, 33], "cu_seqlens must be ascending, got 33 at index"),
        ([0, 2, 33], "sink_positions must be below the sequence length of each sequence"),
    ],
)
def test_bad_offsets(cu_seqlens, message):
    inputs = draw_packed([20, 13], [5, 3])
    inputs["sink_positions"][0, 0] = 1
    inputs["sink_positions"][0, 1:] = torch.arange(10, 14)
    for impl in (None, "reference"):
        with pytest.raises(ValueError, match=message):
            recattn.sink_attention(**{**inputs, "cu_seqlens": torch.tensor(cu_seqlens)}, impl=impl)


def test_an_impl_that_does_not_exist_says_what_does():
    with pytest.raises(
        NotImplementedError, match="has no impl='cuda'; it has 'cpu', 'reference', 'triton', 'correction'"
    ):
        recattn.sink_attention(**draw(), impl="cuda")

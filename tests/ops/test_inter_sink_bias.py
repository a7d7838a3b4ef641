"""inter_sink_bias: the reference against a formula written apart from it, the kernels against the reference."""

import functools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import recattn
from recattn import reference
from recattn._extension import MISSING
from recattn._options import InterSinkBiasOptions
from recattn.ops import inter_sink_bias as ops
from recattn.ops._support import draw_dropout_seed
from recattn.testing import assert_matches_reference
from tests.helpers.interpreted import DEVICE, DTYPES, with_dtypes
from tests.helpers.memory import LargestTensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from recattn.triton_kernels import inter_sink_bias as kernels
from recattn.triton_kernels.common.dropout import dropout_weights
from recattn.triton_kernels.common.tiles import block_width

ROOT = Path(__file__).parents[2]
GRADS = ["q_s", "k_s", "bias_scale"]
# The gradients that have an error distribution; that of bias_scale is one number, and has its own tests.
ARRAYS = ["q_s", "k_s"]
by_triton = functools.partial(recattn.inter_sink_bias, impl="triton")
COMPILED = pytest.param(
    "cpu", marks=pytest.mark.skipif(DEVICE != "cpu" or "cpu" in MISSING, reason="needs C++ kernels")
)
KERNELS = ["triton", COMPILED]  # more of the C++ kernels: tests/cpu/test_inter_sink_bias.py


def draw(batch=3, heads=2, sinks=15, dim=16, dtype=torch.float32, masked=True) -> dict[str, Tensor | None]:
    """A batch whose sequences have all of their sinks, some, some with gaps, and none."""
    sink_mask = torch.ones(batch, sinks, dtype=torch.bool)
    for b in range(1, batch):
        sink_mask[b] = [torch.arange(sinks) < sinks // 2, torch.rand(sinks) < 0.7, torch.tensor(False)][b % 3]
    return {
        "q_s": torch.randn(batch, heads, sinks, dim, dtype=dtype, device=DEVICE),
        "k_s": torch.randn(batch, heads, sinks, dim, dtype=dtype, device=DEVICE),
        "bias_scale": torch.tensor(1.5, device=DEVICE),
        "sink_mask": sink_mask.to(DEVICE) if masked else None,
    }


def with_gradients(function, inputs: dict) -> list[Tensor]:
    """The output and all gradients, for an incoming gradient that differs between entries."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in GRADS}
    out = function(**{**inputs, **leaves})
    incoming = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), incoming)]


def assert_identical(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


# --- The reference ---


def by_loops(q_s, k_s, sink_mask, bias_scale, causal, scale) -> Tensor:
    """The equation, one head and one row at a time, with Python's own sums."""
    batch, heads, sinks, _ = q_s.shape
    bias = torch.zeros(batch, 1, sinks, sinks, dtype=torch.float64)
    for b in range(batch):
        live = [i for i in range(sinks) if sink_mask[b, i]]
        for h in range(heads):
            for i in live:
                seen = [j for j in live if j <= i or not causal]
                terms = [math.exp(scale * float(torch.dot(q_s[b, h, i], k_s[b, h, j]))) for j in seen]
                for j, term in zip(seen, terms, strict=True):
                    bias[b, 0, i, j] += float(bias_scale) / heads * term / math.fsum(terms)
    return bias


def in_float64(inputs: dict) -> dict:
    return {name: x.cpu().double() if x.is_floating_point() else x.cpu() for name, x in inputs.items()}


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_the_equation(causal):
    inputs = in_float64(draw(batch=4, heads=3, sinks=7, dim=5))
    expected = by_loops(**inputs, causal=causal, scale=0.3)
    got = reference.inter_sink_bias(**inputs, causal=causal, scale=0.3)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_reference_gradients(causal):
    inputs = in_float64(draw(batch=4, sinks=5, dim=3))
    leaves = [inputs[name].requires_grad_() for name in GRADS]

    def function(q_s, k_s, bias_scale):
        return reference.inter_sink_bias(q_s, k_s, bias_scale=bias_scale, sink_mask=inputs["sink_mask"], causal=causal)

    assert torch.autograd.gradcheck(function, leaves)


def test_float64_is_kept():
    inputs = in_float64(draw())
    out = recattn.inter_sink_bias(**inputs)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, reference.inter_sink_bias(**inputs), rtol=0, atol=0)


# --- The kernels ---


SIZES = [(1, 16), (15, 50), (49, 64), (64, 16), (100, 64), (128, 50)]


@pytest.mark.parametrize("sizes, causal, dtype", with_dtypes(SIZES, [False, True]), ids=str)
def test_matches_reference(sizes, causal, dtype):
    sinks, dim = sizes
    # The larger ones take the interpreter long.
    batch, heads = (4, 3) if sinks < 49 else (2, 2) if sinks < 100 else (2, 1)
    inputs = draw(batch, heads, sinks, dim, dtype)
    assert_matches_reference(by_triton, reference.inter_sink_bias, {**inputs, "causal": causal}, grads=ARRAYS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference_without_mask(dtype):
    inputs = {**draw(heads=3, sinks=20, dtype=dtype, masked=False), "bias_scale": -10.0, "scale": 0.7}
    assert_matches_reference(by_triton, reference.inter_sink_bias, inputs, grads=ARRAYS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sharp_softmax(dtype):
    """Scores in the hundreds."""
    inputs = {**draw(sinks=20, dtype=dtype), "scale": 40.0}
    assert_matches_reference(by_triton, reference.inter_sink_bias, inputs, grads=ARRAYS)


def one_by_one(function):
    """Apply `function` to each sequence alone with its own bias_scale [B], so that its gradient is an array."""

    def of_batch(q_s, k_s, sink_mask, bias_scale, **options):
        calls = zip(q_s.split(1), k_s.split(1), sink_mask.split(1), bias_scale.unbind(), strict=True)
        return torch.cat([function(q_s=q, k_s=k, sink_mask=m, bias_scale=b, **options) for q, k, m, b in calls])

    return of_batch


def draw_with_scales(batch: int, **shape) -> dict[str, Tensor]:
    return {**draw(batch, **shape), "bias_scale": torch.linspace(-10, 10, batch, device=DEVICE)}


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("sizes, causal, dtype", with_dtypes([(1, 2), (20, 2), (49, 1)], [False, True]), ids=str)
def test_gradient_of_bias_scale(sizes, causal, dtype, impl):
    sinks, heads = sizes
    inputs = {**draw_with_scales(8, sinks=sinks, heads=heads, dtype=dtype), "causal": causal}
    kernel = functools.partial(recattn.inter_sink_bias, impl=impl)
    assert_matches_reference(*map(one_by_one, (kernel, reference.inter_sink_bias)), inputs, grads=GRADS)


def test_gradient_of_bias_scale_sums_over_the_batch():
    inputs = draw(batch=4)
    inputs["bias_scale"] = torch.full((4,), 2.0, device=DEVICE)
    *_, by_sequence = with_gradients(one_by_one(by_triton), inputs)
    *_, summed = with_gradients(by_triton, {**inputs, "bias_scale": inputs["bias_scale"][0]})
    torch.testing.assert_close(summed, by_sequence.sum())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_forms_of_bias_scale(dtype, shape):
    inputs = draw()
    inputs["bias_scale"] = torch.full(shape, 2.0, dtype=dtype, device=DEVICE)
    out, *_, dbias_scale = with_gradients(by_triton, inputs)
    assert out.dtype == torch.float32 and dbias_scale.dtype == dtype and dbias_scale.shape == shape
    torch.testing.assert_close(out, by_triton(**{**inputs, "bias_scale": 2}), rtol=0, atol=0)


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_sinks_may_hold_anything(impl, causal):
    function = functools.partial(recattn.inter_sink_bias, causal=causal, impl=impl)
    inputs = draw(batch=4, sinks=20)
    masked = ~inputs["sink_mask"][:, None, :, None]
    dirty = {name: inputs[name].masked_fill(masked, math.nan) for name in ("q_s", "k_s")}
    clean = with_gradients(function, inputs)
    assert_identical(with_gradients(function, {**inputs, **dirty}), clean)
    out, dq_s, dk_s, _ = clean
    assert (out.masked_select(masked | masked.mT) == 0).all()
    assert all((gradient.masked_select(masked) == 0).all() for gradient in (dq_s, dk_s))


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
@pytest.mark.parametrize("bias_scale", [math.nan, math.inf])
@pytest.mark.parametrize("sinks", [15, 70])  # of one iteration of the backward, and of several
def test_a_bias_scale_that_is_not_finite_changes_no_masked_sink(sinks, bias_scale, impl):
    inputs = draw(sinks=sinks) | {"bias_scale": torch.tensor(bias_scale, device=DEVICE)}
    bias, *gradients = with_gradients(functools.partial(recattn.inter_sink_bias, impl=impl), inputs)
    ignored = ~inputs["sink_mask"]
    assert not bias.masked_select((ignored[:, :, None] | ignored[:, None, :])[:, None]).any()
    assert not any(x.masked_select(ignored[:, None, :, None]).any() for x in gradients[:2])
    assert not bias[0].isfinite().any()


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_gradients_that_come_in_at_masked_sinks_go_nowhere(impl):
    inputs = {**draw(batch=4, sinks=20), "causal": True, "impl": impl}
    leaves = {name: inputs[name].requires_grad_() for name in GRADS}
    out = recattn.inter_sink_bias(**inputs)
    mask = inputs["sink_mask"]
    visible = (mask[:, None, :, None] & mask[:, None, None, :]).tril()
    results = [
        torch.autograd.grad(out, list(leaves.values()), visible.float().masked_fill(~visible, value), retain_graph=True)
        for value in (0.0, math.nan)
    ]
    assert_identical(*results)


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_causal_rows_do_not_depend_on_later_sinks(impl):
    inputs = draw(sinks=20, masked=False)
    later = {name: inputs[name].clone() for name in ("q_s", "k_s")}
    for x in later.values():
        x[:, :, 12:] = torch.randn_like(x[:, :, 12:])
    out, changed = (recattn.inter_sink_bias(**{**inputs, **x}, causal=True, impl=impl) for x in ({}, later))
    assert torch.equal(out[:, :, :12], changed[:, :, :12]) and not torch.equal(out, changed)


@pytest.mark.parametrize("causal", [False, True])
def test_result_does_not_depend_on_the_batch(causal):
    """A sequence alone, and padded to 60 sinks among others."""
    function = functools.partial(by_triton, causal=causal)
    alone = draw(batch=1, sinks=40, masked=False)
    batch = draw(batch=3, sinks=60)
    for name in ("q_s", "k_s"):
        batch[name][1, :, :40] = alone[name][0]
    batch["sink_mask"][1] = torch.arange(60, device=DEVICE) < 40
    out, padded = function(**alone), function(**batch)
    assert torch.equal(padded[1, 0, :40, :40], out[0, 0])
    assert (padded[1, 0, 40:] == 0).all() and (padded[1, 0, :, 40:] == 0).all()


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
@pytest.mark.parametrize("batch, sinks", [(0, 5), (2, 0), (0, 0)])
def test_empty(batch, sinks, impl):
    inputs = draw(batch=batch, sinks=sinks)
    out, *gradients = with_gradients(functools.partial(recattn.inter_sink_bias, impl=impl), inputs)
    assert out.shape == (batch, 1, sinks, sinks)
    assert gradients[0].shape == inputs["q_s"].shape and gradients[2] == 0


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_no_sink_counts(impl):
    inputs = draw()
    inputs["sink_mask"] = torch.zeros_like(inputs["sink_mask"])
    results = with_gradients(functools.partial(recattn.inter_sink_bias, impl=impl), inputs)
    assert all((x == 0).all() for x in results)


def strided_copy(x: Tensor) -> Tensor:
    """The same values with the axes reversed in memory and NaN, or True, between them."""
    gap = math.nan if x.is_floating_point() else True
    memory = x.new_full((*x.shape[::-1][:-1], 3 * x.shape[0]), gap)
    return memory[..., ::3].permute(*reversed(range(x.dim()))).copy_(x)


def test_non_contiguous():
    inputs = draw(sinks=20, dim=50)
    views = {name: strided_copy(inputs[name]) for name in ("q_s", "k_s", "sink_mask")}
    leaves = [views[name].requires_grad_() for name in ("q_s", "k_s")]
    out = by_triton(**{**inputs, **views})
    incoming = strided_copy(torch.linspace(-1, 2, out.numel(), device=DEVICE).view_as(out))
    expected, *gradients, _ = with_gradients(by_triton, inputs)
    assert_identical([out, *torch.autograd.grad(out, leaves, incoming)], [expected, *gradients])


def test_gradients_are_laid_out_as_their_inputs():
    """What a linear layer gives, [B, M, H, D], goes back to it without a copy."""
    leaf = draw()["q_s"].transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(by_triton(leaf, leaf.detach()).square().sum(), leaf)
    assert gradient.stride() == leaf.stride() and not gradient.is_contiguous()


def test_expanded_gradient():
    """out.sum() sends back a gradient of stride 0. A softmax's sum has a gradient for bias_scale only."""
    inputs = draw(masked=False)
    leaves = {name: inputs[name].requires_grad_() for name in GRADS}
    out = by_triton(**inputs)
    out.sum().backward()
    torch.testing.assert_close(leaves["bias_scale"].grad * 1.5, out.detach().sum())


def test_reruns_agree_to_the_bit():
    inputs = {**draw(sinks=65), "causal": True}
    assert_identical(with_gradients(by_triton, inputs), with_gradients(by_triton, inputs))


@pytest.mark.parametrize("sinks", [20, 65])
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_any_tile(rows, sinks, monkeypatch):
    """Several iterations of the backward accumulate dK in memory."""
    fwd = kernels.InterSinkBiasFwdConfig(rows, block_k=16, num_warps=4, num_stages=1)
    bwd = kernels.InterSinkBiasBwdConfig(
        min(rows, block_width(sinks)), block_k=32, block_d=16, num_warps=8, num_stages=1
    )
    monkeypatch.setattr(kernels.InterSinkBiasFwdConfig, "heuristic", lambda *_: fwd)
    monkeypatch.setattr(kernels.InterSinkBiasBwdConfig, "heuristic", lambda *_: bwd)
    inputs = draw(batch=2, heads=1, sinks=sinks, dim=50)
    assert_matches_reference(by_triton, reference.inter_sink_bias, inputs, grads=ARRAYS)


def test_no_tensor_of_all_weights():
    inputs = draw(batch=1, heads=8, sinks=128, dim=16, masked=False)
    tensors = (inputs["q_s"], inputs["k_s"], None, None, None)
    options = InterSinkBiasOptions(1.0, causal=False, dropout_p=0.0, scale=None)
    with LargestTensor() as largest:
        out = ops.inter_sink_bias_fwd(*tensors, options)
        ops.inter_sink_bias_bwd(out, *tensors, options)
    assert largest.elements <= 128 * 128 < 8 * 128 * 128


# --- Dropout ---


@triton.jit
def read_dropout_weights(seed, out, dropped, BLOCK: tl.constexpr):
    bh = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    weights = dropout_weights(tl.load(seed), bh, 2, index, 0, dropped, BLOCK)
    tl.store(out + bh * BLOCK * BLOCK + index[:, None] * BLOCK + index[None, :], weights)


def explicit_dropout(q_s, k_s, dropout_p, **inputs) -> Tensor:
    """The mean over heads of weights that are dropped as the kernels drop them."""
    B, H, M, _ = q_s.shape
    torch.manual_seed(7)
    seed = draw_dropout_seed(dropout_p, q_s.device)
    keep = torch.empty(B, H, 128, 128, device=DEVICE)
    read_dropout_weights[(B * H,)](seed, keep, round(dropout_p * 65536), BLOCK=128)
    heads = [reference.inter_sink_bias(q_s[:, h : h + 1], k_s[:, h : h + 1], **inputs) for h in range(H)]
    return (torch.cat(heads, dim=1) * keep[:, :, :M, :M]).mean(1, keepdim=True)


def seeded_dropout(impl="triton", **inputs) -> Tensor:
    torch.manual_seed(7)
    return recattn.inter_sink_bias(**inputs, impl=impl)


@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("sinks, dtype", with_dtypes([15, 49, 100]), ids=str)
def test_dropout_drops_the_same_weights_in_the_backward(sinks, dtype, impl):
    inputs = {**draw(sinks=sinks, dtype=dtype), "causal": True, "dropout_p": 0.3}
    assert_matches_reference(functools.partial(seeded_dropout, impl), explicit_dropout, inputs, grads=ARRAYS)


@pytest.mark.parametrize("impl", KERNELS)
def test_dropout_and_the_gradient_of_bias_scale(impl):
    inputs = {**draw_with_scales(8, heads=1), "dropout_p": 0.3}
    functions = functools.partial(seeded_dropout, impl), explicit_dropout
    assert_matches_reference(*map(one_by_one, functions), inputs, grads=GRADS)


def test_dropout_keeps_the_mean():
    one = draw(batch=1, heads=2, sinks=16)
    many = {name: one[name].expand(40, -1, -1, -1) for name in ("q_s", "k_s")}
    undropped = by_triton(**one)
    samples = torch.cat([by_triton(**many, bias_scale=one["bias_scale"], dropout_p=0.25) for _ in range(2)])
    # [H, 1, M, M]
    weights = torch.cat([by_triton(one["q_s"][:, h : h + 1], one["k_s"][:, h : h + 1]) for h in range(2)])
    variance = (1.5 / 2) ** 2 * weights.square().sum(0) * 0.25 / 0.75
    standard_error = (variance / len(samples)).sqrt()
    deviation = (samples.mean(0) - undropped[0]) / standard_error
    assert deviation.abs().max() < 5 and 0.8 < deviation.std() < 1.2
    assert 0.9 < (samples.var(0) / variance).mean() < 1.1


def test_dropout_follows_the_generator():
    inputs = {**draw(sinks=20), "dropout_p": 0.5}
    first, again = seeded_dropout(**inputs), seeded_dropout(**inputs)
    assert torch.equal(first, again) and not torch.equal(first, by_triton(**inputs))


def test_dropout_under_checkpointing():
    """The recomputed forward drops the same weights."""
    inputs = {**draw(sinks=20), "dropout_p": 0.5}

    def checkpointed(**inputs):
        return checkpoint(functools.partial(by_triton, **inputs), use_reentrant=False)

    results = []
    for function in (by_triton, checkpointed):
        torch.manual_seed(3)
        results.append(with_gradients(function, inputs))
    assert_identical(*results)


def test_dropout_of_nearly_everything():
    results = with_gradients(functools.partial(by_triton, dropout_p=1 - 1e-9), draw(sinks=20))
    assert all(x.isfinite().all() for x in results)


def test_dropout_of_the_reference_keeps_the_mean():
    inputs = draw(sinks=4)
    mean = torch.stack([reference.inter_sink_bias(**inputs, dropout_p=0.5) for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, reference.inter_sink_bias(**inputs), rtol=0.1, atol=0.1)


# --- Autocast, torch.compile, registration ---


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
def test_autocast(impl):
    function = functools.partial(recattn.inter_sink_bias, impl=impl)
    inputs = draw(sinks=20)
    with torch.autocast(DEVICE, dtype=torch.float16):
        out, *gradients = with_gradients(function, inputs)
    half = {**inputs, "q_s": inputs["q_s"].half(), "k_s": inputs["k_s"].half()}
    expected, *half_gradients = with_gradients(function, half)
    assert out.dtype == torch.float32 and gradients[0].dtype == torch.float32
    assert_identical([out, *gradients], [expected, *(x.float() for x in half_gradients)])


def test_autocast_leaves_float64():
    inputs = in_float64(draw())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = recattn.inter_sink_bias(**inputs)
    torch.testing.assert_close(out, recattn.inter_sink_bias(**inputs), rtol=0, atol=0)


@pytest.mark.parametrize("full, dtype", [(True, torch.float32), (False, torch.float16)])
def test_opcheck(full, dtype):
    inputs = draw(dtype=dtype)
    q_s = inputs["q_s"].transpose(1, 2).contiguous().transpose(1, 2)
    seed = torch.tensor([5], device=DEVICE)
    optional = (inputs["sink_mask"], inputs["bias_scale"], seed) if full else (None, None, None)
    arguments = (q_s, inputs["k_s"], *optional, 2.0, full, 0.5 if full else 0.0, None)
    torch.library.opcheck(torch.ops.recattn.inter_sink_bias_fwd.default, arguments)
    dout = torch.randn(3, 1, 15, 15, device=DEVICE)
    torch.library.opcheck(torch.ops.recattn.inter_sink_bias_bwd.default, (dout, *arguments))


@pytest.mark.parametrize("with_tensors", [True, False])
def test_compiles_to_one_graph_without_recompiling(with_tensors):
    torch._dynamo.reset()
    options = {"causal": True, "impl": "triton"}
    compiled = torch.compile(
        functools.partial(recattn.inter_sink_bias, **options), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for batch, sinks in ((3, 20), (4, 33)):
        inputs = draw(batch=batch, heads=2, sinks=sinks, masked=with_tensors)
        if not with_tensors:
            inputs["bias_scale"] = 3.0
        leaves = {name: inputs[name].requires_grad_() for name in GRADS if isinstance(inputs[name], Tensor)}
        with torch.compiler.set_stance("fail_on_recompile" if batch > 3 else "default"):
            out = compiled(**inputs)
        expected = recattn.inter_sink_bias(**inputs, **options)
        gradients, expected_gradients = (
            torch.autograd.grad(x.square().sum(), list(leaves.values())) for x in (out, expected)
        )
        assert_identical([out, *gradients], [expected, *expected_gradients])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compiles_with_one_tensor_for_queries_and_keys(dropout_p):
    q_s = draw()["q_s"].requires_grad_()

    def itself(x):
        return recattn.inter_sink_bias(x, x, dropout_p=dropout_p, impl="triton")

    results = []
    for function in (torch.compile(itself, fullgraph=True, backend="aot_eager"), itself):
        torch.manual_seed(0)
        out = function(q_s)
        results.append((out.detach(), *torch.autograd.grad(out.square().sum(), q_s)))
    assert_identical(*results)


def test_compiles_under_autocast():
    compiled = torch.compile(by_triton, fullgraph=True, backend="aot_eager")
    inputs = draw(sinks=20)
    with torch.autocast(DEVICE, dtype=torch.float16):
        assert_identical(with_gradients(compiled, inputs), with_gradients(by_triton, inputs))


SPECIALIZATIONS = """
import torch
from recattn._extension import MISSING
from recattn._options import InterSinkBiasOptions
from recattn.triton_kernels import inter_sink_bias as kernels
from tests.compile_table.compilation import meta, recorded

def compiled_for(batch, sinks):
    q_s, bias, mask, rows = (
        meta(*shape) for shape in [(batch, 7, sinks, 64), (batch, 1, sinks, sinks), (batch, sinks), (batch, 7, sinks)]
    )
    inputs = (q_s, q_s, mask.bool(), meta(1), meta(1).long())
    options = InterSinkBiasOptions(1.0, causal=sinks > 50, dropout_p=0.5, scale=0.1)
    return str([
        recorded("", 90, kernels.launch_inter_sink_bias_fwd, *inputs, bias, options),
        recorded("", 90, kernels.launch_inter_sink_bias_bwd, bias, *inputs, q_s, q_s, rows, options),
    ])

print(len({compiled_for(*sizes) for sizes in [(1, 33), (2, 40), (16, 48), (7, 49), (64, 64)]}))
"""


def test_one_compilation_serves_a_power_of_two_of_sinks():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SPECIALIZATIONS], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert run.stdout == "1\n", run.stderr


# --- What is refused ---

BAD = {
    "q_s must be a torch.Tensor, got list": {"q_s": [1.0]},
    r"q_s must be \[B, H, M, D\], got \[2, 15, 16\]": {"q_s": torch.zeros(2, 15, 16)},
    r"k_s must be \[B, H, M, D\] = \[3, 2, 15, 16\], got \[3, 2, 14, 16\]": {"k_s": torch.zeros(3, 2, 14, 16)},
    "H of q_s and k_s must be at least 1, got 0": {"q_s": torch.zeros(3, 0, 15, 16), "k_s": torch.zeros(3, 0, 15, 16)},
    "D of q_s and k_s must be at least 1, got 0": {"q_s": torch.zeros(3, 2, 15, 0), "k_s": torch.zeros(3, 2, 15, 0)},
    "q_s must be float64 or float32 or bfloat16 or float16, got int64": {"q_s": torch.zeros(3, 2, 15, 16).long()},
    "k_s must have the dtype of q_s, float32, got float16": {"k_s": torch.zeros(3, 2, 15, 16).half()},
    "k_s must be on the device of q_s, cpu, got meta": {"k_s": torch.zeros(3, 2, 15, 16, device="meta")},
    "sink_mask must be a torch.Tensor, got list": {"sink_mask": [True]},
    r"sink_mask must be \[B, M\] = \[3, 15\], got \[3, 14\]": {"sink_mask": torch.ones(3, 14).bool()},
    "sink_mask must be bool, got float32": {"sink_mask": torch.ones(3, 15)},
    "sink_mask must be on the device of q_s, cpu, got meta": {"sink_mask": torch.ones(3, 15, device="meta").bool()},
    r"bias_scale must be a number or a tensor of one element, got one of shape \[2\]": {"bias_scale": torch.ones(2)},
    "bias_scale must be a number or a tensor of one element, got str": {"bias_scale": "10"},
    "bias_scale must be float64 .* got int64": {"bias_scale": torch.tensor(1)},
    "bias_scale must be finite, got inf": {"bias_scale": math.inf},
    "bias_scale must be on the device of q_s, cpu, got meta": {"bias_scale": torch.ones((), device="meta")},
    "dropout_p must be at least 0 and below 1, got 1.0": {"dropout_p": 1.0},
    "scale must be finite, got nan": {"scale": math.nan},
    "impl must be None or one of .* got 'fast'": {"impl": "fast"},
}


@pytest.mark.parametrize("impl", [*KERNELS, "reference"])
@pytest.mark.parametrize("message", BAD)
def test_bad_input(message, impl):
    inputs = {name: x.cpu() for name, x in draw().items()}
    with pytest.raises(ValueError, match=message):
        recattn.inter_sink_bias(**{**inputs, "impl": impl, **BAD[message]})


@pytest.mark.parametrize(
    "inputs, reason",
    [
        ({"dtype": torch.float64}, "it computes in float32, and q_s is float64"),
        ({"sinks": 129}, "it serves at most 128 sinks, and there are 129"),
    ],
    ids=str,
)
def test_calls_that_the_kernels_do_not_serve(inputs, reason):
    inputs = draw(**inputs)
    with pytest.raises(NotImplementedError, match=f"cannot run impl='triton' here: {reason}"):
        by_triton(**inputs)
    torch.testing.assert_close(recattn.inter_sink_bias(**inputs), reference.inter_sink_bias(**inputs))


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are not interpreted here")
def test_bfloat16_is_not_interpreted():
    with pytest.raises(NotImplementedError, match="Triton's interpreter computes bfloat16 wrongly"):
        by_triton(**draw(dtype=torch.bfloat16))


def test_without_the_interpreter_a_cpu_has_no_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert ops.unsupported_reasons("cuda")["triton"] is None and ops.unsupported_reasons("cpu")["reference"] is None
    inputs = {name: x.cpu() for name, x in draw().items()}
    with pytest.raises(NotImplementedError, match="for CUDA devices, and the tensors are on cpu"):
        by_triton(**inputs)

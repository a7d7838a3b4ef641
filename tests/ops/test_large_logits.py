"""Scores so large that float32 rounds them by more than 1: no row is lost, and none becomes NaN."""

import math

import pytest
import torch

import recattn
from recattn import reference
from recattn._options import SinkAttentionOptions
from tests.helpers.sink_inputs import draw

DTYPES = (torch.float32, torch.bfloat16)


def with_gradients(function, inputs, **options):
    """The output and the gradients of q, k, v and the bias."""
    leaves = {name: x.detach().clone().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    out = function(**leaves, **options)
    torch.manual_seed(7)
    differentiable = [x for x in leaves.values() if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, differentiable, torch.randn(out.shape).to(out))]


def large(seed, size, dtype=torch.float32, **sizes):
    torch.manual_seed(seed)
    inputs = draw(batch=1, heads=2, kv_heads=2, length=32, dim=64, sinks=8, **sizes)
    inputs["q"] *= size
    return {name: x.to(dtype) if name in "qkv" else x for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1e6, 1e8, 1e9, 1e10, 1e15, 1e19])
def test_as_the_reference(size, causal, dtype):
    for seed in range(8):
        inputs = large(seed, size, dtype)
        out, *gradients = with_gradients(recattn.sink_attention, inputs, causal=causal)
        promoted = {name: x.float() if name in "qkv" else x for name, x in inputs.items()}
        expected = reference.sink_attention(**promoted, causal=causal)
        # One key has each row's weight, which in half precision is rounded.
        torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)
        assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_ragged(layout):
    torch.manual_seed(0)
    inputs, lengths = large(0, 1e9), torch.tensor([21])
    if layout == "packed":
        inputs |= {name: inputs[name][0].transpose(0, 1) for name in "qkv"}
        inputs["sink_positions"] = torch.arange(8)[None]
        options = {"cu_seqlens": torch.tensor([0, 32])}
    else:
        options = {"seq_lens": lengths, "padding_side": layout}
    out, *gradients = with_gradients(recattn.sink_attention, inputs, **options)
    torch.testing.assert_close(out, reference.sink_attention(**inputs, **options))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_gradients_of_sinks_as_precise_as_eager():
    """Rows whose keys tie: exp(s - lse) with s and lse rounded differently would be far off."""
    for seed in range(4):
        inputs = large(seed, 1e8, bias_scale=2.0)
        # Each key three more times, a rounding apart.
        inputs["k"] = inputs["k"][:, :, :8].repeat(1, 1, 4, 1) * (1 + 2e-7 * torch.randn(32, 1))
        double = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
        dbias, low, high = (
            with_gradients(function, x)[-1]
            for function, x in (
                (recattn.sink_attention, inputs),
                (reference.sink_attention, inputs),
                (reference.sink_attention, double),
            )
        )
        assert (dbias - high).abs().max() <= 2 * (low - high).abs().max() + 1e-6 * high.abs().max()


# --- Triton's kernels, by its interpreter where there is no GPU ---


@pytest.fixture
def corrected():
    pytest.importorskip("triton")
    from tests.helpers import corrected_attention

    return corrected_attention


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("size", [1e9, 1e15])
def test_correction_kernel(corrected, size, causal):
    inputs = corrected.random_inputs(24, 8, D=16, causal=causal)
    inputs["q"] *= size
    out, _ = corrected.corrected_attention(**inputs)
    expected, _ = corrected.reference_attention(**inputs)
    torch.testing.assert_close(out, expected)


def test_correction_kernel_redoes_what_rounds(corrected):
    """A backend whose scores were rounded otherwise: its log-sum-exp is not one of the kernel's scores."""
    from recattn.triton_kernels.sink_attention import NO_LENGTHS, SinkInputs, launch_sink_attention_correction_fwd

    inputs = corrected.random_inputs(24, 8, B=1, D=16)
    inputs["q"] *= 1e9
    expected, lse = reference.sink_attention(**inputs, return_lse=True)
    for ulps in (-3, 3):
        out, base_lse = expected.new_full(expected.shape, math.nan), (lse + ulps * 64).contiguous()
        stats = launch_sink_attention_correction_fwd(
            *(inputs[name] for name in "qkv"),
            *(out, base_lse, SinkInputs(inputs["sink_positions"], inputs["inter_sink_bias"]), NO_LENGTHS),
            options=SinkAttentionOptions(causal=False, scale=corrected.SCALE),
            config=corrected.CORRECTION_TILES,
        )
        sinks = inputs["sink_positions"][0]
        assert (stats[1] < 0).all()
        torch.testing.assert_close(out[:, :, sinks], expected[:, :, sinks])


@pytest.mark.parametrize("size", [1e9, 1e12])
def test_gradients_of_pairs_are_finite(size):
    """The kernel computes float32 scores more precisely than the forward; no probability may exceed 1 for that."""
    pytest.importorskip("triton")
    *_, dbias = with_gradients(recattn.sink_attention, large(0, size), impl="triton")
    assert dbias.isfinite().all()

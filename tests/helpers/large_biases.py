"""Biases so large that float32 has few digits, or none, left for the scores beside them. Every token is a sink."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recattn import reference
from recattn.testing import assert_matches_reference
from tests.helpers.interpreted import DEVICE, DTYPES

large_biases = pytest.mark.parametrize("bias", [1e7, 4e8, 1e9, -1e9, 1e12, 1e30], ids="{:.0e}".format)
any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOKENS = 40
# Up to here equal biases change nothing. Beyond, the sum of score and bias is rounded.
LARGEST_EXACT = {torch.float32: 1e9, torch.bfloat16: 4e8, torch.float16: 1e7}


def _inputs(dtype: torch.dtype, scores: float) -> dict[str, Tensor]:
    """q, k and v of some 2 * `scores` standard deviations of a score."""
    q, k, v = torch.randn(3, 1, 2, TOKENS, 16, device=DEVICE)
    return {"q": (scores * q).to(dtype), "k": k.to(dtype), "v": v.to(dtype)}


def _sinks(bias: Tensor | float) -> dict[str, Tensor]:
    positions = torch.arange(TOKENS, device=DEVICE)[None]
    return {"sink_positions": positions, "inter_sink_bias": (torch.zeros(1, 1, TOKENS, TOKENS) + bias).to(DEVICE)}


def assert_equal_biases_change_nothing(attention: Callable[..., Tensor], bias: float, dtype: torch.dtype) -> None:
    inputs = _inputs(dtype, scores=0.5)
    assert_matches_reference(
        lambda q, k, v: attention(q=q, k=k, v=v, **_sinks(bias)),
        lambda q, k, v: reference.sink_attention(q, k, v, scale=0.25),
        inputs,
        grads=inputs,
    )


def assert_weights_sum_to_1(attention: Callable[..., Tensor], bias: float, dtype: torch.dtype) -> None:
    """The keys with the largest bias have all the weight, though float32 has lost which of them has how much of it.

    Their values are equal: the output is one of them, and there is no gradient but that of v.
    """
    leading = torch.arange(TOKENS) % 2 == 0
    inputs = _inputs(dtype, scores=10.0)
    inputs["v"][:, :, leading] = inputs["v"][:, :, :1].clone()
    for x in inputs.values():
        x.requires_grad_()
    sinks = _sinks(torch.where(leading, bias, bias - max(1e-3 * abs(bias), 1e3)))
    sinks["inter_sink_bias"].requires_grad_()
    out = attention(**inputs, **sinks)
    dout = torch.randn_like(out)
    dq, dk, dv, dbias = torch.autograd.grad(out, [*inputs.values(), sinks["inter_sink_bias"]], dout)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, inputs["v"][:, :, :1].expand_as(out), rtol=0.0, atol=8 * eps)
    torch.testing.assert_close(dv.sum(2), dout.sum(2), rtol=0.0, atol=256 * eps)
    for zero in (dv[:, :, ~leading], dq, dk, dbias):
        torch.testing.assert_close(zero, torch.zeros_like(zero), rtol=0.0, atol=256 * eps)


def assert_holds_beside_large_biases(attention: Callable[..., Tensor], bias: float, dtype: torch.dtype) -> None:
    if abs(bias) <= LARGEST_EXACT[dtype]:
        assert_equal_biases_change_nothing(attention, bias, dtype)
    assert_weights_sum_to_1(attention, bias, dtype)

"""The error bound itself: what it lets pass and what it refuses."""

import math

import pytest
import torch

from recattn.testing import assert_matches_reference, compare_with_reference


def reference(x, w):
    return (x @ w).softmax(-1)


def draw(dtype=torch.float32):
    return {"x": torch.randn(20, 30, dtype=dtype), "w": torch.randn(30, 40, dtype=dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_passes(dtype):
    errors = compare_with_reference(reference, reference, draw(dtype), grads=["x", "w"])
    assert [error.name for error in errors] == ["output", "dx", "dw"]
    assert all(error.passed for error in errors)


class OffByAThousandth(torch.autograd.Function):
    """Right in the forward, 0.1% too large in one gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        return dout * 1.001


@pytest.mark.parametrize(
    "kernel, wrong",
    [
        (lambda x, w: reference(x, w) * (1 + 1e-4), "output"),
        (lambda x, w: reference(x, w).where(torch.arange(40) > 0, math.nan), "output"),
        (lambda x, w: reference(x, OffByAThousandth.apply(w)), "dw"),
    ],
)
def test_a_wrong_kernel_is_refused(kernel, wrong):
    with pytest.raises(AssertionError, match=f"FAIL {wrong}"):
        assert_matches_reference(kernel, reference, draw(), grads=["x", "w"])


def test_a_wrong_shape_is_refused():
    with pytest.raises(AssertionError, match=r"output: shape \[20, 39\], reference has \[20, 40\]"):
        assert_matches_reference(lambda x, w: reference(x, w)[:, 1:], reference, draw())


def test_uninitialised_memory_reads_as_nan():
    assert torch.empty(3).isnan().all() and torch.zeros(3).new_empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()

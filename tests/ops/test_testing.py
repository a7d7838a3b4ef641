"""The error bound itself: what it accepts and what it refuses."""

import math

import pytest
import torch

from recattn.testing import Oracle, assert_matches_reference, compare_with_reference, largest, measure_error


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
    """The forward is right, one gradient is 0.1% too large."""

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


# The luck of one draw of the reference's rounding


def difference(x, w, d):
    """-x @ d as the small difference of large products, which decide low's error."""
    return torch.cat([x, -x], dim=1) @ torch.cat([w, w + d])


def thirds(x, w, d):
    """As exact as `difference`, but never by luck."""
    return difference(x, w / 3, d / 3) * 3


def integers(*size, largest):
    return torch.randint(-largest, largest + 1, size).float()


def test_a_right_kernel_passes_where_low_was_lucky():
    inputs = {"x": integers(20, 64, largest=255), "w": integers(64, 40, largest=255), "d": integers(64, 40, largest=1)}
    low, ref64 = Oracle.of(difference, inputs).draw
    assert torch.equal(low["output"].double(), ref64["output"])  # whatever the order: all of it are small integers
    eps = torch.finfo(torch.float32).eps
    assert not measure_error("output", thirds(**inputs), low["output"], ref64["output"], eps).passed
    assert_matches_reference(thirds, difference, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_four_times_the_error_of_the_reference_is_refused(dtype):
    inputs = {"x": torch.randn(64, 64), "w": torch.randn(64, 64), "d": torch.randn(64, 64) / 50}
    inputs = {name: x.to(dtype) for name, x in inputs.items()}
    ref64 = difference(*(x.double() for x in inputs.values()))
    low = difference(**inputs)
    assert_matches_reference(lambda **_: low, difference, inputs)
    [error] = compare_with_reference(lambda **_: ref64 + 4 * (low - ref64), difference, inputs)
    assert error.max > error.max_bound and error.mean > error.mean_bound


def test_the_reference_is_redrawn_only_where_a_bound_is_missed():
    calls = []

    def counted(x, w):
        calls.append(x.dtype)
        return reference(x, w)

    oracle = Oracle.of(counted, draw())
    assert calls == [torch.float32, torch.float64]
    assert oracle.errors(reference)[0].passed and len(calls) == 2
    for _ in range(2):
        assert not oracle.errors(lambda x, w: reference(x, w) * 1.001)[0].passed and len(calls) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_redrawn_inputs_are_other_numbers_of_the_same_problem(dtype):
    x = torch.randn(100).to(dtype)
    x[:8] = torch.tensor([0.0, -0.0, -torch.inf, torch.inf, math.nan, 1.0, 1.0, torch.finfo(dtype).max])
    previous = x
    for draw in Oracle.of(torch.clone, {"input": x}).redrawn:
        y = draw.low["output"]
        assert torch.equal(y[:4], x[:4]) and y[4].isnan() and y[5] == y[6] < 1
        assert (y[5:] != previous[5:]).all() and (y[5:].double() / x[5:].double() - 1).abs().max() < 0.04
        previous = y


def test_a_wrong_shape_is_refused():
    with pytest.raises(AssertionError, match=r"output: shape \[20, 39\], reference has \[20, 40\]"):
        assert_matches_reference(lambda x, w: reference(x, w)[:, 1:], reference, draw())


def test_uninitialised_memory_reads_as_nan():
    assert torch.empty(3).isnan().all() and torch.zeros(3).new_empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(3)).isnan().all()


# What is not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_reference_that_overflows_lets_nothing_pass(value):
    """Its error is infinite, and as a bound would accept anything."""
    x = torch.full((2, 4), 300.0, dtype=torch.float16)
    inputs = {"x": x, "w": torch.full((4, 3), 300.0, dtype=torch.float16)}
    (error,) = compare_with_reference(lambda x, w: torch.full((2, 3), value), lambda x, w: x @ w, inputs)
    assert error.max_bound in (math.inf, pytest.approx(math.nan, nan_ok=True)) and not error.passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["input", "kernel"])
def test_nan_and_infinities_never_pass(value, where):
    inputs = draw()
    if where == "input":
        inputs["x"][3, 4] = value
    kernel = reference if where == "input" else lambda x, w: reference(x, w).index_fill(0, torch.tensor([3]), value)
    assert not compare_with_reference(kernel, reference, inputs)[0].passed


def test_the_largest_of_nan_is_nan_in_any_order():
    assert largest([1.0, 3.0, -math.inf]) == 3.0
    assert all(math.isnan(largest(values)) for values in ([math.nan, 1.0], [1.0, math.nan], [math.inf, math.nan, 0.0]))


def test_an_infinite_input_is_no_scale():
    """A reference of zeros (a softmax whose rows -inf suppresses) accepts no error next to it."""
    inputs = draw()
    inputs["x"][0, 0] = -math.inf
    zeros = lambda x, w: torch.zeros(20, 40, dtype=w.dtype)  # noqa: E731
    assert compare_with_reference(zeros, zeros, inputs)[0].passed
    assert not compare_with_reference(lambda x, w: zeros(x, w) + 1, zeros, inputs)[0].passed

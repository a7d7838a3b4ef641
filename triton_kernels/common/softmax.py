"""Softmax over a row's keys, whole or block by block."""

import math

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def log2e_scale(x):
    """The factor of qk before `exp_scaled(qk, x)`: log2(e) for half precision x, 1 for float32.

    exp2 saves a multiplication per exponential. Float32 keeps exp: with exp2 a rounded factor would cost accuracy.
    """
    return 1.0 if x.dtype == tl.float32 else LOG2E


@triton.jit
def exp_scaled(qk, x):
    """exp of qk that has been multiplied by `log2e_scale(x)`."""
    return tl.exp(qk) if x.dtype == tl.float32 else tl.exp2(qk)


@triton.jit
def masked_softmax(qk, visible, row_valid=None):
    """Softmax of each row over its visible keys; 0 elsewhere, and in rows that see no key.

    `row_valid` is True for the rows that see a key. None finds them by their qk: then a row whose visible qk are all
    -inf gives zeros too, not NaN.
    """
    qk = tl.where(visible, qk, -float("inf"))
    row_max = tl.max(qk, 1)
    row_max_safe = tl.where(row_max != -float("inf") if row_valid is None else row_valid, row_max, 0.0)
    # exp2 of one fused multiply-add; what rounding takes from the maximum of a row is a factor of the whole row.
    p = tl.exp2(qk * LOG2E - (row_max_safe * LOG2E)[:, None])
    row_sum = tl.sum(p, 1)
    # A division for each row, not for each entry. NaN stays.
    return p * (1.0 / tl.where(row_sum != 0.0 if row_valid is None else row_valid, row_sum, 1.0))[:, None]


@triton.jit
def softmax_backward(p, dp):
    """The gradient of qk from that of p = softmax(qk)."""
    return p * (dp - tl.sum(p * dp, 1)[:, None])


@triton.jit
def exp_biased(qk, bias, row_max, x):
    """exp(qk + bias - row_max) of numbers times `log2e_scale(x)`. row_max is the largest qk + bias of a row."""
    # A bias that counts is close to row_max: their difference is exact, where qk + bias would round. But a large
    # row_max has itself rounded, and exp would leave the range of x: then qk + bias comes first, and rounds as it did.
    sum_first = has_rounded(row_max, x)
    return exp_scaled(qk + (bias - tl.where(sum_first, 0.0, row_max)) - tl.where(sum_first, row_max, 0.0), x)


@triton.jit
def exp_increase(qk, bias, row_max, x):
    """exp(qk + bias - row_max) - exp(qk - row_max): what the bias adds to a weight. Arguments as of `exp_biased`."""
    unbiased = exp_scaled(qk - row_max, x)
    increase = exp_biased(qk, bias, row_max, x) - unbiased
    # The difference of two exponentials loses a small bias: of no weight where the weights are of half precision.
    if x.dtype == tl.float32:
        increase = tl.where(tl.abs(bias) < 0.5, unbiased * expm1_series(bias), increase)
    return increase


@triton.jit
def expm1_series(x):
    """expm1(x) for |x| < 0.5 to float32 accuracy: eight terms of the Taylor series."""
    series = 1.0 / 40320  # 1 / 8!
    for n in tl.static_range(7, 0, -1):
        series = series * x + 1.0 / math.factorial(n)
    return x * series


@triton.jit
def has_rounded(row_max, x):
    """Whether float32 rounded row_max by more than 1, or by more than 64 where x has float32's range."""
    return tl.abs(row_max) >= (2.0**24 if x.dtype == tl.float16 else 2.0**30)

"""Building blocks that the kernels share."""

import triton
import triton.language as tl


def block_width(width: int) -> int:
    """The block that holds `width` columns and that tl.dot takes."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def load_rows(base, rows, row_valid, row_stride, column_stride, width, BLOCK_WIDTH: tl.constexpr):
    """The given rows of a matrix of `width` columns; zeros where a row is not valid."""
    columns = tl.arange(0, BLOCK_WIDTH)
    addresses = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride
    return tl.load(addresses, mask=row_valid[:, None] & (columns[None, :] < width), other=0.0)


@triton.jit
def store_rows(base, values, rows, row_valid, row_stride, column_stride, width, BLOCK_WIDTH: tl.constexpr):
    """The inverse of `load_rows`."""
    columns = tl.arange(0, BLOCK_WIDTH)
    addresses = base + rows[:, None].to(tl.int64) * row_stride + columns[None, :] * column_stride
    tl.store(addresses, values.to(base.dtype.element_ty), mask=row_valid[:, None] & (columns[None, :] < width))


@triton.jit
def dot_rows(
    a,
    a_rows,
    a_valid,
    stride_an,
    stride_ad,
    b,
    b_rows,
    b_valid,
    stride_bn,
    stride_bd,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Dot products of the given rows of two matrices of WIDTH columns, BLOCK_WIDTH columns at a time."""
    products = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        a_block = load_rows(a + start * stride_ad, a_rows, a_valid, stride_an, stride_ad, WIDTH - start, BLOCK_WIDTH)
        b_block = load_rows(b + start * stride_bd, b_rows, b_valid, stride_bn, stride_bd, WIDTH - start, BLOCK_WIDTH)
        products = tl.dot(a_block, tl.trans(b_block), products, input_precision="ieee")
    return products


@triton.jit
def expm1_series(x):
    """expm1(x) for |x| < 0.5 to float32 accuracy: eight terms of the Taylor series."""
    series = 1.0 + x * (1.0 / 8)
    for n in tl.static_range(7, 1, -1):
        series = 1.0 + x * (1.0 / n) * series
    return x * series


@triton.jit
def online_softmax_update(acc, shift, mass, scores, values):
    """Add one block of keys to softmax(scores) @ values, kept as acc / mass with both scaled by exp(-shift)."""
    new_shift = tl.maximum(shift, tl.max(scores, 1))
    # Before a row's first key its shift is -inf, and -inf minus itself NaN.
    reference = tl.where(new_shift == -float("inf"), 0.0, new_shift)
    rescale = tl.exp(shift - reference)
    weights = tl.exp(scores - reference[:, None])
    acc = acc * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return acc, new_shift, mass * rescale + tl.sum(weights, 1)

"""Matrices in memory, and the tiles of them that a program loads, multiplies and stores."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@triton.constexpr_function
def block_width(width: int) -> int:
    """The block that holds `width` columns and that tl.dot takes."""
    return max(16, triton.next_power_of_2(width))


class BHND(NamedTuple):
    """A tensor [B, H, N, D] as one kernel argument: its pointer and strides. `bhnd` makes one."""

    ptr: tl.tensor  # on the host the Tensor itself
    stride_b: tl.tensor
    stride_h: tl.tensor
    stride_n: tl.tensor
    stride_d: tl.tensor


def bhnd(x: Tensor, cu_seqlens: Tensor | None = None) -> BHND:
    """x [B, H, N, D] as a kernel argument; with cu_seqlens x is packed [T, H, D], and every batch begins at token 0."""
    if cu_seqlens is None:
        return tuple.__new__(BHND, (x, *x.stride()))  # BHND(...) takes twice as long
    stride_t, stride_h, stride_d = x.stride()
    return tuple.__new__(BHND, (x, 0, stride_h, stride_t, stride_d))


class Matrix(NamedTuple):
    """A matrix in memory."""

    base: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor


class Tokens(NamedTuple):
    """Tokens of a sequence by their positions, which count from its first; `valid` is False where there is no token."""

    positions: tl.tensor
    valid: tl.tensor


@triton.jit
def offset(index, stride):
    """index · stride in int64: an int32 product would overflow beyond 2**31 elements."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def head_rows(x, batch, head, start):
    """The rows [N, D] of one batch and head of a BHND, from the token `start` on, as a Matrix."""
    base = x.ptr + offset(batch, x.stride_b) + offset(head, x.stride_h) + offset(start, x.stride_n)
    return Matrix(base, x.stride_n, x.stride_d)


@triton.jit
def load_rows(base, rows, row_valid, row_stride, column_stride, width, BLOCK_WIDTH: tl.constexpr):
    """[rows, BLOCK_WIDTH] of a matrix of `width` columns; zeros where a row is not valid."""
    columns = tl.arange(0, BLOCK_WIDTH)
    addresses = base + offset(rows[:, None], row_stride) + offset(columns[None, :], column_stride)
    return tl.load(addresses, mask=row_valid[:, None] & (columns[None, :] < width), other=0.0)


@triton.jit
def store_rows(base, values, rows, row_valid, row_stride, column_stride, width, BLOCK_WIDTH: tl.constexpr):
    """The inverse of `load_rows`."""
    columns = tl.arange(0, BLOCK_WIDTH)
    addresses = base + offset(rows[:, None], row_stride) + offset(columns[None, :], column_stride)
    tl.store(addresses, values.to(base.dtype.element_ty), mask=row_valid[:, None] & (columns[None, :] < width))


@triton.jit
def load_tokens(x, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[tokens, BLOCK_WIDTH] of a Matrix of WIDTH columns; zeros where a token is not valid."""
    return load_rows(x.base, tokens.positions, tokens.valid, x.row_stride, x.column_stride, WIDTH, BLOCK_WIDTH)


@triton.jit
def store_tokens(x, values, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The inverse of `load_tokens`."""
    store_rows(x.base, values, tokens.positions, tokens.valid, x.row_stride, x.column_stride, WIDTH, BLOCK_WIDTH)


@triton.jit
def store_zeros(x, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Zeros in the given tokens of a Matrix of WIDTH columns, BLOCK_WIDTH columns at a time."""
    zeros = tl.zeros([tokens.positions.shape[0], BLOCK_WIDTH], tl.float32)
    for first in range(0, WIDTH, BLOCK_WIDTH):
        base, width = x.base + offset(first, x.column_stride), WIDTH - first
        store_rows(base, zeros, tokens.positions, tokens.valid, x.row_stride, x.column_stride, width, BLOCK_WIDTH)


@triton.jit
def load_bias(bias, row_sinks, key_sinks, visible):
    """[rows, keys] of a Matrix that holds the bias between sinks; 0 where a row does not see the key."""
    addresses = bias.base + offset(row_sinks[:, None], bias.row_stride) + offset(key_sinks[None, :], bias.column_stride)
    return tl.load(addresses, mask=visible, other=0.0).to(tl.float32)


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
    SUM: tl.constexpr = tl.float32,
):
    """a @ b.T of the given rows of two matrices of WIDTH columns, BLOCK_WIDTH columns at a time, summed in SUM."""
    products = tl.zeros([a_rows.shape[0], b_rows.shape[0]], SUM)
    end = WIDTH
    if tl.float64 == SUM:
        # No stride is negative, but the compiler does not know: unrolled, the loop would need too many registers.
        end += tl.minimum(stride_an, 0)
    for start in range(0, end, BLOCK_WIDTH):
        width, a_base, b_base = WIDTH - start, a + offset(start, stride_ad), b + offset(start, stride_bd)
        a_block = load_rows(a_base, a_rows, a_valid, stride_an, stride_ad, width, BLOCK_WIDTH)
        b_block = load_rows(b_base, b_rows, b_valid, stride_bn, stride_bd, width, BLOCK_WIDTH)
        if tl.float64 == SUM:
            a_block, b_block = a_block.to(SUM), b_block.to(SUM)
        products = tl.dot(a_block, tl.trans(b_block), products, input_precision="ieee", out_dtype=SUM)
    return products.to(tl.float32)


@triton.jit
def dot_tokens(a, a_tokens, b, b_tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """a @ b.T of tokens of two Matrices of WIDTH columns, BLOCK_WIDTH columns at a time.

    Float32 is summed in float64: a gradient may be the small difference of two such products.
    """
    return dot_rows(
        a.base,
        a_tokens.positions,
        a_tokens.valid,
        a.row_stride,
        a.column_stride,
        b.base,
        b_tokens.positions,
        b_tokens.valid,
        b.row_stride,
        b.column_stride,
        WIDTH,
        BLOCK_WIDTH,
        tl.float64 if a.base.dtype.element_ty == tl.float32 else tl.float32,
    )


@triton.jit
def add_product(acc, a, b):
    """acc + a @ b.

    In float32 the product is summed apart: one chain of all terms that `acc` gets in a loop would have the error of all
    of them. The compiler makes that chain of acc + a @ b, so the product of -a is subtracted.
    """
    if a.dtype == tl.float32:
        return acc - tl.dot(-a, b, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")

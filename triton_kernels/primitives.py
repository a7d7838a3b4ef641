"""Building blocks that the kernels share."""

from typing import NamedTuple

import triton
import triton.language as tl


def block_width(width: int) -> int:
    """The block that holds `width` columns and that tl.dot takes."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def offset(index, stride):
    """Where an axis' index lies in memory: beyond 2**31 elements too, of which an int32 knows nothing."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def locate_sequence(batch, N, seq_lens, cu_seqlens, left_padded):
    """Of one sequence: its first token on the N axis, its length, and the position that counts as its first token's.

    Packed (cu_seqlens), positions count from each sequence's start; padded (seq_lens), along the N axis.
    """
    if cu_seqlens is not None:
        start = tl.load(cu_seqlens + batch).to(tl.int64)
        length = (tl.load(cu_seqlens + batch + 1) - start).to(tl.int32)
        first_position = length * 0
    elif seq_lens is not None:
        length = tl.load(seq_lens + batch).to(tl.int32)
        first_position = tl.where(left_padded != 0, N - length, 0)
        start = first_position.to(tl.int64)
    else:
        length = tl.full((), 0, tl.int32) + N
        first_position = length * 0
        start = first_position.to(tl.int64)
    return start, length, first_position


@triton.jit
def load_sink_positions(sink_positions, sinks, stride, M, first_position, length):
    """Of the given sinks, counted from the sequence's first token; `length` for those to ignore."""
    positions = tl.load(sink_positions + offset(sinks, stride), mask=sinks < M, other=-1).to(tl.int32)
    relative = positions - first_position
    return tl.where((positions >= 0) & (relative >= 0) & (relative < length), relative, length)


@triton.jit
def count_sinks_before(sinks, tokens, steps):
    """Of each token, counted from the sequence's first, how many sinks stand before it: `steps` of a binary search."""
    low = tokens * 0
    high = low + sinks.count
    for _ in range(0, steps):
        middle = (low + high) // 2
        searching = low < high
        position = tl.load(sinks.positions + offset(middle, sinks.stride), mask=searching, other=-1).to(tl.int32)
        before = (position >= 0) & (position - sinks.first_position < tokens)
        high = tl.where(searching & (before == 0), middle, high)
        low = tl.where(searching & before, middle + 1, low)
    return low


@triton.jit
def load_rows(base, rows, row_valid, row_stride, column_stride, width, BLOCK_WIDTH: tl.constexpr):
    """The given rows of a matrix of `width` columns; zeros where a row is not valid."""
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
    """Dot products of the given rows of two matrices of WIDTH columns, BLOCK_WIDTH columns at a time, summed in SUM."""
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
def dropout_weights(seed, plane, kind, rows, first_column, dropped, BLOCK_N: tl.constexpr):
    """[rows, BLOCK_N]: 0 where a weight is dropped, else the inverse of the share that is kept.

    Weight (row, column) of a plane is dropped if its 16 bits of Philox are below `dropped`; eight columns share a
    counter, so `first_column` is a multiple of eight. `kind` tells apart the pairs numbered by token and by sink.
    """
    groups = first_column // 8 + tl.arange(0, BLOCK_N // 8)
    counter = (rows[:, None] * 0 + groups[None, :]).to(tl.int32)  # [BM, BN / 8]
    a, b, c, d = tl.philox(seed, counter, counter * 0 + rows[:, None], counter * 0 + plane, counter * 0 + kind)
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (rows.shape[0], BLOCK_N // 2))
    bits = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (rows.shape[0], BLOCK_N)).to(tl.int32)
    return tl.where(bits < dropped, 0.0, 65536.0 / (65536 - dropped))


@triton.jit
def expm1_series(x):
    """expm1(x) for |x| < 0.5 to float32 accuracy: eight terms of the Taylor series."""
    series = 1.0 + x * (1.0 / 8)
    for n in tl.static_range(7, 1, -1):
        series = 1.0 + x * (1.0 / n) * series
    return x * series


@triton.jit
def online_softmax_update(acc, shift, mass, scores, bias, values):
    """Add a block of keys to softmax(scores + bias) @ values, kept as acc / mass with both scaled by exp(-shift)."""
    new_shift = tl.maximum(shift, tl.max(scores + bias, 1))
    # Before a row's first key its shift is -inf, and -inf minus itself NaN.
    reference = tl.where(new_shift == -float("inf"), 0.0, new_shift)
    rescale = tl.exp(shift - reference)
    weights = tl.exp(scores + (bias - reference[:, None]))
    acc = acc * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return acc, new_shift, mass * rescale + tl.sum(weights, 1)


@triton.jit
def exp_increase(scores, bias, shift):
    """exp(scores + bias - shift) - exp(scores - shift)."""
    unbiased = tl.exp(scores - shift)
    # A large bias is close to the shift: their difference is exact, where scores + bias would round. The difference of
    # two exponentials would lose a small bias.
    return tl.where(tl.abs(bias) < 0.5, unbiased * expm1_series(bias), tl.exp(scores + (bias - shift)) - unbiased)


class Matrix(NamedTuple):
    """A matrix in memory."""

    base: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor


class Tokens(NamedTuple):
    """Some of a sequence's tokens, counted from its first; `valid` is False where there is none."""

    positions: tl.tensor
    valid: tl.tensor


class Sinks(NamedTuple):
    """A sequence's sinks in memory; see `load_sink_positions`."""

    positions: tl.tensor
    stride: tl.tensor
    count: tl.tensor
    first_position: tl.tensor
    length: tl.tensor


@triton.jit
def load_tokens(x, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[tokens, BLOCK_WIDTH] of a Matrix; zeros where a token is not valid."""
    return load_rows(x.base, tokens.positions, tokens.valid, x.row_stride, x.column_stride, WIDTH, BLOCK_WIDTH)


@triton.jit
def store_tokens(x, values, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The inverse of `load_tokens`."""
    store_rows(x.base, values, tokens.positions, tokens.valid, x.row_stride, x.column_stride, WIDTH, BLOCK_WIDTH)


@triton.jit
def dot_tokens(a, a_tokens, b, b_tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Dot products of tokens of one Matrix with tokens of another, BLOCK_WIDTH columns at a time.

    Those of float32 are summed in float64: a gradient may be the small difference of two of them.
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
def load_sinks(sinks, indices):
    """The tokens of the given sinks; those to ignore are not valid, and lie beyond every token."""
    positions = load_sink_positions(
        sinks.positions, indices, sinks.stride, sinks.count, sinks.first_position, sinks.length
    )
    return Tokens(positions, positions < sinks.length)


@triton.jit
def is_sink(sinks, positions, search_steps):
    """Which tokens of the sequence are sinks."""
    before = count_sinks_before(sinks, positions, search_steps)
    return load_sinks(sinks, before).positions == positions


@triton.jit
def load_bias(bias, row_sinks, key_sinks, visible):
    """[rows, keys] of a Matrix that holds the bias between sinks; 0 where a row does not see the key."""
    addresses = bias.base + offset(row_sinks[:, None], bias.row_stride) + offset(key_sinks[None, :], bias.column_stride)
    return tl.load(addresses, mask=visible, other=0.0).to(tl.float32)

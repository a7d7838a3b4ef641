"""refined_attention of short sequences: what happens to its matrices before and after the kernels of `short`.

    G    = W_q W_kᵀ / √R       and W_v                     [., BLOCK_N, BLOCK_N], read by the forward and backward
    dW_q = Σ dG W_k / √R        dW_k = Σ dGᵀ W_q / √R      dW_v = Σ dW_v

from partial sums of dG and dW_v. One launch before, one or two after. They read kilobytes, and what limits them is
latency: tiles are small, so that there are more programs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.launch import MAX_REGISTERS, cdiv, host_block_width, launch
from recattn.triton_kernels.common.tiles import Matrix, load_rows, offset

# Rows, and columns, of a tile of a matrix.
TILE = 32
# Of partial sums, a program of the chain rule loads BLOCK_P times a tile of so many columns at once, LOADED entries.
# Float32 products hold their operands in registers, so the columns are few.
BLOCK_K: tl.constexpr = tl.constexpr(16)
LOADED = 4096


@triton.jit(
    do_not_specialize=[
        *("stride_qh", "stride_qn", "stride_kh", "stride_kn", "stride_vh", "stride_vn"),
        *("g_heads", "N", "R"),
    ]
)
def refined_weights_product_kernel(
    w_q,
    w_k,
    w_v,
    squares,
    stride_qh,
    stride_qn,
    stride_qr,
    stride_kh,
    stride_kn,
    stride_kr,
    stride_vh,
    stride_vn,
    stride_vk,
    g_heads,
    N,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program (t, h): tile t [BLOCK_M, BLOCK_M] of square h, zero beyond N rows and columns.

    The first g_heads squares are those of G = W_q W_kᵀ / √R, the others W_v:
        for each BLOCK_R columns of W_q and W_k:
            g += w_q @ w_k.T
    """
    TILES: tl.constexpr = BLOCK_N // BLOCK_M
    square = tl.program_id(1)
    rows = tl.program_id(0) // TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(0) % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    addresses = squares + offset(square, BLOCK_N * BLOCK_N) + rows[:, None] * BLOCK_N + columns[None, :]
    if square < g_heads:
        w_q += offset(square, stride_qh)
        w_k += offset(square, stride_kh)
        product = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
        for start in range(0, R, BLOCK_R):
            q_block = load_rows(
                w_q + offset(start, stride_qr), rows, rows < N, stride_qn, stride_qr, R - start, BLOCK_R
            )
            k_block = load_rows(
                w_k + offset(start, stride_kr), columns, columns < N, stride_kn, stride_kr, R - start, BLOCK_R
            )
            product = tl.dot(q_block, tl.trans(k_block), product, input_precision="ieee")
        # Not the masked product: 0 · inf is NaN.
        inside = (rows < N)[:, None] & (columns < N)[None, :]
        product = tl.where(inside, product / tl.sqrt(R.to(tl.float32)), 0.0)
        tl.store(addresses, product.to(squares.dtype.element_ty))
    elif w_v is not None:
        first_column = tl.program_id(0) % TILES * BLOCK_M
        w_v += offset(square - g_heads, stride_vh) + offset(first_column, stride_vk)
        tl.store(addresses, load_rows(w_v, rows, rows < N, stride_vn, stride_vk, N - first_column, BLOCK_M))


class Partials(NamedTuple):
    """Partial sums [count, groups, BLOCK_N, BLOCK_N] float32 in memory."""

    base: tl.tensor
    stride: tl.tensor
    count: tl.tensor


@triton.jit
def sum_partials(partials, group, rows, columns, N, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr):
    """[rows, columns] of the sum of Partials of a group, BLOCK_P at a time; zero beyond N."""
    inside = (rows < N)[None, :, None] & (columns < N)[None, None, :]
    base = partials.base + offset(group, BLOCK_N * BLOCK_N)
    addresses = base + rows[None, :, None] * BLOCK_N + columns[None, None, :]
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for first in range(0, partials.count, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        there = (p < partials.count)[:, None, None] & inside
        total += tl.sum(tl.load(addresses + offset(p, partials.stride)[:, None, None], mask=there, other=0), 0)
    return total


@triton.jit
def store_gradient(dw, gradient, head, rows, columns, N_max, width):
    """A tile of a contiguous [heads, N_max, width]."""
    addresses = dw + (offset(head, N_max) + rows[:, None]) * width + columns[None, :]
    tl.store(addresses, gradient.to(dw.dtype.element_ty), mask=(rows < N_max)[:, None] & (columns < width)[None, :])


@triton.jit
def store_chain_rule(
    dg,
    groups,
    heads,
    w,
    stride_wh,
    dw,
    N,
    N_max,
    R,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """A tile of dw = dG @ w / √R, or dG.T @ w / √R, of one of `heads`; of one for all, the sum over the groups.

    dg is Partials and w a Matrix, that of head 0.
    """
    head = tl.program_id(1)
    tiles = tl.cdiv(R, BLOCK_C)
    first_row = tl.program_id(0) // tiles * BLOCK_M
    first_column = tl.program_id(0) % tiles * BLOCK_C
    if (head < heads) & (first_row < N_max):
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = first_column + tl.arange(0, BLOCK_C)
        first_group = tl.where(heads > 1, head, 0)
        end_group = tl.where(heads > 1, head + 1, groups)
        # Rows beyond N get zeros.
        end_group = tl.where(first_row < N, end_group, first_group)
        product = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        for group in range(first_group, end_group):
            w_columns = w.base + offset(group, stride_wh) + offset(first_column, w.column_stride)
            for start in range(0, N, BLOCK_K):
                inner = start + tl.arange(0, BLOCK_K)
                if TRANSPOSED:
                    square = tl.trans(sum_partials(dg, group, inner, rows, N, BLOCK_N, BLOCK_P))  # [BM, BK]
                else:
                    square = sum_partials(dg, group, rows, inner, N, BLOCK_N, BLOCK_P)
                w_block = load_rows(
                    w_columns, inner, inner < N, w.row_stride, w.column_stride, R - first_column, BLOCK_C
                )
                product = tl.dot(square, w_block.to(tl.float32), product, input_precision="ieee")
        # Not the masked product: 0 · inf is NaN.
        product = tl.where((rows < N)[:, None], product / tl.sqrt(R.to(tl.float32)), 0.0)
        store_gradient(dw, product, head, rows, columns, N_max, R)


@triton.jit(
    do_not_specialize=[
        "stride_qh",
        "stride_qn",
        "stride_kh",
        "stride_kn",
        "stride_sum",
        "num_sums",
        "groups",
        "q_heads",
        "k_heads",
        "v_heads",
        "N",
        "N_max",
        "R",
    ]
)
def refined_weights_bwd_kernel(
    dg,
    dw_v_sums,
    w_q,
    w_k,
    dw_q,
    dw_k,
    dw_v,
    stride_qh,
    stride_qn,
    stride_qr,
    stride_kh,
    stride_kn,
    stride_kr,
    stride_sum,
    num_sums,
    groups,
    q_heads,
    k_heads,
    v_heads,
    N,
    N_max,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Program (t, h, 0): tile t [BLOCK_M, BLOCK_C] of head h of dw_q; (t, h, 1) of dw_k; (t, h, 2) of dw_v.

    dw_q = dg @ w_k / √R            dg    = Σ of num_sums partial sums of the head, or of all groups of heads
    dw_k = dg.T @ w_q / √R
    dw_v = Σ likewise

    dg and dw_v_sums [num_sums, groups, BLOCK_N, BLOCK_N] float32; the outputs are contiguous, zero beyond N.
    """
    sums = Partials(dg, stride_sum, num_sums)
    if tl.program_id(2) == 0:
        w = Matrix(w_k, stride_kn, stride_kr)
        store_chain_rule(
            sums, groups, q_heads, w, stride_kh, dw_q, N, N_max, R, False, BLOCK_N, BLOCK_M, BLOCK_C, BLOCK_P
        )
    elif tl.program_id(2) == 1:
        w = Matrix(w_q, stride_qn, stride_qr)
        store_chain_rule(
            sums, groups, k_heads, w, stride_qh, dw_k, N, N_max, R, True, BLOCK_N, BLOCK_M, BLOCK_C, BLOCK_P
        )
    elif dw_v is not None:
        head = tl.program_id(1)
        tiles = tl.cdiv(N_max, BLOCK_C)
        rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
        if head < v_heads:
            first_group = tl.where(v_heads > 1, head, 0)
            end_group = tl.where(v_heads > 1, head + 1, groups)
            total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
            for group in range(first_group, end_group):
                total += sum_partials(
                    Partials(dw_v_sums, stride_sum, num_sums), group, rows, columns, N, BLOCK_N, BLOCK_P
                )
            store_gradient(dw_v, total, head, rows, columns, N_max, N_max)


@triton.jit(do_not_specialize=["num_partials", "per_sum", "size"])
def refined_weights_reduce_kernel(
    dg, dw_v_sums, num_partials, per_sum, size, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Program (e, s, 0): BLOCK_E entries of the sum of partials s · per_sum on, per_sum of them, of dg; (e, s, 1) of
    dw_v_sums.

    A sum takes the place of its first partial, which no other program reads.
    """
    partials = dg
    if tl.program_id(2) == 1:
        partials = dw_v_sums
    first = tl.program_id(1) * per_sum
    end = tl.minimum(first + per_sum, num_partials)
    entries = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.float32)
    for start in range(first, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        block = tl.load(partials + offset(p, size)[:, None] + entries[None, :], mask=(p < end)[:, None], other=0)
        total += tl.sum(block, 0)
    tl.store(partials + offset(first, size) + entries, total)


def launch_weights_product(w_q: Tensor, w_k: Tensor, w_v: Tensor | None, N: int) -> Tensor:
    """G = W_q W_kᵀ / √R [1 or H, BLOCK_N, BLOCK_N] and behind it W_v likewise, zero beyond N rows and columns.

    w_q, w_k [Nmax, R] or [H, Nmax, R] and w_v [Nmax, Nmax] or [H, Nmax, Nmax] or None, any strides.
    """
    g_heads, v_heads = max(heads_of(w_q), heads_of(w_k)), 0 if w_v is None else heads_of(w_v)
    size, R = host_block_width(N), w_q.shape[-1]
    squares = torch.empty((g_heads + v_heads, size, size), dtype=w_q.dtype, device=w_q.device)
    block_m = min(size, TILE)
    launch(
        refined_weights_product_kernel,
        ((size // block_m) ** 2, g_heads + v_heads),
        *(w_q, w_k, w_v, squares, *matrix_strides(w_q), *matrix_strides(w_k), *matrix_strides(w_v)),
        *(g_heads, N, R),
        BLOCK_N=size,
        BLOCK_M=block_m,
        BLOCK_R=32 if w_q.dtype == torch.float32 else 64,
        num_warps=4,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )
    return squares


def launch_weights_bwd(
    w_q: Tensor, w_k: Tensor, w_v: Tensor | None, dg: Tensor, dw_v_sums: Tensor | None, N: int
) -> list[Tensor]:
    """dw_q, dw_k and, where there is w_v, dw_v, contiguous and of the shapes of what they are gradients of.

    dg and dw_v_sums [partials, 1 or H, BLOCK_N, BLOCK_N] float32 are overwritten.
    """
    num_sums, groups, size, _ = dg.shape
    block_m = min(size, TILE)
    block_p = LOADED // (block_m * BLOCK_K.value)
    per_sum = 1
    if num_sums > 2 * block_p:
        per_sum = cdiv(num_sums, block_p)
        _launch_reduce(dg, dw_v_sums, num_sums, per_sum)
        num_sums = cdiv(num_sums, per_sum)
    dw_q, dw_k = contiguous_like(w_q), contiguous_like(w_k)
    dw_v = None if w_v is None else contiguous_like(w_v)
    N_max, R = w_q.shape[-2:]
    q_heads, k_heads, v_heads = heads_of(w_q), heads_of(w_k), 1 if w_v is None else heads_of(w_v)
    tiles = cdiv(N_max, block_m) * cdiv(R if w_v is None else max(R, N_max), TILE)
    launch(
        refined_weights_bwd_kernel,
        (tiles, max(q_heads, k_heads, v_heads), 2 if w_v is None else 3),
        *(dg, dw_v_sums, w_q, w_k, dw_q, dw_k, dw_v, *matrix_strides(w_q), *matrix_strides(w_k)),
        *(per_sum * groups * size * size, num_sums, groups, q_heads, k_heads, v_heads, N, N_max, R),
        BLOCK_N=size,
        BLOCK_M=block_m,
        BLOCK_C=TILE,
        BLOCK_P=block_p,
        num_warps=8,
        num_stages=1,
        maxnreg=MAX_REGISTERS,
    )
    return [dw_q, dw_k] if dw_v is None else [dw_q, dw_k, dw_v]


def _launch_reduce(dg: Tensor, dw_v_sums: Tensor | None, num_partials: int, per_sum: int) -> None:
    """Leave the sums of `per_sum` partials each in the first of them."""
    size, block_e = dg[0].numel(), 128
    launch(
        refined_weights_reduce_kernel,
        (size // block_e, cdiv(num_partials, per_sum), 1 if dw_v_sums is None else 2),
        *(dg, dg if dw_v_sums is None else dw_v_sums, num_partials, per_sum, size),
        BLOCK_P=32,
        BLOCK_E=block_e,
        num_warps=4,
        num_stages=1,
        maxnreg=MAX_REGISTERS,
    )


def contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def heads_of(w: Tensor) -> int:
    return w.shape[0] if w.dim() == 3 else 1


def matrix_strides(w: Tensor | None) -> tuple[int, int, int]:
    """The strides of [H, N, N], or of [N, N], one matrix for all heads; zeros for None."""
    if w is None:
        return 0, 0, 0
    return w.stride() if w.dim() == 3 else (0, *w.stride())

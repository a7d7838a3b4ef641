"""The matrices of a refinement: queries and keys whose products are -‖q - k‖², of the vectors q and k.

queries = [2 q, -‖q‖², 1]        keys = [k, 1, -‖k‖²]        dq = 2 dqueries[:W] - 2 dqueries[W] q    (dk alike)

In half precision each of the last two is two columns: -‖q‖² is the sum of its two, which keeps its last bits.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.launch import launch
from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.common.tiles import bhnd, block_width, head_rows, load_rows, store_rows
from recattn.triton_kernels.wasserstein_attention.config import VECTORS_OPTIONS, VECTORS_TILE
from recattn.triton_kernels.wasserstein_attention.shared import (
    grid_of_tiles,
    rows_of,
    sequence_of,
    sizes_of,
    tile_of,
)
from recattn.triton_kernels.wasserstein_attention.vectors import load_columns, mean_of_columns, store_gradients


@triton.jit
def store_factors(
    factors,
    mean,
    cov,
    mean_centre,
    cov_centre,
    first,
    seq,
    IS_KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of tokens of the queries or the keys."""
    factor: tl.constexpr = 1.0 if IS_KEY else 2.0
    dtype: tl.constexpr = factors.dtype.element_ty
    tokens = first + tl.arange(0, BLOCK_N)
    rows, stored, valid = rows_of(seq, tokens), tokens < seq.N, (tokens < seq.length)[:, None]
    mean = load_columns(mean, first, seq, False, False, HEAD_DIM, BLOCK_D, BLOCK_N) - mean_centre
    std = load_columns(cov, first, seq, True, False, HEAD_DIM, BLOCK_D, BLOCK_N) - cov_centre
    factors += seq.first * WIDTH
    store_rows(factors, tl.where(valid, factor * mean, 0.0), rows, stored, WIDTH, 1, HEAD_DIM, BLOCK_D)
    store_rows(factors + HEAD_DIM, tl.where(valid, factor * std, 0.0), rows, stored, WIDTH, 1, HEAD_DIM, BLOCK_D)
    norms = tl.where(tokens < seq.length, -tl.sum(mean * mean, 1) - tl.sum(std * std, 1), 0.0)
    ones = tl.where(tokens < seq.length, 1.0, 0.0)
    COLUMNS: tl.constexpr = WIDTH // 2 - HEAD_DIM
    addresses = factors + 2 * HEAD_DIM + rows.to(tl.int64) * WIDTH
    rounded = norms.to(dtype)
    to_norms, to_ones = (addresses + COLUMNS, addresses) if IS_KEY else (addresses, addresses + COLUMNS)
    tl.store(to_norms, rounded, mask=stored)
    tl.store(to_ones, ones.to(dtype), mask=stored)
    if COLUMNS == 2:
        tl.store(to_norms + 1, (norms - rounded.to(tl.float32)).to(dtype), mask=stored)
        tl.store(to_ones + 1, ones.to(dtype), mask=stored)


@triton.jit(do_not_specialize=["num_heads", "N"])
def wasserstein_factors_fwd_kernel(
    mean_q,
    cov_q,
    mean_k,
    cov_k,
    queries,
    keys,
    lengths,
    num_heads,
    N,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program i: all tokens of batch-head i, BLOCK_N at a time, after a pass over the keys for their mean."""
    bh = tl.program_id(0)
    batch, head = bh // num_heads, bh % num_heads
    seq = sequence_of(bh, num_heads, N, lengths)
    mean_q, cov_q = head_rows(mean_q, batch, head, seq.start), head_rows(cov_q, batch, head, seq.start)
    mean_k, cov_k = head_rows(mean_k, batch, head, seq.start), head_rows(cov_k, batch, head, seq.start)
    means = mean_of_columns(mean_k, seq, False, False, HEAD_DIM, BLOCK_D, BLOCK_N)
    stds = mean_of_columns(cov_k, seq, True, False, HEAD_DIM, BLOCK_D, BLOCK_N)
    for first in range(0, seq.N, BLOCK_N):
        store_factors(queries, mean_q, cov_q, means, stds, first, seq, False, HEAD_DIM, WIDTH, BLOCK_D, BLOCK_N)
        store_factors(keys, mean_k, cov_k, means, stds, first, seq, True, HEAD_DIM, WIDTH, BLOCK_D, BLOCK_N)


@triton.jit
def store_factor_gradients(
    dfactors,
    factors,
    cov,
    dmean,
    dcov,
    seq,
    bh,
    num_heads,
    tokens,
    IS_KEY: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The gradients of the mean and cov of a block of tokens from those of the queries or the keys."""
    factor: tl.constexpr = 1.0 if IS_KEY else 2.0
    NORMS: tl.constexpr = 2 * HEAD_DIM + (WIDTH // 2 - HEAD_DIM if IS_KEY else 0)
    valid, rows = tokens < seq.length, tokens * seq.step
    factors, dfactors = factors + seq.first * WIDTH, dfactors + seq.first * WIDTH
    vectors = load_rows(factors, rows, valid, WIDTH, 1, 2 * HEAD_DIM, BLOCK_W).to(tl.float32) / factor
    dvectors = load_rows(dfactors, rows, valid, WIDTH, 1, 2 * HEAD_DIM, BLOCK_W).to(tl.float32) * factor
    dnorms = tl.load(dfactors + rows.to(tl.int64) * WIDTH + NORMS, mask=valid, other=0.0).to(tl.float32)
    dvectors -= 2 * dnorms[:, None] * vectors
    store_gradients(dmean, dcov, dvectors, cov, seq, bh, num_heads, tokens, HEAD_DIM, BLOCK_W, False)


@triton.jit(do_not_specialize=["B", "num_heads", "N"])
def wasserstein_factors_bwd_kernel(
    dqueries,
    dkeys,
    queries,
    keys,
    cov_q,
    cov_k,
    dmean_q,
    dcov_q,
    dmean_k,
    dcov_k,
    lengths,
    B,
    num_heads,
    N,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_N tokens of a batch-head."""
    bh, seq, tile = tile_of(B, num_heads, N, lengths, BLOCK_N, False)
    tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    store_factor_gradients(
        dqueries, queries, cov_q, dmean_q, dcov_q, seq, bh, num_heads, tokens, False, HEAD_DIM, WIDTH, BLOCK_W
    )
    store_factor_gradients(
        dkeys, keys, cov_k, dmean_k, dcov_k, seq, bh, num_heads, tokens, True, HEAD_DIM, WIDTH, BLOCK_W
    )


def factors_width(head_dim: int, dtype: torch.dtype) -> int:
    """Columns of queries and keys."""
    return 2 * head_dim + (2 if dtype == torch.float32 else 4)


def launch_wasserstein_factors_fwd(
    gaussians: Sequence[Tensor], queries: Tensor, keys: Tensor, lengths: Lengths
) -> None:
    """Write queries and keys, contiguous, of mean_q, cov_q, mean_k, cov_k; zeros at padding."""
    B, H, N, head_dim = sizes_of(gaussians[0], lengths)
    if B * H * N == 0:
        return
    block_d = block_width(head_dim)
    launch(
        wasserstein_factors_fwd_kernel,
        (B * H,),
        *[bhnd(x, lengths.cu_seqlens) for x in gaussians],
        *(queries, keys, lengths, H, N),
        HEAD_DIM=head_dim,
        WIDTH=queries.shape[-1],
        BLOCK_D=block_d,
        BLOCK_N=VECTORS_TILE // 2 // block_d,
        **VECTORS_OPTIONS,
    )


def launch_wasserstein_factors_bwd(
    dqueries: Tensor,
    dkeys: Tensor,
    queries: Tensor,
    keys: Tensor,
    cov_q: Tensor,
    cov_k: Tensor,
    gradients: Sequence[Tensor],
    lengths: Lengths,
) -> None:
    """Write `gradients`, of mean_q, cov_q, mean_k, cov_k; all contiguous, but cov_q and cov_k. Zeros at padding."""
    B, H, N, head_dim = sizes_of(cov_q, lengths)
    if B * H * N == 0:
        return
    block_w = block_width(2 * head_dim)
    block_n = VECTORS_TILE // block_w
    launch(
        wasserstein_factors_bwd_kernel,
        grid_of_tiles(B, H, N, lengths, block_n),
        *(dqueries, dkeys, queries, keys, bhnd(cov_q, lengths.cu_seqlens), bhnd(cov_k, lengths.cu_seqlens)),
        *(*gradients, lengths, B, H, N),
        HEAD_DIM=head_dim,
        WIDTH=queries.shape[-1],
        BLOCK_W=block_w,
        BLOCK_N=block_n,
        **VECTORS_OPTIONS,
    )

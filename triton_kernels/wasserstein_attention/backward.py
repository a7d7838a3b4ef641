"""wasserstein_attention, backward: the equations are in the package's docstring."""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, PER_TOKEN, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import launch
from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.common.softmax import exp_scaled, log2e_scale
from recattn.triton_kernels.common.tiles import bhnd
from recattn.triton_kernels.wasserstein_attention.config import launch_constants
from recattn.triton_kernels.wasserstein_attention.shared import (
    DO_NOT_SPECIALIZE,
    Forward,
    delta_of_rows,
    end_of_keys,
    grid_of_tiles,
    last_key_of,
    load_row,
    load_tile,
    qk_block,
    scalars_of,
    second_half,
    sizes_of,
    store_tile,
    tile_of,
)
from recattn.triton_kernels.wasserstein_attention.vectors import store_gradients


class Rows(NamedTuple):
    """A block of queries in the backward."""

    positions: tl.tensor  # [BM]
    last_key: tl.tensor
    q: tl.tensor  # [BM, W]
    dmean: tl.tensor  # [BM, Dv]
    dcov: tl.tensor
    row_max: tl.tensor  # [BM]
    inv_row_sum: tl.tensor
    delta: tl.tensor


class Keys(NamedTuple):
    """A block of keys in the backward."""

    first: tl.tensor  # position
    k: tl.tensor  # [BN, W]
    mean_v: tl.tensor  # [BN, Dv]
    cov_v: tl.tensor


@triton.jit
def p_and_ds(rows, keys, scale, bh, dropout):
    """p after dropout and ds, [BM, BN], of a block of queries and a block of keys."""
    BLOCK_N: tl.constexpr = keys.k.shape[0]
    qk = qk_block(rows.q, keys.k, scale)
    p = exp_scaled(qk - rows.row_max[:, None], rows.q) * rows.inv_row_sum[:, None]
    p = tl.where((keys.first + tl.arange(0, BLOCK_N))[None, :] <= rows.last_key[:, None], p, 0.0)
    p_dropped = p
    if dropout.seed is not None:
        seed = tl.load(dropout.seed)
        p_dropped *= dropout_weights(seed, bh, PER_TOKEN, rows.positions, keys.first, dropout.threshold, BLOCK_N)
    dp = 2 * p_dropped * tl.dot(rows.dcov, tl.trans(keys.cov_v), input_precision="ieee")
    dp = tl.dot(rows.dmean, tl.trans(keys.mean_v), dp, input_precision="ieee")
    if dropout.seed is not None:  # p times the weights of the dropout is p_dropped
        return p_dropped, p_dropped * dp - p * rows.delta[:, None]
    return p_dropped, p * (dp - rows.delta[:, None])


@triton.jit
def load_row_stats(row_stats, seq, rows):
    """row_max and 1 / row_sum of a block of queries."""
    row_max = load_row(row_stats, seq, rows, 0.0)
    row_sum = load_row(second_half(row_stats, seq, 1), seq, rows, 1.0)
    return row_max, 1 / row_sum


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def wasserstein_attention_bwd_dq_kernel(
    vectors,
    mean_v,
    cov_v,
    mean,
    cov,
    row_stats,
    dmean,
    dcov,
    delta,
    cov_q,
    dmean_q,
    dcov_q,
    lengths,
    dropout_seed,
    B,
    num_heads,
    N,
    scale,
    causal,
    dropout_threshold,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REFINED: tl.constexpr,
):
    """One program: BLOCK_M queries of a batch-head, the last tiles first; all the keys that they see.

    delta    = rowsum(dmean * mean) + 2 rowsum(dcov * cov)                 also stored, for dk and dv
    for each block of BLOCK_N keys:
        ds   = p * (dmean @ mean_v.T + 2 p * (dcov @ cov_v.T) - delta)     [BLOCK_M, BLOCK_N]
        acc += ds @ k                                                      [BLOCK_M, W]
    dq       = 2 scale * (acc - rowsum(ds) q)                              stored as dmean_q and dcov_q
    """
    bh, seq, tile = tile_of(B, num_heads, N, lengths, BLOCK_M, True)
    if lengths.cu_seqlens is not None and tile * BLOCK_M >= seq.length:
        return
    WIDTH: tl.constexpr = 2 * HEAD_DIM
    key = second_half(vectors, seq, WIDTH)
    row_positions = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    dmean_tile = load_tile(dmean, seq, row_positions, V_HEAD_DIM, BLOCK_DV)  # [BM, Dv]
    dcov_tile = load_tile(dcov, seq, row_positions, V_HEAD_DIM, BLOCK_DV)
    mean_tile = load_tile(mean, seq, row_positions, V_HEAD_DIM, BLOCK_DV)
    cov_tile = load_tile(cov, seq, row_positions, V_HEAD_DIM, BLOCK_DV)
    row_delta = delta_of_rows(dmean_tile, dcov_tile, mean_tile, cov_tile)  # [BM]
    tl.store(delta + seq.first + row_positions * seq.step, row_delta, mask=row_positions < seq.length)
    row_max, inv_row_sum = load_row_stats(row_stats, seq, row_positions)
    q_tile = load_tile(vectors, seq, row_positions, WIDTH, BLOCK_W)  # [BM, W]
    last_key = last_key_of(row_positions, seq.length, causal)
    rows = Rows(row_positions, last_key, q_tile, dmean_tile, dcov_tile, row_max, inv_row_sum, row_delta)
    qk_scale = scale * log2e_scale(q_tile)
    dropout = Dropout(dropout_seed, dropout_threshold)
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    ds_sum = tl.zeros([BLOCK_M], tl.float32)  # 0 but for rounding
    end = end_of_keys(seq, tile, causal, BLOCK_M)
    for first_key in range(0, end, BLOCK_N):
        key_positions = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(key, seq, key_positions, WIDTH, BLOCK_W)  # [BN, W]
        mean_v_tile = load_tile(mean_v, seq, key_positions, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        cov_v_tile = load_tile(cov_v, seq, key_positions, V_HEAD_DIM, BLOCK_DV)
        keys = Keys(first_key, k_tile, mean_v_tile, cov_v_tile)
        _, ds = p_and_ds(rows, keys, qk_scale, bh, dropout)
        ds = ds.to(k_tile.dtype)
        acc = tl.dot(ds, k_tile, acc, input_precision="ieee")
        ds_sum += tl.sum(ds.to(tl.float32), 1)
    acc = 2 * scale * (acc - ds_sum[:, None] * q_tile)
    store_gradients(dmean_q, dcov_q, acc, cov_q, seq, bh, num_heads, row_positions, HEAD_DIM, BLOCK_W, REFINED)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def wasserstein_attention_bwd_dkdv_kernel(
    vectors,
    mean_v,
    cov_v,
    row_stats,
    dmean,
    dcov,
    delta,
    cov_k,
    dmean_k,
    dcov_k,
    dmean_v,
    dcov_v,
    lengths,
    dropout_seed,
    B,
    num_heads,
    N,
    scale,
    causal,
    dropout_threshold,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REFINED: tl.constexpr,
):
    """One program: BLOCK_N keys of a batch-head; all the queries that see them.

    for each block of BLOCK_M queries:
        p, ds as in the kernel of dq                                       [BLOCK_M, BLOCK_N]
        dk      += ds.T @ q                                                [BLOCK_N, W]
        dmean_v += p.T @ dmean        dcov_v += (p * p).T @ dcov           [BLOCK_N, Dv]
    dk           = 2 scale * (dk - colsum(ds) k)                           stored as dmean_k and dcov_k
    """
    bh, seq, tile = tile_of(B, num_heads, N, lengths, BLOCK_N, False)
    if lengths.cu_seqlens is not None and tile * BLOCK_N >= seq.length:
        return
    WIDTH: tl.constexpr = 2 * HEAD_DIM
    key = second_half(vectors, seq, WIDTH)
    first_key = tile * BLOCK_N
    key_positions = first_key + tl.arange(0, BLOCK_N)
    k_tile = load_tile(key, seq, key_positions, WIDTH, BLOCK_W)  # [BN, W]
    mean_v_tile = load_tile(mean_v, seq, key_positions, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
    cov_v_tile = load_tile(cov_v, seq, key_positions, V_HEAD_DIM, BLOCK_DV)
    keys = Keys(first_key, k_tile, mean_v_tile, cov_v_tile)
    qk_scale = scale * log2e_scale(k_tile)
    dropout = Dropout(dropout_seed, dropout_threshold)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    ds_sum = tl.zeros([BLOCK_N], tl.float32)
    dmean_v_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dcov_v_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first_row = tl.where(causal != 0, first_key // BLOCK_M * BLOCK_M, 0)
    # At least one step, for the reason of `end_of_keys`.
    steps = tl.maximum(tl.cdiv(seq.length - first_row, BLOCK_M), 1)
    for step in range(0, steps):
        row_positions = first_row + step * BLOCK_M + tl.arange(0, BLOCK_M)
        q_tile = load_tile(vectors, seq, row_positions, WIDTH, BLOCK_W)  # [BM, W]
        row_max, inv_row_sum = load_row_stats(row_stats, seq, row_positions)
        row_delta = load_row(delta, seq, row_positions, 0.0)
        dmean_tile = load_tile(dmean, seq, row_positions, V_HEAD_DIM, BLOCK_DV)  # [BM, Dv]
        dcov_tile = load_tile(dcov, seq, row_positions, V_HEAD_DIM, BLOCK_DV)
        last_key = last_key_of(row_positions, seq.length, causal)
        rows = Rows(row_positions, last_key, q_tile, dmean_tile, dcov_tile, row_max, inv_row_sum, row_delta)
        p, ds = p_and_ds(rows, keys, qk_scale, bh, dropout)
        # All operands before the first product: nothing is left to write while one is in flight.
        squares, p, ds = (p * p).to(dcov_tile.dtype), p.to(dmean_tile.dtype), ds.to(q_tile.dtype)
        dcov_v_acc = tl.dot(tl.trans(squares), dcov_tile, dcov_v_acc, input_precision="ieee")
        dmean_v_acc = tl.dot(tl.trans(p), dmean_tile, dmean_v_acc, input_precision="ieee")
        dk_acc = tl.dot(tl.trans(ds), q_tile, dk_acc, input_precision="ieee")
        ds_sum += tl.sum(ds.to(tl.float32), 0)
    dk_acc = 2 * scale * (dk_acc - ds_sum[:, None] * k_tile)
    store_gradients(dmean_k, dcov_k, dk_acc, cov_k, seq, bh, num_heads, key_positions, HEAD_DIM, BLOCK_W, REFINED)
    store_tile(dmean_v, dmean_v_acc, seq, key_positions, V_HEAD_DIM, BLOCK_DV)
    store_tile(dcov_v, dcov_v_acc, seq, key_positions, V_HEAD_DIM, BLOCK_DV)


def launch_wasserstein_attention_bwd(
    forward: Forward,
    dmean: Tensor,
    dcov: Tensor,
    gradients: Sequence[Tensor],
    lengths: Lengths,
    options: WassersteinAttentionOptions,
    *,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """Write `gradients`, those of the first six tensors of `forward`; zeros at padding.

    dmean, dcov and gradients are contiguous, `options` as in the forward.
    """
    mean_q, cov_q, _, cov_k, mean_v, cov_v, mean, cov, vectors, row_stats = forward
    B, H, N, head_dim = sizes = sizes_of(mean_q, lengths)
    if B * H * N == 0:
        return
    dmean_q, dcov_q, dmean_k, dcov_k, dmean_v, dcov_v = gradients
    delta = row_stats.new_empty(mean_q.shape[:-1])
    scalars = scalars_of(sizes, options, dropout)
    _, _, dq, dkdv = launch_constants(head_dim, mean_v.shape[-1], mean_q.dtype, options.refined)
    launch(
        wasserstein_attention_bwd_dq_kernel,
        grid_of_tiles(B, H, N, lengths, dq["BLOCK_M"]),
        *(vectors, mean_v, cov_v, mean, cov, row_stats, dmean, dcov, delta),
        *(bhnd(cov_q, lengths.cu_seqlens), dmean_q, dcov_q, lengths, dropout.seed, *scalars),
        **dq,
    )
    launch(
        wasserstein_attention_bwd_dkdv_kernel,
        grid_of_tiles(B, H, N, lengths, dkdv["BLOCK_N"]),
        *(vectors, mean_v, cov_v, row_stats, dmean, dcov, delta),
        *(bhnd(cov_k, lengths.cu_seqlens), dmean_k, dcov_k, dmean_v, dcov_v, lengths, dropout.seed, *scalars),
        **dkdv,
    )

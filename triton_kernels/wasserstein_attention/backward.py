"""wasserstein_attention, backward: the equations are in the package's docstring."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, PER_TOKEN, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import ENABLE_FP_FUSION, MAX_REGISTERS
from recattn.triton_kernels.common.softmax import exp_scaled, log2e_scale
from recattn.triton_kernels.wasserstein_attention.config import WassersteinAttentionConfig
from recattn.triton_kernels.wasserstein_attention.shared import (
    DO_NOT_SPECIALIZE,
    Forward,
    choose_config,
    dot_of_rows,
    is_visible,
    load_tile,
    qk_block,
    sequence_of,
    sizes_and_options,
    store_tile,
)


class Rows(NamedTuple):
    """A block of queries in the backward."""

    positions: tl.tensor  # [BM]
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
def p_and_ds(rows, keys, visible, scale, bh, dropout):
    """p after dropout and ds, [BM, BN], of a block of queries and a block of keys."""
    qk = qk_block(rows.q, keys.k, scale)
    p = exp_scaled(qk - rows.row_max[:, None], rows.q) * rows.inv_row_sum[:, None]
    p = tl.where(visible, p, 0.0)
    p_dropped = p
    if dropout.seed is not None:
        BLOCK_N: tl.constexpr = keys.k.shape[0]
        seed = tl.load(dropout.seed)
        keep = dropout_weights(seed, bh, PER_TOKEN, rows.positions, keys.first, dropout.threshold, BLOCK_N)
        p_dropped = p * keep
    dp = 2 * p_dropped * tl.dot(rows.dcov, tl.trans(keys.cov_v), input_precision="ieee")
    dp += tl.dot(rows.dmean, tl.trans(keys.mean_v), input_precision="ieee")
    if dropout.seed is not None:
        dp *= keep
    return p_dropped, p * (dp - rows.delta[:, None])


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def wasserstein_attention_bwd_dq_kernel(
    query,
    key,
    mean_v,
    cov_v,
    mean,
    cov,
    row_max_ptr,
    row_sum_ptr,
    dmean,
    dcov,
    delta,
    dquery,
    seq_lens,
    dropout_seed,
    num_heads,
    N,
    scale,
    causal,
    left_padded,
    dropout_threshold,
    WIDTH: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (i, j): BLOCK_M queries of batch-head i, the last tiles first; all the keys that they see.

    delta    = rowsum(dmean * mean) + 2 rowsum(dcov * cov)                 also stored, for dk and dv
    for each block of BLOCK_N keys:
        ds   = p * (dmean @ mean_v.T + 2 p * (dcov @ cov_v.T) - delta)     [BLOCK_M, BLOCK_N]
        acc += ds @ k                                                      [BLOCK_M, W]
    dq       = 2 scale * (acc - rowsum(ds) q)
    """
    bh = tl.program_id(0)
    seq = sequence_of(bh, num_heads, N, seq_lens, left_padded)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    if tile * BLOCK_M >= seq.length:
        return
    row_positions = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = row_positions < seq.length
    dmean_tile = load_tile(dmean, seq, row_positions, V_HEAD_DIM, BLOCK_DV)  # [BM, Dv]
    dcov_tile = load_tile(dcov, seq, row_positions, V_HEAD_DIM, BLOCK_DV)
    mean_tile = load_tile(mean, seq, row_positions, V_HEAD_DIM, BLOCK_DV)
    cov_tile = load_tile(cov, seq, row_positions, V_HEAD_DIM, BLOCK_DV)
    row_delta = dot_of_rows(dmean_tile, mean_tile) + 2 * dot_of_rows(dcov_tile, cov_tile)  # [BM]
    tl.store(delta + seq.first + row_positions, row_delta, mask=row_valid)
    row_max = tl.load(row_max_ptr + seq.first + row_positions, mask=row_valid, other=0.0)
    inv_row_sum = 1 / tl.load(row_sum_ptr + seq.first + row_positions, mask=row_valid, other=1.0)
    q_tile = load_tile(query, seq, row_positions, WIDTH, BLOCK_W)  # [BM, W]
    rows = Rows(row_positions, q_tile, dmean_tile, dcov_tile, row_max, inv_row_sum, row_delta)
    qk_scale = scale * log2e_scale(q_tile)
    dropout = Dropout(dropout_seed, dropout_threshold)
    acc = tl.zeros([BLOCK_M, BLOCK_W], tl.float32)
    ds_sum = tl.zeros([BLOCK_M], tl.float32)  # 0 but for rounding
    end = tl.where(causal != 0, tl.minimum(seq.length, (tile + 1) * BLOCK_M), seq.length)
    for first_key in range(0, end, BLOCK_N):
        key_positions = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(key, seq, key_positions, WIDTH, BLOCK_W)  # [BN, W]
        mean_v_tile = load_tile(mean_v, seq, key_positions, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        cov_v_tile = load_tile(cov_v, seq, key_positions, V_HEAD_DIM, BLOCK_DV)
        keys = Keys(first_key, k_tile, mean_v_tile, cov_v_tile)
        visible = is_visible(row_positions[:, None], key_positions[None, :], seq.length, causal)
        _, ds = p_and_ds(rows, keys, visible, qk_scale, bh, dropout)
        ds = ds.to(k_tile.dtype)
        acc = tl.dot(ds, k_tile, acc, input_precision="ieee")
        ds_sum += tl.sum(ds.to(tl.float32), 1)
    acc = 2 * scale * (acc - ds_sum[:, None] * q_tile)
    store_tile(dquery, acc, seq, row_positions, WIDTH, BLOCK_W)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def wasserstein_attention_bwd_dkdv_kernel(
    query,
    key,
    mean_v,
    cov_v,
    row_max_ptr,
    row_sum_ptr,
    dmean,
    dcov,
    delta,
    dkey,
    dmean_v,
    dcov_v,
    seq_lens,
    dropout_seed,
    num_heads,
    N,
    scale,
    causal,
    left_padded,
    dropout_threshold,
    WIDTH: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (i, j): BLOCK_N keys of batch-head i; all the queries that see them.

    for each block of BLOCK_M queries:
        p, ds as in the kernel of dq                                       [BLOCK_M, BLOCK_N]
        dk      += ds.T @ q                                                [BLOCK_N, W]
        dmean_v += p.T @ dmean        dcov_v += (p * p).T @ dcov           [BLOCK_N, Dv]
    dk           = 2 scale * (dk - colsum(ds) k)
    """
    bh = tl.program_id(0)
    seq = sequence_of(bh, num_heads, N, seq_lens, left_padded)
    first_key = tl.program_id(1) * BLOCK_N
    if first_key >= seq.length:
        return
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
    for step in range(0, tl.cdiv(seq.length - first_row, BLOCK_M)):
        row_positions = first_row + step * BLOCK_M + tl.arange(0, BLOCK_M)
        row_valid = row_positions < seq.length
        q_tile = load_tile(query, seq, row_positions, WIDTH, BLOCK_W)  # [BM, W]
        row_max = tl.load(row_max_ptr + seq.first + row_positions, mask=row_valid, other=0.0)
        inv_row_sum = 1 / tl.load(row_sum_ptr + seq.first + row_positions, mask=row_valid, other=1.0)
        row_delta = tl.load(delta + seq.first + row_positions, mask=row_valid, other=0.0)
        dmean_tile = load_tile(dmean, seq, row_positions, V_HEAD_DIM, BLOCK_DV)  # [BM, Dv]
        dcov_tile = load_tile(dcov, seq, row_positions, V_HEAD_DIM, BLOCK_DV)
        rows = Rows(row_positions, q_tile, dmean_tile, dcov_tile, row_max, inv_row_sum, row_delta)
        visible = is_visible(row_positions[:, None], key_positions[None, :], seq.length, causal) & row_valid[:, None]
        p, ds = p_and_ds(rows, keys, visible, qk_scale, bh, dropout)
        squares = tl.trans((p * p).to(dcov_tile.dtype))
        dcov_v_acc = tl.dot(squares, dcov_tile, dcov_v_acc, input_precision="ieee")
        p = tl.trans(p.to(dmean_tile.dtype))
        dmean_v_acc = tl.dot(p, dmean_tile, dmean_v_acc, input_precision="ieee")
        ds = ds.to(q_tile.dtype)
        dk_acc = tl.dot(tl.trans(ds), q_tile, dk_acc, input_precision="ieee")
        ds_sum += tl.sum(ds.to(tl.float32), 0)
    dk_acc = 2 * scale * (dk_acc - ds_sum[:, None] * k_tile)
    store_tile(dkey, dk_acc, seq, key_positions, WIDTH, BLOCK_W)
    store_tile(dmean_v, dmean_v_acc, seq, key_positions, V_HEAD_DIM, BLOCK_DV)
    store_tile(dcov_v, dcov_v_acc, seq, key_positions, V_HEAD_DIM, BLOCK_DV)


def launch_wasserstein_attention_bwd(
    forward: Forward,
    dmean: Tensor,
    dcov: Tensor,
    dquery: Tensor,
    dkey: Tensor,
    dmean_v: Tensor,
    dcov_v: Tensor,
    seq_lens: Tensor | None,
    options: WassersteinAttentionOptions,
    *,
    dropout: Dropout = NO_DROPOUT,
    config: WassersteinAttentionConfig | None = None,
) -> None:
    """Write dquery, dkey, dmean_v and dcov_v; all contiguous, `options` as in the forward."""
    B, H, N, _ = forward.query.shape
    if B * H * N == 0:
        return
    query, key, mean_v, cov_v, mean, cov, row_max, row_sum = forward
    delta = torch.empty_like(row_max)
    config = config or choose_config(forward)
    shared = sizes_and_options(forward, options, dropout)
    with torch.cuda.device_of(query):
        tile = config.bwd_dq
        wasserstein_attention_bwd_dq_kernel[B * H, triton.cdiv(N, tile.block_m)](
            *(query, key, mean_v, cov_v, mean, cov, row_max, row_sum),
            *(dmean, dcov, delta, dquery, seq_lens, dropout.seed),
            **shared,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )
        tile = config.bwd_dkdv
        wasserstein_attention_bwd_dkdv_kernel[B * H, triton.cdiv(N, tile.block_n)](
            *(query, key, mean_v, cov_v, row_max, row_sum),
            *(dmean, dcov, delta, dkey, dmean_v, dcov_v, seq_lens, dropout.seed),
            **shared,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=MAX_REGISTERS,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )

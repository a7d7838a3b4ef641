"""wasserstein_attention, forward: the equations are in the package's docstring."""

import triton
import triton.language as tl

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, PER_TOKEN, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import launch
from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.common.softmax import exp_scaled, log2e_scale
from recattn.triton_kernels.wasserstein_attention.config import launch_constants
from recattn.triton_kernels.wasserstein_attention.shared import (
    DO_NOT_SPECIALIZE,
    Forward,
    end_of_keys,
    grid_of_tiles,
    last_key_of,
    load_tile,
    qk_block,
    scalars_of,
    second_half,
    sizes_of,
    store_row,
    store_tile,
    tile_of,
)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def wasserstein_attention_fwd_kernel(
    vectors,
    mean_v,
    cov_v,
    mean,
    cov,
    row_stats,
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
):
    """One program: BLOCK_M queries of a batch-head, the last tiles first; all the keys that they see.

    for each block of BLOCK_N keys:
        qk       = scale * (2 q @ k.T - |k|^2)                            [BLOCK_M, BLOCK_N], W components
        p        = exp(qk - row_max), and row_scale for what came before
        mean_acc = row_scale * mean_acc + p @ mean_v                      [BLOCK_M, Dv]
        cov_acc  = row_scale^2 * cov_acc + p^2 @ cov_v
    mean, cov    = mean_acc / row_sum, cov_acc / row_sum^2
    """
    bh, seq, tile = tile_of(B, num_heads, N, lengths, BLOCK_M, True)
    if lengths.cu_seqlens is not None and tile * BLOCK_M >= seq.length:
        return
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    WIDTH: tl.constexpr = 2 * HEAD_DIM
    q_tile = load_tile(vectors, seq, rows, WIDTH, BLOCK_W)  # [BM, W]
    key = second_half(vectors, seq, WIDTH)
    scale *= log2e_scale(q_tile)
    mean_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    cov_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    last_key = last_key_of(rows, seq.length, causal)
    end = end_of_keys(seq, tile, causal, BLOCK_M)
    for first_key in range(0, end, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        k_tile = load_tile(key, seq, keys, WIDTH, BLOCK_W)  # [BN, W]
        qk = qk_block(q_tile, k_tile, scale)  # [BM, BN]
        qk = tl.where(keys[None, :] <= last_key[:, None], qk, -float("inf"))
        # Every row of the sequence sees the first key, so from the first block on this is finite.
        new_row_max = tl.maximum(row_max, tl.max(qk, 1))
        p = exp_scaled(qk - new_row_max[:, None], q_tile)
        row_scale = exp_scaled(row_max - new_row_max, q_tile)
        row_sum = row_sum * row_scale + tl.sum(p, 1)
        if dropout_seed is not None:
            p *= dropout_weights(tl.load(dropout_seed), bh, PER_TOKEN, rows, first_key, dropout_threshold, BLOCK_N)
        mean_tile = load_tile(mean_v, seq, keys, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        cov_tile = load_tile(cov_v, seq, keys, V_HEAD_DIM, BLOCK_DV)
        # Both operands and accumulators before either product: nothing is left to write while one is in flight.
        weights, squares = p.to(mean_tile.dtype), (p * p).to(cov_tile.dtype)
        mean_acc, cov_acc = mean_acc * row_scale[:, None], cov_acc * (row_scale * row_scale)[:, None]
        mean_acc = tl.dot(weights, mean_tile, mean_acc, input_precision="ieee")
        cov_acc = tl.dot(squares, cov_tile, cov_acc, input_precision="ieee")
        row_max = new_row_max
    inv_row_sum = 1 / tl.where(rows < seq.length, row_sum, 1.0)
    store_tile(mean, mean_acc * inv_row_sum[:, None], seq, rows, V_HEAD_DIM, BLOCK_DV)
    store_tile(cov, cov_acc * (inv_row_sum * inv_row_sum)[:, None], seq, rows, V_HEAD_DIM, BLOCK_DV)
    store_row(row_stats, row_max, seq, rows)
    store_row(second_half(row_stats, seq, 1), row_sum, seq, rows)


def launch_wasserstein_attention_fwd(
    forward: Forward,
    lengths: Lengths,
    options: WassersteinAttentionOptions,
    *,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """Write mean = P μ_v, cov = (P∘P) Σ_v and the row statistics of `forward`, whose vectors are written; zeros at
    padding."""
    mean_q, _, _, _, mean_v, cov_v, mean, cov, vectors, row_stats = forward
    B, H, N, head_dim = sizes = sizes_of(mean_q, lengths)
    if B * H * N == 0:
        return
    constants = launch_constants(head_dim, mean_v.shape[-1], mean_q.dtype, options.refined).fwd
    launch(
        wasserstein_attention_fwd_kernel,
        grid_of_tiles(B, H, N, lengths, constants["BLOCK_M"]),
        *(vectors, mean_v, cov_v, mean, cov, row_stats, lengths, dropout.seed),
        *scalars_of(sizes, options, dropout),
        **constants,
    )

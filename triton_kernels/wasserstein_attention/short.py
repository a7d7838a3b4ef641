"""wasserstein_attention of short sequences in half precision: one program holds all tokens of a batch-head.

It makes the vectors itself, so that neither they nor the row statistics pass through memory. The equations are in the
package's docstring; each half of the vectors, means and standard deviations, has its own matmul.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, PER_TOKEN, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import architecture_of, host_block_width, launch
from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.common.softmax import exp_scaled, log2e_scale
from recattn.triton_kernels.common.tiles import Tokens, bhnd, head_rows, load_tokens
from recattn.triton_kernels.wasserstein_attention.config import ShortConstants, longest_of, short_constants
from recattn.triton_kernels.wasserstein_attention.shared import (
    DO_NOT_SPECIALIZE,
    scalars_of,
    sequence_of,
    sizes_of,
    squared_norms,
    store_tile,
)
from recattn.triton_kernels.wasserstein_attention.vectors import (
    finite_mean,
    standard_deviations,
    standard_deviations_backward,
)


class Problem(NamedTuple):
    """What the programs of a batch-head know of it."""

    seq: tl.tensor
    bh: tl.tensor
    num_heads: tl.tensor
    causal: tl.tensor
    scale: tl.tensor


class Gaussians(NamedTuple):
    """Tokens of a sequence, [tokens, BLOCK_D] or [tokens, BLOCK_DV]; zeros past its end."""

    mean: tl.tensor
    cov: tl.tensor


class Vectors(NamedTuple):
    """[tokens, BLOCK_D] each."""

    mean: tl.tensor
    std: tl.tensor


@triton.jit
def load_tile(x, problem, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[tokens, BLOCK_WIDTH] of a BHND; zeros past the end of the sequence."""
    batch, head = problem.bh // problem.num_heads, problem.bh % problem.num_heads
    x = head_rows(x, batch, head, problem.seq.start)
    return load_tokens(x, Tokens(tokens, tokens < problem.seq.length), WIDTH, BLOCK_WIDTH)


@triton.jit
def load_gaussians(mean, cov, problem, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    mean_tile = load_tile(mean, problem, tokens, WIDTH, BLOCK_WIDTH)
    return Gaussians(mean_tile, load_tile(cov, problem, tokens, WIDTH, BLOCK_WIDTH))


@triton.jit
def centre_of(keys, seq, REFINED: tl.constexpr):
    """The mean of the keys' vectors, [1, BLOCK_D] each."""
    std = standard_deviations(keys.cov.to(tl.float32), REFINED, False)
    return Vectors(finite_mean(keys.mean.to(tl.float32), seq), finite_mean(std, seq))


@triton.jit
def centred(x, centre, dtype: tl.constexpr):
    return (x - centre).to(dtype)


@triton.jit
def vectors_of(gaussians, centre, REFINED: tl.constexpr):
    dtype: tl.constexpr = gaussians.mean.dtype
    mean = centred(gaussians.mean.to(tl.float32), centre.mean, dtype)
    std = standard_deviations(gaussians.cov.to(tl.float32), REFINED, False)
    return Vectors(mean, centred(std, centre.std, dtype))


@triton.jit
def exp_of_distances(q, k, tokens, problem):
    """exp(qk - row_max), [tokens, tokens], and 1 / row_sum; NaN if there is no token."""
    qk = tl.dot(q.mean, tl.trans(k.mean), input_precision="ieee")
    qk = tl.dot(q.std, tl.trans(k.std), qk, input_precision="ieee")
    length, scale = problem.seq.length, problem.scale * log2e_scale(q.mean)
    norms = tl.where(tokens < length, scale * (squared_norms(k.mean) + squared_norms(k.std)), float("inf"))
    last_key = tl.where(problem.causal != 0, tokens, length)
    qk = tl.where(tokens[None, :] <= last_key[:, None], 2 * scale * qk - norms[None, :], -float("inf"))
    p = exp_scaled(qk - tl.max(qk, 1)[:, None], q.mean)
    return p, 1 / tl.sum(p, 1)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def wasserstein_attention_short_fwd_kernel(
    mean_q,
    cov_q,
    mean_k,
    cov_k,
    mean_v,
    cov_v,
    mean,
    cov,
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
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REFINED: tl.constexpr,
):
    """Program i: all tokens of batch-head i, at most BLOCK_N.

    q, k      = the vectors                                [BLOCK_N, D], means and standard deviations apart
    p         = exp(qk - row_max)                          [BLOCK_N, BLOCK_N]
    mean, cov = p @ mean_v / row_sum, p^2 @ cov_v / row_sum^2

    The first six are BHND; mean and cov are contiguous.
    """
    bh = tl.program_id(0)
    seq = sequence_of(bh, num_heads, N, lengths)
    problem = Problem(seq, bh, num_heads, causal, scale)
    tokens = tl.arange(0, BLOCK_N)
    # All loads first, so that they are in flight together.
    queries = load_gaussians(mean_q, cov_q, problem, tokens, HEAD_DIM, BLOCK_D)
    keys = load_gaussians(mean_k, cov_k, problem, tokens, HEAD_DIM, BLOCK_D)
    values = load_gaussians(mean_v, cov_v, problem, tokens, V_HEAD_DIM, BLOCK_DV)
    centre = centre_of(keys, seq, REFINED)
    q, k = vectors_of(queries, centre, REFINED), vectors_of(keys, centre, REFINED)
    p, inv_row_sum = exp_of_distances(q, k, tokens, problem)
    if dropout_seed is not None:
        p *= dropout_weights(tl.load(dropout_seed), bh, PER_TOKEN, tokens, 0, dropout_threshold, BLOCK_N)
    mean_tile = tl.dot(p.to(values.mean.dtype), values.mean, input_precision="ieee") * inv_row_sum[:, None]
    store_tile(mean, mean_tile, seq, tokens, V_HEAD_DIM, BLOCK_DV)
    cov_tile = tl.dot((p * p).to(values.cov.dtype), values.cov, input_precision="ieee")
    store_tile(cov, cov_tile * (inv_row_sum * inv_row_sum)[:, None], seq, tokens, V_HEAD_DIM, BLOCK_DV)


@triton.jit
def store_mean_gradient(dx, x, centre, products, sums, problem, tokens, HEAD_DIM: tl.constexpr):
    """The gradient of x, a BHND of means, from that of its vectors, 2 scale (products - sums · vectors).

    x is loaded again: there are no registers to keep the vectors in.
    """
    x_tile = load_tile(x, problem, tokens, HEAD_DIM, products.shape[1])
    vectors = centred(x_tile.to(tl.float32), centre, x_tile.dtype)
    dvectors = 2 * problem.scale * (products - sums[:, None] * vectors)
    store_tile(dx, dvectors, problem.seq, tokens, HEAD_DIM, products.shape[1])


@triton.jit
def store_cov_gradient(dx, x, centre, products, sums, problem, tokens, HEAD_DIM: tl.constexpr, REFINED: tl.constexpr):
    """`store_mean_gradient` of covariances."""
    x_tile = load_tile(x, problem, tokens, HEAD_DIM, products.shape[1])
    std = standard_deviations(x_tile.to(tl.float32), REFINED, False)
    vectors = centred(std, centre, x_tile.dtype)
    dvectors = 2 * problem.scale * (products - sums[:, None] * vectors)
    values = standard_deviations_backward(dvectors, x_tile.to(tl.float32), REFINED, False)
    store_tile(dx, values, problem.seq, tokens, HEAD_DIM, products.shape[1])


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def wasserstein_attention_short_bwd_kernel(
    dmean,
    dcov,
    mean_q,
    cov_q,
    mean_k,
    cov_k,
    mean_v,
    cov_v,
    dmean_q,
    dcov_q,
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
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REFINED: tl.constexpr,
):
    """Program i: all tokens of batch-head i, at most BLOCK_N.

    q, k             as in the forward, p too, normalized
    dmean_v, dcov_v  = p.T @ dmean, (p * p).T @ dcov                         [BLOCK_N, Dv]
    dp               = dmean @ mean_v.T + 2 p * (dcov @ cov_v.T)             [BLOCK_N, BLOCK_N]
    ds               = p * (dp - rowsum(p * dp))
    dq, dk           = 2 scale * (ds @ k - rowsum(ds) q), 2 scale * (ds.T @ q - colsum(ds) k)

    The first eight are BHND; the gradients are contiguous.
    """
    bh = tl.program_id(0)
    seq = sequence_of(bh, num_heads, N, lengths)
    problem = Problem(seq, bh, num_heads, causal, scale)
    tokens = tl.arange(0, BLOCK_N)
    queries = load_gaussians(mean_q, cov_q, problem, tokens, HEAD_DIM, BLOCK_D)
    keys = load_gaussians(mean_k, cov_k, problem, tokens, HEAD_DIM, BLOCK_D)
    values = load_gaussians(mean_v, cov_v, problem, tokens, V_HEAD_DIM, BLOCK_DV)
    dtype: tl.constexpr = values.mean.dtype
    centre = centre_of(keys, seq, REFINED)
    q, k = vectors_of(queries, centre, REFINED), vectors_of(keys, centre, REFINED)
    p, inv_row_sum = exp_of_distances(q, k, tokens, problem)
    p *= tl.where(tokens < seq.length, inv_row_sum, 0.0)[:, None]
    p_dropped = p
    if dropout_seed is not None:
        p_dropped *= dropout_weights(tl.load(dropout_seed), bh, PER_TOKEN, tokens, 0, dropout_threshold, BLOCK_N)
    dout = load_gaussians(dmean, dcov, problem, tokens, V_HEAD_DIM, BLOCK_DV)
    dv = tl.dot(tl.trans(p_dropped.to(dtype)), dout.mean, input_precision="ieee")
    store_tile(dmean_v, dv, seq, tokens, V_HEAD_DIM, BLOCK_DV)
    dv = tl.dot(tl.trans((p_dropped * p_dropped).to(dtype)), dout.cov, input_precision="ieee")
    store_tile(dcov_v, dv, seq, tokens, V_HEAD_DIM, BLOCK_DV)
    dp = 2 * p_dropped * tl.dot(dout.cov, tl.trans(values.cov), input_precision="ieee")
    dp = tl.dot(dout.mean, tl.trans(values.mean), dp, input_precision="ieee")
    if dropout_seed is not None:  # p * keep is p_dropped
        dp *= p_dropped
        ds = (dp - p * tl.sum(dp, 1)[:, None]).to(dtype)
    else:
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(dtype)
    sums = tl.sum(ds.to(tl.float32), 1)
    products = tl.dot(ds, k.mean, input_precision="ieee")
    store_mean_gradient(dmean_q, mean_q, centre.mean, products, sums, problem, tokens, HEAD_DIM)
    products = tl.dot(ds, k.std, input_precision="ieee")
    store_cov_gradient(dcov_q, cov_q, centre.std, products, sums, problem, tokens, HEAD_DIM, REFINED)
    sums = tl.sum(ds.to(tl.float32), 0)
    products = tl.dot(tl.trans(ds), q.mean, input_precision="ieee")
    store_mean_gradient(dmean_k, mean_k, centre.mean, products, sums, problem, tokens, HEAD_DIM)
    products = tl.dot(tl.trans(ds), q.std, input_precision="ieee")
    store_cov_gradient(dcov_k, cov_k, centre.std, products, sums, problem, tokens, HEAD_DIM, REFINED)


def constants_of(inputs: Sequence[Tensor], options: WassersteinAttentionOptions, dropout: Dropout) -> ShortConstants:
    mean_q, mean_v = inputs[0], inputs[4]
    sizes = host_block_width(longest_of(mean_q, options.max_seqlen)), mean_q.shape[-1], mean_v.shape[-1]
    return short_constants(*sizes, options.refined, dropout.seed is not None, architecture_of(mean_q))


def launch_wasserstein_attention_short_fwd(
    inputs: Sequence[Tensor],
    mean: Tensor,
    cov: Tensor,
    lengths: Lengths,
    options: WassersteinAttentionOptions,
    *,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """Write mean = P μ_v and cov = (P∘P) Σ_v, contiguous, of mean_q, cov_q, mean_k, cov_k, mean_v, cov_v; zeros at
    padding."""
    B, H, N, _ = sizes = sizes_of(inputs[0], lengths)
    if B * H * N == 0:
        return
    launch(
        wasserstein_attention_short_fwd_kernel,
        (B * H,),
        *[bhnd(x, lengths.cu_seqlens) for x in inputs],
        *(mean, cov, lengths, dropout.seed, *scalars_of(sizes, options, dropout)),
        **constants_of(inputs, options, dropout).fwd,
    )


def launch_wasserstein_attention_short_bwd(
    dmean: Tensor,
    dcov: Tensor,
    inputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    lengths: Lengths,
    options: WassersteinAttentionOptions,
    *,
    dropout: Dropout = NO_DROPOUT,
) -> None:
    """Write `gradients`, contiguous, those of `inputs`; zeros at padding."""
    B, H, N, _ = sizes = sizes_of(inputs[0], lengths)
    if B * H * N == 0:
        return
    launch(
        wasserstein_attention_short_bwd_kernel,
        (B * H,),
        *[bhnd(x, lengths.cu_seqlens) for x in (dmean, dcov, *inputs)],
        *(*gradients, lengths, dropout.seed, *scalars_of(sizes, options, dropout)),
        **constants_of(inputs, options, dropout).bwd,
    )

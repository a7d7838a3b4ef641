"""wasserstein_attention by Triton kernels (CUDA, or the interpreter)."""

import torch
from torch import Tensor

from recattn.ops._plans import replayed
from recattn.ops._support import contiguous, launched_dropout, triton_kernels


@replayed
def wasserstein_attention_fwd(
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, seq_lens, dropout_seed, options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean and cov; for the backward the vectors [2, B, H, N, 2D], and row_max and row_sum [2, B, H, N].

    The backward of short sequences needs neither of the latter: they are empty.
    """
    kernels = triton_kernels("wasserstein_attention")
    *sizes, head_dim = mean_q.shape
    mean, cov = mean_v.new_empty(mean_v.shape), cov_v.new_empty(cov_v.shape)
    seq_lens, dropout = contiguous(seq_lens), launched_dropout(dropout_seed, options.dropout_p)
    if kernels.is_short(mean_q, mean_v, options.refined or dropout.seed is not None):
        inputs = (mean_q, cov_q, mean_k, cov_k, mean_v, cov_v)
        kernels.launch_wasserstein_attention_short_fwd(inputs, mean, cov, seq_lens, options, dropout=dropout)
        return mean, cov, mean_q.new_empty(0), mean_q.new_empty(0, dtype=torch.float32)
    vectors, row_stats = mean_q.new_empty(2, *sizes, 2 * head_dim), mean_q.new_empty(2, *sizes, dtype=torch.float32)
    inputs = (mean_q, cov_q, mean_k, cov_k, mean_v.contiguous(), cov_v.contiguous())
    forward = kernels.Forward(*inputs, mean, cov, vectors, row_stats)
    kernels.launch_wasserstein_attention_vectors(forward, seq_lens, options)
    kernels.launch_wasserstein_attention_fwd(forward, seq_lens, options, dropout=dropout)
    return mean, cov, vectors, row_stats


@replayed
def wasserstein_attention_bwd(
    dmean,
    dcov,
    mean,
    cov,
    vectors,
    row_stats,
    mean_q,
    cov_q,
    mean_k,
    cov_k,
    mean_v,
    cov_v,
    seq_lens,
    dropout_seed,
    options,
) -> tuple[Tensor, ...]:
    """dmean_q, dcov_q, dmean_k, dcov_k, dmean_v, dcov_v."""
    kernels = triton_kernels("wasserstein_attention")
    inputs = (mean_q, cov_q, mean_k, cov_k, mean_v, cov_v)
    gradients = _empty_gradients(inputs)
    seq_lens, dropout = contiguous(seq_lens), launched_dropout(dropout_seed, options.dropout_p)
    if kernels.is_short(mean_q, mean_v, options.refined or dropout.seed is not None):
        kernels.launch_wasserstein_attention_short_bwd(
            dmean, dcov, inputs, gradients, seq_lens, options, dropout=dropout
        )
        return gradients
    inputs = (*inputs[:4], mean_v.contiguous(), cov_v.contiguous())
    forward = kernels.Forward(*inputs, mean, cov, vectors, row_stats)
    douts = dmean.contiguous(), dcov.contiguous()
    kernels.launch_wasserstein_attention_bwd(forward, *douts, gradients, seq_lens, options, dropout=dropout)
    return gradients


@replayed
def wasserstein_factors_fwd(mean_q, cov_q, mean_k, cov_k, seq_lens, left_padded) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are -‖q - k‖² of the vectors q and k."""
    kernels = triton_kernels("wasserstein_attention")
    *sizes, head_dim = mean_q.shape
    width = kernels.factors_width(head_dim, mean_q.dtype)
    queries, keys = mean_q.new_empty(*sizes, width), mean_q.new_empty(*sizes, width)
    gaussians = (mean_q, cov_q, mean_k, cov_k)
    kernels.launch_wasserstein_factors_fwd(gaussians, queries, keys, contiguous(seq_lens), left_padded)
    return queries, keys


@replayed
def wasserstein_factors_bwd(
    dqueries, dkeys, queries, keys, mean_q, cov_q, mean_k, cov_k, seq_lens, left_padded
) -> tuple[Tensor, ...]:
    """dmean_q, dcov_q, dmean_k, dcov_k."""
    gradients = _empty_gradients((mean_q, cov_q, mean_k, cov_k))
    tensors = (dqueries.contiguous(), dkeys.contiguous(), queries, keys, cov_q, cov_k)
    triton_kernels("wasserstein_attention").launch_wasserstein_factors_bwd(
        *tensors, gradients, contiguous(seq_lens), left_padded
    )
    return gradients


def _empty_gradients(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Contiguous."""
    return tuple([torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape) for x in inputs])

"""wasserstein_attention by Triton kernels (CUDA, or the interpreter)."""

import torch
from torch import Tensor

from recattn._options import WassersteinAttentionOptions
from recattn.ops._plans import replayed
from recattn.ops._support import launched_dropout, triton_kernels


def wasserstein_attention_fwd(
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, seq_lens, seq_starts, cu_seqlens, dropout_seed, options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean and cov; for the backward the vectors [2, B, H, N, 2D], and row_max and row_sum [2, B, H, N].

    Packed, [B, H, N] is [T, H]. The backward of short sequences needs neither of the latter: they are empty.
    """
    inputs, lengths = (mean_q, cov_q, mean_k, cov_k, mean_v, cov_v), (seq_lens, seq_starts, cu_seqlens)
    return _fwd(inputs, lengths, dropout_seed, _with_bound(options))


@replayed
def _fwd(inputs, lengths, dropout_seed, options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = triton_kernels("wasserstein_attention")
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v = inputs
    *sizes, head_dim = mean_q.shape
    mean, cov = mean_v.new_empty(mean_v.shape), cov_v.new_empty(cov_v.shape)
    lengths, dropout = kernels.as_lengths(*lengths), launched_dropout(dropout_seed, options.dropout_p)
    if kernels.is_short(mean_q, mean_v, options.max_seqlen, options.refined or dropout.seed is not None):
        kernels.launch_wasserstein_attention_short_fwd(inputs, mean, cov, lengths, options, dropout=dropout)
        return mean, cov, mean_q.new_empty(0), mean_q.new_empty(0, dtype=torch.float32)
    vectors, row_stats = mean_q.new_empty(2, *sizes, 2 * head_dim), mean_q.new_empty(2, *sizes, dtype=torch.float32)
    inputs = (mean_q, cov_q, mean_k, cov_k, mean_v.contiguous(), cov_v.contiguous())
    forward = kernels.Forward(*inputs, mean, cov, vectors, row_stats)
    kernels.launch_wasserstein_attention_vectors(forward, lengths, options)
    kernels.launch_wasserstein_attention_fwd(forward, lengths, options, dropout=dropout)
    return mean, cov, vectors, row_stats


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
    *masks_and_options,
) -> tuple[Tensor, ...]:
    """dmean_q, dcov_q, dmean_k, dcov_k, dmean_v, dcov_v."""
    *lengths, dropout_seed, options = masks_and_options
    inputs, saved = (mean_q, cov_q, mean_k, cov_k, mean_v, cov_v), (mean, cov, vectors, row_stats)
    return _bwd(dmean, dcov, inputs, saved, tuple(lengths), dropout_seed, _with_bound(options))


@replayed
def _bwd(dmean, dcov, inputs, saved, lengths, dropout_seed, options) -> tuple[Tensor, ...]:
    kernels = triton_kernels("wasserstein_attention")
    mean_q, _, _, _, mean_v, cov_v = inputs
    gradients = _empty_gradients(inputs)
    lengths, dropout = kernels.as_lengths(*lengths), launched_dropout(dropout_seed, options.dropout_p)
    if kernels.is_short(mean_q, mean_v, options.max_seqlen, options.refined or dropout.seed is not None):
        kernels.launch_wasserstein_attention_short_bwd(
            dmean, dcov, inputs, gradients, lengths, options, dropout=dropout
        )
        return gradients
    forward = kernels.Forward(*inputs[:4], mean_v.contiguous(), cov_v.contiguous(), *saved)
    douts = dmean.contiguous(), dcov.contiguous()
    kernels.launch_wasserstein_attention_bwd(forward, *douts, gradients, lengths, options, dropout=dropout)
    return gradients


def _with_bound(options: WassersteinAttentionOptions) -> WassersteinAttentionOptions:
    """The options of a launch: a bound of packed lengths as a power of two, so that few values are recorded."""
    if options.max_seqlen is None:
        return options
    return options._replace(max_seqlen=1 << max(options.max_seqlen - 1, 0).bit_length())


@replayed
def wasserstein_factors_fwd(mean_q, cov_q, mean_k, cov_k, seq_lens, seq_starts, cu_seqlens) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are -‖q - k‖² of the vectors q and k."""
    kernels = triton_kernels("wasserstein_attention")
    *sizes, head_dim = mean_q.shape
    width = kernels.factors_width(head_dim, mean_q.dtype)
    queries, keys = mean_q.new_empty(*sizes, width), mean_q.new_empty(*sizes, width)
    lengths = kernels.as_lengths(seq_lens, seq_starts, cu_seqlens)
    kernels.launch_wasserstein_factors_fwd((mean_q, cov_q, mean_k, cov_k), queries, keys, lengths)
    return queries, keys


@replayed
def wasserstein_factors_bwd(
    dqueries, dkeys, queries, keys, mean_q, cov_q, mean_k, cov_k, seq_lens, seq_starts, cu_seqlens
) -> tuple[Tensor, ...]:
    """dmean_q, dcov_q, dmean_k, dcov_k."""
    kernels = triton_kernels("wasserstein_attention")
    gradients = _empty_gradients((mean_q, cov_q, mean_k, cov_k))
    tensors = (dqueries.contiguous(), dkeys.contiguous(), queries, keys, cov_q, cov_k)
    lengths = kernels.as_lengths(seq_lens, seq_starts, cu_seqlens)
    kernels.launch_wasserstein_factors_bwd(*tensors, gradients, lengths)
    return gradients


def _empty_gradients(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Contiguous."""
    return tuple([torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape) for x in inputs])

"""wasserstein_attention by Triton kernels (CUDA, or the interpreter)."""

import torch
from torch import Tensor

from recattn.ops._support import contiguous, launched_dropout
from recattn.ops.refined_attention.chunked import new_output


def wasserstein_attention_fwd(
    query, key, mean_v, cov_v, seq_lens, dropout_seed, options
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, cov, and row_max and row_sum of each softmax [2, B, H, N]."""
    from recattn.triton_kernels.wasserstein_attention.forward import Forward, launch_wasserstein_attention_fwd

    mean, cov = (new_output(x, seq_lens) for x in (mean_v, cov_v))
    row_stats = new_output(query.new_empty(2, *query.shape[:3], dtype=torch.float32), seq_lens)
    launch_wasserstein_attention_fwd(
        Forward(*(x.contiguous() for x in (query, key, mean_v, cov_v)), mean, cov, *row_stats),
        contiguous(seq_lens),
        options,
        dropout=launched_dropout(dropout_seed, options.dropout_p),
    )
    return mean, cov, row_stats


def wasserstein_attention_bwd(
    dmean, dcov, mean, cov, row_stats, query, key, mean_v, cov_v, seq_lens, dropout_seed, options
) -> tuple[Tensor, ...]:
    """dquery, dkey, dmean_v, dcov_v."""
    from recattn.triton_kernels.wasserstein_attention.backward import Forward, launch_wasserstein_attention_bwd

    gradients = tuple(new_output(x, seq_lens) for x in (query, key, mean_v, cov_v))
    launch_wasserstein_attention_bwd(
        Forward(*(x.contiguous() for x in (query, key, mean_v, cov_v)), mean, cov, *row_stats),
        dmean.contiguous(),
        dcov.contiguous(),
        *gradients,
        contiguous(seq_lens),
        options,
        dropout=launched_dropout(dropout_seed, options.dropout_p),
    )
    return gradients

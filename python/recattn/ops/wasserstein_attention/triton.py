"""wasserstein_attention by Triton kernels (CUDA, or the interpreter)."""

import torch
from torch import Tensor

from recattn.ops._support import launched_dropout
from recattn.ops.refined_attention.chunked import new_output


def wasserstein_attention_fwd(
    query, key, mean_v, cov_v, seq_lens, dropout_seed, causal, left_padded, scale, dropout_p
) -> tuple[Tensor, Tensor, Tensor]:
    """mean, cov, and of each row's softmax the shift and the mass [2, B, H, N]."""
    from recattn.triton_kernels.wasserstein_attention import launch_wasserstein_attention_fwd

    mean, cov = (new_output(x, seq_lens) for x in (mean_v, cov_v))
    statistics = new_output(query.new_empty(2, *query.shape[:3], dtype=torch.float32), seq_lens)
    launch_wasserstein_attention_fwd(
        *(x.contiguous() for x in (query, key, mean_v, cov_v)),
        *(mean, cov, *statistics),
        None if seq_lens is None else seq_lens.contiguous(),
        launched_dropout(dropout_seed, dropout_p),
        causal=causal,
        left_padded=left_padded,
        scale=scale,
    )
    return mean, cov, statistics


def wasserstein_attention_bwd(
    dmean,
    dcov,
    mean,
    cov,
    statistics,
    query,
    key,
    mean_v,
    cov_v,
    seq_lens,
    dropout_seed,
    causal,
    left_padded,
    scale,
    dropout_p,
) -> tuple[Tensor, ...]:
    """dquery, dkey, dmean_v, dcov_v."""
    from recattn.triton_kernels.wasserstein_attention import launch_wasserstein_attention_bwd

    gradients = tuple(new_output(x, seq_lens) for x in (query, key, mean_v, cov_v))
    launch_wasserstein_attention_bwd(
        *(x.contiguous() for x in (query, key, mean_v, cov_v)),
        *(mean, cov, *statistics),
        *(dmean.contiguous(), dcov.contiguous(), *gradients),
        None if seq_lens is None else seq_lens.contiguous(),
        launched_dropout(dropout_seed, dropout_p),
        causal=causal,
        left_padded=left_padded,
        scale=scale,
    )
    return gradients

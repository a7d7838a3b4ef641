"""Attention between Gaussians, as STOSA has it (Fan et al., Sequential Recommendation via Stochastic Self-Attention,
WWW 2022)."""

import math

import torch
from torch import Tensor

from recattn.reference.sink_attention import softmax_or_zeros, valid_tokens, visible_pairs


def wasserstein_attention(
    mean_q: Tensor,
    cov_q: Tensor,
    mean_k: Tensor,
    cov_k: Tensor,
    mean_v: Tensor,
    cov_v: Tensor,
    *,
    causal: bool = True,
    seq_lens: Tensor | None = None,
    padding_side: str = "right",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention between Gaussians with diagonal covariances:

        W²(i, j) = ‖μ_i − μ_j‖² + ‖√Σ_i − √Σ_j‖²
        P = softmax(mask(−scale · W²))        mean = P μ_v        covariance = (P∘P) Σ_v

    W² is the squared 2-Wasserstein distance; STOSA's code, whose formula this is, calls it the 2-Wasserstein distance
    and uses it without the root. It is a dot product plus a row and a column term,

        W²(i, j) = ‖[μ_i, √Σ_i]‖² + ‖[μ_j, √Σ_j]‖² − 2 [μ_i, √Σ_i]·[μ_j, √Σ_j],

    and the softmax drops the row's.

    Args:
        mean_q, cov_q, mean_k, cov_k: [B, H, N, D], one floating dtype. A covariance is its diagonal, never negative;
            below the smallest normal number it counts as that number and takes no gradient.
        mean_v, cov_v: [B, H, N, Dv], the same dtype.
        causal: query i sees the keys j ≤ i.
        seq_lens: [B] integer, the valid tokens of each sequence.
        padding_side: "right", or "left" (valid tokens sit at the end).
        scale: of the distances, 1/√D by default.

    Returns:
        Mean and covariance, [B, H, N, Dv]; zero at padding.
    """
    scale = 1 / math.sqrt(mean_q.shape[3]) if scale is None else scale
    valid = valid_tokens(mean_q.shape[0], mean_q.shape[2], seq_lens, padding_side, mean_q.device)  # [B, N]
    tensors = mean_q, cov_q, mean_k, cov_k, mean_v, cov_v
    if seq_lens is not None:  # whatever padding holds, NaN included, must not reach a product
        tensors = (x.masked_fill(~valid[:, None, :, None], 0) for x in tensors)
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v = tensors
    std_q, std_k = (cov.clamp(min=torch.finfo(cov.dtype).tiny).sqrt() for cov in (cov_q, cov_k))
    scores = -scale * squared_wasserstein_distance(mean_q, std_q, mean_k, std_k)  # [B, H, N, N]
    p = softmax_or_zeros(scores.masked_fill(~visible_pairs(valid, causal), -math.inf))
    return p @ mean_v, p.square() @ cov_v


def squared_wasserstein_distance(mean_q: Tensor, std_q: Tensor, mean_k: Tensor, std_k: Tensor) -> Tensor:
    """W² of every query and key from their means and standard deviations: [..., N, D] -> [..., N, N]."""
    query, key = torch.cat([mean_q, std_q], dim=-1), torch.cat([mean_k, std_k], dim=-1)
    row, column = query.square().sum(-1).unsqueeze(-1), key.square().sum(-1).unsqueeze(-2)
    return row + column - 2 * (query @ key.mT)

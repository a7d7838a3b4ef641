"""Attention between Gaussians by the definition of their distance; kernels are compared with it.

Each distance is a sum of squared differences, [B, H, N, N, D] in memory. The expanded form ‖q‖² + ‖k‖² - 2 q·k loses
digits if the vectors share an offset, and a bound derived from it would let kernels lose them too.
"""

import math

import torch
from torch import Tensor


def wasserstein_by_differences(
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, w_q=None, w_k=None, *, source="logits", scale=None, **mask
) -> tuple[Tensor, Tensor]:
    """`recattn.wasserstein_attention`"""
    tokens, seen = mask_of(mean_q, **mask)
    tensors = mean_q, cov_q, mean_k, cov_k, mean_v, cov_v
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v = (x.where(tokens, x.new_ones(())) for x in tensors)
    std_q, std_k = (cov.clamp(min=torch.finfo(cov.dtype).tiny).sqrt() for cov in (cov_q, cov_k))
    scale = mean_q.shape[-1] ** -0.5 if scale is None else scale
    scores = -scale * squared_distances(mean_q, std_q, mean_k, std_k)
    p = softmax(scores if w_q is None else refined(scores, w_q, w_k, seen, source), seen)
    return p @ mean_v, p.square() @ cov_v


def stochastic_by_differences(q, k, v, w_q, w_k, *, source="logits", scale=None, **mask) -> Tensor:
    """`recattn.refined_attention` with mechanism="stochastic"."""
    tokens, seen = mask_of(q, **mask)
    q, k, v = (x.where(tokens, x.new_ones(())) for x in (q, k, v))
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * (q @ k.mT)
    return softmax(refined(scores, w_q, w_k, seen, source), seen) @ v


def mask_of(x, causal=True, seq_lens=None, padding_side="right", seq_starts=None) -> tuple[Tensor, Tensor]:
    """For x [B, H, N, D]: the valid tokens [B, 1, N, 1], and the visible keys [B, 1, N, N]."""
    b, _, n, _ = x.shape
    lengths = torch.full((b,), n) if seq_lens is None else seq_lens.cpu()
    positions = torch.arange(n) if padding_side == "right" else torch.arange(n).flip(0)
    if seq_starts is not None:
        positions = (positions - seq_starts.cpu()[:, None]) % n  # those before the first come last
    tokens = (positions < lengths.view(-1, 1))[:, None, :, None].to(x.device)
    seen = tokens & tokens.mT
    return tokens, seen.tril() if causal else seen


def squared_distances(mean_q, std_q, mean_k, std_k) -> Tensor:
    return sum((q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1) for q, k in ((mean_q, mean_k), (std_q, std_k)))


def refined(scores, w_q, w_k, seen, source) -> Tensor:
    """M of the stochastic mechanism, from the scores that A consists of."""
    n, rank = scores.shape[-1], w_q.shape[-1] // 2
    a = scores * seen if source == "logits" else softmax(scores, seen)
    (mean_q, x_q), (mean_k, x_k) = ((a @ w[..., :n, :]).chunk(2, dim=-1) for w in (w_q, w_k))
    return -squared_distances(mean_q, deviation(x_q), mean_k, deviation(x_k)) / rank**0.5


def deviation(x) -> Tensor:
    """√(elu(x) + 1), which is exp(x/2) below 0."""
    return torch.where(x > 0, (x.clamp(min=0) + 1).sqrt(), (x.clamp(max=0) / 2).exp())


def softmax(scores, seen) -> Tensor:
    """Over the visible keys of a row; zeros if it has none."""
    rows = seen.any(-1, keepdim=True)
    return scores.masked_fill(~seen & rows, -math.inf).softmax(-1) * rows

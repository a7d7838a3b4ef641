"""Attention between Gaussians (STOSA, WWW 2022), and its refinement (AWRSR, arXiv 2410.21048).

W²_ij = ‖mean_q_i - mean_k_j‖² + ‖√cov_q_i - √cov_k_j‖²
p = softmax(-scale · W² + mask)
out_mean = p mean_v,   out_cov = (p∘p) cov_v
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn._typing import PaddingSide, Source
from recattn.reference.sink_attention import softmax_or_zeros, valid_tokens, visible_pairs, window_starts


def wasserstein_attention(
    mean_q: Tensor, cov_q: Tensor, mean_k: Tensor, cov_k: Tensor, mean_v: Tensor, cov_v: Tensor, *,
    w_q: Tensor | None = None, w_k: Tensor | None = None, source: Source = "logits", causal: bool = True,
    seq_lens: Tensor | None = None, seq_starts: Tensor | None = None, padding_side: PaddingSide = "right",
    cu_seqlens: Tensor | None = None, dropout_p: float = 0.0, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(p mean_v, (p∘p) cov_v) with p = softmax(-scale · W² + mask), or p refined by w_q and w_k.

    Shapes and arguments: `recattn.wasserstein_attention`.
    """
    scale = 1 / math.sqrt(mean_q.shape[-1]) if scale is None else scale
    tensors = mean_q, cov_q, mean_k, cov_k, mean_v, cov_v
    if cu_seqlens is not None:
        options = {"w_q": w_q, "w_k": w_k, "source": source, "causal": causal, "dropout_p": dropout_p, "scale": scale}
        mean, cov = each_sequence(partial(wasserstein_attention, **options), tensors, cu_seqlens)
        return mean, cov
    n = mean_q.shape[2]
    seq_starts = window_starts(padding_side, n, seq_lens, seq_starts)
    valid = valid_tokens(mean_q.shape[0], n, seq_lens, seq_starts, mean_q.device)  # [B, N]
    if seq_lens is not None:  # padding may hold anything, even NaN: keep it out of the products
        tensors = (x.masked_fill(~valid[:, None, :, None], 0) for x in tensors)
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v = tensors
    hidden = ~visible_pairs(valid, causal)  # [B, 1, N, N]

    std_q, std_k = (cov.clamp(min=torch.finfo(cov.dtype).tiny).sqrt() for cov in (cov_q, cov_k))
    scores = -scale * squared_wasserstein_distance(mean_q, std_q, mean_k, std_k, valid)  # [B, H, N, N]
    if w_q is not None and w_k is not None:
        a = attention_matrix(scores, hidden, source)
        (mean_q, std_q), (mean_k, std_k) = gaussians(a @ w_q[..., :n, :]), gaussians(a @ w_k[..., :n, :])
        scores = -squared_wasserstein_distance(mean_q, std_q, mean_k, std_k, valid) / math.sqrt(mean_q.shape[-1])
    p = F.dropout(masked_softmax(scores, hidden), dropout_p)
    return p @ mean_v, p.square() @ cov_v


def each_sequence(function: Callable, tensors: tuple[Tensor, ...], cu_seqlens: Tensor) -> tuple[Tensor, ...]:
    """The packed results of a function of [1, H, n, D], called for each sequence of packed tensors [T, H, D]."""
    bounds = list(pairwise(cu_seqlens.tolist())) or [(0, 0)]
    outs = [function(*(x[start:stop].transpose(0, 1).unsqueeze(0) for x in tensors)) for start, stop in bounds]
    return tuple(torch.cat([out[0].transpose(0, 1) for out in parts]) for parts in zip(*outs, strict=True))


def squared_wasserstein_distance(mean_q: Tensor, std_q: Tensor, mean_k: Tensor, std_k: Tensor, valid: Tensor) -> Tensor:
    """‖mean_q - mean_k‖² + ‖std_q - std_k‖² of every query and key: [B, H, N, D] -> [B, H, N, N]."""
    padding = ~valid[:, None, :, None]
    query, key = (torch.cat(x, dim=-1).masked_fill(padding, 0) for x in ((mean_q, std_q), (mean_k, std_k)))
    centre_(query, key, valid.sum(-1))
    row, column = query.square().sum(-1).unsqueeze(-1), key.square().sum(-1).unsqueeze(-2)
    return row + column - 2 * (query @ key.mT)


def attention_matrix(scores: Tensor, hidden: Tensor, source: Source) -> Tensor:
    """A: the scores (source="logits") or their softmax (source="weights"), 0 where hidden."""
    return scores.masked_fill(hidden, 0) if source == "logits" else masked_softmax(scores, hidden)


def centre_(query: Tensor, key: Tensor, lengths: Tensor | None) -> Tensor:
    """Subtract the mean key from query and key [B, ..., N, D], in place. Returns the mean [B, ..., 1, D].

    Distances do not change, so no gradient flows through the mean. Without this, ‖q‖² + ‖k‖² - 2 q·k cancels where all
    vectors share a large offset; the mean makes Σ‖k‖² smallest. `lengths` [B] are the numbers of tokens (None: N); keys
    must be zero at padding.
    """
    count = key.shape[-2] if lengths is None else lengths.clamp(min=1).view(-1, *[1] * (key.dim() - 1))
    total = key.detach().sum(-2, keepdim=True, dtype=torch.promote_types(key.dtype, torch.float32))
    # Any finite offset is right. NaN or infinity would carry over from one key to queries that do not see it.
    mean = (total / count).to(key.dtype).nan_to_num_(0, 0, 0)
    query -= mean
    key -= mean
    return mean


def masked_softmax(scores: Tensor, hidden: Tensor) -> Tensor:
    """softmax(scores) over the last axis, 0 where hidden."""
    return softmax_or_zeros(scores.masked_fill(hidden, -math.inf))


def gaussians(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split x into (mean, std = √(elu(x) + 1)). Written so that the gradient is finite where elu(x) rounds to -1."""
    mean, x = x.chunk(2, dim=-1)
    return mean, torch.where(x > 0, (1 + x.clamp(min=0)).sqrt(), (x.clamp(max=0) / 2).exp())

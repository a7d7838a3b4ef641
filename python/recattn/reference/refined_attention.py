"""Attention whose weight matrix is refined by a second attention over it (AWRSR, arXiv 2410.21048).

A = scale · q kᵀ, 0 where masked (source="logits"), or softmax(scale · q kᵀ + mask) (source="weights")
queries, keys = A W_q, A W_k
simple      M = queries keysᵀ / √R
value       M = softmax(queries keysᵀ / √R + mask) (A W_v)
additive    M = A + M of "value"
stochastic  M = -W₂²(queries, keys) / √R, each row a Gaussian
out = softmax(M + mask) v
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn._typing import Mechanism, PaddingSide, Source
from recattn.reference.sink_attention import valid_tokens, visible_pairs, window_starts
from recattn.reference.wasserstein_attention import (
    attention_matrix,
    gaussians,
    masked_softmax,
    squared_wasserstein_distance,
)


def refined_attention(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor | None = None, *,
    mechanism: Mechanism = "simple", source: Source = "logits", causal: bool = True, seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None, padding_side: PaddingSide = "right", cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """out = softmax(M + mask) v, with M refined from A.

    M, shapes and arguments: `recattn.refined_attention`.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if cu_seqlens is not None:
        options = {"mechanism": mechanism, "source": source, "causal": causal, "dropout_p": dropout_p, "scale": scale}
        return _packed(q, k, v, (w_q, w_k, w_v), cu_seqlens, options)
    n = q.shape[2]
    seq_starts = window_starts(padding_side, n, seq_lens, seq_starts)
    valid = valid_tokens(q.shape[0], n, seq_lens, seq_starts, q.device)  # [B, N]
    if seq_lens is not None:  # padding may hold anything, even NaN: keep it out of the products
        q, k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (q, k, v))
    hidden = ~visible_pairs(valid, causal)  # [B, 1, N, N]

    qk = scale * (q @ k.mT)  # [B, H, N, N]
    a = attention_matrix(qk, hidden, source)
    queries, keys = a @ w_q[..., :n, :], a @ w_k[..., :n, :]  # [B, H, N, R]
    if mechanism == "stochastic":
        (mean_q, std_q), (mean_k, std_k) = gaussians(queries), gaussians(keys)
        m = -squared_wasserstein_distance(mean_q, std_q, mean_k, std_k, valid) / math.sqrt(mean_q.shape[-1])
    else:
        m = queries @ keys.mT / math.sqrt(queries.shape[-1])
    if w_v is not None:  # "value" and "additive"
        m = masked_softmax(m, hidden) @ (a @ w_v[..., :n, :n])
    if mechanism == "additive":
        m = a + m
    p = masked_softmax(m, hidden)
    return F.dropout(p, dropout_p) @ v


def _packed(
    q: Tensor, k: Tensor, v: Tensor, matrices: tuple[Tensor | None, ...], cu_seqlens: Tensor, options: dict
) -> Tensor:
    """Packed input [T, H, D]: one sequence at a time."""
    outs = [v[:0]]
    for start, stop in pairwise(cu_seqlens.tolist()):
        sequence = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        outs.append(refined_attention(*sequence, *matrices, **options)[0].transpose(0, 1))
    return torch.cat(outs)

"""The bias between sink tokens that `sink_attention` takes (CTR-Sink, arXiv 2508.03668)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn.reference.sink_attention import softmax_or_zeros, visible_pairs


def inter_sink_bias(
    q_s: Tensor,
    k_s: Tensor,
    *,
    sink_mask: Tensor | None = None,
    bias_scale: float | Tensor = 1.0,
    causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """B = bias_scale · mean over heads of dropout(softmax(scale · Q_s K_sᵀ + mask)); see `recattn.inter_sink_bias`."""
    scale = 1 / math.sqrt(q_s.shape[-1]) if scale is None else scale
    batch, _, sinks, _ = q_s.shape
    valid = torch.ones(batch, sinks, dtype=torch.bool, device=q_s.device) if sink_mask is None else sink_mask
    visible = visible_pairs(valid, causal)  # [B, 1, M, M]
    # Whatever masked sinks hold, NaN included, must not reach a product.
    q_s, k_s = (x.masked_fill(~valid[:, None, :, None], 0) for x in (q_s, k_s))
    scores = (scale * (q_s @ k_s.mT)).to(torch.promote_types(q_s.dtype, torch.float32))  # [B, H, M, M]
    weights = softmax_or_zeros(scores.masked_fill(~visible, -math.inf))
    bias = bias_scale * F.dropout(weights, dropout_p).mean(dim=1, keepdim=True)
    return bias.masked_fill(~visible, 0)

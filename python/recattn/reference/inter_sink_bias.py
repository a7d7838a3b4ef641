"""The bias between sink tokens for `sink_attention` (CTR-Sink, arXiv 2508.03668).

bias = bias_scale · mean over heads of dropout(softmax(scale · q_s k_sᵀ + mask))
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn.reference.sink_attention import softmax_or_zeros, visible_pairs


def inter_sink_bias(
    q_s: Tensor, k_s: Tensor, *, sink_mask: Tensor | None = None, bias_scale: float | Tensor = 1.0,
    causal: bool = False, dropout_p: float = 0.0, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """bias [B, 1, M, M] = bias_scale · mean over heads of dropout(softmax(scale · q_s k_sᵀ + mask)).

    Shapes and arguments: `recattn.inter_sink_bias`.
    """
    scale = 1 / math.sqrt(q_s.shape[-1]) if scale is None else scale
    batch, _, sinks, _ = q_s.shape
    valid = torch.ones(batch, sinks, dtype=torch.bool, device=q_s.device) if sink_mask is None else sink_mask
    visible = visible_pairs(valid, causal)  # [B, 1, M, M]
    # Masked sinks may hold anything, even NaN: keep it out of the products.
    q_s, k_s = (x.masked_fill(~valid[:, None, :, None], 0) for x in (q_s, k_s))
    qk = (scale * (q_s @ k_s.mT)).to(torch.promote_types(q_s.dtype, torch.float32))  # [B, H, M, M]
    p = softmax_or_zeros(qk.masked_fill(~visible, -math.inf))
    bias = bias_scale * F.dropout(p, dropout_p).mean(dim=1, keepdim=True)
    return bias.masked_fill(~visible, 0)

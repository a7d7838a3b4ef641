"""The attention function that transformers calls, registered as `NAME`."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn._check import expect
from recattn.functional import sink_attention
from recattn.reference.sink_attention import dense_bias, softmax_or_zeros

NAME = "recattn_sink"


class Sinks(NamedTuple):
    """The sinks and the padding of a batch, shared by all layers."""

    positions: Tensor | None  # [B, M]; None if no query is a sink
    valid: Tensor | None  # [B, M] bool
    seq_lens: Tensor | None = None  # [B]; None if nothing is padding
    seq_starts: Tensor | None = None  # [B]
    needs_mask: bool = False  # the lengths do not say all that the mask says


def sink_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sinks: Sinks | None = None,
    inter_sink_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function. With output_attentions it also returns the weights [B, H, Nq, Nk].

    query [B, H, Nq, D], key and value [B, Hkv, Nk, D] -> [B, Nq, H, D]. `s_aux` [H] are the `sink_logits` of
    `recattn.sink_attention`: a logit per head in the denominator of the softmax.
    """
    for name in ("softcap", "position_bias"):
        expect(kwargs.get(name) is None, name, "None: sink attention has no such term", type(kwargs.get(name)).__name__)
    return attend(
        query,
        key,
        value,
        attention_mask,
        sinks,
        inter_sink_bias,
        causal=module.is_causal if is_causal is None else is_causal,
        dropout=dropout,
        scaling=scaling,
        weights_wanted=output_attentions or getattr(module.config, "output_attentions", False),
        sink_logits=s_aux,
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    sinks: Sinks | None,
    inter_sink_bias: Tensor | None,
    *,
    causal: bool,
    dropout: float,
    scaling: float | None,
    weights_wanted: bool,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The output [B, Nq, H, D] by `recattn.sink_attention` where that serves; the weights need dense attention."""
    unmasked = attention_mask is None or (attention_mask.dim() == 2 and sinks is not None and not sinks.needs_mask)
    positions = None if sinks is None else sinks.positions
    if sinks is None or not unmasked or weights_wanted or query.shape[2] != key.shape[2]:
        bias = None
        if inter_sink_bias is not None and positions is not None:
            bias = _dense_bias(query, key, positions, inter_sink_bias)
        mask = _dense_mask(attention_mask, query.shape[2], key.shape[2], causal, query.device)
        return _dense_attention(query, key, value, mask, bias, sink_logits, dropout, scaling, weights_wanted)
    out = sink_attention(
        query,
        key,
        value,
        *((None, None) if inter_sink_bias is None else (positions, inter_sink_bias)),
        sink_logits=sink_logits,
        causal=causal,
        seq_lens=None if attention_mask is None else sinks.seq_lens,
        seq_starts=None if attention_mask is None else sinks.seq_starts,
        dropout_p=dropout,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def _dense_bias(query: Tensor, key: Tensor, positions: Tensor, inter_sink_bias: Tensor) -> Tensor | None:
    """[B, 1, Nq, Nk]. A static cache has more keys than queries: its unused slots after the prompt."""
    if positions.shape[1] == 0:
        return None
    bias = dense_bias(positions, inter_sink_bias, query.shape[2])
    return F.pad(bias, (0, key.shape[2] - query.shape[2]))


def _dense_mask(
    mask: Tensor | None, q_length: int, kv_length: int, causal: bool, device: torch.device
) -> Tensor | None:
    """[B, 1, Nq, Nk], bool (True: visible) or additive; None: everything is visible."""
    if mask is not None and mask.dim() == 4:
        return mask
    visible = None if mask is None else mask.bool()[:, None, None, :]
    if causal:
        past = torch.ones(q_length, kv_length, dtype=torch.bool, device=device).tril(kv_length - q_length)
        visible = past[None, None] if visible is None else visible & past
    return visible


def _dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    sink_logits: Tensor | None,
    dropout: float,
    scaling: float | None,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention with a dense mask and a dense bias: the output [B, Nq, H, D] and, if wanted, the weights."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    added = mask if bias is None else bias if mask is None else mask + bias
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    keys = key.shape[2]
    if sink_logits is not None:  # the logits are the scores of one more key, whose value is 0
        key, value = (F.pad(x, (0, 0, 0, 1)) for x in (key, value))
        shape = (query.shape[0], query.shape[1], query.shape[2])
        added = query.new_zeros(*shape, keys) if added is None else added.expand(*shape, keys)
        added = torch.cat([added, sink_logits.to(added.dtype)[:, None, None].expand(*shape, 1)], dim=-1)
    if not weights_wanted:
        added = None if added is None else added.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, added, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores if added is None else scores + added
    weights = F.dropout(softmax_or_zeros(scores), dropout).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights[..., :keys]

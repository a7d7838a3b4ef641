"""Softmax attention with a learned additive bias between sink tokens (CTR-Sink, arXiv 2508.03668).

out = softmax(scale · q kᵀ + mask + β) v
β_ij = inter_sink_bias[s(i), s(j)] where tokens i and j are both sinks, else 0
"""

import math
from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn._typing import PaddingSide


@overload
def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sink_positions: Tensor | None = None, inter_sink_bias: Tensor | None = None, *,
    sink_logits: Tensor | None = None, causal: bool = False, seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None, padding_side: PaddingSide = "right", cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip
@overload
def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sink_positions: Tensor | None = None, inter_sink_bias: Tensor | None = None, *,
    sink_logits: Tensor | None = None, causal: bool = False, seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None, padding_side: PaddingSide = "right", cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sink_positions: Tensor | None = None, inter_sink_bias: Tensor | None = None, *,
    sink_logits: Tensor | None = None, causal: bool = False, seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None, padding_side: PaddingSide = "right", cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def sink_attention(
    q: Tensor, k: Tensor, v: Tensor, sink_positions: Tensor | None = None, inter_sink_bias: Tensor | None = None, *,
    sink_logits: Tensor | None = None, causal: bool = False, seq_lens: Tensor | None = None,
    seq_starts: Tensor | None = None, padding_side: PaddingSide = "right", cu_seqlens: Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """out = softmax(scale · q kᵀ + mask + β) v, and lse = logsumexp of the same rows.

    Shapes and arguments: `recattn.sink_attention`.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if cu_seqlens is not None:
        out, lse = _packed(q, k, v, sink_positions, inter_sink_bias, sink_logits, causal, cu_seqlens, dropout_p, scale)
        return (out, lse) if return_lse else out

    seq_starts = window_starts(padding_side, q.shape[2], seq_lens, seq_starts)
    valid = valid_tokens(q.shape[0], q.shape[2], seq_lens, seq_starts, q.device)  # [B, N]
    if seq_lens is not None:  # padding may hold anything, even NaN: keep it out of the products
        q, k, v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))

    qk = scale * (q @ k.transpose(-2, -1))  # [B, Hq, N, N]
    if sink_positions is not None and inter_sink_bias is not None:
        qk = qk + dense_bias(sink_positions, inter_sink_bias, q.shape[2])
    qk = qk.masked_fill(~visible_pairs(valid, causal), -math.inf)
    if sink_logits is not None:
        column = sink_logits[:, None, None].to(qk.dtype).expand(*qk.shape[:3], 1)
        qk = torch.cat([qk, column.masked_fill(~valid[:, None, :, None], -math.inf)], dim=-1)
    p = softmax_or_zeros(qk)[..., : k.shape[2]]  # without the column of sink_logits
    out = F.dropout(p, dropout_p).to(v.dtype) @ v
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.logsumexp(qk.detach().to(lse_dtype), dim=-1)
    return (out, lse) if return_lse else out


def valid_tokens(
    batch: int, length: int, seq_lens: Tensor | None, seq_starts: Tensor | None, device: torch.device
) -> Tensor:
    """[B, N] bool: True at the tokens of each sequence, seq_starts[b] up to seq_starts[b] + seq_lens[b]."""
    if seq_lens is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    position = torch.arange(length, device=device)
    if seq_starts is None:
        return position < seq_lens[:, None]
    return (position >= seq_starts[:, None]) & (position < (seq_starts + seq_lens)[:, None])


def window_starts(
    padding_side: PaddingSide, length: int, seq_lens: Tensor | None, seq_starts: Tensor | None = None
) -> Tensor | None:
    """The seq_starts [B] of sequences that are padded to `length`; None: they begin at 0."""
    # rsub: the operator `length - seq_lens` costs several microseconds more.
    return torch.rsub(seq_lens, length) if padding_side == "left" and seq_lens is not None else seq_starts


def visible_pairs(valid: Tensor, causal: bool) -> Tensor:
    """[B, 1, N, N] bool: True where query i sees key j."""
    visible = valid[:, None, :, None] & valid[:, None, None, :]
    return visible.tril() if causal else visible


def softmax_or_zeros(scores: Tensor) -> Tensor:
    """Softmax over the last axis. A row of -inf gives zeros, with zero gradients, instead of NaN."""
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    return torch.softmax(scores.masked_fill(empty, 0), dim=-1).masked_fill(empty, 0)


def dense_bias(sink_positions: Tensor, inter_sink_bias: Tensor, length: int) -> Tensor:
    """β [B, 1 or Hq, N, N] from inter_sink_bias [B, 1 or Hq, M, M]."""
    batch, sinks = sink_positions.shape
    if sinks == 0:
        return inter_sink_bias.sum()  # 0, but differentiable
    # Padded sinks (-1) go to an extra row and column, which are cut off.
    positions = sink_positions.long().masked_fill(sink_positions < 0, length)
    b = torch.arange(batch, device=positions.device)[:, None, None, None]
    h = torch.arange(inter_sink_bias.shape[1], device=positions.device)[:, None, None]
    dense = inter_sink_bias.new_zeros(batch, inter_sink_bias.shape[1], length + 1, length + 1)
    dense = dense.index_put((b, h, positions[:, None, :, None], positions[:, None, None, :]), inter_sink_bias)
    return dense[..., :length, :length]


def _packed(q, k, v, sink_positions, inter_sink_bias, sink_logits, causal, cu_seqlens, dropout_p, scale):
    """Packed input: one sequence at a time. q [T, Hq, D], lse [Hq, T]."""
    outs, lses = [q.new_zeros(0, q.shape[1], v.shape[2])], []
    offsets = cu_seqlens.tolist()
    for b, (start, stop) in enumerate(pairwise(offsets)):
        q_b, k_b, v_b = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        out, lse = sink_attention(
            q_b,
            k_b,
            v_b,
            None if sink_positions is None else sink_positions[b : b + 1],
            None if inter_sink_bias is None else inter_sink_bias[b : b + 1],
            sink_logits=sink_logits,
            causal=causal,
            dropout_p=dropout_p,
            scale=scale,
            return_lse=True,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    lses = lses or [q.new_zeros(q.shape[1], 0, dtype=torch.promote_types(q.dtype, torch.float32))]
    return torch.cat(outs), torch.cat(lses, dim=1)

"""sink_attention: schemas, autograd, and what runs where.

On a CPU the correction of PyTorch's flash attention; on a GPU Triton's kernels, fused or correcting one of several
unbiased attentions. All leave behind the same: out, lse, and of each sink row the shift and mass of its softmax.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recattn import reference
from recattn.ops._library import define, differentiable_again, refuse_dropout
from recattn.ops._support import triton_refusal
from recattn.ops.sink_attention import cpu as on_cpu
from recattn.ops.sink_attention import triton as by_triton
from recattn.ops.sink_attention.dispatch import CORRECTION

# The widest head that the kernels' tiles hold.
MAX_HEAD_DIM = 256


def no_sinks(q: Tensor) -> tuple[Tensor, Tensor]:
    """The sink_positions [B, 0] and inter_sink_bias [B, 1, 0, 0] with which sink_attention is plain attention."""
    positions = torch.empty(q.shape[0], 0, dtype=torch.int64, device=q.device)
    return positions, torch.empty(q.shape[0], 1, 0, 0, dtype=torch.float32, device=q.device)


def availability(device: str) -> dict[str, str | None]:
    """Why each implementation cannot run on this device type (None: it can), best first."""
    if device == "cpu":
        return {"correction": None, "triton": triton_refusal(device), "reference": None}
    return {"triton": triton_refusal(device), "correction": triton_refusal(device), "reference": None}


def refusals(q: Tensor, v: Tensor, *, padded: bool, dropout_p: float) -> dict[str, str | None]:
    """The same, of a call."""
    refused = availability(q.device.type)
    needs = {"triton": _triton_limits(q, v)}
    if q.device.type != "cpu":
        needs["correction"] = needs["triton"]
        if padded:
            needs["correction"] = needs["correction"] or "no base masks the padding of seq_lens; impl='triton' does"
    if dropout_p > 0:
        needs["correction"] = "it has no dropout"
    return {name: why or needs.get(name) for name, why in refused.items()}


def _triton_limits(q: Tensor, v: Tensor) -> str | None:
    if q.dtype == torch.float64:
        return "its kernels compute in float32, and q is float64"
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"its kernels hold head dims up to {MAX_HEAD_DIM}, and q or v has {widest}"
    return triton_refusal(q.device.type, q.dtype)


class Settings(NamedTuple):
    """What a call holds besides its tensors. `path`: "auto", "triton", "correction", or "correction:<base>"."""

    causal: bool
    left_padded: bool
    scale: float
    dropout_p: float = 0.0
    max_seqlen: int | None = None
    path: str = "auto"


def _reference(q, k, v, sink_positions, inter_sink_bias, sink_logits, seq_lens, cu_seqlens, _seed, settings) -> Tensor:
    refuse_dropout("sink_attention", settings.dropout_p)
    return reference.sink_attention(
        q,
        k,
        v,
        sink_positions,
        inter_sink_bias,
        sink_logits=sink_logits,
        causal=settings.causal,
        seq_lens=seq_lens,
        padding_side="left" if settings.left_padded else "right",
        cu_seqlens=cu_seqlens,
        scale=settings.scale,
    )


class SinkAttention(torch.autograd.Function):
    """Returns (out, lse); lse carries no gradient."""

    @staticmethod
    def forward(
        ctx, q, k, v, sink_positions, inter_sink_bias, sink_logits, seq_lens, cu_seqlens, dropout_seed, settings
    ):
        tensors = (sink_positions, inter_sink_bias, sink_logits, seq_lens, cu_seqlens, dropout_seed)
        out, lse, sink_state = sink_attention_fwd(q, k, v, *tensors, *settings)
        ctx.save_for_backward(q, k, v, *tensors, out, lse, sink_state)
        ctx.settings = settings
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @differentiable_again(_reference)
    def backward(ctx, dout, _dlse):
        q, k, v, *tensors, out, lse, sink_state = ctx.saved_tensors
        saved = (q, k, v, out, lse, sink_state, *tensors)
        dq, dk, dv, dbias, dsink_logits = sink_attention_bwd(dout, *saved, *ctx.settings)
        return dq, dk, dv, None, dbias, dsink_logits if ctx.needs_input_grad[5] else None, None, None, None, None


def _on_cpu(q: Tensor, path: str) -> bool:
    """Whether PyTorch's CPU attention is corrected; Triton's interpreter takes what names its kernels."""
    return q.device.type == "cpu" and path in ("auto", CORRECTION)


def _cpu_fwd(q, k, v, *context):
    *tensors, _seed, causal, left_padded, scale, _dropout_p, _max_seqlen, path = context
    if _on_cpu(q, path):
        return on_cpu.sink_attention_fwd(q, k, v, *tensors, causal, left_padded, scale)
    return by_triton.sink_attention_fwd(q, k, v, *context)


def _cpu_bwd(dout, q, k, v, out, lse, sink_state, *context):
    *tensors, _seed, causal, left_padded, scale, _dropout_p, _max_seqlen, path = context
    if _on_cpu(q, path):
        return on_cpu.sink_attention_bwd(dout, q, k, v, out, lse, sink_state, *tensors, causal, left_padded, scale)
    return by_triton.sink_attention_bwd(dout, q, k, v, out, lse, sink_state, *context)


def _fake_fwd(q, k, v, sink_positions, *context):
    layout = on_cpu if _on_cpu(q, context[-1]) else by_triton
    return layout.empty_fwd(q, v, sink_positions)


def _fake_bwd(dout, q, k, v, out, lse, sink_state, sink_positions, inter_sink_bias, sink_logits, *context):
    layout = on_cpu if _on_cpu(q, context[-1]) else by_triton
    dsink_logits = q.new_empty(0) if sink_logits is None else torch.empty_like(sink_logits)
    return *layout.empty_bwd(q, k, v), inter_sink_bias.new_empty(inter_sink_bias.shape), dsink_logits


_CONTEXT = (
    "Tensor sink_positions, Tensor inter_sink_bias, Tensor? sink_logits, Tensor? seq_lens, Tensor? cu_seqlens, "
    "Tensor? dropout_seed, bool causal, bool left_padded, float scale, float dropout_p, SymInt? max_seqlen, str path"
)
sink_attention_fwd = define(
    f"sink_attention_fwd(Tensor q, Tensor k, Tensor v, {_CONTEXT}) -> (Tensor, Tensor, Tensor)",
    cpu=_cpu_fwd,
    cuda=by_triton.sink_attention_fwd,
    fake=_fake_fwd,
)
sink_attention_bwd = define(
    "sink_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor sink_state, "
    f"{_CONTEXT}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_cpu_bwd,
    cuda=by_triton.sink_attention_bwd,
    fake=_fake_bwd,
)

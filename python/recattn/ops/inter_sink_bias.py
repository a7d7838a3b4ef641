"""inter_sink_bias by Triton kernels: one launch forward, one backward, which repeats the softmax."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from recattn import reference
from recattn.ops._library import define, differentiable_again, refuse_dropout
from recattn.ops._support import triton_unsupported_reason

# The kernels hold rows of the bias whole.
_MAX_SINKS = 128


def availability(device: str) -> dict[str, str | None]:
    """Why each implementation cannot run on this device type (None: it can), best first."""
    if device == "cpu":  # where Triton's is an interpreter
        return {"reference": None, "triton": triton_unsupported_reason(device)}
    return {"triton": triton_unsupported_reason(device), "reference": None}


def triton_call_refusal(q_s: Tensor) -> str | None:
    """Why the Triton kernels cannot serve a call that is on a device where they run."""
    if q_s.dtype == torch.float64:
        return "it computes in float32, and q_s is float64"
    if q_s.shape[2] > _MAX_SINKS:
        return f"it serves at most {_MAX_SINKS} sinks, and there are {q_s.shape[2]}"
    return triton_unsupported_reason(q_s.device.type, q_s.dtype)


class Settings(NamedTuple):
    """What a call holds besides its tensors."""

    factor: float  # of bias_scale, or bias_scale itself where that is no tensor
    causal: bool
    dropout_p: float
    scale: float | None  # None: 1/√D, which torch.compile would fix in its graph were it computed outside the operator


def _reference(q_s, k_s, sink_mask, bias_scale, _dropout_seed, settings) -> Tensor:
    refuse_dropout("inter_sink_bias", settings.dropout_p)
    bias_scale = settings.factor if bias_scale is None else settings.factor * bias_scale
    return reference.inter_sink_bias(
        q_s, k_s, sink_mask=sink_mask, bias_scale=bias_scale, causal=settings.causal, scale=settings.scale
    )


class InterSinkBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_s, k_s, sink_mask, bias_scale, dropout_seed, settings):
        tensors = (q_s, k_s, sink_mask, bias_scale, dropout_seed)
        ctx.save_for_backward(*tensors)
        ctx.options = settings
        return inter_sink_bias_fwd(*tensors, *settings)

    @staticmethod
    @differentiable_again(_reference)
    def backward(ctx, dout):
        dq_s, dk_s, dbias_scale = inter_sink_bias_bwd(dout, *ctx.saved_tensors, *ctx.options)
        return dq_s, dk_s, None, dbias_scale if ctx.needs_input_grad[3] else None, None, None


def _inter_sink_bias_fwd(q_s, k_s, sink_mask, bias_scale, dropout_seed, *settings) -> Tensor:
    from recattn.triton_kernels.inter_sink_bias import launch_inter_sink_bias_fwd

    out = _fake_fwd(q_s)
    launch_inter_sink_bias_fwd(q_s, k_s, sink_mask, bias_scale, dropout_seed, out, **_options(q_s, *settings))
    return out


def _inter_sink_bias_bwd(
    dout, q_s, k_s, sink_mask, bias_scale, dropout_seed, *settings
) -> tuple[Tensor, Tensor, Tensor]:
    from recattn.triton_kernels.inter_sink_bias import launch_inter_sink_bias_bwd

    dq_s, dk_s = torch.empty_like(q_s), torch.empty_like(k_s)
    shares = dout.new_empty(q_s.shape[:3])  # of bias_scale's gradient
    launch_inter_sink_bias_bwd(
        dout, q_s, k_s, sink_mask, bias_scale, dropout_seed, dq_s, dk_s, shares, **_options(q_s, *settings)
    )
    return dq_s, dk_s, dout.new_empty(0) if bias_scale is None else shares.sum().to(bias_scale.dtype)


def _options(q_s: Tensor, *settings) -> dict[str, object]:
    options = Settings(*settings)
    scale = 1 / math.sqrt(q_s.shape[-1]) if options.scale is None else options.scale
    return options._replace(scale=scale)._asdict()


# --- Registration ---


def _fake_fwd(q_s, *_):
    batch, _, sinks, _ = q_s.shape
    return q_s.new_empty(batch, 1, sinks, sinks, dtype=torch.float32)


def _fake_bwd(dout, q_s, k_s, sink_mask, bias_scale, *_):
    dbias_scale = dout.new_empty(0) if bias_scale is None else torch.empty_like(bias_scale)
    return torch.empty_like(q_s), torch.empty_like(k_s), dbias_scale


_ARGUMENTS = (
    "Tensor q_s, Tensor k_s, Tensor? sink_mask, Tensor? bias_scale, Tensor? dropout_seed, "
    "float factor, bool causal, float dropout_p, float? scale"
)
inter_sink_bias_fwd = define(
    f"inter_sink_bias_fwd({_ARGUMENTS}) -> Tensor",
    cpu=_inter_sink_bias_fwd,
    cuda=_inter_sink_bias_fwd,
    fake=_fake_fwd,
)
inter_sink_bias_bwd = define(
    f"inter_sink_bias_bwd(Tensor dout, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_inter_sink_bias_bwd,
    cuda=_inter_sink_bias_bwd,
    fake=_fake_bwd,
)

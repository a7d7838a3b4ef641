"""inter_sink_bias by Triton kernels: one launch forward, one backward, which recomputes the softmax."""

import torch
from torch import Tensor

from recattn import reference
from recattn._options import InterSinkBiasOptions
from recattn.ops._library import define, differentiable_again, refuse_dropout
from recattn.ops._plans import replayed
from recattn.ops._support import triton_kernels, triton_unsupported_reason

# The kernels hold rows of the bias whole.
_MAX_SINKS = 128


def unsupported_reasons(device_type: str, q_s: Tensor | None = None) -> dict[str, str | None]:
    """Why each implementation cannot run (None: it can), best first.

    Without q_s: on this type of device. With it: a call with this tensor.
    """
    triton = triton_unsupported_reason(device_type) or (None if q_s is None else _triton_call_reason(q_s))
    if device_type == "cpu":  # where Triton kernels are interpreted
        return {"reference": None, "triton": triton}
    return {"triton": triton, "reference": None}


def _triton_call_reason(q_s: Tensor) -> str | None:
    if q_s.dtype == torch.float64:
        return "it computes in float32, and q_s is float64"
    if q_s.shape[2] > _MAX_SINKS:
        return f"it serves at most {_MAX_SINKS} sinks, and there are {q_s.shape[2]}"
    return triton_unsupported_reason(q_s.device.type, q_s.dtype)


def _reference(q_s, k_s, sink_mask, bias_scale, _dropout_seed, options) -> Tensor:
    refuse_dropout("inter_sink_bias", options.dropout_p)
    bias_scale = options.factor if bias_scale is None else options.factor * bias_scale
    return reference.inter_sink_bias(
        q_s, k_s, sink_mask=sink_mask, bias_scale=bias_scale, causal=options.causal, scale=options.scale
    )


class InterSinkBiasFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_s, k_s, sink_mask, bias_scale, dropout_seed, options):
        tensors = (q_s, k_s, sink_mask, bias_scale, dropout_seed)
        ctx.save_for_backward(*tensors)
        ctx.options = options
        return inter_sink_bias_fwd(*tensors, options)

    @staticmethod
    @differentiable_again(_reference)
    def backward(ctx, dout):
        dq_s, dk_s, dbias_scale = inter_sink_bias_bwd(dout, *ctx.saved_tensors, ctx.options)
        return dq_s, dk_s, None, dbias_scale if ctx.needs_input_grad[3] else None, None, None


@replayed
def _inter_sink_bias_fwd(q_s, k_s, sink_mask, bias_scale, dropout_seed, options) -> Tensor:
    out = _fake_fwd(q_s)
    triton_kernels("inter_sink_bias").launch_inter_sink_bias_fwd(
        q_s, k_s, sink_mask, bias_scale, dropout_seed, out, options
    )
    return out


@replayed
def _inter_sink_bias_bwd(dout, q_s, k_s, sink_mask, bias_scale, dropout_seed, options) -> tuple:
    dq_s, dk_s = torch.empty_like(q_s), torch.empty_like(k_s)
    dbias_scale_rows = dout.new_empty(q_s.shape[:3])  # bias_scale's gradient is their sum
    tensors = (q_s, k_s, sink_mask, bias_scale, dropout_seed, dq_s, dk_s, dbias_scale_rows)
    triton_kernels("inter_sink_bias").launch_inter_sink_bias_bwd(dout, *tensors, options)
    return dq_s, dk_s, None if bias_scale is None else dbias_scale_rows.sum().to(bias_scale.dtype)


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
    options=InterSinkBiasOptions,
)
inter_sink_bias_bwd = define(
    f"inter_sink_bias_bwd(Tensor dout, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_inter_sink_bias_bwd,
    cuda=_inter_sink_bias_bwd,
    fake=_fake_bwd,
    options=InterSinkBiasOptions,
)

"""inter_sink_bias: Triton kernels, one launch forward and one backward; on a CPU C++ (csrc/cpu/inter_sink_bias.cpp).

The backward recomputes the softmax.
"""

import torch
from torch import Tensor

from recattn import reference
from recattn._extension import MISSING
from recattn._options import InterSinkBiasOptions
from recattn.ops._fallback import or_reference, or_reference_gradients
from recattn.ops._library import define, differentiable_again, refuse_dropout
from recattn.ops._plans import replayed
from recattn.ops._support import triton_kernels, triton_unsupported_reason

_OPS = torch.ops.recattn
# The Triton kernels hold rows of the bias whole.
_MAX_SINKS = 128


def unsupported_reasons(device_type: str, q_s: Tensor | None = None) -> dict[str, str | None]:
    """Why each implementation cannot run (None: it can), best first.

    Without q_s: on this type of device. With it: a call with this tensor.
    """
    float64 = None if q_s is None or q_s.dtype != torch.float64 else "it computes in float32, and q_s is float64"
    triton = triton_unsupported_reason(device_type) or float64 or (None if q_s is None else _triton_call_reason(q_s))
    if device_type == "cpu":  # where Triton kernels are interpreted
        return {"cpu": float64 or MISSING.get("cpu"), "reference": None, "triton": triton}
    cpu = f"its kernels are for a CPU, and the tensors are on {device_type}"
    return {"triton": triton, "reference": None, "cpu": cpu}


def _triton_call_reason(q_s: Tensor) -> str | None:
    if q_s.shape[2] > _MAX_SINKS:
        return f"it serves at most {_MAX_SINKS} sinks, and there are {q_s.shape[2]}"
    return triton_unsupported_reason(q_s.device.type, q_s.dtype)


def _bias(q_s, k_s, sink_mask, bias_scale, _dropout_seed, options) -> Tensor:
    """By the reference."""
    bias_scale = options.factor if bias_scale is None else options.factor * bias_scale
    return reference.inter_sink_bias(
        q_s,
        k_s,
        sink_mask=sink_mask,
        bias_scale=bias_scale,
        causal=options.causal,
        dropout_p=options.dropout_p,
        scale=options.scale,
    )


def _reference(*inputs) -> Tensor:
    refuse_dropout("inter_sink_bias", inputs[-1].dropout_p)
    return _bias(*inputs)


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


def _like(x: Tensor) -> Tensor:
    """A new tensor in x's memory layout, or contiguous if the layout's rows are not."""
    like = torch.empty_like(x)
    return like if like.stride(-1) == 1 else x.new_empty(x.shape)


def _fake_fwd(q_s, *_):
    batch, _, sinks, _ = q_s.shape
    return q_s.new_empty(batch, 1, sinks, sinks, dtype=torch.float32)


def _fake_bwd(dout, q_s, k_s, sink_mask, bias_scale, dropout_seed, options):
    dbias_scale = dout.new_empty(0) if bias_scale is None else torch.empty_like(bias_scale)
    like = _like if options.impl == "cpu" else torch.empty_like
    return like(q_s), like(k_s), dbias_scale


@or_reference("inter_sink_bias", _bias, like=_fake_fwd)
def _fwd(q_s, k_s, sink_mask, bias_scale, dropout_seed, options) -> Tensor:
    if options.impl == "cpu":
        return _OPS.inter_sink_bias_cpu_fwd.default(q_s, k_s, sink_mask, bias_scale, dropout_seed, *options[:-1])
    return _triton_fwd(q_s, k_s, sink_mask, bias_scale, dropout_seed, options)


def _inputs(dout, *inputs):
    return (dout,), inputs


@or_reference_gradients("inter_sink_bias", _bias, like=_fake_bwd, split=_inputs, wrt=(0, 1, 3))
def _bwd(dout, q_s, k_s, sink_mask, bias_scale, dropout_seed, options) -> tuple:
    if options.impl != "cpu":
        return _triton_bwd(dout, q_s, k_s, sink_mask, bias_scale, dropout_seed, options)
    dq_s, dk_s = _like(q_s), _like(k_s)
    tensors = (dout, q_s, k_s, sink_mask, bias_scale, dropout_seed)
    return dq_s, dk_s, _OPS.inter_sink_bias_cpu_bwd.default(*tensors, *options[:-1], dq_s, dk_s)


@replayed
def _triton_fwd(q_s, k_s, sink_mask, bias_scale, dropout_seed, options) -> Tensor:
    out = _fake_fwd(q_s)
    triton_kernels("inter_sink_bias").launch_inter_sink_bias_fwd(
        q_s, k_s, sink_mask, bias_scale, dropout_seed, out, options
    )
    return out


@replayed
def _triton_bwd(dout, q_s, k_s, sink_mask, bias_scale, dropout_seed, options) -> tuple:
    dq_s, dk_s = torch.empty_like(q_s), torch.empty_like(k_s)
    dbias_scale_rows = dout.new_empty(q_s.shape[:3])  # bias_scale's gradient is their sum
    tensors = (q_s, k_s, sink_mask, bias_scale, dropout_seed, dq_s, dk_s, dbias_scale_rows)
    triton_kernels("inter_sink_bias").launch_inter_sink_bias_bwd(dout, *tensors, options)
    return dq_s, dk_s, None if bias_scale is None else dbias_scale_rows.sum().to(bias_scale.dtype)


# --- Registration ---


_ARGUMENTS = (
    "Tensor q_s, Tensor k_s, Tensor? sink_mask, Tensor? bias_scale, Tensor? dropout_seed, "
    "float factor, bool causal, float dropout_p, float? scale, str? impl=None"
)
inter_sink_bias_fwd = define(
    f"inter_sink_bias_fwd({_ARGUMENTS}) -> Tensor",
    cpu=_fwd,
    cuda=_fwd,
    fake=_fake_fwd,
    options=InterSinkBiasOptions,
)
inter_sink_bias_bwd = define(
    f"inter_sink_bias_bwd(Tensor dout, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_bwd,
    cuda=_bwd,
    fake=_fake_bwd,
    options=InterSinkBiasOptions,
)

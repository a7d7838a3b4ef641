"""refined_attention: schemas, autograd, and what runs where."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recattn.ops import _refined_attention_cpu as on_cpu
from recattn.ops._library import define


def availability(device: str) -> dict[str, str | None]:
    """Why each implementation cannot run on this device type (None: it can), best first."""
    return {"cpu": None if device == "cpu" else f"the tensors are on {device}", "reference": None}


def refusals(q: Tensor, *, dropout_p: float) -> dict[str, str | None]:
    """The same, of a call."""
    needs = {"cpu": "it has no dropout" if dropout_p > 0 else None}
    return {name: why or needs.get(name) for name, why in availability(q.device.type).items()}


class Settings(NamedTuple):
    """What a call holds besides its tensors. `path`: "auto", or an implementation to insist on."""

    mechanism: str
    source: str
    causal: bool
    left_padded: bool
    scale: float | None  # None: 1/√D, which torch.compile would fix in its graph were it computed outside the operator
    dropout_p: float = 0.0
    path: str = "auto"


class RefinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, settings):
        tensors = (q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed)
        out, lse = refined_attention_fwd(*tensors, *settings)
        ctx.save_for_backward(out, lse, *tensors)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dq, dk, dv, dw_q, dw_k, *dw_v = refined_attention_bwd(dout, *ctx.saved_tensors, *ctx.settings)
        return dq, dk, dv, dw_q, dw_k, *(dw_v or [None]), None, None, None


def _cpu_fwd(q, k, v, w_q, w_k, w_v, seq_lens, _dropout_seed, *settings):
    mechanism, source, causal, left_padded, scale, _dropout_p, _path = settings
    out = on_cpu.refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, mechanism, source, causal, left_padded, scale)
    return out, _empty_lse(q)


def _cpu_bwd(dout, _out, _lse, q, k, v, w_q, w_k, w_v, seq_lens, _dropout_seed, *settings):
    mechanism, source, causal, left_padded, scale, _dropout_p, _path = settings
    tensors = (q, k, v, w_q, w_k, w_v, seq_lens)
    return on_cpu.refined_attention_bwd(dout, *tensors, mechanism, source, causal, left_padded, scale)


def _empty_lse(q: Tensor) -> Tensor:
    """The log-sum-exps that a backward reads: on a CPU none, for it recomputes them."""
    return q.new_empty(0, dtype=torch.float32)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor w_q, Tensor w_k, Tensor? w_v, Tensor? seq_lens, Tensor? dropout_seed, "
    "str mechanism, str source, bool causal, bool left_padded, float? scale, float dropout_p, str path"
)

refined_attention_fwd = define(
    f"refined_attention_fwd({_ARGUMENTS}) -> (Tensor, Tensor)",
    cpu=_cpu_fwd,
    fake=lambda q, k, v, *_: (v.new_empty(v.shape), _empty_lse(q)),
)

refined_attention_bwd = define(
    f"refined_attention_bwd(Tensor dout, Tensor out, Tensor lse, {_ARGUMENTS}) -> Tensor[]",
    cpu=_cpu_bwd,
    fake=lambda dout, out, lse, q, k, v, w_q, w_k, w_v, *_: [
        x.new_empty(x.shape) for x in (q, k, v, w_q, w_k, w_v) if x is not None
    ],
)

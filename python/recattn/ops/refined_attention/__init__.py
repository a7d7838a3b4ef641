"""refined_attention: schemas, autograd, and what runs where.

On a CPU in C++ or by slices of PyTorch's products. On a GPU by Triton, short sequences whole in one program, longer
ones as a projection and a plain attention; what Triton's kernels do not serve goes through slices too.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recattn import reference
from recattn.ops._library import define, differentiable_again, distinct, refuse_dropout
from recattn.ops._support import triton_unsupported_reason
from recattn.ops.refined_attention import chunked as by_slices
from recattn.ops.refined_attention import cpu as on_cpu
from recattn.ops.refined_attention import triton_long as long
from recattn.ops.refined_attention import triton_short as short


def availability(device: str) -> dict[str, str | None]:
    """Why each implementation cannot run on this device type (None: it can), best first."""
    elsewhere = f"the tensors are on {device}"
    if device == "cpu":
        return {"cpu": None, "reference": None, "triton": triton_unsupported_reason(device), "cuda": elsewhere}
    cuda = None if device == "cuda" else elsewhere
    return {"triton": triton_unsupported_reason(device), "cuda": cuda, "cpu": elsewhere, "reference": None}


def refusals(
    q: Tensor, v: Tensor, w_q: Tensor, mechanism: str, *, dropout_p: float, impl: str | None
) -> dict[str, str | None]:
    """The same, of a call."""
    no_dropout = "it has no dropout" if dropout_p > 0 else None
    needs = {"cpu": no_dropout, "cuda": no_dropout}
    if (
        q.device.type != "cpu" or impl == "triton"
    ):  # no choice of a CPU; torch.compile fixes the range of a size looked at
        needs["triton"] = _triton_limits(q, v, w_q, mechanism)
    return {name: why or needs.get(name) for name, why in availability(q.device.type).items()}


def _triton_limits(q: Tensor, v: Tensor, w_q: Tensor, mechanism: str) -> str | None:
    in_one_program = short.refusal(q, v, mechanism)
    if in_one_program is None:
        return None
    in_two = long.refusal(q, v, w_q, mechanism)
    # Beyond one program "value" and "additive" are not served at all.
    return in_two and (in_one_program if mechanism in ("value", "additive") else in_two)


class Settings(NamedTuple):
    """What a call holds besides its tensors. `path`: "auto", or an implementation to insist on."""

    mechanism: str
    source: str
    causal: bool
    left_padded: bool
    scale: float | None  # None: 1/√D, which torch.compile would fix in its graph were it computed outside the operator
    dropout_p: float = 0.0
    path: str = "auto"


def refined_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor | None,
    seq_lens: Tensor | None,
    dropout_seed: Tensor | None,
    settings: Settings,
) -> Tensor:
    """The call by what `settings.path` names, which serves it."""
    tensors = distinct(q, k, v, w_q, w_k)
    if settings.path == "triton" and short.refusal(q, v, settings.mechanism) is not None:
        # On a GPU a plain attention of any kind may serve; the interpreter has Triton's own.
        path = "auto" if q.device.type == "cuda" else "triton"
        return long.refined_attention(*tensors, seq_lens, dropout_seed, settings._replace(path=path))
    return RefinedAttention.apply(*tensors, w_v, seq_lens, dropout_seed, settings)


def _reference(q, k, v, w_q, w_k, w_v, seq_lens, _dropout_seed, settings) -> Tensor:
    refuse_dropout("refined_attention", settings.dropout_p)
    return reference.refined_attention(
        q,
        k,
        v,
        w_q,
        w_k,
        w_v,
        mechanism=settings.mechanism,
        source=settings.source,
        causal=settings.causal,
        seq_lens=seq_lens,
        padding_side="left" if settings.left_padded else "right",
        scale=settings.scale,
    )


class RefinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, settings):
        tensors = (q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed)
        ctx.save_for_backward(*tensors)
        ctx.options = settings
        return refined_attention_fwd(*tensors, *settings)

    @staticmethod
    @differentiable_again(_reference)
    def backward(ctx, dout):
        dq, dk, dv, dw_q, dw_k, *dw_v = refined_attention_bwd(dout, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dv, dw_q, dw_k, *(dw_v or [None]), None, None, None


def _without_dropout(kernel, *arguments):
    """A kernel that knows neither dropout nor paths."""
    *tensors, _dropout_seed, mechanism, source, causal, left_padded, scale, _dropout_p, _path = arguments
    return kernel(*tensors, mechanism, source, causal, left_padded, scale)


def _fwd(*arguments) -> Tensor:
    if arguments[-1] == "triton":
        return short.refined_attention_fwd(*arguments)
    module = on_cpu if arguments[0].device.type == "cpu" else by_slices
    return _without_dropout(module.refined_attention_fwd, *arguments)


def _bwd(*arguments) -> list[Tensor]:
    if arguments[-1] == "triton":
        return short.refined_attention_bwd(*arguments)
    module = on_cpu if arguments[0].device.type == "cpu" else by_slices
    return _without_dropout(module.refined_attention_bwd, *arguments)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor w_q, Tensor w_k, Tensor? w_v, Tensor? seq_lens, Tensor? dropout_seed, "
    "str mechanism, str source, bool causal, bool left_padded, float? scale, float dropout_p, str path"
)

refined_attention_fwd = define(
    f"refined_attention_fwd({_ARGUMENTS}) -> Tensor",
    cpu=_fwd,
    cuda=_fwd,
    fake=lambda q, k, v, *_: v.new_empty(v.shape),
)

refined_attention_bwd = define(
    f"refined_attention_bwd(Tensor dout, {_ARGUMENTS}) -> Tensor[]",
    cpu=_bwd,
    cuda=_bwd,
    fake=lambda dout, q, k, v, w_q, w_k, w_v, *_: [
        x.new_empty(x.shape) for x in (q, k, v, w_q, w_k, w_v) if x is not None
    ],
)

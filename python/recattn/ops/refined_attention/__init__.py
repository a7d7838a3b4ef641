"""refined_attention: schemas, autograd, and what runs where.

CPU: C++, and chunked PyTorch matmuls where it has no kernel (`cpu`); where it is not compiled those alone (`chunked`).
GPU: Triton, short sequences in one program (`triton_short`) and longer ones as a projection and a plain attention
(`triton_long`), else chunked PyTorch matmuls.
"""

import torch
from torch import Tensor

from recattn import reference
from recattn._extension import MISSING
from recattn._options import RefinedAttentionOptions
from recattn.ops._fallback import or_reference, or_reference_gradients
from recattn.ops._library import apply, define, differentiable_again, distinct, refuse_dropout
from recattn.ops._support import length_bound, triton_unsupported_reason
from recattn.ops.refined_attention import chunked, cpu, triton_long, triton_short


def unsupported_reasons(
    device_type: str,
    q: Tensor | None = None,
    v: Tensor | None = None,
    w_q: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    mechanism: str = "simple",
    dropout_p: float = 0.0,
    impl: str | None = None,
) -> dict[str, str | None]:
    """Why each implementation cannot run (None: it can), best first.

    Without q, v and w_q: on this type of device. With them: a call with these tensors.
    """
    elsewhere = f"the tensors are on {device_type}"
    triton = triton_unsupported_reason(device_type)
    # A CPU never chooses Triton. Reading sizes, which torch.compile would then fix in its graph, is left out there.
    if q is not None and v is not None and w_q is not None and (device_type != "cpu" or impl == "triton"):
        triton = triton or _triton_call_reason(q, v, w_q, length_bound(q, w_q, cu_seqlens, max_seqlen), mechanism)
    has_chunked = device_type == "cuda" or (device_type == "cpu" and "cpu" in MISSING)  # with C++ a part of "cpu"
    chunked = ("it has no dropout" if dropout_p > 0 else None) if has_chunked else elsewhere
    if device_type == "cpu":
        return {"cpu": cpu.unsupported_reason(q, dropout_p), "chunked": chunked, "reference": None, "triton": triton}
    return {"triton": triton, "chunked": chunked, "cpu": elsewhere, "reference": None}


def _triton_call_reason(q: Tensor, v: Tensor, w_q: Tensor, length: int, mechanism: str) -> str | None:
    of_short = triton_short.unsupported_reason(q, v, length, mechanism)
    if of_short is None:
        return None
    of_long = triton_long.unsupported_reason(q, v, w_q, mechanism)
    # The kernels of longer sequences have neither "value" nor "additive".
    return of_long and (of_short if mechanism in ("value", "additive") else of_long)


def refined_attention(q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, dropout_seed, options) -> Tensor:
    """The call by `options.impl`, which supports it."""
    lengths = (seq_lens, seq_starts, cu_seqlens)
    tensors = (q, k, v, w_q, w_k)
    if torch.compiler.is_compiling():
        tensors = distinct(*tensors)
    if options.impl == "triton":
        longest = length_bound(q, w_q, cu_seqlens, options.max_seqlen)
        if triton_short.unsupported_reason(q, v, longest, options.mechanism) is not None:
            # On a GPU any implementation of plain attention may serve; the interpreter has Triton's alone.
            options = options._replace(impl=None if q.device.type == "cuda" else "triton")
            return triton_long.refined_attention(*tensors, lengths, dropout_seed, options)
    return apply(RefinedAttentionFunction, *tensors, w_v, *lengths, dropout_seed, options)


def _out(q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, _dropout_seed, options) -> Tensor:
    """By the reference."""
    return reference.refined_attention(
        q,
        k,
        v,
        w_q,
        w_k,
        w_v,
        mechanism=options.mechanism,
        source=options.source,
        causal=options.causal,
        seq_lens=seq_lens,
        seq_starts=seq_starts,
        cu_seqlens=cu_seqlens,
        dropout_p=options.dropout_p,
        scale=options.scale,
    )


def _reference(*inputs) -> Tensor:
    refuse_dropout("refined_attention", inputs[-1].dropout_p)
    return _out(*inputs)


class RefinedAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, dropout_seed, options):
        tensors = (q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, dropout_seed)
        out = refined_attention_fwd(*tensors, options)
        out, saved = out if isinstance(out, tuple) else (out, ())
        ctx.save_for_backward(*tensors, *saved)
        ctx.options = options
        return out

    @staticmethod
    @differentiable_again(_reference)
    def backward(ctx, dout):
        saved = ctx.saved_tensors  # read once: checkpointing allows no more
        dq, dk, dv, dw_q, dw_k, *dw_v = refined_attention_bwd(dout, *saved[:10], ctx.options, saved=saved[10:])
        return dq, dk, dv, dw_q, dw_k, *(dw_v or [None]), None, None, None, None, None


def _fake_fwd(q, k, v, *_) -> Tensor:
    return v.new_empty(v.shape)


def _fake_bwd(dout, q, k, v, w_q, w_k, w_v, *_) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, w_q, w_k, w_v) if x is not None]


@or_reference("refined_attention", _out, like=_fake_fwd)
def _fwd(*inputs) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and in a tuple what the kernels keep for the backward."""
    *tensors, _dropout_seed, options = inputs
    if options.impl == "triton":
        return triton_short.refined_attention_fwd(*inputs)
    if options.impl == "cpu":
        return cpu.refined_attention_fwd(*inputs)
    return chunked.refined_attention_fwd(*tensors, options=options)


def _inputs(dout, *inputs):
    return (dout,), inputs


@or_reference_gradients("refined_attention", _out, like=_fake_bwd, split=_inputs, wrt=range(6))
def _bwd(*inputs, saved=()) -> list[Tensor]:
    *tensors, _dropout_seed, options = inputs
    if options.impl == "triton":
        return triton_short.refined_attention_bwd(*inputs, *saved)
    if options.impl == "cpu":
        return cpu.refined_attention_bwd(*inputs, saved=saved)
    return chunked.refined_attention_bwd(*tensors, options=options)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor w_q, Tensor w_k, Tensor? w_v, Tensor? seq_lens, Tensor? seq_starts, "
    "Tensor? cu_seqlens, Tensor? dropout_seed, "
    "str mechanism, str source, bool causal, float? scale, float dropout_p, SymInt? max_seqlen, str? impl"
)

refined_attention_fwd = define(
    f"refined_attention_fwd({_ARGUMENTS}) -> Tensor",
    cpu=_fwd,
    cuda=_fwd,
    fake=_fake_fwd,
    options=RefinedAttentionOptions,
)

refined_attention_bwd = define(
    f"refined_attention_bwd(Tensor dout, {_ARGUMENTS}) -> Tensor[]",
    cpu=_bwd,
    cuda=_bwd,
    fake=_fake_bwd,
    options=RefinedAttentionOptions,
)

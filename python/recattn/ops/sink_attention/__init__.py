"""sink_attention: operator schemas, autograd, and which implementation runs.

On a CPU C++ runs. On a GPU a fused Triton kernel runs, or Triton kernels correct one of several unbiased attentions.
All return three tensors: out, lse, and what the backward needs besides: by Triton sink_stats [2, B, Hq, M], the
softmax's row_max and row_sum of each sink row; in C++ row_stats [2, B, Hq, N], row_max and 1/row_sum of every row.
"""

import torch
from torch import Tensor

from recattn import reference
from recattn._options import SinkAttentionOptions
from recattn.ops._fallback import or_reference, or_reference_gradients
from recattn.ops._library import define, differentiable_again, is_traced, refuse_dropout
from recattn.ops._support import triton_unsupported_reason
from recattn.ops.sink_attention import cpu as on_cpu
from recattn.ops.sink_attention import triton as by_triton

# The largest head dim that fits the kernels' tiles.
MAX_HEAD_DIM = 256


def no_sinks(q: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The sink_positions [B, 0] and inter_sink_bias [B, 1, 0, 0] with which sink_attention is plain attention."""
    batch = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    positions = q.new_empty((batch, 0), dtype=torch.int64)
    return positions, q.new_empty((batch, 1, 0, 0), dtype=torch.float32)


def unsupported_reasons(
    device_type: str, q: Tensor | None = None, v: Tensor | None = None, *, padded: bool = False, dropout_p: float = 0.0
) -> dict[str, str | None]:
    """Why each implementation cannot run (None: it can), best first.

    Without q and v: on this type of device. With them: a call with these tensors.
    """
    not_here = triton_unsupported_reason(device_type, None if q is None else q.dtype)
    triton = not_here or (None if q is None or v is None else _triton_call_reason(q, v))
    elsewhere = f"the tensors are on {device_type}"
    if device_type == "cpu":  # where Triton's is an interpreter
        cpu = on_cpu.unsupported_reason(q)
        return {"cpu": cpu, "reference": None, "triton": triton, "correction": elsewhere}
    no_dropout = "it has no dropout" if dropout_p > 0 else None
    no_padding = "no backend masks the padding of seq_lens; impl='triton' does" if padded else None
    correction = not_here or no_dropout or triton or no_padding
    return {"triton": triton, "correction": correction, "cpu": elsewhere, "reference": None}


def _triton_call_reason(q: Tensor, v: Tensor) -> str | None:
    if q.dtype == torch.float64:
        return "its kernels compute in float32, and q is float64"
    widest = max(q.shape[-1], v.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"its kernels hold head dims up to {MAX_HEAD_DIM}, and q or v has {widest}"
    return None


def _out_and_lse(
    q, k, v, sink_positions, inter_sink_bias, sink_logits, seq_lens, seq_starts, cu_seqlens, _seed, options
) -> tuple[Tensor, Tensor]:
    """By the reference; lse as the operator returns it, packed [T, Hq]."""
    out, lse = reference.sink_attention(
        q,
        k,
        v,
        sink_positions,
        inter_sink_bias,
        sink_logits=sink_logits,
        causal=options.causal,
        seq_lens=seq_lens,
        seq_starts=seq_starts,
        cu_seqlens=cu_seqlens,
        dropout_p=options.dropout_p,
        scale=options.scale,
        return_lse=True,
    )
    return out, lse if cu_seqlens is None else lse.t()


def _reference(*inputs) -> Tensor:
    refuse_dropout("sink_attention", inputs[-1].dropout_p)
    return _out_and_lse(*inputs)[0]


class SinkAttentionFunction(torch.autograd.Function):
    """Returns (out, lse); lse carries no gradient."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        sink_positions,
        inter_sink_bias,
        sink_logits,
        seq_lens,
        seq_starts,
        cu_seqlens,
        dropout_seed,
        options,
    ):
        tensors = (sink_positions, inter_sink_bias, sink_logits, seq_lens, seq_starts, cu_seqlens, dropout_seed)
        out, lse, sink_stats, *streams = sink_attention_fwd(q, k, v, *tensors, options, keeps_streams=True)
        ctx.save_for_backward(q, k, v, *tensors, out, lse, sink_stats)
        ctx.options, ctx.streams = options, streams[0] if streams else None
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # autograd would make zeros for lse
        return out, lse

    @staticmethod
    @differentiable_again(_reference)
    def backward(ctx, dout, _dlse):
        q, k, v, *tensors, out, lse, sink_stats = ctx.saved_tensors
        # A forward that kept its streams was called past the operator.
        bwd = sink_attention_bwd if ctx.streams is None or is_traced(dout) else _bwd
        dq, dk, dv, dbias, dsink_logits = bwd(
            dout, q, k, v, out, lse, sink_stats, *tensors, ctx.options, streams=ctx.streams
        )
        return dq, dk, dv, None, dbias, dsink_logits if ctx.needs_input_grad[5] else None, *[None] * 5


# --- The operators ---


def _runs_in_cpp(q: Tensor, options: SinkAttentionOptions) -> bool:
    """Any other choice on a CPU is for Triton's interpreter."""
    return q.is_cpu and options.impl in (None, "cpu")


def _fake_fwd(q, k, v, sink_positions, *others):
    layout = on_cpu if _runs_in_cpp(q, others[-1]) else by_triton
    return layout.empty_fwd(q, v, sink_positions)


def _fake_bwd(dout, q, k, v, out, lse, sink_stats, _sink_positions, inter_sink_bias, sink_logits, *others):
    layout = on_cpu if _runs_in_cpp(q, others[-1]) else by_triton
    dsink_logits = None if sink_logits is None else torch.empty_like(sink_logits)
    return *layout.empty_bwd(q, k, v), inter_sink_bias.new_empty(inter_sink_bias.shape), dsink_logits


@or_reference("sink_attention", _out_and_lse, like=_fake_fwd)
def _fwd(q, k, v, *tensors_and_options, keeps_streams=False):
    if _runs_in_cpp(q, tensors_and_options[-1]):
        return on_cpu.sink_attention_fwd(q, k, v, tensors_and_options)
    return by_triton.sink_attention_fwd(q, k, v, by_triton.Context(*tensors_and_options), keeps_streams)


def _inputs(dout, q, k, v, _out, _lse, _sink_stats, *tensors_and_options):
    return (dout,), (q, k, v, *tensors_and_options)


@or_reference_gradients("sink_attention", _out_and_lse, like=_fake_bwd, split=_inputs, wrt=(0, 1, 2, 4, 5))
def _bwd(dout, q, k, v, out, lse, sink_stats, *tensors_and_options, streams=None):
    if _runs_in_cpp(q, tensors_and_options[-1]):
        return on_cpu.sink_attention_bwd(dout, q, k, v, out, sink_stats, tensors_and_options)
    context = by_triton.Context(*tensors_and_options)
    return by_triton.sink_attention_bwd(dout, q, k, v, out, lse, sink_stats, context, streams)


_ARGUMENTS = (
    "Tensor sink_positions, Tensor inter_sink_bias, Tensor? sink_logits, Tensor? seq_lens, Tensor? seq_starts, "
    "Tensor? cu_seqlens, Tensor? dropout_seed, "
    "bool causal, float scale, float dropout_p, SymInt? max_seqlen, str? impl, str? backend"
)
sink_attention_fwd = define(
    f"sink_attention_fwd(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_fwd,
    cuda=_fwd,
    fake=_fake_fwd,
    options=SinkAttentionOptions,
)
sink_attention_bwd = define(
    "sink_attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor sink_stats, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_bwd,
    cuda=_bwd,
    fake=_fake_bwd,
    options=SinkAttentionOptions,
)

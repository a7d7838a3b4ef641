"""sink_attention by Triton kernels: the fused path, and the correction of an unbiased attention (CUDA).

Both return the same three tensors, so that either is one operator to its callers.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn._options import SinkAttentionOptions
from recattn.ops._plans import replayed
from recattn.ops._support import launched_dropout, triton_kernels
from recattn.ops.backends import BACKENDS, AttentionBackend, empty_backward, empty_forward
from recattn.ops.sink_attention.dispatch import FUSED, resolve


class Context(NamedTuple):
    """The arguments of a call besides q, k and v."""

    sink_positions: Tensor
    inter_sink_bias: Tensor
    sink_logits: Tensor | None
    seq_lens: Tensor | None
    seq_starts: Tensor | None
    cu_seqlens: Tensor | None
    dropout_seed: Tensor | None
    options: SinkAttentionOptions

    @property
    def backend_options(self) -> dict[str, Any]:
        lengths = {"cu_seqlens": self.cu_seqlens, "max_seqlen": self.options.max_seqlen}
        return {"causal": self.options.causal, "scale": self.options.scale, **lengths}

    def backend(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionBackend | None:
        """The backend to correct; None: the fused kernel runs."""
        impl, backend = self.options.impl, self.options.backend
        if is_on_gpu(q):  # the interpreter runs what the options name
            impl, backend = resolve(self.options, q, k, v, self.sink_positions, self.seq_lens, self.cu_seqlens)
        return None if impl == FUSED or q.numel() == 0 or backend is None else BACKENDS[backend]


def is_on_gpu(x: Tensor) -> bool:
    """A function, so that a dry run of the launches can answer for a CPU tensor."""
    return x.device.type == "cuda"


def sink_attention_fwd(q: Tensor, k: Tensor, v: Tensor, c: Context, keeps_streams: bool) -> tuple:
    """out, lse and sink_stats.

    keeps_streams: on the fused path also the Streams of the call, for its backward, and sink_stats holds anything where
    a sink is ignored.
    """
    backend = c.backend(q, k, v)
    return _fused_fwd(q, k, v, c, keeps_streams) if backend is None else _correction_fwd(q, k, v, c, backend)


def sink_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sink_stats: Tensor, c: Context, streams
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, dbias, dsink_logits. `streams` None: it is not known what the forward was."""
    backend = c.backend(q, k, v) if streams is None else None
    if backend is None:
        dq, dk, dv, dbias = _fused_bwd(dout, q, k, v, out, lse, sink_stats, c, streams)
    else:
        dq, dk, dv, dbias = _correction_bwd(dout, q, k, v, out, lse, sink_stats, c, backend)
    dsink_logits = None if c.sink_logits is None else _dsink_logits(dout, out, lse, c.sink_logits, c.seq_lens)
    return dq, dk, dv, dbias.to(c.inter_sink_bias.dtype), dsink_logits


def empty_fwd(q: Tensor, v: Tensor, sink_positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised out [B, Hq, N, Dv] (packed [T, Hq, Dv]), lse [B, Hq, N] ([T, Hq]), sink_stats [2, B, Hq, M]."""
    out, lse = empty_forward(q, v)
    # Zeros, for what belongs to sinks that are ignored is not written.
    return out, lse, lse.new_zeros(2, sink_positions.shape[0], q.shape[1], sink_positions.shape[1])


empty_bwd = empty_backward


# --- The fused path ---


@replayed
def _fused_fwd(q: Tensor, k: Tensor, v: Tensor, c: Context, keeps_streams: bool) -> tuple:
    kernels = triton_kernels("sink_attention")
    out, lse = empty_forward(q, v)
    sink_stats = lse.new_empty(2, c.sink_positions.shape[0], q.shape[1], c.sink_positions.shape[1])
    if not keeps_streams:  # the kernel writes nothing for a sink that is ignored
        sink_stats.zero_()
    sinks, lengths = _sinks_and_lengths(c)
    streams = kernels.launch_sink_attention_streams(q, c.sink_positions, lengths)
    dropout = launched_dropout(c.dropout_seed, c.options.dropout_p)
    kernels.launch_sink_attention_fwd(
        q, k, v, out, lse, sink_stats, sinks, lengths, streams, dropout, options=c.options
    )
    return out, lse, sink_stats, streams


@replayed
def _fused_bwd(dout, q, k, v, out, lse, sink_stats, c: Context, streams) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = triton_kernels("sink_attention")
    dq, dk, dv = empty_bwd(q, k, v)
    sinks, lengths = _sinks_and_lengths(c)
    if streams is None:
        streams = kernels.launch_sink_attention_streams(q, c.sink_positions, lengths)
    dropout = launched_dropout(c.dropout_seed, c.options.dropout_p)
    sink_delta = kernels.launch_sink_attention_bwd(
        *(q, k, v, out, dout, lse, sink_stats, (dq, dk, dv), sinks, lengths, streams, dropout), options=c.options
    )
    dbias = kernels.launch_sink_attention_pairs_bwd(
        *(q, k, v, dout, sink_stats, sink_delta, (None, dk, dv), sinks, lengths, dropout),
        options=c.options,
        corrects=False,
    )
    return dq, dk, dv, dbias


def _sinks_and_lengths(c: Context):
    """A call's SinkInputs and Lengths, as the launchers take them."""
    kernels = triton_kernels("sink_attention")
    sinks = kernels.SinkInputs(c.sink_positions, c.inter_sink_bias, c.sink_logits)
    return sinks, kernels.as_lengths(c.seq_lens, c.seq_starts, c.cu_seqlens)


# --- The correction ---


def _correction_fwd(
    q: Tensor, k: Tensor, v: Tensor, c: Context, backend: AttentionBackend
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = backend.forward(q, k, v, **c.backend_options)
    if c.sink_logits is not None:
        # One more term of each row's softmax. The correction finds it in out and lse.
        logits = _per_row(c.sink_logits, lse)
        # Infinity is NaN in a softmax; of sigmoid it would be 0.
        logits = logits.nan_to_num(math.nan, posinf=math.nan, neginf=-math.inf)
        out *= torch.sigmoid(lse - logits).unsqueeze(-1)
        torch.logaddexp(lse, logits, out=lse)
    sink_stats = triton_kernels("sink_attention").launch_sink_attention_correction_fwd(
        q, k, v, out, lse, *_sinks_and_lengths(c), options=c.options
    )
    return out, lse, sink_stats


def _correction_bwd(
    dout, q, k, v, out, lse, sink_stats, c: Context, backend: AttentionBackend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks, lengths = _sinks_and_lengths(c)
    backend_lse = lse.clone()
    sink_delta = triton_kernels("sink_attention").launch_sink_attention_correction_delta(
        out, dout, c.sink_positions, sink_stats, backend_lse, lengths
    )
    dq, dk, dv = backend.backward(dout, q, k, v, out, backend_lse, **c.backend_options)
    dbias = triton_kernels("sink_attention").launch_sink_attention_pairs_bwd(
        *(q, k, v, dout, sink_stats, sink_delta, (dq, dk, dv), sinks, lengths), options=c.options, corrects=True
    )
    return dq, dk, dv, dbias


# --- sink_logits ---


def _per_row(sink_logits: Tensor, lse: Tensor) -> Tensor:
    """[Hq] to be broadcast against lse [B, Hq, N] or [T, Hq]."""
    logits = sink_logits.to(lse.dtype)
    return logits[:, None] if lse.dim() == 3 else logits


def _dsink_logits(dout: Tensor, out: Tensor, lse: Tensor, sink_logits: Tensor, seq_lens: Tensor | None) -> Tensor:
    """-Σ exp(sink_logit - lse) · dO·O over the rows of each head."""
    rows = (dout.float() * out).sum(-1) * (_per_row(sink_logits, lse) - lse).exp()
    if seq_lens is not None:  # padding sees no key
        rows = rows.masked_fill(lse.isneginf(), 0)
    return -rows.sum((0, 2) if lse.dim() == 3 else 0).to(sink_logits.dtype)

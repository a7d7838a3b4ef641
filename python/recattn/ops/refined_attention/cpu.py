"""refined_attention on a CPU.

C++ where the extension is compiled: short sequences whole (csrc/cpu/refined_attention.cpp: a thread computes one batch
and head at a time, in its cache), longer ones of the mechanism "simple" as

    x = A [W_q | W_k]          source "logits": linear attention (csrc/cpu/refined_projection.cpp); "weights": plain
                               attention with [W_q | W_k] as values
    out = softmax(mask(M)) V   plain attention with the halves of x as queries and keys

where plain attention is sink_attention without sinks (csrc/cpu/sink_attention.cpp). The stochastic mechanism runs by
the kernels of wasserstein_attention. All else runs as chunked PyTorch matmuls.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from recattn._extension import MISSING
from recattn._options import RefinedAttentionOptions, WassersteinAttentionOptions
from recattn.ops._support import longest_sequence, resolve_scale, sequence_indices, token_positions
from recattn.ops.index_checks import checked_lengths, checked_offsets, checked_starts
from recattn.ops.refined_attention import chunked
from recattn.ops.sink_attention import no_sinks

_OPS = torch.ops.recattn
# The most positions computed whole, where a thread holds 12 to 14 matrices N × N: up to 4 MB.
_LONGEST_IN_CPP = 256
# The most positions for which "stochastic" of raw logits multiplies A and W; the linear form is faster beyond.
_LONGEST_QUADRATIC = 1024


def unsupported_reason(q: Tensor | None, dropout_p: float) -> str | None:
    """Why impl="cpu" cannot run a call (None: it can). Its float64 is chunked PyTorch matmuls, which need no C++."""
    if q is not None and q.dtype == torch.float64:
        return "its dropout computes in float32, and q is float64" if dropout_p > 0 else None
    return MISSING.get("cpu")


def _runs_in_cpp(q: Tensor, v: Tensor) -> bool:
    return "cpu" not in MISSING and q.dtype != torch.float64 and q.numel() > 0 and v.numel() > 0


def _is_long(longest: int, w_q: Tensor, options: RefinedAttentionOptions) -> bool:
    """Whether plain attention serves the second step: A W_q is narrower than A."""
    return options.mechanism == "simple" and longest > max(_LONGEST_IN_CPP, w_q.shape[-1])


def _is_short(longest: int, options: RefinedAttentionOptions) -> bool:
    if options.dropout_p > 0:  # the chunks have none
        return True
    if options.mechanism != "stochastic":
        return longest <= _LONGEST_IN_CPP
    # Only the chunks have the linear form of long sequences.
    return options.source == "weights" or longest <= _LONGEST_QUADRATIC


# --- Short sequences ---


def _cpp_options(options: RefinedAttentionOptions) -> tuple[bool, bool, bool, float | None]:
    additive, softmax_source = options.mechanism == "additive", options.source == "weights"
    return additive, softmax_source, options.causal, options.scale


def cpp_fwd(q, k, v, w_q, w_k, w_v, lengths, dropout_seed, options: RefinedAttentionOptions) -> Tensor:
    return _OPS.refined_attention_pairs_fwd.default(
        q, k, v, w_q, w_k, w_v, *lengths, *_cpp_options(options), dropout_seed, options.dropout_p
    )


def cpp_bwd(dout, q, k, v, w_q, w_k, w_v, lengths, dropout_seed, options: RefinedAttentionOptions) -> list[Tensor]:
    """dq, dk, dv and the gradients of the matrices."""
    gradients = _OPS.refined_attention_pairs_bwd.default(
        dout, q, k, v, w_q, w_k, w_v, *lengths, *_cpp_options(options), dropout_seed, options.dropout_p
    )
    return list(gradients if w_v is not None else gradients[:-1])


def gaussian_options(options: RefinedAttentionOptions | WassersteinAttentionOptions) -> tuple:
    """The options of the C++ operators wasserstein_attention_pairs_*."""
    return options.source == "weights", options.causal, options.scale, options.dropout_p


def stochastic_fwd(q, k, v, w_q, w_k, lengths, dropout_seed, options: RefinedAttentionOptions) -> Tensor:
    tensors = (q, None, k, None, v, None, w_q, w_k, *lengths, dropout_seed)
    return _OPS.wasserstein_attention_pairs_fwd.default(*tensors, *gaussian_options(options))[0]


def stochastic_bwd(dout, q, k, v, w_q, w_k, lengths, dropout_seed, options: RefinedAttentionOptions) -> list[Tensor]:
    """dq, dk, dv and the gradients of the matrices."""
    tensors = (q, None, k, None, v, None, w_q, w_k, *lengths, dropout_seed)
    gradients = _OPS.wasserstein_attention_pairs_bwd.default(dout, None, *tensors, *gaussian_options(options))
    return [x for x, given in zip(gradients, tensors, strict=False) if given is not None]


# --- Long sequences ---


def long_fwd(q, k, v, w_q, w_k, lengths, dropout_seed, options: RefinedAttentionOptions) -> tuple[Tensor, tuple]:
    """The output, and for the backward queries, keys, out, row_stats and (source "weights") x and its row_stats."""
    if options.source == "logits":
        settings = (options.causal, options.scale)
        queries, keys = _OPS.refined_projection_cpu_fwd.default(q, k, w_q, w_k, *lengths, *settings)
        of_source = ()
    else:
        values = _as_values(w_q, w_k, q, lengths)
        x, row_stats = _attend(q.float(), k.float(), values, lengths, None, options, _source_scale(q, options), 0.0)
        queries, keys = x.chunk(2, dim=-1)
        if not options.causal:  # what means of W share would cancel in the backward, and changes no softmax
            keys = keys - _mean_token(keys, lengths)
        of_source = (x, row_stats)
    scale = 1 / math.sqrt(w_q.shape[-1])
    out, row_stats = _attend(queries, keys, v.float(), lengths, dropout_seed, options, scale, options.dropout_p)
    return out.to(v.dtype), (queries, keys, out, row_stats, *of_source)


def long_bwd(
    dout, q, k, v, w_q, w_k, lengths, dropout_seed, options: RefinedAttentionOptions, saved: tuple
) -> list[Tensor]:
    """dq, dk, dv, dw_q, dw_k."""
    if not saved:
        _, saved = long_fwd(q, k, v, w_q, w_k, lengths, dropout_seed, options)
    queries, keys, out, row_stats, *of_source = saved
    scale = 1 / math.sqrt(w_q.shape[-1])
    dqueries, dkeys, dv = _attend_backward(
        dout.float(),
        queries,
        keys,
        v.float(),
        out,
        row_stats,
        lengths,
        dropout_seed,
        options,
        scale,
        options.dropout_p,
    )
    if options.source == "logits":
        settings = (options.causal, options.scale)
        dq, dk, *dw = _OPS.refined_projection_cpu_bwd.default(dqueries, dkeys, q, k, w_q, w_k, *lengths, *settings)
    else:
        x, row_stats = of_source
        dx, values = torch.cat([dqueries, dkeys], dim=-1), _as_values(w_q, w_k, q, lengths)
        dq, dk, dvalues = _attend_backward(
            dx, q.float(), k.float(), values, x, row_stats, lengths, None, options, _source_scale(q, options), 0.0
        )
        dw = _sum_of_sequences(dvalues, lengths, w_q.shape[-2]).chunk(2, dim=-1)
        dw = [_sum_of_heads(part, w) for part, w in zip(dw, (w_q, w_k), strict=True)]
    return [x.to(q.dtype) for x in (dq, dk, dv, *dw)]


def _source_scale(q: Tensor, options: RefinedAttentionOptions) -> float:
    return resolve_scale(options.scale, q.shape[-1])


def _mean_token(x: Tensor, lengths: tuple[Tensor | None, ...]) -> Tensor:
    """The mean of each sequence, to be subtracted from its tokens; x is 0 at padding."""
    seq_lens, _, cu_seqlens = lengths
    if cu_seqlens is not None:
        sequence, counts = sequence_indices(cu_seqlens, len(x)), cu_seqlens.diff().clamp(min=1)
        sums = x.new_zeros(len(counts), *x.shape[1:]).index_add_(0, sequence, x)
        return (sums / counts.view(-1, 1, 1))[sequence]
    count = x.shape[2] if seq_lens is None else seq_lens.clamp(min=1).view(-1, 1, 1, 1)
    return x.sum(2, keepdim=True) / count


def _as_values(w_q: Tensor, w_k: Tensor, q: Tensor, lengths: tuple[Tensor | None, ...]) -> Tensor:
    """The rows of [W_q | W_k] at the positions of all tokens as float32 values, [B, H, N, 2R] or [T, H, 2R]."""
    heads = [q.shape[1]] if w_q.dim() == 3 or w_k.dim() == 3 else []
    w = torch.cat([w.float().expand(*heads, *w.shape[-2:]) for w in (w_q, w_k)], dim=-1)
    cu_seqlens = lengths[2]
    if cu_seqlens is None:
        return w[..., : q.shape[2], :].expand(*q.shape[:3], -1)
    return w[..., token_positions(cu_seqlens, len(q)), :].expand(q.shape[1], -1, -1).transpose(0, 1)


def _sum_of_sequences(dvalues: Tensor, lengths: tuple[Tensor | None, ...], rows: int) -> Tensor:
    """The sum over the sequences, [H, N, 2R], or of packed ones [H, Nmax, 2R]."""
    cu_seqlens = lengths[2]
    if cu_seqlens is None:
        return dvalues.sum(0)
    total = dvalues.new_zeros(rows, *dvalues.shape[1:])
    for start, stop in pairwise(cu_seqlens.tolist()):
        total[: stop - start] += dvalues[start:stop]
    return total.transpose(0, 1)


def _sum_of_heads(dw: Tensor, w: Tensor) -> Tensor:
    """The gradient of `w` from that of its first N rows, [H, N, R]."""
    out = dw.new_zeros(w.shape)
    out[..., : dw.shape[1], :] = dw if w.dim() == 3 else dw.sum(0)
    return out


def _attend(q, k, v, lengths, dropout_seed, options, scale: float, dropout_p: float) -> tuple[Tensor, Tensor]:
    """softmax(mask(scale · Q Kᵀ)) V, and row_stats for the backward."""
    tensors = (q, k, v, *no_sinks(q, lengths[2]), None, *lengths, dropout_seed)
    out, _, row_stats = _OPS.sink_attention_cpu_fwd.default(*tensors, options.causal, scale, dropout_p)
    return out, row_stats


def _attend_backward(
    dout, q, k, v, out, row_stats, lengths, dropout_seed, options, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv."""
    tensors = (dout, q, k, v, out, row_stats, *no_sinks(q, lengths[2]), None, *lengths, dropout_seed)
    return _OPS.sink_attention_cpu_bwd.default(*tensors, options.causal, scale, dropout_p)[:3]


# --- The operators' kernels ---


def refined_attention_fwd(
    q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, dropout_seed, options: RefinedAttentionOptions
) -> Tensor | tuple[Tensor, tuple]:
    lengths, longest = _checked(q, w_q, (seq_lens, seq_starts, cu_seqlens), options)
    if _runs_in_cpp(q, v):
        if _is_long(longest, w_q, options):
            return long_fwd(q, k, v, w_q, w_k, lengths, dropout_seed, options)
        if _is_short(longest, options):
            if options.mechanism == "stochastic":
                return stochastic_fwd(q, k, v, w_q, w_k, lengths, dropout_seed, options)
            return cpp_fwd(q, k, v, w_q, w_k, w_v, lengths, dropout_seed, options)
    if seq_lens is not None:
        seq_lens = checked_lengths("seq_lens", seq_lens, longest)
        seq_starts = None if seq_starts is None else checked_starts(seq_starts, seq_lens, longest)
        lengths = (seq_lens, seq_starts, None)
    return chunked.refined_attention_fwd(q, k, v, w_q, w_k, w_v, *lengths, options=options)


def refined_attention_bwd(
    dout,
    q,
    k,
    v,
    w_q,
    w_k,
    w_v,
    seq_lens,
    seq_starts,
    cu_seqlens,
    dropout_seed,
    options: RefinedAttentionOptions,
    saved: tuple,
) -> list[Tensor]:
    lengths, longest = _checked(q, w_q, (seq_lens, seq_starts, cu_seqlens), options)
    if _runs_in_cpp(q, v):
        if _is_long(longest, w_q, options):
            return long_bwd(dout, q, k, v, w_q, w_k, lengths, dropout_seed, options, saved)
        if _is_short(longest, options):
            if options.mechanism == "stochastic":
                return stochastic_bwd(dout, q, k, v, w_q, w_k, lengths, dropout_seed, options)
            return cpp_bwd(dout, q, k, v, w_q, w_k, w_v, lengths, dropout_seed, options)
    return chunked.refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, *lengths, options=options)


def _checked(
    q: Tensor, w_q: Tensor, lengths: tuple[Tensor | None, ...], options: RefinedAttentionOptions
) -> tuple[tuple[Tensor | None, ...], int]:
    """The lengths, and N or the length of the longest packed sequence. Windows are checked in C++."""
    seq_lens, seq_starts, cu_seqlens = lengths
    if cu_seqlens is None:
        return lengths, q.shape[2]
    cu_seqlens = checked_offsets("cu_seqlens", cu_seqlens, q.shape[0])
    return (seq_lens, seq_starts, cu_seqlens), longest_sequence(cu_seqlens, w_q, options.max_seqlen)

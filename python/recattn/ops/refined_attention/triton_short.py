"""refined_attention of short sequences by Triton kernels, whole in one program."""

import functools

import torch
from torch import Tensor

from recattn._graphs import constant_in_graphs
from recattn._options import RefinedAttentionOptions
from recattn.ops._plans import replayed
from recattn.ops._support import (
    launched_dropout,
    length_bound,
    resolve_scale,
    triton_kernels,
    triton_unsupported_reason,
)


def unsupported_reason(q: Tensor, v: Tensor, length: int, mechanism: str) -> str | None:
    """Why these kernels cannot serve a call of up to `length` tokens a sequence (None: they can). R is no matter."""
    if mechanism == "stochastic":
        return "it has no mechanism 'stochastic'"
    if q.dtype == torch.float64:
        return "it computes in float32, and q is float64"
    unusable = triton_unsupported_reason(q.device.type, q.dtype)
    if unusable is not None:
        return unusable
    longest, widest = _limits(q.device.type, q.device.index, q.dtype)
    dtype = str(q.dtype).removeprefix("torch.")
    if length > longest:
        return f"it holds up to {longest} tokens in {dtype}, and there are {length}"
    if max(q.shape[-1], v.shape[-1]) > widest:
        return f"it holds head dims up to {widest}, and one is {max(q.shape[-1], v.shape[-1])}"
    return None


@constant_in_graphs
def _limits(device_type: str, device_index: int | None, dtype: torch.dtype) -> tuple[int, int]:
    """The most tokens and the widest head."""
    return _cached_limits(device_type, device_index, dtype)


@functools.cache
def _cached_limits(device_type: str, device_index: int | None, dtype: torch.dtype) -> tuple[int, int]:
    from recattn.triton_kernels.common.launch import architecture_of

    kernels = triton_kernels("refined_attention")
    device = torch.device(device_type) if device_index is None else torch.device(device_type, device_index)
    architecture = architecture_of(torch.empty(0, device=device))
    return kernels.largest_n(dtype, architecture), kernels.LARGEST_HEAD_DIM


def refined_attention_fwd(
    q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, dropout_seed, options
) -> tuple[Tensor, tuple]:
    """The output, and the squares for the backward: G, and W_v as the kernels read it."""
    if v.numel() == 0:
        return v.new_empty(v.shape), ()
    lengths, options = (seq_lens, seq_starts, cu_seqlens), _with_positions(options, q, w_q, cu_seqlens)
    out, squares = _fwd(q, k, v, w_q, w_k, w_v, lengths, dropout_seed, options)
    return out, (squares,)


def refined_attention_bwd(
    dout, q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, cu_seqlens, dropout_seed, options, squares=None
) -> list[Tensor]:
    if v.numel() == 0:
        return [x.new_zeros(x.shape) for x in (q, k, v, w_q, w_k, w_v) if x is not None]
    lengths, options = (seq_lens, seq_starts, cu_seqlens), _with_positions(options, q, w_q, cu_seqlens)
    return _bwd(dout, q, k, v, w_q, w_k, w_v, lengths, dropout_seed, options, squares)


@replayed
def _fwd(q, k, v, w_q, w_k, w_v, lengths, dropout_seed, options) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels("refined_attention")
    lengths, options = triton_kernels("common.ragged").as_lengths(*lengths), _with_scale(options, q)
    squares = kernels.launch_weights_product(w_q, w_k, w_v, kernels.batch_sizes(q, lengths, options)[2])
    dropout = launched_dropout(dropout_seed, options.dropout_p)
    return kernels.launch_refined_attention_fwd(q, k, v, squares, w_v, lengths, options, dropout=dropout), squares


@replayed
def _bwd(dout, q, k, v, w_q, w_k, w_v, lengths, dropout_seed, options, squares) -> list[Tensor]:
    kernels = triton_kernels("refined_attention")
    lengths, options = triton_kernels("common.ragged").as_lengths(*lengths), _with_scale(options, q)
    positions = kernels.batch_sizes(q, lengths, options)[2]
    if squares is None:
        squares = kernels.launch_weights_product(w_q, w_k, w_v, positions)
    dropout = launched_dropout(dropout_seed, options.dropout_p)
    grads = kernels.launch_refined_attention_bwd(dout, q, k, v, squares, w_v, lengths, options, dropout=dropout)
    dweights = kernels.launch_weights_bwd(w_q, w_k, w_v, grads.dg, grads.dw_v, positions)
    return [grads.dq, grads.dk, grads.dv, *dweights]


def _with_positions(options: RefinedAttentionOptions, q: Tensor, w_q: Tensor, cu_seqlens: Tensor | None):
    """With the rows of W that packed sequences may use as `max_seqlen`, one of a few numbers: each has its plan."""
    if cu_seqlens is None:
        return options
    longest = length_bound(q, w_q, cu_seqlens, options.max_seqlen)
    blocks = triton_kernels("common.launch").host_block_width(longest)
    return options._replace(max_seqlen=min(blocks, w_q.shape[-2]))


def _with_scale(options: RefinedAttentionOptions, q: Tensor) -> RefinedAttentionOptions:
    return options._replace(scale=resolve_scale(options.scale, q.shape[-1])) if options.scale is None else options

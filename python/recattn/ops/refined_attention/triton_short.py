"""refined_attention of short sequences by Triton kernels, whole in one program."""

import functools

import torch
from torch import Tensor

from recattn._graphs import constant_in_graphs
from recattn._options import RefinedAttentionOptions
from recattn.ops._plans import replayed
from recattn.ops._support import (
    contiguous,
    launched_dropout,
    resolve_scale,
    triton_kernels,
    triton_unsupported_reason,
)


def unsupported_reason(q: Tensor, v: Tensor, mechanism: str) -> str | None:
    """Why these kernels cannot serve a call (None: they can). R is no matter."""
    if mechanism == "stochastic":
        return "it has no mechanism 'stochastic'"
    if q.dtype == torch.float64:
        return "it computes in float32, and q is float64"
    unusable = triton_unsupported_reason(q.device.type, q.dtype)
    if unusable is not None:
        return unusable
    longest, widest = _limits(q.device.type, q.device.index, q.dtype)
    dtype = str(q.dtype).removeprefix("torch.")
    if q.shape[2] > longest:
        return f"it holds up to {longest} tokens in {dtype}, and there are {q.shape[2]}"
    if max(q.shape[3], v.shape[3]) > widest:
        return f"it holds head dims up to {widest}, and one is {max(q.shape[3], v.shape[3])}"
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


def refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options) -> tuple[Tensor, tuple]:
    """The output, and the squares for the backward: G, and W_v as the kernels read it."""
    if v.numel() == 0:
        return v.new_empty(v.shape), ()
    out, squares = _fwd(q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options)
    return out, (squares,)


def refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options, squares=None) -> list[Tensor]:
    if v.numel() == 0:
        return [x.new_zeros(x.shape) for x in (q, k, v, w_q, w_k, w_v) if x is not None]
    return _bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options, squares)


@replayed
def _fwd(q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options) -> tuple[Tensor, Tensor]:
    kernels = triton_kernels("refined_attention")
    squares = kernels.launch_weights_product(w_q, w_k, w_v, q.shape[2])
    dropout = launched_dropout(dropout_seed, options.dropout_p)
    seq_lens, options = contiguous(seq_lens), _with_scale(options, q)
    return kernels.launch_refined_attention_fwd(q, k, v, squares, w_v, seq_lens, options, dropout=dropout), squares


@replayed
def _bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options, squares) -> list[Tensor]:
    kernels = triton_kernels("refined_attention")
    if squares is None:
        squares = kernels.launch_weights_product(w_q, w_k, w_v, q.shape[2])
    dropout = launched_dropout(dropout_seed, options.dropout_p)
    seq_lens, options = contiguous(seq_lens), _with_scale(options, q)
    grads = kernels.launch_refined_attention_bwd(dout, q, k, v, squares, w_v, seq_lens, options, dropout=dropout)
    dweights = kernels.launch_weights_bwd(w_q, w_k, w_v, grads.dg, grads.dw_v, q.shape[2])
    return [grads.dq, grads.dk, grads.dv, *dweights]


def _with_scale(options: RefinedAttentionOptions, q: Tensor) -> RefinedAttentionOptions:
    return options._replace(scale=resolve_scale(options.scale, q.shape[3])) if options.scale is None else options

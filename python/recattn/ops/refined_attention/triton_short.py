"""refined_attention of short sequences by Triton kernels, whole in one program."""

import torch
from torch import Tensor

from recattn._options import RefinedAttentionOptions
from recattn.ops._support import (
    constant_in_graphs,
    contiguous,
    launched_dropout,
    resolve_scale,
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
    longest, widest = _limits(q.device.type, q.dtype)
    dtype = str(q.dtype).removeprefix("torch.")
    if q.shape[2] > longest:
        return f"it holds up to {longest} tokens in {dtype}, and there are {q.shape[2]}"
    if max(q.shape[3], v.shape[3]) > widest:
        return f"it holds head dims up to {widest}, and one is {max(q.shape[3], v.shape[3])}"
    return None


@constant_in_graphs
def _limits(device_type: str, dtype: torch.dtype) -> tuple[int, int]:
    """The most tokens and the widest head."""
    from recattn.triton_kernels.common.launch import architecture_of
    from recattn.triton_kernels.refined_attention.config import LARGEST_HEAD_DIM, largest_n

    return largest_n(dtype, architecture_of(torch.empty(0, device=device_type))), LARGEST_HEAD_DIM


def refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options) -> Tensor:
    from recattn.triton_kernels.refined_attention.short import launch_refined_attention_fwd

    dropout = launched_dropout(dropout_seed, options.dropout_p)
    seq_lens, options = contiguous(seq_lens), _with_scale(options, q)
    return launch_refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, options, dropout=dropout)


def refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options) -> list[Tensor]:
    from recattn.triton_kernels.refined_attention.short_backward import launch_refined_attention_bwd

    dropout = launched_dropout(dropout_seed, options.dropout_p)
    seq_lens, options = contiguous(seq_lens), _with_scale(options, q)
    return launch_refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, options, dropout=dropout)


def _with_scale(options: RefinedAttentionOptions, q: Tensor) -> RefinedAttentionOptions:
    return options._replace(scale=resolve_scale(options.scale, q.shape[3]))

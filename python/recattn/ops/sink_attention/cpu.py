"""sink_attention on a CPU, in C++ (csrc/cpu/sink_attention.cpp), which checks the values of index tensors itself.

`c` holds a call's arguments besides q, k and v: the other tensors, then the options.
"""

import torch
from torch import Tensor

from recattn._extension import MISSING

_OPS = torch.ops.recattn


def unsupported_reason(q: Tensor | None) -> str | None:
    if q is not None and q.dtype == torch.float64:
        return "it computes in float32, and q is float64"
    return MISSING.get("cpu")


def sink_attention_fwd(q: Tensor, k: Tensor, v: Tensor, c: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and row_stats, laid out as by `empty_fwd`."""
    *tensors, options = c
    causal, scale, dropout_p, *_ = options
    return _OPS.sink_attention_cpu_fwd.default(q, k, v, *tensors, causal, scale, dropout_p)


def sink_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, row_stats: Tensor, c: tuple
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias, dsink_logits (empty without sink_logits)."""
    *tensors, options = c
    causal, scale, dropout_p, *_ = options
    return _OPS.sink_attention_cpu_bwd.default(dout, q, k, v, out, row_stats, *tensors, causal, scale, dropout_p)


# --- Layouts ---


def empty_fwd(q: Tensor, v: Tensor, _sink_positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised out [B, Hq, N, Dv] (packed [T, Hq, Dv]), lse [B, Hq, N] ([T, Hq]), row_stats [2, *lse.shape]."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    if q.dim() == 4 and q.transpose(1, 2).is_contiguous():
        out = _empty_token_major(out)
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
    return out, lse, lse.new_empty(2, *lse.shape)


def empty_bwd(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_token_major(q), _empty_token_major(k), _empty_token_major(v)


def _empty_token_major(x: Tensor) -> Tensor:
    """Uninitialised, with x's shape; [B, H, N, D] in the memory layout of [B, N, H, D]."""
    return x.new_empty(x.shape) if x.dim() == 3 else x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)

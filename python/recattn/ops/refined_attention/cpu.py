"""refined_attention on a CPU.

Short sequences run in C++ where the extension is compiled (csrc/cpu/refined_attention.cpp): a thread computes one batch
and head at a time, in its cache. Longer sequences and the stochastic mechanism run as chunked PyTorch matmuls.
"""

import torch
from torch import Tensor

from recattn._check import checked_lengths
from recattn._extension import MISSING
from recattn._options import RefinedAttentionOptions
from recattn.ops.refined_attention import chunked

_OPS = torch.ops.recattn
# The most positions in C++, where a thread holds 12 to 14 matrices N × N: up to 4 MB.
_LONGEST_IN_CPP = 256


# --- C++ (csrc/cpu/refined_attention.cpp) ---


def _runs_in_cpp(q: Tensor, v: Tensor, options: RefinedAttentionOptions) -> bool:
    return (
        "cpu" not in MISSING
        and options.mechanism != "stochastic"
        and q.dtype != torch.float64
        and q.shape[2] <= _LONGEST_IN_CPP
        and q.numel() > 0
        and v.numel() > 0
    )


def _cpp_options(options: RefinedAttentionOptions) -> tuple[bool, bool, bool, bool, float | None]:
    additive, softmax_source = options.mechanism == "additive", options.source == "weights"
    return additive, softmax_source, options.causal, options.left_padded, options.scale


def cpp_fwd(q, k, v, w_q, w_k, w_v, seq_lens, options: RefinedAttentionOptions) -> Tensor:
    return _OPS.refined_attention_pairs_fwd.default(q, k, v, w_q, w_k, w_v, seq_lens, *_cpp_options(options))


def cpp_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, options: RefinedAttentionOptions) -> list[Tensor]:
    """dq, dk, dv and the gradients of the matrices."""
    gradients = _OPS.refined_attention_pairs_bwd.default(dout, q, k, v, w_q, w_k, w_v, seq_lens, *_cpp_options(options))
    return list(gradients if w_v is not None else gradients[:-1])


# --- The operators' kernels ---


def refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, options: RefinedAttentionOptions) -> Tensor:
    if _runs_in_cpp(q, v, options):
        return cpp_fwd(q, k, v, w_q, w_k, w_v, seq_lens, options)
    if seq_lens is not None:
        seq_lens = checked_lengths("seq_lens", seq_lens, q.shape[2])
    return chunked.refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, options)


def refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, options: RefinedAttentionOptions) -> list[Tensor]:
    backward = cpp_bwd if _runs_in_cpp(q, v, options) else chunked.refined_attention_bwd
    return backward(dout, q, k, v, w_q, w_k, w_v, seq_lens, options)

"""refined_attention on a CPU.

Short sequences run in C++ where the extension is compiled (csrc/cpu/refined_attention.cpp): a thread computes one batch
and head at a time, in its cache. So does the stochastic mechanism, by the kernels of wasserstein_attention. Longer
sequences run as chunked PyTorch matmuls.
"""

import torch
from torch import Tensor

from recattn._check import checked_lengths
from recattn._extension import MISSING
from recattn._options import RefinedAttentionOptions, WassersteinAttentionOptions
from recattn.ops.refined_attention import chunked

_OPS = torch.ops.recattn
# The most positions in C++, where a thread holds 12 to 14 matrices N × N: up to 4 MB.
_LONGEST_IN_CPP = 256
# The most positions for which "stochastic" of raw logits multiplies A and W; the linear form is faster beyond.
_LONGEST_QUADRATIC = 1024


def dropout_unsupported_reason(q: Tensor | None, mechanism: str) -> str | None:
    """Why dropout cannot run here (None: it can)."""
    if mechanism != "stochastic":
        return "it has no dropout"
    if "cpu" in MISSING:
        return f"its dropout is compiled: {MISSING['cpu']}"
    if q is not None and q.dtype == torch.float64:
        return "its dropout computes in float32, and q is float64"
    return None


# --- C++ (csrc/cpu/refined_attention.cpp) ---


def _runs_in_cpp(q: Tensor, v: Tensor, options: RefinedAttentionOptions) -> bool:
    if "cpu" in MISSING or q.dtype == torch.float64 or q.numel() == 0 or v.numel() == 0:
        return False
    if options.mechanism != "stochastic":
        return q.shape[2] <= _LONGEST_IN_CPP
    # Only PyTorch's matmuls have the linear form of long sequences.
    return options.source == "weights" or options.dropout_p > 0 or q.shape[2] <= _LONGEST_QUADRATIC


def _cpp_options(options: RefinedAttentionOptions) -> tuple[bool, bool, bool, bool, float | None]:
    additive, softmax_source = options.mechanism == "additive", options.source == "weights"
    return additive, softmax_source, options.causal, options.left_padded, options.scale


def cpp_fwd(q, k, v, w_q, w_k, w_v, seq_lens, options: RefinedAttentionOptions) -> Tensor:
    return _OPS.refined_attention_pairs_fwd.default(q, k, v, w_q, w_k, w_v, seq_lens, *_cpp_options(options))


def cpp_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, options: RefinedAttentionOptions) -> list[Tensor]:
    """dq, dk, dv and the gradients of the matrices."""
    gradients = _OPS.refined_attention_pairs_bwd.default(dout, q, k, v, w_q, w_k, w_v, seq_lens, *_cpp_options(options))
    return list(gradients if w_v is not None else gradients[:-1])


def gaussian_options(options: RefinedAttentionOptions | WassersteinAttentionOptions) -> tuple:
    """The options of the C++ operators wasserstein_attention_pairs_*."""
    return options.source == "weights", options.causal, options.left_padded, options.scale, options.dropout_p


def stochastic_fwd(q, k, v, w_q, w_k, seq_lens, dropout_seed, options: RefinedAttentionOptions) -> Tensor:
    tensors = (q, None, k, None, v, None, w_q, w_k, seq_lens, dropout_seed)
    return _OPS.wasserstein_attention_pairs_fwd.default(*tensors, *gaussian_options(options))[0]


def stochastic_bwd(dout, q, k, v, w_q, w_k, seq_lens, dropout_seed, options: RefinedAttentionOptions) -> list[Tensor]:
    """dq, dk, dv and the gradients of the matrices."""
    tensors = (q, None, k, None, v, None, w_q, w_k, seq_lens, dropout_seed)
    gradients = _OPS.wasserstein_attention_pairs_bwd.default(dout, None, *tensors, *gaussian_options(options))
    return [x for x, given in zip(gradients, tensors, strict=False) if given is not None]


# --- The operators' kernels ---


def refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options: RefinedAttentionOptions) -> Tensor:
    if _runs_in_cpp(q, v, options):
        if options.mechanism == "stochastic":
            return stochastic_fwd(q, k, v, w_q, w_k, seq_lens, dropout_seed, options)
        return cpp_fwd(q, k, v, w_q, w_k, w_v, seq_lens, options)
    if seq_lens is not None:
        seq_lens = checked_lengths("seq_lens", seq_lens, q.shape[2])
    return chunked.refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, options)


def refined_attention_bwd(
    dout, q, k, v, w_q, w_k, w_v, seq_lens, dropout_seed, options: RefinedAttentionOptions
) -> list[Tensor]:
    if _runs_in_cpp(q, v, options):
        if options.mechanism == "stochastic":
            return stochastic_bwd(dout, q, k, v, w_q, w_k, seq_lens, dropout_seed, options)
        return cpp_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, options)
    return chunked.refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, options)

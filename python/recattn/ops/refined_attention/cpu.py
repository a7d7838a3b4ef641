"""refined_attention on a CPU.

Short sequences run in C++ where the extension is compiled (csrc/cpu/refined_attention.cpp): a thread computes one batch
and head at a time, in its cache. Longer sequences and the stochastic mechanism run as chunked PyTorch matmuls.
"""

import torch
from torch import Tensor

from recattn._check import checked_lengths
from recattn._extension import MISSING
from recattn._options import RefinedAttentionOptions
from recattn.ops.refined_attention.chunked import (
    Plan,
    Weights,
    chunked_bwd,
    chunked_fwd,
    heads_apart,
    in_compute_dtype,
    leading,
    plan_of,
)

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


def _cpp_weights(q: Tensor, matrices: list[Tensor], plan: Plan) -> tuple[list[Weights], Tensor]:
    """The matrices of each head with its own (else of all heads), and the same side by side [H or 1, N, P]."""
    n = q.shape[2]
    heads = [Weights(plan, *leading(matrices, head, n)) for head in heads_apart(q, matrices)]
    return heads, torch.stack([weights.rows(slice(0, n)) for weights in heads])


def _cpp_options(plan: Plan, options: RefinedAttentionOptions) -> tuple:
    additive, softmax_source = plan.mechanism == "additive", plan.source == "weights"
    return plan.folded, plan.has_values, additive, softmax_source, plan.causal, options.left_padded, plan.scale


def cpp_fwd(q, k, v, matrices, seq_lens, plan, options) -> Tensor:
    _, weights = _cpp_weights(q, matrices, plan)
    return torch.ops.recattn.refined_attention_pairs_fwd(q, k, v, weights, seq_lens, *_cpp_options(plan, options))


def cpp_bwd(dout, q, k, v, matrices, seq_lens, plan, options) -> list[Tensor]:
    """dq, dk, dv and the gradients of the matrices."""
    heads, weights = _cpp_weights(q, matrices, plan)
    dq, dk, dv, dweights = torch.ops.recattn.refined_attention_pairs_bwd(
        dout, q, k, v, weights, seq_lens, *_cpp_options(plan, options)
    )
    n = q.shape[2]
    dmatrices = [torch.zeros_like(w) for w in matrices]
    for head, head_weights, dw in zip(heads_apart(q, matrices), heads, dweights, strict=True):
        head_weights.add_gradient(slice(0, n), dw)
        head_weights.add_to(leading(dmatrices, head, n))
    return [dq, dk, dv, *dmatrices]


# --- The operators' kernels ---


def refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, options: RefinedAttentionOptions) -> Tensor:
    if seq_lens is not None:
        seq_lens = checked_lengths("seq_lens", seq_lens, q.shape[2])
    forward = cpp_fwd if _runs_in_cpp(q, v, options) else chunked_fwd
    return forward(q, k, v, in_compute_dtype(w_q, w_k, w_v), seq_lens, plan_of(q, w_q, options), options)


def refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, options: RefinedAttentionOptions) -> list[Tensor]:
    backward = cpp_bwd if _runs_in_cpp(q, v, options) else chunked_bwd
    dq, dk, dv, *dmatrices = backward(
        dout, q, k, v, in_compute_dtype(w_q, w_k, w_v), seq_lens, plan_of(q, w_q, options), options
    )
    return [dq, dk, dv, *(dmatrix.to(w_q.dtype) for dmatrix in dmatrices)]

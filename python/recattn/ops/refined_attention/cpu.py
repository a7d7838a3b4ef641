"""refined_attention on a CPU.

Where the extension is compiled, short pairs of sequence and head are computed in C++ (csrc/cpu/refined_attention.cpp),
a thread one at a time, whole in its cache. All else, and the stochastic mechanism, goes through slices of pairs.
"""

import torch
from torch import Tensor

from recattn._check import checked_lengths
from recattn._extension import MISSING
from recattn.ops.refined_attention.chunked import (
    Plan,
    Settings,
    Weights,
    heads_apart,
    in_compute_dtype,
    leading,
    plan_of,
    slices_bwd,
    slices_fwd,
)

# Positions of the longest pair that is computed whole in C++, where a thread works in up to 4 MB: 12 to 14 of N × N.
_LONGEST_PAIR = 256


# --- Pairs in C++ (csrc/cpu/refined_attention.cpp) ---


def _served_by_pairs(q: Tensor, v: Tensor, settings: Settings) -> bool:
    return (
        "cpu" not in MISSING
        and settings.mechanism != "stochastic"
        and q.dtype != torch.float64
        and q.shape[2] <= _LONGEST_PAIR
        and q.numel() > 0
        and v.numel() > 0
    )


def _pair_weights(q: Tensor, matrices: list[Tensor], plan: Plan) -> tuple[list[Weights], Tensor]:
    """The matrices of each head that has its own, and side by side [heads or 1, N, P]."""
    n = q.shape[2]
    heads = [Weights(plan, *leading(matrices, head, n)) for head in heads_apart(q, matrices)]
    return heads, torch.stack([weights.rows(slice(0, n)) for weights in heads])


def _pair_options(plan: Plan, settings: Settings) -> tuple:
    additive, softmax_source = plan.mechanism == "additive", plan.source == "weights"
    return plan.folded, plan.has_values, additive, softmax_source, plan.causal, settings.left_padded, plan.scale


def pairs_fwd(q, k, v, matrices, seq_lens, plan, settings) -> Tensor:
    _, weights = _pair_weights(q, matrices, plan)
    return torch.ops.recattn.refined_attention_pairs_fwd(q, k, v, weights, seq_lens, *_pair_options(plan, settings))


def pairs_bwd(dout, q, k, v, matrices, seq_lens, plan, settings) -> list[Tensor]:
    """dq, dk, dv and the gradients of the matrices."""
    heads, weights = _pair_weights(q, matrices, plan)
    dq, dk, dv, dweights = torch.ops.recattn.refined_attention_pairs_bwd(
        dout, q, k, v, weights, seq_lens, *_pair_options(plan, settings)
    )
    n = q.shape[2]
    dmatrices = [torch.zeros_like(w) for w in matrices]
    for head, head_weights, dw in zip(heads_apart(q, matrices), heads, dweights, strict=True):
        head_weights.add_gradient(slice(0, n), dw)
        head_weights.add_to(leading(dmatrices, head, n))
    return [dq, dk, dv, *dmatrices]


# --- The operators' kernels ---


def refined_attention_fwd(q, k, v, w_q, w_k, w_v, seq_lens, *settings) -> Tensor:
    if seq_lens is not None:
        seq_lens = checked_lengths("seq_lens", seq_lens, q.shape[2])
    settings = Settings(*settings)
    forward = pairs_fwd if _served_by_pairs(q, v, settings) else slices_fwd
    return forward(q, k, v, in_compute_dtype(w_q, w_k, w_v), seq_lens, plan_of(q, w_q, settings), settings)


def refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, seq_lens, *settings) -> list[Tensor]:
    settings = Settings(*settings)
    backward = pairs_bwd if _served_by_pairs(q, v, settings) else slices_bwd
    dq, dk, dv, *dmatrices = backward(
        dout, q, k, v, in_compute_dtype(w_q, w_k, w_v), seq_lens, plan_of(q, w_q, settings), settings
    )
    return [dq, dk, dv, *(dmatrix.to(w_q.dtype) for dmatrix in dmatrices)]

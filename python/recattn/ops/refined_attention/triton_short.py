"""refined_attention of short sequences by Triton kernels, whole in one program."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.ops._support import constant_in_graphs, launched_dropout, triton_unsupported_reason


def refusal(q: Tensor, v: Tensor, mechanism: str) -> str | None:
    """Why a call cannot be served (None: it can), whatever R is."""
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


class Context(NamedTuple):
    """What a call holds besides its tensors q to w_v, as the operators' schemas list it."""

    seq_lens: Tensor | None
    dropout_seed: Tensor | None
    mechanism: str
    source: str
    causal: bool
    left_padded: bool
    scale: float | None
    dropout_p: float
    path: str


def refined_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor | None, *context
) -> Tensor:
    from recattn.triton_kernels.refined_attention.short import launch_refined_attention_fwd

    return launch_refined_attention_fwd(q, k, v, w_q, w_k, w_v, **_options(q, Context(*context)))


def refined_attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor | None, *context
) -> list[Tensor]:
    from recattn.triton_kernels.refined_attention.short import launch_refined_attention_bwd

    return launch_refined_attention_bwd(dout, q, k, v, w_q, w_k, w_v, **_options(q, Context(*context)))


def _options(q: Tensor, c: Context) -> dict[str, object]:
    return {
        "seq_lens": None if c.seq_lens is None else c.seq_lens.contiguous(),
        "dropout": launched_dropout(c.dropout_seed, c.dropout_p),
        "mechanism": c.mechanism,
        "source": c.source,
        "causal": c.causal,
        "left_padded": c.left_padded,
        "scale": 1 / math.sqrt(q.shape[3]) if c.scale is None else c.scale,
    }

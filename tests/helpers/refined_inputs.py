"""Inputs of refined_attention, and how a CPU runs it."""

from itertools import accumulate

import torch
from torch import Tensor

from recattn import refined_attention
from recattn._extension import MISSING


def cpu(*args, **options) -> Tensor:
    """refined_attention as a CPU runs it, with or without the C++ kernels."""
    return refined_attention(*args, **options, impl="chunked" if "cpu" in MISSING else "cpu")


def packed(inputs: dict[str, Tensor], seq_lens: list[int]) -> dict[str, Tensor]:
    """q, k and v [B, H, N, D] without right padding as [T, H, D], the matrices as they are, and cu_seqlens."""
    tokens = {}
    for name in "qkv":
        rows = [x[:, :length].transpose(0, 1) for x, length in zip(inputs[name], seq_lens, strict=True)]
        tokens[name] = torch.cat(rows)
    offsets = torch.tensor([0, *accumulate(seq_lens)], dtype=torch.int32, device=inputs["q"].device)
    return {**inputs, **tokens, "cu_seqlens": offsets}


def views_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """q, k, v and w_q with the same values: heads behind tokens, a cut last axis, a transposed last axis and matrix."""
    return {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.cat([inputs["k"]] * 2, dim=-1)[..., : inputs["k"].shape[-1]],
        "v": inputs["v"].mT.contiguous().mT,
        "w_q": inputs["w_q"].T.contiguous().T,
    }

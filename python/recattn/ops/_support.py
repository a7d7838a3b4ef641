"""What the operators share: whether Triton runs here, dropout, layouts."""

import functools
import importlib
import math
from itertools import pairwise

import torch
from torch import Tensor

from recattn import _versions
from recattn._check import expect
from recattn._graphs import constant_in_graphs


@constant_in_graphs
def triton_unsupported_reason(device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Why Triton kernels cannot run on tensors of this device type and dtype (None: they can)."""
    if reason := installation_unsupported_reason():
        return reason
    if _triton_runtime().interpret:
        return "Triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    if device_type != "cuda":
        return f"its kernels are Triton's, for CUDA devices, and the tensors are on {device_type}"
    return None


@functools.cache
def _triton_runtime():
    from triton import knobs

    return knobs.runtime


@functools.cache
def installation_unsupported_reason() -> str | None:
    """Why the installed Triton cannot be used (None: it can)."""
    try:
        from triton import __version__
    except ImportError:
        return "triton is not installed: pip install triton"
    return _versions.unsupported_reason("triton", __version__)


def draw_dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """int64 [1] from PyTorch's own generator, so that torch.manual_seed, checkpointing and CUDA graphs apply."""
    return torch.randint(2**63 - 1, (1,), device=device) if dropout_p > 0 else None


def launched_dropout(seed: Tensor | None, dropout_p: float):
    """Seed and threshold of dropout as the kernels take them; the threshold counts in steps of 1/65536."""
    dropout = triton_kernels("common.dropout")
    if seed is None:
        return dropout.NO_DROPOUT
    return dropout.Dropout(seed, min(round(dropout_p * 65536), 65535))


@functools.cache
def triton_kernels(name: str):
    """The module recattn.triton_kernels.NAME, which needs Triton: imported at the first call."""
    return importlib.import_module(f"recattn.triton_kernels.{name}")


def resolve_scale(scale: float | None, head_dim: int) -> float:
    """The scale of the scores, 1/√D where none is given."""
    return 1 / math.sqrt(head_dim) if scale is None else scale


def length_bound(x: Tensor, w: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None) -> int:
    """N of x [B, H, N, D]; of packed [T, H, D] what bounds the lengths, known without a synchronisation.

    No sequence is longer than w [..., Nmax, R] has rows.
    """
    if cu_seqlens is None:
        return x.shape[2]
    longest = min(x.shape[0], w.shape[-2])
    return longest if max_seqlen is None else min(max_seqlen, longest)


def packed_sequences(cu_seqlens: Tensor, w_q: Tensor, max_seqlen: int | None) -> list[slice]:
    """The tokens of each packed sequence. Their lengths are checked; on a GPU reading them synchronizes."""
    sequences = [slice(start, stop) for start, stop in pairwise(cu_seqlens.tolist())]
    _expect_fits(max((x.stop - x.start for x in sequences), default=0), w_q, max_seqlen)
    return sequences


def longest_sequence(cu_seqlens: Tensor, w_q: Tensor, max_seqlen: int | None) -> int:
    """The length of the longest packed sequence, checked; without a loop in Python."""
    longest = int(cu_seqlens.diff().max()) if len(cu_seqlens) > 1 else 0
    _expect_fits(longest, w_q, max_seqlen)
    return longest


def _expect_fits(longest: int, w_q: Tensor, max_seqlen: int | None) -> None:
    rows = w_q.shape[-2]
    expect(longest <= rows, "Nmax of w_q and w_k", f"at least the longest sequence, {longest}", rows)
    expect(max_seqlen is None or longest <= max_seqlen, "max_seqlen", f"at least the longest, {longest}", max_seqlen)


def sequence_indices(cu_seqlens: Tensor, total: int) -> Tensor:
    """[T]: which sequence each packed token is of."""
    indices = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device)
    return indices.repeat_interleave(cu_seqlens.diff(), output_size=total)


def token_positions(cu_seqlens: Tensor, total: int) -> Tensor:
    """[T]: the position of each packed token in its sequence."""
    starts = cu_seqlens[sequence_indices(cu_seqlens, total)]
    return torch.arange(total, device=cu_seqlens.device) - starts


def contiguous(x: Tensor | None) -> Tensor | None:
    """An optional tensor, contiguous."""
    return None if x is None else x.contiguous()


def token_major(x: Tensor) -> Tensor:
    """[B, H, N, ...] in the memory layout of [B, N, H, ...]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)

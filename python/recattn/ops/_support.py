"""What the operators share: whether Triton runs here, dropout, layouts."""

import functools
import importlib
import math

import torch
from torch import Tensor

from recattn import _versions
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


def contiguous(x: Tensor | None) -> Tensor | None:
    """An optional tensor, contiguous."""
    return None if x is None else x.contiguous()


def token_major(x: Tensor) -> Tensor:
    """[B, H, N, ...] in the memory layout of [B, N, H, ...]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)

"""What operators whose kernels are Triton's share."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from recattn import _versions


def constant_in_graphs(function: Callable) -> Callable:
    """`torch.compiler.assume_constant_result`, which would import torch._dynamo: seconds, and 150 MB."""
    function._dynamo_marked_constant = True
    return function


@constant_in_graphs
def triton_refusal(device_type: str, dtype: torch.dtype | None = None) -> str | None:
    """Why Triton kernels cannot run on tensors of this device type and dtype (None: they can)."""
    if unusable := installation_refusal():
        return unusable
    from triton import knobs

    if knobs.runtime.interpret:
        return "Triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    if device_type != "cuda":
        return f"its kernels are Triton's, for CUDA devices, and the tensors are on {device_type}"
    return None


@functools.cache
def installation_refusal() -> str | None:
    """Why the installed Triton is of no use (None: it is)."""
    try:
        from triton import __version__
    except ImportError:
        return "triton is not installed: pip install triton"
    return _versions.refusal("triton", __version__)


def draw_dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """int64 [1], from PyTorch's own generator: torch.manual_seed, checkpointing and CUDA graphs govern it."""
    return torch.randint(2**63 - 1, (1,), device=device) if dropout_p > 0 else None


def launched_dropout(seed: Tensor | None, dropout_p: float):
    """Dropout as the kernels take it, in steps of 1/65536."""
    from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout

    return NO_DROPOUT if seed is None else Dropout(seed, min(round(dropout_p * 65536), 65535))

"""Autocast, as for PyTorch's own attention."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from recattn._graphs import constant_in_graphs
from recattn._typing import as_many


def autocast_may_be_on() -> bool:
    """Whether `autocast_inputs` may have something to do."""
    return torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()


@as_many
def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast to autocast's dtype if autocast is on for the device of the first.

    float64 and integer tensors stay as they are.
    """
    device_type = tensors[0].device.type
    if not _has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Context without autocast on the device of `x`: products have the precision of their inputs."""
    device_type = x.device.type
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else nullcontext()


@constant_in_graphs  # torch 2.11 cannot trace the call
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)

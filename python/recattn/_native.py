"""What a call costs on the host, made cheap by C++ (csrc/host). Without it calls are right too, and slower."""

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled

MISSING: str | None = None

try:
    from recattn._host import (
        is_direct,
        is_traced,
        make_launch,
        make_plan,
        needs_autograd,
        set_recorder,
        signature,
        sizes,
    )
except ImportError as error:  # not compiled: the functions that others can do without are None
    MISSING = str(error)

    def is_traced(args: tuple) -> bool:
        tensors = (x for x in args if isinstance(x, Tensor))
        return (
            torch._C._len_torch_dispatch_stack() > 0
            or _profiler_enabled()
            or torch._C._get_tracing_state() is not None
            or any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta for x in tensors)
        )

    def needs_autograd(args: tuple) -> bool:
        needs_gradient = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
        return torch.autograd.forward_ad._current_level >= 0 or needs_gradient

    def is_direct(args: tuple) -> bool:
        return not torch.is_grad_enabled() and not torch._C._is_any_autocast_enabled() and not is_traced(args)

    def sizes(layouts: bytes, *tensors: Tensor | None) -> None:
        """Nothing is known of the tensors: the caller checks them."""

    make_launch = make_plan = set_recorder = signature = None

__all__ = [
    "MISSING",
    "is_direct",
    "is_traced",
    "make_launch",
    "make_plan",
    "needs_autograd",
    "set_recorder",
    "signature",
    "sizes",
]

"""The `recattn::` operator namespace. C++ kernels add themselves to it when the extension loads."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import recattn._extension  # noqa: F401  (registers the compiled operators)

_LIBRARY = torch.library.Library("recattn", "FRAGMENT")


def define(schema: str, *, cpu: Callable, cuda: Callable | None = None, fake: Callable) -> Callable:
    """Define `recattn::<schema>` with its kernels and its fake kernel; returns the operator to call."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _isolated(cpu), "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, _isolated(cuda), "CUDA")
    torch.library.register_fake(f"recattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.recattn, name).default


def _isolated(kernel: Callable) -> Callable:
    """What a kernel is made of is neither recorded by autograd nor cast by the caller's autocast."""

    @functools.wraps(kernel)
    def isolated(*args):
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return kernel(*args)

    return isolated


def distinct(*tensors: Tensor) -> list[Tensor]:
    """The tensors, a repeated one as a view: torch.compile takes no autograd.Function with a repeated input."""
    return [x.view_as(x) if any(x is earlier for earlier in tensors[:i]) else x for i, x in enumerate(tensors)]

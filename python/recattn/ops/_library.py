"""The `recattn::` operator namespace. C++ kernels add themselves to it when the extension loads."""

from collections.abc import Callable

import torch

import recattn._extension  # noqa: F401  (registers the compiled operators)

_LIBRARY = torch.library.Library("recattn", "FRAGMENT")


def define(schema: str, *, cpu: Callable, fake: Callable) -> Callable:
    """Define `recattn::<schema>` with its CPU kernel and its fake kernel; returns the operator to call."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, cpu, "CPU")
    torch.library.register_fake(f"recattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.recattn, name).default

"""Chooses the implementation of a call. An explicit `impl=` never falls back."""

from collections.abc import Mapping

import torch

IMPLEMENTATIONS = ("reference", "correction", "triton", "cuda", "cpu")


def is_transformed() -> bool:
    """Whether the call is within a transform of torch.func, which goes through plain PyTorch alone."""
    return torch._C._are_functorch_transforms_active()


def select(op: str, impl: str | None, refusals: Mapping[str, str | None]) -> str:
    """The implementation that runs a call.

    `refusals` maps each implementation of the operator, best first, to why it cannot serve this call (None: it can).
    """
    if impl is None:
        return "reference" if is_transformed() else next(name for name, why in refusals.items() if why is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl not in refusals:
        raise NotImplementedError(f"{op} has no impl={impl!r}; it has {', '.join(map(repr, refusals))}")
    if refusals[impl] is not None:
        raise NotImplementedError(f"{op} cannot run impl={impl!r} here: {refusals[impl]}")
    return impl

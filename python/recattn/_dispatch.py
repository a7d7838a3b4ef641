"""Which implementation runs a call. An explicit `impl=` never falls back."""

from collections.abc import Mapping

import torch

IMPLEMENTATIONS = ("reference", "correction", "triton", "chunked", "cuda", "cpu")


def is_transformed() -> bool:
    """Whether the call is inside a transform of torch.func, which only plain PyTorch supports."""
    return torch._C._are_functorch_transforms_active()


def select(op: str, impl: str | None, unsupported_reasons: Mapping[str, str | None]) -> str:
    """The implementation that runs a call.

    `unsupported_reasons` maps each implementation of the operator, best first, to why it cannot serve this call (None:
    it can).
    """
    if impl is None:
        if is_transformed():
            return "reference"
        return next(name for name, reason in unsupported_reasons.items() if reason is None)
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl not in unsupported_reasons:
        raise NotImplementedError(f"{op} has no impl={impl!r}; it has {', '.join(map(repr, unsupported_reasons))}")
    if unsupported_reasons[impl] is not None:
        raise NotImplementedError(f"{op} cannot run impl={impl!r} here: {unsupported_reasons[impl]}")
    return impl


def format_implementation(impl: str, backend: str | None) -> str:
    """One string for both, such as "correction:flash", for tables and reports."""
    return impl if backend is None else f"{impl}:{backend}"


def parse_implementation(name: str | None) -> tuple[str | None, str | None]:
    """(impl, backend) of a string made by `format_implementation`; anything else is returned as it is, without one."""
    if not isinstance(name, str):
        return name, None
    impl, colon, backend = name.partition(":")
    return impl, backend if colon else None

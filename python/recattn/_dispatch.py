"""Which implementation runs a call. An explicit `impl=` never falls back to another."""

from collections.abc import Mapping

import torch
from torch.autograd import forward_ad

from recattn._extension import MISSING
from recattn._graphs import constant_in_graphs
from recattn._warnings import warn_caller

IMPLEMENTATIONS = ("reference", "correction", "triton", "chunked", "cuda", "cpu")
_has_warned = False


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation may see the call: plain PyTorch supports both."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transform_unsupported_reason() -> str | None:
    """Why kernels cannot run inside the transforms that are active (None: they can)."""
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives (jvp, dual numbers) need impl='reference'"
    if torch._C._are_functorch_transforms_active() and torch.compiler.is_compiling():
        return "torch.func inside torch.compile needs impl='reference'"
    return None


def first_supported(unsupported_reasons: Mapping[str, str | None]) -> str:
    """The implementation that runs without `impl`."""
    return next(name for name, reason in unsupported_reasons.items() if reason is None)


def select(op: str, impl: str | None, unsupported_reasons: Mapping[str, str | None]) -> str:
    """The implementation that runs a call.

    `unsupported_reasons` maps each implementation of the operator, best first, to why it cannot serve this call (None:
    it can).
    """
    if impl is None:
        if transform_unsupported_reason():
            return "reference"
        chosen = first_supported(unsupported_reasons)
        if "cpu" in MISSING and unsupported_reasons["cpu"] == MISSING["cpu"]:
            _warn_of_missing_kernels(op, chosen)
        return chosen
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be None or one of {', '.join(map(repr, IMPLEMENTATIONS))}, got {impl!r}")
    if impl not in unsupported_reasons:
        raise NotImplementedError(f"{op} has no impl={impl!r}; it has {', '.join(map(repr, unsupported_reasons))}")
    reason = unsupported_reasons[impl] or (None if impl == "reference" else transform_unsupported_reason())
    if reason is not None:
        raise NotImplementedError(f"{op} cannot run impl={impl!r} here: {reason}")
    return impl


@constant_in_graphs  # torch.compile warns while it traces
def _warn_of_missing_kernels(op: str, chosen: str) -> None:
    """Warn at the first call of the process that C++ kernels would have served."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        without = f"recattn runs without compiled kernels, and slower: {op} by impl={chosen!r}"
        warn_caller(f"{without}. {MISSING['cpu']}", RuntimeWarning)


def format_implementation(impl: str, backend: str | None) -> str:
    """One string for both, such as "correction:flash", for tables and reports."""
    return impl if backend is None else f"{impl}:{backend}"


def parse_implementation(name: str | None) -> tuple[str | None, str | None]:
    """(impl, backend) of a string made by `format_implementation`; anything else is returned as it is, without one."""
    if not isinstance(name, str):
        return name, None
    impl, colon, backend = name.partition(":")
    return impl, backend if colon else None

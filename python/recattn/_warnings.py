"""Warnings, at the line that called recattn."""

import sys
import warnings

from recattn._graphs import constant_in_graphs


def causal_or_old_default(name: str, causal: bool | None) -> bool:
    """`causal`, and True where it was not given."""
    if causal is not None:
        return causal
    warn_of_change(
        f"{name} without causal is causal=True, and from the next release on causal=False, as everywhere else: "
        "give causal"
    )
    return True


@constant_in_graphs  # torch.compile gives the warning while it traces
def warn_of_change(message: str) -> None:
    """Warn of what changes in the next release. Python shows it once per line."""
    warn_caller(message, FutureWarning)


def warn_caller(message: str, category: type[Warning]) -> None:
    """A warning at the line that called recattn, perhaps through torch."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("recattn", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)

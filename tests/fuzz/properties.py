"""Everything that is fuzzed: a property of an operator's implementation, or a state machine."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recattn._extension import MISSING
from tests.fuzz.calls import DTYPES, calls
from tests.fuzz.changes import CHANGES, UNSUPPORTED
from tests.fuzz.checks import matches_reference, shows_and_stays

QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
INTERPRETED = "triton"  # by Triton's interpreter: an input takes seconds


class Property(NamedTuple):
    """What holds of every input that Hypothesis draws."""

    operator: str
    impl: str
    kind: str  # "reference", "NaN" or "changes", a column of the table
    name: str
    check: Callable  # (data, call) -> None
    inputs: st.SearchStrategy

    def test(self, options: settings, tried: Callable[[], None] = lambda: None) -> Callable[[], None]:
        """A Hypothesis test; `tried` is called after each input that passes."""

        @options
        @given(self.inputs, st.data())
        def holds(call, data):
            self.check(data, call)
            tried()

        return holds

    @property
    def id(self) -> str:
        return f"{self.operator}-{self.impl}-{self.name}"


def _properties() -> list[Property]:
    found = []
    for operator, impl in DTYPES:
        implementation = impl or "PyTorch"
        every = functools.partial(calls, operator, impl)
        for kind, check in (("reference", matches_reference), ("NaN", shows_and_stays)):
            found.append(Property(operator, implementation, kind, check.__name__, check, every()))
        for check, (operators, ways) in CHANGES.items():
            if operator in operators and (impl, check) not in UNSUPPORTED:
                inputs = every(ways=tuple(ways))
                found.append(Property(operator, implementation, "changes", check.__name__, check, inputs))
    return found


PROPERTIES = {found.id: found for found in _properties()}


def unsupported_reason(impl: str) -> str | None:
    """Why this process cannot run an implementation."""
    if impl == INTERPRETED:
        from recattn.ops._support import triton_unsupported_reason

        return triton_unsupported_reason("cpu", torch.float32)
    return MISSING.get(impl)

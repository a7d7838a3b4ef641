"""Everything that is fuzzed: a property of an operator's implementation, or a state machine."""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recattn._extension import MISSING
from tests.fuzz.calls import DTYPES, calls
from tests.fuzz.changes import CHANGES, UNSUPPORTED, UNSUPPORTED_WAYS
from tests.fuzz.checks import matches_reference, shows_and_stays
from tests.fuzz.draws import WAYS

QUIET = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
INTERPRETED = ("triton", "correction:eager")  # by Triton's interpreter: an input takes seconds


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
            with backend_of(self.impl):
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
        checks = [("reference", matches_reference, WAYS), ("NaN", shows_and_stays, WAYS)]
        for check, (operators, ways) in CHANGES.items():
            if operator in operators and (impl, check) not in UNSUPPORTED:
                checks.append(("changes", check, ways))
        for kind, check, ways in checks:
            if has := [way for way in ways if way not in UNSUPPORTED_WAYS.get(impl, ())]:
                inputs = calls(operator, impl, ways=tuple(has))
                found.append(Property(operator, implementation, kind, check.__name__, check, inputs))
    return found


PROPERTIES = {found.id: found for found in _properties()}


def backend_of(impl: str) -> contextlib.AbstractContextManager:
    """What an implementation needs around a call and its backward."""
    if impl != "correction:eager":
        return contextlib.nullcontext()
    from tests.helpers.eager_backend import eager_backend_on_any_device  # imports Triton

    return eager_backend_on_any_device()


def unsupported_reason(impl: str) -> str | None:
    """Why this process cannot run an implementation."""
    if impl in INTERPRETED:
        from recattn.ops._support import triton_unsupported_reason

        return triton_unsupported_reason("cpu", torch.float32)
    return MISSING.get(impl)

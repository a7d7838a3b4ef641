"""Operators on inputs that Hypothesis draws: the same few at each run; `make fuzz` draws new ones."""

import pytest
from hypothesis import Phase, settings

from tests.fuzz.properties import INTERPRETED, PROPERTIES, QUIET, unsupported_reason

EXAMPLES = {"reference": 25, "NaN": 12, "changes": 8}
EXAMPLES_INTERPRETED = {"reference": 2, "NaN": 1, "changes": 1}


@pytest.mark.parametrize("name", PROPERTIES)
def test_holds(name):
    found = PROPERTIES[name]
    if reason := unsupported_reason(found.impl):
        pytest.skip(reason)
    examples = (EXAMPLES_INTERPRETED if found.impl in INTERPRETED else EXAMPLES)[found.kind]
    found.test(settings(QUIET, derandomize=True, max_examples=examples, phases=[Phase.generate]))()

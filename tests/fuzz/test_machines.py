"""SlotMap against a dict, the same steps at each run. The other machines are tests of tests/serving."""

from importlib.util import find_spec

import pytest
from hypothesis import settings

from tests.fuzz.properties import QUIET


@pytest.mark.skipif(find_spec("recattn._slot_map") is None, reason="recattn has no compiled SlotMap here")
def test_a_slot_map_is_a_dict():
    from tests.fuzz.machines import run_slot_map

    run_slot_map(settings(QUIET, derandomize=True, max_examples=60, stateful_step_count=40))

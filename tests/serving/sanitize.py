"""Test of `make sanitize`: threads at one SlotMap under AddressSanitizer and UndefinedBehaviorSanitizer.

test_slot_map.py runs them under ThreadSanitizer.
"""

from tests.helpers.sanitizers import run_slot_map_stress


def test_threads_touch_nothing_outside(tmp_path):
    run_slot_map_stress("address,undefined", tmp_path)

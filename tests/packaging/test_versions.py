"""The versions that recattn admits were tried by `make versions`, and versions.md says that all of them passed."""

import re
from pathlib import Path

from recattn._versions import OLDEST
from tests.packaging import versions

ROOT = Path(__file__).parents[2]


def test_the_oldest_versions_and_those_of_development_are_tried():
    assert versions.TRITONS[0] == OLDEST["triton"]
    assert versions.PAIRS[0].torch.startswith(OLDEST["torch"] + ".")
    pinned = dict(re.findall(r"^(torch|triton)==([\d.]+)", (ROOT / "requirements/dev.txt").read_text(), re.M))
    assert pinned in [{"torch": pair.torch, "triton": pair.triton} for pair in versions.PAIRS]
    assert {pair.triton for pair in versions.PAIRS} < set(versions.TRITONS)


def test_all_that_was_tried_passed():
    table = versions.TABLE.read_text()
    rows = [f"torch {pair.torch}" for pair in versions.PAIRS] + [f"Triton {triton}" for triton in versions.TRITONS]
    for name in rows:
        (row,) = re.findall(rf"^\| {re.escape(name)} \|.*$", table, re.M)
        assert " 0 failed" in row and not re.search(r"[1-9]\d* failed", row), row


def test_a_row_takes_the_place_of_its_last():
    table = "# Title\n\n| torch 2.10.0 | old |\n| torch 2.1 | other |\n"
    assert versions.with_row(table, "| torch 2.10.0 | new |") == table.replace("old", "new")

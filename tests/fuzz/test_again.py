"""What `make fuzz` finds can be tried again by the command that it prints."""

import re

import pytest

from tests.fuzz import __main__ as program
from tests.fuzz.properties import PROPERTIES


def test_the_printed_command_tries_the_found_input_again(monkeypatch, capsys):
    inputs = []

    def finds_the_third(data, call):
        inputs.append(call.recipes)
        assert call.recipes not in inputs[2:3], "found"

    name = "lrea_absorb-PyTorch-matches_reference"
    monkeypatch.setitem(PROPERTIES, name, PROPERTIES[name]._replace(check=finds_the_third))
    monkeypatch.setattr(program, "prepare", lambda: None)
    assert not program.holds(PROPERTIES[name], lambda: None)
    printed = "".join(capsys.readouterr())
    assert f"--again {name} BLOB" in printed
    with pytest.raises(AssertionError, match="found"):
        program.again(name, re.search(r"@reproduce_failure\(.*b'(.+)'\)", printed)[1])
    assert inputs[-1] == inputs[2]

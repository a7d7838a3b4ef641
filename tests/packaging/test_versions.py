"""The versions that recattn admits were tried by `make versions`, and versions.md says that all of them passed."""

import re
from pathlib import Path

from recattn._versions import OLDEST
from tests.packaging import versions

ROOT = Path(__file__).parents[2]


def tried(name: str) -> list[str]:
    return [getattr(environment, name) for environment in versions.ENVIRONMENTS]


def test_the_oldest_versions_and_those_of_development_are_tried():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert versions.TRITONS[0] == OLDEST["triton"]
    assert tried("torch")[0].startswith(OLDEST["torch"] + ".")
    assert f'requires-python = ">={tried("python")[0]}"' in pyproject
    names = ("torch", "triton", "numpy", "transformers")
    pinned = dict(
        re.findall(
            rf"^({'|'.join(names)})==([\d.]+)(?!.*< \"3.11\")", (ROOT / "requirements/dev.txt").read_text(), re.M
        )
    )
    assert pinned in [{name: getattr(environment, name) for name in names} for environment in versions.ENVIRONMENTS]
    assert {*tried("triton")} <= {*versions.TRITONS}


def test_all_that_was_tried_passed():
    table = versions.TABLE.read_text()
    for environment in versions.ENVIRONMENTS:
        results = versions.find_row(table, environment.cells).split(" | ")[len(environment.cells) :][
            : len(versions.SUITES)
        ]
        assert all(re.search(r"[1-9]\d* passed, 0 failed, ", result) for result in results), environment
    for triton in versions.TRITONS:
        assert re.search(r"[1-9]\d* compiled, 0 failed, ", versions.find_row(table, (f"Triton {triton}",)))


def test_a_row_takes_the_place_of_its_last():
    table = "# Title\n\n| Python 3.1 | torch 2.10.0 | old |\n| Python 3.1 | torch 2.1 | other |\n| Triton 2.1 | old |\n"
    assert versions.with_row(table, "| Python 3.1 | torch 2.1 | new |") == table.replace("other", "new")
    assert versions.with_row(table, "| Triton 2.1 | 3 compiled |") == table.replace(
        "Triton 2.1 | old", "Triton 2.1 | 3 compiled"
    )

"""Which versions of transformers are served. What an import says without one is in test_imports.py."""

import pytest

transformers = pytest.importorskip("transformers", reason="needs transformers")
from recattn.integrations.transformers import generations  # noqa: E402
from tests.packaging.versions import ENVIRONMENTS  # noqa: E402


def test_a_version_below_the_floor_is_named():
    floor = ".".join(map(str, generations.FLOOR))
    message = rf'needs transformers {floor} or newer, but 4\.47\.1 is installed: pip install "recattn\[hf\]"'
    with pytest.raises(ImportError, match=message):
        generations.find_generation("4.47.1")


@pytest.mark.parametrize("first, name", generations.GENERATIONS.items())
def test_a_generation_serves_from_its_first_version(first, name):
    major, minor = first
    assert generations.find_generation(f"{major}.{minor}.0") == name
    assert generations.find_generation(f"{major}.{minor}.3.dev0") == name


def test_every_generation_is_tried():
    tried = {generations.find_generation(environment.transformers) for environment in ENVIRONMENTS}
    assert tried == set(generations.GENERATIONS.values())


def test_versions_to_come_are_served_by_the_newest_generation():
    assert generations.find_generation("6.0.0rc1") == next(iter(generations.GENERATIONS.values()))

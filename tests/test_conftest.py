"""Which tests run where, and what ends the run."""

from types import SimpleNamespace

import pytest
import torch

from tests.conftest import end_if_context_is_lost, pytest_collection_modifyitems


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_test_is_skipped_by_its_mark_and_not_by_the_name_of_a_folder():
    skipped = []
    item = SimpleNamespace(keywords={"gpu": 1}, get_closest_marker=lambda name: None, add_marker=skipped.append)
    pytest_collection_modifyitems([item])
    assert not skipped


def test_a_lost_context_ends_the_tests(monkeypatch):
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(pytest.exit.Exception, match="context is lost: CUDA error: an illegal"):
        end_if_context_is_lost()

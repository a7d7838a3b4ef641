"""Set-up that must precede the import of any kernel, and fixtures for every test."""

import os

import pytest
import torch
from hypothesis import settings

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # Triton reads this when a kernel is decorated: without a GPU its interpreter runs them on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("recattn", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("recattn")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """Uninitialised memory reads as NaN (integers: the largest value), in Python and in C++ alike."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_modifyitems(items):
    if not ON_GPU:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))

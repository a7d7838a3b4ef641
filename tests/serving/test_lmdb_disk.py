"""LMDBStore where the disk has no room."""

import resource

import pytest
import torch

from recattn.nn.lrea import LREAState
from recattn.serving import StateSchema, StoreFullError

pytest.importorskip("lmdb")
pytest.importorskip("xxhash")


@pytest.fixture
def short_files():
    """No file may grow beyond 256 KB: the system cuts a write short, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_store_full_and_what_was_acknowledged_is_there(tmp_path, short_files):
    from recattn.serving import LMDBStore

    schema = StateSchema(heads=1, rank=8, dim=16, value_dim=16, dtype=torch.float32, model="disk")
    with LMDBStore(tmp_path / "states", schema) as store:
        written = 0
        with pytest.raises(StoreFullError, match=r"the disk of .* is full or failed"):
            for user in range(1000):
                values = torch.full((1, 1, 8, 16), float(user))
                store.put_many(torch.tensor([user]), LREAState(values, values, None, None))
                written += 1
        state, info = store.get_many(torch.arange(1000))
    assert 0 < written < 1000
    assert info.found.tolist() == [user < written for user in range(1000)]
    assert torch.equal(state.keys[:written, 0, 0, 0], torch.arange(float(written)))

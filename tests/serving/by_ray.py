"""Slow test of `make test-ray`: a build by Ray, whose processes take a minute to start."""

import pytest
import torch

from recattn.serving import StateSchema, build_states
from tests.serving.test_state_builder import assert_built, draw_histories, items, lrea, write

__all__ = ["items", "lrea"]  # fixtures


def test_by_ray_as_by_parquet(lrea, items, tmp_path):
    ray_data = pytest.importorskip("ray.data")
    lmdb_store = pytest.importorskip("recattn.serving.stores.lmdb").LMDBStore
    import ray

    histories = draw_histories(60)
    (tmp_path / "parquet").mkdir()
    path = write(tmp_path / "parquet", list(histories.items()), 3)
    schema = StateSchema.of(lrea, torch.float32)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    try:
        dataset, options = ray_data.read_parquet(path), {"items": items, "build": "b", "batch_size": 8}
        with lmdb_store(tmp_path / "states", schema) as store:
            assert build_states(dataset, lrea, store, workers=1, **options).built == 60
            assert_built(store, lrea, items, histories)
            assert build_states(path, lrea, store, **options).skipped == 60
    finally:
        ray.shutdown()

"""Float32 sums of a GPU stay within the bound: its threads add the terms of a product one after another."""

import pytest
import torch

import recattn
from recattn import reference
from recattn.testing import assert_matches_reference
from tests.helpers.interpreted import DEVICE, sum_like_a_gpu

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def sums(monkeypatch):
    if DEVICE == "cpu":
        sum_like_a_gpu(monkeypatch)


def by_triton(function):
    return lambda **inputs: function(**inputs, impl="triton")


def test_lrea_attention_of_long_histories():
    inputs = {
        "targets": torch.randn(64, 1, 64),
        "keys": torch.randn(2, 1, 32, 64),
        "values": torch.randn(2, 1, 32, 64),
        "w_decomp": torch.randn(32, 1024),
        "target_offsets": torch.tensor([0, 32, 64]),
    }
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    grads = ("targets", "keys", "values", "w_decomp")
    assert_matches_reference(by_triton(recattn.lrea_attention), reference.lrea_attention, inputs, grads=grads)


def test_wasserstein_attention_of_rows_that_see_one_key():
    """Their weights cannot change: ds is 0, the difference of two sums, which must round alike."""
    size = (4, 2, 1, 16)
    mean, cov = (torch.randn(size, device=DEVICE, requires_grad=True) for _ in range(2))
    mean_k, cov_k, mean_v, cov_v = (torch.randn(size, device=DEVICE) for _ in range(4))
    keys, values = (mean_k, cov_k.exp()), (mean_v, cov_v.exp())
    outs = recattn.wasserstein_attention(mean, cov.exp(), *keys, *values, impl="triton")
    for gradient in torch.autograd.grad(outs, (mean, cov), [torch.randn_like(out) for out in outs]):
        assert not gradient.any()

"""Defaults that change in the next release: as before, with a warning at the line of the call."""

import warnings

import pytest
import torch

import recattn

Q, W = torch.randn(1, 2, 5, 4), torch.randn(5, 6) / 5
GAUSSIANS = (Q, Q.abs(), Q, Q.abs(), Q, Q.abs())
CALLS = {
    "refined_attention": lambda **options: recattn.refined_attention(Q, Q, Q, W, W, **options),
    "wasserstein_attention": lambda **options: recattn.wasserstein_attention(*GAUSSIANS, **options)[0],
    "StochasticRefinedSelfAttention": lambda **options: torch.tensor(
        recattn.nn.StochasticRefinedSelfAttention(4, 2, max_len=5, **options).causal
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_causal(name):
    with pytest.warns(FutureWarning, match=f"^{name} without causal is causal=True, .*: give causal$") as caught:
        out = CALLS[name]()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(out, CALLS[name](causal=True))
        assert not torch.equal(out, CALLS[name](causal=False))


def test_causal_under_compile():
    with pytest.warns(FutureWarning, match="refined_attention without causal"):
        out = torch.compile(CALLS["refined_attention"], fullgraph=True, backend="eager")()
    assert torch.equal(out, CALLS["refined_attention"](causal=True))

"""STOSA and its refinements on a few synthetic histories."""

from dataclasses import replace

import pytest
import torch

from benchmarks.quality import stosa
from benchmarks.quality.sasrec import ARMS, PLAIN
from benchmarks.quality.stosa import STOSA, DistanceBiasSelfAttention, DistanceRefinedSelfAttention, Hyperparameters
from recattn import reference
from recattn.nn import StochasticRefinedSelfAttention
from tests.helpers.suite_runs import histories_by_steps

CPU = torch.device("cpu")
HYPER = Hyperparameters(length=8, dim=16, heads=2, blocks=2, batch=16, learning_rate=1e-2, epochs=2)


@pytest.fixture(scope="module")
def histories():
    return histories_by_steps()


def test_distances_are_squared_wasserstein_distances():
    generator = torch.Generator().manual_seed(0)
    mean, other_mean = torch.randn(2, 1, 1, 5, 6, generator=generator, dtype=torch.float64)
    cov, other_cov = torch.rand(2, 1, 1, 5, 6, generator=generator, dtype=torch.float64)
    expected = reference.wasserstein_attention.__globals__["squared_wasserstein_distance"](
        mean.clone(), cov.sqrt(), other_mean.clone(), other_cov.sqrt(), torch.ones(1, 5, dtype=torch.bool)
    )
    torch.testing.assert_close(stosa.distances(mean, cov, other_mean, other_cov), expected.diagonal(dim1=-2, dim2=-1))


def test_an_addition_of_nothing_is_plain_attention():
    """With W_v = 0, "additive" refines A into A, whose softmax is STOSA's own."""
    torch.manual_seed(0)
    refined = DistanceRefinedSelfAttention(16, 2, 8, "additive", "logits")
    plain = StochasticRefinedSelfAttention(16, 2, max_len=8, refine=False, **stosa.LEFT)
    plain.load_state_dict(refined.maps.state_dict())
    torch.nn.init.zeros_(refined.matrices[2])
    mean, cov = torch.randn(2, 3, 8, 16)
    lengths = torch.tensor([8, 3, 1])
    tokens = torch.arange(8) >= 8 - lengths[:, None]
    for actual, expected in zip(refined(mean, cov, seq_lens=lengths), plain(mean, cov, seq_lens=lengths), strict=True):
        torch.testing.assert_close(actual[tokens], expected[tokens], atol=2e-5, rtol=1e-5)
    torch.nn.init.normal_(refined.matrices[2])
    assert not torch.allclose(refined(mean, cov, seq_lens=lengths)[0], plain(mean, cov, seq_lens=lengths)[0], atol=1e-2)


def test_a_bias_of_nothing_is_plain_attention():
    torch.manual_seed(0)
    biased = DistanceBiasSelfAttention(16, 2, 8)
    plain = StochasticRefinedSelfAttention(16, 2, max_len=8, refine=False, **stosa.LEFT)
    plain.load_state_dict(biased.maps.state_dict())
    mean, cov = torch.randn(2, 3, 8, 16)
    lengths = torch.tensor([8, 3, 1])
    tokens = torch.arange(8) >= 8 - lengths[:, None]
    for actual, expected in zip(biased(mean, cov, seq_lens=lengths), plain(mean, cov, seq_lens=lengths), strict=True):
        torch.testing.assert_close(actual[tokens], expected[tokens], atol=2e-5, rtol=1e-5)
    # With a bias that leaves a token only itself, its values come out.
    torch.nn.init.constant_(biased.by_distance[:, 1:].detach(), -1e4)
    attended, maps = biased(mean, cov, seq_lens=lengths), plain
    values = maps.mean_in_proj(mean)[..., 32:], stosa.positive(maps.cov_in_proj(cov)[..., 32:])
    for actual, proj, own in zip(attended, (maps.mean_out_proj, maps.cov_out_proj), values, strict=True):
        torch.testing.assert_close(actual[tokens], proj(own)[tokens])


@pytest.mark.parametrize("attention", ARMS)
def test_no_state_depends_on_the_future_or_on_padding(attention):
    torch.manual_seed(0)
    model = STOSA(30, HYPER, attention).eval()
    items = torch.tensor([[0, 0, 0, 7, 3, 9, 1, 2]])
    changed = items.clone()
    changed[0, 6:] = torch.tensor([20, 21])
    for state, other in zip(model(items), model(changed), strict=True):
        torch.testing.assert_close(state[:, 3:6], other[:, 3:6])
        assert not torch.allclose(state[:, 6:], other[:, 6:])
    before = model(items)
    torch.nn.init.normal_(model.items.weight[0].detach())
    for state, other in zip(model(items), before, strict=True):
        torch.testing.assert_close(state[:, 3:], other[:, 3:])


def test_scores_are_minus_the_distances():
    torch.manual_seed(0)
    model = STOSA(30, HYPER, PLAIN).eval()
    items = 1 + torch.arange(16).view(2, 8)
    mean, cov = (x[:, -1:] for x in model(items))
    covs = stosa.positive(model.item_covs.weight)
    torch.testing.assert_close(
        model.scores(items), -stosa.distances(mean, cov, model.items.weight, covs), atol=1e-4, rtol=1e-4
    )
    assert (cov > 0).all() and (covs > 0).all()


@pytest.mark.parametrize("attention", ARMS)
def test_training(attention, histories):
    row, tested = stosa.train(attention, 0, HYPER, histories, CPU)
    assert row.losses[1] < row.losses[0]
    again, tested_again = stosa.train(attention, 0, HYPER, histories, CPU)
    assert replace(again, epoch_seconds=row.epoch_seconds) == row
    assert torch.equal(tested_again["ranks"], tested["ranks"])


@pytest.mark.parametrize("attention", [PLAIN, "value"])
def test_it_learns_the_steps(attention, histories):
    _, tested = stosa.train(attention, 0, replace(HYPER, epochs=30), histories, CPU)
    assert (tested["ranks"] < 10).double().mean() > 0.9

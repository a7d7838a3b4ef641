import math
from itertools import product

import pytest
import torch

from recattn.reference import wasserstein_attention

NAMES = ("mean_q", "cov_q", "mean_k", "cov_k", "mean_v", "cov_v")


def draw(b=2, h=2, n=5, d=3, dv=2):
    """Means are normal, covariances positive."""
    sizes = (d, d, d, d, dv, dv)
    drawn = [torch.randn(b, h, n, size, dtype=torch.float64) for size in sizes]
    return [x.exp() if name.startswith("cov") else x for name, x in zip(NAMES, drawn, strict=True)]


def by_hand(mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, causal, lengths, padding_side, scale):
    """One query at a time; the 2-Wasserstein distance of two Gaussians from its definition."""
    mean, covariance = torch.zeros_like(mean_v), torch.zeros_like(cov_v)
    b, h, n, _ = mean_q.shape
    for pair in product(range(b), range(h)):
        length = n if lengths is None else lengths[pair[0]]
        tokens = range(length) if padding_side == "right" else range(n - length, n)
        for i in tokens:
            keys = [j for j in tokens if j <= i or not causal]
            exponentials = []
            for j in keys:
                # Tr(A + B - 2 (A^½ B A^½)^½) with diagonal A and B.
                cov_i, cov_j = cov_q[pair][i], cov_k[pair][j]
                trace = (cov_i + cov_j - 2 * (cov_i.sqrt() * cov_j * cov_i.sqrt()).sqrt()).sum()
                distance = (mean_q[pair][i] - mean_k[pair][j]).pow(2).sum() + trace
                exponentials.append(math.exp(-scale * distance))
            for j, e in zip(keys, exponentials, strict=True):
                p = e / sum(exponentials)
                mean[pair][i] += p * mean_v[pair][j]
                covariance[pair][i] += p**2 * cov_v[pair][j]
    return mean, covariance


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths, padding_side", [(None, "right"), ([3, 0], "right"), ([3, 0], "left")])
def test_matches_the_definition(causal, lengths, padding_side):
    tensors = draw()
    seq_lens = None if lengths is None else torch.tensor(lengths)
    actual = wasserstein_attention(*tensors, causal=causal, seq_lens=seq_lens, padding_side=padding_side, scale=0.3)
    expected = by_hand(*tensors, causal, lengths, padding_side, 0.3)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal):
    tensors = [x.requires_grad_() for x in draw(b=2, h=1, n=4)]
    seq_lens = torch.tensor([3, 0])
    assert torch.autograd.gradcheck(
        lambda *args: wasserstein_attention(*args, causal=causal, seq_lens=seq_lens, padding_side="left"), tensors
    )


def test_distance_is_a_dot_product_with_row_and_column_terms():
    """So ordinary attention over vectors of two or four more entries computes it: the row term drops out."""
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v = draw(n=7)
    d = mean_q.shape[-1]
    query, key = torch.cat([mean_q, cov_q.sqrt()], -1), torch.cat([mean_k, cov_k.sqrt()], -1)
    difference = query.unsqueeze(-2) - key.unsqueeze(-3)  # [B, H, N, N, 2D]
    row, column = query.square().sum(-1, keepdim=True), key.square().sum(-1, keepdim=True)
    torch.testing.assert_close(difference.square().sum(-1), row + column.mT - 2 * query @ key.mT)

    query, key = torch.cat([2 * query, -torch.ones_like(row)], -1), torch.cat([key, column], -1)
    mean = torch.nn.functional.scaled_dot_product_attention(query, key, mean_v, is_causal=True, scale=d**-0.5)
    torch.testing.assert_close(mean, wasserstein_attention(mean_q, cov_q, mean_k, cov_k, mean_v, cov_v)[0])


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_never_matters(padding_side):
    clean = draw(n=6)
    seq_lens = torch.tensor([4, 0])
    tokens = (slice(0, 4), slice(4, 6)) if padding_side == "right" else (slice(2, 6), slice(0, 2))
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x[0, :, tokens[1]] = math.nan
        x[1] = math.inf
        x.requires_grad_()
    outs = wasserstein_attention(*dirty, seq_lens=seq_lens, padding_side=padding_side)
    alone = wasserstein_attention(*(x[:1, :, tokens[0]] for x in clean))
    for out, expected in zip(outs, alone, strict=True):
        torch.testing.assert_close(out[:1, :, tokens[0]], expected)
        assert not out[0, :, tokens[1]].any() and not out[1].any()
    for gradient in torch.autograd.grad(outs, dirty, [torch.ones_like(x) for x in outs]):
        assert gradient.isfinite().all()
        assert not gradient[0, :, tokens[1]].any() and not gradient[1].any()


def test_zero_covariances_have_finite_gradients():
    tensors = draw()
    tensors[1][0] = 0
    tensors[3][:, :, 2:] = 0
    tensors = [x.float().requires_grad_() for x in tensors]
    for gradient in torch.autograd.grad(sum(x.sum() for x in wasserstein_attention(*tensors)), tensors):
        assert gradient.isfinite().all()


def test_empty_sizes():
    for b, n in ((0, 5), (2, 0)):
        mean, covariance = wasserstein_attention(*draw(b=b, n=n))
        assert mean.shape == covariance.shape == (b, 2, n, 2)

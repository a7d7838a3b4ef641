import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from recattn import reference
from recattn.nn.stochastic_refined_self_attention import StochasticRefinedSelfAttention

FORMS = [{"refine": False}, {"source": "logits"}, {"source": "weights"}]


def draw(b=3, n=6, e=8, dtype=torch.float32):
    mean, cov = (F.layer_norm(torch.randn(b, n, e), (e,)) for _ in range(2))
    return mean.to(dtype), (F.elu(cov) + 1).to(dtype)


def by_hand(module, mean, cov, seq_lens=None):
    """STOSA's layer, one linear map at a time, around the reference."""

    def heads(x, projection, part):
        e = module.embed_dim
        rows = slice(part * e, (part + 1) * e)
        x = x @ projection.weight[rows].T + projection.bias[rows]
        return x.reshape(*x.shape[:2], module.num_heads, -1).permute(0, 2, 1, 3)

    gaussians = []
    for part in range(3):
        gaussians += [heads(mean, module.mean_in_proj, part), F.elu(heads(cov, module.cov_in_proj, part)) + 1]
    options = {"w_q": module.w_q, "w_k": module.w_k, "source": module.source, "causal": module.causal}
    outs = reference.wasserstein_attention(*gaussians, **options, seq_lens=seq_lens, padding_side=module.padding_side)
    mean, cov = (x.permute(0, 2, 1, 3).reshape(mean.shape) for x in outs)
    return module.mean_out_proj(mean), module.cov_out_proj(cov)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding_side, causal", [("left", True), ("right", False)])
def test_is_the_layer_by_hand(padding_side, causal, form):
    module = StochasticRefinedSelfAttention(8, 2, max_len=10, rank=4, padding_side=padding_side, causal=causal, **form)
    inputs, seq_lens = draw(), torch.tensor([6, 0, 4])
    actual = module(*inputs, seq_lens=seq_lens)
    for a, e in zip(actual, by_hand(module, *inputs, seq_lens), strict=True):
        torch.testing.assert_close(a, e)
    padding = actual[0][1], actual[1][1]
    for x, projection in zip(padding, (module.mean_out_proj, module.cov_out_proj), strict=True):
        torch.testing.assert_close(x, projection.bias.expand_as(x))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    module = StochasticRefinedSelfAttention(2, 2, max_len=4, rank=1, padding_side="left", dtype=torch.float64, **form)
    inputs = draw(b=2, n=3, e=2, dtype=torch.float64)
    names = list(dict(module.named_parameters()))
    leaves = [x.requires_grad_() for x in (*inputs, *module.parameters())]

    def function(mean, cov, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(module, values, (mean, cov), {"seq_lens": torch.tensor([3, 2])})

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_of_the_outputs(form):
    module = StochasticRefinedSelfAttention(8, 2, max_len=6, padding_side="left", **form)
    inputs, seq_lens = draw(), torch.tensor([6, 1, 4])
    mean, cov, weights = module(*inputs, seq_lens=seq_lens, need_weights=True)
    assert weights.shape == (3, 2, 6, 6)
    mean_v, cov_v = (
        projection(x)[..., 16:].unflatten(-1, (2, 4)).transpose(1, 2)
        for projection, x in zip((module.mean_in_proj, module.cov_in_proj), inputs, strict=True)
    )
    of_mean = (weights @ mean_v).transpose(1, 2).flatten(-2)
    of_cov = (weights.square() @ (F.elu(cov_v) + 1)).transpose(1, 2).flatten(-2)
    torch.testing.assert_close(module.mean_out_proj(of_mean), mean)
    torch.testing.assert_close(module.cov_out_proj(of_cov), cov)


@pytest.mark.parametrize("source", ["logits", "weights"])
@pytest.mark.parametrize("length, embed_dim, heads, rank", [(50, 64, 4, None), (100, 64, 1, None), (200, 32, 2, 16)])
def test_begins_unsaturated(length, embed_dim, heads, rank, source):
    """At initialization rows have nine tenths of the entropy of equal weights, as in STOSA's own attention."""
    module = StochasticRefinedSelfAttention(embed_dim, heads, max_len=length, rank=rank, source=source)
    *_, weights = module(*draw(b=2, n=length, e=embed_dim), need_weights=True)
    entropy = -(weights * weights.clamp(min=1e-30).log()).sum(-1)  # [B, H, N]
    assert (entropy[..., 1:] > 0.9 * torch.arange(2, length + 1).log()).float().mean() > 0.95
    assert weights[:, :, -1].std() > 1e-3 / length  # and are not equal either


def test_dropout_is_of_training():
    module = StochasticRefinedSelfAttention(8, 2, max_len=30, dropout=0.5)
    inputs = draw(n=30)
    trained = module(*inputs)[0]
    module.eval()
    for a, b in zip(module(*inputs), module(*inputs), strict=True):
        assert torch.equal(a, b)
    assert not torch.allclose(trained, module(*inputs)[0])


@pytest.mark.parametrize("form", [{"refine": False}, {"rank": 5, "source": "weights", "bias": False}])
def test_state_dict_round_trip(form):
    module, other = (StochasticRefinedSelfAttention(8, 2, max_len=6, **form) for _ in range(2))
    other.load_state_dict(module.state_dict())
    for a, b in zip(module(*draw()), other(*draw()), strict=True):
        assert a.shape == b.shape
    inputs = draw()
    assert torch.equal(module(*inputs)[1], other(*inputs)[1])
    assert ("w_q" in module.state_dict()) == module.refine


def test_autocast():
    module = StochasticRefinedSelfAttention(8, 2, max_len=6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean, cov = module(*draw())
    assert mean.dtype == cov.dtype == torch.bfloat16
    assert mean.isfinite().all() and cov.isfinite().all()


def test_repr():
    module = StochasticRefinedSelfAttention(8, 2, max_len=6, rank=3, dropout=0.1)
    assert "embed_dim=8, num_heads=2, max_len=6, rank=3, source='logits', causal=True" in repr(module)
    assert "refine=False" in repr(StochasticRefinedSelfAttention(8, 2, max_len=6, refine=False))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"embed_dim": 9}, "embed_dim must be a multiple of 2 heads, got 9"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"max_len": 0}, "max_len must be at least 1, got 0"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"source": "scores"}, "source must be 'logits' or 'weights', got 'scores'"),
        ({"padding_side": "both"}, "padding_side must be 'right' or 'left', got 'both'"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
    ],
)
def test_bad_constructor(changes, message):
    with pytest.raises(ValueError, match=message):
        StochasticRefinedSelfAttention(**{"embed_dim": 8, "num_heads": 2, "max_len": 6, **changes})


def test_bad_input():
    module = StochasticRefinedSelfAttention(8, 2, max_len=6)
    mean, cov = draw()
    with pytest.raises(ValueError, match=r"mean must be \[B, N, E\] = .* got \[3, 6, 7\]"):
        module(mean[..., :7], cov)
    with pytest.raises(ValueError, match=r"cov must be \[B, N, E\] = \[3, 6, 8\], got \[3, 5, 8\]"):
        module(mean, cov[:, :5])
    with pytest.raises(ValueError, match="Nmax of w_q and w_k must be at least N = 7, got 6"):
        module(*draw(n=7))

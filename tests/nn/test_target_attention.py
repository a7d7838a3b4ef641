"""DIN's attention compared with its formula for each target and behaviour, in every form of targets that LREA takes."""

from itertools import pairwise

import pytest
import torch

from recattn.nn import LREA, TargetAttention
from recattn.testing import assert_matches_reference
from tests.helpers.modules import assert_twins, copied_both_ways

D, LENGTH = 6, 9
LENGTHS = torch.tensor([9, 0, 4, 1])
OFFSETS = torch.tensor([0, 3, 5, 5, 10])
USERS, TARGETS = 4, 10
POOLINGS = ("sum", "mean", "softmax")


def module(pooling="sum", hidden=(5,), dtype=torch.float64):
    """With slopes of either sign."""
    attention = TargetAttention(D, hidden, pooling=pooling, dtype=dtype)
    with torch.no_grad():
        for activation in attention.activations:
            activation.weight.normal_()
    return attention


def inputs(dtype=torch.float64):
    """Targets and behaviours; NaN at padding."""
    behaviors = torch.randn(USERS, LENGTH, D, dtype=dtype)
    behaviors[torch.arange(LENGTH) >= LENGTHS[:, None]] = torch.nan
    return torch.randn(TARGETS, D, dtype=dtype), behaviors


def by_hand(attention, targets, behaviors, offsets=OFFSETS, lengths=LENGTHS):
    """Target by target and behaviour by behaviour, from the concatenation."""
    rows = []
    for user, (start, stop) in enumerate(pairwise(offsets.tolist())):
        history = behaviors[user, : lengths[user]]
        for q in targets[start:stop]:
            h = torch.zeros_like(q)
            activations = []
            for k in history:
                x = torch.cat([q, k, q - k, q * k])
                for layer, activation in zip(attention.layers, attention.activations, strict=False):
                    x = x @ layer.weight.T + layer.bias
                    x = x.clamp(min=0) + activation.weight * x.clamp(max=0)
                activations.append(x @ attention.layers[-1].weight[0] + attention.layers[-1].bias[0])
            if activations:
                weights = torch.stack(activations)
                if attention.pooling == "softmax":
                    weights = weights.exp() / weights.exp().sum()
                if attention.pooling == "mean":
                    weights = weights / len(history)
                h = weights @ history
            rows.append(h)
    return torch.stack(rows)


# --- The values ---


@pytest.mark.parametrize("hidden", [(5,), (7, 1, 4)])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_output_and_every_gradient(pooling, hidden):
    attention = module(pooling, hidden)
    targets, behaviors = inputs()
    leaves = [targets.requires_grad_(), behaviors.requires_grad_(), *attention.parameters()]
    actual = attention(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    expected = by_hand(attention, targets, behaviors)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    assert torch.equal(actual[3:5], torch.zeros(2, D))  # of a user without behaviours
    incoming = torch.randn_like(actual)
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_forms_of_the_targets(pooling):
    """One target per user, and n targets per user, equal the ragged form with equal counts."""
    attention = module(pooling)
    _, behaviors = inputs()
    for shape in ((USERS, D), (USERS, 3, D), (USERS, 0, D)):
        targets = torch.randn(*shape, dtype=torch.float64)
        n = shape[1] if len(shape) == 3 else 1
        rows, offsets = targets.reshape(USERS * n, D), n * torch.arange(USERS + 1)
        actual = attention(targets, behaviors, seq_lens=LENGTHS)
        expected = attention(rows, behaviors, offsets.int(), seq_lens=LENGTHS.int())
        assert actual.shape == shape
        torch.testing.assert_close(actual.reshape(expected.shape), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_history_without_lengths_is_as_long_as_its_tensor(pooling):
    attention = module(pooling)
    targets = torch.randn(TARGETS, D, dtype=torch.float64)
    behaviors = torch.randn(USERS, LENGTH, D, dtype=torch.float64)
    full = torch.full((USERS,), LENGTH)
    expected = by_hand(attention, targets, behaviors, lengths=full)
    for lengths in (None, full):
        actual = attention(targets, behaviors, OFFSETS, seq_lens=lengths)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_behaviours_no_targets_no_users(pooling):
    attention = module(pooling)
    targets, behaviors = inputs()
    nothing = attention(targets, behaviors[:, :0], OFFSETS)
    assert torch.equal(nothing, torch.zeros(TARGETS, D, dtype=torch.float64))
    assert attention(targets[:0], behaviors, torch.zeros(USERS + 1, dtype=torch.int64)).shape == (0, D)
    assert attention(targets[:0], behaviors[:0], torch.zeros(1, dtype=torch.int64)).shape == (0, D)
    assert attention(targets[:0], behaviors[:0]).shape == (0, D)


def test_softmax_of_large_activations_stays_finite():
    attention = module("softmax", dtype=torch.float32)
    with torch.no_grad():
        attention.layers[-1].weight.mul_(1e4)
    targets, behaviors = inputs(torch.float32)
    parameters = list(attention.parameters())
    out = attention(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.square().sum(), parameters))
    lone = behaviors[3, 0].expand(5, D)  # of user 3's only behaviour the weight is 1
    torch.testing.assert_close(out[5:], lone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_low_precision(pooling, dtype):
    """The factored first layer is as close as the concatenation."""
    attention = module(pooling, dtype=dtype)
    targets, behaviors = inputs(dtype)
    behaviors = behaviors.nan_to_num()

    def factored(targets, behaviors, **parameters):
        call = (targets, behaviors, OFFSETS), {"seq_lens": LENGTHS}
        return torch.func.functional_call(attention, parameters, *call)

    def concatenated(targets, behaviors, **parameters):
        user = torch.arange(USERS).repeat_interleave(OFFSETS.diff())
        k = behaviors[user]  # [T, L, d]
        q = targets[:, None].expand_as(k)
        x = torch.cat([q, k, q - k, q * k], dim=-1)
        x = x @ parameters["layers.0.weight"].T + parameters["layers.0.bias"]
        x = x.clamp(min=0) + parameters["activations.0.weight"] * x.clamp(max=0)
        weights = (x @ parameters["layers.1.weight"].T + parameters["layers.1.bias"]).squeeze(-1)
        valid = torch.arange(LENGTH) < LENGTHS[user][:, None]
        if pooling == "softmax":
            weights = weights.masked_fill(~valid, -1e4).softmax(-1)
        if pooling == "mean":
            weights = weights / LENGTHS[user].clamp(min=1)[:, None]
        return torch.einsum("tl,tld->td", weights * valid, k)

    tensors = {"targets": targets, "behaviors": behaviors}
    tensors |= {name: p.detach() for name, p in attention.named_parameters()}
    # The last bias shifts all that a softmax is taken of: its gradient is 0 but for rounding.
    grads = [name for name in tensors if pooling != "softmax" or name != "layers.1.bias"]
    assert_matches_reference(factored, concatenated, tensors, grads=grads)


# --- In the place of LREA ---


def test_it_answers_every_call_of_lrea():
    """The same calls and shapes as LREA, and zeros in the same rows."""
    targets, behaviors = inputs(torch.float32)
    modules = LREA(D, LENGTH, 3), TargetAttention(D)
    calls = (
        lambda m: m(targets, behaviors, OFFSETS, seq_lens=LENGTHS),
        lambda m: m(targets[:USERS], behaviors.nan_to_num()),
        lambda m: m(targets[:8].view(USERS, 2, D), behaviors, seq_lens=LENGTHS),
    )
    for call in calls:
        compressed, full = (call(m) for m in modules)
        assert compressed.shape == full.shape and compressed.dtype == full.dtype
        assert torch.equal((compressed == 0).all(-1), (full == 0).all(-1))


# --- What PyTorch does with modules ---


@pytest.mark.parametrize("pooling", POOLINGS)
def test_autocast(pooling):
    attention = module(pooling, (5, 4), torch.float32)
    targets, behaviors = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    assert out.dtype == torch.bfloat16
    exact = attention(targets, behaviors, OFFSETS, seq_lens=LENGTHS)
    assert 0 < (out.float() - exact).norm() < 0.05 * exact.norm()
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in attention.parameters())


def test_compile_is_one_graph_for_all_sizes():
    """aot_eager traces forward and backward as inductor does, and generates no code."""
    attention = module("softmax", dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for users, targets_of_each, length in ((4, 3, 11), (5, 2, 7), (3, 8, 9)):
            targets = torch.randn(users * targets_of_each, D, requires_grad=True)
            behaviors = torch.randn(users, length, D, requires_grad=True)
            offsets = targets_of_each * torch.arange(users + 1)
            lengths = torch.arange(users) + 1
            leaves = [targets, behaviors, *attention.parameters()]
            results = []
            for call in (attention, compiled):
                out = call(targets, behaviors, offsets, seq_lens=lengths)
                results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(traced, eager)


@copied_both_ways
def test_copies(copied):
    attention, (targets, behaviors) = module(), inputs()
    assert_twins(copied(attention), attention, lambda x: x(targets, behaviors, OFFSETS, seq_lens=LENGTHS))


def test_repr_and_defaults():
    attention = TargetAttention(D)
    assert "embed_dim=6, hidden=(36,), pooling='sum'" in repr(attention)
    assert [*attention.state_dict()] == [
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.weight",
        "layers.1.bias",
        "activations.0.weight",
    ]
    assert attention.layers[0].weight.shape == (36, 4 * D)


# --- What is refused ---


def test_refused_options():
    for options, message in (
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"hidden": ()}, r"hidden must be a sequence of widths, each at least 1, of one or more layers, got \(\)"),
        ({"hidden": (4, 0)}, r"hidden must be a sequence .* got \(4, 0\)"),
        ({"hidden": 36}, "hidden must be a sequence .* got 36"),
        ({"pooling": "max"}, "pooling must be 'sum' or 'mean' or 'softmax', got 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            TargetAttention(**({"embed_dim": D} | options))


def test_refused_inputs():
    attention = module()
    targets, behaviors = inputs()
    for arguments, options, message in (
        ((targets, behaviors[0]), {}, r"behaviors must be \[U, L, embed_dim\]"),
        ((targets, behaviors[..., :5]), {}, r"behaviors must be \[U, L, embed_dim\] = \[4, 9, 6\], got \[4, 9, 5\]"),
        ((targets, behaviors), {}, r"targets must be \[U, embed_dim\] = \[4, 6\], got \[10, 6\]"),
        ((targets[None], behaviors), {}, r"targets must be \[U, n, embed_dim\]"),
        ((targets[None], behaviors, OFFSETS), {}, r"targets must be \[T, embed_dim\]"),
        ((targets, behaviors, OFFSETS[1:]), {}, r"target_offsets must be \[U\+1\] = \[5\], got \[4\]"),
        ((targets, behaviors, OFFSETS.float()), {}, "target_offsets must be int64 or int32, got float32"),
        ((targets, behaviors, OFFSETS - 1), {}, "target_offsets must be offsets from 0 to 10, got offsets from -1"),
        ((targets, behaviors, OFFSETS), {"seq_lens": LENGTHS[1:]}, r"seq_lens must be \[U\] = \[4\], got \[3\]"),
        ((targets, behaviors, OFFSETS), {"seq_lens": LENGTHS + 1}, "seq_lens must be between 0 and 9, got 10"),
        ((targets.float(), behaviors, OFFSETS), {}, "targets must have the dtype of the parameters, float64"),
        ((targets, behaviors.to("meta"), OFFSETS), {}, "behaviors must be on the device of the parameters, cpu"),
        ((targets.tolist(), behaviors), {}, "targets must be a torch.Tensor, got list"),
    ):
        with pytest.raises(ValueError, match=message):
            attention(*arguments, **options)

"""The module that makes the bias between sinks of a layer's hidden states."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import recattn
from recattn.testing import assert_matches_reference

POSITIONS = torch.tensor([[0, 3, 4, 8], [2, 5, -1, -1], [-1, -1, -1, -1]])


def by_hand(module: nn.Module, hidden: Tensor, positions: Tensor, causal: bool) -> Tensor:
    """One sequence, head and sink at a time."""
    out = hidden.new_zeros(len(positions), 1, positions.shape[1], positions.shape[1])
    size = module.hidden_size // module.num_heads
    for b, row in enumerate(positions.tolist()):
        sinks = [x for x in row if x >= 0]
        x = module.norm(hidden[b, sinks])
        q, k = module.query_proj(x), module.key_proj(x)
        for i in range(len(sinks)):
            seen = i + 1 if causal else len(sinks)
            for h in range(module.num_heads):
                part = slice(h * size, (h + 1) * size)
                weights = (k[:seen, part] @ q[i, part] / math.sqrt(size)).softmax(0)
                out[b, 0, i, :seen] += module.scale[0] * weights / module.num_heads
    return out


@pytest.mark.parametrize("causal", [False, True])
def test_is_the_formula(causal):
    module = recattn.nn.InterSinkBias(24, 3, bias_scale=7.0, causal=causal, dtype=torch.float64)
    hidden = torch.randn(3, 9, 24, dtype=torch.float64)
    own, expected = module(hidden, POSITIONS), by_hand(module, hidden, POSITIONS, causal)
    assert (own - expected).abs().max() < 1e-12
    parameters = list(module.parameters())
    incoming = torch.randn_like(own)
    for gradient, reference in zip(
        *(torch.autograd.grad(x, parameters, incoming) for x in (own, expected)), strict=True
    ):
        assert (gradient - reference).abs().max() < 1e-11


def formula(hidden: Tensor, heads: int, **parameters: Tensor) -> Tensor:
    """All sequences at once, in the dtype of the inputs."""
    rows = POSITIONS.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
    norm = parameters["norm.weight"], parameters["norm.bias"]
    x = torch.nn.functional.layer_norm(hidden.gather(1, rows), hidden.shape[-1:], *norm)
    q, k = (
        torch.nn.functional.linear(x, parameters[f"{name}_proj.weight"], parameters[f"{name}_proj.bias"])
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for name in ("query", "key")
    )
    hidden_keys = (POSITIONS < 0)[:, None, None, :]
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden_keys, -1e30).softmax(-1)
    both = (POSITIONS >= 0)[:, None, :, None] & ~hidden_keys
    return (parameters["scale"] * weights.mean(1, keepdim=True)).masked_fill(~both, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_every_gradient(dtype):
    module = recattn.nn.InterSinkBias(32, 4, bias_scale=10.0, dtype=dtype)

    def run(hidden, heads, **parameters):
        return functional_call(module, parameters, (hidden, POSITIONS))

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    inputs = {"hidden": torch.randn(3, 9, 32).to(dtype), "heads": 4, **parameters}
    assert_matches_reference(run, formula, inputs, grads=["hidden", *parameters])


def test_other_sequences_and_padding_change_nothing():
    """In the official code padded sinks take part."""
    module = recattn.nn.InterSinkBias(24, 3, dtype=torch.float64)
    hidden = torch.randn(3, 9, 24, dtype=torch.float64)
    expected = module(hidden, POSITIONS)
    alone = module(hidden[1:2], POSITIONS[1:2, :2])
    torch.testing.assert_close(expected[1:2, :, :2, :2], alone, rtol=0, atol=1e-14)
    assert not expected[1, :, 2:].any() and not expected[1, :, :, 2:].any() and not expected[2].any()
    sink_mask = torch.tensor([[True, True, True, False], [True, True, False, False], [False] * 4])
    masked = module(hidden, POSITIONS, sink_mask)
    alone = module(hidden[:1], POSITIONS[:1, :3])
    torch.testing.assert_close(masked[:1, :, :3, :3], alone, rtol=0, atol=1e-14)
    assert not masked[0, :, 3:].any() and not masked[0, :, :, 3:].any()


def test_dropout_only_while_training():
    module = recattn.nn.InterSinkBias(24, 3, dropout=0.9)
    hidden = torch.randn(3, 9, 24)
    assert (module(hidden, POSITIONS) == 0).float().mean() > (module.eval()(hidden, POSITIONS) == 0).float().mean()


def test_begins_at_its_scale_and_resets():
    module = recattn.nn.InterSinkBias(24, 3, bias_scale=10.0)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(5.0)
    module.reset_parameters()
    assert module.scale.tolist() == [10.0] and module.norm.weight.eq(1).all() and module.norm.bias.eq(0).all()
    assert module.query_proj.weight.std() > 0
    assert repr(module).startswith("InterSinkBias(\n  hidden_size=24, num_heads=3, dropout=0.0, causal=False")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((24, 5), "hidden_size must be a multiple of 5 heads, got 24"),
        ((24, 0), "num_heads must be at least 1, got 0"),
    ],
)
def test_wrong_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        recattn.nn.InterSinkBias(*arguments)


def test_wrong_arguments():
    module = recattn.nn.InterSinkBias(24, 3)
    with pytest.raises(
        ValueError, match=r"hidden_states must be \[B, N, hidden_size\] = \[2, 9, 24\], got \[2, 9, 8\]"
    ):
        module(torch.randn(2, 9, 8), POSITIONS[:2])
    with pytest.raises(ValueError, match=r"sink_positions must be \[B, M\] = \[3, 4\], got \[2, 4\]"):
        module(torch.randn(3, 9, 24), POSITIONS[:2])
    with pytest.raises(ValueError, match=r"dropout must be at least 0 and below 1, got 1\.5"):
        recattn.nn.InterSinkBias(24, 3, dropout=1.5)


@pytest.mark.parametrize(
    "positions, message",
    [
        ([9, -1], r"below the sequence length 4, got 9 at index \[0, 0\]"),
        ([-5, -1], r"token positions, or -1 for padding, got -5 at index \[0, 0\]"),
        ([2, 1], r"strictly ascending, padded with -1 at the end"),
        ([2, 2], r"strictly ascending, padded with -1 at the end"),
        ([-1, 2], r"strictly ascending, padded with -1 at the end"),
    ],
)
def test_wrong_positions_are_refused_as_by_the_attention(positions, message):
    positions = torch.tensor([positions])
    with pytest.raises(ValueError, match=f"sink_positions must be {message}"):
        recattn.nn.InterSinkBias(24, 3)(torch.randn(1, 4, 24), positions)
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match=f"sink_positions must be {message}"):
        recattn.sink_attention(q, q, q, positions, torch.zeros(1, 1, 2, 2))


def test_wrong_masks_are_refused():
    module, hidden = recattn.nn.InterSinkBias(24, 3), torch.randn(3, 9, 24)
    with pytest.raises(ValueError, match=r"sink_mask must be \[B, M\] = \[3, 4\], got \[3, 3\]"):
        module(hidden, POSITIONS, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="sink_mask must be bool, got int64"):
        module(hidden, POSITIONS, torch.ones(3, 4, dtype=torch.int64))


@pytest.mark.parametrize("length, sinks", [(0, 0), (0, 3), (5, 0)])
def test_nothing_there(length, sinks):
    module = recattn.nn.InterSinkBias(24, 3)
    hidden = torch.randn(2, length, 24, requires_grad=True)
    bias = module(hidden, torch.full((2, sinks), -1))
    assert bias.shape == (2, 1, sinks, sinks) and not bias.any()
    for gradient in torch.autograd.grad(bias.sum(), [hidden, *module.parameters()]):
        assert not gradient.any()


def test_a_mask_makes_no_sink_of_a_padded_one():
    module, hidden = recattn.nn.InterSinkBias(24, 3), torch.randn(3, 9, 24)
    assert torch.equal(module(hidden, POSITIONS, torch.ones(3, 4, dtype=torch.bool)), module(hidden, POSITIONS))

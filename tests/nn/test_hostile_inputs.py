"""NaN, infinities and huge numbers anywhere in a module's input: padding never matters, and sequences never mix."""

import math
from collections.abc import Callable
from typing import NamedTuple

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn

import recattn
from recattn.nn._masks import zero_padding
from recattn.nn.sink_tokens import insert_sink_embeddings
from tests.helpers.strategies import seeds

B, N, E, M, H = 3, 6, 8, 2, 2
BAD = (math.nan, math.inf, -math.inf, 3e38)
lengths = st.lists(st.integers(0, N), min_size=B, max_size=B).map(torch.tensor)


class Case(NamedTuple):
    """`run(module, lengths, *inputs)` returns [B, ...]. Inputs [B, N, ...] named in `padded` have padding."""

    build: Callable[[], nn.Module]
    run: Callable[..., Tensor]
    inputs: tuple[tuple[int, ...], ...]
    padded: tuple[bool, ...]
    side: str = "right"
    tokens: bool = True  # whether the output is [B, N, ...], and free at padding
    has_reference: bool = True  # a cross-attention is PyTorch's

    def valid(self, lengths: Tensor) -> Tensor:
        valid = torch.arange(N) < lengths[:, None]
        return valid.flip(1) if self.side == "left" else valid


def self_attention(module, lengths, x):
    sinks = torch.tensor([[0, 2], [1, 5], [3, -1]])
    bias = torch.linspace(-2, 2, B * M * M).view(B, 1, M, M).to(x.dtype)
    return module(x, x, x, seq_lens=lengths, sink_positions=sinks, inter_sink_bias=bias)[0]


def three_inputs(module, lengths, q, k, v):
    inputs = (x.transpose(0, 1) for x in (q, k, v))
    return module(*inputs, seq_lens=lengths, is_causal=True)[0].transpose(0, 1)


def cross_attention(module, lengths, query, keys):
    return module(query, keys, keys, key_padding_mask=torch.arange(N) >= lengths[:, None])[0]


def by_mask(module, lengths, queries, x):
    padding = (torch.arange(N) >= lengths[:, None]).flip(1)
    return module(queries, x, x, key_padding_mask=padding, is_causal=True)[0]


def bias_at_sinks(module, lengths, x):
    """With left padding, a padded position of -1, clamped, points at padding as well."""
    positions = torch.tensor([[0, 3], [2, 5], [4, -1]])
    return module(x, positions, (positions >= N - lengths[:, None]) & (positions >= 0))


def pooled(stage):
    def run(module, lengths, x):
        sinks = torch.tensor([[0, 2], [1, 5], [3, -1]])
        return module(x, torch.arange(N) < lengths[:, None], sinks, stage=stage)

    return run


def with_sinks(module, lengths, x, sinks):
    inserted = insert_sink_embeddings(module(x), sinks, lengths)
    return inserted.embeddings.sum(dim=1)


def over_history(module, lengths, targets, x):
    return module(targets, x, seq_lens=lengths)


def packed_targets(module, lengths, targets, x):
    return module(targets.flatten(0, 1), x, 2 * torch.arange(B + 1), seq_lens=lengths).view(B, 2, -1)


def gaussians(module, lengths, mean, cov):
    return torch.cat(module(mean, cov, seq_lens=lengths), dim=-1)


X, ONE, TWO = (B, N, E), (B, E), (B, 2, E)
CASES = {
    "SinkAttention": Case(lambda: recattn.nn.SinkAttention(E, H), self_attention, (X,), (True,)),
    "SinkAttention, three inputs": Case(
        lambda: recattn.nn.SinkAttention(E, H, num_kv_heads=1, padding_side="left", batch_first=False),
        three_inputs,
        (X, X, X),
        (True, True, True),
        side="left",
    ),
    "SinkAttention, cross": Case(
        lambda: recattn.nn.SinkAttention(E, H),
        cross_attention,
        ((B, 4, E), X),
        (False, True),
        tokens=False,
        has_reference=False,
    ),
    "RefinedSelfAttention": Case(
        lambda: recattn.nn.RefinedSelfAttention(E, H, max_len=N), by_mask, (X, X), (True, True), side="left"
    ),
    "RefinedSelfAttention, value": Case(
        lambda: recattn.nn.RefinedSelfAttention(E, H, max_len=N, mechanism="value"),
        by_mask,
        (X, X),
        (True, True),
        side="left",
    ),
    "StochasticRefinedSelfAttention": Case(
        lambda: recattn.nn.StochasticRefinedSelfAttention(E, H, max_len=N, padding_side="left"),
        gaussians,
        (X, X),
        (True, True),
        side="left",
    ),
    "StochasticRefinedSelfAttention, STOSA's": Case(
        lambda: recattn.nn.StochasticRefinedSelfAttention(
            E, H, max_len=N, refine=False, causal=False, padding_side="right"
        ),
        gaussians,
        (X, X),
        (True, True),
    ),
    "InterSinkBias": Case(
        lambda: recattn.nn.InterSinkBias(E, H), bias_at_sinks, (X,), (True,), side="left", tokens=False
    ),
    "LREA": Case(lambda: recattn.nn.LREA(E, N, 3, H), over_history, (TWO, X), (False, True), tokens=False),
    "LREA, packed": Case(lambda: recattn.nn.LREA(E, N, 3), packed_targets, (TWO, X), (False, True), tokens=False),
    "TargetAttention": Case(
        lambda: recattn.nn.TargetAttention(E, (5,), pooling="softmax"),
        over_history,
        (ONE, X),
        (False, True),
        tokens=False,
    ),
    "TargetAttention, packed": Case(
        lambda: recattn.nn.TargetAttention(E, (5,)), packed_targets, (TWO, X), (False, True), tokens=False
    ),
    "SinkPooling": Case(recattn.nn.SinkPooling, pooled("tokens"), (X,), (True,), tokens=False),
    "SinkPooling, sinks": Case(recattn.nn.SinkPooling, pooled("sinks"), (X,), (True,), tokens=False),
    "insert_sink_embeddings": Case(nn.Identity, with_sinks, (X, X), (True, True), tokens=False),
}


class Run(NamedTuple):
    output: Tensor
    gradients: list[Tensor]  # of the inputs
    of_parameters: list[Tensor]


def train(case: Case, module: nn.Module, lengths: Tensor, inputs: list[Tensor]) -> Run:
    """A loss over the output at valid tokens, and all gradients."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    parameters = list(module.parameters())
    out = case.run(module, lengths, *leaves)
    counted = out[case.valid(lengths)] if case.tokens else out
    weights = torch.linspace(-1, 1, max(counted.numel(), 1))[: counted.numel()].view_as(counted)
    gradients = torch.autograd.grad((counted.float() * weights).sum(), leaves + parameters, allow_unused=True)
    return Run(counted.detach(), list(gradients[: len(leaves)]), list(gradients[len(leaves) :]))


def draw(case: Case, seed: int, dtype: torch.dtype) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(seed)
    module = case.build().to(dtype)
    return module, [torch.randn(shape).to(dtype) for shape in case.inputs]


dtypes = st.sampled_from((torch.float32, torch.bfloat16))


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=10)
@example(torch.tensor([4, 0, 1]), 0, [math.nan], torch.float32)
@given(lengths, seeds, st.lists(st.sampled_from(BAD), min_size=1, max_size=7), dtypes)
def test_padding_may_hold_anything(name, lengths, seed, bad, dtype):
    case = CASES[name]
    module, inputs = draw(case, seed, dtype)
    padding = ~case.valid(lengths)[..., None].expand(X)
    zeros = [x.masked_fill(padding, 0) if padded else x for x, padded in zip(inputs, case.padded, strict=True)]
    garbage = torch.tensor(bad).to(dtype).repeat(math.ceil(B * N * E / len(bad)))[: B * N * E].view(X)
    filled = [x.where(~padding, garbage) if padded else x for x, padded in zip(inputs, case.padded, strict=True)]
    clean, dirty = (train(case, module, lengths, x) for x in (zeros, filled))
    assert torch.equal(clean.output, dirty.output) and clean.output.isfinite().all()
    for a, b in zip(clean.of_parameters, dirty.of_parameters, strict=True):
        assert torch.equal(a, b)
    for a, b, padded in zip(clean.gradients, dirty.gradients, case.padded, strict=True):
        assert torch.equal(a, b)
        if padded:
            assert (b[padding] == 0).all()
    with torch.no_grad():
        served = case.run(module, lengths, *filled)
    assert torch.equal(served[case.valid(lengths)] if case.tokens else served, clean.output)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=10)
@given(lengths, seeds, st.data())
def test_a_sequence_is_alone_with_its_numbers(name, lengths, seed, data):
    """One bad entry: the other sequences stay as they were, and its own row is NaN or inf where the reference's is."""
    case = CASES[name]
    user, which = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, len(case.inputs) - 1))
    lengths[user] = lengths[user].clamp(min=1)
    module, inputs = draw(case, seed, torch.float32)
    tokens = case.valid(lengths)[user].nonzero().flatten().tolist() if case.padded[which] else [0]
    token, entry = data.draw(st.sampled_from(tokens)), data.draw(st.integers(0, E - 1))
    dirty = [x.clone() for x in inputs]
    row = dirty[which][user] if dirty[which].dim() == 2 else dirty[which][user, token]
    row[entry] = data.draw(st.sampled_from(BAD[:3]))

    outputs, gradients = zip(*(sequences(case, module, lengths, x) for x in (inputs, dirty)), strict=True)
    others = torch.arange(B) != user
    assert torch.equal(*(out[others] for out in outputs))
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a[others], b[others])
    if case.has_reference and hasattr(module, "impl"):
        module.impl = "reference"
        expected, _ = sequences(case, module, lengths, dirty)
        own, expected = (x[user, token] if case.tokens else x[user] for x in (outputs[1], expected))
        assert not own[~expected.isfinite()].isfinite().any()


def sequences(case: Case, module: nn.Module, lengths: Tensor, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of its sum."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = case.run(module, lengths, *leaves)
    return out.detach(), list(torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize(
    "name", ["SinkAttention", "RefinedSelfAttention", "StochasticRefinedSelfAttention", "InterSinkBias"]
)
def test_compiles_in_one_graph(name):
    case, lengths = CASES[name], torch.tensor([4, 0, 1])
    module, inputs = draw(case, 0, torch.float32)
    dirty = [x.where(case.valid(lengths)[..., None], math.nan) for x in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager, own = (train(case, called, lengths, dirty) for called in (module, compiled))
    for a, b in zip(eager, own, strict=True):
        torch.testing.assert_close(a, b)
        assert all(x.isfinite().all() for x in b)


def test_one_tensor_is_masked_once():
    """It stays one tensor, so that the projections of queries, keys and values share one matmul."""
    x, y = torch.randn(2, B, N, E)
    valid = torch.arange(N) < torch.tensor([[4], [0], [1]])
    queries, keys, values = zero_padding(valid, x, y, y)
    assert keys is values and queries is not keys
    assert torch.equal(queries, x * valid[..., None]) and torch.equal(keys, y * valid[..., None])

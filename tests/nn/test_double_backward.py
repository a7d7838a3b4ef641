"""Second gradients through modules: a penalty on the gradients trains every parameter around the operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradgradcheck
from torch.func import functional_call

import recattn

B, N, E, H = 2, 6, 8, 2
SINKS = torch.tensor([[0, 2, 5], [1, 3, -1]])
LENGTHS = torch.tensor([6, 4])
PADDING = torch.arange(N) >= LENGTHS[:, None]
ON_GPU = torch.cuda.is_available()


def with_bias(module: nn.ModuleDict, x: Tensor) -> Tensor:
    """A CTR-Sink layer: the bias, and the attention that takes it."""
    bias = module["bias"](x, SINKS, (SINKS >= 0) & (LENGTHS[:, None] > SINKS))
    options = {"sink_positions": SINKS, "inter_sink_bias": bias, "key_padding_mask": PADDING}
    return module["attention"](x, x, x, **options)[0]


class Layer(nn.Module):
    """`run(module, x)` as a module."""

    def __init__(self, inner: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.run = inner, run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.inner, x)


def sink(**options) -> Layer:
    inner = {"bias": recattn.nn.InterSinkBias(E, H, **options), "attention": recattn.nn.SinkAttention(E, H, **options)}
    return Layer(nn.ModuleDict(inner), with_bias)


def refined(mechanism: str, **options) -> Layer:
    inner = recattn.nn.RefinedSelfAttention(E, H, max_len=N, mechanism=mechanism, padding_side="right", **options)
    return Layer(inner, lambda m, x: m(x.sin(), x, x, is_causal=True, key_padding_mask=PADDING)[0])


def stochastic(**options) -> Layer:
    inner = recattn.nn.StochasticRefinedSelfAttention(E, H, max_len=N, rank=3, padding_side="right", **options)
    return Layer(inner, lambda m, x: torch.cat(m(x, x.cos(), seq_lens=LENGTHS), dim=-1))


def lrea(**options) -> Layer:
    def run(module: nn.Module, x: Tensor) -> Tensor:
        compressed = module.compress(x, LENGTHS)
        return module(x[:, :2], None, seq_lens=LENGTHS, compressed=compressed) + module.loss(compressed, "mean")

    module = recattn.nn.LREA(E, N, 3, H, **options)
    with torch.no_grad():
        module.w_decomp.normal_()
    return Layer(module, run)


def target(**options) -> Layer:
    inner = recattn.nn.TargetAttention(E, (5, 3), pooling="softmax")
    return Layer(inner, lambda m, x: m(x.flatten(0, 1)[:5], x, torch.tensor([0, 2, 5]), seq_lens=LENGTHS))


LAYERS = {
    "SinkAttention and InterSinkBias": sink,
    **{
        f"RefinedSelfAttention, {mechanism}": lambda m=mechanism, **options: refined(m, **options)
        for mechanism in ("simple", "value", "additive", "stochastic")
    },
    "StochasticRefinedSelfAttention": stochastic,
    "StochasticRefinedSelfAttention, STOSA's": lambda **options: stochastic(refine=False, **options),
    "LREA": lrea,
    "TargetAttention": target,
}


def penalised(layer: Layer, x: Tensor, impl: str | None) -> list[Tensor]:
    """The gradients of the loss, and those of a penalty on them, for x and every parameter."""
    for module in layer.modules():
        if hasattr(module, "impl"):
            module.impl = impl
    leaves = [x, *layer.parameters()]
    # The cubes keep a second derivative that lost the operator's share from being no tensor at all.
    loss = layer(x).square().sum() + sum(leaf.pow(3).sum() for leaf in leaves)
    gradients = grad(loss, leaves, create_graph=True)
    return [*gradients, *grad(sum(gradient.square().sum() for gradient in gradients), leaves)]


@pytest.mark.parametrize("name", LAYERS)
def test_a_penalty_on_gradients_is_the_references(name):
    layer = LAYERS[name]().double()
    x = torch.randn(B, N, E, dtype=torch.float64, requires_grad=True)
    for actual, expected in zip(penalised(layer, x, None), penalised(layer, x, "reference"), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", LAYERS)
def test_gradgradcheck_of_every_parameter(name):
    layer = LAYERS[name]().double()
    names = [name for name, _ in layer.named_parameters()]
    x = torch.randn(B, N, E, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), x)

    assert gradgradcheck(function, [x, *layer.parameters()], fast_mode=True)


@pytest.mark.parametrize(
    "name, op",
    [
        ("SinkAttention and InterSinkBias", "sink_attention|inter_sink_bias"),
        ("RefinedSelfAttention, simple", "refined_attention"),
        ("StochasticRefinedSelfAttention", "wasserstein_attention"),
    ],
)
def test_dropout_of_a_kernel_is_refused_by_name(name, op):
    """The reference cannot redraw a kernel's dropout mask, so this raises instead of losing part of the penalty."""
    pytest.importorskip("triton")
    layer = LAYERS[name](dropout=0.5, impl="triton").train()
    x = torch.randn(B, N, E, requires_grad=True)
    if ON_GPU:
        layer, x = layer.cuda(), x.detach().cuda().requires_grad_()
    loss = layer(x).square().sum()
    grad(loss, [x, *layer.parameters()], retain_graph=True)
    message = rf"({op}) with dropout_p=0.5 has no second derivative \(create_graph=True\): impl='reference' has"
    with pytest.raises(NotImplementedError, match=message):
        grad(loss, [x, *layer.parameters()], create_graph=True)


@pytest.mark.parametrize("name", [name for name in LAYERS if "SelfAttention" in name or "Sink" in name])
def test_dropout_of_the_reference_is_differentiated_twice(name):
    """impl=None on a CPU, with one dropout mask throughout."""
    layer = LAYERS[name](dropout=0.3, impl="reference").double().train()
    x = torch.randn(B, N, E, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return layer(x)

    assert gradgradcheck(function, x, fast_mode=True)


@pytest.mark.skipif(ON_GPU, reason="which of PyTorch's attentions serves a GPU is PyTorch's choice")
def test_cross_attention_raises_as_pytorchs_own_does():
    module = recattn.nn.SinkAttention(E, H)
    x = torch.randn(B, N, E, requires_grad=True)
    (gradient,) = grad(module(x[:, :3], x, x)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"scaled_dot_product.*_backward is not implemented"):
        gradient.sum().backward()

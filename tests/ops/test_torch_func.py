"""torch.func's transforms of every function: by kernels, and what kernels cannot do by the reference."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

import recattn
from tests.helpers.operator_cases import CASES

NAMES = ["sink", "packed", "refined", "gaussian", "compress", "items", "restored", "absorb", "absorbed", "by item"]
KERNELS = ["sink", "packed", "refined", "gaussian", "compress", "restored", "absorb"]


def as_function(name: str, dtype: torch.dtype, **options):
    """As a function of its floating inputs, and these."""
    case = CASES[name]
    inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in case.inputs().items()} | options
    floating = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]

    def function(*tensors: Tensor) -> Tensor:
        out = case.function(**{**inputs, **dict(zip(floating, tensors, strict=True))})
        return out if isinstance(out, Tensor) else torch.cat([x.flatten() for x in out])

    return function, [inputs[name].to(dtype) for name in floating]


def gradients(function, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_transforms(name):
    function, tensors = as_function(name, torch.float64)
    every = tuple(range(len(tensors)))

    def loss(*tensors):
        return function(*tensors).square().sum()

    close = {"rtol": 1e-9, "atol": 1e-9}
    expected = gradients(function, tensors)
    torch.testing.assert_close(grad(loss, argnums=every)(*tensors), expected, **close)

    halves = [x / 2 for x in tensors]
    batched = vmap(grad(loss, argnums=every))(*(torch.stack(pair) for pair in zip(tensors, halves, strict=True)))
    both = (torch.stack(pair) for pair in zip(expected, gradients(function, halves), strict=True))
    torch.testing.assert_close(batched, tuple(both), **close)

    directions = [torch.randn_like(x) for x in tensors]
    _, change = jvp(loss, tuple(tensors), tuple(directions))
    torch.testing.assert_close(change, sum((a * b).sum() for a, b in zip(expected, directions, strict=True)), **close)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name):
    """First gradients are the kernels'; those of gradients, by torch.func or autograd around it, the reference's."""
    function, tensors = as_function(name, torch.float32, **({} if name == "absorb" else {"impl": "cpu"}))
    reference, exact = as_function(name, torch.float64, **({} if name == "absorb" else {"impl": "reference"}))
    every = tuple(range(len(tensors)))

    def loss(function, *tensors):
        return function(*tensors).square().sum()

    close = {"rtol": 1e-5, "atol": 1e-5}
    first = functools.partial(grad(loss, argnums=tuple(i + 1 for i in every)), function)
    expected = gradients(function, tensors)
    torch.testing.assert_close(first(*tensors), expected, **close)

    # One input for each of the batch, the others shared: a gradient of each of them all the same.
    batch = torch.stack([tensors[0], tensors[0] / 2])
    batched = vmap(first, (0, *(None for _ in every[1:])))(batch, *tensors[1:])
    both = zip(expected, gradients(function, [batch[1], *tensors[1:]]), strict=True)
    torch.testing.assert_close(batched, tuple(map(torch.stack, both)), **close)

    def after_a_step(function, *tensors):
        steps = grad(loss, argnums=tuple(i + 1 for i in every))(function, *tensors)
        return loss(function, *(x - 0.1 * step for x, step in zip(tensors, steps, strict=True)))

    exact_leaves = [x.requires_grad_() for x in exact]
    second = [x.float() for x in torch.autograd.grad(after_a_step(reference, *exact_leaves), exact_leaves)]
    scale = {"rtol": 1e-4, "atol": 1e-5 * max(x.abs().max().item() for x in second)}
    of_func = grad(after_a_step, argnums=tuple(i + 1 for i in every))(function, *tensors)
    leaves = [x.requires_grad_() for x in tensors]
    of_autograd = torch.autograd.grad(after_a_step(function, *leaves), leaves)
    for got in (of_func, of_autograd):
        torch.testing.assert_close(list(got), second, **scale)


@pytest.mark.parametrize("name", ["sink triton", "stochastic"])
def test_triton(name):
    """What its forwards keep beyond saved tensors; a chain of Functions."""
    torch.manual_seed(0)
    tensors = [torch.randn(1, 1, 5, 4) for _ in range(3)]
    if name == "stochastic":
        tensors += [torch.randn(5, 6) for _ in range(2)]
        function = functools.partial(recattn.refined_attention, mechanism="stochastic", impl="triton")
    else:
        tensors.append(torch.randn(1, 1, 2, 2))
        sinks = torch.tensor([[1, 4]])

        def function(q, k, v, bias):
            return recattn.sink_attention(q, k, v, sinks, bias, impl="triton")

    first = grad(lambda *tensors: function(*tensors).square().sum(), argnums=tuple(range(len(tensors))))
    batched = vmap(first)(*(x[None] for x in tensors))
    torch.testing.assert_close([x[0] for x in batched], list(gradients(function, tensors)))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_index_tensors_are_mapped(impl, capfd):
    inputs = CASES["sink"].inputs()
    names = ("q", "k", "v", "inter_sink_bias", "sink_positions", "seq_lens")
    batch = [torch.stack([inputs[name], inputs[name].flip(0)]) for name in names]

    def loss(*tensors):
        return recattn.sink_attention(**dict(zip(names, tensors, strict=True)), impl=impl).square().sum()

    first = grad(loss, argnums=(0, 1, 2, 3))
    both = zip(*(first(*(x[i] for x in batch)) for i in (0, 1)), strict=True)
    torch.testing.assert_close(vmap(first)(*batch), tuple(map(torch.stack, both)))
    assert not capfd.readouterr().err  # PyTorch would tell of operators without a rule
    with pytest.raises(NotImplementedError, match="no vmap over an axis of size 0"):
        vmap(first)(*(x[:0] for x in batch))


def test_jacobian():
    function, (q, *others) = as_function("sink", torch.float32, impl="cpu")
    rows = jacrev(lambda q: function(q, *others)[0, :, :2].flatten())(q)
    leaf = q.clone().requires_grad_()
    outs = function(leaf, *others)[0, :, :2].flatten()
    expected = [torch.autograd.grad(out, leaf, retain_graph=True)[0] for out in outs]
    torch.testing.assert_close(rows, torch.stack(expected))


def test_forward_mode_is_the_reference():
    function, tensors = as_function("sink", torch.float32)
    _, pull_back = vjp(function, *tensors)
    cotangent = torch.ones(3, 2, 7, 4)
    with pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* need impl='reference'"):
        jvp(pull_back, (cotangent,), (cotangent,))
    expected = jvp(as_function("sink", torch.float32, impl="reference")[0], tuple(tensors), tuple(tensors))
    torch.testing.assert_close(jvp(function, tuple(tensors), tuple(tensors)), expected)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, x) for x in tensors]
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent, expected[1])
    by_kernel, _ = as_function("sink", torch.float32, impl="cpu")
    with pytest.raises(NotImplementedError, match=r"cannot run impl='cpu' here: forward-mode .* need impl='reference'"):
        jvp(by_kernel, tuple(tensors), tuple(tensors))


def test_dropout():
    """By the same seed or by different ones; a second derivative is refused."""
    function, tensors = as_function("sink dropout", torch.float32, impl="cpu")
    pairs = [torch.stack([x, x]) for x in tensors]
    first, second = vmap(function, randomness="same")(*pairs)
    assert torch.equal(first, second)
    first, second = vmap(function, randomness="different")(*pairs)
    assert not torch.equal(first, second)
    slope = grad(lambda q: function(q, *tensors[1:]).sum())
    with pytest.raises(NotImplementedError, match=r"dropout_p=0.5 has no second derivative .* impl='reference' has"):
        grad(lambda q: slope(q).square().sum())(tensors[0])


class Layer(nn.Module):
    """CTR-Sink's layer, then a refined attention."""

    def __init__(self):
        super().__init__()
        self.bias = recattn.nn.InterSinkBias(8, 2, impl="cpu")
        self.attention = recattn.nn.SinkAttention(8, 2, impl="cpu")
        self.refined = recattn.nn.RefinedSelfAttention(8, 2, max_len=6, impl="cpu")

    def forward(self, x: Tensor, sinks: Tensor, padding: Tensor) -> Tensor:
        x, sinks, padding = x[None], sinks[None], padding[None]
        bias = self.bias(x, sinks, sinks >= 0)
        x = self.attention(x, x, x, sink_positions=sinks, inter_sink_bias=bias, key_padding_mask=padding)[0]
        return self.refined(x, x, x)[0]


def test_gradients_of_parameters_for_each_sample():
    torch.manual_seed(0)
    layer = Layer()
    x, sinks = torch.randn(3, 6, 8), torch.tensor([[0, 2, 5], [1, 3, -1], [0, -1, -1]])
    padding = torch.arange(6) >= torch.tensor([6, 4, 1])[:, None]
    parameters = {name: x.detach() for name, x in layer.named_parameters()}

    def loss(parameters, *sample):
        return functional_call(layer, parameters, sample).square().sum()

    by_sample = vmap(grad(loss), (None, 0, 0, 0))(parameters, x, sinks, padding)
    for i in range(3):
        expected = torch.autograd.grad(layer(x[i], sinks[i], padding[i]).square().sum(), [*layer.parameters()])
        torch.testing.assert_close([x[i] for x in by_sample.values()], list(expected))


def test_compiled():
    """Kernels do not run there."""
    function, (q, *others) = as_function("sink", torch.float32)
    slope = grad(lambda q: function(q, *others).square().sum())
    torch.testing.assert_close(torch.compile(slope, backend="aot_eager", fullgraph=True)(q), slope(q))

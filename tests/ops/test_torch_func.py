"""torch.func's transforms of every function agree with plain PyTorch's."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

from tests.helpers.operator_cases import CASES

NAMES = ["sink", "packed", "refined", "gaussian", "compress", "items", "restored", "absorb", "absorbed", "by item"]


def as_function(name: str):
    """As a function of its floating inputs, in float64."""
    case = CASES[name]
    inputs = {name: x.detach() if isinstance(x, Tensor) else x for name, x in case.inputs().items()}
    floating = [name for name, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()]

    def function(*tensors: Tensor) -> Tensor:
        out = case.function(**{**inputs, **dict(zip(floating, tensors, strict=True))})
        return out if isinstance(out, Tensor) else torch.cat([x.flatten() for x in out])

    return function, [inputs[name].double() for name in floating]


def gradients(function, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*leaves).square().sum(), leaves)


@pytest.mark.parametrize("name", NAMES)
def test_transforms(name):
    function, tensors = as_function(name)
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

"""Runs a call: outputs, and gradients of any of its tensors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.fuzz.calls import Call
from tests.fuzz.draws import lay_out


class Uses(torch.autograd.Function):
    """Identity of `out`, of which also `leaves` are inputs: a call of no sequences uses no tensor.

    The incoming gradient is laid out otherwise in memory.
    """

    @staticmethod
    def forward(ctx, layout, out, *leaves):
        ctx.layout, ctx.shapes = layout, [(x.shape, x.dtype) for x in leaves]
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient):
        zeros = (gradient.new_zeros(shape, dtype=dtype) for shape, dtype in ctx.shapes)
        return None, lay_out(gradient, ctx.layout), *zeros


def using(function: Callable, wanted: Sequence[str], layout: str = "contiguous") -> Callable[..., tuple[Tensor, ...]]:
    """The function, with a gradient for each of the arguments `wanted`."""

    def with_gradients(**arguments):
        outs = function(**arguments)
        outs = outs if isinstance(outs, tuple) else (outs,)
        leaves = [arguments[name] for name in wanted]
        return tuple(Uses.apply(layout, out, *leaves) for out in outs) if wanted else outs

    return with_gradients


def run(call: Call, tensors, options, incoming=None, wanted=None) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and the gradients of the tensors `wanted`, by default all."""
    wanted = (list(tensors) if wanted is None else wanted) if call.differentiable else []
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    outs = using(call.function, wanted)(**leaves, **options)
    if not wanted:
        return list(outs), {}
    incoming = incoming_of(outs) if incoming is None else incoming
    gradients = torch.autograd.grad(outs, [leaves[name] for name in wanted], incoming)
    return [out.detach() for out in outs], dict(zip(wanted, gradients, strict=True))


def incoming_of(outs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(out.shape, generator=generator).to(out) for out in outs]

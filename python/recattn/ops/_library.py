"""The `recattn::` operator namespace. C++ kernels add themselves to it when the extension loads."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import recattn._extension  # noqa: F401  (registers the compiled operators)

_LIBRARY = torch.library.Library("recattn", "FRAGMENT")


def define(schema: str, *, cpu: Callable, cuda: Callable | None = None, fake: Callable) -> Callable:
    """Define `recattn::<schema>` with its kernels and its fake kernel; returns the operator to call."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _isolated(cpu), "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, _isolated(cuda), "CUDA")
    torch.library.register_fake(f"recattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.recattn, name).default


def is_traced(*tensors: Tensor) -> bool:
    """Whether a call makes a graph or tells shapes, by operators. Else their kernels may be called past the dispatcher,
    which takes several microseconds."""
    return torch.compiler.is_compiling() or any(type(x) is not Tensor or x.is_meta for x in tensors)


def _isolated(kernel: Callable) -> Callable:
    """What a kernel is made of is neither recorded by autograd nor cast by the caller's autocast."""

    @functools.wraps(kernel)
    def isolated(*args):
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return kernel(*args)

    return isolated


def differentiable_again(reference: Callable) -> Callable:
    """For the backward of an autograd.Function: under create_graph it runs `reference`, whose gradients have gradients.

    (`once_differentiable` would leave the Function out of second derivatives, silently where the incoming gradient
    needs none itself.) `reference` takes what forward does, (*tensors, options), and returns its differentiable
    outputs, which come first; forward saves its tensors first, and `ctx.options`.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def differentiable_backward(ctx, *douts):
            if not torch.is_grad_enabled():  # nor is it where torch.compile traces a backward
                return backward(ctx, *douts)
            return *_reference_gradients(ctx, reference, douts), None

        return differentiable_backward

    return decorate


def _reference_gradients(ctx, reference: Callable, douts: tuple[Tensor, ...]) -> list[Tensor | None]:
    needed = ctx.needs_input_grad[:-1]
    saved = ctx.saved_tensors[: len(needed)]
    # A view keeps apart an input that is given twice.
    tensors = [x.view_as(x) if wanted else x for x, wanted in zip(saved, needed, strict=True)]
    inputs = [x for x, wanted in zip(tensors, needed, strict=True) if wanted]
    with torch.autocast(douts[0].device.type, enabled=False):
        outs = reference(*tensors, ctx.options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        # An output may depend on no input that needs a gradient; that of an empty batch depends on none at all.
        pairs = [(out, dout) for out, dout in zip(outs, douts, strict=False) if out.requires_grad]
        if pairs:
            outs, douts = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outs, inputs, douts, create_graph=True, materialize_grads=True)
        else:
            gradients = [torch.zeros_like(x) for x in inputs]
    remaining = iter(gradients)
    return [next(remaining) if wanted else None for wanted in needed]


def refuse_dropout(op: str, dropout_p: float) -> None:
    """A reference cannot draw again what a kernel dropped."""
    if dropout_p > 0:
        raise NotImplementedError(
            f"{op} with dropout_p={dropout_p} has no second derivative (create_graph=True): impl='reference' has"
        )


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), for what an autograd.Function returns.

    torch.compile of torch 2.11 gives zeros as the gradients of a Function whose output comes from a `to` that copies
    nothing.
    """
    return x if x.dtype == dtype else x.to(dtype)


def distinct(*tensors: Tensor) -> list[Tensor]:
    """The tensors, a repeated one as a view: torch.compile takes no autograd.Function with a repeated input."""
    return [x.view_as(x) if any(x is earlier for earlier in tensors[:i]) else x for i, x in enumerate(tensors)]

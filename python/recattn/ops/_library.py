"""The `recattn::` operator namespace. The C++ kernels register in it when the extension loads."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import recattn._extension  # noqa: F401  (registers the compiled operators)

_LIBRARY = torch.library.Library("recattn", "FRAGMENT")


def define(schema: str, *, cpu: Callable, cuda: Callable | None = None, fake: Callable) -> Callable:
    """Define the operator `recattn::<schema>` with its kernels and its fake kernel, and return it."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _isolated(cpu), "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, _isolated(cuda), "CUDA")
    torch.library.register_fake(f"recattn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.recattn, name).default


def is_traced(*tensors: Tensor) -> bool:
    """Whether a call must go through operators, to be traced or to infer shapes.

    Otherwise kernels may be called directly, which saves the dispatcher's several microseconds.
    """
    return torch.compiler.is_compiling() or any(type(x) is not Tensor or x.is_meta for x in tensors)


def _isolated(kernel: Callable) -> Callable:
    """`kernel` without autograd and autocast: kernels do their own."""

    @functools.wraps(kernel)
    def isolated(*args):
        device = next(x.device for x in args if isinstance(x, Tensor))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return kernel(*args)

    return isolated


def differentiable_again(reference: Callable) -> Callable:
    """Decorator of an autograd.Function's backward: under create_graph it differentiates `reference` instead.

    (`once_differentiable` would drop the Function from second derivatives, silently if the incoming gradient needs no
    gradient.) `reference` takes the arguments of forward, (*tensors, options), and returns forward's differentiable
    outputs, which come first. forward saves its tensors first, and sets `ctx.options`.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def differentiable_backward(ctx, *douts):
            if not torch.is_grad_enabled():  # also while torch.compile traces a backward
                return backward(ctx, *douts)
            return *_reference_gradients(ctx, reference, douts), None

        return differentiable_backward

    return decorate


def _reference_gradients(ctx, reference: Callable, douts: tuple[Tensor, ...]) -> list[Tensor | None]:
    needed = ctx.needs_input_grad[:-1]
    saved = ctx.saved_tensors[: len(needed)]
    # Views, so that an input that is given twice counts as two.
    tensors = [x.view_as(x) if wanted else x for x, wanted in zip(saved, needed, strict=True)]
    inputs = [x for x, wanted in zip(tensors, needed, strict=True) if wanted]
    with torch.autocast(douts[0].device.type, enabled=False):
        outs = reference(*tensors, ctx.options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        # An output may depend on no input that needs a gradient; for an empty batch, on no input at all.
        pairs = [(out, dout) for out, dout in zip(outs, douts, strict=False) if out.requires_grad]
        if pairs:
            outs, douts = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outs, inputs, douts, create_graph=True, materialize_grads=True)
        else:
            gradients = [torch.zeros_like(x) for x in inputs]
    remaining = iter(gradients)
    return [next(remaining) if wanted else None for wanted in needed]


def refuse_dropout(op: str, dropout_p: float) -> None:
    """Refuse second derivatives with dropout: a reference cannot repeat what a kernel dropped."""
    if dropout_p > 0:
        raise NotImplementedError(
            f"{op} with dropout_p={dropout_p} has no second derivative (create_graph=True): impl='reference' has"
        )


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), for an output of an autograd.Function.

    If that `to` copies nothing, torch.compile of torch 2.11 returns zeros as the Function's gradients.
    """
    return x if x.dtype == dtype else x.to(dtype)


def distinct(*tensors: Tensor) -> list[Tensor]:
    """The tensors, repeated ones as views: torch.compile refuses an autograd.Function with a repeated input."""
    return [x.view_as(x) if any(x is earlier for earlier in tensors[:i]) else x for i, x in enumerate(tensors)]

"""The `recattn::` operator namespace. The C++ kernels register in it when the extension loads."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import recattn._extension  # noqa: F401  (registers the compiled operators)
from recattn import _native
from recattn._typing import as_many
from recattn.ops import _transforms

_LIBRARY = torch.library.Library("recattn", "FRAGMENT")


def define(
    schema: str, *, cpu: Callable, cuda: Callable | None = None, fake: Callable, options: type | None = None
) -> Callable:
    """Define the operator `recattn::<schema>` with its kernels and its fake kernel.

    `options` is the NamedTuple of the schema's last arguments: the kernels, the fake one too, and the function returned
    take it as one argument. That function calls the operator. Where nothing would see the operator, it calls the kernel
    itself, which saves the dispatcher's several microseconds. The kernel may then take keywords and return more than
    the schema says, to be kept from a forward for its backward. Where the schema returns several tensors, a kernel's
    None is an empty one.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    operator = getattr(torch.ops.recattn, name).default
    first_option = len(operator._schema.arguments) - (0 if options is None else len(options._fields))
    num_returns = len(operator._schema.returns)

    def registered(kernel: Callable) -> Callable:
        @functools.wraps(kernel)
        def of_schema(*args):
            if options is not None:
                args = (*args[:first_option], options(*args[first_option:]))
            results = kernel(*args)
            if num_returns == 1:
                return results[0] if isinstance(results, tuple) else results
            like = _first_tensor(args)
            return tuple(like.new_empty(0) if x is None else x for x in results[:num_returns])

        return of_schema

    _LIBRARY.impl(name, registered(_isolated(cpu)), "CPU")
    if cuda is not None:
        _LIBRARY.impl(name, registered(_isolated(cuda)), "CUDA")
    torch.library.register_fake(f"recattn::{name}", registered(fake), lib=_LIBRARY)

    def call(*args, **hints):
        if not torch.compiler.is_compiling() and _native.is_direct(args):
            first = _first_tensor(args)
            kernel = cuda if first.is_cuda else cpu if first.is_cpu else None
            if kernel is not None:
                return kernel(*args, **hints)
        return operator(*args) if options is None else operator(*args[:-1], *args[-1])

    return call


def is_traced(*args: object) -> bool:
    """Whether a call must go through operators: to be traced or profiled, or to infer shapes."""
    return torch.compiler.is_compiling() or _native.is_traced(args)


def apply(function: type[torch.autograd.Function], *args) -> Any:
    """function.apply(*args), without autograd's several microseconds where no argument needs a gradient."""
    if torch._C._are_functorch_transforms_active():
        return _transforms.apply(function, *args)
    if is_traced(*args):
        return function.apply(*args)
    if _native.needs_autograd(args):
        # Without the checks for torch.func, in a base class that torch has no stub for.
        return super(torch.autograd.Function, function).apply(*args)  # pyright: ignore[reportAttributeAccessIssue]
    if not torch.is_grad_enabled():
        return function.forward(_UNRECORDED, *args)
    with torch.no_grad():
        return function.forward(_UNRECORDED, *args)


class _Unrecorded:
    """The context of forwards that no backward follows: it keeps nothing."""

    def __setattr__(self, name: str, value: object) -> None:
        pass

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


_UNRECORDED = _Unrecorded()


def _first_tensor(args: tuple) -> Tensor:
    return args[0] if isinstance(args[0], Tensor) else next(x for x in args if isinstance(x, Tensor))


def _isolated(kernel: Callable) -> Callable:
    """`kernel` without autograd and autocast: kernels do their own."""

    @functools.wraps(kernel)
    def isolated(*args):
        with torch.no_grad(), torch.autocast(_first_tensor(args).device.type, enabled=False):
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
            if douts[0] is None:  # no gradient, where forward wants no zeros in its place
                return (None,) * len(ctx.needs_input_grad)
            if not torch.is_grad_enabled():  # also while torch.compile traces a backward
                return backward(ctx, *douts)
            return *_reference_gradients(ctx, reference, douts), None

        vars(differentiable_backward).update(kernel=backward, reference=reference)  # for _transforms
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


@as_many
def distinct(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, repeated ones as views: torch.compile refuses an autograd.Function with a repeated input."""
    if not torch.compiler.is_compiling() and len(set(map(id, tensors))) == len(tensors):
        return tensors
    return (*(x.view_as(x) if any(x is earlier for earlier in tensors[:i]) else x for i, x in enumerate(tensors)),)

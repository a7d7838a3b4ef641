"""The operators' autograd.Functions under the transforms of torch.func.

torch.func needs Functions whose forward takes no ctx and returns all that the backward reads, and which say how to
vmap. `_transformable` makes one of an operator's Function, around its forward and backward. The backward becomes such a
Function too, so that vmap runs its kernel; its own derivative is that of the reference.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from recattn import _native

Function = type[torch.autograd.Function]


def apply(function: Function, *args) -> Any:
    """function.apply(*args) inside a transform."""
    *results, call = _transformable(function).apply(*args)
    return results[0] if call.num_outs is None else tuple(results[: call.num_outs])


class _Context:
    """Stands for autograd's ctx: keeps what a forward sets, for the backward."""

    def __init__(self, **attributes: Any):
        self.saved_tensors: tuple[Tensor | None, ...] = ()
        self.needs_input_grad: tuple[bool, ...] = ()
        self.non_differentiable: tuple[Tensor, ...] = ()
        self.materializes_grads = True
        vars(self).update(attributes)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        self.non_differentiable = tensors

    def set_materialize_grads(self, value: bool) -> None:
        self.materializes_grads = value


class _Place(int):
    """Stands for a tensor: its index in (*arguments, *results)."""


@dataclass
class _Call:
    """A forward's ctx with places instead of tensors, as every transform has tensors of its own."""

    attributes: tuple[tuple[str, Any], ...]
    saved: list[_Place]  # in use
    num_args: int
    num_outs: int | None  # None: forward returned a tensor and no tuple

    def context(self, saved: Sequence[Tensor], needs_input_grad: tuple[bool, ...] = ()) -> _Context:
        """The ctx, with the tensors at the places `self.saved`."""
        tensors = dict(zip(self.saved, saved, strict=True))
        attributes = dict(_mapped(_Place, tensors.__getitem__, self.attributes))
        return _Context(**attributes | {"needs_input_grad": needs_input_grad})


def _record(ctx: _Context, args: tuple, outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor | _Call, ...]:
    """outs, the other tensors that the forward kept, and the call."""
    num_outs = len(outs) if isinstance(outs, tuple) else None
    tensors = [*args, *(outs if isinstance(outs, tuple) else (outs,))]
    places = {id(x): _Place(i) for i, x in enumerate(tensors)}
    saved: dict[_Place, None] = {}

    def place(x: Tensor) -> _Place:
        if id(x) not in places:
            places[id(x)] = _Place(len(tensors))
            tensors.append(x)
        saved[places[id(x)]] = None
        return places[id(x)]

    attributes = _mapped(Tensor, place, tuple(vars(ctx).items()))
    return *tensors[len(args) :], _Call(attributes, list(saved), len(args), num_outs)


def _mapped(kind: type, function: Callable, x: Any) -> Any:
    """x with function(y) for each y of a kind, in tuples too."""
    if isinstance(x, kind):
        return function(x)
    if not isinstance(x, tuple):
        return x
    mapped = [_mapped(kind, function, y) for y in x]
    return type(x)(*mapped) if hasattr(x, "_fields") else tuple(mapped)


class _Mapped(torch.autograd.Function):
    @classmethod
    def vmap(cls, info, in_dims, *operands):
        """The kernel is called for each element."""
        # The last transform calls kernels, without autograd's part of `apply`.
        is_last = not torch._C._are_functorch_transforms_active() and not _native.needs_autograd(operands)
        return map_elements(torch.no_grad()(cls.forward) if is_last else cls.apply, info, in_dims, *operands)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError("forward-mode derivatives (jvp) need impl='reference'")


def map_elements(call: Callable, info, in_dims: tuple, *operands) -> tuple[tuple, tuple]:
    """The rule of vmap for `call`, which returns a tuple: results with a first axis of elements, and their axes."""
    if info.batch_size == 0:
        raise NotImplementedError("recattn supports no vmap over an axis of size 0")
    batches = [
        x.unbind(dim) if isinstance(x, Tensor) and dim is not None else [x] * info.batch_size
        for x, dim in zip(operands, in_dims, strict=True)
    ]
    elements = [call(*element) for element in zip(*batches, strict=True)]
    results = tuple(torch.stack(xs) if isinstance(xs[0], Tensor) else xs[0] for xs in zip(*elements, strict=True))
    return results, tuple(0 if isinstance(x, Tensor) else None for x in results)


@functools.cache
def _transformable(function: Function) -> Function:
    """`function`, with all that it keeps among its results and its _Call as the last."""
    by_kernel = _transformable_backward(function.backward) if hasattr(function.backward, "reference") else None

    class Transformable(_Mapped):
        @staticmethod
        def forward(*args):
            ctx = _Context()
            return _record(ctx, args, function.forward(ctx, *args))

        @staticmethod
        def setup_context(ctx, inputs, output):
            *results, call = output
            num_outs = call.num_outs or 1
            tensors = (*inputs, *results)
            saved = [tensors[place] for place in call.saved]
            forward = call.context(saved)
            ctx.save_for_backward(*saved)
            ctx.mark_non_differentiable(*forward.non_differentiable, *results[num_outs:])
            ctx.set_materialize_grads(False)  # what is kept needs no zeros
            ctx.call = call
            ctx.zeros = [(x.shape, x.dtype, x.device) for x in results[:num_outs]]
            ctx.materializes_grads = forward.materializes_grads

        @staticmethod
        def backward(ctx, *dresults):
            douts = dresults[: len(ctx.zeros)]
            if all(dout is None for dout in douts):
                return (None,) * len(ctx.needs_input_grad)
            if ctx.materializes_grads:
                douts = [
                    torch.zeros(shape, dtype=dtype, device=device) if dout is None else dout
                    for dout, (shape, dtype, device) in zip(douts, ctx.zeros, strict=True)
                ]
            if by_kernel is None:  # the backward is made of PyTorch's operators
                return function.backward(ctx.call.context(ctx.saved_tensors, ctx.needs_input_grad), *douts)
            return by_kernel.apply(ctx.call, ctx.needs_input_grad, *ctx.saved_tensors, *douts)

    return Transformable


def _transformable_backward(backward: Any) -> Function:
    """The kernel of a `differentiable_again` backward."""

    class TransformableBackward(_Mapped):
        @staticmethod
        def forward(call, needs_input_grad, *tensors):
            saved, douts = tensors[: len(call.saved)], tensors[len(call.saved) :]
            return tuple(backward.kernel(call.context(saved, needs_input_grad), *douts))

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.call, ctx.needs, *tensors = inputs
            ctx.save_for_backward(*tensors)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, *dgradients):
            call, tensors = ctx.call, ctx.saved_tensors
            num_saved = len(call.saved)
            wanted = [i for i, needed in enumerate(ctx.needs) if needed]
            # The reference recomputes what the forward computed, from the arguments.
            computed = {i for i, place in enumerate(call.saved) if place >= call.num_args}
            needed = enumerate(ctx.needs_input_grad[2:])
            variables = [i for i, is_needed in needed if is_needed and i not in computed]

            def gradients(*values: Tensor) -> tuple[Tensor, ...]:
                saved_and_douts = _replaced(tensors, variables, values)
                forward = call.context(saved_and_douts[:num_saved])
                inputs = forward.saved_tensors[: call.num_args - 1]
                douts = saved_and_douts[num_saved:]
                return _reference_gradients(backward.reference, inputs, forward.options, wanted, douts)

            results, pull_back = vjp(gradients, *(tensors[i] for i in variables))[:2]
            values = pull_back(_filled([dgradients[i] for i in wanted], results))
            return None, None, *_replaced([None] * len(tensors), variables, values)

    return TransformableBackward


def _reference_gradients(
    reference: Callable, inputs: Sequence[Tensor | None], options: object, wanted: Sequence[int], douts: Sequence
) -> tuple[Tensor, ...]:
    """The gradients of the inputs `wanted`. The reference may have fewer outputs than there are douts."""

    def outs(*values: Tensor) -> tuple[Tensor, ...]:
        results = reference(*_replaced(inputs, wanted, values), options)
        return results if isinstance(results, tuple) else (results,)

    first = next(x for x in douts if x is not None)
    with torch.autocast(first.device.type, enabled=False):
        results, pull_back = vjp(outs, *(inputs[i] for i in wanted))[:2]
        return pull_back(_filled(douts[: len(results)], results))


def _replaced(values: Sequence, indices: Sequence[int], by: Sequence) -> list:
    replaced = dict(zip(indices, by, strict=True))
    return [replaced.get(i, x) for i, x in enumerate(values)]


def _filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients, zeros where there is none."""
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, like, strict=True))

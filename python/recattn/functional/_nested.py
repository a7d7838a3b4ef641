"""Nested tensors (torch.jagged) as arguments of the public functions: computed packed, with no copy to padded form."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.nested._internal.nested_tensor import NestedTensor  # the type of layout=torch.jagged

from recattn._check import expect
from recattn._dispatch import is_transformed
from recattn.functional._keywords import explanation

_Function = TypeVar("_Function", bound=Callable)


class _Values(torch.autograd.Function):
    """The values of nested tensors, sequences on axis 0.

    values() and nested_tensor_from_jagged(), which is its backward, dispatch through Python: 0.1 and 0.3 ms for each.
    """

    @staticmethod
    def forward(ctx, *nested):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*nested)  # so that the backward raises if one was changed in place
        needed = ctx.needs_input_grad
        # The values of those that need no gradient are views: saved by others, they show a change in place.
        values = [x._values.detach() if n else x.values() for x, n in zip(nested, needed, strict=True)]
        values = [x.movedim(like._ragged_idx - 1, 0) for x, like in zip(values, nested, strict=True)]
        ctx.mark_non_differentiable(*(x for x, n in zip(values, needed, strict=True) if not n))
        return tuple(values)

    @staticmethod
    def backward(ctx, *gradients):
        try:
            nested = ctx.saved_tensors
        except NotImplementedError as error:  # raised where PyTorch formats the message
            message = "a nested tensor that the backward needs has been modified by an inplace operation"
            raise RuntimeError(message) from error
        pairs = zip(gradients, nested, strict=True)
        return tuple(None if gradient is None else _nest(gradient, x, x._ragged_idx) for gradient, x in pairs)


def _is_eager() -> bool:
    return not (torch.compiler.is_compiling() or is_transformed())


def _unnest(nested: Sequence[NestedTensor]) -> Sequence[Tensor]:
    """The values [T, ...]."""
    if not _is_eager():
        return [x.values().movedim(x._ragged_idx - 1, 0) for x in nested]
    if torch.is_grad_enabled():
        return _Values.apply(*nested)
    return [x._values.movedim(x._ragged_idx - 1, 0) for x in nested]


def _nest(values: Tensor, like: NestedTensor, ragged_axis: int) -> Tensor:
    """Nested [B, ..., j, ...] with the offsets of `like` and j on `ragged_axis`, from [T, ...]."""
    values = values.movedim(0, ragged_axis - 1)
    if _is_eager() and not torch.is_grad_enabled():
        return NestedTensor(values, like.offsets(), _ragged_idx=ragged_axis, _metadata_cache=like._metadata_cache)
    # With gradients a view, so that the backward raises if the result was changed in place.
    return torch.nested.nested_tensor_from_jagged(
        values, like.offsets(), jagged_dim=ragged_axis, max_seqlen=like._maybe_max_seqlen
    )


class Packed(NamedTuple):
    """Nested tensors as the packed arguments of a function."""

    values: dict[str, Tensor]  # [T, ...] by the name of the argument
    like: NestedTensor  # one of the nested tensors

    def nest(self, out: Tensor, ragged_axis: int = 1) -> Tensor:
        """Nested [B, ..., j, ...] like the arguments, with j on `ragged_axis`, from [T, ...]."""
        return _nest(out, self.like, ragged_axis)


def accepts_nested(
    *names: str, ragged_axis: int, nest: Callable[[Packed, Any], Any] = lambda packed, out: out
) -> Callable[[_Function], _Function]:
    """Decorator: the arguments `names` may be nested tensors, ragged on `ragged_axis`, instead of cu_seqlens.

    The function then runs on their values [T, ...] with cu_seqlens and max_seqlen, and `nest` makes its results nested.
    As `explain_keywords` too: a second decorator would cost each call another 0.5 µs.
    """

    def decorate(function: _Function) -> _Function:
        parameters = tuple(inspect.signature(function).parameters)
        position = parameters.index(names[0])

        def call(args: tuple, kwargs: dict[str, Any]) -> Any:
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                raise explanation(function.__qualname__, parameters, kwargs) or error from None

        @functools.wraps(function)
        def of_nested(*args, **kwargs):
            first = args[position] if len(args) > position else kwargs.get(names[0])
            if not _is_nested(first):
                return call(args, kwargs)
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            for name in ("cu_seqlens", "seq_lens", "seq_starts"):
                expect(given.get(name) is None, name, f"None beside a nested {names[0]}, whose offsets say it", "both")
            packed = _unpack({name: given[name] for name in names if given.get(name) is not None}, ragged_axis)
            longest = given.get("max_seqlen") or packed.like._maybe_max_seqlen
            lengths = {"cu_seqlens": packed.like.offsets(), "max_seqlen": longest}
            return nest(packed, call((), {**given, **packed.values, **lengths}))

        return cast("_Function", of_nested)

    return decorate


def _unpack(tensors: dict[str, Any], ragged_axis: int) -> Packed:
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        _expect_jagged(name, x, first_name)
        axis = x._ragged_idx  # it has no public name
        if axis != ragged_axis:  # formatted sizes would be static in a compiled graph
            hint = ": move the heads before the tokens by transpose(1, 2)" if ragged_axis == 2 else ""
            expect(False, name, f"nested with sequences on axis {ragged_axis}{hint}", f"one with them on axis {axis}")
        expect(x.lengths() is None, name, "nested without holes", "one with lengths: call its contiguous()")
        if x.offsets() is not first.offsets() and x.shape[ragged_axis] != first.shape[ragged_axis]:
            given = "other offsets: build them from one offsets tensor"
            expect(False, name, f"nested with the offsets of {first_name}", given)
    # A tensor given twice is unpacked once: modules project it once.
    sources = {name: next(known for known, y in tensors.items() if y is x) for name, x in tensors.items()}
    distinct = {name: tensors[name] for name in sources.values()}
    values = dict(zip(distinct, _unnest(list(distinct.values())), strict=True))
    return Packed({name: values[source] for name, source in sources.items()}, first)


def _is_nested(x: object) -> bool:
    # A NestedTensor answers is_nested and layout through Python, in 20 and 40 µs.
    return type(x) is NestedTensor or (isinstance(x, Tensor) and x.is_nested)


def _expect_jagged(name: str, x: object, like: str) -> None:
    if type(x) is not NestedTensor:
        expect(_is_nested(x), name, f"nested like {like}", "a dense tensor" if isinstance(x, Tensor) else x)
        jagged = "nested of layout=torch.jagged (nn.TransformerEncoder: set use_nested_tensor to False)"
        expect(False, name, jagged, f"layout={getattr(x, 'layout', None)}")


def nest_heads(packed: Packed, out: Tensor) -> Tensor:
    """Packed [T, H, D] -> nested [B, H, j, D]."""
    return packed.nest(out, ragged_axis=2)

"""Nested tensors (torch.jagged) as arguments of the public functions: computed packed, with no copy to padded form."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from recattn._check import expect
from recattn.functional._keywords import explanation

_Function = TypeVar("_Function", bound=Callable)


class Packed(NamedTuple):
    """Nested tensors as the packed arguments of a function."""

    values: dict[str, Tensor]  # [T, ...] by the name of the argument
    offsets: Tensor  # [B + 1]
    max_seqlen: int | None  # where the nested tensor knows it

    def nest(self, out: Tensor, jagged_dim: int = 1) -> Tensor:
        """Nested [B, ..., j, ...] with the offsets of the arguments and j on `jagged_dim`, from [..., T, ...]."""
        return torch.nested.nested_tensor_from_jagged(
            out, self.offsets, jagged_dim=jagged_dim, max_seqlen=self.max_seqlen
        )


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
            if not (isinstance(first, Tensor) and first.is_nested):
                return call(args, kwargs)
            given = {**dict(zip(parameters, args, strict=False)), **kwargs}
            for name in ("cu_seqlens", "seq_lens", "seq_starts"):
                expect(given.get(name) is None, name, f"None beside a nested {names[0]}, whose offsets say it", "both")
            packed = _unpack({name: given[name] for name in names if given.get(name) is not None}, ragged_axis)
            lengths = {"cu_seqlens": packed.offsets, "max_seqlen": given.get("max_seqlen") or packed.max_seqlen}
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
    values: dict[str, Tensor] = {}
    for name, x in tensors.items():  # a tensor given twice is unpacked once: modules project it once
        same = next((known for known in values if tensors[known] is x), None)
        values[name] = x.values().movedim(ragged_axis - 1, 0) if same is None else values[same]
    return Packed(values, first.offsets(), getattr(first, "_maybe_max_seqlen", None))


def _expect_jagged(name: str, x: object, like: str) -> None:
    is_tensor = isinstance(x, Tensor)
    expect(is_tensor and x.is_nested, name, f"nested like {like}", "a dense tensor" if is_tensor else x)
    jagged = "nested of layout=torch.jagged (nn.TransformerEncoder: set use_nested_tensor to False)"
    expect(is_tensor and x.layout == torch.jagged, name, jagged, f"layout={getattr(x, 'layout', None)}")


def nest_heads(packed: Packed, out: Tensor) -> Tensor:
    """Packed [T, H, D] -> nested [B, H, j, D]."""
    return packed.nest(out.transpose(0, 1), jagged_dim=2)

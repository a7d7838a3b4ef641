"""Types that several modules share: the choices of options that are strings, and functions of any number of tensors."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias, cast

from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import TypeVarTuple, Unpack

    Tensors = TypeVarTuple("Tensors")

PaddingSide: TypeAlias = Literal["right", "left"]
Mechanism: TypeAlias = Literal["simple", "value", "additive", "stochastic"]
Source: TypeAlias = Literal["logits", "weights"]
Orientation: TypeAlias = Literal["scores", "weights"]
LossReduction: TypeAlias = Literal["mean", "sum"]
Pooling: TypeAlias = Literal["sum", "mean", "softmax"]
Signal: TypeAlias = Literal["temporal", "similarity", "both", "none"]
Stage: TypeAlias = Literal["sinks", "tokens"]

# `impl` of each operator. tests/packaging/test_typing.py compares them with what the operators have.
SinkAttentionImpl: TypeAlias = Literal[
    "cpu",
    "triton",
    "correction",
    "correction:flash",
    "correction:cudnn",
    "correction:efficient",
    "correction:flash_attn_2",
    "correction:flash_attn_3",
    "correction:flash_attn_4",
    "reference",
]
InterSinkBiasImpl: TypeAlias = Literal["cpu", "triton", "reference"]
RefinedAttentionImpl: TypeAlias = Literal["cpu", "triton", "chunked", "reference"]
WassersteinAttentionImpl: TypeAlias = Literal["cpu", "triton", "reference"]
LreaImpl: TypeAlias = Literal["cpu", "triton", "reference"]
LreaAbsorbedImpl: TypeAlias = Literal["cpu", "cuda", "reference"]


class _AsMany(Protocol):
    def __call__(self, *tensors: "Unpack[Tensors]") -> "tuple[Unpack[Tensors]]": ...


def as_many(function: Callable[..., tuple[Tensor, ...]]) -> _AsMany:
    """Decorator: the function returns as many tensors as it takes."""
    return cast("_AsMany", function)

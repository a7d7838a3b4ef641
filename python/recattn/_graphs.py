"""What torch.compile is told of our functions."""

from collections.abc import Callable
from typing import TypeVar

_Function = TypeVar("_Function", bound=Callable)


def constant_in_graphs(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, without importing torch._dynamo, which takes seconds and 150 MB."""
    vars(function)["_dynamo_marked_constant"] = True
    return function

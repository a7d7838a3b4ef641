"""What a launch compiles, as a value: for tools that compile ahead of time, without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import JITFunction

_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Compilation:
    """One kernel for one architecture, with the types of its arguments and its launch parameters.

    `signature` has the type of every argument, in order, as Triton's own ahead-of-time compiler writes it: "*bf16:16"
    is a pointer to bfloat16 and "i32:16" an integer, both divisible by 16. The type of a tuple is that tuple of types.
    `constexprs` has the value of each "constexpr" by its name, or by (name, index) in a tuple.
    """

    kernel: object
    label: str
    architecture: int
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str | tuple[str, int], object]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    @classmethod
    def of(
        cls,
        kernel: object,
        label: str,
        architecture: int,
        arguments: Mapping[str, object],
        num_warps: int,
        num_stages: int,
        maxnreg: int | None = None,
    ) -> "Compilation":
        """What a launch of `kernel` with `arguments` compiles. Tensors may be on the meta device."""
        # What the interpreter runs keeps how it was decorated.
        compiled = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
        signature = {parameter.name: _type(parameter, arguments[parameter.name]) for parameter in compiled.params}
        constexprs = {}
        for name, kind in signature.items():
            if kind == "constexpr":
                constexprs[name] = arguments[name]
            elif isinstance(kind, tuple):
                fields = zip(kind, arguments[name], strict=True)
                constexprs |= {(name, i): value for i, (field, value) in enumerate(fields) if field == "constexpr"}
        return cls(kernel, label, architecture, signature, constexprs, num_warps, num_stages, maxnreg)


def _type(parameter: object, value: object) -> str | tuple[str, ...]:
    """The type that an argument of a launch is compiled for; tensors are taken to be aligned."""
    if parameter.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, tuple):
        return type(value)(*(_type(parameter, field) for field in value))
    if isinstance(value, Tensor):
        return f"*{_TYPE_NAMES[value.dtype]}:16"
    if isinstance(value, float):
        return "fp32"
    width = "i32" if -(2**31) <= value < 2**31 else "i64"
    if parameter.do_not_specialize:
        return width
    if value == 1:
        return "constexpr"
    return f"{width}:16" if value % 16 == 0 else width

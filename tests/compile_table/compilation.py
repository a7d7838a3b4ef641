"""What a launch compiles, as a value, to be compiled ahead of time without a GPU; and `recorded`, which makes them.

A module of this folder takes part in the table by its `shipped_configurations()`. It calls the launchers themselves, on
meta tensors, and so repeats nothing of how they make up a kernel's arguments:

    def shipped_configurations() -> Iterator[Compilation]:
        for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES):
            x = meta(64, 128, dtype=dtype)
            yield from recorded(f"{name_of(dtype)} D=128 {{BLOCK_M}}", architecture, launch_my_kernel, x)
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from triton import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from recattn.triton_kernels.common import launch

# Ampere, Hopper, Blackwell: every shipped configuration is compiled for each.
ARCHITECTURES = launch.ARCHITECTURES
DTYPES = (torch.float32, torch.bfloat16)
# What a launch that does not say has, by Triton's defaults for CUDA.
DEFAULT_WARPS, DEFAULT_STAGES = 4, 3
LAUNCH_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")

_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.bool: "i1",
}

Type = str | tuple["Type", ...]


@dataclass(frozen=True)
class Compilation:
    """One kernel for one architecture, with the types of its arguments and its launch parameters.

    `signature` has the type of every argument, in order, as Triton's own ahead-of-time compiler writes it: "*bf16:16"
    is a pointer to bfloat16 and "i32:16" an integer, both divisible by 16. The type of a NamedTuple is that NamedTuple
    of types. `constexprs` has the value of each "constexpr" by its name, or in a tuple by (index, index of the field).
    """

    kernel: object
    label: str
    architecture: int
    signature: Mapping[str, Type]
    constexprs: Mapping[str | tuple[int, ...], object]
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
        # An interpreted kernel keeps the options of its decorator.
        compiled = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
        signature = {parameter.name: _type(parameter, arguments[parameter.name]) for parameter in compiled.params}
        constexprs = {}
        for i, (name, kind) in enumerate(signature.items()):
            constexprs |= {
                path if isinstance(kind, tuple) else name: value
                for path, field, value in _leaves((i,), kind, arguments[name])
                if field == "constexpr"
            }
        return cls(kernel, label, architecture, signature, constexprs, num_warps, num_stages, maxnreg)


def recorded(label: str, architecture: int, launcher: Callable, /, *args, **kwargs) -> list[Compilation]:
    """What `launcher(*args, **kwargs)` would compile: each `kernel[grid](...)` becomes a Compilation, and nothing runs.

    Tensors are on the meta device. Where the launcher asks for the architecture, it is told this one. The label is
    formatted with the kernel's arguments: "float32 {BLOCK_M}x{BLOCK_N}" names a tile.
    """
    made: list[Compilation] = []

    def record(kernel, *values, grid, warmup, **named) -> None:
        options = {name: named.pop(name) for name in LAUNCH_OPTIONS if name in named}
        bound = inspect.signature(kernel.fn).bind(*values, **named)
        bound.apply_defaults()
        made.append(
            Compilation.of(
                kernel,
                label.format_map(bound.arguments),
                architecture,
                bound.arguments,
                options.get("num_warps", DEFAULT_WARPS),
                options.get("num_stages", DEFAULT_STAGES),
                options.get("maxnreg"),
            )
        )

    with contextlib.ExitStack() as patches:
        for kind in (JITFunction, InterpretedFunction):
            patches.enter_context(mock.patch.object(kind, "run", record))
        for module in _modules_with("architecture_of", launch.architecture_of):
            patches.enter_context(mock.patch.object(module, "architecture_of", lambda x: architecture))
        for module in _modules_with("launch", launch.launch):  # which may find a compiled kernel by itself
            patches.enter_context(mock.patch.object(module, "launch", launch.launch_by_triton))
        launcher(*args, **kwargs)
    return made


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _modules_with(name: str, value: object) -> list[object]:
    modules = [module for path, module in sys.modules.items() if path.startswith("recattn.triton_kernels")]
    return [module for module in modules if vars(module).get(name) is value]


def _type(parameter: object, value: object) -> Type:
    """The type that an argument of a launch is compiled for; tensors are taken to be aligned."""
    if parameter.is_constexpr or value is None:
        return "constexpr"
    if isinstance(value, tuple):
        types = [_type(parameter, field) for field in value]
        return _tuple_of_types(type(value))(*types) if hasattr(value, "_fields") else tuple(types)
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


@functools.cache
def _tuple_of_types(kind: type) -> type:
    """The class of a NamedTuple of types: it has `partition`, as the type of a single argument has.

    A tool that handles single arguments only can compile it too, without the fields' divisibility.
    """

    def partition(types, separator: str) -> tuple[tuple, str, str]:
        return type(types)(*(field.partition(separator)[0] for field in types)), "", ""

    return type(kind.__name__, (kind,), {"_fields": kind._fields, "partition": partition})


def _leaves(path: tuple, kind: Type, value: object) -> Iterator[tuple[tuple, str, object]]:
    """The path, the type and the value of an argument, or of each field of a tuple."""
    if isinstance(kind, str):
        yield path, kind, value
        return
    for i, (field, of_field) in enumerate(zip(kind, value, strict=True)):
        yield from _leaves((*path, i), field, of_field)

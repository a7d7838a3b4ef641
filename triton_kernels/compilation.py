"""Launches, and what they compile to as a value: for tools that compile ahead of time, without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import JITFunction

# Ampere, Hopper, Blackwell: every shipped configuration is compiled for each.
ARCHITECTURES = (80, 90, 100)
# As many as there are. Not told how many, the assembler may spill to let more programs run side by side.
MAX_REGISTERS = 255
# A product and the sum it goes into are rounded once. Triton does so by itself only before 3.10.
ENABLE_FP_FUSION = True

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
    is a pointer to bfloat16 and "i32:16" an integer, both divisible by 16; a "constexpr" has its value in `constexprs`.
    """

    kernel: object
    label: str
    architecture: int
    signature: Mapping[str, str]
    constexprs: Mapping[str, object]
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
        constexprs = {name: arguments[name] for name, kind in signature.items() if kind == "constexpr"}
        return cls(kernel, label, architecture, signature, constexprs, num_warps, num_stages, maxnreg)


def launch_kernel(kernel: object, grid: object, arguments: Mapping[str, object], **options: int) -> None:
    """Run `kernel` on `grid`. `options` are Triton's: num_warps, num_stages, maxnreg."""
    kernel[grid](**arguments, **options, enable_fp_fusion=ENABLE_FP_FUSION)


def strides(name: str, tensor: Tensor | None, axes: str) -> dict[str, int]:
    """A tensor's strides as kernel arguments: stride_qb, stride_qh, ... for name "q" and axes "bh..."; 0 for None."""
    values = [0] * len(axes) if tensor is None else tensor.stride()
    return {f"stride_{name}{axis}": value for axis, value in zip(axes, values, strict=True)}


def architecture_of(x: Tensor) -> int:
    """The architecture whose launch parameters a tensor's kernels take: that of its GPU, Hopper's elsewhere."""
    if x.device.type != "cuda":
        return 90
    major, _ = torch.cuda.get_device_capability(x.device)
    return max(architecture for architecture in ARCHITECTURES if architecture <= max(10 * major, ARCHITECTURES[0]))


def as_dense(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Packed tokens [T, H, ...] as a view [B, H, T, ...] whose batch stride is 0; a dense batch as it is."""
    if cu_seqlens is None:
        return x
    return x.transpose(0, 1).unsqueeze(0).expand(cu_seqlens.shape[0] - 1, *x.shape[1::-1], *x.shape[2:])


def _type(parameter: object, value: object) -> str:
    """The type that an argument of a launch is compiled for; tensors are taken to be aligned."""
    if parameter.is_constexpr or value is None:
        return "constexpr"
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

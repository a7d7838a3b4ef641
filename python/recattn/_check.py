"""Validation shared by the public functions: every message names the argument, what was expected and what came."""

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32)


def expect(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")


def expect_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def expect_shape(sizes: dict[str, int], name: str, tensor: Tensor, layout: str) -> None:
    """Check `tensor` against a layout such as "B 1|Hq M M"; a symbol not yet in `sizes` takes its size from the tensor."""
    axes = layout.split()
    fits = tensor.dim() == len(axes)
    if fits:
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis not in sizes and "|" not in axis and not axis.isdigit():
                sizes[axis] = size
            if not any(size == _size_of(choice, sizes) for choice in axis.split("|")):
                fits = False
    if not fits:
        expected = f"[{', '.join(axes)}] = [{', '.join(_describe(axis, sizes) for axis in axes)}]"
        raise ValueError(f"{name} must be {expected.replace('|', ' or ')}, got {list(tensor.shape)}")


def expect_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def expect_same_device(like_name: str, like: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} must be on {like_name}'s device {like.device}, got {tensor.device}")


def expect_same_dtype(like_name: str, like: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None:
            expect_dtype_of(name, tensor, like_name, like)


def expect_dtype_of(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.dtype != like.dtype:
        expected, got = (str(dtype).removeprefix("torch.") for dtype in (like.dtype, tensor.dtype))
        raise ValueError(f"{name} must have {like_name}'s dtype {expected}, got {got}")


def expect_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def _size_of(axis: str, sizes: dict[str, int]) -> int | None:
    return int(axis) if axis.isdigit() else sizes.get(axis)


def _describe(axis: str, sizes: dict[str, int]) -> str:
    return "|".join(str(sizes.get(choice, choice)) for choice in axis.split("|"))

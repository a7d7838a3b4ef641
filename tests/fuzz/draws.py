"""Hypothesis strategies for tensors: sizes, layouts in memory, values, and how sequences lie in a batch."""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
DIMS = (4, 1, 2, 3, 7, 8, 16, 17, 31, 32, 33, 64, 65, 80, 128)
LENGTHS = (5, 1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 257, 300, 0)
KINDS = ("normal",) * 5 + ("equal rows", "zeros", "subnormal", "offset")
SIZES = (1.0,) * 4 + (1e-8, 1e-4, 30.0, 1e4)
WAYS = ("dense", "right", "left", "windows", "packed")
# Tensors of torch have no negative strides.
LAYOUTS = ("contiguous", "contiguous", "transposed", "unaligned", "every second", "expanded", "overlapping")


def lengths(longest: int) -> st.SearchStrategy[int]:
    return st.one_of(st.sampled_from([n for n in LENGTHS if n <= longest]), st.integers(0, longest))


def dims(widest: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in DIMS if d <= widest])


@dataclass(frozen=True)
class Recipe:
    """How a tensor is made: its shape, dtype, layout in memory and kind of values. The numbers are torch's to draw."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str = "normal"
    size: float = 1.0
    layout: str = "contiguous"
    axis: int = 0  # the expanded one
    positive: bool = False

    def make(self) -> Tensor:
        if self.layout == "expanded" and self.shape:
            one = [1 if axis == self.axis else size for axis, size in enumerate(self.shape)]
            return self._values(one).expand(self.shape)
        if self.layout == "overlapping" and 0 not in self.shape:
            strides = [1 + axis % 2 for axis in range(len(self.shape))]
            numbers = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, strides, strict=True))
            return self._values([numbers]).as_strided(self.shape, strides)
        return lay_out(self._values(self.shape), self.layout)

    def _values(self, shape) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64)
        if self.kind == "equal rows" and x.numel():
            x = x[(0,) * (x.dim() - 1)].expand(x.shape)
        elif self.kind == "zeros":
            x = x * 0
        elif self.kind == "subnormal":
            x = x * torch.finfo(self.dtype).tiny / 8
        elif self.kind == "offset":
            x = x + 8
        x = x * self.size
        return (x.abs() if self.positive else x).to(self.dtype, copy=True).contiguous()


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values, laid out otherwise in memory; "expanded" and "overlapping" need other values and do nothing."""
    if layout == "transposed":
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if layout == "unaligned":
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if layout == "every second" and x.dim():
        return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    return x


def recipe(draw, shape, dtype, *, sizes=(1.0,), kinds=KINDS, positive=False) -> Recipe:
    return Recipe(
        shape=tuple(shape),
        dtype=dtype,
        kind=draw(st.sampled_from(kinds)),
        size=draw(st.sampled_from(sizes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        axis=draw(st.integers(0, len(shape) - 1)),
        positive=positive,
    )


def logit_sizes(dtype: torch.dtype) -> tuple[float, ...]:
    """Of logits. The reference in half precision overflows at a few hundred squared."""
    return SIZES if dtype not in HALF else tuple(size for size in SIZES if size <= 30)


def indices(draw, values) -> Tensor:
    """An index tensor, int32 or int64, sometimes not contiguous."""
    x = torch.tensor(values, dtype=draw(st.sampled_from((torch.int64, torch.int32))))
    return lay_out(x, draw(st.sampled_from(("contiguous", "unaligned", "every second"))))


class Sequences(NamedTuple):
    """How B sequences lie on an axis of `n` tokens each, or packed."""

    how: str  # "dense", "right", "left", "windows" or "packed"
    n: int
    lengths: list[int]
    starts: list[int]
    options: dict

    def shape(self, *rest: int) -> tuple[int, ...]:
        """Of [B, H, N, D], packed [T, H, D], for rest = (H, D)."""
        heads, dim = rest
        return (sum(self.lengths), heads, dim) if self.how == "packed" else (len(self.lengths), heads, self.n, dim)

    def padding(self) -> Tensor | None:
        """[B, N] bool: True at padding."""
        if self.how in ("dense", "packed"):
            return None
        position = torch.arange(self.n)
        start, length = torch.tensor(self.starts)[:, None], torch.tensor(self.lengths)[:, None]
        return (position < start) | (position >= start + length)


def sequences(draw, longest: int, ways=WAYS) -> Sequences:
    how, batch, n = draw(st.sampled_from(ways)), draw(st.sampled_from((2, 1, 3, 0))), draw(lengths(longest))
    if how == "dense":
        return Sequences(how, n, [n] * batch, [0] * batch, {})
    own = draw(
        st.lists(st.one_of(st.sampled_from((n, 0, min(1, n))), st.integers(0, n)), min_size=batch, max_size=batch)
    )
    if how == "packed":
        options = {"cu_seqlens": indices(draw, [0, *itertools.accumulate(own)])}
        return Sequences(how, max(own, default=0), own, [0] * batch, options)
    options = {"seq_lens": indices(draw, own)}
    starts = [0] * batch
    if how == "left":
        options["padding_side"] = "left"
        starts = [n - length for length in own]
    elif how == "windows":
        starts = [draw(st.integers(0, n - length)) for length in own]
        options["seq_starts"] = indices(draw, starts)
    return Sequences(how, n, own, starts, options)

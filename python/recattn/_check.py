"""Checks of the public functions' arguments. Every message names the argument, what was expected and what came."""

import math
from numbers import Real

import torch
from torch import Tensor

from recattn import _native
from recattn._extension import MISSING

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGER = (torch.int64, torch.int32)
BOOL = (torch.bool,)


SAME = "the dtype of the first tensor"


class Layouts:
    """The tensors of a call, to be checked in a microsecond: Layouts(q=(FLOATING, "B H N D"), k=(SAME, "B H M D")).

    Layouts are as in `expect_shape`; an alternative is "1|X" with a symbol X of an earlier axis, "[X]" is a first axis
    that may be missing, and "X+1" sets X. A tensor whose layout ends in "?" may be absent: None. Dtypes are FLOATING,
    INTEGER, BOOL or SAME.
    """

    def __init__(self, **layouts: tuple[object, str]):
        self.symbols: list[str] = []
        tensors = b"".join(self._encode(dtypes, layout) for dtypes, layout in layouts.values())
        self._encoded = bytes([len(self.symbols)]) + tensors

    def sizes(self, *tensors: Tensor | None) -> tuple[int, ...] | None:
        """The sizes of `symbols` if all tensors fit and are on one device, -1 for those of absent tensors.

        None: they do not fit, or are not plain tensors: checks that say what is wrong must follow.
        """
        return None if torch.compiler.is_compiling() else _native.sizes(self._encoded, *tensors)

    def _encode(self, dtypes: object, layout: str) -> bytes:
        letter = {FLOATING: b"F", SAME: b"S", INTEGER: b"I", BOOL: b"B"}[dtypes]
        axes = layout.rstrip("?").split()
        flags = axes[0].startswith("[") + 2 * layout.endswith("?")
        encoded = b"".join(self._encode_axis(axis.strip("[]")) for axis in axes)
        return letter + bytes([flags, len(axes)]) + encoded

    def _encode_axis(self, axis: str) -> bytes:
        if axis.isdigit():
            return b"n" + bytes([int(axis)])
        if axis.startswith("1|"):
            return b"1" + bytes([self.symbols.index(axis[2:])])
        kind, symbol = (b"+", axis[:-2]) if axis.endswith("+1") else (b"s", axis)
        if symbol not in self.symbols:
            self.symbols.append(symbol)
        return kind + bytes([self.symbols.index(symbol)])


def expect(holds: bool, name: str, expected: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {got}")


def expect_tensors(**arguments: object) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value.layout is not torch.strided or value.is_nested:
            kind = "a nested tensor" if value.is_nested else f"one of layout {value.layout}"
            remedy = "pad it with to_padded_tensor and give the lengths" if value.is_nested else "call its to_dense()"
            raise ValueError(f"{name} must be a dense torch.Tensor, got {kind}: {remedy}")


def expect_shape(sizes: dict[str, int], name: str, tensor: Tensor, layout: str) -> None:
    """Check `tensor` against a layout such as "B 1|Hq M M". A symbol that is not in `sizes` yet is added to it."""
    axes = layout.split()
    fits = tensor.dim() == len(axes)
    if fits:
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis not in sizes and "|" not in axis and not axis.isdigit():
                sizes[axis] = size
            elif not _fits(size, axis, sizes):
                fits = False
    if not fits:
        described = [_describe(axis, sizes) for axis in axes]
        expected = f"[{', '.join(axes)}]" + (f" = [{', '.join(described)}]" if described != axes else "")
        raise ValueError(f"{name} must be {expected.replace('|', ' or ')}, got {list(tensor.shape)}")


def expect_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        raise ValueError(f"{name} must be {' or '.join(map(_dtype_name, allowed))}, got {_dtype_name(tensor.dtype)}")


def expect_index(sizes: dict[str, int], name: str, tensor: Tensor, layout: str) -> None:
    """Check that an argument is an int64 or int32 tensor of the layout."""
    expect_tensors(**{name: tensor})
    expect_shape(sizes, name, tensor, layout)
    expect_dtype(name, tensor, INTEGER)


def expect_numbers(**options: float | None) -> None:
    """Check that options are None or finite numbers. A tensor is refused, because it would get no gradient."""
    for name, value in options.items():
        if value is not None:
            _expect_number(name, value)
            # math.isfinite would break the graph under torch.compile.
            if not -math.inf < value < math.inf:
                raise ValueError(f"{name} must be finite, got {value}")


def expect_probability(name: str, value: float) -> None:
    _expect_number(name, value)
    expect(0 <= value < 1, name, "at least 0 and below 1", value)


def expect_count(name: str, value: int) -> None:
    holds = isinstance(value, int | torch.SymInt) and value >= 0
    expect(holds, name, "an integer of at least 0", "a torch.Tensor" if isinstance(value, Tensor) else value)


def _expect_number(name: str, value: object) -> None:
    if isinstance(value, float):  # the usual case
        return
    # SymInt and SymFloat come from graphs with dynamic shapes; numpy's scalars are Real.
    if not isinstance(value, int | torch.SymInt | torch.SymFloat) and not isinstance(value, Real):
        got = "a torch.Tensor, which would get no gradient here" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be a number, got {got}")


def expect_same_device(like_name: str, like: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}")


def expect_same_dtype(like_name: str, like: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != like.dtype:
            expected, got = _dtype_name(like.dtype), _dtype_name(tensor.dtype)
            raise ValueError(f"{name} must have the dtype of {like_name}, {expected}, got {got}")


def expect_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fits(size: int, axis: str, sizes: dict[str, int]) -> bool:
    if axis in sizes:  # the usual case, faster than splitting the choices
        return size == sizes[axis]
    return any(size == _size_of(choice, sizes) for choice in axis.split("|"))


def _size_of(axis: str, sizes: dict[str, int]) -> int | None:
    return int(axis) if axis.isdigit() else sizes.get(axis)


def _describe(axis: str, sizes: dict[str, int]) -> str:
    return "|".join(str(sizes.get(choice, choice)) for choice in axis.split("|"))


# Checks of values read tensors: call them where that costs no device synchronisation. Each returns a copy, so that what
# was checked is what is used, even if another thread of the caller writes to the tensor. On a CPU they run in C++
# (csrc/cpu/index_checks.cpp) where the extension is compiled.


def _runs_in_cpp(indices: Tensor) -> bool:
    return indices.device.type == "cpu" and "cpu" not in MISSING


def checked_sink_positions(sink_positions: Tensor, seq_len: int | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Positions ascend below `seq_len` (with `cu_seqlens`: below their sequence's length), then -1 as padding."""
    if _runs_in_cpp(sink_positions):
        return torch.ops.recattn.checked_sink_positions_cpu.default(sink_positions, seq_len, cu_seqlens)
    positions = sink_positions.clone()
    if seq_len is None or cu_seqlens is not None or not _lie_between(positions, -1, seq_len - 1):
        fits = positions < ((seq_len or 0) if cu_seqlens is None else cu_seqlens.long().diff()[:, None])
        shown = seq_len if cu_seqlens is None else "of each sequence"
        _expect_all("sink_positions", fits, f"below the sequence length {shown}", positions)
        _expect_all("sink_positions", positions >= -1, "token positions, or -1 for padding", positions)
    previous, following = positions[:, :-1], positions[:, 1:]
    ascends = (following > previous) & (previous >= 0) | (following == -1)
    _expect_all("sink_positions", ascends, "strictly ascending, padded with -1 at the end", following, skipped=1)
    return positions


def checked_lengths(name: str, lengths: Tensor, longest: int) -> Tensor:
    if _runs_in_cpp(lengths):
        return torch.ops.recattn.checked_lengths_cpu.default(name, lengths, longest)
    lengths = lengths.clone()
    if not _lie_between(lengths, 0, longest):
        _expect_all(name, (lengths >= 0) & (lengths <= longest), f"between 0 and {longest}", lengths)
    return lengths


def checked_offsets(name: str, offsets: Tensor, total: int) -> Tensor:
    """Offsets of a ragged batch go from 0 to `total` and never descend."""
    if _runs_in_cpp(offsets):
        return torch.ops.recattn.checked_offsets_cpu.default(name, offsets, total)
    offsets = offsets.clone()
    first, last = offsets[0].item(), offsets[-1].item()
    if first != 0 or last != total:
        raise ValueError(f"{name} must be offsets from 0 to {total}, got offsets from {first} to {last}")
    _expect_all(name, offsets[1:] >= offsets[:-1], "ascending", offsets[1:], skipped=1)
    return offsets


def checked_rows(name: str, rows: Tensor, table_size: int, seq_lens: Tensor | None = None) -> Tensor:
    """Rows lie in a table of `table_size`. With `seq_lens`, only the first seq_lens[u] of rows[u] count."""
    if _runs_in_cpp(rows):
        return torch.ops.recattn.checked_rows_cpu.default(name, rows, table_size, seq_lens)
    rows = rows.clone()
    if not _lie_between(rows, 0, table_size - 1):
        holds = (rows >= 0) & (rows < table_size)
        if seq_lens is not None and rows.dim() == 2:
            holds |= torch.arange(rows.shape[-1], device=rows.device) >= seq_lens[:, None]
        _expect_all(name, holds, f"rows of a table of {table_size}", rows)
    return rows


def _lie_between(x: Tensor, least: int, most: int) -> bool:
    if x.numel() == 0:
        return True
    low, high = x.aminmax()
    return low.item() >= least and high.item() <= most


def _expect_all(name: str, holds: Tensor, expected: str, values: Tensor, skipped: int = 0) -> None:
    """`values` is the argument without the first `skipped` entries of its last axis."""
    if not bool(holds.all()):
        *others, last = torch.nonzero(~holds)[0].tolist()
        value = values[(*others, last)].item()
        raise ValueError(f"{name} must be {expected}, got {value} at index {[*others, last + skipped]}")

"""Checks of the values of index tensors. On a GPU they cost a device synchronisation."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor

from recattn._check import expect, expect_index
from recattn._graphs import constant_in_graphs
from recattn.functional._keywords import explain_keywords
from recattn.ops import index_checks as ops


class Indices(NamedTuple):
    """The index tensors of a call, named as in the public functions. Any: a tensor where one was given, else None."""

    sink_positions: Any = None
    seq_lens: Any = None
    cu_seqlens: Any = None
    target_offsets: Any = None
    slots: Any = None
    item_ids: Any = None
    seq_starts: Any = None


@explain_keywords
def validate(
    *,
    sink_positions: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    target_offsets: Tensor | None = None,
    slots: Tensor | None = None,
    item_ids: Tensor | None = None,
    seq_starts: Tensor | None = None,
    seq_len: int | None = None,
    num_tokens: int | None = None,
    num_targets: int | None = None,
    num_slots: int | None = None,
    num_items: int | None = None,
) -> None:
    """Check the values of a call's index tensors, on any device. Arguments are named as in the public functions.

    On a CPU the public functions do this themselves. On a GPU it costs a synchronisation, so call it while you develop;
    with the environment variable RECATTN_CHECK=1 every call does it.

    Args:
        sink_positions: [B, M], strictly ascending below `seq_len`, padded with -1 at the end; with `cu_seqlens`,
            below the length of their own sequence.
        seq_lens: [B], between 0 and `seq_len`.
        cu_seqlens: [B + 1], from 0 to `num_tokens`, never descending.
        target_offsets: [U + 1], from 0 to `num_targets`, never descending.
        slots: [U], between 0 and `num_slots` - 1.
        item_ids: [T] or [U, L], between 0 and `num_items` - 1; for [U, L] with `seq_lens`, only the first seq_lens[u]
            of each user count.
        seq_starts: [B], between 0 and `seq_len` - `seq_lens`.
        seq_len, num_tokens, num_targets, num_slots, num_items: N, T (packed tokens), T (targets), S and I of the call.

    Raises:
        ValueError: names the argument, what was expected, and the first wrong entry.
    """
    given = Indices(sink_positions, seq_lens, cu_seqlens, target_offsets, slots, item_ids, seq_starts)
    sizes: dict[str, int] = {}
    for name, indices in given._asdict().items():
        if indices is not None:
            by_user = name == "item_ids" and isinstance(indices, Tensor) and indices.dim() == 2
            expect_index(sizes, name, indices, "U L" if by_user else _LAYOUTS[name])
    for name in ("cu_seqlens", "target_offsets"):
        offsets = getattr(given, name)
        expect(offsets is None or len(offsets) > 0, name, f"[{_LAYOUTS[name]}]", "no offset")
    _checked(given, seq_len, num_tokens, num_targets, num_slots, num_items)


_LAYOUTS = {
    "sink_positions": "B M",
    "seq_lens": "B",
    "cu_seqlens": "B+1",
    "target_offsets": "U+1",
    "slots": "U",
    "item_ids": "T",
    "seq_starts": "B",
}


def checked_indices(
    device: torch.device,
    *,
    seq_len: int | None = None,
    num_tokens: int | None = None,
    num_targets: int | None = None,
    num_slots: int | None = None,
    num_items: int | None = None,
    **indices: Tensor | None,
) -> Indices:
    """Copies of the index tensors, checked as by `validate`, also in a compiled graph.

    Where a check would cost a synchronisation, the tensors themselves, unchecked.
    """
    if not values_are_checked(device):
        return Indices(**indices)
    return _checked(Indices(**indices), seq_len, num_tokens, num_targets, num_slots, num_items)


def expect_values(holds: Tensor, expected: str, got: Callable[..., object]) -> None:
    """Raise a ValueError unless `holds` is all True; `got` describes the first False by its index.

    Call it only where `values_are_checked`. A compiled graph cannot read values in Python: it raises a RuntimeError
    with `expected` alone when it runs (on a GPU a device-side assertion).
    """
    if torch.compiler.is_compiling():
        assert_on_device(holds.all(), expected)
    elif is_functorch_wrapped_tensor(holds):
        while is_functorch_wrapped_tensor(holds):  # vmap refuses to read values
            holds = get_unwrapped(holds)
        if not bool(holds.all()):
            raise ValueError(expected)
    elif not bool(holds.all()):
        raise ValueError(f"{expected}, got {got(*torch.nonzero(~holds)[0].tolist())}")


def assert_on_device(holds: Tensor, expected: str) -> None:
    """Raise a RuntimeError with `expected` unless `holds` is True, without a synchronisation and in compiled graphs."""
    torch._assert_async(holds, expected)  # pyright: ignore[reportPrivateImportUsage] (torch has no public one)


def values_are_checked(device: torch.device) -> bool:
    """Whether calls check index values: on a CPU always, on a GPU with RECATTN_CHECK=1 (it costs a synchronisation)."""
    return device.type == "cpu" or (device.type != "meta" and _always_checked())


@constant_in_graphs
def _always_checked() -> bool:
    return os.environ.get("RECATTN_CHECK") == "1"


def _checked(
    given: Indices,
    seq_len: int | None,
    num_tokens: int | None,
    num_targets: int | None,
    num_slots: int | None,
    num_items: int | None,
) -> Indices:
    sink_positions, seq_lens, cu_seqlens, target_offsets, slots, item_ids, seq_starts = given
    if cu_seqlens is not None:
        total = _given("num_tokens", num_tokens, "cu_seqlens")
        cu_seqlens = ops.checked_offsets("cu_seqlens", cu_seqlens, total)
    if seq_lens is not None:
        seq_lens = ops.checked_lengths("seq_lens", seq_lens, _given("seq_len", seq_len, "seq_lens"))
    if seq_starts is not None:
        if seq_lens is None:
            raise ValueError("seq_lens must be given with seq_starts, got None")
        seq_starts = ops.checked_starts(seq_starts, seq_lens, _given("seq_len", seq_len, "seq_starts"))
    if sink_positions is not None:
        longest = _given("seq_len", seq_len, "sink_positions") if cu_seqlens is None else None
        sink_positions = ops.checked_sink_positions(sink_positions, longest, cu_seqlens)
    if target_offsets is not None:
        total = _given("num_targets", num_targets, "target_offsets")
        target_offsets = ops.checked_offsets("target_offsets", target_offsets, total)
    if slots is not None:
        slots = ops.checked_rows("slots", slots, _given("num_slots", num_slots, "slots"), None)
    if item_ids is not None:
        item_ids = ops.checked_rows("item_ids", item_ids, _given("num_items", num_items, "item_ids"), seq_lens)
    return Indices(sink_positions, seq_lens, cu_seqlens, target_offsets, slots, item_ids, seq_starts)


def _given(name: str, size: int | None, needed_by: str) -> int:
    if size is None:
        raise ValueError(f"{name} must be given to check {needed_by}, got None")
    return size

"""Checks of the values of index tensors, which cost a device synchronisation on a GPU."""

import os

import torch
from torch import Tensor

from recattn._check import expect, expect_lengths, expect_offsets, expect_rows, expect_sink_positions


def validate(
    *,
    sink_positions: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    target_offsets: Tensor | None = None,
    slots: Tensor | None = None,
    item_ids: Tensor | None = None,
    seq_len: int | None = None,
    num_tokens: int | None = None,
    num_targets: int | None = None,
    num_slots: int | None = None,
    num_items: int | None = None,
) -> None:
    """Check the values of the index tensors of a call, on any device, named as the public functions name them.

    On a CPU the functions do this themselves. On a GPU it costs a synchronisation, so it is yours to call while you
    develop; the environment variable RECATTN_CHECK=1 makes every call do it.

    Args:
        sink_positions: [B, M], strictly ascending below `seq_len`, padded with -1 at the end; with `cu_seqlens`,
            below the length of their own sequence.
        seq_lens: [B], between 0 and `seq_len`.
        cu_seqlens: [B + 1], from 0 to `num_tokens`, never descending.
        target_offsets: [U + 1], from 0 to `num_targets`, never descending.
        slots: [U], between 0 and `num_slots` - 1.
        item_ids: [T] or [U, L], between 0 and `num_items` - 1; [U, L] with `seq_lens` only where they say that an item
            stands.
        seq_len, num_tokens, num_targets, num_slots, num_items: N, T (packed tokens), T (targets), S and I of the call.

    Raises:
        ValueError: names the argument, what was expected, and the first entry that is not it.
    """
    if cu_seqlens is not None:
        expect_offsets("cu_seqlens", cu_seqlens, _given("num_tokens", num_tokens, "cu_seqlens"))
    if seq_lens is not None:
        expect_lengths("seq_lens", seq_lens, _given("seq_len", seq_len, "seq_lens"))
    if sink_positions is not None:
        limits = _given("seq_len", seq_len, "sink_positions") if cu_seqlens is None else cu_seqlens.long().diff()
        expect_sink_positions(sink_positions, limits)
    if target_offsets is not None:
        expect_offsets("target_offsets", target_offsets, _given("num_targets", num_targets, "target_offsets"))
    if slots is not None:
        expect_rows("slots", slots, _given("num_slots", num_slots, "slots"))
    if item_ids is not None:
        expect_rows("item_ids", item_ids, _given("num_items", num_items, "item_ids"), seq_lens)


def validate_values(device: torch.device, **arguments: object) -> None:
    """`validate` where it is free, or asked for."""
    if values_are_checked(device):
        validate(**arguments)


def values_are_checked(device: torch.device) -> bool:
    """Reading a tensor's values costs a synchronisation on a GPU, and breaks the graph of a compiled call."""
    return not torch.compiler.is_compiling() and (device.type == "cpu" or os.environ.get("RECATTN_CHECK") == "1")


def _given(name: str, size: int | None, needed_by: str) -> int:
    expect(size is not None, name, f"given to check {needed_by}", None)
    return size

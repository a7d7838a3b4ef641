"""Masks of the modules: nn.MultiheadAttention's as the operators' arguments, masks of tokens and of sinks."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from recattn._check import expect, expect_dtype, expect_shape, expect_tensors
from recattn._dispatch import is_transformed
from recattn.functional.validation import expect_values, values_are_checked
from recattn.reference.sink_attention import valid_tokens

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def read_padding_mask(key_padding_mask: Tensor, batch: int, length: int) -> Tensor:
    """The padding mask [B, N] as bool, True at padding, from its boolean or its additive form."""
    expect_tensors(key_padding_mask=key_padding_mask)
    expect_shape({"B": batch, "N": length}, "key_padding_mask", key_padding_mask, "B N")
    return _to_bool("key_padding_mask", key_padding_mask)


class Windows(NamedTuple):
    """Where the tokens of each padded sequence lie."""

    seq_lens: Tensor  # [B]
    seq_starts: Tensor  # [B]
    valid: Tensor  # [B, N] bool


def read_windows(key_padding_mask: Tensor, batch: int, length: int) -> Windows:
    """The tokens of each sequence from a padding mask [B, N], True (or -inf) at padding.

    They are one run without a gap, with padding before it, after it, or both. A row of padding only has length 0.
    """
    valid = ~read_padding_mask(key_padding_mask, batch, length)
    windows = find_windows(valid)
    if values_are_checked(valid.device):
        expect_values(
            are_windows(windows),
            "key_padding_mask must be False at tokens without a gap, and True before and after them",
            lambda row: f"{(~valid[row]).int().tolist()} in row {row}",
        )
    return windows


def find_windows(valid: Tensor) -> Windows:
    """The first valid token and the number of valid tokens per row of a mask [B, N], True at tokens."""
    # argmax needs an entry; of equal ones it takes the first.
    starts = valid.byte().argmax(dim=1) if valid.shape[1] else valid.sum(dim=1)
    return Windows(valid.sum(dim=1), starts, valid)


def are_windows(windows: Windows) -> Tensor:
    """[B] bool: whether the tokens of each row have no gap."""
    batch, length = windows.valid.shape
    without_gap = valid_tokens(batch, length, windows.seq_lens, windows.seq_starts, windows.valid.device)
    return (windows.valid == without_gap).all(dim=1)


def zero_padding(valid: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors [..., E] with zeros where `valid` [...] is False. A tensor given twice is returned twice.

    Use it before a projection: the weight's gradient sums over all tokens, and a NaN in padding would make it NaN. The
    gradients of the tensors themselves are not masked, as the attention after the projection has zeros at padding.
    """
    if is_transformed():
        return tuple(x.masked_fill(~valid[..., None], 0) for x in tensors)
    zeroed: list[Tensor] = []
    for i, x in enumerate(tensors):
        first = next(j for j in range(i + 1) if tensors[j] is x)
        zeroed.append(zeroed[first] if first < i else _ZeroPadding.apply(x, valid))
    return tuple(zeroed)


class _ZeroPadding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, valid: Tensor) -> Tensor:
        # Masks the bits: on a CPU, torch.where with a broadcast mask takes six times as long.
        bits = _INTEGER_OF_SIZE[x.element_size()]
        return (x.view(bits) & -valid.to(bits)[..., None]).view(x.dtype)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None]:
        return dout, None


def is_causal_mask(attn_mask: Tensor, queries: int, keys: int) -> bool:
    """Return True. Raise for a mask that is not causal, where reading it needs no synchronisation."""
    expect_tensors(attn_mask=attn_mask)
    expect_shape({"Nq": queries, "Nk": keys}, "attn_mask", attn_mask, "Nq Nk")
    hidden = _to_bool("attn_mask", attn_mask)
    if values_are_checked(hidden.device):
        expect_values(
            hidden == torch.ones_like(hidden).triu(diagonal=1),
            "attn_mask must be the causal mask, hiding the keys after a query and no other (None: all keys are "
            "visible; padding goes into key_padding_mask)",
            lambda i, j: (
                f"one that {'hides' if hidden[i, j] else 'shows'} key {j} {'from' if hidden[i, j] else 'to'} query {i}"
            ),
        )
    return True


def _to_bool(name: str, mask: Tensor) -> Tensor:
    """The mask as bool, True where hidden. In its additive form -inf hides and 0 does not."""
    if mask.dtype == torch.bool:
        return mask
    expect(mask.is_floating_point(), name, "bool, or floating with -inf for hidden and 0 for visible", mask.dtype)
    hidden = mask == -math.inf
    if values_are_checked(mask.device):
        expected = f"{name} must be 0 where visible and -inf where hidden"
        expect_values(hidden | (mask == 0), expected, lambda i, j: f"{mask[i, j].item()} at [{i}, {j}]")
    return hidden


def make_sink_mask(sink_positions: Tensor, length: int) -> Tensor:
    """[B, N] bool, True at the sinks. Positions of -1 are padding."""
    index = sink_positions.long().masked_fill(sink_positions < 0, length)
    mask = torch.zeros(len(index), length + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(1, index, True)[:, :length]


def read_mask(sizes: dict[str, int], name: str, mask: Tensor, layout: str) -> Tensor:
    """The mask as bool, from bool or from integers 0 and 1."""
    expect_tensors(**{name: mask})
    expect_shape(sizes, name, mask, layout)
    expect_dtype(name, mask, (torch.bool, torch.int64, torch.int32, torch.uint8))
    if values_are_checked(mask.device):
        expect_values(mask == mask.bool(), f"{name} must be 0 or 1", lambda *index: mask[index].item())
    return mask.bool()

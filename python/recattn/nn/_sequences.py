"""How the sequences of a batch lie: the arguments of the modules as those of the operators."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn._check import expect
from recattn._typing import PaddingSide
from recattn._warnings import warn_of_change
from recattn.functional._sequences import expect_cu_seqlens, expect_windows, validate_layout
from recattn.nn._masks import read_windows
from recattn.reference.sink_attention import valid_tokens, window_starts


class Sequences(NamedTuple):
    """The arguments of a call, as in the public functions."""

    seq_lens: Tensor | None
    seq_starts: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None

    def tensors(self) -> dict[str, Tensor | None]:
        """By name, to check their devices."""
        return {"seq_lens": self.seq_lens, "seq_starts": self.seq_starts, "cu_seqlens": self.cu_seqlens}


def read_sequences(
    sizes: dict[str, int], key_padding_mask: Tensor | None, sequences: Sequences, padding_side: PaddingSide | None
) -> tuple[dict[str, Any], Tensor | None]:
    """The sequences as arguments of the operators; and where a projection must see zeros, the valid tokens [B, N].

    `sizes` has B and N, unless packed. padding_side None: the module was not given one.
    """
    seq_lens, seq_starts, cu_seqlens, max_seqlen = sequences
    validate_layout("right", seq_lens, seq_starts, cu_seqlens, max_seqlen)
    if cu_seqlens is not None:
        expect(key_padding_mask is None, "key_padding_mask", "None beside packed sequences", "both")
        expect_cu_seqlens({}, cu_seqlens)
        return {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}, None
    batch, length, valid = sizes["B"], sizes["N"], None
    if key_padding_mask is not None:
        expect(seq_lens is None, "seq_lens", "None beside a key_padding_mask", "both")
        seq_lens, seq_starts, valid = read_windows(key_padding_mask, batch, length)
    elif seq_lens is not None:
        expect_windows({"B": batch}, seq_lens, seq_starts)
        if seq_starts is None:
            seq_starts = window_starts(_side_of_lengths(padding_side), length, seq_lens)
    if seq_lens is None or not torch.is_grad_enabled():  # padding matters only to the gradients of the projections
        valid = None
    elif valid is None:
        valid = valid_tokens(batch, length, seq_lens, seq_starts, seq_lens.device)
    return {"seq_lens": seq_lens, "seq_starts": seq_starts}, valid


def _side_of_lengths(padding_side: PaddingSide | None) -> PaddingSide:
    if padding_side is not None:
        return padding_side
    warn_of_change(
        "seq_lens without padding_side count as padding_side='left' in RefinedSelfAttention and "
        "StochasticRefinedSelfAttention, and from the next release on as 'right': build the module with "
        "padding_side='left' to keep it, or with 'right'"
    )
    return "left"

"""Ragged batches on a CPU: sequences of similar length are computed together."""

from typing import NamedTuple

import torch
from torch import Tensor


class Bucket(NamedTuple):
    """Sequences of similar length, padded to the longest of them."""

    members: Tensor  # [b] indices of the sequences
    positions: Tensor  # [b, n] index of each token; padding repeats the sequence's last token
    valid: Tensor  # [b, n] False at padding


def length_buckets(starts: Tensor, lengths: Tensor, *, unit: int = 1, steps: int = 1) -> list[Bucket]:
    """Bucket the non-empty sequences `starts[i] : starts[i] + lengths[i]`; both are int64 [B] on the CPU.

    Lengths are rounded up to multiples of `unit`. Each doubling of the length is split into `steps` buckets.
    """
    # frexp gives 4, 5, 6, 7 as 0.5 · 2³ to 0.875 · 2³: the exponent is the doubling, the mantissa the step within it.
    mantissa, exponent = torch.frexp((lengths + unit - 1).div(unit, rounding_mode="floor").double())
    size_class = exponent * steps + ((2 * mantissa - 1) * steps).long()
    buckets = []
    for chosen in size_class[lengths > 0].unique().tolist():
        members = torch.nonzero((size_class == chosen) & (lengths > 0)).squeeze(1)
        length = lengths[members].unsqueeze(1)
        offset = torch.arange(int(length.max()))
        positions = starts[members].unsqueeze(1) + torch.minimum(offset, length - 1)
        buckets.append(Bucket(members, positions, offset < length))
    return buckets

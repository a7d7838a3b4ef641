"""Ragged batches on a CPU: sequences of similar length are gathered and computed together."""

from typing import NamedTuple

import torch
from torch import Tensor


class Bucket(NamedTuple):
    """Sequences whose lengths lie within a factor of two, padded to the longest."""

    members: Tensor  # [b] which sequences
    positions: Tensor  # [b, n] index of each token; padding repeats the sequence's last token
    valid: Tensor  # [b, n] False at padding


def length_buckets(starts: Tensor, lengths: Tensor) -> list[Bucket]:
    """Bucket the non-empty sequences at `starts[i] : starts[i] + lengths[i]`; both are int64 [B] on the CPU."""
    # frexp's exponent is the number of bits: lengths 1, 2-3, 4-7, ... share a bucket.
    size_class = torch.frexp(lengths.double()).exponent
    buckets = []
    for bits in size_class[lengths > 0].unique().tolist():
        members = torch.nonzero(size_class == bits).squeeze(1)
        length = lengths[members].unsqueeze(1)
        offset = torch.arange(int(length.max()))
        positions = starts[members].unsqueeze(1) + torch.minimum(offset, length - 1)
        buckets.append(Bucket(members, positions, offset < length))
    return buckets

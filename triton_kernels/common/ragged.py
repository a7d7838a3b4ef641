"""Sequences of different lengths, and the sinks of a sequence."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.tiles import Tokens, offset


def as_dense(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Packed tokens [T, H, ...] as a view [B, H, T, ...] whose batch stride is 0; a dense batch as it is."""
    if cu_seqlens is None:
        return x
    return x.transpose(0, 1).unsqueeze(0).expand(cu_seqlens.shape[0] - 1, *x.shape[1::-1], *x.shape[2:])


class Lengths(NamedTuple):
    """How the sequences of a batch lie, as one kernel argument. A launch takes the tensors contiguous."""

    seq_lens: Tensor | None = None  # [B] tokens of each sequence, a window of the N axis; None: all N
    seq_starts: Tensor | None = None  # [B] where the window begins; None: at 0
    cu_seqlens: Tensor | None = None  # [B + 1] where each sequence begins, packed [T, H, D]


NO_LENGTHS = Lengths()


def as_lengths(seq_lens: Tensor | None, seq_starts: Tensor | None, cu_seqlens: Tensor | None) -> Lengths:
    """The lengths of a call as the kernels take them."""
    if seq_lens is None and cu_seqlens is None:
        return NO_LENGTHS
    return Lengths(*(None if x is None else x.contiguous() for x in (seq_lens, seq_starts, cu_seqlens)))


@triton.jit
def locate_sequence(batch, N, lengths):
    """One sequence: (its first token on the N axis, its length, the position at which its first token is counted).

    Positions count from the sequence's start where it is packed (cu_seqlens), along the N axis where it is a window.
    """
    if lengths.cu_seqlens is not None:
        start = tl.load(lengths.cu_seqlens + batch).to(tl.int64)
        length = (tl.load(lengths.cu_seqlens + batch + 1) - start).to(tl.int32)
        first_position = length * 0
    elif lengths.seq_lens is not None:
        length = tl.load(lengths.seq_lens + batch).to(tl.int32)
        if lengths.seq_starts is not None:
            first_position = tl.load(lengths.seq_starts + batch).to(tl.int32)
        else:
            first_position = length * 0
        start = first_position.to(tl.int64)
    else:
        length = tl.full((), 0, tl.int32) + N
        first_position = length * 0
        start = first_position.to(tl.int64)
    return start, length, first_position


@triton.jit
def sequence_of_tile(tile, B, N, cu_seqlens, BLOCK: tl.constexpr, SPARE: tl.constexpr):
    """(the sequence that a tile belongs to, the tile's number in that sequence).

    Packed, sequence b owns the tiles from cu_seqlens[b] // BLOCK + b * SPARE on. These are at least its length // BLOCK
    + SPARE, and the host knows their total without reading a length. A search looks at 128 sequences at a time.
    """
    if cu_seqlens is None:
        tiles = N // BLOCK + SPARE
        batch = tile // tiles
        first = batch * tiles
    else:
        batch = tile * 0
        step = batch + B
        while step > 1:  # the tile belongs to one of `step` sequences from `batch` on
            step = tl.cdiv(step, 128)
            b = batch + tl.arange(0, 128) * step
            first_tiles = tl.load(cu_seqlens + b, mask=b < B, other=0).to(tl.int32) // BLOCK + b * SPARE
            batch += tl.maximum(tl.sum(((b < B) & (first_tiles <= tile)).to(tl.int32), 0) - 1, 0) * step
        first = tl.load(cu_seqlens + batch).to(tl.int32) // BLOCK + batch * SPARE
        # Tokens may lie before the first sequence. Their tiles are moved beyond its last, where they do nothing.
        tile = tl.where(tile < first, first + N // BLOCK + SPARE, tile)
    return batch.to(tl.int64), tile - first


def number_of_tiles(B: int, N: int, cu_seqlens: Tensor | None, block: int, spare: int) -> int:
    """The tiles of all sequences, as `sequence_of_tile` numbers them. Packed, N is T."""
    return B * (N // block + spare) if cu_seqlens is None else N // block + spare * B


@triton.jit
def padding_tokens(block, start, length, N, BLOCK: tl.constexpr):
    """The padding in a block of the N axis as Tokens."""
    positions = block * BLOCK + tl.arange(0, BLOCK) - start
    return Tokens(positions, ((positions < 0) | (positions >= length)) & (positions < N - start))


class Sinks(NamedTuple):
    """The sinks of a sequence in memory; see `load_sink_positions`."""

    positions: tl.tensor
    stride: tl.tensor
    count: tl.tensor
    first_position: tl.tensor
    length: tl.tensor


@triton.jit
def load_sink_positions(sink_positions, sinks, stride, M, first_position, length):
    """Tokens of the given sinks, counted from the sequence's first; `length` for a sink to ignore."""
    positions = tl.load(sink_positions + offset(sinks, stride), mask=sinks < M, other=-1).to(tl.int32)
    relative = positions - first_position
    return tl.where((positions >= 0) & (relative >= 0) & (relative < length), relative, length)


@triton.jit
def load_sinks(sinks, indices):
    """The given sinks as Tokens. A sink to ignore is not valid, and its position is behind every token's."""
    positions = load_sink_positions(
        sinks.positions, indices, sinks.stride, sinks.count, sinks.first_position, sinks.length
    )
    return Tokens(positions, positions < sinks.length)


@triton.jit
def count_sinks_before(sinks, tokens, steps):
    """How many sinks stand before each token: `steps` of a binary search. Tokens count from the sequence's first."""
    low = tokens * 0
    high = low + sinks.count
    for _ in range(0, steps):
        middle = (low + high) // 2
        searching = low < high
        position = tl.load(sinks.positions + offset(middle, sinks.stride), mask=searching, other=-1).to(tl.int32)
        before = (position >= 0) & (position - sinks.first_position < tokens)
        high = tl.where(searching & (before == 0), middle, high)
        low = tl.where(searching & before, middle + 1, low)
    return low


@triton.jit
def is_sink(sinks, positions, search_steps):
    """True where a token of the sequence is a sink."""
    before = count_sinks_before(sinks, positions, search_steps)
    return load_sinks(sinks, before).positions == positions

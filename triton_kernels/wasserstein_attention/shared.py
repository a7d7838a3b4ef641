"""What the forward and the backward of wasserstein_attention share."""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import Dropout
from recattn.triton_kernels.common.launch import cdiv
from recattn.triton_kernels.common.ragged import Lengths, locate_sequence, number_of_tiles, sequence_of_tile
from recattn.triton_kernels.common.tiles import load_rows, store_rows


class Forward(NamedTuple):
    """The inputs and outputs of the forward; contiguous, but for the first four. Packed, [B, H, N] is [T, H]."""

    mean_q: Tensor  # [B, H, N, D]
    cov_q: Tensor
    mean_k: Tensor
    cov_k: Tensor
    mean_v: Tensor  # [B, H, N, Dv]
    cov_v: Tensor
    mean: Tensor
    cov: Tensor
    vectors: Tensor  # [2, B, H, N, 2D]: of the queries, and of the keys
    row_stats: Tensor  # [2, B, H, N] float32: row_max of the scaled qk, and row_sum


class Sequence(NamedTuple):
    """The tokens of one sequence and head, as rows of contiguous tensors [B, H, N, ·] or packed [T, H, ·]."""

    first: tl.tensor  # row of the first token
    step: tl.tensor  # rows from one token to the next
    length: tl.tensor
    start: tl.tensor  # of the first token on the N or T axis
    padding_before: tl.tensor  # tokens of padding before the first, of the N - length in all
    N: tl.tensor  # `length` where packed
    rows: tl.tensor  # of all sequences and heads


@triton.jit
def sequence_of(bh, num_heads, N, lengths):
    """The sequence of a batch-head. Packed, N is T; else B·H is the first axis of the grid."""
    start, length, first_position = locate_sequence(bh // num_heads, N, lengths)
    if lengths.cu_seqlens is not None:
        rows = N.to(tl.int64) * num_heads
        seq = Sequence(start * num_heads + bh % num_heads, num_heads, length, start, 0, length, rows)
    else:
        rows = tl.num_programs(0).to(tl.int64) * N
        seq = Sequence(bh.to(tl.int64) * N + start, 1, length, first_position, first_position, N, rows)
    return seq


@triton.jit
def tile_of(B, num_heads, N, lengths, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(batch-head, its sequence, tile of BLOCK tokens) of a program in a grid by `grid_of_tiles`.

    LAST_FIRST: a sequence's last tiles come first. With a causal mask they have the most keys.
    """
    if lengths.cu_seqlens is not None:
        batch, tile = sequence_of_tile(tl.program_id(0), B, N, lengths.cu_seqlens, BLOCK, 1)
        bh = batch.to(tl.int32) * num_heads + tl.program_id(1)
        seq = sequence_of(bh, num_heads, N, lengths)
        tiles = tl.cdiv(seq.length, BLOCK)
    else:
        bh, tile = tl.program_id(0), tl.program_id(1)
        seq = sequence_of(bh, num_heads, N, lengths)
        tiles = tl.num_programs(1)
    if LAST_FIRST:
        tile = tl.where(tile < tiles, tiles - 1 - tile, tile)
    return bh, seq, tile


def grid_of_tiles(B: int, num_heads: int, N: int, lengths: Lengths, block: int) -> tuple[int, int]:
    """A program for each tile of `block` tokens of each batch-head. Packed, N is T, and some tiles are past the end."""
    if lengths.cu_seqlens is not None:
        return number_of_tiles(B, N, lengths.cu_seqlens, block, 1), num_heads
    return B * num_heads, cdiv(N, block)  # only the first axis of a grid can be longer than 65535


@triton.jit
def second_half(x, seq, WIDTH: tl.constexpr):
    """The second half of a contiguous [2, B, H, N, WIDTH], packed [2, T, H, WIDTH]."""
    return x + seq.rows * WIDTH


@triton.jit
def load_tile(x, seq, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[tokens, BLOCK_WIDTH] of the sequence in a contiguous tensor; zeros past its end."""
    return load_rows(x + seq.first * WIDTH, tokens, tokens < seq.length, WIDTH * seq.step, 1, WIDTH, BLOCK_WIDTH)


@triton.jit
def load_row(x, seq, tokens, other):
    """A number for each token; `other` past the sequence's end."""
    return tl.load(x + seq.first + tokens * seq.step, mask=tokens < seq.length, other=other)


@triton.jit
def rows_of(seq, tokens):
    """Rows, from that of the first token on, for all N tokens: those past the sequence's end are its padding."""
    return tl.where(tokens < seq.N - seq.padding_before, tokens, tokens - seq.N) * seq.step


@triton.jit
def store_tile(x, values, seq, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The inverse of `load_tile`; zeros at padding."""
    values = tl.where((tokens < seq.length)[:, None], values, 0.0)
    store_rows(x + seq.first * WIDTH, values, rows_of(seq, tokens), tokens < seq.N, WIDTH, 1, WIDTH, BLOCK_WIDTH)


@triton.jit
def store_row(x, values, seq, tokens):
    """A number for each token; 0 at padding."""
    values = tl.where(tokens < seq.length, values, 0.0)
    tl.store(x + seq.first + rows_of(seq, tokens), values, mask=tokens < seq.N)


@triton.jit
def squared_norms(tile):
    tile = tile.to(tl.float32)
    return tl.sum(tile * tile, 1)


@triton.jit
def delta_of_rows(dmean_tile, dcov_tile, mean_tile, cov_tile):
    """dmean · mean + 2 dcov · cov of each row."""
    # Summed in the order in which `p_and_ds` sums dp, so that they round alike: of a row that sees one key their
    # difference, ds, is 0.
    products = 2 * tl.dot(dcov_tile, tl.trans(cov_tile), input_precision="ieee")
    products = tl.dot(dmean_tile, tl.trans(mean_tile), products, input_precision="ieee")
    row = tl.arange(0, dmean_tile.shape[0])
    return tl.sum(tl.where(row[:, None] == row[None, :], products, 0.0), 1)


@triton.jit
def last_key_of(rows, length, causal):
    """The last key that each row sees; -1 for rows past the end."""
    return tl.where(rows < length, tl.where(causal != 0, rows, length - 1), -1)


@triton.jit
def end_of_keys(seq, tile, causal, BLOCK_M: tl.constexpr):
    """The end of the keys that the `tile`-th BLOCK_M queries visit; 1 where there are no queries.

    With a loop that may run no round, ptxas would serialize every wgmma: the accumulators' zeros would join them before
    the wait after the loop.
    """
    end = tl.where(causal != 0, tl.minimum(seq.length, (tile + 1) * BLOCK_M), seq.length)
    return tl.maximum(tl.where(tile * BLOCK_M < seq.length, end, 1), 1)


@triton.jit
def qk_block(q_tile, k_tile, scale):
    """-scale · ‖q - k‖² up to the query's own term."""
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    return products * (2 * scale) - (squared_norms(k_tile) * scale)[None, :]


# Arguments that change with N, B and H, or from call to call.
DO_NOT_SPECIALIZE = ["B", "num_heads", "N", "scale", "causal", "dropout_threshold"]


def sizes_of(mean_q: Tensor, lengths: Lengths) -> tuple[int, int, int, int]:
    """B, H, N and D of mean_q [B, H, N, D]. Packed [T, H, D], N is T."""
    if lengths.cu_seqlens is None:
        return mean_q.shape
    T, H, head_dim = mean_q.shape
    return lengths.cu_seqlens.shape[0] - 1, H, T, head_dim


def scalars_of(
    sizes: tuple[int, int, int, int], options: WassersteinAttentionOptions, dropout: Dropout
) -> tuple[int, int, int, float, int, int]:
    """B, num_heads, N, scale, causal, dropout_threshold"""
    B, H, N, head_dim = sizes
    scale = 1 / math.sqrt(head_dim) if options.scale is None else options.scale
    return B, H, N, scale, int(options.causal), dropout.threshold

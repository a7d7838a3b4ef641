"""What the forward and the backward of wasserstein_attention share."""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import Dropout
from recattn.triton_kernels.common.ragged import locate_padded_sequence
from recattn.triton_kernels.common.tiles import load_rows, store_rows


class Forward(NamedTuple):
    """The inputs and outputs of the forward; contiguous, but for the first four."""

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
    """The tokens of one sequence and head, as rows of contiguous tensors [B, H, N, ·]."""

    first: tl.tensor  # row of the first token
    length: tl.tensor
    start: tl.tensor  # position of the first token on the N axis
    N: tl.tensor


@triton.jit
def sequence_of(bh, num_heads, N, seq_lens, left_padded):
    start, length, _ = locate_padded_sequence(bh // num_heads, N, seq_lens, None, left_padded)
    return Sequence(bh.to(tl.int64) * N + start, length, start.to(tl.int32), N)


@triton.jit
def second_half(x, N, WIDTH: tl.constexpr):
    """The second [B, H, N, WIDTH] of a contiguous [2, B, H, N, WIDTH]; B·H is the first axis of the grid."""
    return x + tl.num_programs(0).to(tl.int64) * N * WIDTH


@triton.jit
def load_tile(x, seq, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[tokens, BLOCK_WIDTH] of the sequence in a contiguous tensor; zeros past its end."""
    return load_rows(x + seq.first * WIDTH, tokens, tokens < seq.length, WIDTH, 1, WIDTH, BLOCK_WIDTH)


@triton.jit
def rows_of(seq, tokens):
    """Rows, from that of the first token on, for all N tokens: those past the sequence's end are its padding."""
    return tl.where(tokens < seq.length, tokens, tl.where(seq.start > 0, tokens - seq.N, tokens))


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
def dot_of_rows(a_tile, b_tile):
    """a · b of each row, summed in the order of a matmul of tiles.

    A row that sees one key has ds = 0: the difference of this sum and a matmul, which must round alike.
    """
    row = tl.arange(0, a_tile.shape[0])
    products = tl.dot(a_tile, tl.trans(b_tile), input_precision="ieee")
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
DO_NOT_SPECIALIZE = ["num_heads", "N", "scale", "causal", "left_padded", "dropout_threshold"]


def sizes_and_options(
    num_heads: int, N: int, head_dim: int, options: WassersteinAttentionOptions, dropout: Dropout
) -> tuple:
    """num_heads, N, scale, causal, left_padded, dropout_threshold"""
    scale = 1 / math.sqrt(head_dim) if options.scale is None else options.scale
    return num_heads, N, scale, int(options.causal), int(options.left_padded), dropout.threshold

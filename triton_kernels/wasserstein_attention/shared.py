"""What the forward and the backward of wasserstein_attention share."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import Dropout
from recattn.triton_kernels.common.ragged import locate_sequence
from recattn.triton_kernels.common.tiles import block_width, load_rows, store_rows
from recattn.triton_kernels.wasserstein_attention.config import WassersteinAttentionConfig


class Forward(NamedTuple):
    """The inputs and outputs of the forward, all contiguous."""

    query: Tensor  # [B, H, N, W]
    key: Tensor
    mean_v: Tensor  # [B, H, N, Dv]
    cov_v: Tensor
    mean: Tensor
    cov: Tensor
    row_max: Tensor  # [B, H, N] float32, of the scaled qk
    row_sum: Tensor


class Sequence(NamedTuple):
    """The tokens of one sequence and head, as rows of contiguous tensors [B, H, N, ·]."""

    first: tl.tensor  # row of the first token
    length: tl.tensor


@triton.jit
def sequence_of(bh, num_heads, N, seq_lens, left_padded):
    start, length, _ = locate_sequence(bh // num_heads, N, seq_lens, None, left_padded)
    return Sequence(bh.to(tl.int64) * N + start, length)


@triton.jit
def load_tile(x, seq, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[tokens, BLOCK_WIDTH] of the sequence in a contiguous tensor; zeros past its end."""
    return load_rows(x + seq.first * WIDTH, tokens, tokens < seq.length, WIDTH, 1, WIDTH, BLOCK_WIDTH)


@triton.jit
def store_tile(x, values, seq, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """The inverse of `load_tile`."""
    store_rows(x + seq.first * WIDTH, values, tokens, tokens < seq.length, WIDTH, 1, WIDTH, BLOCK_WIDTH)


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
def is_visible(rows, keys, length, causal):
    return (keys < length) & ((causal == 0) | (keys <= rows))


@triton.jit
def qk_block(q_tile, k_tile, scale):
    """-scale · ‖q - k‖² up to the query's own term."""
    products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    return scale * (2 * products - squared_norms(k_tile)[None, :])


# Arguments that change with N, B and H, or from call to call.
DO_NOT_SPECIALIZE = ["num_heads", "N", "scale", "causal", "left_padded", "dropout_threshold"]


def sizes_and_options(forward: Forward, options: WassersteinAttentionOptions, dropout: Dropout) -> dict[str, object]:
    """The arguments that all three kernels take."""
    _, H, N, width = forward.query.shape
    value_dim = forward.mean_v.shape[3]
    return {
        "num_heads": H,
        "N": N,
        "scale": options.scale,
        "causal": int(options.causal),
        "left_padded": int(options.left_padded),
        "dropout_threshold": dropout.threshold,
        "WIDTH": width,
        "V_HEAD_DIM": value_dim,
        "BLOCK_W": block_width(width),
        "BLOCK_DV": block_width(value_dim),
    }


def choose_config(forward: Forward) -> WassersteinAttentionConfig:
    query = forward.query
    return WassersteinAttentionConfig.heuristic(query.shape[3], forward.mean_v.shape[3], query.dtype)

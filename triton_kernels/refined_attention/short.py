"""refined_attention of short sequences, forward: one program holds every [N, N] of a batch and head in registers.

W_q and W_k come in as one matrix,

    Q'K'ᵀ / √R = A G Aᵀ,        G = W_q W_kᵀ / √R,

which saves a product and makes the kernels independent of R. `short_weights` computes G in a launch of its own: every
program would otherwise repeat it, and R may be many times N. That launch also copies W_v. Both become contiguous
[BLOCK_N, BLOCK_N] with zeros beyond N, so that no load of them needs a mask: the squares. The backward reads those of
the forward.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recattn._options import RefinedAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, PER_TOKEN, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import MAX_REGISTERS, architecture_of, cdiv, host_block_width, launch
from recattn.triton_kernels.common.ragged import Lengths, locate_sequence
from recattn.triton_kernels.common.softmax import masked_softmax
from recattn.triton_kernels.common.tiles import (
    Matrix,
    Tokens,
    bhnd,
    head_rows,
    load_tokens,
    offset,
    store_tokens,
)
from recattn.triton_kernels.refined_attention.config import RefinedAttentionConfig
from recattn.triton_kernels.refined_attention.short_weights import contiguous_like, heads_of

# --- One batch and head ---


class BatchHead(NamedTuple):
    batch: tl.tensor
    head: tl.tensor
    index: tl.tensor  # batch · heads + head
    N: tl.tensor  # positions in memory; where packed those of the sequence
    first: tl.tensor  # position of the first token
    end: tl.tensor  # position after the last token
    token: tl.tensor  # index on the N or T axis of position 0
    row: tl.tensor  # likewise among all rows of a contiguous tensor
    row_step: tl.tensor  # rows from one position to the next
    causal: tl.tensor


class Squares(NamedTuple):
    """G and W_v of all heads in memory, contiguous [BLOCK_N, BLOCK_N] each. `squares_of` makes one."""

    g: tl.tensor
    w_v: tl.tensor | None  # the same address; None for the simple mechanism
    first_w_v: tl.tensor
    stride_gh: tl.tensor  # 0 where all heads share one
    stride_wh: tl.tensor


class Inputs(NamedTuple):
    """The matrices of a batch and head in memory."""

    q: Matrix  # [N, D]
    k: Matrix
    v: Matrix  # [N, Dv]
    g: tl.tensor  # contiguous [BLOCK_N, BLOCK_N], zero beyond N
    w_v: tl.tensor | None  # likewise; None for the simple mechanism


class Refined(NamedTuple):
    """A block of rows of A, refined. Triton 3.5 and 3.6 return no None in a tuple: an unused field holds A.

    `a_rows` and `p_inner` are float32 where the block is all rows: converted back, a tile in half precision would be a
    register an entry. A smaller block has the larger tiles of all rows beside it, and these in half precision.
    """

    a: tl.tensor  # all rows of A
    a_rows: tl.tensor  # the block
    q_refined: tl.tensor  # the block times G
    v_refined: tl.tensor  # A W_v, all rows; unused by the simple mechanism
    p_inner: tl.tensor  # softmax(mask(A G Aᵀ)); unused by the simple mechanism
    p: tl.tensor  # softmax(mask(M)), float32, negative where dropout drops a weight


@triton.jit
def load_batch_head(batch, head, num_heads, N, lengths, causal):
    start, length, first = locate_sequence(batch, N, lengths)
    index = batch * num_heads + head
    token, row, row_step = batch * 0, index * N, tl.full((), 1, tl.int32)
    if lengths.cu_seqlens is not None:
        N, token, row, row_step = length, start, start * num_heads + head, num_heads
    return BatchHead(batch, head, index, N, first, first + length, token, row, row_step, causal)


@triton.jit
def tokens_of(bh, x):
    """The rows [N, D] of a batch and head of a BHND, as a Matrix."""
    return head_rows(x, bh.batch, bh.head, bh.token)


@triton.jit
def contiguous_rows(bh, base, WIDTH: tl.constexpr):
    """The rows [N, WIDTH] of a batch and head of a contiguous tensor, as a Matrix."""
    return Matrix(base + bh.row * WIDTH, bh.row_step * WIDTH, 1)


@triton.jit
def tokens_at(bh, positions):
    return Tokens(positions, (positions >= bh.first) & (positions < bh.end))


@triton.jit
def positions_at(bh, positions):
    """All N positions, padding too, where zeros are stored."""
    return Tokens(positions, positions < bh.N)


@triton.jit
def visible_keys(bh, rows, keys):
    """[rows, keys], True where a row sees a key."""
    end = tl.where(bh.causal != 0, rows.positions + 1, bh.end)
    count = tl.where(rows.valid, end - bh.first, 0)
    # One comparison an entry: unsigned, a key before the first token is beyond every count.
    return (keys.positions - bh.first).to(tl.uint32)[None, :] < count.to(tl.uint32)[:, None]


@triton.jit
def columns_from(x, start):
    """A Matrix without its first columns."""
    return Matrix(x.base + offset(start, x.column_stride), x.row_stride, x.column_stride)


@triton.jit
def load_square(x, BLOCK_N: tl.constexpr):
    """A contiguous [BLOCK_N, BLOCK_N]."""
    i = tl.arange(0, BLOCK_N)
    return tl.load(x + (i[:, None] * BLOCK_N + i[None, :]))


@triton.jit
def dot(a, b, acc=None):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def store_product(out, rows, p, x, keys, scale, WIDTH: tl.constexpr, BLOCK_D: tl.constexpr):
    """out[rows] = scale · p @ x[keys], BLOCK_D columns at a time; scale None is 1."""
    for start in range(0, WIDTH, BLOCK_D):
        x_block = load_tokens(columns_from(x, start), keys, WIDTH - start, BLOCK_D)
        product = dot(p, x_block)
        if scale is not None:
            product = scale * product
        store_tokens(columns_from(out, start), product, rows, WIDTH - start, BLOCK_D)


# --- The equations ---


@triton.jit
def source_rows(bh, rows, keys, q, k, scale, HEAD_DIM: tl.constexpr, FROM_WEIGHTS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of A in float32: scale · Q Kᵀ, or with FROM_WEIGHTS its softmax; 0 where a row does not see a key."""
    logits = tl.zeros([rows.positions.shape[0], keys.positions.shape[0]], tl.float32)
    for start in range(0, HEAD_DIM, BLOCK_D):
        q_block = load_tokens(columns_from(q, start), rows, HEAD_DIM - start, BLOCK_D)
        k_block = load_tokens(columns_from(k, start), keys, HEAD_DIM - start, BLOCK_D)
        logits = dot(q_block, tl.trans(k_block), logits)
    visible = visible_keys(bh, rows, keys)
    return masked_softmax(logits * scale, visible) if FROM_WEIGHTS else scale * tl.where(visible, logits, 0.0)


@triton.jit
def refine_rows(
    bh,
    rows,
    keys,
    x,
    scale,
    dropout,
    HEAD_DIM: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    ADDS_SOURCE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A and a block of its rows, refined:

    M = A G Aᵀ, or softmax(mask(A G Aᵀ)) (A W_v); with ADDS_SOURCE plus A
    P = softmax(mask(M))
    """
    BLOCK_N: tl.constexpr = keys.positions.shape[0]
    a_rows = source_rows(bh, keys, keys, x.q, x.k, scale, HEAD_DIM, FROM_WEIGHTS, BLOCK_D)
    a = a_rows.to(x.q.base.dtype.element_ty)
    if rows.positions.shape[0] < BLOCK_N:
        a_rows = source_rows(bh, rows, keys, x.q, x.k, scale, HEAD_DIM, FROM_WEIGHTS, BLOCK_D).to(a.dtype)
    v_refined = a
    p_inner = a_rows
    if x.w_v is not None:
        v_refined = dot(a, load_square(x.w_v, BLOCK_N)).to(a.dtype)
    visible = visible_keys(bh, rows, keys)
    q_refined = dot(a_rows.to(a.dtype), load_square(x.g, BLOCK_N)).to(a.dtype)
    m = dot(q_refined, tl.trans(a))
    if x.w_v is not None:
        p_inner = masked_softmax(m, visible)
        if rows.positions.shape[0] < BLOCK_N:
            p_inner = p_inner.to(a.dtype)
        m = dot(p_inner.to(a.dtype), v_refined)
    if ADDS_SOURCE:
        m += a_rows
    p = masked_softmax(m, visible)
    if dropout.seed is not None:
        seed, index = tl.load(dropout.seed), bh.index.to(tl.int32)
        keep = dropout_weights(seed, index, PER_TOKEN, rows.positions, 0, dropout.threshold, BLOCK_N)
        p = tl.where(keep > 0.0, p, -p)
    return Refined(a, a_rows, q_refined, v_refined, p_inner, p)


@triton.jit
def after_dropout(p, dropout):
    """The weights that multiply V: those that are kept, over the probability of being kept."""
    if dropout.seed is not None:
        # By itself a GPU's maximum of NaN and 0 is 0.
        p = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL) * (65536.0 / (65536 - dropout.threshold))
    return p


# --- Forward ---


@triton.jit(do_not_specialize=["num_heads", "N", "causal", "dropout_threshold"])
def refined_attention_fwd_kernel(
    q,
    k,
    v,
    out,
    squares,
    lengths,
    dropout_seed,
    num_heads,
    N,
    scale,
    causal,
    dropout_threshold,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    ADDS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Program (i, j): block j of BLOCK_M rows of batch and head i, with all N <= BLOCK_N keys.

    a      = scale * q @ k.T, or softmax(mask(scale * q @ k.T)); 0 where masked      [BLOCK_N, BLOCK_N]
    m      = a g a.T                                                 simple          [BLOCK_M, BLOCK_N]
             softmax(mask(a g a.T)) (a w_v)                          value; additive adds a
    out    = softmax(mask(m)) @ v                                                    [BLOCK_M, BLOCK_D] at a time
    """
    batch = (tl.program_id(0) // num_heads).to(tl.int64)
    head = (tl.program_id(0) % num_heads).to(tl.int64)
    bh = load_batch_head(batch, head, num_heads, N, lengths, causal)
    positions = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = tokens_at(bh, positions)
    keys = tokens_at(bh, tl.arange(0, BLOCK_N))
    w_v = squares.w_v
    if w_v is not None:
        w_v += squares.first_w_v + head * squares.stride_wh
    g = squares.g + head * squares.stride_gh
    q, k, v = tokens_of(bh, q), tokens_of(bh, k), tokens_of(bh, v)
    x = Inputs(q, k, v, g, w_v)
    dropout = Dropout(dropout_seed, dropout_threshold)

    refined = refine_rows(bh, rows, keys, x, scale, dropout, HEAD_DIM, FROM_WEIGHTS, ADDS_SOURCE, BLOCK_D)
    p = after_dropout(refined.p, dropout).to(refined.a.dtype)
    out = contiguous_rows(bh, out, VALUE_DIM)
    store_product(out, positions_at(bh, positions), p, x.v, keys, None, VALUE_DIM, BLOCK_D)


def launch_refined_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    squares: Tensor,
    w_v: Tensor | None,
    lengths: Lengths,
    options: RefinedAttentionOptions,
    *,
    dropout: Dropout = NO_DROPOUT,
    config: RefinedAttentionConfig | None = None,
) -> Tensor:
    """out [B, H, N, Dv], zero at padding; packed [T, H, Dv].

    q, k [B, H, N, D] or packed [T, H, D]; v [B, H, N, Dv] or [T, H, Dv]; the squares of `launch_weights_product`; w_v
    [Nmax, Nmax] or [H, Nmax, Nmax], or None for the simple mechanism. `options.scale` is a number, and
    `options.max_seqlen` where packed. No axis is empty.
    """
    B, H, N, D = batch_sizes(q, lengths, options)
    out = contiguous_like(v)
    tile = (config or choose_config(q, v, N, options, dropout)).fwd
    launch(
        refined_attention_fwd_kernel,
        (B * H, cdiv(N, tile.block_m)),
        *(bhnd(x, lengths.cu_seqlens) for x in (q, k, v)),
        *(out, squares_of(squares, w_v), lengths, dropout.seed),
        *(H, N, options.scale, int(options.causal), dropout.threshold),
        HEAD_DIM=D,
        VALUE_DIM=v.shape[-1],
        FROM_WEIGHTS=options.source == "weights",
        ADDS_SOURCE=options.mechanism == "additive",
        BLOCK_M=tile.block_m,
        BLOCK_N=host_block_width(N),
        BLOCK_D=tile.block_d,
        num_warps=tile.num_warps,
        num_stages=1,
        maxnreg=MAX_REGISTERS,
    )
    return out


def batch_sizes(q: Tensor, lengths: Lengths, options: RefinedAttentionOptions) -> tuple[int, int, int, int]:
    """(B, H, N, D); where packed, N is a bound of the lengths."""
    if lengths.cu_seqlens is None:
        return q.shape
    return lengths.cu_seqlens.shape[0] - 1, q.shape[1], options.max_seqlen, q.shape[2]


def choose_config(
    q: Tensor, v: Tensor, N: int, options: RefinedAttentionOptions, dropout: Dropout
) -> RefinedAttentionConfig:
    size, head_dim = host_block_width(N), max(q.shape[-1], v.shape[-1])
    kind = (options.mechanism, dropout.seed is not None)
    return RefinedAttentionConfig.heuristic(size, head_dim, q.dtype, architecture_of(q), *kind)


def squares_of(squares: Tensor, w_v: Tensor | None) -> Squares:
    """The tensor of `launch_weights_product` as a kernel argument."""
    v_heads = 0 if w_v is None else heads_of(w_v)
    g_heads, size = squares.shape[0] - v_heads, squares.shape[1] * squares.shape[1]
    strides = (size if g_heads > 1 else 0, size if v_heads > 1 else 0)
    return Squares(squares, None if w_v is None else squares, g_heads * size, *strides)

"""The vectors of Gaussians, and the gradients of Gaussians from those of their vectors."""

import triton
import triton.language as tl

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.launch import launch
from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.common.softmax import expm1_series
from recattn.triton_kernels.common.tiles import Tokens, bhnd, head_rows, load_tokens, offset, store_rows
from recattn.triton_kernels.wasserstein_attention.config import launch_constants
from recattn.triton_kernels.wasserstein_attention.shared import Forward, rows_of, second_half, sequence_of, sizes_of

# Of float32. A smaller covariance counts as this number.
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)


@triton.jit
def square_root(x, EXACT: tl.constexpr):
    """Rounded to nearest, or in two instructions instead of ten."""
    return tl.sqrt_rn(x) if EXACT else tl.sqrt(x)


@triton.jit
def inverse_root(x, EXACT: tl.constexpr):
    """1 / `square_root`, in one instruction unless it is exact."""
    return 1 / tl.sqrt_rn(x) if EXACT else tl.rsqrt(x)


@triton.jit
def standard_deviations(x, REFINED: tl.constexpr, EXACT: tl.constexpr):
    """√x; REFINED: √Σ - 1 of Σ = elu(x) + 1, which changes no distance and loses no digits near x = 0."""
    if REFINED:
        half, positive = tl.minimum(x, 0.0) / 2, tl.maximum(x, 0.0)
        negative = tl.where(half > -0.5, expm1_series(half), tl.exp(half) - 1)
        std = tl.where(x > 0, positive / (square_root(1 + positive, EXACT) + 1), negative)
        std = tl.where(x == x, std, x)  # NaN, which minimum and maximum drop
    else:
        std = square_root(tl.where(x < SMALLEST_NORMAL, SMALLEST_NORMAL, x), EXACT)
    return std


@triton.jit
def standard_deviations_backward(dstd, x, REFINED: tl.constexpr, EXACT: tl.constexpr):
    """The gradient of x from that of `standard_deviations(x)`."""
    if REFINED:
        slope = tl.where(x > 0, inverse_root(1 + tl.maximum(x, 0.0), EXACT), tl.exp(tl.minimum(x, 0.0) / 2))
        dx = dstd * (0.5 * slope)
    else:
        is_small = x < SMALLEST_NORMAL
        dx = tl.where(is_small, 0.0, 0.5 * dstd * inverse_root(tl.where(is_small, 1.0, x), EXACT))
    return dx


@triton.jit
def load_columns(
    x,
    first,
    seq,
    IS_COV: tl.constexpr,
    REFINED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D] in float32, of Σ as standard deviations. What is past the sequence's end or D is near 0."""
    tokens = first + tl.arange(0, BLOCK_N)
    tile = load_tokens(x, Tokens(tokens, tokens < seq.length), HEAD_DIM, BLOCK_D).to(tl.float32)
    EXACT: tl.constexpr = x.base.dtype.element_ty == tl.float32
    return standard_deviations(tile, REFINED, EXACT) if IS_COV else tile


@triton.jit
def finite_mean(total, seq):
    """[1, BLOCK_D], the sum of the rows over the length of the sequence.

    Any finite offset is right. NaN or infinity would carry over from one key to queries that do not see it.
    """
    mean = tl.sum(total, 0) / tl.maximum(seq.length, 1)
    return tl.where(tl.abs(mean) < float("inf"), mean, 0.0)[None, :]


@triton.jit
def mean_of_columns(
    x,
    seq,
    IS_COV: tl.constexpr,
    REFINED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[1, BLOCK_D], the mean over the tokens of the sequence."""
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in range(0, seq.length, BLOCK_N):
        total += load_columns(x, first, seq, IS_COV, REFINED, HEAD_DIM, BLOCK_D, BLOCK_N)
    return finite_mean(total, seq)


@triton.jit
def store_centred(
    x_q,
    x_k,
    vectors,
    seq,
    batch,
    head,
    IS_COV: tl.constexpr,
    REFINED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Half of the columns of the vectors."""
    x_q, x_k = head_rows(x_q, batch, head, seq.start), head_rows(x_k, batch, head, seq.start)
    centre = mean_of_columns(x_k, seq, IS_COV, REFINED, HEAD_DIM, BLOCK_D, BLOCK_N)
    query = vectors + seq.first * (2 * HEAD_DIM) + (HEAD_DIM if IS_COV else 0)
    key = second_half(query, seq, 2 * HEAD_DIM)
    for first in range(0, seq.N, BLOCK_N):
        tokens = first + tl.arange(0, BLOCK_N)
        rows, stored, valid = rows_of(seq, tokens), tokens < seq.N, (tokens < seq.length)[:, None]
        q_tile = load_columns(x_q, first, seq, IS_COV, REFINED, HEAD_DIM, BLOCK_D, BLOCK_N) - centre
        store_rows(query, tl.where(valid, q_tile, 0.0), rows, stored, 2 * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)
        k_tile = load_columns(x_k, first, seq, IS_COV, REFINED, HEAD_DIM, BLOCK_D, BLOCK_N) - centre
        store_rows(key, tl.where(valid, k_tile, 0.0), rows, stored, 2 * HEAD_DIM, 1, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["num_heads", "N"])
def wasserstein_attention_vectors_kernel(
    mean_q,
    cov_q,
    mean_k,
    cov_k,
    vectors,
    lengths,
    num_heads,
    N,
    REFINED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (i, j): all tokens of batch-head i; j = 0 their means, j = 1 their standard deviations.

    centre = sum over the keys / their number                               [D]
    for each block of BLOCK_N tokens:
        query, key = x_q - centre, x_k - centre                             [BLOCK_N, D]; zeros at padding
    """
    bh = tl.program_id(0)
    batch, head = bh // num_heads, bh % num_heads
    seq = sequence_of(bh, num_heads, N, lengths)
    if tl.program_id(1) == 0:
        store_centred(mean_q, mean_k, vectors, seq, batch, head, False, REFINED, HEAD_DIM, BLOCK_D, BLOCK_N)
    else:
        store_centred(cov_q, cov_k, vectors, seq, batch, head, True, REFINED, HEAD_DIM, BLOCK_D, BLOCK_N)


@triton.jit
def store_gradients(
    dmean,
    dcov,
    dvectors,
    cov,
    seq,
    bh,
    num_heads,
    tokens,
    HEAD_DIM: tl.constexpr,
    BLOCK_W: tl.constexpr,
    REFINED: tl.constexpr,
):
    """The gradients of mean and cov from those of the vectors of the tokens, [tokens, BLOCK_W]; zeros at padding."""
    valid, stored, rows = (tokens < seq.length)[:, None], tokens < seq.N, rows_of(seq, tokens)
    columns = tl.arange(0, BLOCK_W) - HEAD_DIM
    in_cov = ((columns >= 0) & (columns < HEAD_DIM))[None, :]
    cov = head_rows(cov, bh // num_heads, bh % num_heads, seq.start)
    addresses = cov.base + offset(tokens[:, None], cov.row_stride) + offset(columns[None, :], cov.column_stride)
    x = tl.load(addresses, mask=valid & in_cov, other=1.0).to(tl.float32)
    dmean += seq.first * HEAD_DIM
    store_rows(dmean, tl.where(valid, dvectors, 0.0), rows, stored, HEAD_DIM, 1, HEAD_DIM, BLOCK_W)
    EXACT: tl.constexpr = dcov.dtype.element_ty == tl.float32
    dx = tl.where(valid, standard_deviations_backward(dvectors, x, REFINED, EXACT), 0.0)
    addresses = dcov + seq.first * HEAD_DIM + offset(rows[:, None], HEAD_DIM) + columns[None, :]
    tl.store(addresses, dx.to(dcov.dtype.element_ty), mask=stored[:, None] & in_cov)


def launch_wasserstein_attention_vectors(
    forward: Forward, lengths: Lengths, options: WassersteinAttentionOptions
) -> None:
    """Write `forward.vectors`; zeros at padding."""
    mean_q, cov_q, mean_k, cov_k, mean_v, *_, vectors, _ = forward
    B, H, N, head_dim = sizes_of(mean_q, lengths)
    if B * H * N == 0:
        return
    launch(
        wasserstein_attention_vectors_kernel,
        (B * H, 2),
        *[bhnd(x, lengths.cu_seqlens) for x in (mean_q, cov_q, mean_k, cov_k)],
        *(vectors, lengths, H, N),
        **launch_constants(head_dim, mean_v.shape[-1], mean_q.dtype, options.refined).vectors,
    )

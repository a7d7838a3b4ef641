"""The fused forward of sink_attention: FlashAttention with a bias between sink tokens.

The bias β is added in `softmax_block`, just below. Everything else is FlashAttention, but for the order of the queries
and keys, which `sink_attention_fwd_kernel` explains.
"""

import triton
import triton.language as tl
from torch import Tensor

from recattn._options import SinkAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, PER_SINK, PER_TOKEN, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import launch
from recattn.triton_kernels.common.ragged import (
    Lengths,
    Sinks,
    load_sinks,
    locate_sequence,
    number_of_tiles,
    padding_tokens,
    sequence_of_tile,
)
from recattn.triton_kernels.common.softmax import exp_biased, exp_scaled, log2e_scale
from recattn.triton_kernels.common.tiles import (
    Matrix,
    bhnd,
    block_width,
    head_rows,
    load_tokens,
    store_tokens,
    store_zeros,
)
from recattn.triton_kernels.sink_attention.common import (
    DO_NOT_SPECIALIZE,
    HeadDropout,
    Keys,
    QueryTile,
    RowStats,
    SinkInputs,
    first_token,
    key_range,
    load_block,
    mark_recomputed,
    needs_int64_offsets,
    number_of_tokens,
    qk_block,
    query_tile,
    row_strides,
    sink_qk_block,
    wide_strides,
)
from recattn.triton_kernels.sink_attention.config import (
    TileConfig,
    autotuned,
    autotuning_is_on,
    config_of,
    kind_of,
)
from recattn.triton_kernels.sink_attention.split_tokens import Streams


@triton.jit
def softmax_block(row_max, row_sum, qk, qk_scale, bias, operand, MASKED: tl.constexpr):
    """One block of keys of an online softmax(qk_scale * qk + β): (p, row_scale, row_max, row_sum). qk_scale > 0.
    Without β, bias is None.

    row_sum and the accumulator are scaled by exp(-row_max); row_scale brings the accumulator to the new row_max.
    """
    # Without β the scale follows the maximum, to the same bits: one FFMA is all that p takes before its exponential.
    block_max = tl.max(qk, 1) * qk_scale if bias is None else tl.max(qk * qk_scale + bias, 1)
    new_row_max = tl.maximum(row_max, block_max)
    row_max_safe = new_row_max
    if MASKED:  # before a row's first key its maximum is -inf, and -inf minus itself NaN
        row_max_safe = tl.where(new_row_max == -float("inf"), 0.0, new_row_max)
    if bias is None:
        p = exp_scaled(qk * qk_scale - row_max_safe[:, None], operand)
    else:
        # β is added here: exp(qk + β - row_max).
        p = exp_biased(qk * qk_scale, bias, row_max_safe[:, None], operand)
    row_scale = exp_scaled(row_max - row_max_safe, operand)
    return p, row_scale, new_row_max, row_sum * row_scale + tl.sum(p, 1)


@triton.jit
def softmax_step(
    acc, row_max, row_sum, qk, qk_scale, bias, v_tile, dropout, philox_stream, rows, first_column, MASKED: tl.constexpr
):
    """Add a block of keys to softmax(qk_scale * qk + β) @ v = acc / row_sum. qk_scale > 0."""
    p, row_scale, row_max, row_sum = softmax_block(row_max, row_sum, qk, qk_scale, bias, v_tile, MASKED)
    if dropout.seed is not None:
        p *= dropout_weights(
            tl.load(dropout.seed), dropout.bh, philox_stream, rows, first_column, dropout.threshold, p.shape[1]
        )
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * row_scale[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def attn_fwd_inner(
    acc, row_max, row_sum, q_tile, queries, keys, start, end, qk_scale, dropout,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, POSITIVE_SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Add the keys start..end, in memory order, without bias. A sink tile leaves the sinks out."""
    offsets = tl.arange(0, BLOCK_N)
    rows = queries.tokens.positions
    for first in range(start, end, BLOCK_N):
        k_tile = load_block(keys.k, first, offsets, keys.length, HEAD_DIM, q_tile.shape[1], MASKED)
        qk = qk_block(q_tile, k_tile, 1.0 if POSITIVE_SCALE else qk_scale, first, queries, keys, MASKED)
        v_tile = load_block(keys.v, first, offsets, keys.length, V_HEAD_DIM, acc.shape[1], MASKED)
        acc, row_max, row_sum = softmax_step(
            *(acc, row_max, row_sum, qk, qk_scale if POSITIVE_SCALE else 1.0, None, v_tile),
            *(dropout, PER_TOKEN, rows, first, MASKED),
        )
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def sink_attention_fwd_kernel(
    q, k, v, out,  # BHND
    row_stats, sink_tensors, streams, lengths, dropout_seed,
    stride_lse_b, stride_lse_h, stride_positions_b, stride_bias_b, stride_bias_h, stride_bias_m,
    B, num_q_heads, group_size, N, M, scale, causal, dropout_threshold,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one (batch, head), all their keys.

    qk   = scale * q @ k.T                        [BLOCK_M, BLOCK_N]
    qk  += inter_sink_bias[sink(i), sink(j)]      only where query i and key j are both sinks
    out  = softmax(qk) @ v                        online: row_max, row_sum, acc

    The queries of a tile are all sinks or all non-sinks, so that the bias of a tile is dense. A sink tile visits the
    sinks, BLOCK_S at a time and with bias, then all other keys. Any other tile visits all keys without bias. q, k, v
    and out are BHND; WIDE marks a k or v whose tiles need int64 offsets, POSITIVE_SCALE a
    scale > 0, which need not precede the maximum of a row.
    """
    batch, tile = sequence_of_tile(tl.program_id(0), B, N, lengths.cu_seqlens, BLOCK_M, 2)
    start, length, first_position = locate_sequence(batch, N, lengths)
    head = tl.program_id(1).to(tl.int64)
    bh = batch * num_q_heads + head
    token = first_token(batch, N, start, lengths.cu_seqlens)
    positions = sink_tensors.positions + batch * stride_positions_b
    sinks = Sinks(positions, sink_tensors.stride_m, M, first_position, length)
    non_sinks, sink_bounds = streams.non_sinks + token, streams.sink_bounds + 2 * batch
    is_sink_tile, index, rows, first_row, first_sink, end_sink = query_tile(
        tile, sinks, non_sinks, sink_bounds, BLOCK_M
    )
    BLOCK_D: tl.constexpr = block_width(HEAD_DIM)
    BLOCK_DV: tl.constexpr = block_width(V_HEAD_DIM)
    if lengths.seq_lens is not None:  # constexpr  # noqa: SIM102
        if length < N:
            padding = padding_tokens(tile, start, length, N, BLOCK_M)
            # 64 columns at a time, and int32 for lse, which is contiguous, take fewest registers.
            store_zeros(head_rows(out, batch, head, start), padding, V_HEAD_DIM, 64)
            lse_of_first = row_stats.lse + batch * stride_lse_b + head * stride_lse_h + start * row_stats.stride_n
            padded_lse = lse_of_first + padding.positions.to(tl.int32) * row_stats.stride_n
            tl.store(padded_lse, -float("inf"), mask=padding.valid)
    if first_row < 0:
        return
    kv_head = head // group_size
    q = head_rows(q, batch, head, start)
    k, v = head_rows(k, batch, kv_head, start), head_rows(v, batch, kv_head, start)
    if WIDE:
        k, v = wide_strides(k), wide_strides(v)
    out = head_rows(out, batch, head, start)
    keys = Keys(k, v, streams.is_sink + token, length)
    bias = sink_tensors.bias + batch * stride_bias_b + head * stride_bias_h
    bias = Matrix(bias, stride_bias_m, sink_tensors.stride_n)
    dropout = HeadDropout(dropout_seed, bh.to(tl.int32), dropout_threshold)

    last_key, first_masked, end = key_range(rows, first_row, is_sink_tile, causal, length, BLOCK_N)
    queries = QueryTile(is_sink_tile, index, rows, last_key)
    q_tile = load_tokens(q, rows, HEAD_DIM, BLOCK_D)  # [BM, D]
    qk_scale = scale * log2e_scale(q_tile)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    first_block = first_sink // BLOCK_S * BLOCK_S
    # Not inside `if is_sink_tile`: ptxas would serialize every wgmma of the kernel.
    for first in range(first_block, tl.where(is_sink_tile, end_sink, first_block), BLOCK_S):
        key_sinks = first + tl.arange(0, BLOCK_S)  # [BS]
        key_tokens = load_sinks(sinks, key_sinks)
        k_tile = load_tokens(k, key_tokens, HEAD_DIM, BLOCK_D)
        qk, bias_tile = sink_qk_block(q_tile, k_tile, qk_scale, queries, key_sinks, key_tokens.positions, bias)
        v_tile = load_tokens(v, key_tokens, V_HEAD_DIM, BLOCK_DV)
        acc, row_max, row_sum = softmax_step(
            acc, row_max, row_sum, qk, 1.0, bias_tile, v_tile, dropout, PER_SINK, index, first, True
        )
    for MASKED in tl.static_range(2):
        acc, row_max, row_sum = attn_fwd_inner(
            acc, row_max, row_sum, q_tile, queries, keys,
            first_masked if MASKED else tl.zeros_like(end), end if MASKED else first_masked,
            qk_scale, dropout, HEAD_DIM, V_HEAD_DIM, BLOCK_N, POSITIVE_SCALE, MASKED,
        )  # fmt: skip

    if sink_tensors.logits is not None:  # one more term of the softmax, without a value
        logit = tl.load(sink_tensors.logits + head * sink_tensors.stride_h).to(tl.float32) * log2e_scale(q_tile)
        new_row_max = tl.maximum(row_max, logit)
        row_max_safe = tl.where(new_row_max == -float("inf"), 0.0, new_row_max)
        row_scale = exp_scaled(row_max - row_max_safe, q_tile)
        acc *= row_scale[:, None]
        row_sum = row_sum * row_scale + exp_scaled(logit - row_max_safe, q_tile)
        row_max = new_row_max
    # A row whose keys all have a bias of -inf: out = 0, lse = -inf.
    empty = row_sum == 0
    row_sum = tl.where(empty, 1.0, row_sum)
    # Loaded again: kept through the loops, the rows would take registers.
    is_sink_tile, index, rows, _, _, _ = query_tile(tile, sinks, non_sinks, sink_bounds, BLOCK_M)
    store_tokens(out, acc / row_sum[:, None], rows, V_HEAD_DIM, BLOCK_DV)
    lse = row_stats.lse + batch * stride_lse_b + head * stride_lse_h + start * row_stats.stride_n
    row_lse = row_max / log2e_scale(q_tile) + tl.log(row_sum)
    tl.store(lse + rows.positions.to(tl.int64) * row_stats.stride_n, row_lse, mask=rows.valid)
    if is_sink_tile:
        sink_stats = row_stats.sink_stats + bh * M + index
        tl.store(sink_stats, tl.where(empty, float("inf"), row_max), mask=rows.valid)
        # Marked, because the row is computed over all its keys: a correction's backward may take over.
        tl.store(sink_stats + B.to(tl.int64) * num_q_heads * M, mark_recomputed(row_sum), mask=rows.valid)


def launch_sink_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_stats: Tensor,
    sinks: SinkInputs,
    lengths: Lengths,
    streams: Streams,
    dropout: Dropout = NO_DROPOUT,
    *,
    options: SinkAttentionOptions,
    config: TileConfig | None = None,
) -> None:
    """Write `out`, `lse` and `sink_stats` of

        O = softmax(scale · Q Kᵀ + mask + β) V
        β[b, h, i, j] = inter_sink_bias[b, h, s(i), s(j)] when tokens i and j are both sinks, else 0

    q [B, Hq, N, D]; k [B, Hkv, N, D]; v [B, Hkv, N, Dv]; out [B, Hq, N, Dv]; lse [B, Hq, N] float32, natural logarithm;
    sink_stats [2, B, Hq, M] float32, contiguous: row_max, times `log2e_scale`, and row_sum of each sink row, whose
    probabilities are exp(qk + β - row_max) / |row_sum|. Packed: [T, H, ...] and cu_seqlens. At padding out is 0 and lse
    -inf.
    """
    if q.numel() == 0:
        return
    B, M = sinks.positions.shape
    N, num_q_heads, num_kv_heads = number_of_tokens(q, lengths), q.shape[1], k.shape[1]
    head_dim, v_head_dim = k.shape[-1], v.shape[-1]
    tile = config or config_of(q, v, dropout).fwd

    def grid_of(blocks: dict[str, object]) -> tuple[int, int]:
        return number_of_tiles(B, N, lengths.cu_seqlens, blocks["BLOCK_M"], 2), num_q_heads

    kernel, grid, blocks, warps = sink_attention_fwd_kernel, grid_of(tile.blocks), tile.blocks, tile.warps
    if autotuning_is_on():
        kernel = autotuned(kernel, "fwd", kind_of(q.dtype, dropout.seed is not None))
        grid, blocks, warps = grid_of, {}, {}
    q, k, v, out = (bhnd(x, lengths.cu_seqlens) for x in (q, k, v, out))
    stride_b, stride_h, stride_n = row_strides(lse, lengths)
    sink_tensors, sink_strides = sinks.as_arguments()
    launch(
        kernel, grid,
        q, k, v, out,
        RowStats(lse, stride_n, None, sink_stats, None), sink_tensors, streams, lengths, dropout.seed,
        stride_b, stride_h, *sink_strides,
        B, num_q_heads, num_q_heads // num_kv_heads, N, M,
        options.scale, int(options.causal), dropout.threshold,
        HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim, **blocks, WIDE=needs_int64_offsets(k, v),
        POSITIVE_SCALE=options.scale > 0, **warps,
    )  # fmt: skip

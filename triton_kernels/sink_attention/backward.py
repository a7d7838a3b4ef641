"""The fused backward of sink_attention: FlashAttention's two kernels, with a bias between sink tokens.

    p  = exp(qk + β - lse)         ds = p * (dout @ v.T - delta)       delta = sum(dout * out)
    dq = scale * ds @ k            dk = scale * ds.T @ q               dv = p.T @ dout

The first kernel makes dq and what the second takes of each row: lse and delta. The second makes dk and dv. What sink
keys get from sink queries in dk and dv, and the gradient of β, come from sink_pairs.py. β is added in the loop over the
sinks of `sink_attention_bwd_dq_kernel`.
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
from recattn.triton_kernels.common.softmax import exp_biased, exp_scaled, has_rounded, log2e_scale
from recattn.triton_kernels.common.tiles import (
    Matrix,
    Tokens,
    bhnd,
    block_width,
    head_rows,
    load_tokens,
    offset,
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
    first_row_of,
    first_token,
    key_range,
    load_block,
    needs_int64_offsets,
    number_of_tokens,
    qk_block,
    query_tile,
    row_strides,
    sink_qk_block,
    wide_strides,
)
from recattn.triton_kernels.sink_attention.config import (
    SinkAttentionConfig,
    autotuned,
    autotuning_is_on,
    config_of,
    kind_of,
)
from recattn.triton_kernels.sink_attention.split_tokens import Streams


@triton.jit
def p_and_ds(p, dp, delta, dropout, philox_stream, rows, first_column):
    """p with dropout, and ds, of one tile."""
    dropped_p = p
    if dropout.seed is not None:
        factors = dropout_weights(
            tl.load(dropout.seed), dropout.bh, philox_stream, rows, first_column, dropout.threshold, p.shape[1]
        )
        dropped_p *= factors
        dp *= factors
    return dropped_p, p * (dp - delta)


@triton.jit
def scaled_lse(lse, operand):
    """lse in the unit of qk. Rows that see no key get +inf, so that exp(qk - lse) is 0 rather than NaN."""
    return tl.where(lse == -float("inf"), float("inf"), lse * log2e_scale(operand))


# --- dQ and delta ---


@triton.jit
def attn_bwd_dq_inner(
    dq, q_tile, dout_tile, lse, delta, queries, keys, start, end, qk_scale, dropout,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq += ds @ k of the keys start..end, in memory order, without bias. A sink tile leaves the sinks out."""
    offsets = tl.arange(0, BLOCK_N)
    rows = queries.tokens.positions
    for first in range(start, end, BLOCK_N):
        k_tile = load_block(keys.k, first, offsets, keys.length, HEAD_DIM, q_tile.shape[1], MASKED)
        v_tile = load_block(keys.v, first, offsets, keys.length, V_HEAD_DIM, dout_tile.shape[1], MASKED)
        qk = qk_block(q_tile, k_tile, qk_scale, first, queries, keys, MASKED)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        p = exp_scaled(qk - lse[:, None], q_tile)
        _, ds = p_and_ds(p, dp, delta[:, None], dropout, PER_TOKEN, rows, first)
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def sink_attention_bwd_dq_kernel(
    q, k, v, out, dout, dq,  # BHND
    row_stats, sink_tensors, streams, lengths, dropout_seed,
    stride_lse_b, stride_lse_h, stride_positions_b, stride_bias_b, stride_bias_h, stride_bias_m,
    B, num_q_heads, group_size, N, M, scale, causal, dropout_threshold,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one (batch, head), all their keys, visited as by the forward.

    delta = sum(dout * out)                [BLOCK_M]
    p     = exp(qk + β - lse)              [BLOCK_M, BLOCK_N]
    ds    = p * (dout @ v.T - delta)       [BLOCK_M, BLOCK_N]
    dq   += scale * ds @ k                 [BLOCK_M, D]

    Of sink rows p is exp(qk + β - row_max) / row_sum. A large β makes a large lse, which rounds more than the error
    bound allows; row_max and row_sum do not.
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
            # 16 columns at a time take fewest registers.
            store_zeros(head_rows(dq, batch, head, start), padding, HEAD_DIM, 16)
    if first_row < 0:
        return
    kv_head = head // group_size
    q = head_rows(q, batch, head, start)
    k, v = head_rows(k, batch, kv_head, start), head_rows(v, batch, kv_head, start)
    if WIDE:
        k, v = wide_strides(k), wide_strides(v)
    out, dout = head_rows(out, batch, head, start), head_rows(dout, batch, head, start)
    dq = head_rows(dq, batch, head, start)
    keys = Keys(k, v, streams.is_sink + token, length)
    bias = sink_tensors.bias + batch * stride_bias_b + head * stride_bias_h
    bias = Matrix(bias, stride_bias_m, sink_tensors.stride_n)
    dropout = HeadDropout(dropout_seed, bh.to(tl.int32), dropout_threshold)
    lse_rows = batch * stride_lse_b + head * stride_lse_h + (start + rows.positions) * row_stats.stride_n

    last_key, first_masked, end = key_range(rows, first_row, is_sink_tile, causal, length, BLOCK_N)
    queries = QueryTile(is_sink_tile, index, rows, last_key)
    q_tile = load_tokens(q, rows, HEAD_DIM, BLOCK_D)  # [BM, D]
    qk_scale = scale * log2e_scale(q_tile)
    dout_tile = load_tokens(dout, rows, V_HEAD_DIM, BLOCK_DV)  # [BM, Dv]
    out_tile = load_tokens(out, rows, V_HEAD_DIM, BLOCK_DV)
    # sink_pairs.py sums dout · v of float32 in float64. So is delta: in a row with one key the two are equal.
    SUM: tl.constexpr = tl.float64 if out_tile.dtype == tl.float32 else tl.float32
    delta = tl.sum(dout_tile.to(SUM) * out_tile.to(SUM), 1).to(tl.float32)  # [BM]
    lse = scaled_lse(tl.load(row_stats.lse + lse_rows, mask=rows.valid, other=float("inf")), q_tile)
    saved = first_row_of(batch, head, num_q_heads, N, start, lengths.cu_seqlens) + rows.positions
    saved = row_stats.lse_and_delta + saved * 4
    tl.store(saved, lse, mask=rows.valid)
    tl.store(saved + 1, tl.where(is_sink_tile, float("inf"), lse), mask=rows.valid)
    tl.store(saved + 2, delta, mask=rows.valid)
    of_sinks = rows.valid & is_sink_tile
    tl.store(row_stats.sink_delta + bh * M + index, delta, mask=of_sinks)
    sink_stats = row_stats.sink_stats + bh * M + index
    row_max = tl.load(sink_stats, mask=of_sinks, other=float("inf"))
    lse = tl.where(is_sink_tile, row_max, lse)
    largest_p = tl.where(has_rounded(row_max, q_tile), 1.0, float("inf"))
    row_sum = tl.abs(tl.load(sink_stats + B.to(tl.int64) * num_q_heads * M, mask=of_sinks, other=1.0))
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first_block = first_sink // BLOCK_S * BLOCK_S
    # Not inside `if is_sink_tile`: ptxas would serialize every wgmma of the kernel.
    for first in range(first_block, tl.where(is_sink_tile, end_sink, first_block), BLOCK_S):
        key_sinks = first + tl.arange(0, BLOCK_S)  # [BS]
        key_tokens = load_sinks(sinks, key_sinks)
        k_tile = load_tokens(k, key_tokens, HEAD_DIM, BLOCK_D)
        v_tile = load_tokens(v, key_tokens, V_HEAD_DIM, BLOCK_DV)
        qk, bias_tile = sink_qk_block(q_tile, k_tile, qk_scale, queries, key_sinks, key_tokens.positions, bias)
        p = exp_biased(qk, bias_tile, lse[:, None], q_tile)
        # qk + β may round another way than row_max did: hence the limit, which keeps NaN.
        p = tl.minimum(p, largest_p[:, None], propagate_nan=tl.PropagateNan.ALL)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        _, ds = p_and_ds(p, dp, delta[:, None], dropout, PER_SINK, index, first)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    for MASKED in tl.static_range(2):
        acc = attn_bwd_dq_inner(
            acc, q_tile, dout_tile, lse, delta, queries, keys,
            first_masked if MASKED else tl.zeros_like(end), end if MASKED else first_masked,
            qk_scale, dropout, HEAD_DIM, V_HEAD_DIM, BLOCK_N, MASKED,
        )  # fmt: skip
    acc *= (scale / row_sum)[:, None]
    # Loaded again: kept through the loops, the rows would take registers.
    _, _, rows, _, _, _ = query_tile(tile, sinks, non_sinks, sink_bounds, BLOCK_M)
    store_tokens(dq, acc, rows, HEAD_DIM, BLOCK_D)


# --- dK and dV ---


@triton.jit
def block_offsets(x, offsets, BLOCK_WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """[offsets, BLOCK_WIDTH]: where the elements of a block of a BHND's rows lie. int32, or int64 with WIDE."""
    matrix = Matrix(x.ptr, x.stride_n, x.stride_d)
    if WIDE:
        matrix = wide_strides(matrix)
    return offsets[:, None] * matrix.row_stride + tl.arange(0, BLOCK_WIDTH)[None, :] * matrix.column_stride


@triton.jit
def step_of(rows, heads, x):
    """How far apart in memory two rows of a BHND are."""
    return offset(rows, x.stride_n) + offset(heads, x.stride_h)


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def sink_attention_bwd_dkdv_kernel(
    lse_and_delta, is_sink, lengths, dropout_seed,
    q, k, v, dout, dk, dv,  # BHND; behind the pointers, where Triton 3.6 spills least
    B, num_q_heads, group_size, N, scale, causal, dropout_threshold,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N keys of one (batch, key head), all their queries in memory order.

    p   = exp(qk - lse).T                    [BLOCK_N, BLOCK_M], 0 where query and key are both sinks
    ds  = p * (dout @ v.T - delta).T         [BLOCK_N, BLOCK_M]
    dv += p @ dout                           [BLOCK_N, Dv]
    dk += scale * ds @ q                     [BLOCK_N, D]

    A loop runs over the query heads that share the key head and over their blocks of queries: first over those on the
    diagonal of a causal mask, then over those that see all the keys.
    """
    batch, block = sequence_of_tile(tl.program_id(0), B, N, lengths.cu_seqlens, BLOCK_N, 1)
    start, length, _ = locate_sequence(batch, N, lengths)
    BLOCK_D: tl.constexpr = block_width(HEAD_DIM)
    BLOCK_DV: tl.constexpr = block_width(V_HEAD_DIM)
    kv_head = tl.program_id(1).to(tl.int64)
    if lengths.seq_lens is not None:  # constexpr  # noqa: SIM102
        if length < N:
            padding = padding_tokens(block, start, length, N, BLOCK_N)
            # 16 columns at a time take no registers from the loop.
            store_zeros(head_rows(dk, batch, kv_head, start), padding, HEAD_DIM, 16)
            store_zeros(head_rows(dv, batch, kv_head, start), padding, V_HEAD_DIM, 16)
    first_key = block * BLOCK_N
    if first_key >= length:
        return
    k, v = head_rows(k, batch, kv_head, start), head_rows(v, batch, kv_head, start)

    positions = first_key + tl.arange(0, BLOCK_N)
    keys = Tokens(positions, positions < length)
    is_sink += first_token(batch, N, start, lengths.cu_seqlens)
    key_is_sink = (tl.load(is_sink + positions, mask=keys.valid, other=0) != 0)[:, None]
    k_tile = load_tokens(k, keys, HEAD_DIM, BLOCK_D)  # [BN, D]
    qk_scale = scale * log2e_scale(k_tile)
    v_tile = load_tokens(v, keys, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
    offsets = tl.arange(0, BLOCK_M)
    q_offsets, dout_offsets = block_offsets(q, offsets, BLOCK_D, WIDE), block_offsets(dout, offsets, BLOCK_DV, WIDE)
    stats_offsets = offsets[:, None] * 4 + tl.arange(0, 4)[None, :]
    q_mask, dout_mask = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM, tl.arange(0, BLOCK_DV)[None, :] < V_HEAD_DIM
    first_row = tl.where(causal != 0, first_key // BLOCK_M * BLOCK_M, 0)
    diagonal_end = tl.where(causal != 0, tl.minimum(first_row + max(BLOCK_M, BLOCK_N), length), 0)
    head = kv_head * group_size
    q_block = head_rows(q, batch, head, start + first_row).base
    dout_block = head_rows(dout, batch, head, start + first_row).base
    stats_block = lse_and_delta + (first_row_of(batch, head, num_q_heads, N, start, lengths.cu_seqlens) + first_row) * 4
    bh = (batch * num_q_heads + head).to(tl.int32)
    heads = 0  # that are done
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first = first_row
    for UNMASKED in tl.static_range(2):
        first_of_head = diagonal_end if UNMASKED else first_row
        end = length if UNMASKED else diagonal_end
        if UNMASKED:  # back to the first head
            q_block += step_of(diagonal_end - first_row, -heads, q)
            dout_block += step_of(diagonal_end - first_row, -heads, dout)
            stats_block += offset(diagonal_end - first_row, 4) - offset(heads, N) * 4
            heads = 0
        first = first_of_head
        # One loop for all heads, so that the loads of the next head's first block are pipelined too.
        for _ in range(0, group_size * tl.cdiv(end - first_of_head, BLOCK_M)):
            # Rows past the end are zeros in q, dout and delta, so that they add nothing.
            valid = (first + offsets < length)[:, None]
            q_tile = tl.load(q_block + q_offsets, mask=valid & q_mask, other=0.0)  # [BM, D]
            dout_tile = tl.load(dout_block + dout_offsets, mask=valid & dout_mask, other=0.0)  # [BM, Dv]
            # Four numbers a row in one load: Triton 3.6 would make three loads of one in the layout of qk.
            stats = tl.load(stats_block + stats_offsets, mask=valid, other=0.0)
            even, odd = tl.split(tl.reshape(stats, (BLOCK_M, 2, 2)))
            lse, delta = tl.split(even)
            lse_of_non_sinks, _ = tl.split(odd)
            # Where query and key are both sinks, sink_pairs.py adds to dk and dv: it knows the bias.
            lse = tl.where(key_is_sink, lse_of_non_sinks[None, :], lse[None, :])  # [BN, BM]
            if not UNMASKED:
                lse = tl.where((positions - first)[:, None] <= offsets[None, :], lse, float("inf"))
            qk = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [BN, BM]
            p = exp_scaled(qk * qk_scale - lse, q_tile)
            dropped_p = p
            dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")
            if dropout_seed is not None:
                seed, rows = tl.load(dropout_seed), first + offsets
                factors = dropout_weights(seed, bh + heads, PER_TOKEN, rows, first_key, dropout_threshold, BLOCK_N)
                factors = tl.trans(factors)
                dropped_p *= factors
                dp *= factors
            ds = p * (dp - delta[None, :])
            dv_acc = tl.dot(dropped_p.to(dout_tile.dtype), dout_tile, dv_acc, input_precision="ieee")
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
            # To the next block, or to the first of the next head.
            last = first + BLOCK_M >= end
            next_first = tl.where(last, first_of_head, first + BLOCK_M)
            q_block += step_of(next_first - first, last.to(tl.int32), q)
            dout_block += step_of(next_first - first, last.to(tl.int32), dout)
            stats_block += offset(next_first - first, 4) + offset(last.to(tl.int32), N) * 4
            heads += last.to(tl.int32)
            first = next_first
    # `first` is back at diagonal_end: kept through the loops, the addresses of dk and dv would take registers.
    positions = first_key + (first - diagonal_end) + tl.arange(0, BLOCK_N)
    keys = Tokens(positions, positions < length)
    store_tokens(head_rows(dk, batch, kv_head, start), dk_acc * scale, keys, HEAD_DIM, BLOCK_D)
    store_tokens(head_rows(dv, batch, kv_head, start), dv_acc, keys, V_HEAD_DIM, BLOCK_DV)


# --- Launcher ---


def launch_sink_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    sink_stats: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    sinks: SinkInputs,
    lengths: Lengths,
    streams: Streams,
    dropout: Dropout = NO_DROPOUT,
    *,
    options: SinkAttentionOptions,
    config: SinkAttentionConfig | None = None,
) -> Tensor:
    """Write grads = dq, dk, dv: dq whole, dk and dv without what sink keys get from sink queries; 0 at padding.

    Returns delta = Σ dO·O of the sink rows, [B, Hq, M] float32. Shapes are those of `launch_sink_attention_fwd`.
    """
    B, M = sinks.positions.shape
    N, num_q_heads, num_kv_heads = number_of_tokens(q, lengths), q.shape[1], k.shape[1]
    sink_delta = lse.new_empty(B, num_q_heads, M)
    if q.numel() == 0:
        return sink_delta
    config = config or config_of(q, v, dropout)
    kind = kind_of(q.dtype, dropout.seed is not None)
    head_dim, v_head_dim = k.shape[-1], v.shape[-1]
    q, k, v, out, dout, dq, dk, dv = (bhnd(x, lengths.cu_seqlens) for x in (q, k, v, out, dout, *grads))
    stride_b, stride_h, stride_n = row_strides(lse, lengths)
    lse_and_delta = lse.new_empty(*lse.shape, 4)
    sink_tensors, sink_strides = sinks.as_arguments()
    group_size, causal = num_q_heads // num_kv_heads, int(options.causal)

    def query_grid(blocks: dict[str, object]) -> tuple[int, int]:
        return number_of_tiles(B, N, lengths.cu_seqlens, blocks["BLOCK_M"], 2), num_q_heads

    def key_grid(blocks: dict[str, object]) -> tuple[int, int]:
        return number_of_tiles(B, N, lengths.cu_seqlens, blocks["BLOCK_N"], 1), num_kv_heads

    tile = config.bwd_dq
    kernel, grid, blocks, warps = sink_attention_bwd_dq_kernel, query_grid(tile.blocks), tile.blocks, tile.warps
    if autotuning_is_on():
        kernel, grid, blocks, warps = autotuned(kernel, "bwd_dq", kind), query_grid, {}, {}
    launch(
        kernel, grid,
        q, k, v, out, dout, dq,
        RowStats(lse, stride_n, lse_and_delta, sink_stats, sink_delta), sink_tensors, streams, lengths, dropout.seed,
        stride_b, stride_h, *sink_strides,
        B, num_q_heads, group_size, N, M, options.scale, causal, dropout.threshold,
        HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim, **blocks, WIDE=needs_int64_offsets(k, v), **warps,
    )  # fmt: skip

    tile = config.bwd_dkdv
    kernel, blocks, warps = sink_attention_bwd_dkdv_kernel, tile.blocks_without_sinks, tile.warps
    grid = key_grid(blocks)
    if autotuning_is_on():
        kernel, grid, blocks, warps = autotuned(kernel, "bwd_dkdv", kind), key_grid, {}, {}
    launch(
        kernel, grid,
        lse_and_delta, streams.is_sink, lengths, dropout.seed,
        q, k, v, dout, dk, dv,
        B, num_q_heads, group_size, N, options.scale, causal, dropout.threshold,
        HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim, **blocks, WIDE=needs_int64_offsets(q, dout), **warps,
    )  # fmt: skip
    return sink_delta

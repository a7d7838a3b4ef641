"""The correction path of sink_attention: adds the bias between sinks to the result of an attention without bias.

Only sink rows change. With p = exp(qk - lse) of the unbiased attention, a sink row i gains, over the sinks j it sees,

    out_i <- (out_i + Σ_j p_ij (exp(β_ij) - 1) v_j) / z_i        z_i = 1 + Σ_j p_ij (exp(β_ij) - 1)

β is added in `correction_update`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn._options import SinkAttentionOptions
from recattn.triton_kernels.common.launch import MAX_REGISTERS, architecture_of, cdiv, host_block_width, launch
from recattn.triton_kernels.common.ragged import Lengths, Sinks, is_sink, load_sinks, locate_sequence
from recattn.triton_kernels.common.softmax import exp_increase, exp_scaled, log2e_scale
from recattn.triton_kernels.common.tiles import (
    Matrix,
    Tokens,
    bhnd,
    block_width,
    head_rows,
    load_bias,
    load_tokens,
    store_tokens,
)
from recattn.triton_kernels.sink_attention.common import (
    DO_NOT_SPECIALIZE,
    SinkInputs,
    is_recomputed,
    mark_recomputed,
    number_of_tokens,
    row_strides,
    scaled_bias,
)
from recattn.triton_kernels.sink_attention.config import CorrectionConfig
from recattn.triton_kernels.sink_attention.forward import softmax_block
from recattn.triton_kernels.sink_attention.sink_pair_tiles import products

# Sink rows and warps of a program that prepares the backward.
DELTA_BLOCK, DELTA_WARPS = 16, 4
# Beyond this, 1/16 of 1/eps, a log-sum-exp rounds too much for exp(qk - lse) to be a weight.
LARGEST_LSE: tl.constexpr = tl.constexpr(2.0**19)


# --- Forward ---


@triton.jit
def correction_update(acc, row_max, row_sum, suppressed, qk, bias, v_tile):
    """Add the bias to one block of keys that acc / row_sum already contains without it.

    suppressed sums what the bias takes away from row_sum. All three are scaled by exp(-row_max). qk, bias and row_max
    have been multiplied by `log2e_scale(v_tile)`; where a row does not see a key, qk is -inf and the bias 0.
    """
    new_row_max = tl.maximum(row_max, tl.max(qk + bias, 1))
    row_scale = exp_scaled(row_max - new_row_max, v_tile)
    # β is added here: exp(qk + β - row_max) - exp(qk - row_max).
    increase = exp_increase(qk, bias, new_row_max[:, None], v_tile)
    acc = tl.dot(increase.to(v_tile.dtype), v_tile, acc * row_scale[:, None], input_precision="ieee")
    suppressed = suppressed * row_scale + tl.sum(tl.maximum(-increase, 0.0), 1)
    return acc, new_row_max, row_sum * row_scale + tl.sum(increase, 1), suppressed


@triton.jit
def online_softmax_update(acc, row_max, row_sum, qk, bias, v_tile):
    """Add a block of keys to softmax(qk + β) @ v = acc / row_sum. qk, bias and row_max as in `correction_update`."""
    p, row_scale, row_max, row_sum = softmax_block(row_max, row_sum, qk, 1.0, bias, v_tile, True)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * row_scale[:, None], input_precision="ieee")
    return acc, row_max, row_sum


@triton.jit
def sink_keys(q, q_tile, k, v, bias, rows, row_sinks, last_key, sinks, first_key, scale,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scale * qk [BM, BN] with the sinks from first_key on, their bias, both times `log2e_scale`, and their v."""
    key_sinks = first_key + tl.arange(0, BLOCK_N)
    keys = load_sinks(sinks, key_sinks)
    visible = keys.positions[None, :] <= last_key[:, None]
    k_tile = load_tokens(k, keys, HEAD_DIM, q_tile.shape[1])
    qk = scale * log2e_scale(q_tile) * products(q, rows, q_tile, k, keys, k_tile, HEAD_DIM, BLOCK_K)
    qk = tl.where(visible, qk, -float("inf"))
    bias_tile = scaled_bias(load_bias(bias, row_sinks, key_sinks, visible), q_tile)
    return qk, bias_tile, load_tokens(v, keys, V_HEAD_DIM, block_width(V_HEAD_DIM))


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def sink_attention_correction_fwd_kernel(
    q, k, v, out,  # BHND
    lse, sink_tensors, sink_stats, lengths,
    stride_lse_b, stride_lse_h, stride_lse_n,
    stride_positions_b, stride_bias_b, stride_bias_h, stride_bias_m,
    num_q_heads, group_size, N, M, scale, causal, search_steps,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M sink rows of one (batch, head), over the sinks they see.

    qk         = scale * q @ k.T                                [BLOCK_M, BLOCK_N]
    increase   = exp(qk + β - row_max) - exp(qk - row_max)      [BLOCK_M, BLOCK_N]
    acc       += increase @ v,  row_sum += sum(increase)        from acc = out, row_max = lse, row_sum = 1
    out        = acc / row_sum, lse = row_max + log(row_sum)    in place

    A negative β that removes much of row_sum leaves the rounding errors of the rest. Such a row is recomputed in the
    same program, over all its keys: an online softmax over the sinks, then over the non-sinks.
    """
    bh, num_bh = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    batch = (tl.program_id(0) // num_q_heads).to(tl.int64)
    head = (tl.program_id(0) % num_q_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % num_q_heads // group_size).to(tl.int64)
    start, length, first_position = locate_sequence(batch, N, lengths)
    BLOCK_DV: tl.constexpr = block_width(V_HEAD_DIM)
    q, out = head_rows(q, batch, head, start), head_rows(out, batch, head, start)
    k, v = head_rows(k, batch, kv_head, start), head_rows(v, batch, kv_head, start)
    lse += batch * stride_lse_b + head * stride_lse_h + start * stride_lse_n
    bias = sink_tensors.bias + batch * stride_bias_b + head * stride_bias_h
    bias = Matrix(bias, stride_bias_m, sink_tensors.stride_n)
    sink_positions = sink_tensors.positions + batch * stride_positions_b
    sinks = Sinks(sink_positions, sink_tensors.stride_m, M, first_position, length)

    first_row = tl.program_id(1) * BLOCK_M
    row_sinks = first_row + tl.arange(0, BLOCK_M)
    rows = load_sinks(sinks, row_sinks)
    # The last key that each row sees. One comparison with it covers the causal mask, padding and ignored sinks.
    last_key = tl.where(rows.valid, tl.where(causal != 0, rows.positions, length - 1), -1)  # [BM]
    end_sink = tl.where(causal != 0, tl.minimum(M, first_row + BLOCK_M), M)
    lse_rows = lse + rows.positions.to(tl.int64) * stride_lse_n
    row_max_rows = sink_stats + bh * M + row_sinks
    row_sum_rows = row_max_rows + num_bh * M

    q_tile = load_tokens(q, rows, HEAD_DIM, block_width(HEAD_DIM))
    acc = load_tokens(out, rows, V_HEAD_DIM, BLOCK_DV).to(tl.float32)  # [BM, Dv]
    row_max = tl.load(lse_rows, mask=rows.valid, other=0.0) * log2e_scale(q_tile)  # [BM]
    row_sum = tl.full([BLOCK_M], 1.0, tl.float32)
    suppressed = tl.where(tl.abs(row_max) > LARGEST_LSE, float("inf"), 0.0)  # such a row is recomputed
    for first_key in range(0, end_sink, BLOCK_N):
        qk, bias_tile, v_tile = sink_keys(
            q, q_tile, k, v, bias, rows, row_sinks, last_key, sinks, first_key, scale,
            HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc, row_max, row_sum, suppressed = correction_update(acc, row_max, row_sum, suppressed, qk, bias_tile, v_tile)

    key_sum = row_sum
    if sink_tensors.logits is not None:  # one more term of the softmax, without a value
        logit = tl.load(sink_tensors.logits + head * sink_tensors.stride_h).to(tl.float32) * log2e_scale(q_tile)
        key_sum -= exp_scaled(logit - row_max, q_tile)
    recomputed = rows.valid & ((suppressed < 0.5 * key_sum) == 0)  # also where there is no sum, or NaN
    corrected = Tokens(rows.positions, rows.valid & (recomputed == 0))
    row_sum = tl.where(corrected.valid, row_sum, 1.0)
    store_tokens(out, acc / row_sum[:, None], corrected, V_HEAD_DIM, BLOCK_DV)
    tl.store(lse_rows, row_max / log2e_scale(q_tile) + tl.log(row_sum), mask=corrected.valid)
    tl.store(row_max_rows, row_max, mask=corrected.valid)
    tl.store(row_sum_rows, row_sum, mask=corrected.valid)
    if tl.max(recomputed.to(tl.int32), 0) == 0:
        return

    last_key = tl.where(recomputed, last_key, -1)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sink_tensors.logits is not None:
        row_max = tl.maximum(row_max, logit)
        row_sum += 1.0
    for first_key in range(0, end_sink, BLOCK_N):
        qk, bias_tile, v_tile = sink_keys(
            q, q_tile, k, v, bias, rows, row_sinks, last_key, sinks, first_key, scale,
            HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        acc, row_max, row_sum = online_softmax_update(acc, row_max, row_sum, qk, bias_tile, v_tile)
    for first_key in range(0, tl.max(last_key, 0) + 1, BLOCK_N):
        positions = first_key + tl.arange(0, BLOCK_N)
        keys = Tokens(positions, positions < length)
        visible = (positions[None, :] <= last_key[:, None]) & (is_sink(sinks, positions, search_steps) == 0)[None, :]
        k_tile = load_tokens(k, keys, HEAD_DIM, block_width(HEAD_DIM))
        qk = scale * log2e_scale(q_tile) * products(q, rows, q_tile, k, keys, k_tile, HEAD_DIM, BLOCK_K)
        qk = tl.where(visible, qk, -float("inf"))  # [BM, BN]
        v_tile = load_tokens(v, keys, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        acc, row_max, row_sum = online_softmax_update(acc, row_max, row_sum, qk, 0.0, v_tile)
    # A row whose keys all have a bias of -inf: out = 0, lse = -inf, and p = 0 everywhere.
    empty = row_sum == 0
    row_sum = tl.where(empty, 1.0, row_sum)
    store_tokens(out, acc / row_sum[:, None], Tokens(rows.positions, recomputed), V_HEAD_DIM, BLOCK_DV)
    row_lse = row_max / log2e_scale(q_tile) + tl.log(row_sum)
    tl.store(lse_rows, tl.where(empty, -float("inf"), row_lse), mask=recomputed)
    tl.store(row_max_rows, tl.where(empty, float("inf"), row_max), mask=recomputed)
    tl.store(row_sum_rows, mark_recomputed(row_sum), mask=recomputed)


def launch_sink_attention_correction_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sinks: SinkInputs,
    lengths: Lengths,
    *,
    options: SinkAttentionOptions,
    config: CorrectionConfig | None = None,
) -> Tensor:
    """Correct `out` and `lse` of an attention without bias, in place at the sink rows, to those with it.

        out = softmax(S + mask) V -> softmax(S + β + mask) V,    S = scale · Q Kᵀ
        β[b, h, i, j] = inter_sink_bias[b, h, s(i), s(j)] when tokens i and j are both sinks, else 0

    q [B, Hq, N, D]; k [B, Hkv, N, D]; v [B, Hkv, N, Dv]; out [B, Hq, N, Dv]; lse [B, Hq, N] float32, natural logarithm;
    packed, q is [T, Hq, D] and so on, and lse [T, Hq]. sinks.logits is one more term of each row's softmax, which `out`
    and `lse` already have. Sinks beyond their sequence are ignored. A row whose row_sum becomes 0 gets zeros and
    lse = -inf.

    Returns sink_stats [2, B, Hq, M] float32, row_max and row_sum of each sink that is not ignored: the probability of
    sink j in sink row i is exp(S_ij + β_ij - row_max_i) / |row_sum_i|. row_max is times `log2e_scale`. row_sum is
    negative where the row was recomputed over all its keys (`is_recomputed`). Where its sum is 0, row_max = +inf and
    row_sum = -1. Ignored sinks have 0, 0.
    """
    B, M = sinks.positions.shape
    num_q_heads, num_kv_heads, head_dim, v_head_dim = q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]
    sink_stats = out.new_zeros((2, B, num_q_heads, M), dtype=torch.float32)
    if sinks.positions.numel() == 0 or out.numel() == 0:
        return sink_stats
    config = config or CorrectionConfig.heuristic(max(head_dim, v_head_dim), q.dtype, architecture_of(q))
    N = number_of_tokens(q, lengths)
    q, k, v, out = (bhnd(x, lengths.cu_seqlens) for x in (q, k, v, out))
    sink_tensors, sink_strides = sinks.as_arguments()
    # Only the first axis of a grid can be longer than 65535.
    grid = (B * num_q_heads, cdiv(M, config.block_m))
    launch(
        sink_attention_correction_fwd_kernel, grid,
        q, k, v, out,
        lse, sink_tensors, sink_stats, lengths,
        *row_strides(lse, lengths), *sink_strides,
        num_q_heads, num_q_heads // num_kv_heads, N, M,
        options.scale, int(options.causal),
        M.bit_length(),  # search_steps
        HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=min(config.block_k, host_block_width(head_dim)),
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return sink_stats


# --- What the backward needs of a sink row ---


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def sink_attention_correction_delta_kernel(
    out, dout,  # BHND
    sink_positions, sink_stats, base_lse, sink_delta, lengths,
    stride_positions_b, stride_positions_m, stride_lse_b, stride_lse_h, stride_lse_n,
    num_q_heads, N, M,
    V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M sink rows of one (batch, head).

    sink_delta = sum(dout * out)                             [BLOCK_M]
    base_lse   = +inf in recomputed rows, in place           [BLOCK_M]
    """
    bh, num_bh = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    batch = (tl.program_id(0) // num_q_heads).to(tl.int64)
    head = (tl.program_id(0) % num_q_heads).to(tl.int64)
    start, length, first_position = locate_sequence(batch, N, lengths)
    BLOCK_DV: tl.constexpr = block_width(V_HEAD_DIM)
    out, dout = head_rows(out, batch, head, start), head_rows(dout, batch, head, start)
    base_lse += batch * stride_lse_b + head * stride_lse_h + start * stride_lse_n
    sinks = Sinks(sink_positions + batch * stride_positions_b, stride_positions_m, M, first_position, length)

    row_sinks = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = load_sinks(sinks, row_sinks)
    # Summed as precisely as dot_tokens sums dout · v: in a row with one key the two are equal.
    SUM: tl.constexpr = tl.float64 if out.base.dtype.element_ty == tl.float32 else tl.float32
    products = load_tokens(dout, rows, V_HEAD_DIM, BLOCK_DV).to(SUM) * load_tokens(out, rows, V_HEAD_DIM, BLOCK_DV)
    tl.store(sink_delta + bh * M + row_sinks, tl.sum(products, 1).to(tl.float32), mask=rows.valid)
    row_sum = tl.load(sink_stats + (num_bh + bh) * M + row_sinks, mask=rows.valid, other=1.0)
    tl.store(base_lse + rows.positions.to(tl.int64) * stride_lse_n, float("inf"), mask=is_recomputed(row_sum))


def launch_sink_attention_correction_delta(
    out: Tensor,
    dout: Tensor,
    sink_positions: Tensor,
    sink_stats: Tensor,
    base_lse: Tensor,
    lengths: Lengths,
) -> Tensor:
    """Returns sink_delta [B, Hq, M] float32, dout · out at the sinks that are not ignored.

    `base_lse`, a copy of lse, becomes +inf where the correction recomputed a sink row. The backward of the unbiased
    attention, given it for lse, leaves those rows out.
    """
    B, M = sink_positions.shape
    num_q_heads = out.shape[1]
    sink_delta = sink_stats.new_empty((B, num_q_heads, M))
    if sink_positions.numel() == 0 or out.numel() == 0:
        return sink_delta
    grid = (B * num_q_heads, cdiv(M, DELTA_BLOCK))
    launch(
        sink_attention_correction_delta_kernel, grid,
        bhnd(out, lengths.cu_seqlens), bhnd(dout, lengths.cu_seqlens),
        sink_positions, sink_stats, base_lse, sink_delta, lengths,
        *sink_positions.stride(), *row_strides(base_lse, lengths),
        num_q_heads, number_of_tokens(out, lengths), M,
        V_HEAD_DIM=out.shape[-1], BLOCK_M=DELTA_BLOCK,
        num_warps=DELTA_WARPS, num_stages=1,
    )  # fmt: skip
    return sink_delta

"""The gradients that only pairs of sinks have: dβ, and their part of dQ, dK and dV. For the fused and correction paths.

    p   = exp(qk + β - row_max) / row_sum      dp = dout @ v.T      delta = sum(dout * out)
    dβ  = p * (dp - delta)                     ds = w * (dp - delta)
    dV += w.T @ dout                           dQ += scale * ds @ k          dK += scale * ds.T @ q

w is the part of p that the caller's backward left out. The fused backward leaves out pairs of sinks, so w = p. On the
correction path the backward of the unbiased attention has counted exp(qk - row_max) / row_sum, and w is the rest of p.
Of recomputed rows (`is_recomputed`) that backward has counted nothing: w = p, with sinks and with all other keys.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from recattn._options import SinkAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout
from recattn.triton_kernels.common.launch import MAX_REGISTERS, architecture_of, cdiv, host_block_width, launch
from recattn.triton_kernels.common.ragged import Lengths, Sinks, load_sinks, locate_sequence
from recattn.triton_kernels.common.tiles import bhnd, block_width, store_rows
from recattn.triton_kernels.sink_attention.common import (
    DO_NOT_SPECIALIZE,
    SinkInputs,
    is_recomputed,
    number_of_tokens,
)
from recattn.triton_kernels.sink_attention.config import PairsConfig
from recattn.triton_kernels.sink_attention.sink_pair_tiles import (
    HeadMatrices,
    Sequence,
    SequenceDropout,
    SinkStats,
    add_tokens,
    dp_less_delta,
    last_key_of_recomputed,
    load_keys,
    load_sink_rows,
    non_sink_pair_weights,
    non_sinks,
    one_head,
    sequence_heads,
    sink_pair_weights,
)


class NumHeads(NamedTuple):
    """How many heads q, k and inter_sink_bias have."""

    q: int
    kv: int
    bias: int


# --- Keys: dK and dV ---


@triton.jit
def key_gradients_update(dk, dv, rows, keys, w, dropout, V_HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """dv += w.T @ dout and dk += ds.T @ q of one block of rows. dk is still to be scaled."""
    ds = w * dp_less_delta(rows, keys, dropout, V_HEAD_DIM, BLOCK_K)
    dv = tl.dot(tl.trans((dropout * w).to(rows.dout_tile.dtype)), rows.dout_tile, dv, input_precision="ieee")
    dk = tl.dot(tl.trans(ds.to(rows.q_tile.dtype)), rows.q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def add_sink_key_gradients(
    sequence, dk, dv, kv_head, first_key, CORRECTS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV of the sinks from first_key on what sink rows give them."""
    BLOCK_D: tl.constexpr = block_width(HEAD_DIM)
    BLOCK_DV: tl.constexpr = block_width(V_HEAD_DIM)
    tokens = load_sinks(sequence.sinks, first_key + tl.arange(0, BLOCK_N))
    keys = load_keys(sequence, kv_head, tokens, HEAD_DIM, V_HEAD_DIM)
    first_row = tl.where(sequence.causal != 0, first_key // BLOCK_M * BLOCK_M, 0)
    end_row = tl.where(tl.max(keys.valid.to(tl.int32), 0) > 0, sequence.sinks.count, 0)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    # One loop over heads and rows: nested, it would keep what an inner loop starts with in registers.
    head, row = kv_head * sequence.group_size, first_row
    for _ in range(0, sequence.group_size * tl.cdiv(end_row - first_row, BLOCK_M)):
        rows = load_sink_rows(sequence, head, row, HEAD_DIM, V_HEAD_DIM, BLOCK_M)
        # What an ignored key gets here is not stored, so that its index alone can tell who sees it.
        visible = (first_key + tl.arange(0, BLOCK_N))[None, :] <= rows.last_sink[:, None]
        w, dropout = sink_pair_weights(
            sequence, head, rows, first_key, keys, visible, CORRECTS, HEAD_DIM, BLOCK_N, BLOCK_K
        )
        dk_tile, dv_tile = key_gradients_update(dk_tile, dv_tile, rows, keys, w, dropout, V_HEAD_DIM, BLOCK_K)
        row += BLOCK_M
        head += (row >= end_row).to(tl.int32)
        row = tl.where(row >= end_row, first_row, row)
    add_tokens(one_head(dk, kv_head), sequence.scale * dk_tile, keys, HEAD_DIM, BLOCK_D)
    add_tokens(one_head(dv, kv_head), dv_tile, keys, V_HEAD_DIM, BLOCK_DV)


@triton.jit
def add_non_sink_key_gradients(
    sequence, dk, dv, kv_head, first_key, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV of the non-sinks from token first_key on what recomputed rows give them."""
    BLOCK_D: tl.constexpr = block_width(HEAD_DIM)
    BLOCK_DV: tl.constexpr = block_width(V_HEAD_DIM)
    keys = load_keys(sequence, kv_head, non_sinks(sequence, first_key, BLOCK_N), HEAD_DIM, V_HEAD_DIM)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for head in range(kv_head * sequence.group_size, (kv_head + 1) * sequence.group_size):
        for row in range(0, sequence.sinks.count, BLOCK_M):
            rows = load_sink_rows(sequence, head, row, HEAD_DIM, V_HEAD_DIM, BLOCK_M)
            if tl.max(last_key_of_recomputed(rows), 0) >= first_key:
                w = non_sink_pair_weights(sequence, rows, keys, HEAD_DIM, BLOCK_K)
                dk_tile, dv_tile = key_gradients_update(dk_tile, dv_tile, rows, keys, w, 1.0, V_HEAD_DIM, BLOCK_K)
    add_tokens(one_head(dk, kv_head), sequence.scale * dk_tile, keys, HEAD_DIM, BLOCK_D)
    add_tokens(one_head(dv, kv_head), dv_tile, keys, V_HEAD_DIM, BLOCK_DV)


@triton.jit
def any_recomputed(sequence, kv_head):
    """Whether a sink row was recomputed in any of the heads that share a key head."""
    BLOCK: tl.constexpr = 1024
    row_sums = sequence.group_size * sequence.sinks.count  # contiguous
    first = sequence.stats.row_sum + tl.cast(kv_head, tl.int64) * row_sums
    recomputed = tl.zeros([BLOCK], tl.int32)
    for start in range(0, row_sums, BLOCK):
        index = start + tl.arange(0, BLOCK)
        recomputed |= is_recomputed(tl.load(first + index, mask=index < row_sums, other=0.0)).to(tl.int32)
    return tl.max(recomputed, 0) > 0


# --- Rows: dQ ---


@triton.jit
def query_gradients_update(dq, rows, keys, w, V_HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """dq += ds @ k of one block of keys. dq is still to be scaled."""
    ds = w * dp_less_delta(rows, keys, 1.0, V_HEAD_DIM, BLOCK_K)
    return tl.dot(ds.to(keys.k_tile.dtype), keys.k_tile, dq, input_precision="ieee")


@triton.jit
def add_query_gradients(
    sequence, dq, head, first_row, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add to dQ of the sink rows from first_row on: over the sinks, and in recomputed rows over the non-sinks too."""
    BLOCK_D: tl.constexpr = block_width(HEAD_DIM)
    M = sequence.sinks.count
    kv_head = head // sequence.group_size
    rows = load_sink_rows(sequence, head, first_row, HEAD_DIM, V_HEAD_DIM, BLOCK_M)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_key in range(0, tl.where(sequence.causal != 0, tl.minimum(M, first_row + BLOCK_M), M), BLOCK_N):
        tokens = load_sinks(sequence.sinks, first_key + tl.arange(0, BLOCK_N))
        keys = load_keys(sequence, kv_head, tokens, HEAD_DIM, V_HEAD_DIM)
        visible = keys.positions[None, :] <= rows.last_key[:, None]
        w, _ = sink_pair_weights(sequence, head, rows, first_key, keys, visible, True, HEAD_DIM, BLOCK_N, BLOCK_K)
        dq_tile = query_gradients_update(dq_tile, rows, keys, w, V_HEAD_DIM, BLOCK_K)
    for first_key in range(0, tl.max(last_key_of_recomputed(rows), 0) + 1, BLOCK_N):
        keys = load_keys(sequence, kv_head, non_sinks(sequence, first_key, BLOCK_N), HEAD_DIM, V_HEAD_DIM)
        w = non_sink_pair_weights(sequence, rows, keys, HEAD_DIM, BLOCK_K)
        dq_tile = query_gradients_update(dq_tile, rows, keys, w, V_HEAD_DIM, BLOCK_K)
    add_tokens(one_head(dq, head), sequence.scale * dq_tile, rows, HEAD_DIM, BLOCK_D)


# --- The bias: dβ ---


@triton.jit
def store_bias_gradients(
    sequence, dbias, first_head, num_heads, first_row, first_key,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of dβ, summed over the heads that share the bias; 0 where no row sees the key."""
    M = sequence.sinks.count
    tokens = load_sinks(sequence.sinks, first_key + tl.arange(0, BLOCK_N))
    dbias_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    hidden = (sequence.causal != 0) & (first_key >= first_row + BLOCK_M)
    for head in range(first_head, first_head + tl.where(hidden, 0, num_heads)):
        rows = load_sink_rows(sequence, head, first_row, HEAD_DIM, V_HEAD_DIM, BLOCK_M)
        keys = load_keys(sequence, head // sequence.group_size, tokens, HEAD_DIM, V_HEAD_DIM)
        visible = keys.positions[None, :] <= rows.last_key[:, None]
        p, dropout = sink_pair_weights(
            sequence, head, rows, first_key, keys, visible, False, HEAD_DIM, BLOCK_N, BLOCK_K
        )
        dbias_tile += p * dp_less_delta(rows, keys, dropout, V_HEAD_DIM, BLOCK_K)
    row_sinks = first_row + tl.arange(0, BLOCK_M)
    store_rows(dbias + first_key, dbias_tile, row_sinks, row_sinks < M, M, 1, M - first_key, BLOCK_N)


# --- The kernel ---


@triton.jit
def programs_of_sequence(M, num_heads, CORRECTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How a sequence's programs are numbered: (end of bias programs, end of key programs, end of query programs).

    bias programs    num_heads.bias * row_blocks * key_blocks   one tile [BLOCK_M, BLOCK_N] of dβ
    key programs     num_heads.kv * key_blocks                  dK and dV of BLOCK_N sinks of one key head
    query programs   num_heads.q * row_blocks, if CORRECTS      dQ of BLOCK_M sinks of one query head

    Those of a shared bias take longest, so they come first. `number_of_programs` is the last end on the host. Within a
    kind the block is the fastest index, then the head.
    """
    row_blocks, key_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(M, BLOCK_N)
    bias_programs = num_heads.bias * row_blocks * key_blocks
    query_programs = num_heads.q * row_blocks if CORRECTS else 0
    end_of_keys = bias_programs + num_heads.kv * key_blocks
    return bias_programs, end_of_keys, end_of_keys + query_programs


def number_of_programs(M: int, num_heads: NumHeads, corrects: bool, config: PairsConfig) -> int:
    row_blocks, key_blocks = cdiv(M, config.block_m), cdiv(M, config.block_n)
    query_programs = num_heads.q * row_blocks if corrects else 0
    return num_heads.kv * key_blocks + query_programs + num_heads.bias * row_blocks * key_blocks


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def sink_attention_pairs_bwd_kernel(
    q, k, v, dout, dq, dk, dv,  # BHND
    sink_tensors, sink_stats, sink_delta, dbias, lengths, dropout_seed,
    stride_positions_b, stride_bias_b, stride_bias_h, stride_bias_m,
    num_heads, B, N, M, scale, causal, dropout_threshold, search_steps,
    CORRECTS: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program of a sequence: dK and dV of BLOCK_N sinks, or dQ of BLOCK_M sinks, or one tile of dβ.

    p    = exp(qk + β - row_max) / row_sum    [BLOCK_M, BLOCK_N] sinks by sinks
    ds   = w * (dout @ v.T - delta)           w = p; for CORRECTS what the unbiased backward has not counted of p
    dk  += scale * ds.T @ q, dv += w.T @ dout over the query heads of the key head, and their blocks of rows
    dq  += scale * ds @ k                     over the blocks of keys; CORRECTS only
    dβ   = p * (dout @ v.T - delta)           over the heads that share the bias

    In recomputed rows the loops go over all keys. `programs_of_sequence` says which program does what.
    """
    row_blocks, key_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(M, BLOCK_N)
    end_of_bias, end_of_keys, programs = programs_of_sequence(M, num_heads, CORRECTS, BLOCK_M, BLOCK_N)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs

    start, length, first_position = locate_sequence(batch, N, lengths)
    first_bh = batch * num_heads.q
    row_max = sink_stats + first_bh * M
    bias = sink_tensors.bias + batch * stride_bias_b
    positions = sink_tensors.positions + batch * stride_positions_b
    sequence = Sequence(
        sequence_heads(q, batch, start),
        sequence_heads(k, batch, start),
        sequence_heads(v, batch, start),
        sequence_heads(dout, batch, start),
        HeadMatrices(bias, stride_bias_h, stride_bias_m, sink_tensors.stride_n),
        Sinks(positions, sink_tensors.stride_m, M, first_position, length),
        SinkStats(row_max, row_max + B.to(tl.int64) * num_heads.q * M, sink_delta + first_bh * M),
        SequenceDropout(dropout_seed, first_bh, dropout_threshold),
        num_heads.q // num_heads.kv,
        scale,
        causal,
        search_steps,
    )
    dk, dv = sequence_heads(dk, batch, start), sequence_heads(dv, batch, start)
    if CORRECTS:
        dq = sequence_heads(dq, batch, start)
    if program < end_of_bias:
        bias_head, tile = program // (row_blocks * key_blocks), program % (row_blocks * key_blocks)
        group_size = num_heads.q // num_heads.bias
        dbias += (batch * num_heads.bias + bias_head) * M * M
        store_bias_gradients(
            sequence, dbias, bias_head * group_size, group_size, tile // key_blocks * BLOCK_M,
            tile % key_blocks * BLOCK_N, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif program < end_of_keys:
        # One round: outside of a loop the assembler would wait for each wgmma of the loop within.
        for this in range(program, tl.minimum(program + 1, end_of_keys)):
            key_program = this - end_of_bias
            tl.assume(key_program >= 0)  # or registers spill
            kv_head, block = key_program // key_blocks, key_program % key_blocks
            add_sink_key_gradients(
                sequence, dk, dv, kv_head, block * BLOCK_N, CORRECTS, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_K
            )
            if CORRECTS:  # constexpr  # noqa: SIM102
                if any_recomputed(sequence, kv_head):
                    for first_key in range(block * BLOCK_N, length, key_blocks * BLOCK_N):
                        add_non_sink_key_gradients(
                            sequence, dk, dv, kv_head, first_key, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_K
                        )
    elif CORRECTS:
        head, block = (program - end_of_keys) // row_blocks, (program - end_of_keys) % row_blocks
        add_query_gradients(sequence, dq, head, block * BLOCK_M, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_K)


def launch_sink_attention_pairs_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    sink_stats: Tensor,
    sink_delta: Tensor,
    grads: tuple[Tensor | None, Tensor, Tensor],
    sinks: SinkInputs,
    lengths: Lengths,
    dropout: Dropout = NO_DROPOUT,
    *,
    options: SinkAttentionOptions,
    corrects: bool,
    config: PairsConfig | None = None,
) -> Tensor:
    """Returns dbias, float32, of inter_sink_bias's shape. Adds what sink pairs give to grads = dq, dk, dv, in place.

    corrects=True: dq, dk and dv are those of an attention without bias that was given the corrected out and lse, and
    lse = +inf in recomputed rows. What they miss is added, to dq too. corrects=False: they have nothing of the sink
    pairs. dq may be None, for the fused path makes its own.

    q [B, Hq, N, D]; k [B, Hkv, N, D]; v [B, Hkv, N, Dv]; dout [B, Hq, N, Dv]; dq, dk, dv as q, k, v; sink_stats
    [2, B, Hq, M] and sink_delta [B, Hq, M] float32, contiguous; packed, q is [T, Hq, D] and so on. Where a sink is
    ignored or not seen, dbias is 0.
    """
    dbias = sink_stats.new_empty(sinks.bias.shape)
    B, M = sinks.positions.shape
    num_heads = NumHeads(q.shape[1], k.shape[1], sinks.bias.shape[1])
    if dbias.numel() == 0 or q.numel() == 0:
        return dbias.zero_()
    head_dim, v_head_dim = q.shape[-1], v.shape[-1]
    widest = max(head_dim, v_head_dim)
    if config is None:
        config = PairsConfig.heuristic(widest, q.dtype, architecture_of(q), dropout=dropout.seed is not None)
    N = number_of_tokens(q, lengths)
    dq, dk, dv = grads
    q, k, v, dout, dk, dv = (bhnd(x, lengths.cu_seqlens) for x in (q, k, v, dout, dk, dv))
    dq = bhnd(dq, lengths.cu_seqlens) if corrects else None
    sink_tensors, sink_strides = sinks.as_arguments()
    grid = (B * number_of_programs(M, num_heads, corrects, config),)
    launch(
        sink_attention_pairs_bwd_kernel, grid,
        q, k, v, dout, dq, dk, dv,
        sink_tensors, sink_stats, sink_delta, dbias, lengths, dropout.seed,
        *sink_strides,
        num_heads, B, N, M, options.scale, int(options.causal), dropout.threshold,
        M.bit_length(),  # search_steps
        CORRECTS=corrects, HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=min(config.block_k, host_block_width(widest)),
        num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=MAX_REGISTERS,
    )  # fmt: skip
    return dbias

"""The gradients that only pairs of sinks have, for the fused and for the correction path.

With P = exp(S + β - shift) / |mass| the probability of a pair, D = dout · out and dP = dout · v:

    dβ = P (dP - D)      dV += Wᵀ dO      G = scale · W (dP - D)      dQ += G K      dK += Gᵀ Q

The fused path leaves the sink pairs out of its backward, and W = P. The correction path's base has counted
exp(S - shift) / mass of each pair, and W is the rest of P; of the rows that were done again over all their keys it has
counted nothing, neither with sinks nor with other keys.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.compilation import Compilation
from recattn.triton_kernels.common.dropout import dropout_weights
from recattn.triton_kernels.common.launch import ARCHITECTURES, MAX_REGISTERS, architecture_of, launch_kernel, strides
from recattn.triton_kernels.common.ragged import Sinks, as_dense, is_sink, load_sinks, locate_sequence
from recattn.triton_kernels.common.softmax import exp_increase
from recattn.triton_kernels.common.tiles import (
    Matrix,
    Tokens,
    block_width,
    dot_tokens,
    load_bias,
    load_tokens,
    store_rows,
    store_tokens,
)


@dataclass(frozen=True)
class PairsConfig:
    """Launch parameters: sink rows and keys a tile, head components a dot product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, head_dim: int, dtype: torch.dtype, architecture: int) -> "PairsConfig":
        """The largest tiles that were found not to spill."""
        if dtype == torch.float32:
            # Without tensor cores a dot product holds its operands in registers.
            return cls(16, 16, block_k=16, num_warps=8, num_stages=1)
        if head_dim <= 128:
            # 64 rows spill with more than 64 components on sm_100, and with 64 of them on sm_80.
            spills = head_dim > 64 if architecture >= 100 else architecture < 90 and 32 < head_dim <= 64
            return cls(32 if spills else 64, 16, block_k=64, num_warps=4, num_stages=1)
        return cls(16 if architecture < 90 else 64, 16, block_k=64, num_warps=8, num_stages=1)


class Heads(NamedTuple):
    """The matrices of one sequence, one a head."""

    base: tl.tensor
    head_stride: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor


class RowStates(NamedTuple):
    """What the forward left behind for each head's sink rows, and their D."""

    shift: tl.tensor
    mass: tl.tensor
    delta: tl.tensor


class Dropout(NamedTuple):
    seed: tl.tensor
    first_plane: tl.tensor
    threshold: tl.tensor


class Sequence(NamedTuple):
    """One sequence of the batch, and how it is attended to."""

    q: Heads
    k: Heads
    v: Heads
    dout: Heads
    bias: Heads
    sinks: Sinks
    states: RowStates
    dropout: Dropout
    group_size: tl.tensor
    scale: tl.tensor
    causal: tl.tensor
    search_steps: tl.tensor


class SinkRows(NamedTuple):
    """Sinks as queries of one head."""

    sinks: tl.tensor
    positions: tl.tensor
    valid: tl.tensor
    last_visible: tl.tensor
    shift: tl.tensor
    mass: tl.tensor
    delta: tl.tensor


@triton.jit
def one_head(x, head):
    return Matrix(x.base + tl.cast(head, tl.int64) * x.head_stride, x.row_stride, x.column_stride)


@triton.jit
def add_tokens(x, values, tokens, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Add to rows of a Matrix that no other program writes."""
    sums = load_tokens(x, tokens, WIDTH, BLOCK_WIDTH).to(tl.float32) + values
    store_tokens(x, sums, tokens, WIDTH, BLOCK_WIDTH)


@triton.jit
def load_sink_rows(sequence, head, first_row, BLOCK_M: tl.constexpr):
    sinks, states = sequence.sinks, sequence.states
    indices = first_row + tl.arange(0, BLOCK_M)
    tokens = load_sinks(sinks, indices)
    # The one comparison with the last visible key covers the causal mask, padding and ignored sinks.
    last_visible = tl.where(sequence.causal != 0, tokens.positions, sinks.length - 1)
    offsets = tl.cast(head, tl.int64) * sinks.count + indices
    return SinkRows(
        indices,
        tokens.positions,
        tokens.valid,
        tl.where(tokens.valid, last_visible, -1),
        tl.load(states.shift + offsets, mask=tokens.valid, other=0.0),
        tl.load(states.mass + offsets, mask=tokens.valid, other=1.0),
        tl.load(states.delta + offsets, mask=tokens.valid, other=0.0),
    )


@triton.jit
def load_other_keys(sequence, first_key, BLOCK_N: tl.constexpr):
    """A block of the sequence's tokens, of which only those that are no sinks are valid."""
    positions = first_key + tl.arange(0, BLOCK_N)
    sinks = is_sink(sequence.sinks, positions, sequence.search_steps)
    return Tokens(positions, (positions < sequence.sinks.length) & (sinks == 0))


@triton.jit
def pair_scores(sequence, head, rows, keys, visible, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """S, -inf where a row does not see the key."""
    q, k = one_head(sequence.q, head), one_head(sequence.k, head // sequence.group_size)
    return tl.where(visible, sequence.scale * dot_tokens(q, rows, k, keys, HEAD_DIM, BLOCK_K), -float("inf"))


@triton.jit
def probabilities(scores, bias, rows):
    # A large bias is close to the shift: their difference is exact, where scores + bias would round.
    probability = tl.exp(scores + (bias - rows.shift[:, None])) / tl.abs(rows.mass)[:, None]
    # Scores of 1e8 and more round by more than 1, and not as they did for the shift. NaN stays.
    return tl.where(probability > 1.0, 1.0, probability)


@triton.jit
def score_gradients(sequence, head, rows, keys, kept, V_HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """dP - D; `kept` are the dropout weights."""
    dout, v = one_head(sequence.dout, head), one_head(sequence.v, head // sequence.group_size)
    return kept * dot_tokens(dout, rows, v, keys, V_HEAD_DIM, BLOCK_K) - rows.delta[:, None]


@triton.jit
def sink_pair_weights(
    sequence,
    head,
    rows,
    first_key,
    keys,
    CORRECTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """P and W of the pairs with the sinks from first_key, and their dropout weights."""
    key_sinks = first_key + tl.arange(0, BLOCK_N)
    visible = keys.positions[None, :] <= rows.last_visible[:, None]
    scores = pair_scores(sequence, head, rows, keys, visible, HEAD_DIM, BLOCK_K)
    bias = load_bias(one_head(sequence.bias, head), rows.sinks, key_sinks, visible)
    probability = probabilities(scores, bias, rows)
    missing = probability
    if CORRECTS:
        increase = exp_increase(scores, bias, rows.shift[:, None]) / tl.abs(rows.mass)[:, None]
        missing = tl.where(rows.mass[:, None] < 0, probability, increase)
    kept = 1.0
    if sequence.dropout.seed is not None:
        seed, plane = tl.load(sequence.dropout.seed), (sequence.dropout.first_plane + head).to(tl.int32)
        kept = dropout_weights(seed, plane, 1, rows.sinks, first_key, sequence.dropout.threshold, BLOCK_N)
    return probability, missing, kept


@triton.jit
def other_pair_weights(sequence, head, rows, keys, HEAD_DIM: tl.constexpr, BLOCK_K: tl.constexpr):
    """P of the pairs with keys that are no sinks; 0 in rows that were not done again."""
    last_visible = tl.where(rows.mass < 0, rows.last_visible, -1)
    visible = keys.valid[None, :] & (keys.positions[None, :] <= last_visible[:, None])
    return probabilities(pair_scores(sequence, head, rows, keys, visible, HEAD_DIM, BLOCK_K), 0.0, rows)


# --- Keys: dK and dV ---


@triton.jit
def key_gradients_update(
    dk,
    dv,
    sequence,
    head,
    rows,
    keys,
    weights,
    kept,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dV += Wᵀ dO and dK += Gᵀ Q of one block of rows; dK waits for the scale."""
    dscores = score_gradients(sequence, head, rows, keys, kept, V_HEAD_DIM, BLOCK_K)
    dout = load_tokens(one_head(sequence.dout, head), rows, V_HEAD_DIM, dv.shape[1])
    dv = tl.dot(tl.trans((kept * weights).to(dout.dtype)), dout, dv, input_precision="ieee")
    q = load_tokens(one_head(sequence.q, head), rows, HEAD_DIM, dk.shape[1])
    dk = tl.dot(tl.trans((weights * dscores).to(q.dtype)), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def add_sink_key_gradients(
    sequence,
    dk,
    dv,
    kv_head,
    first_key,
    CORRECTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dK and dV of the sinks from first_key, as far as they come from sink rows."""
    keys = load_sinks(sequence.sinks, first_key + tl.arange(0, BLOCK_N))
    first_row = tl.where(sequence.causal != 0, first_key // BLOCK_M * BLOCK_M, 0)
    end_row = tl.where(tl.max(keys.valid.to(tl.int32), 0) > 0, sequence.sinks.count, 0)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for head in range(kv_head * sequence.group_size, (kv_head + 1) * sequence.group_size):
        for row in range(first_row, end_row, BLOCK_M):
            rows = load_sink_rows(sequence, head, row, BLOCK_M)
            _, missing, kept = sink_pair_weights(
                sequence, head, rows, first_key, keys, CORRECTS, HEAD_DIM, BLOCK_N, BLOCK_K
            )
            dk_tile, dv_tile = key_gradients_update(
                dk_tile, dv_tile, sequence, head, rows, keys, missing, kept, HEAD_DIM, V_HEAD_DIM, BLOCK_K
            )
    add_tokens(one_head(dk, kv_head), sequence.scale * dk_tile, keys, HEAD_DIM, BLOCK_D)
    add_tokens(one_head(dv, kv_head), dv_tile, keys, V_HEAD_DIM, BLOCK_DV)


@triton.jit
def add_other_key_gradients(
    sequence,
    dk,
    dv,
    kv_head,
    first_key,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dK and dV of the tokens from first_key that are no sinks, as far as they come from rows that were done again."""
    keys = load_other_keys(sequence, first_key, BLOCK_N)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for head in range(kv_head * sequence.group_size, (kv_head + 1) * sequence.group_size):
        for row in range(0, sequence.sinks.count, BLOCK_M):
            rows = load_sink_rows(sequence, head, row, BLOCK_M)
            if tl.max(tl.where(rows.mass < 0, rows.last_visible, -1), 0) >= first_key:
                weights = other_pair_weights(sequence, head, rows, keys, HEAD_DIM, BLOCK_K)
                dk_tile, dv_tile = key_gradients_update(
                    dk_tile, dv_tile, sequence, head, rows, keys, weights, 1.0, HEAD_DIM, V_HEAD_DIM, BLOCK_K
                )
    add_tokens(one_head(dk, kv_head), sequence.scale * dk_tile, keys, HEAD_DIM, BLOCK_D)
    add_tokens(one_head(dv, kv_head), dv_tile, keys, V_HEAD_DIM, BLOCK_DV)


@triton.jit
def any_redone(sequence, kv_head, BLOCK_M: tl.constexpr):
    """Whether a sink row was done again, in any of the heads that share a key head."""
    redone = tl.zeros([BLOCK_M], tl.int32)
    for head in range(kv_head * sequence.group_size, (kv_head + 1) * sequence.group_size):
        for row in range(0, sequence.sinks.count, BLOCK_M):
            redone |= (load_sink_rows(sequence, head, row, BLOCK_M).mass < 0).to(tl.int32)
    return tl.max(redone, 0) > 0


# --- Rows: dQ ---


@triton.jit
def query_gradients_update(
    dq,
    sequence,
    head,
    rows,
    keys,
    weights,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dQ += G K of one block of keys; dQ waits for the scale."""
    dscores = score_gradients(sequence, head, rows, keys, 1.0, V_HEAD_DIM, BLOCK_K)
    k = load_tokens(one_head(sequence.k, head // sequence.group_size), keys, HEAD_DIM, dq.shape[1])
    return tl.dot((weights * dscores).to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def add_query_gradients(
    sequence,
    dq,
    head,
    first_row,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dQ of the sink rows from first_row: over the sinks, and in rows that were done again over the other keys."""
    M = sequence.sinks.count
    rows = load_sink_rows(sequence, head, first_row, BLOCK_M)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_key in range(0, tl.where(sequence.causal != 0, tl.minimum(M, first_row + BLOCK_M), M), BLOCK_N):
        keys = load_sinks(sequence.sinks, first_key + tl.arange(0, BLOCK_N))
        _, missing, _ = sink_pair_weights(sequence, head, rows, first_key, keys, True, HEAD_DIM, BLOCK_N, BLOCK_K)
        dq_tile = query_gradients_update(dq_tile, sequence, head, rows, keys, missing, HEAD_DIM, V_HEAD_DIM, BLOCK_K)
    for first_key in range(0, tl.max(tl.where(rows.mass < 0, rows.last_visible, -1), 0) + 1, BLOCK_N):
        keys = load_other_keys(sequence, first_key, BLOCK_N)
        weights = other_pair_weights(sequence, head, rows, keys, HEAD_DIM, BLOCK_K)
        dq_tile = query_gradients_update(dq_tile, sequence, head, rows, keys, weights, HEAD_DIM, V_HEAD_DIM, BLOCK_K)
    add_tokens(one_head(dq, head), sequence.scale * dq_tile, rows, HEAD_DIM, BLOCK_D)


# --- The bias ---


@triton.jit
def store_bias_gradients(
    sequence,
    dbias,
    first_head,
    num_heads,
    first_row,
    first_key,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of dβ, summed over the heads that share it; zero where no row sees the key."""
    M = sequence.sinks.count
    keys = load_sinks(sequence.sinks, first_key + tl.arange(0, BLOCK_N))
    tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    hidden = (sequence.causal != 0) & (first_key >= first_row + BLOCK_M)
    for head in range(first_head, first_head + tl.where(hidden, 0, num_heads)):
        rows = load_sink_rows(sequence, head, first_row, BLOCK_M)
        probability, _, kept = sink_pair_weights(
            sequence, head, rows, first_key, keys, False, HEAD_DIM, BLOCK_N, BLOCK_K
        )
        tile += probability * score_gradients(sequence, head, rows, keys, kept, V_HEAD_DIM, BLOCK_K)
    row_sinks = first_row + tl.arange(0, BLOCK_M)
    store_rows(dbias + first_key, tile, row_sinks, row_sinks < M, M, 1, M - first_key, BLOCK_N)


@triton.jit(
    do_not_specialize=[
        *("stride_pb", "stride_bb", "stride_bh", "stride_bm"),
        *("B", "N", "M", "dropped", "causal", "left_padded", "search_steps"),
    ]
)
def sink_attention_pairs_bwd_kernel(
    q,
    k,
    v,
    dout,
    sink_positions,
    inter_sink_bias,
    sink_state,
    sink_delta,
    dq,
    dk,
    dv,
    dbias,
    seq_lens,
    cu_seqlens,
    dropout_seed,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    stride_dqb,
    stride_dqh,
    stride_dqn,
    stride_dqd,
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dkd,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_dvd,
    stride_pb,
    stride_pm,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    num_q_heads,
    num_kv_heads,
    num_bias_heads,
    B,
    N,
    M,
    dropped,
    scale,
    causal,
    left_padded,
    search_steps,
    CORRECTS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_blocks, key_blocks = tl.cdiv(M, BLOCK_M), tl.cdiv(M, BLOCK_N)
    key_programs = num_kv_heads * key_blocks
    row_programs = num_q_heads * row_blocks if CORRECTS else 0
    programs = key_programs + row_programs + num_bias_heads * row_blocks * key_blocks
    batch = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs

    start, length, first_position = locate_sequence(batch, N, seq_lens, cu_seqlens, left_padded)
    first_plane = batch * num_q_heads
    shift = sink_state + first_plane * M
    sequence = Sequence(
        Heads(q + batch * stride_qb + start * stride_qn, stride_qh, stride_qn, stride_qd),
        Heads(k + batch * stride_kb + start * stride_kn, stride_kh, stride_kn, stride_kd),
        Heads(v + batch * stride_vb + start * stride_vn, stride_vh, stride_vn, stride_vd),
        Heads(dout + batch * stride_ob + start * stride_on, stride_oh, stride_on, stride_od),
        Heads(inter_sink_bias + batch * stride_bb, stride_bh, stride_bm, stride_bn),
        Sinks(sink_positions + batch * stride_pb, stride_pm, M, first_position, length),
        RowStates(shift, shift + B.to(tl.int64) * num_q_heads * M, sink_delta + first_plane * M),
        Dropout(dropout_seed, first_plane, dropped),
        num_q_heads // num_kv_heads,
        scale,
        causal,
        search_steps,
    )
    dk = Heads(dk + batch * stride_dkb + start * stride_dkn, stride_dkh, stride_dkn, stride_dkd)
    dv = Heads(dv + batch * stride_dvb + start * stride_dvn, stride_dvh, stride_dvn, stride_dvd)
    if CORRECTS:
        dq = Heads(dq + batch * stride_dqb + start * stride_dqn, stride_dqh, stride_dqn, stride_dqd)
    if program < key_programs:
        kv_head, block = program // key_blocks, program % key_blocks
        add_sink_key_gradients(
            sequence,
            dk,
            dv,
            kv_head,
            block * BLOCK_N,
            CORRECTS,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_D,
            BLOCK_DV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        if CORRECTS:  # constexpr  # noqa: SIM102
            if any_redone(sequence, kv_head, BLOCK_M):
                for first_key in range(block * BLOCK_N, length, key_blocks * BLOCK_N):
                    add_other_key_gradients(
                        sequence,
                        dk,
                        dv,
                        kv_head,
                        first_key,
                        HEAD_DIM,
                        V_HEAD_DIM,
                        BLOCK_D,
                        BLOCK_DV,
                        BLOCK_M,
                        BLOCK_N,
                        BLOCK_K,
                    )
    elif program < key_programs + row_programs:
        if CORRECTS:
            row_program = program - key_programs
            head, block = row_program // row_blocks, row_program % row_blocks
            add_query_gradients(
                sequence, dq, head, block * BLOCK_M, HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, BLOCK_K
            )
    else:
        tile = program - key_programs - row_programs
        bias_head = tile // (row_blocks * key_blocks)
        first_row = tile // key_blocks % row_blocks * BLOCK_M
        store_bias_gradients(
            sequence,
            dbias + (batch * num_bias_heads + bias_head) * M * M,
            bias_head * (num_q_heads // num_bias_heads),
            num_q_heads // num_bias_heads,
            first_row,
            tile % key_blocks * BLOCK_N,
            HEAD_DIM,
            V_HEAD_DIM,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )


def launch_sink_attention_pairs_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    sink_positions: Tensor,
    inter_sink_bias: Tensor,
    sink_state: Tensor,
    sink_delta: Tensor,
    dq: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    dropout_seed: Tensor | None,
    dropped: int,
    *,
    causal: bool,
    left_padded: bool,
    scale: float,
    corrects: bool,
    config: PairsConfig | None = None,
) -> Tensor:
    """Returns dbias, float32 and of inter_sink_bias's shape, and adds to dk and dv, in place, what sink pairs give.

    With corrects=True, the dq, dk and dv are those of an attention without bias, given the corrected out and lse and
    lse = +inf in the rows that the correction did again: what they miss is added, to dq too. With corrects=False they
    have nothing of the sink pairs; dq may be None, for the fused path has its own.

    q [B, Hq, N, D]; k [B, Hkv, N, D]; v [B, Hkv, N, Dv]; dout [B, Hq, N, Dv]; dq, dk, dv as q, k, v; sink_positions
    [B, M]; inter_sink_bias [B, 1 or Hq, M, M]; sink_state [2, B, Hq, M] and sink_delta [B, Hq, M] float32, contiguous;
    seq_lens [B] or cu_seqlens [B + 1], with which q is [T, Hq, D] and so on; dropout_seed int64 [1] or None, and
    `dropped` of 65536 sink pairs. Where a sink is ignored or not seen, dbias is zero.
    """
    dbias = torch.empty_like(inter_sink_bias, dtype=torch.float32, memory_format=torch.contiguous_format)
    B, M = sink_positions.shape
    num_q_heads, num_kv_heads, num_bias_heads = q.shape[1], k.shape[1], inter_sink_bias.shape[1]
    if dbias.numel() == 0 or q.numel() == 0:
        return dbias.zero_()
    config = config or PairsConfig.heuristic(max(q.shape[-1], v.shape[-1]), q.dtype, architecture_of(q))
    arguments = _arguments(
        *(q, k, v, dout, sink_positions, inter_sink_bias, sink_state, sink_delta, dq, dk, dv, dbias),
        *(seq_lens, cu_seqlens, dropout_seed, dropped, causal, left_padded, scale, corrects, config),
    )
    row_blocks, key_blocks = triton.cdiv(M, config.block_m), triton.cdiv(M, config.block_n)
    programs = num_kv_heads * key_blocks + num_bias_heads * row_blocks * key_blocks
    if corrects:
        programs += num_q_heads * row_blocks
    with torch.cuda.device_of(q):
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": MAX_REGISTERS}
        launch_kernel(sink_attention_pairs_bwd_kernel, (B * programs,), arguments, **options)
    return dbias


def _arguments(
    q,
    k,
    v,
    dout,
    sink_positions,
    inter_sink_bias,
    sink_state,
    sink_delta,
    dq,
    dk,
    dv,
    dbias,
    seq_lens,
    cu_seqlens,
    dropout_seed,
    dropped,
    causal,
    left_padded,
    scale,
    corrects,
    config,
) -> dict[str, object]:
    """The arguments of the kernel by name."""
    q, k, v, dout, dk, dv = (as_dense(x, cu_seqlens) for x in (q, k, v, dout, dk, dv))
    dq = as_dense(dq, cu_seqlens) if corrects else None
    M, head_dim, v_head_dim = sink_positions.shape[1], q.shape[3], v.shape[3]
    bias = inter_sink_bias.expand(-1, q.shape[1], -1, -1)
    return {
        "q": q,
        "k": k,
        "v": v,
        "dout": dout,
        "sink_positions": sink_positions,
        "inter_sink_bias": bias,
        "sink_state": sink_state,
        "sink_delta": sink_delta,
        "dq": dq,
        "dk": dk,
        "dv": dv,
        "dbias": dbias,
        "seq_lens": None if seq_lens is None else seq_lens.contiguous(),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        "dropout_seed": dropout_seed,
        **strides("q", q, "bhnd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **strides("o", dout, "bhnd"),
        **strides("dq", dq, "bhnd"),
        **strides("dk", dk, "bhnd"),
        **strides("dv", dv, "bhnd"),
        **strides("p", sink_positions, "bm"),
        **strides("b", bias, "bhmn"),
        "num_q_heads": q.shape[1],
        "num_kv_heads": k.shape[1],
        "num_bias_heads": inter_sink_bias.shape[1],
        "B": q.shape[0],
        "N": q.shape[2],
        "M": M,
        "dropped": dropped,
        "scale": scale,
        "causal": int(causal),
        "left_padded": int(left_padded),
        "search_steps": M.bit_length(),
        "CORRECTS": corrects,
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v_head_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_DV": block_width(v_head_dim),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": min(config.block_k, block_width(max(head_dim, v_head_dim))),
    }


def shipped_configurations() -> Iterator[Compilation]:
    """What is launched for the head dims and dtypes in use; the lengths are of no help to alignment."""
    for architecture, dtype, head_dim, corrects in itertools.product(
        ARCHITECTURES, (torch.float32, torch.bfloat16), (32, 64, 128, 256), (True, False)
    ):
        config = PairsConfig.heuristic(head_dim, dtype, architecture)
        q, kv = (torch.empty(2, heads, 500, head_dim, dtype=dtype, device="meta") for heads in (8, 4))
        bias, state, delta = (
            torch.empty(shape, device="meta") for shape in [(2, 8, 49, 49), (2, 2, 8, 49), (2, 8, 49)]
        )
        indices = [torch.empty(shape, dtype=torch.int64, device="meta") for shape in [(2, 49), (2,), (1,)]]
        positions, lengths, seed = indices
        yield Compilation.of(
            sink_attention_pairs_bwd_kernel,
            f"{str(dtype).removeprefix('torch.')} D={head_dim} {'corrects' if corrects else 'dropout'} "
            f"{config.block_m}x{config.block_n}x{config.block_k}",
            architecture,
            _arguments(
                *(q, kv, kv, q, positions, bias, state, delta, q if corrects else None, kv, kv, bias, lengths, None),
                *(None, 0) if corrects else (seed, 6554),
                *(True, False, 0.125, corrects, config),
            ),
            config.num_warps,
            config.num_stages,
            MAX_REGISTERS,
        )

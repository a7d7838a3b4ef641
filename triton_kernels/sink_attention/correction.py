"""The bias between sink tokens, given to the result of an attention that did not have it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.compilation import Compilation
from recattn.triton_kernels.common.launch import ARCHITECTURES, MAX_REGISTERS, launch_kernel, strides
from recattn.triton_kernels.common.ragged import Sinks, as_dense, is_sink, load_sinks, locate_sequence
from recattn.triton_kernels.common.softmax import exp_increase, online_softmax_update
from recattn.triton_kernels.common.tiles import (
    Matrix,
    Tokens,
    block_width,
    dot_tokens,
    load_bias,
    load_tokens,
    store_tokens,
)


@dataclass(frozen=True)
class CorrectionConfig:
    """Launch parameters of the correction: sink rows a program, keys an iteration, head components a dot product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, head_dim: int, dtype: torch.dtype) -> "CorrectionConfig":
        if dtype == torch.float32:
            # Without tensor cores a dot product holds its operands in registers.
            return cls(16, 32, block_k=16, num_warps=8, num_stages=1)
        if head_dim <= 64:
            return cls(64, 32, block_k=64, num_warps=4, num_stages=2)
        return cls(64, 32 if head_dim <= 128 else 16, block_k=64, num_warps=8, num_stages=1)


# Sink rows and warps of a program that prepares the backward.
DELTA_BLOCK, DELTA_WARPS = 16, 4
# A log-sum-exp beyond this, 1/16 of 1/eps, rounds too much for exp(scores - lse) to be a weight.
LARGEST_LSE: tl.constexpr = tl.constexpr(2.0**19)

# They change with the number of sequences, tokens and sinks: specialised, each change might compile anew.
_NOT_SPECIALIZED = [
    *("stride_lb", "stride_lh", "stride_ln", "stride_pb"),
    *("N", "M", "causal", "left_padded", "search_steps"),
]


# --- Forward ---


@triton.jit
def correction_update(acc, shift, mass, suppressed, scores, bias, values):
    """Give one block of keys, already part of acc / mass, their bias; suppressed sums the mass that this takes away.

    All three are scaled by exp(-shift). Scores of keys that a row does not see are -inf, their bias is 0.
    """
    new_shift = tl.maximum(shift, tl.max(scores + bias, 1))
    rescale = tl.exp(shift - new_shift)
    increase = exp_increase(scores, bias, new_shift[:, None])
    acc = acc * rescale[:, None] + tl.dot(increase.to(values.dtype), values, input_precision="ieee")
    suppressed = suppressed * rescale + tl.sum(tl.maximum(-increase, 0.0), 1)
    return acc, new_shift, mass * rescale + tl.sum(increase, 1), suppressed


@triton.jit(do_not_specialize=[*_NOT_SPECIALIZED, "stride_bb", "stride_bh", "stride_bm"])
def sink_attention_correction_fwd_kernel(
    q,
    k,
    v,
    out,
    lse,
    sink_positions,
    inter_sink_bias,
    sink_logits,
    sink_state,
    seq_lens,
    cu_seqlens,
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
    stride_lb,
    stride_lh,
    stride_ln,
    stride_pb,
    stride_pm,
    stride_bb,
    stride_bh,
    stride_bm,
    stride_bn,
    stride_gh,
    num_q_heads,
    group_size,
    N,
    M,
    scale,
    causal,
    left_padded,
    search_steps,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    plane, num_planes = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    batch = (tl.program_id(0) // num_q_heads).to(tl.int64)
    head = (tl.program_id(0) % num_q_heads).to(tl.int64)
    kv_head = (tl.program_id(0) % num_q_heads // group_size).to(tl.int64)
    start, length, first_position = locate_sequence(batch, N, seq_lens, cu_seqlens, left_padded)
    q = Matrix(q + batch * stride_qb + head * stride_qh + start * stride_qn, stride_qn, stride_qd)
    k = Matrix(k + batch * stride_kb + kv_head * stride_kh + start * stride_kn, stride_kn, stride_kd)
    v = Matrix(v + batch * stride_vb + kv_head * stride_vh + start * stride_vn, stride_vn, stride_vd)
    out = Matrix(out + batch * stride_ob + head * stride_oh + start * stride_on, stride_on, stride_od)
    lse += batch * stride_lb + head * stride_lh + start * stride_ln
    bias = Matrix(inter_sink_bias + batch * stride_bb + head * stride_bh, stride_bm, stride_bn)
    sinks = Sinks(sink_positions + batch * stride_pb, stride_pm, M, first_position, length)

    first_row = tl.program_id(1) * BLOCK_M
    row_sinks = first_row + tl.arange(0, BLOCK_M)
    rows = load_sinks(sinks, row_sinks)
    # The last key that each row sees: the one comparison with it covers the causal mask, padding and ignored sinks.
    last_visible = tl.where(rows.valid, tl.where(causal != 0, rows.positions, length - 1), -1)  # [BM]
    last_sink = tl.where(causal != 0, tl.minimum(M, first_row + BLOCK_M), M)
    lse_rows = lse + rows.positions.to(tl.int64) * stride_ln
    shift_rows = sink_state + plane * M + row_sinks
    mass_rows = shift_rows + num_planes * M

    acc = load_tokens(out, rows, V_HEAD_DIM, BLOCK_DV).to(tl.float32)  # [BM, Dv]
    shift = tl.load(lse_rows, mask=rows.valid, other=0.0)  # [BM]
    mass = tl.full([BLOCK_M], 1.0, tl.float32)
    suppressed = tl.where(tl.abs(shift) > LARGEST_LSE, float("inf"), 0.0)  # such a row is done again
    for first_key in range(0, last_sink, BLOCK_N):
        key_sinks = first_key + tl.arange(0, BLOCK_N)
        keys = load_sinks(sinks, key_sinks)
        visible = keys.positions[None, :] <= last_visible[:, None]  # [BM, BN]
        scores = scale * dot_tokens(q, rows, k, keys, HEAD_DIM, BLOCK_K)
        scores = tl.where(visible, scores, -float("inf"))
        bias_tile = load_bias(bias, row_sinks, key_sinks, visible)  # [BM, BN]
        values = load_tokens(v, keys, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        acc, shift, mass, suppressed = correction_update(acc, shift, mass, suppressed, scores, bias_tile, values)

    # Taking away much of a row's keys leaves the rounding errors of the rest: it is done again, over all its keys.
    key_mass = mass
    if sink_logits is not None:  # one more term of the softmax, without a value
        logit = tl.load(sink_logits + head * stride_gh).to(tl.float32)
        key_mass -= tl.exp(logit - shift)
    redone = rows.valid & ((suppressed < 0.5 * key_mass) == 0)  # so it is where there is no mass, or NaN
    corrected = Tokens(rows.positions, rows.valid & (redone == 0))
    mass = tl.where(corrected.valid, mass, 1.0)
    store_tokens(out, acc / mass[:, None], corrected, V_HEAD_DIM, BLOCK_DV)
    tl.store(lse_rows, shift + tl.log(mass), mask=corrected.valid)
    tl.store(shift_rows, shift, mask=corrected.valid)
    tl.store(mass_rows, mass, mask=corrected.valid)
    if tl.max(redone.to(tl.int32), 0) == 0:
        return

    last_visible = tl.where(redone, last_visible, -1)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    shift = tl.full([BLOCK_M], -float("inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    if sink_logits is not None:
        shift = tl.maximum(shift, logit)
        mass += 1.0
    for first_key in range(0, last_sink, BLOCK_N):
        key_sinks = first_key + tl.arange(0, BLOCK_N)
        keys = load_sinks(sinks, key_sinks)
        visible = keys.positions[None, :] <= last_visible[:, None]  # [BM, BN]
        scores = scale * dot_tokens(q, rows, k, keys, HEAD_DIM, BLOCK_K)
        scores = tl.where(visible, scores, -float("inf"))
        bias_tile = load_bias(bias, row_sinks, key_sinks, visible)  # [BM, BN]
        values = load_tokens(v, keys, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        acc, shift, mass = online_softmax_update(acc, shift, mass, scores, bias_tile, values)
    for first_key in range(0, tl.max(last_visible, 0) + 1, BLOCK_N):
        positions = first_key + tl.arange(0, BLOCK_N)
        keys = Tokens(positions, positions < length)
        visible = (positions[None, :] <= last_visible[:, None]) & (is_sink(sinks, positions, search_steps) == 0)[
            None, :
        ]
        scores = scale * dot_tokens(q, rows, k, keys, HEAD_DIM, BLOCK_K)
        scores = tl.where(visible, scores, -float("inf"))  # [BM, BN]
        values = load_tokens(v, keys, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        acc, shift, mass = online_softmax_update(acc, shift, mass, scores, 0.0, values)
    # A row whose keys are all suppressed has no mass: zeros, a log-sum-exp of -inf, and no probability anywhere.
    massless = mass == 0
    mass = tl.where(massless, 1.0, mass)
    store_tokens(out, acc / mass[:, None], Tokens(rows.positions, redone), V_HEAD_DIM, BLOCK_DV)
    tl.store(lse_rows, tl.where(massless, -float("inf"), shift + tl.log(mass)), mask=redone)
    tl.store(shift_rows, tl.where(massless, float("inf"), shift), mask=redone)
    tl.store(mass_rows, -mass, mask=redone)


def launch_sink_attention_correction_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_positions: Tensor,
    inter_sink_bias: Tensor,
    sink_logits: Tensor | None,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    causal: bool,
    left_padded: bool,
    scale: float,
    config: CorrectionConfig | None = None,
) -> Tensor:
    """Correct `out` and `lse` of an attention without bias, in place at the sink rows, to those with it.

        out = softmax(S + mask) V -> softmax(S + β + mask) V,    S = scale · Q Kᵀ
        β[b, h, i, j] = inter_sink_bias[b, h, s(i), s(j)] when tokens i and j are both sinks, else 0

    q [B, Hq, N, D]; k [B, Hkv, N, D]; v [B, Hkv, N, Dv]; out [B, Hq, N, Dv]; lse [B, Hq, N] float32, natural logarithm;
    sink_positions [B, M] ascending, padded at the end with -1; inter_sink_bias [B, 1 or Hq, M, M]; sink_logits [Hq] or
    None, one more term of each row's softmax, which `out` and `lse` already have. seq_lens [B] pads every sequence, on
    the left or the right; cu_seqlens [B + 1] packs them, q [T, Hq, D] and so on, lse [T, Hq]. Sinks beyond their
    sequence are ignored. A row left without any mass gets zeros and lse = -inf.

    Returns sink_state [2, B, Hq, M] float32, a shift and a mass for each sink that is not ignored: the probability of
    sink j in sink row i is exp(S_ij + β_ij - shift_i) / |mass_i|. The mass is negative where the row was done again
    over all its keys; shift = +inf, mass = -1 where there is none; both are zero at ignored sinks.
    """
    B, M = sink_positions.shape
    num_q_heads, head_dim = q.shape[1], q.shape[-1]
    sink_state = out.new_zeros((2, B, num_q_heads, M), dtype=torch.float32)
    if sink_positions.numel() == 0 or out.numel() == 0:
        return sink_state
    config = config or CorrectionConfig.heuristic(max(head_dim, v.shape[-1]), q.dtype)
    arguments = _fwd_arguments(
        *(q, k, v, out, lse, sink_positions, inter_sink_bias, sink_logits, sink_state, seq_lens, cu_seqlens),
        causal=causal,
        left_padded=left_padded,
        scale=scale,
        config=config,
    )
    # Only the first axis of a grid can be longer than 65535.
    grid = (B * num_q_heads, triton.cdiv(M, config.block_m))
    with torch.cuda.device_of(q):
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": MAX_REGISTERS}
        launch_kernel(sink_attention_correction_fwd_kernel, grid, arguments, **options)
    return sink_state


def _fwd_arguments(
    q,
    k,
    v,
    out,
    lse,
    sink_positions,
    inter_sink_bias,
    sink_logits,
    sink_state,
    seq_lens,
    cu_seqlens,
    *,
    causal,
    left_padded,
    scale,
    config,
) -> dict[str, object]:
    """The arguments of the kernel by name."""
    B, M = sink_positions.shape
    q, k, v, out, lse = (as_dense(x, cu_seqlens) for x in (q, k, v, out, lse))
    num_q_heads, head_dim = q.shape[1], q.shape[3]
    bias = inter_sink_bias.expand(B, num_q_heads, M, M)
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "sink_positions": sink_positions,
        "inter_sink_bias": bias,
        "sink_logits": sink_logits,
        "sink_state": sink_state,
        "seq_lens": None if seq_lens is None else seq_lens.contiguous(),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        **strides("q", q, "bhnd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **strides("o", out, "bhnd"),
        **strides("l", lse, "bhn"),
        **strides("p", sink_positions, "bm"),
        **strides("b", bias, "bhmn"),
        **strides("g", sink_logits, "h"),
        "num_q_heads": num_q_heads,
        "group_size": num_q_heads // k.shape[1],
        "N": q.shape[2],
        "M": M,
        "scale": scale,
        "causal": int(causal),
        "left_padded": int(left_padded),
        "search_steps": M.bit_length(),
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v.shape[3],
        "BLOCK_DV": block_width(v.shape[3]),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": min(config.block_k, block_width(head_dim)),
    }


# --- What the backward reads of a sink row ---


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def sink_attention_correction_delta_kernel(
    out,
    dout,
    sink_positions,
    sink_state,
    base_lse,
    sink_delta,
    seq_lens,
    cu_seqlens,
    stride_ob,
    stride_oh,
    stride_on,
    stride_od,
    stride_db,
    stride_dh,
    stride_dn,
    stride_dd,
    stride_lb,
    stride_lh,
    stride_ln,
    stride_pb,
    stride_pm,
    num_q_heads,
    N,
    M,
    left_padded,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    plane, num_planes = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    batch = (tl.program_id(0) // num_q_heads).to(tl.int64)
    head = (tl.program_id(0) % num_q_heads).to(tl.int64)
    start, length, first_position = locate_sequence(batch, N, seq_lens, cu_seqlens, left_padded)
    out = Matrix(out + batch * stride_ob + head * stride_oh + start * stride_on, stride_on, stride_od)
    dout = Matrix(dout + batch * stride_db + head * stride_dh + start * stride_dn, stride_dn, stride_dd)
    base_lse += batch * stride_lb + head * stride_lh + start * stride_ln
    sinks = Sinks(sink_positions + batch * stride_pb, stride_pm, M, first_position, length)

    row_sinks = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = load_sinks(sinks, row_sinks)
    # Summed as precisely as dot_tokens sums dout · v: where one key holds a row, the two are equal.
    SUM: tl.constexpr = tl.float64 if out.base.dtype.element_ty == tl.float32 else tl.float32
    products = load_tokens(dout, rows, V_HEAD_DIM, BLOCK_DV).to(SUM) * load_tokens(out, rows, V_HEAD_DIM, BLOCK_DV)
    tl.store(sink_delta + plane * M + row_sinks, tl.sum(products, 1).to(tl.float32), mask=rows.valid)
    mass = tl.load(sink_state + (num_planes + plane) * M + row_sinks, mask=rows.valid, other=1.0)
    tl.store(base_lse + rows.positions.to(tl.int64) * stride_ln, float("inf"), mask=mass < 0)


def launch_sink_attention_correction_delta(
    out: Tensor,
    dout: Tensor,
    sink_positions: Tensor,
    sink_state: Tensor,
    base_lse: Tensor,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    left_padded: bool,
) -> Tensor:
    """Returns sink_delta [B, Hq, M] float32, dout · out at the sinks that are not ignored.

    Where the correction did a sink row again, `base_lse`, a copy of lse, becomes +inf: given it for lse, the backward
    of the attention without bias leaves those rows out.
    """
    B, M = sink_positions.shape
    num_q_heads = out.shape[1]
    sink_delta = sink_state.new_empty((B, num_q_heads, M))
    if sink_positions.numel() == 0 or out.numel() == 0:
        return sink_delta
    arguments = _delta_arguments(
        out, dout, sink_positions, sink_state, base_lse, sink_delta, seq_lens, cu_seqlens, left_padded
    )
    grid = (B * num_q_heads, triton.cdiv(M, DELTA_BLOCK))
    with torch.cuda.device_of(out):
        launch_kernel(sink_attention_correction_delta_kernel, grid, arguments, num_warps=DELTA_WARPS)
    return sink_delta


def _delta_arguments(
    out, dout, sink_positions, sink_state, base_lse, sink_delta, seq_lens, cu_seqlens, left_padded
) -> dict[str, object]:
    """The arguments of the kernel by name."""
    out, dout, base_lse = (as_dense(x, cu_seqlens) for x in (out, dout, base_lse))
    V_HEAD_DIM = out.shape[3]
    return {
        "out": out,
        "dout": dout,
        "sink_positions": sink_positions,
        "sink_state": sink_state,
        "base_lse": base_lse,
        "sink_delta": sink_delta,
        "seq_lens": None if seq_lens is None else seq_lens.contiguous(),
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
        **strides("o", out, "bhnd"),
        **strides("d", dout, "bhnd"),
        **strides("l", base_lse, "bhn"),
        **strides("p", sink_positions, "bm"),
        "num_q_heads": out.shape[1],
        "N": out.shape[2],
        "M": sink_positions.shape[1],
        "left_padded": int(left_padded),
        "V_HEAD_DIM": V_HEAD_DIM,
        "BLOCK_DV": block_width(V_HEAD_DIM),
        "BLOCK_M": DELTA_BLOCK,
    }


def shipped_configurations() -> Iterator[Compilation]:
    """What is launched for the head dims and dtypes in use; the lengths are of no help to alignment."""
    for architecture, dtype, head_dim in itertools.product(
        ARCHITECTURES, (torch.float32, torch.bfloat16), (32, 64, 128, 256)
    ):
        config = CorrectionConfig.heuristic(head_dim, dtype)
        label = f"{str(dtype).removeprefix('torch.')} D={head_dim}"
        q, kv = (torch.empty(2, heads, 500, head_dim, dtype=dtype, device="meta") for heads in (8, 4))
        shapes = [(2, 8, 500), (2, 8, 49, 49), (8,), (2, 2, 8, 49), (2, 8, 49)]
        lse, bias, logits, state, delta = (torch.empty(shape, device="meta") for shape in shapes)
        positions, lengths = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in [(2, 49), (2,)])
        yield Compilation.of(
            sink_attention_correction_fwd_kernel,
            f"{label} {config.block_m}x{config.block_n}x{config.block_k}",
            architecture,
            _fwd_arguments(
                *(q, kv, kv, q, lse, positions, bias, logits, state, lengths, None),
                causal=True,
                left_padded=False,
                scale=0.125,
                config=config,
            ),
            config.num_warps,
            config.num_stages,
            MAX_REGISTERS,
        )
        yield Compilation.of(
            sink_attention_correction_delta_kernel,
            label,
            architecture,
            _delta_arguments(q, q, positions, state, lse, delta, lengths, None, False),
            DELTA_WARPS,
            1,
        )

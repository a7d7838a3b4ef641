"""The bias between sink tokens, given to the result of an attention that did not have it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.compilation import ARCHITECTURES, Compilation, strides
from recattn.triton_kernels.primitives import (
    block_width,
    dot_rows,
    expm1_series,
    load_rows,
    online_softmax_update,
    store_rows,
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
    def heuristic(cls, head_dim: int, dtype: torch.dtype, M: int) -> "CorrectionConfig":
        return cls(
            block_m=16 if M <= 16 or head_dim > 128 or dtype == torch.float32 else 32,
            block_n=32,
            # Without tensor cores a dot product holds its operands in registers.
            block_k=32 if dtype == torch.float32 else 128,
            num_warps=4,
            # Longer rows leave no registers to load ahead.
            num_stages=2 if head_dim * dtype.itemsize <= 128 else 1,
        )


@triton.jit
def load_sink_positions(sink_positions, sinks, stride, M, length):
    """Positions of the given sinks, `length` for padding: sinks at or beyond the length are those to ignore."""
    positions = tl.load(sink_positions + sinks * stride, mask=sinks < M, other=-1).to(tl.int32)
    return tl.where(positions < 0, length, positions)


@triton.jit
def correction_update(acc, shift, z, suppressed, scores, lse, bias, values):
    """Give one block of keys, already part of acc / z, their bias; suppressed sums the mass that this takes away.

    All three are scaled by exp(-shift). Scores of keys that a row does not see are -inf, their bias is 0.
    """
    biased = scores + bias - lse[:, None]
    new_shift = tl.maximum(shift, tl.max(biased, 1))
    rescale = tl.exp(shift - new_shift)
    weights = tl.exp(scores - lse[:, None] - new_shift[:, None])
    # The difference of two exponentials would lose a small bias.
    delta = tl.where(tl.abs(bias) < 0.5, weights * expm1_series(bias), tl.exp(biased - new_shift[:, None]) - weights)
    acc = acc * rescale[:, None] + tl.dot(delta.to(values.dtype), values, input_precision="ieee")
    suppressed = suppressed * rescale + tl.sum(tl.maximum(-delta, 0.0), 1)
    return acc, new_shift, z * rescale + tl.sum(delta, 1), suppressed


# Not specialised, `causal` does not double the number of compilations.
@triton.jit(do_not_specialize=["causal"])
def sink_attention_correction_fwd_kernel(
    q,
    k,
    v,
    out,
    lse,
    sink_positions,
    inter_sink_bias,
    seq_lens,
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
    stride_sb,
    num_q_heads,
    group_size,
    N,
    M,
    scale,
    causal,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch = (tl.program_id(0) // num_q_heads).to(tl.int64)
    head = tl.program_id(0) % num_q_heads
    kv_head = (head // group_size).to(tl.int64)
    head = head.to(tl.int64)
    q += batch * stride_qb + head * stride_qh
    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    out += batch * stride_ob + head * stride_oh
    lse += batch * stride_lb + head * stride_lh
    sink_positions += batch * stride_pb
    length = N if seq_lens is None else tl.load(seq_lens + batch * stride_sb).to(tl.int32)

    first_row = tl.program_id(1) * BLOCK_M
    sinks = first_row + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    rows = load_sink_positions(sink_positions, sinks, stride_pm, M, length)  # [BM]
    row_valid = rows < length
    # The last key that each row sees: the one comparison with it covers the causal mask, padding and ignored sinks.
    last_visible = tl.where(row_valid, tl.where(causal != 0, rows, length - 1), -1)  # [BM]
    lse_rows = lse + rows.to(tl.int64) * stride_ln
    bias_rows = inter_sink_bias + batch * stride_bb + head * stride_bh + sinks[:, None].to(tl.int64) * stride_bm

    base_lse = tl.load(lse_rows, mask=row_valid, other=0.0)  # [BM]
    acc = load_rows(out, rows, row_valid, stride_on, stride_od, V_HEAD_DIM, BLOCK_DV).to(tl.float32)  # [BM, Dv]
    shift = tl.zeros([BLOCK_M], tl.float32)
    z = tl.full([BLOCK_M], 1.0, tl.float32)
    suppressed = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, tl.where(causal != 0, tl.minimum(M, first_row + BLOCK_M), M), BLOCK_N):
        key_sinks = start + columns  # [BN]
        keys = load_sink_positions(sink_positions, key_sinks, stride_pm, M, length)  # [BN]
        key_valid = keys < length
        visible = keys[None, :] <= last_visible[:, None]  # [BM, BN]
        bias = tl.load(bias_rows + key_sinks[None, :] * stride_bn, mask=visible, other=0.0)  # [BM, BN]
        scores = scale * dot_rows(
            q, rows, row_valid, stride_qn, stride_qd, k, keys, key_valid, stride_kn, stride_kd, HEAD_DIM, BLOCK_K
        )
        scores = tl.where(visible, scores, -float("inf"))  # [BM, BN]
        values = load_rows(v, keys, key_valid, stride_vn, stride_vd, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        acc, shift, z, suppressed = correction_update(acc, shift, z, suppressed, scores, base_lse, bias, values)

    # Taking away much of a row leaves the rounding errors of the rest: the loop over all keys computes such a row.
    cancelled = row_valid & (suppressed > 0.5 * z)
    corrected = row_valid & ~cancelled
    z = tl.where(corrected, z, 1.0)
    store_rows(out, acc / z[:, None], rows, corrected, stride_on, stride_od, V_HEAD_DIM, BLOCK_DV)
    tl.store(lse_rows, base_lse + shift + tl.log(z), mask=corrected)
    if tl.max(cancelled.to(tl.int32), 0) == 0:
        return

    last_visible = tl.where(cancelled, last_visible, -1)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    shift = tl.full([BLOCK_M], -float("inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    first_sink = 0  # at or after the first key of the block
    for start in range(0, tl.max(last_visible, 0) + 1, BLOCK_N):
        keys = start + columns  # [BN]
        key_valid = keys < length
        visible = keys[None, :] <= last_visible[:, None]  # [BM, BN]
        # Both ascend, so the sinks among these keys are some of the next BN sinks.
        next_sinks = load_sink_positions(sink_positions, first_sink + columns, stride_pm, M, length)  # [BN]
        is_sink = tl.max((next_sinks[:, None] == keys[None, :]).to(tl.int32), 0) > 0  # [BN]
        key_sinks = first_sink + tl.sum((next_sinks[:, None] < keys[None, :]).to(tl.int32), 0)  # [BN]
        has_bias = visible & is_sink[None, :]
        bias = tl.load(bias_rows + key_sinks[None, :] * stride_bn, mask=has_bias, other=0.0)  # [BM, BN]
        scores = bias + scale * dot_rows(
            q, rows, row_valid, stride_qn, stride_qd, k, keys, key_valid, stride_kn, stride_kd, HEAD_DIM, BLOCK_K
        )
        scores = tl.where(visible, scores, -float("inf"))  # [BM, BN]
        values = load_rows(v, keys, key_valid, stride_vn, stride_vd, V_HEAD_DIM, BLOCK_DV)  # [BN, Dv]
        acc, shift, mass = online_softmax_update(acc, shift, mass, scores, values)
        first_sink += tl.sum((next_sinks < start + BLOCK_N).to(tl.int32), 0)
    # A row whose keys are all suppressed has no mass: zeros, and a log-sum-exp of shift = -inf.
    mass = tl.where(mass == 0, 1.0, mass)
    store_rows(out, acc / mass[:, None], rows, cancelled, stride_on, stride_od, V_HEAD_DIM, BLOCK_DV)
    tl.store(lse_rows, shift + tl.log(mass), mask=cancelled)


def launch_sink_attention_correction_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink_positions: Tensor,
    inter_sink_bias: Tensor,
    seq_lens: Tensor | None,
    *,
    causal: bool,
    scale: float,
    config: CorrectionConfig | None = None,
) -> None:
    """Correct `out` and `lse` of an attention without bias, in place at the sink rows, to those with it.

        out = softmax(S + mask) V -> softmax(S + β + mask) V,    S = scale · Q Kᵀ
        β[b, h, i, j] = inter_sink_bias[b, h, s(i), s(j)] when tokens i and j are both sinks, else 0

    q [B, Hq, N, D]; k [B, Hkv, N, D]; v [B, Hkv, N, Dv]; out [B, Hq, N, Dv]; lse [B, Hq, N] float32, natural logarithm;
    sink_positions [B, M] ascending, padded at the end with -1; inter_sink_bias [B, 1 or Hq, M, M] float32; seq_lens [B]
    or None. Sinks at or beyond seq_lens are ignored. A row left without any mass gets zeros and lse = -inf.
    """
    if sink_positions.numel() == 0 or out.numel() == 0:
        return
    M = sink_positions.shape[1]
    config = config or CorrectionConfig.heuristic(max(q.shape[3], v.shape[3]), q.dtype, M)
    arguments = _arguments(q, k, v, out, lse, sink_positions, inter_sink_bias, seq_lens, causal, scale, config)
    # Only the first axis of a grid can be longer than 65535.
    grid = (q.shape[0] * q.shape[1], triton.cdiv(M, config.block_m))
    with torch.cuda.device_of(q):
        sink_attention_correction_fwd_kernel[grid](
            **arguments, num_warps=config.num_warps, num_stages=config.num_stages
        )


def _arguments(
    q, k, v, out, lse, sink_positions, inter_sink_bias, seq_lens, causal, scale, config
) -> dict[str, object]:
    """The arguments of the kernel by name."""
    B, num_q_heads, N, head_dim = q.shape
    M = sink_positions.shape[1]
    bias = inter_sink_bias.expand(B, num_q_heads, M, M)
    return {
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "sink_positions": sink_positions,
        "inter_sink_bias": bias,
        "seq_lens": seq_lens,
        **strides("q", q, "bhnd"),
        **strides("k", k, "bhnd"),
        **strides("v", v, "bhnd"),
        **strides("o", out, "bhnd"),
        **strides("l", lse, "bhn"),
        **strides("p", sink_positions, "bm"),
        **strides("b", bias, "bhmn"),
        **strides("s", seq_lens, "b"),
        "num_q_heads": num_q_heads,
        "group_size": num_q_heads // k.shape[1],
        "N": N,
        "M": M,
        "scale": scale,
        "causal": int(causal),
        "HEAD_DIM": head_dim,
        "V_HEAD_DIM": v.shape[3],
        "BLOCK_DV": block_width(v.shape[3]),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": min(config.block_k, block_width(head_dim)),
    }


def shipped_configurations() -> Iterator[Compilation]:
    """What is launched for the head dims and dtypes in use; the lengths are of no help to alignment."""
    for architecture, dtype, head_dim in itertools.product(
        ARCHITECTURES, (torch.float32, torch.float16, torch.bfloat16), (32, 64, 128, 256)
    ):
        # A configuration that serves both numbers of sinks is listed once.
        for config, M in {CorrectionConfig.heuristic(head_dim, dtype, M): M for M in (15, 49)}.items():
            q, kv = (torch.empty(2, heads, 500, head_dim, dtype=dtype, device="meta") for heads in (8, 4))
            lse, bias = (torch.empty(shape, device="meta") for shape in [(2, 8, 500), (2, 8, M, M)])
            positions, lengths = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in [(2, M), (2,)])
            yield Compilation.of(
                sink_attention_correction_fwd_kernel,
                f"{str(dtype).removeprefix('torch.')} D={head_dim} {config.block_m}x{config.block_n}x{config.block_k}",
                architecture,
                _arguments(q, kv, kv, q, lse, positions, bias, lengths, True, 0.125, config),
                config.num_warps,
                config.num_stages,
            )

"""The bias between sink tokens: the mean over heads of a softmax among the sinks of a sequence.

    out[b] = factor · Σ_h dropout(softmax(scale · q_s[b, h] k_s[b, h]ᵀ))        factor = bias_scale / H

A program holds rows of the bias whole, so there is no online softmax: at most 128 sinks.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn._options import InterSinkBiasOptions
from recattn.triton_kernels.common.dropout import INTER_SINK_BIAS, dropout_weights
from recattn.triton_kernels.common.launch import cdiv, host_block_width, launch
from recattn.triton_kernels.common.softmax import masked_softmax
from recattn.triton_kernels.common.tiles import bhnd, dot_rows, head_rows, load_rows, offset, store_rows


@dataclass(frozen=True)
class InterSinkBiasFwdConfig:
    """Launch parameters of the forward: rows of a program, head components of a dot product."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, head_dim: int, dtype: torch.dtype) -> "InterSinkBiasFwdConfig":
        single = dtype == torch.float32
        return cls(
            # A program loops over the heads, so small tiles give the GPU more programs.
            block_m=16,
            # Without tensor cores a dot product holds its operands in registers.
            block_k=min(host_block_width(head_dim), 32 if single else 128),
            num_warps=4,
            num_stages=3 if single or head_dim > 32 else 2,
        )


@dataclass(frozen=True)
class InterSinkBiasBwdConfig:
    """Launch parameters of the backward: rows of an iteration, head components of a dot product and of a gradient tile.

    With several iterations dK is accumulated in memory, in the dtype of k_s.
    """

    block_m: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, head_dim: int, dtype: torch.dtype, M: int) -> "InterSinkBiasBwdConfig":
        width, rows = host_block_width(head_dim), host_block_width(M)
        if dtype == torch.float32:
            # With 4 or 8 warps Triton multiplies 64 rows on Blackwell's tensor cores: in TF32, whatever is asked.
            return cls(32 if M > 64 else rows, 16, 16, num_warps=16 if M > 32 else 4, num_stages=1)
        if M > 64:
            return cls(rows, min(64, width), min(32, width), num_warps=8, num_stages=1)
        return cls(rows, min(64, width), min(64, width), num_warps=4, num_stages=1)


@triton.jit
def valid_sinks(sink_mask, sinks, stride, M):
    """True at the given sinks that count."""
    in_range = sinks < M
    return in_range if sink_mask is None else tl.load(sink_mask + sinks * stride, mask=in_range, other=0) != 0


@triton.jit
def visible_sinks(rows, row_valid, keys, key_valid, causal):
    """[BM, BN], True where a sink of `rows` may see one of `keys`."""
    return row_valid[:, None] & key_valid[None, :] & ((keys[None, :] <= rows[:, None]) | (causal == 0))


# B and M change with the batch. Strides of q_s and k_s are specialized: rows of 16 components keep them aligned.
@triton.jit(do_not_specialize=["stride_mb", "stride_mm", "num_heads", "M", "causal", "dropout_threshold"])
def inter_sink_bias_fwd_kernel(
    q_s,
    k_s,
    sink_mask,
    bias_scale,
    dropout_seed,
    out,
    stride_mb,
    stride_mm,
    num_heads,
    M,
    scale,
    factor,
    causal,
    dropout_threshold,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M rows of one batch entry's bias, all M columns (BLOCK_N ≥ M).

    for each head:
        qk = scale · q kᵀ                         [BLOCK_M, BLOCK_N], BLOCK_K head components at a time
        acc += dropout(softmax(qk))               over the visible sinks
    out = factor · acc

    q_s and k_s are BHND; out is float32 [B, 1, M, M], contiguous.
    """
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    q_head = q_s.ptr + batch * q_s.stride_b
    k_head = k_s.ptr + batch * k_s.stride_b
    if sink_mask is not None:
        sink_mask += batch * stride_mb
    if bias_scale is not None:
        factor *= tl.load(bias_scale).to(tl.float32)
    row_valid = valid_sinks(sink_mask, rows, stride_mm, M)
    key_valid = valid_sinks(sink_mask, keys, stride_mm, M)
    visible = visible_sinks(rows, row_valid, keys, key_valid, causal)  # [BM, BN]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in range(num_heads):
        qk = scale * dot_rows(
            *(q_head, rows, row_valid, q_s.stride_n, q_s.stride_d),
            *(k_head, keys, key_valid, k_s.stride_n, k_s.stride_d),
            *(HEAD_DIM, BLOCK_K),
        )
        p = masked_softmax(qk, visible, row_valid)  # [BM, BN]
        if dropout_seed is not None:
            bh = tl.program_id(0) * num_heads + head
            p *= dropout_weights(tl.load(dropout_seed), bh, INTER_SINK_BIAS, rows, 0, dropout_threshold, BLOCK_N)
        acc += p
        q_head += q_s.stride_h
        k_head += k_s.stride_h
    # A factor that is not finite keeps to the visible entries.
    bias = tl.where(visible, factor * acc, 0.0)
    store_rows(out + batch * M * M, bias, rows, rows < M, M, 1, M, BLOCK_N)


@triton.jit(do_not_specialize=["stride_mb", "stride_mm", "num_heads", "M", "causal", "dropout_threshold"])
def inter_sink_bias_bwd_kernel(
    dout,
    q_s,
    k_s,
    sink_mask,
    bias_scale,
    dropout_seed,
    dq_s,
    dk_s,
    dbias_scale_rows,
    stride_mb,
    stride_mm,
    num_heads,
    M,
    scale,
    factor,
    causal,
    dropout_threshold,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program: dq_s and dk_s of one batch entry and head, all M sinks (BLOCK_N ≥ M).

    for each BLOCK_M rows:
        p = softmax(scale · q kᵀ), recomputed     [BLOCK_M, BLOCK_N]
        dp = dropout(dout)                        delta = Σ_j p dp gives bias_scale's gradient, row by row
        ds = p (dp - delta)
        dq = scale · factor · ds k                [BLOCK_M, BLOCK_D] at a time
        dk += scale · factor · dsᵀ q              [BLOCK_N, BLOCK_D] at a time, summed in memory over the iterations

    q_s, k_s, dq_s and dk_s are BHND; dout is [B, 1, M, M], contiguous, dbias_scale_rows float32 [B, H, M].
    """
    bh = tl.program_id(0)
    batch = (bh // num_heads).to(tl.int64)
    head = (bh % num_heads).to(tl.int64)
    keys = tl.arange(0, BLOCK_N)
    q = head_rows(q_s, batch, head, 0)
    k = head_rows(k_s, batch, head, 0)
    dq = head_rows(dq_s, batch, head, 0)
    dk = head_rows(dk_s, batch, head, 0)
    dout += batch * M * M
    dbias_scale_rows += bh.to(tl.int64) * M
    if sink_mask is not None:
        sink_mask += batch * stride_mb
    gradient_scale = scale * factor
    if bias_scale is not None:
        gradient_scale *= tl.load(bias_scale).to(tl.float32)
    key_valid = valid_sinks(sink_mask, keys, stride_mm, M)

    for first_row in range(0, BLOCK_N, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)
        row_valid = valid_sinks(sink_mask, rows, stride_mm, M)
        visible = visible_sinks(rows, row_valid, keys, key_valid, causal)  # [BM, BN]
        # Before qk: beside it, the random numbers would not fit the registers.
        dp = tl.load(dout + rows[:, None] * M + keys[None, :], mask=visible, other=0.0)  # [BM, BN]
        if dropout_seed is not None:
            dp *= dropout_weights(tl.load(dropout_seed), bh, INTER_SINK_BIAS, rows, 0, dropout_threshold, BLOCK_N)
        qk = scale * dot_rows(
            *(q.base, rows, row_valid, q.row_stride, q.column_stride),
            *(k.base, keys, key_valid, k.row_stride, k.column_stride),
            *(HEAD_DIM, BLOCK_K),
        )
        p = masked_softmax(qk, visible, row_valid)  # [BM, BN]
        delta = tl.sum(p * dp, 1)  # [BM]
        tl.store(dbias_scale_rows + rows, factor * delta, mask=rows < M)
        # gradient_scale comes last: it might take ds out of half precision's range.
        ds = (p * (dp - delta[:, None])).to(q.base.dtype.element_ty)  # [BM, BN]
        for start in range(0, HEAD_DIM, BLOCK_D):
            width = HEAD_DIM - start
            q_base, k_base = q.base + offset(start, q.column_stride), k.base + offset(start, k.column_stride)
            dq_base, dk_base = dq.base + offset(start, dq.column_stride), dk.base + offset(start, dk.column_stride)
            q_block = load_rows(q_base, rows, row_valid, q.row_stride, q.column_stride, width, BLOCK_D)
            k_block = load_rows(k_base, keys, key_valid, k.row_stride, k.column_stride, width, BLOCK_D)
            dq_block = gradient_scale * tl.dot(ds, k_block, input_precision="ieee")  # [BM, BD]
            dq_block = tl.where(row_valid[:, None], dq_block, 0.0)
            store_rows(dq_base, dq_block, rows, rows < M, dq.row_stride, dq.column_stride, width, BLOCK_D)
            dk_block = gradient_scale * tl.dot(tl.trans(ds), q_block, input_precision="ieee")  # [BN, BD]
            if BLOCK_M < BLOCK_N:
                dk_valid = (keys < M) & (first_row > 0)
                dk_block += load_rows(dk_base, keys, dk_valid, dk.row_stride, dk.column_stride, width, BLOCK_D)
            dk_block = tl.where(key_valid[:, None], dk_block, 0.0)
            store_rows(dk_base, dk_block, keys, keys < M, dk.row_stride, dk.column_stride, width, BLOCK_D)
        if BLOCK_M < BLOCK_N:  # in the next iteration other threads read dK than have written it
            tl.debug_barrier()


def launch_inter_sink_bias_fwd(
    q_s: Tensor,
    k_s: Tensor,
    sink_mask: Tensor | None,
    bias_scale: Tensor | None,
    dropout_seed: Tensor | None,
    out: Tensor,
    options: InterSinkBiasOptions,
    config: InterSinkBiasFwdConfig | None = None,
) -> None:
    """out = factor · bias_scale · mean over heads of dropout(softmax(scale · Q_s K_sᵀ + mask)).

    q_s, k_s [B, H, M, D]; sink_mask [B, M] bool or None; bias_scale of one element, or None for 1; dropout_seed [1]
    int64, or None for no dropout; out [B, 1, M, M] float32, contiguous.
    """
    if out.numel() == 0:
        return
    B, num_heads, M, head_dim = q_s.shape
    config = config or InterSinkBiasFwdConfig.heuristic(head_dim, q_s.dtype)
    sink_mask, *mask_strides = _mask_with_strides(sink_mask)
    launch(
        inter_sink_bias_fwd_kernel,
        (B, cdiv(M, config.block_m)),
        *(bhnd(q_s), bhnd(k_s), sink_mask, bias_scale, dropout_seed, out),
        *(*mask_strides, num_heads, M, *_numbers(options, num_heads, head_dim)),
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=host_block_width(M),
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def launch_inter_sink_bias_bwd(
    dout: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    sink_mask: Tensor | None,
    bias_scale: Tensor | None,
    dropout_seed: Tensor | None,
    dq_s: Tensor,
    dk_s: Tensor,
    dbias_scale_rows: Tensor,
    options: InterSinkBiasOptions,
    config: InterSinkBiasBwdConfig | None = None,
) -> None:
    """dq_s and dk_s, and the gradient of bias_scale as a sum over dbias_scale_rows [B, H, M] float32.

    dout [B, 1, M, M]; dq_s and dk_s as q_s and k_s, any strides.
    """
    if q_s.numel() == 0:
        return
    B, num_heads, M, head_dim = q_s.shape
    config = config or InterSinkBiasBwdConfig.heuristic(head_dim, q_s.dtype, M)
    sink_mask, *mask_strides = _mask_with_strides(sink_mask)
    launch(
        inter_sink_bias_bwd_kernel,
        (B * num_heads,),
        *(dout.contiguous(), bhnd(q_s), bhnd(k_s), sink_mask, bias_scale, dropout_seed),
        *(bhnd(dq_s), bhnd(dk_s), dbias_scale_rows),
        *(*mask_strides, num_heads, M, *_numbers(options, num_heads, head_dim)),
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=host_block_width(M),
        BLOCK_K=config.block_k,
        BLOCK_D=config.block_d,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _mask_with_strides(sink_mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Contiguous: the offsets in a row are int32, as int64 would not fit the registers."""
    if sink_mask is None:
        return None, 0, 0
    sink_mask = sink_mask.contiguous()
    return sink_mask, *sink_mask.stride()


def _numbers(options: InterSinkBiasOptions, num_heads: int, head_dim: int) -> tuple[float, float, int, int]:
    """scale, factor, causal and dropout_threshold of the kernels."""
    scale = 1 / math.sqrt(head_dim) if options.scale is None else options.scale
    return scale, options.factor / num_heads, int(options.causal), min(round(options.dropout_p * 65536), 65535)

"""The bias between sink tokens: the mean over heads of a softmax among the sinks of a sequence."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn.triton_kernels.common.compilation import Compilation
from recattn.triton_kernels.common.dropout import dropout_weights
from recattn.triton_kernels.common.launch import ARCHITECTURES, launch_kernel, strides
from recattn.triton_kernels.common.tiles import block_width, dot_rows, load_rows, offset, store_rows


@dataclass(frozen=True)
class InterSinkBiasFwdConfig:
    """Launch parameters of the forward: rows a program, head components a dot product."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, head_dim: int, dtype: torch.dtype) -> "InterSinkBiasFwdConfig":
        single = dtype == torch.float32
        return cls(
            # A program visits the heads one after another, so let there be many.
            block_m=16,
            # Without tensor cores a dot product holds its operands in registers.
            block_k=min(block_width(head_dim), 32 if single else 128),
            num_warps=4,
            num_stages=3 if single or head_dim > 32 else 2,
        )


@dataclass(frozen=True)
class InterSinkBiasBwdConfig:
    """Launch parameters of the backward: rows an iteration, head components a dot product, and a block of gradients.

    With several iterations dK is accumulated in memory, in the dtype of k_s.
    """

    block_m: int
    block_k: int
    block_d: int
    num_warps: int
    num_stages: int

    @classmethod
    def heuristic(cls, head_dim: int, dtype: torch.dtype, M: int) -> "InterSinkBiasBwdConfig":
        width, rows = block_width(head_dim), block_width(M)
        if dtype == torch.float32:
            # With 4 or 8 warps Triton takes 64 rows to Blackwell's tensor cores, in TF32 whatever precision is asked.
            return cls(32 if M > 64 else rows, 16, 16, num_warps=16 if M > 32 else 4, num_stages=1)
        if M > 64:
            return cls(rows, min(64, width), min(32, width), num_warps=8, num_stages=1)
        return cls(rows, min(64, width), min(64, width), num_warps=4, num_stages=1)


@triton.jit
def valid_sinks(sink_mask, sinks, stride, M):
    """Which of the given sinks count."""
    in_range = sinks < M
    return in_range if sink_mask is None else tl.load(sink_mask + sinks * stride, mask=in_range, other=0) != 0


@triton.jit
def softmax_rows(scores, visible, row_valid):
    """Softmax over what a row sees, and it sees something if it is valid; zeros elsewhere."""
    scores = tl.where(visible, scores, -float("inf"))
    shift = tl.where(row_valid, tl.max(scores, 1), 0.0)
    weights = tl.exp(scores - shift[:, None])
    return weights / tl.where(row_valid, tl.sum(weights, 1), 1.0)[:, None]


@triton.jit
def visible_pairs(rows, row_valid, keys, key_valid, causal):
    """[BM, BN], True where a sink of `rows` may see one of `keys`."""
    return row_valid[:, None] & key_valid[None, :] & ((keys[None, :] <= rows[:, None]) | (causal == 0))


# Of what changes with B and M only the strides of q_s and k_s are specialised: rows of 16 components keep them aligned.
@triton.jit(do_not_specialize=["stride_mb", "stride_mm", "num_heads", "M", "causal", "dropped"])
def inter_sink_bias_fwd_kernel(
    q_s,
    k_s,
    sink_mask,
    bias_scale,
    dropout_seed,
    out,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_km,
    stride_kd,
    stride_mb,
    stride_mm,
    num_heads,
    M,
    scale,
    factor,
    causal,
    dropped,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    q_s += batch * stride_qb
    k_s += batch * stride_kb
    if sink_mask is not None:
        sink_mask += batch * stride_mb
    if bias_scale is not None:
        factor *= tl.load(bias_scale).to(tl.float32)
    row_valid = valid_sinks(sink_mask, rows, stride_mm, M)
    key_valid = valid_sinks(sink_mask, keys, stride_mm, M)
    visible = visible_pairs(rows, row_valid, keys, key_valid, causal)  # [BM, BN]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in range(num_heads):
        scores = scale * dot_rows(
            q_s, rows, row_valid, stride_qm, stride_qd, k_s, keys, key_valid, stride_km, stride_kd, HEAD_DIM, BLOCK_K
        )
        weights = softmax_rows(scores, visible, row_valid)  # [BM, BN]
        if dropout_seed is not None:
            plane = tl.program_id(0) * num_heads + head
            weights *= dropout_weights(tl.load(dropout_seed), plane, 2, rows, 0, dropped, BLOCK_N)
        acc += weights
        q_s += stride_qh
        k_s += stride_kh
    store_rows(out + batch * M * M, factor * acc, rows, rows < M, M, 1, M, BLOCK_N)


@triton.jit(do_not_specialize=["stride_mb", "stride_mm", "num_heads", "M", "causal", "dropped"])
def inter_sink_bias_bwd_kernel(
    dout,
    q_s,
    k_s,
    sink_mask,
    bias_scale,
    dropout_seed,
    dq_s,
    dk_s,
    dbias_scale_shares,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_km,
    stride_kd,
    stride_mb,
    stride_mm,
    stride_dqb,
    stride_dqh,
    stride_dqm,
    stride_dqd,
    stride_dkb,
    stride_dkh,
    stride_dkm,
    stride_dkd,
    num_heads,
    M,
    scale,
    factor,
    causal,
    dropped,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    plane = tl.program_id(0)
    batch = (plane // num_heads).to(tl.int64)
    head = (plane % num_heads).to(tl.int64)
    keys = tl.arange(0, BLOCK_N)
    q_s += batch * stride_qb + head * stride_qh
    k_s += batch * stride_kb + head * stride_kh
    dq_s += batch * stride_dqb + head * stride_dqh
    dk_s += batch * stride_dkb + head * stride_dkh
    dout += batch * M * M
    dbias_scale_shares += plane.to(tl.int64) * M
    if sink_mask is not None:
        sink_mask += batch * stride_mb
    gradient_scale = scale * factor
    if bias_scale is not None:
        gradient_scale *= tl.load(bias_scale).to(tl.float32)
    key_valid = valid_sinks(sink_mask, keys, stride_mm, M)

    for first_row in range(0, BLOCK_N, BLOCK_M):
        rows = first_row + tl.arange(0, BLOCK_M)
        row_valid = valid_sinks(sink_mask, rows, stride_mm, M)
        visible = visible_pairs(rows, row_valid, keys, key_valid, causal)  # [BM, BN]
        # Before the scores: held beside them, the random numbers would not fit the registers.
        dweights = tl.load(dout + rows[:, None] * M + keys[None, :], mask=visible, other=0.0)  # [BM, BN]
        if dropout_seed is not None:
            dweights *= dropout_weights(tl.load(dropout_seed), plane, 2, rows, 0, dropped, BLOCK_N)
        scores = scale * dot_rows(
            q_s, rows, row_valid, stride_qm, stride_qd, k_s, keys, key_valid, stride_km, stride_kd, HEAD_DIM, BLOCK_K
        )
        weights = softmax_rows(scores, visible, row_valid)  # [BM, BN]
        delta = tl.sum(weights * dweights, 1)  # [BM]
        tl.store(dbias_scale_shares + rows, factor * delta, mask=rows < M)
        # The factors that gradients have in common come last: they might take these out of half precision.
        dscores = (weights * (dweights - delta[:, None])).to(q_s.dtype.element_ty)  # [BM, BN]
        for start in range(0, HEAD_DIM, BLOCK_D):
            width = HEAD_DIM - start
            q_block = load_rows(q_s + offset(start, stride_qd), rows, row_valid, stride_qm, stride_qd, width, BLOCK_D)
            k_block = load_rows(k_s + offset(start, stride_kd), keys, key_valid, stride_km, stride_kd, width, BLOCK_D)
            dq = gradient_scale * tl.dot(dscores, k_block, input_precision="ieee")  # [BM, BD]
            store_rows(dq_s + offset(start, stride_dqd), dq, rows, rows < M, stride_dqm, stride_dqd, width, BLOCK_D)
            dk = gradient_scale * tl.dot(tl.trans(dscores), q_block, input_precision="ieee")  # [BN, BD]
            dk_base = dk_s + offset(start, stride_dkd)
            if BLOCK_M < BLOCK_N:
                dk_valid = (keys < M) & (first_row > 0)
                dk += load_rows(dk_base, keys, dk_valid, stride_dkm, stride_dkd, width, BLOCK_D)
            store_rows(dk_base, dk, keys, keys < M, stride_dkm, stride_dkd, width, BLOCK_D)
        if BLOCK_M < BLOCK_N:  # the next iteration may read dK by other threads than have written it
            tl.debug_barrier()


def launch_inter_sink_bias_fwd(
    q_s: Tensor,
    k_s: Tensor,
    sink_mask: Tensor | None,
    bias_scale: Tensor | None,
    dropout_seed: Tensor | None,
    out: Tensor,
    *,
    factor: float,
    causal: bool,
    dropout_p: float,
    scale: float,
    config: InterSinkBiasFwdConfig | None = None,
) -> None:
    """out = factor · bias_scale · mean over heads of dropout(softmax(scale · Q_s K_sᵀ + mask)).

    q_s, k_s [B, H, M, D]; sink_mask [B, M] bool or None; bias_scale of one element, or None for 1; dropout_seed [1]
    int64, or None for no dropout; out [B, 1, M, M] float32, contiguous.
    """
    if out.numel() == 0:
        return
    B, _, M, head_dim = q_s.shape
    config = config or InterSinkBiasFwdConfig.heuristic(head_dim, q_s.dtype)
    arguments = _fwd_arguments(
        q_s, k_s, sink_mask, bias_scale, dropout_seed, out, factor, causal, dropout_p, scale, config
    )
    with torch.cuda.device_of(q_s):
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        launch_kernel(inter_sink_bias_fwd_kernel, (B, triton.cdiv(M, config.block_m)), arguments, **options)


def launch_inter_sink_bias_bwd(
    dout: Tensor,
    q_s: Tensor,
    k_s: Tensor,
    sink_mask: Tensor | None,
    bias_scale: Tensor | None,
    dropout_seed: Tensor | None,
    dq_s: Tensor,
    dk_s: Tensor,
    dbias_scale_shares: Tensor,
    *,
    factor: float,
    causal: bool,
    dropout_p: float,
    scale: float,
    config: InterSinkBiasBwdConfig | None = None,
) -> None:
    """The gradients of q_s and k_s, and that of bias_scale as a sum over dbias_scale_shares [B, H, M] float32.

    dout [B, 1, M, M]; dq_s and dk_s as q_s and k_s, any strides.
    """
    if q_s.numel() == 0:
        return
    B, num_heads, M, head_dim = q_s.shape
    config = config or InterSinkBiasBwdConfig.heuristic(head_dim, q_s.dtype, M)
    arguments = _bwd_arguments(
        dout,
        q_s,
        k_s,
        sink_mask,
        bias_scale,
        dropout_seed,
        dq_s,
        dk_s,
        dbias_scale_shares,
        factor,
        causal,
        dropout_p,
        scale,
        config,
    )
    with torch.cuda.device_of(q_s):
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        launch_kernel(inter_sink_bias_bwd_kernel, (B * num_heads,), arguments, **options)


def _fwd_arguments(
    q_s, k_s, sink_mask, bias_scale, dropout_seed, out, factor, causal, dropout_p, scale, config
) -> dict[str, object]:
    """The arguments of the forward kernel by name."""
    return {
        **_shared_arguments(q_s, k_s, sink_mask, bias_scale, dropout_seed, factor, causal, dropout_p, scale, config),
        "out": out,
    }


def _bwd_arguments(
    dout,
    q_s,
    k_s,
    sink_mask,
    bias_scale,
    dropout_seed,
    dq_s,
    dk_s,
    dbias_scale_shares,
    factor,
    causal,
    dropout_p,
    scale,
    config,
) -> dict[str, object]:
    """The arguments of the backward kernel by name."""
    return {
        **_shared_arguments(q_s, k_s, sink_mask, bias_scale, dropout_seed, factor, causal, dropout_p, scale, config),
        "dout": dout.contiguous(),
        "dq_s": dq_s,
        "dk_s": dk_s,
        "dbias_scale_shares": dbias_scale_shares,
        **strides("dq", dq_s, "bhmd"),
        **strides("dk", dk_s, "bhmd"),
        "BLOCK_D": config.block_d,
    }


def _shared_arguments(
    q_s, k_s, sink_mask, bias_scale, dropout_seed, factor, causal, dropout_p, scale, config
) -> dict[str, object]:
    _, num_heads, M, head_dim = q_s.shape
    # A row's offsets are int32: wider ones would not fit the registers.
    sink_mask = None if sink_mask is None else sink_mask.contiguous()
    return {
        "q_s": q_s,
        "k_s": k_s,
        "sink_mask": sink_mask,
        "bias_scale": bias_scale,
        "dropout_seed": dropout_seed,
        **strides("q", q_s, "bhmd"),
        **strides("k", k_s, "bhmd"),
        **strides("m", sink_mask, "bm"),
        "num_heads": num_heads,
        "M": M,
        "scale": scale,
        "factor": factor / num_heads,
        "causal": int(causal),
        "dropped": min(round(dropout_p * 65536), 65535),
        "HEAD_DIM": head_dim,
        "BLOCK_M": config.block_m,
        "BLOCK_N": block_width(M),
        "BLOCK_K": config.block_k,
    }


def shipped_configurations() -> Iterator[Compilation]:
    """What is launched for the head dims and dtypes in use, with every option."""
    shapes = ((32, 15), (64, 49), (128, 49), (64, 100), (128, 100))
    for architecture, dtype, (head_dim, M) in itertools.product(ARCHITECTURES, (torch.float32, torch.bfloat16), shapes):
        q_s = torch.empty(2, 8, M, head_dim, dtype=dtype, device="meta")
        bias, shares, bias_scale = (torch.empty(shape, device="meta") for shape in [(2, 1, M, M), (2, 8, M), ()])
        sink_mask = torch.empty(2, M, dtype=torch.bool, device="meta")
        dropout_seed = torch.empty(1, dtype=torch.int64, device="meta")
        inputs, options = (q_s, q_s, sink_mask, bias_scale, dropout_seed), (1.0, True, 0.1, 0.125)
        fwd = InterSinkBiasFwdConfig.heuristic(head_dim, dtype)
        bwd = InterSinkBiasBwdConfig.heuristic(head_dim, dtype, M)
        for kernel, config, arguments in (
            (inter_sink_bias_fwd_kernel, fwd, _fwd_arguments(*inputs, bias, *options, fwd)),
            (inter_sink_bias_bwd_kernel, bwd, _bwd_arguments(bias, *inputs, q_s, q_s, shares, *options, bwd)),
        ):
            yield Compilation.of(
                kernel,
                f"{str(dtype).removeprefix('torch.')} D={head_dim} {config.block_m}x{block_width(M)}x{config.block_k}",
                architecture,
                arguments,
                config.num_warps,
                config.num_stages,
            )

"""refined_attention of short sequences, backward: recomputes the forward, in one launch or in three.

The equations are in `short_gradients`. The launches take some batch-heads of each group after another. Each of those
sums its own dG and dW_v, to which the next launch adds, and has its own workspace where the backward takes three
launches.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recattn._options import RefinedAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout
from recattn.triton_kernels.common.launch import MAX_REGISTERS, cdiv, host_block_width, launch
from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.common.tiles import bhnd
from recattn.triton_kernels.refined_attention.config import RefinedAttentionConfig, num_multiprocessors
from recattn.triton_kernels.refined_attention.short import (
    Inputs,
    batch_sizes,
    choose_config,
    contiguous_like,
    load_batch_head,
    squares_of,
    tokens_at,
    tokens_of,
)
from recattn.triton_kernels.refined_attention.short_gradients import (
    Gradients,
    Square,
    Workspace,
    bwd_at_once,
    bwd_to_k,
    bwd_to_q,
    bwd_to_scores,
    workspace_of,
)

# The launches of a backward: one for all, or three, each a program for each block of rows.
ALL: tl.constexpr = tl.constexpr(0)
TO_SCORES: tl.constexpr = tl.constexpr(1)  # dM and dS
TO_Q: tl.constexpr = tl.constexpr(2)  # dV, dQ₁, dV₁, dL and dQ
TO_K: tl.constexpr = tl.constexpr(3)  # dK, dG and dW_v


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "N",
        "first_bh",
        "causal",
        "dropout_threshold",
    ]
)
def refined_attention_bwd_kernel(
    dout,
    q,
    k,
    v,
    grads,
    workspace,
    squares,
    lengths,
    dropout_seed,
    num_heads,
    N,
    first_bh,
    scale,
    causal,
    dropout_threshold,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    FROM_WEIGHTS: tl.constexpr,
    ADDS_SOURCE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGE: tl.constexpr,
):
    """Program (i, j, r): block r of BLOCK_M rows of batch-head first_bh + i of group j of the heads, all its keys.

    The equations are those of `short_gradients`; tiles are [BLOCK_M, BLOCK_N], with N <= BLOCK_N, and only a product
    with q, k, v or dout loops, over BLOCK_D columns at a time. STAGE is one of four:

    ALL                      a, p, dm, ds, dv, dq_1, dv_1, dl, dq, dk from all rows (BLOCK_M = BLOCK_N)
    TO_SCORES, TO_Q, TO_K    the same in three launches, each with its rows of what the one before left in `workspace`

    Adds to rows r of sum (i, j) of dG and dW_v.
    """
    heads = num_heads // tl.num_programs(1)  # of a group
    index = first_bh + tl.program_id(0)
    batch = (index // heads).to(tl.int64)
    head = (tl.program_id(1) * heads + index % heads).to(tl.int64)
    bh = load_batch_head(batch, head, num_heads, N, lengths, causal)
    columns = tl.arange(0, BLOCK_N)
    row_positions = tl.arange(0, BLOCK_M)
    if BLOCK_M < BLOCK_N:
        row_positions += tl.program_id(2) * BLOCK_M
    keys = tokens_at(bh, columns)
    rows = tokens_at(bh, row_positions)
    at = Square(
        columns[:, None] * BLOCK_N + columns[None, :],
        row_positions[:, None] * BLOCK_N + columns[None, :],
        row_positions[:, None] + columns[None, :] * BLOCK_N,
    )
    w_v = squares.w_v
    if w_v is not None:
        w_v += squares.first_w_v + head * squares.stride_wh
    g = squares.g + head * squares.stride_gh
    dout = tokens_of(bh, dout)
    q, k, v = tokens_of(bh, q), tokens_of(bh, k), tokens_of(bh, v)
    x = Inputs(q, k, v, g, w_v)
    dropout = Dropout(dropout_seed, dropout_threshold)
    accumulates = first_bh > 0

    if STAGE == ALL:
        bwd_at_once(
            bh,
            rows,
            keys,
            at,
            x,
            dout,
            grads,
            accumulates,
            scale,
            dropout,
            HEAD_DIM,
            VALUE_DIM,
            FROM_WEIGHTS,
            ADDS_SOURCE,
            BLOCK_D,
        )
    else:
        workspace = workspace_of(workspace, BLOCK_N)
    if STAGE == TO_SCORES:
        bwd_to_scores(
            bh,
            rows,
            keys,
            at,
            x,
            dout,
            workspace,
            scale,
            dropout,
            HEAD_DIM,
            VALUE_DIM,
            FROM_WEIGHTS,
            ADDS_SOURCE,
            BLOCK_D,
        )
    if STAGE == TO_Q:
        bwd_to_q(
            bh,
            rows,
            keys,
            at,
            x,
            dout,
            grads,
            workspace,
            scale,
            HEAD_DIM,
            VALUE_DIM,
            FROM_WEIGHTS,
            ADDS_SOURCE,
            BLOCK_D,
        )
    if STAGE == TO_K:
        bwd_to_k(bh, rows, keys, at, x, grads, workspace, accumulates, scale, HEAD_DIM, BLOCK_D)


def launch_refined_attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    squares: Tensor,
    w_v: Tensor | None,
    lengths: Lengths,
    options: RefinedAttentionOptions,
    *,
    dropout: Dropout = NO_DROPOUT,
    config: RefinedAttentionConfig | None = None,
) -> Gradients:
    """dq, dk and dv, contiguous, and the partial sums of dG and dW_v as `launch_weights_bwd` takes them.

    The arguments are those of the forward. No axis is empty.
    """
    B, H, N, D = batch_sizes(q, lengths, options)
    dq, dk, dv = contiguous_like(q), contiguous_like(k), contiguous_like(v)
    config = config or choose_config(q, v, N, options, dropout)
    # Heads with matrices of their own are a group each; else all heads are one.
    groups = H if squares.shape[0] > (1 if w_v is None else 2) else 1
    count = B * H // groups
    per_launch = min(count, pairs_per_launch(q, N, groups))
    size = squares.shape[1]
    dg = torch.empty((per_launch, groups, size, size), dtype=torch.float32, device=q.device)
    grads = Gradients(dq, dk, dv, dg, None if w_v is None else torch.empty_like(dg))
    workspace = None
    if len(config.bwd) > 1:
        shape = (per_launch, groups, len(Workspace._fields), size, size)
        workspace = torch.empty(shape, dtype=q.dtype, device=q.device)
    tokens = [bhnd(x, lengths.cu_seqlens) for x in (dout, q, k, v)]
    inputs = (*tokens, grads, workspace, squares_of(squares, w_v), lengths, dropout.seed)
    flags = (options.scale, int(options.causal), dropout.threshold)
    for i in range(int(cdiv(count, per_launch))):
        first_bh = i * per_launch
        for tile in config.bwd:
            launch(
                refined_attention_bwd_kernel,
                (min(per_launch, count - first_bh), groups, size // tile.block_m),
                *(*inputs, H, N, first_bh, *flags),
                HEAD_DIM=D,
                VALUE_DIM=v.shape[-1],
                FROM_WEIGHTS=options.source == "weights",
                ADDS_SOURCE=options.mechanism == "additive",
                BLOCK_M=tile.block_m,
                BLOCK_N=size,
                BLOCK_D=tile.block_d,
                STAGE=tile.stage,
                num_warps=tile.num_warps,
                num_stages=1,
                maxnreg=MAX_REGISTERS,
            )
    return grads


# Batch-heads that a launch of the backward takes per multiprocessor, by BLOCK_N.
PARTIAL_WAVES = {16: 32, 32: 16, 64: 8, 128: 2}


def pairs_per_launch(q: Tensor, N: int, groups: int) -> int:
    """How many batch-heads of a group a launch of the backward takes.

    Each has sums of its own, which should stay in the cache until the next launch adds to them.
    """
    return cdiv(PARTIAL_WAVES[host_block_width(N)] * num_multiprocessors(q.device.index), groups)

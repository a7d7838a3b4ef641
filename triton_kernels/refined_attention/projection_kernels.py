"""The kernels of x = A W of raw attention logits A, without computing A: causal linear attention with W as values.

With A = mask(scale · Q Kᵀ), zero at future and padded entries, the forward and the backward are one product,

    out_i = scale · Σ_j (a_i · b_j) c_j        over j ≤ i, or reversed over j ≥ i

    x    of (q, k, W)                  dq   of (dx, W, k)
    dk   of (W, dx, q), reversed       dW   of (k, q, dx), reversed, summed over the sequences that share W

Positions are cut into segments. Inside its segment a tile of rows loops over the blocks of b and c, as flash attention
does. Everything before (reversed: behind) the segment is one matrix, the state Σ_j b_j ⊗ c_j at the boundary. A first
kernel walks each sequence once and stores its states, summed in float32, in the dtype of the inputs. So the tiles run
in parallel, and work and memory are linear in N. x and dq read the same states, and so do dk and dW. Without a causal
mask a sequence longer than a segment has one state, of all its tokens.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from recattn.triton_kernels.common.ragged import locate_sequence
from recattn.triton_kernels.common.tiles import (
    Matrix,
    Tokens,
    dot_rows,
    head_rows,
    load_rows,
    offset,
    store_rows,
)


class Span(NamedTuple):
    """The positions of a sequence's tokens: first to end - 1, and where they lie."""

    first: tl.tensor
    end: tl.tensor
    slab: tl.tensor  # steps of stride_b of a BHND to position 0: the batch, or the first token of a packed sequence


@triton.jit
def token_span(batch, N, lengths):
    start, length, first = locate_sequence(batch, N, lengths)
    slab = batch
    if lengths.cu_seqlens is not None:
        slab = start
    return Span(first, tl.minimum(first + length, N), slab)


@triton.jit
def tokens_within(positions, span):
    return Tokens(positions, (positions >= span.first) & (positions < span.end))


@triton.jit
def load_columns(x, rows, first_column, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[rows, BLOCK_WIDTH] of a Matrix from first_column on; zeros where a row is not valid."""
    base = x.base + offset(first_column, x.column_stride)
    width = WIDTH - first_column
    return load_rows(base, rows.positions, rows.valid, x.row_stride, x.column_stride, width, BLOCK_WIDTH)


DO_NOT_SPECIALIZE = ["num_heads", "N", "boundaries"]


@triton.jit(do_not_specialize=DO_NOT_SPECIALIZE)
def refined_projection_states_kernel(
    b,
    c,
    states,
    lengths,
    num_heads,
    N,
    boundaries,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SEGMENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """One program: a block of all states of one batch and head, states [B, H, boundaries, E, F].

    for each block of BLOCK_N positions, reversed from the last:
        state += b.T @ c                    [BLOCK_E, BLOCK_F]
        store it where a segment ends
    Not causal, there is one state, stored at the end.
    """
    E_BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    blocks = tl.program_id(0) % (E_BLOCKS * F_BLOCKS)
    bh = tl.program_id(0) // (E_BLOCKS * F_BLOCKS)
    batch, head = bh // num_heads, bh % num_heads
    first_e = blocks // F_BLOCKS * BLOCK_E
    first_f = blocks % F_BLOCKS * BLOCK_F
    span = token_span(batch, N, lengths)
    b, c = head_rows(b, span.slab, head, 0), head_rows(c, span.slab, head, 0)
    e = first_e + tl.arange(0, BLOCK_E)
    f = first_f + tl.arange(0, BLOCK_F)
    states += bh.to(tl.int64) * boundaries * E * F + e[:, None] * F + f[None, :]
    inside = (e < E)[:, None] & (f < F)[None, :]

    # The first segment with tokens needs no state, reversed the last.
    first = span.first // BLOCK_N * BLOCK_N
    end = span.end
    if CAUSAL and REVERSED:
        first = (span.first // SEGMENT + 1) * SEGMENT
    elif CAUSAL:
        end = (span.end - 1) // SEGMENT * SEGMENT
    num_blocks = tl.cdiv(tl.maximum(end - first, 0), BLOCK_N)
    state = tl.zeros([BLOCK_E, BLOCK_F], tl.float32)
    for step in range(0, num_blocks):
        start = first + (num_blocks - 1 - step if REVERSED else step) * BLOCK_N
        tokens = tokens_within(start + tl.arange(0, BLOCK_N), span)
        b_block = load_columns(b, tokens, first_e, E, BLOCK_E)  # [BN, BE]
        c_block = load_columns(c, tokens, first_f, F, BLOCK_F)  # [BN, BF]
        state = tl.dot(tl.trans(b_block), c_block, state, input_precision="ieee")
        if CAUSAL:
            reached = start if REVERSED else start + BLOCK_N
            if reached % SEGMENT == 0:
                boundary = reached // SEGMENT - 1
                tl.store(states + boundary.to(tl.int64) * E * F, state.to(states.dtype.element_ty), mask=inside)
    if not CAUSAL:
        tl.store(states, state.to(states.dtype.element_ty), mask=inside)


@triton.jit
def add_state(
    acc,
    a,
    states,
    first_state,
    rows,
    span,
    segment,
    first_f,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SEGMENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """acc + a @ state, the state of everything before (reversed: behind) the segment.

    `states` is a Matrix, whose first state of this batch and head is number first_state.
    """
    if not CAUSAL:
        boundary = segment * 0
        needed = span.first < span.end
    elif REVERSED:
        boundary = segment
        needed = (segment + 1) * SEGMENT < span.end
    else:
        boundary = segment - 1
        needed = segment * SEGMENT > span.first
    # A segment without tokens has no state in memory.
    needed = needed & (tl.max(rows.valid.to(tl.int32), 0) > 0)
    rows = Tokens(rows.positions, rows.valid & needed)
    f = first_f + tl.arange(0, acc.shape[1])
    state = states.base + (first_state + boundary) * E * F + f[None, :] * states.column_stride
    for first_e in range(0, E, BLOCK_E):
        e = first_e + tl.arange(0, BLOCK_E)
        a_block = load_columns(a, rows, first_e, E, BLOCK_E)  # [BM, BE]
        inside = (e < E)[:, None] & (f < F)[None, :] & needed
        state_block = tl.load(state + e[:, None] * states.row_stride, mask=inside, other=0.0)  # [BE, BF]
        acc = tl.dot(a_block, state_block, acc, input_precision="ieee")
    return acc


@triton.jit
def add_block(
    acc,
    a,
    b,
    c,
    rows,
    start,
    span,
    first_f,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """acc + mask(a @ b.T) @ c, of the block of b and c at position start."""
    columns = tokens_within(start + tl.arange(0, BLOCK_N), span)
    products = dot_rows(
        a.base,
        rows.positions,
        rows.valid,
        a.row_stride,
        a.column_stride,
        b.base,
        columns.positions,
        columns.valid,
        b.row_stride,
        b.column_stride,
        E,
        BLOCK_E,
    )
    if CAUSAL:
        i, j = rows.positions[:, None], columns.positions[None, :]
        products = tl.where(j >= i if REVERSED else j <= i, products, 0.0)
    c_block = load_columns(c, columns, first_f, F, acc.shape[1])  # [BN, BF]
    return tl.dot(products.to(c_block.dtype), c_block, acc, input_precision="ieee")


@triton.jit(
    do_not_specialize=[*DO_NOT_SPECIALIZE, "heads_per_group", "group_size", "per_split", "num_splits", "num_tiles"]
)
def refined_projection_product_kernel(
    a,
    b,
    c,
    states,
    out,
    lengths,
    stride_se,
    stride_sf,
    num_heads,
    heads_per_group,
    group_size,
    per_split,
    num_splits,
    num_tiles,
    N,
    boundaries,
    scale,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SEGMENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSED: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """One program: a tile [BLOCK_M, BLOCK_F] of out, of one batch and head, or SUMMED over some that share W.

    acc  = a @ state                                    [BLOCK_M, BLOCK_F], BLOCK_E components at a time
    for each block of BLOCK_N positions in the segment that the rows see:
        acc += mask(a @ b.T) @ c                        [BLOCK_M, BLOCK_N] @ [BLOCK_N, BLOCK_F]
    out  = scale * acc

    Batch-heads that share W are a group: all, or those of one head. SUMMED, a program takes per_split of them, and
    out [num_splits, groups, N, F] has partial sums.
    """
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    tile = tl.program_id(0) % num_tiles
    first_f = tl.program_id(0) // num_tiles % F_BLOCKS * BLOCK_F
    index = tl.program_id(0) // num_tiles // F_BLOCKS
    split, group = index % num_splits, index // num_splits
    first_row = tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    segment = first_row // SEGMENT
    # The blocks of the segment that these rows see.
    first = segment * SEGMENT
    end = tl.minimum(first + SEGMENT, N)
    if CAUSAL and REVERSED:
        first = first_row // BLOCK_N * BLOCK_N
    elif CAUSAL:
        end = tl.minimum(end, first_row + BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)

    first_member = split * per_split
    num_members = tl.minimum(per_split, group_size - first_member)
    if states is not None:
        states = Matrix(states, stride_se, stride_sf)
        for i in range(0, num_members if SUMMED else 1):
            batch = (first_member + i) // heads_per_group
            head = group + (first_member + i) % heads_per_group
            span = token_span(batch, N, lengths)
            first_state = (batch * num_heads + head).to(tl.int64) * boundaries
            acc = add_state(
                acc,
                head_rows(a, span.slab, head, 0),
                states,
                first_state,
                tokens_within(rows, span),
                span,
                segment,
                first_f,
                E,
                F,
                BLOCK_E,
                SEGMENT,
                CAUSAL,
                REVERSED,
            )
    BLOCKS: tl.constexpr = CAUSAL or states is None
    if BLOCKS and SUMMED:
        # One loop over members and blocks, so that the next loads run ahead from member to member.
        num_blocks = tl.cdiv(end - first, BLOCK_N)
        for step in range(0, num_members * num_blocks):
            member = first_member + step // num_blocks
            batch = member // heads_per_group
            head = group + member % heads_per_group
            start = first + step % num_blocks * BLOCK_N
            span = token_span(batch, N, lengths)
            a_rows, b_rows = head_rows(a, span.slab, head, 0), head_rows(b, span.slab, head, 0)
            c_rows, tokens = head_rows(c, span.slab, head, 0), tokens_within(rows, span)
            acc = add_block(
                acc, a_rows, b_rows, c_rows, tokens, start, span, first_f, E, F, BLOCK_N, BLOCK_E, CAUSAL, REVERSED
            )
    elif BLOCKS:
        batch, head = first_member // heads_per_group, first_member % heads_per_group
        span = token_span(batch, N, lengths)
        tokens = tokens_within(rows, span)
        first = tl.maximum(first, span.first // BLOCK_N * BLOCK_N)
        # Rows of padding see nothing.
        end = tl.where(tl.max(tokens.valid.to(tl.int32), 0) > 0, tl.minimum(end, span.end), 0)
        for start in range(first, end, BLOCK_N):
            a_rows, b_rows = head_rows(a, span.slab, head, 0), head_rows(b, span.slab, head, 0)
            c_rows = head_rows(c, span.slab, head, 0)
            acc = add_block(
                acc, a_rows, b_rows, c_rows, tokens, start, span, first_f, E, F, BLOCK_N, BLOCK_E, CAUSAL, REVERSED
            )
    stored = N  # zeros at padding
    if SUMMED:
        out = head_rows(out, split, group, 0)
    else:
        span = token_span(first_member // heads_per_group, N, lengths)
        out = head_rows(out, span.slab, first_member % heads_per_group, 0)
        if lengths.cu_seqlens is not None:
            stored = span.end
    base = out.base + first_f * out.column_stride
    store_rows(base, acc * scale, rows, rows < stored, out.row_stride, out.column_stride, F - first_f, BLOCK_F)

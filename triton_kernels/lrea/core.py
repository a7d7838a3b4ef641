"""LREA's middle factor: a two-layer MLP with tied weights, forward and backward, tile by tile.

    x = scale · targets keysᵀ        y = φ(x W) Wᵀ        out = y values
    x, y [N, r], W [r, L], φ the leaky ReLU, L the length of a history; keys and values are the target's user's

φ(s) = φ'(s) s, so y = J(x) x with J(x) = W diag(φ'(x W)) Wᵀ. J is symmetric, so the backward is the same chain:

    dy = dout valuesᵀ                dx = J(x) dy         dtargets = scale · dx keys

One kernel, which computes rows of the result and loops over the columns of W, is the forward and half of the backward.
The other kernel computes columns of

    dW = Σ_n  x_n ⊗ φ'(x_n W)∘(dy_n W) + dy_n ⊗ φ(x_n W)

and loops over the rows. Both recompute the hidden layer x W in tiles: no tensor [N, L] is in memory. Rows that see
different numbers of columns are sorted by that number where it pays: a block of rows then sees about the same columns,
and a block of columns is seen by the last rows.

Half precision rounds x, dy, and φ and φ'∘(dy W) before they multiply W, so in float16 they must be in its range; sums
are float32. φ' jumps at 0, so the backward adds the hidden layer of x's rounding error: its signs are then float32's.
"""

import triton
import triton.language as tl

from recattn.triton_kernels.common.tiles import Matrix, add_product, load_rows, offset, store_rows
from recattn.triton_kernels.lrea.jagged import (
    count_at_most,
    load_tile,
    locate_targets,
    multiply_by_user,
    order_of,
    store_product,
    store_tile,
)


@triton.jit
def leaky_relu_grad(dhidden, hidden, negative_slope):
    """φ'(hidden) · dhidden. Of hidden itself that is φ(hidden)."""
    return tl.where(hidden > 0, dhidden, negative_slope * dhidden)


@triton.jit
def add_columns(
    acc,
    x_tile,
    x_error_tile,
    dy_tile,
    w,
    stride_w,
    first_column,
    L,
    lengths,
    negative_slope,
    RANK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    W_UNIT: tl.constexpr,
    MASKED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """acc + φ(x W) Wᵀ over a block of columns; with dy acc + (φ'(x W)∘(dy W)) Wᵀ."""
    ranks = tl.arange(0, acc.shape[1])
    columns = first_column + tl.arange(0, BLOCK_N)
    addresses = w + offset(ranks[:, None], stride_w) + columns[None, :]
    if MASKED:
        # W_UNIT columns have one mask, so that they are loaded at once.
        in_w = (ranks < RANK)[:, None] & (columns // W_UNIT < tl.cdiv(L, W_UNIT))[None, :]
        w_tile = tl.load(addresses, mask=in_w, other=0.0)  # [R, BN]
    elif acc.shape[1] > RANK:
        w_tile = tl.load(addresses, mask=(ranks < RANK)[:, None], other=0.0)
    else:
        w_tile = tl.load(addresses)
    hidden = tl.dot(x_tile, w_tile, input_precision="ieee")  # [BM, BN]
    if x_error_tile is not None:
        hidden = tl.dot(x_error_tile, w_tile, hidden, input_precision="ieee")
    dhidden = hidden
    if dy_tile is not None:
        dhidden = tl.dot(dy_tile, w_tile, input_precision="ieee")
    activated = leaky_relu_grad(dhidden, hidden, negative_slope)
    if MASKED and RAGGED:
        activated = tl.where(columns[None, :] < lengths[:, None], activated, 0.0)
    return add_product(acc, activated.to(w_tile.dtype), tl.trans(w_tile))


# A new batch, or a new number for an option, must not compile anew.
@triton.jit(
    do_not_specialize=["T", "U", "H", "L", "w_units", "lhs_scale", "out_scale", "negative_slope", "search_steps"],
)
def lrea_rows_kernel(
    lhs,
    lhs_matrices,
    out_matrices,
    jagged,
    w,
    x,
    dy,
    y,
    out,
    T,
    U,
    H,
    L,
    w_units,
    lhs_scale,
    out_scale,
    negative_slope,
    search_steps,
    LHS_WIDTH: tl.constexpr,
    RANK: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    W_UNIT: tl.constexpr,
    SORTED: tl.constexpr,
):
    """One program: BLOCK_M targets of one head, from one split of W's columns.

    Forward: lhs is targets, its matrices are keys, those of out are values. Backward, if there is a dy: lhs is dout,
    its matrices are values, those of out are keys; y is dx and out dtargets.

    z = lhs_scale · lhs lhs_matricesᵀ                                     [BLOCK_M, R]; stored as x or as dy
    for each BLOCK_N columns of W:                                        W tile [R, BLOCK_N]
        hidden = x W (+ x_error W)                                        [BLOCK_M, BLOCK_N]
        activated = φ(hidden), or φ'(hidden)∘(dy W)                       masked only beyond the shortest row
        y += activated Wᵀ                                                 [BLOCK_M, R]
    out = out_scale · y out_matrices                                      [BLOCK_M, OUT_WIDTH]

    x [parts, T, H, r], where part 1 is its rounding error, dy [T, H, r] and y [splits, T, H, r] are in the order of
    positions. W's rows are w_units · W_UNIT apart, and zero from column L on. Without `out`, each split of y is stored,
    and that is all.
    """
    head = (tl.program_id(0) % H).to(tl.int64)
    block = tl.num_programs(0) // H - 1 - tl.program_id(0) // H  # the longest first
    positions = block * BLOCK_M + tl.arange(0, BLOCK_M)
    if dy is None:
        tile = locate_targets(jagged, positions, T, U, L, search_steps, SORTED)
        store_tile(jagged, tile, positions, T)
        tl.debug_barrier()  # it is read by other threads than those that stored it
    else:
        tile = load_tile(jagged, positions, T)
    valid = positions < T
    # Where the rows of a tile [T, H, r] of one head begin.
    first = head * RANK
    stride_t = H * RANK
    part = tl.cast(T, tl.int64) * stride_t
    BLOCK_Z: tl.constexpr = BLOCK_R if BLOCK_R < 128 else 128  # more ranks at a time would spill
    for first_rank in range(0, RANK, BLOCK_Z):
        z = lhs_scale * multiply_by_user(
            tile,
            order_of(jagged, T),
            U,
            Matrix(lhs.ptr + head * lhs.stride_h, lhs.stride_n, lhs.stride_d),
            tile.targets,
            lhs_matrices.ptr + head * lhs_matrices.stride_h + offset(first_rank, lhs_matrices.stride_n),
            lhs_matrices.stride_b,
            lhs_matrices.stride_d,
            lhs_matrices.stride_n,
            LHS_WIDTH,
            RANK - first_rank,
            BLOCK_D,
            BLOCK_Z,
            SORTED,
        )
        begin = first + first_rank
        if dy is None:
            rounded = z.to(w.dtype.element_ty)
            store_rows(x + begin, rounded, positions, valid, stride_t, 1, RANK - first_rank, BLOCK_Z)
            if rounded.dtype != tl.float32:
                x_error = z - rounded.to(tl.float32)
                store_rows(x + part + begin, x_error, positions, valid, stride_t, 1, RANK - first_rank, BLOCK_Z)
        else:
            store_rows(dy + begin, z, positions, valid, stride_t, 1, RANK - first_rank, BLOCK_Z)
    tl.debug_barrier()  # loaded, they take fewer registers in the loops
    x_tile = load_rows(x + first, positions, valid, stride_t, 1, RANK, BLOCK_R)
    x_error_tile = None
    dy_tile = None
    if dy is not None:
        dy_tile = load_rows(dy + first, positions, valid, stride_t, 1, RANK, BLOCK_R)
        if x_tile.dtype != tl.float32:
            x_error_tile = load_rows(x + part + first, positions, valid, stride_t, 1, RANK, BLOCK_R)

    RAGGED: tl.constexpr = jagged.seq_lens is not None
    end = tl.max(tile.lengths) if RAGGED else L
    # Each split has every so many-th block. It masks from the first that not all rows see whole; unsorted, all.
    first_block, splits = tl.program_id(1), tl.num_programs(1)
    first_masked = first_block
    if SORTED or not RAGGED:
        # Not the minimum of the lengths: Triton sees no alignment in what is computed from a reduction.
        whole_blocks = (tl.load(jagged.plan + block * BLOCK_M) if RAGGED else L) // BLOCK_N
        first_masked += tl.cdiv(tl.maximum(whole_blocks - first_block, 0), splits) * splits
    masked_from, step = first_masked * BLOCK_N, splits * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for masked in tl.static_range(2):
        start = masked_from if masked else first_block * BLOCK_N
        stop = end if masked else tl.minimum(masked_from, end)
        for column in range(start, stop, step):
            acc = add_columns(
                acc,
                x_tile,
                x_error_tile,
                dy_tile,
                w,
                w_units * W_UNIT,
                column,
                L,
                tile.lengths,
                negative_slope,
                RANK,
                BLOCK_N,
                W_UNIT,
                masked,
                RAGGED,
            )
    store_rows(y + tl.program_id(1) * part + first, acc, positions, valid, stride_t, 1, RANK, BLOCK_R)
    if out is not None:
        tl.debug_barrier()  # y is read by other threads than those that stored it
        store_product(
            load_tile(jagged, positions, T),  # again, lest it take registers in the loops
            order_of(jagged, T),
            U,
            y,
            positions,
            out_matrices,
            head,
            out,
            out_scale,
            H,
            RANK,
            OUT_WIDTH,
            BLOCK_K,
            BLOCK_D,
            SORTED,
        )


@triton.jit
def add_rows(
    acc,
    w_tile,
    columns,
    x,
    dy,
    lengths,
    part,
    H,
    first_row,
    stop,
    negative_slope,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASKED: tl.constexpr,
):
    """acc [BN, R] + the gradient of columns of W from a block of rows."""
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = rows < stop
    x_tile = load_rows(x, rows, valid, RANK, 1, RANK, acc.shape[1])  # [BM, R]
    dy_tile = load_rows(dy, rows, valid, RANK, 1, RANK, acc.shape[1])
    hidden = tl.dot(w_tile, tl.trans(x_tile), input_precision="ieee")  # [BN, BM]
    if x_tile.dtype != tl.float32:
        x_error_tile = load_rows(x + part, rows, valid, RANK, 1, RANK, acc.shape[1])
        hidden = tl.dot(w_tile, tl.trans(x_error_tile), hidden, input_precision="ieee")
    dhidden = leaky_relu_grad(tl.dot(w_tile, tl.trans(dy_tile), input_precision="ieee"), hidden, negative_slope)
    activated = leaky_relu_grad(hidden, hidden, negative_slope)
    if MASKED:
        seen = columns[:, None] < tl.load(lengths + rows // H, mask=valid, other=0)[None, :]
        dhidden, activated = tl.where(seen, dhidden, 0.0), tl.where(seen, activated, 0.0)
    acc = add_product(acc, dhidden.to(x_tile.dtype), x_tile)
    return add_product(acc, activated.to(dy_tile.dtype), dy_tile)


@triton.jit(do_not_specialize=["T", "H", "L", "w_units", "negative_slope", "search_steps"])
def lrea_columns_kernel(
    x,
    dy,
    w,
    lengths,
    dw,
    T,
    H,
    L,
    w_units,
    negative_slope,
    search_steps,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    W_UNIT: tl.constexpr,
    SORTED: tl.constexpr,
):
    """One program: BLOCK_N columns of dW, from one split of the rows that see them.

    for each BLOCK_M rows:                                                x, dy tiles [BLOCK_M, R]
        hidden = Wᵀ xᵀ (+ Wᵀ x_errorᵀ)                                    [BLOCK_N, BLOCK_M]
        dhidden = φ'(hidden)∘(Wᵀ dyᵀ);  activated = φ(hidden)             masked only before the first row to see all
        acc += dhidden x + activated dy                                   [BLOCK_N, R]
    dw[split] = accᵀ

    x and dy are those of the rows kernel: N = T H rows. `lengths` [T] says what the rows of a position see, if not all
    of W.
    """
    first_column = tl.program_id(0) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    w_tile = load_rows(w, columns, columns < L, 1, w_units * W_UNIT, RANK, BLOCK_R)  # [BN, R]
    first_row = 0
    first_to_see_all = 0
    if lengths is not None:
        first_to_see_all = T
        if SORTED:
            # Rows ascend by length: those from first_row on see some of these columns, the last of them all.
            first_row = count_at_most(lengths, T, first_column, search_steps) * H
            last_column = tl.minimum(first_column + BLOCK_N, L) - 1
            first_to_see_all = count_at_most(lengths, T, last_column, search_steps)
        first_to_see_all *= H
    N = T * H
    part = tl.cast(N, tl.int64) * RANK
    split_size = tl.cdiv(tl.cdiv(N - first_row, BLOCK_M), tl.num_programs(1)) * BLOCK_M
    start = first_row + tl.program_id(1) * split_size
    stop = tl.minimum(start + split_size, N)
    acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
    if lengths is not None:
        blocks = tl.cdiv(tl.maximum(tl.minimum(first_to_see_all, stop) - start, 0), BLOCK_M)
        masked_until = start + blocks * BLOCK_M
        for row in range(start, masked_until, BLOCK_M):
            acc = add_rows(
                acc, w_tile, columns, x, dy, lengths, part, H, row, stop, negative_slope, RANK, BLOCK_M, True
            )
        start = masked_until
    for row in range(start, stop, BLOCK_M):
        acc = add_rows(acc, w_tile, columns, x, dy, lengths, part, H, row, stop, negative_slope, RANK, BLOCK_M, False)
    split_dw = dw + tl.program_id(1).to(tl.int64) * RANK * L
    store_rows(split_dw, acc, columns, columns < L, 1, L, RANK, BLOCK_R)

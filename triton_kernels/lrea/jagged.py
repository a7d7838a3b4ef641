"""Targets as a jagged batch: user u owns the targets target_offsets[u] up to target_offsets[u + 1].

A tile of targets may be of many users, each with a matrix of its own. The kernels of `core` order the targets by
*position*: as they are given, or by the length of their user's history, which `lrea_sort_users_kernel` prepares.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from recattn.triton_kernels.common.tiles import Matrix, load_rows, offset, store_rows

# Targets that share a matrix product: the fewest that tl.dot takes.
GROUP = tl.constexpr(16)


class Jagged(NamedTuple):
    """The users of the targets as one kernel argument."""

    target_offsets: tl.tensor  # [U + 1]
    seq_lens: tl.tensor  # [U], None if all histories have L columns
    plan: tl.tensor  # int32: the TargetTiles [3, T], and what `lrea_sort_users_kernel` prepares [4, U + 2]


class TargetTile(NamedTuple):
    """The targets at some positions."""

    lengths: tl.tensor  # columns of W that a target sees
    targets: tl.tensor  # its row in the caller's tensors; -1 if there is none
    index: tl.tensor  # ascends with the position and tells users apart; -1 for no user


@triton.jit
def count_at_most(ascending, size, values, search_steps):
    """How many of `size` ascending numbers in memory are at most each value: a binary search."""
    low = values * 0
    high = low + size
    for _ in range(0, search_steps):
        middle = (low + high) // 2
        searching = low < high
        at_most = tl.load(ascending + middle, mask=searching, other=0) <= values
        high = tl.where(searching & (at_most == 0), middle, high)
        low = tl.where(searching & at_most, middle + 1, low)
    return low


@triton.jit
def clamp(x, largest):
    """x between 0 and `largest`, as int32."""
    return tl.minimum(tl.maximum(x, 0), largest).to(tl.int32)


# --- Users by the length of their histories ---


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def load_offsets(jagged, entries, T, U):
    """The first target of each entry, T from U + 2 on; offsets that descend are left to the caller.

    Entry u + 1 is user u. Entry 0 are the targets before the first offset, and U + 1 those behind the last: of no user.
    """
    offsets = tl.load(jagged.target_offsets + entries - 1, mask=(entries >= 1) & (entries <= U + 1), other=0)
    return tl.where(entries <= U + 1, clamp(offsets, T), T)


@triton.jit
def load_lengths(jagged, entries, U, L):
    """Columns that the targets of an entry see."""
    return clamp(tl.load(jagged.seq_lens + entries - 1, mask=(entries >= 1) & (entries <= U), other=0), L)


@triton.jit(do_not_specialize=["T", "U", "L"])
def lrea_sort_users_kernel(jagged, T, U, L, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One program: BLOCK_M entries (`load_offsets`), ranked by length, and how many targets come before theirs.

    for each BLOCK_N others:
        before = other is shorter, or as long and an earlier entry        [BLOCK_M, BLOCK_N]
        rank += Σ before;  start += Σ before · (other's targets)
    order[rank] = entry;  starts[rank] = start;  positions[entry] = start;  firsts[entry] = its first target

    An offset below an earlier one counts as that one: then each target is of one entry, whatever the offsets.
    """
    entries = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lengths = load_lengths(jagged, entries, U, L)
    rank = tl.zeros([BLOCK_M], tl.int32)
    start = tl.zeros([BLOCK_M], tl.int32)
    first_target = tl.zeros([BLOCK_M], tl.int32)
    largest = tl.full((), 0, tl.int32)
    for first in range(0, U + 2, BLOCK_N):
        others = first + tl.arange(0, BLOCK_N)
        offsets = load_offsets(jagged, others, T, U)
        ascending = tl.maximum(tl.associative_scan(offsets, 0, maximum), largest)
        count = tl.maximum(load_offsets(jagged, others + 1, T, U) - ascending, 0)
        largest = tl.maximum(largest, tl.max(offsets))
        other_lengths = load_lengths(jagged, others, U, L)
        shorter = other_lengths[None, :] < lengths[:, None]
        earlier = (other_lengths[None, :] == lengths[:, None]) & (others[None, :] < entries[:, None])
        before = (shorter | earlier) & (others < U + 2)[None, :]
        rank += tl.sum(before.to(tl.int32), 1)
        start += tl.sum(tl.where(before, count[None, :], 0), 1)
        not_later = others[None, :] <= entries[:, None]
        first_target = tl.maximum(first_target, tl.max(tl.where(not_later, offsets[None, :], 0), 1))
    valid = entries < U + 2
    order, starts, positions, firsts = sorted_users(jagged, T, U)
    tl.store(order + rank, entries, mask=valid)
    tl.store(starts + rank, start, mask=valid)
    tl.store(positions + entries, start, mask=valid)
    tl.store(firsts + entries, first_target, mask=valid)


@triton.jit
def sorted_users(jagged, T, U):
    """Where the plan has the entries in the order of lengths, the positions at which their targets start, those by
    entry, and the first target of each entry; U + 2 numbers each."""
    order = order_of(jagged, T)
    return order, order + U + 2, order + 2 * (U + 2), order + 3 * (U + 2)


@triton.jit
def order_of(jagged, T):
    return jagged.plan + tl.cast(T, tl.int64) * 3


@triton.jit
def locate_targets(jagged, positions, T, U, L, search_steps, SORTED: tl.constexpr):
    """The TargetTile at the given positions."""
    valid = positions < T
    if SORTED:
        order, starts, _, firsts = sorted_users(jagged, T, U)
        index = count_at_most(starts, U + 2, positions, search_steps) - 1
        entry = tl.load(order + index, mask=valid, other=0)
        user = entry - 1
        first = tl.load(firsts + entry, mask=valid, other=0)
        targets = first + positions - tl.load(starts + index, mask=valid, other=0)
        has_user = valid & (user >= 0) & (user < U)
    else:
        index = count_at_most(jagged.target_offsets, U, positions, search_steps) - 1
        user = index
        targets = positions
        # Targets before the first offset and behind the last are of no user.
        has_user = valid & (index >= 0) & (positions < tl.load(jagged.target_offsets + U))
    lengths = positions * 0 + L
    if jagged.seq_lens is not None:
        lengths = clamp(tl.load(jagged.seq_lens + user, mask=has_user, other=0), L)
    has_user &= lengths > 0  # else zeros, though the user's keys or values may be NaN
    return TargetTile(lengths, tl.where(valid, targets, -1), tl.where(has_user, index, -1))


@triton.jit
def store_tile(jagged, tile, positions, T):
    """Put a TargetTile into the plan."""
    plan, part = jagged.plan, tl.cast(T, tl.int64)
    tl.store(plan + positions, tile.lengths, mask=positions < T)
    tl.store(plan + part + positions, tile.targets, mask=positions < T)
    tl.store(plan + 2 * part + positions, tile.index, mask=positions < T)


@triton.jit
def load_tile(jagged, positions, T):
    """The TargetTile that the forward put into the plan."""
    plan, part = jagged.plan, tl.cast(T, tl.int64)
    lengths = tl.load(plan + positions, mask=positions < T, other=0)
    targets = tl.load(plan + part + positions, mask=positions < T, other=-1)
    index = tl.load(plan + 2 * part + positions, mask=positions < T, other=-1)
    return TargetTile(lengths, targets, index)


# --- Each target times the matrix of its user ---


@triton.jit
def dot_mixed(a, b, acc):
    """a b + acc. Float32 with half precision is rounded to TF32, whose mantissa is float16's."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")


@triton.jit
def multiply_by_user(
    tile,
    order,
    U,
    x,
    rows,
    matrices,
    stride_u,
    stride_k,
    stride_n,
    K: tl.constexpr,
    width,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SORTED: tl.constexpr,
):
    """x[rows] @ matrices[user of the target]: [tile, BLOCK_N], zeros for targets of no user.

    x is a Matrix of K columns, the matrices have `width`. `order` is that of the plan. Each group of 16 targets goes
    through its own users, all groups at once:

        for each user of the group with most, and each BLOCK_K of K:
            product = x[groups] @ matrices[a user of each group]          [groups, 16, BLOCK_N]
            acc += product where the target is this user's
    """
    GROUPS: tl.constexpr = rows.shape[0] // GROUP
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    rows = tl.reshape(rows, [GROUPS, GROUP])
    index = tl.reshape(tile.index, [GROUPS, GROUP])
    first = tl.min(tl.where(index >= 0, index, 1 << 30), 1)
    last = tl.max(index, 1)
    ns = tl.arange(0, BLOCK_N)
    acc = tl.zeros([GROUPS, GROUP, BLOCK_N], tl.float32)
    for step in tl.range(0, tl.maximum(tl.max(last - first, 0) + 1, 0) * STEPS, num_stages=2):
        current = first + step // STEPS
        known = current <= last
        user = current
        if SORTED:
            user = tl.load(order + current, mask=known, other=0) - 1
            known = known & (user >= 0) & (user < U)
        ks = step % STEPS * BLOCK_K + tl.arange(0, BLOCK_K)
        own = (index == current[:, None])[:, :, None]
        x_addresses = x.base + offset(rows[:, :, None], x.row_stride) + offset(ks[None, None, :], x.column_stride)
        x_tile = tl.load(x_addresses, mask=own & (ks < K)[None, None, :], other=0.0)  # [G, 16, BK]
        addresses = matrices + offset(user[:, None, None], stride_u)
        addresses += offset(ks[None, :, None], stride_k) + offset(ns[None, None, :], stride_n)
        mask = known[:, None, None] & (ks < K)[None, :, None] & (ns < width)[None, None, :]
        matrix = tl.load(addresses, mask=mask, other=0.0)  # [G, BK, BN]
        # Not added before it is masked: 0 times another user's NaN is NaN.
        product = dot_mixed(x_tile, matrix, tl.zeros_like(acc))
        acc += tl.where(own, product, 0.0)
    return tl.reshape(acc, [GROUPS * GROUP, BLOCK_N])


@triton.jit
def store_product(
    tile,
    order,
    U,
    y,
    positions,
    matrices,
    head,
    out,
    scale,
    H,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SORTED: tl.constexpr,
):
    """out[t, head] = scale · y[position of t, head] @ matrices[user of t, head]; y [T, H, RANK], matrices BHND."""
    for first_column in range(0, WIDTH, BLOCK_N):
        product = multiply_by_user(
            tile,
            order,
            U,
            Matrix(y + head * RANK, H * RANK, 1),
            positions,
            matrices.ptr + head * matrices.stride_h + offset(first_column, matrices.stride_d),
            matrices.stride_b,
            matrices.stride_n,
            matrices.stride_d,
            RANK,
            WIDTH - first_column,
            BLOCK_K,
            BLOCK_N,
            SORTED,
        )
        base = out + head * WIDTH + first_column
        store_rows(base, scale * product, tile.targets, tile.targets >= 0, H * WIDTH, 1, WIDTH - first_column, BLOCK_N)


@triton.jit(do_not_specialize=["T", "U", "H", "splits", "out_scale"])
def lrea_reduce_rows_kernel(
    partials,
    out_matrices,
    jagged,
    y,
    out,
    T,
    U,
    H,
    splits,
    out_scale,
    RANK: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SORTED: tl.constexpr,
):
    """One program: BLOCK_M targets of one head, whose rows the rows kernel left in `splits` parts.

    y = Σ partials                                                        [BLOCK_M, R]
    out = out_scale · y out_matrices                                      [BLOCK_M, OUT_WIDTH]
    """
    head = (tl.program_id(0) % H).to(tl.int64)
    positions = tl.program_id(0) // H * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = positions < T
    rows = partials + head * RANK
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for split in range(0, splits):
        split_rows = rows + tl.cast(split, tl.int64) * T * H * RANK
        acc += load_rows(split_rows, positions, valid, H * RANK, 1, RANK, BLOCK_R)
    store_rows(y + head * RANK, acc, positions, valid, H * RANK, 1, RANK, BLOCK_R)
    tl.debug_barrier()  # y is read by other threads than those that stored it
    store_product(
        load_tile(jagged, positions, T),
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
        BLOCK_N,
        SORTED,
    )


# --- Sums of outer products over the targets of a user ---


@triton.jit(do_not_specialize=["T", "U", "H", "scale", "dw_size", "dw_splits"])
def lrea_user_gradients_kernel(
    dx,
    y,
    targets,
    dout,
    jagged,
    dkeys,
    dvalues,
    dw_partials,
    dw,
    T,
    U,
    H,
    scale,
    dw_size,
    dw_splits,
    RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SORTED: tl.constexpr,
):
    """One program: BLOCK_R ranks and BLOCK_N columns of a user's gradients, from one split of its targets.

    for each BLOCK_T targets of the user:
        dkeys += dxᵀ targets                                              [BLOCK_R, BLOCK_N]
        dvalues += yᵀ dout                                                [BLOCK_R, BLOCK_N]
    dkeys[split] = scale · dkeys;  dvalues[split] = dvalues

    Programs behind those of the users: BLOCK_W elements of dw = Σ dw_partials, which has nothing to do with a user but
    saves a launch.
    """
    COLUMNS: tl.constexpr = WIDTH if WIDTH > VALUE_WIDTH else VALUE_WIDTH
    TILES_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    TILES: tl.constexpr = (RANK + BLOCK_R - 1) // BLOCK_R * TILES_N
    user_programs = U * H * TILES
    is_user = tl.program_id(0) < user_programs
    bh = (tl.program_id(0) // TILES).to(tl.int64)
    tile = tl.program_id(0) % TILES
    user, head = bh // H, bh % H
    first_rank, first_column = tile // TILES_N * BLOCK_R, tile % TILES_N * BLOCK_N
    first_target = clamp(tl.load(jagged.target_offsets + user, mask=is_user, other=0), T)
    end = clamp(tl.load(jagged.target_offsets + user + 1, mask=is_user, other=0), T)
    position = first_target
    if SORTED:
        _, _, positions, firsts = sorted_users(jagged, T, U)
        position = tl.load(positions + user + 1, mask=is_user, other=0)
        first_target = tl.load(firsts + user + 1, mask=is_user, other=0)
        end = tl.load(firsts + user + 2, mask=is_user, other=0)
    count = tl.maximum(end - first_target, 0)
    if jagged.seq_lens is not None:
        count = tl.where(tl.load(jagged.seq_lens + user, mask=is_user, other=0) > 0, count, 0)
    split_size = tl.cdiv(tl.cdiv(count, BLOCK_T), tl.num_programs(1)) * BLOCK_T
    start = tl.program_id(1) * split_size
    stop = tl.minimum(start + split_size, count)
    # Positions and targets advance together.
    row_base = offset(position, H * RANK) + head * RANK + first_rank
    target_base = targets.ptr + offset(first_target, targets.stride_n) + head * targets.stride_h
    dout_base = dout.ptr + offset(first_target, dout.stride_n) + head * dout.stride_h
    target_base += offset(first_column, targets.stride_d)
    dout_base += offset(first_column, dout.stride_d)
    acc_keys = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    acc_values = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(start, stop, BLOCK_T):
        rows = first + tl.arange(0, BLOCK_T)
        valid = rows < stop
        dx_tile = load_rows(dx + row_base, rows, valid, H * RANK, 1, RANK - first_rank, BLOCK_R)  # [BT, BR]
        y_tile = load_rows(y + row_base, rows, valid, H * RANK, 1, RANK - first_rank, BLOCK_R)
        target_tile = load_rows(
            target_base, rows, valid, targets.stride_n, targets.stride_d, WIDTH - first_column, BLOCK_N
        )  # [BT, BN]
        dout_tile = load_rows(dout_base, rows, valid, dout.stride_n, dout.stride_d, VALUE_WIDTH - first_column, BLOCK_N)
        acc_keys = dot_mixed(tl.trans(dx_tile), target_tile, acc_keys)
        acc_values = dot_mixed(tl.trans(y_tile), dout_tile, acc_values)
    ranks = tl.arange(0, BLOCK_R)
    valid = (ranks < RANK - first_rank) & is_user
    row = (tl.program_id(1).to(tl.int64) * U * H + bh) * RANK + first_rank
    dkeys_base = dkeys + row * WIDTH + first_column
    store_rows(dkeys_base, scale * acc_keys, ranks, valid, WIDTH, 1, WIDTH - first_column, BLOCK_N)
    dvalues_base = dvalues + row * VALUE_WIDTH + first_column
    store_rows(dvalues_base, acc_values, ranks, valid, VALUE_WIDTH, 1, VALUE_WIDTH - first_column, BLOCK_N)
    if dw is not None:
        first_element = tl.cast(tl.program_id(0) - user_programs, tl.int64) * BLOCK_W
        elements = first_element + tl.arange(0, BLOCK_W)
        mine = (elements >= 0) & (elements < dw_size) & (tl.program_id(1) == 0)
        acc = tl.zeros([BLOCK_W], tl.float32)
        for split in range(0, tl.where(is_user, 0, dw_splits)):
            acc += tl.load(dw_partials + tl.cast(split, tl.int64) * dw_size + elements, mask=mine, other=0.0)
        tl.store(dw + elements, acc.to(dw.dtype.element_ty), mask=mine)

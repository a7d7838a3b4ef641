"""A W for raw attention logits A, without A: causal linear attention with the rows of W for values, and its backward.

With A = mask(scale · Q Kᵀ), zero at future and padded entries, all four products are one form,

    out_i = scale · Σ_j (a_i · b_j) c_j        over j ≤ i, or over j ≥ i

    x    of (q, k, W), j ≤ i                   dq   of (dx, W, k), j ≤ i
    dk   of (W, dx, q), j ≥ i                  dW   of (k, q, dx), j ≥ i, summed over the sequences that share W.

The positions are cut into segments. Inside its segment a tile of rows visits the blocks of b and c as flash attention
does; all that lies before (or behind) the segment is one matrix, Σ_j b_j ⊗ c_j, the state at its boundary. States are
summed in float32 by a kernel that walks each sequence once, and kept in the dtype of the inputs, in which they are
multiplied. x and dq read the same states, and so do dk and dW. So tiles run side by side, and work and memory are
linear in N. Without a causal mask a sequence longer than a segment has one state, of all its tokens, and nothing else.
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
from recattn.triton_kernels.common.launch import ARCHITECTURES, MAX_REGISTERS, architecture_of, launch_kernel, strides
from recattn.triton_kernels.common.ragged import locate_sequence
from recattn.triton_kernels.common.tiles import block_width, dot_rows, load_rows, offset, store_rows

# --- Launch parameters ---


@dataclass(frozen=True)
class RefinedProjectionConfig:
    """Launch parameters of one kernel: rows a tile, rows of b and c a block, components of a and b a dot product,
    columns of c a tile. The kernel of the states has no tile of rows."""

    block_m: int
    block_n: int
    block_e: int
    block_f: int
    num_warps: int
    num_stages: int

    @property
    def launch_options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": MAX_REGISTERS}

    @classmethod
    def of_product(cls, E: int, F: int, dtype: torch.dtype, architecture: int) -> "RefinedProjectionConfig":
        if dtype == torch.float32:
            # On sm_100 Triton takes tiles of 64 rows to the tensor cores, in TF32 whatever precision is asked.
            return cls(32, 32, min(block_width(E), 32), min(block_width(F), 64), num_warps=8, num_stages=2)
        # Components beyond 128 are visited a few at a time.
        block_e = block_width(E) if E <= 128 else 64
        wide = architecture == 80 and max(E, F) > 128
        return cls(64, 64, block_e, min(block_width(F), 128), num_warps=8 if wide else 4, num_stages=2)

    @classmethod
    def of_states(cls, E: int, F: int, dtype: torch.dtype, architecture: int) -> "RefinedProjectionConfig":
        if dtype == torch.float32:
            return cls(0, 32, min(block_width(E), 32), min(block_width(F), 64), num_warps=4, num_stages=2)
        # Few programs where sequences are few: small blocks of the state make more.
        return cls(0, 64, min(block_width(E), 64), min(block_width(F), 64), num_warps=4, num_stages=3)


def segment_length(D: int, P: int) -> int:
    """Positions a segment: as long as the work inside it is about that with the states, a power of two."""
    return max(64, triton.next_power_of_2(2 * D * P // (D + P)))


# Programs that keep a GPU busy: the sequences are split among as many for dW.
_PROGRAMS = 512


# --- The kernels ---


class Planes(NamedTuple):
    """A tensor [B, H, N, ·] in memory."""

    base: tl.tensor
    batch_stride: tl.tensor
    head_stride: tl.tensor
    row_stride: tl.tensor
    column_stride: tl.tensor


class Span(NamedTuple):
    """The positions of a sequence's tokens, first to last + 1."""

    first: tl.tensor
    end: tl.tensor


@triton.jit
def plane_base(x, batch, head):
    return x.base + batch.to(tl.int64) * x.batch_stride + head.to(tl.int64) * x.head_stride


@triton.jit
def token_span(batch, N, seq_lens, left_padded):
    _, length, first = locate_sequence(batch, N, seq_lens, None, left_padded)
    return Span(first, tl.minimum(first + length, N))


@triton.jit
def within(positions, span):
    return (positions >= span.first) & (positions < span.end)


@triton.jit
def load_plane_rows(x, batch, head, positions, valid, first_column, WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """[positions, BLOCK_WIDTH] from first_column on; zeros where a position is not valid."""
    base = plane_base(x, batch, head) + offset(first_column, x.column_stride)
    return load_rows(base, positions, valid, x.row_stride, x.column_stride, WIDTH - first_column, BLOCK_WIDTH)


CHANGING = ["num_heads", "N", "boundaries", "left_padded"]


@triton.jit(do_not_specialize=CHANGING)
def refined_projection_states_kernel(
    b,
    c,
    states,
    seq_lens,
    stride_bb,
    stride_bh,
    stride_bn,
    stride_be,
    stride_cb,
    stride_ch,
    stride_cn,
    stride_cf,
    num_heads,
    N,
    boundaries,
    left_padded,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SEGMENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """A block of Σ_j b_j ⊗ c_j over what lies before (or behind) each boundary; not causal, over everything."""
    E_BLOCKS: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    blocks = tl.program_id(0) % (E_BLOCKS * F_BLOCKS)
    plane = tl.program_id(0) // (E_BLOCKS * F_BLOCKS)
    batch, head = plane // num_heads, plane % num_heads
    first_e = blocks // F_BLOCKS * BLOCK_E
    first_f = blocks % F_BLOCKS * BLOCK_F
    b = Planes(b, stride_bb, stride_bh, stride_bn, stride_be)
    c = Planes(c, stride_cb, stride_ch, stride_cn, stride_cf)
    span = token_span(batch, N, seq_lens, left_padded)
    e = first_e + tl.arange(0, BLOCK_E)
    f = first_f + tl.arange(0, BLOCK_F)
    states += plane.to(tl.int64) * boundaries * E * F + e[:, None] * F + f[None, :]
    inside = (e < E)[:, None] & (f < F)[None, :]

    # What the first segment needs that holds tokens, or the last, is not needed of it.
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
        positions = start + tl.arange(0, BLOCK_N)
        valid = within(positions, span)
        b_block = load_plane_rows(b, batch, head, positions, valid, first_e, E, BLOCK_E)  # [BN, BE]
        c_block = load_plane_rows(c, batch, head, positions, valid, first_f, F, BLOCK_F)  # [BN, BF]
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
    batch,
    head,
    plane,
    rows,
    span,
    segment,
    first_f,
    boundaries,
    stride_se,
    stride_sf,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    SEGMENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """Add a_i times the state of what lies outside the segment."""
    if not CAUSAL:
        boundary = segment * 0
        needed = span.first < span.end
    elif REVERSED:
        boundary = segment
        needed = (segment + 1) * SEGMENT < span.end
    else:
        boundary = segment - 1
        needed = segment * SEGMENT > span.first
    valid = within(rows, span)
    # Nothing was stored for a segment without tokens.
    needed = needed & (tl.max(valid.to(tl.int32), 0) > 0)
    f = first_f + tl.arange(0, BLOCK_F)
    state = states + (plane.to(tl.int64) * boundaries + boundary) * E * F + f[None, :] * stride_sf
    for first_e in range(0, E, BLOCK_E):
        e = first_e + tl.arange(0, BLOCK_E)
        a_block = load_plane_rows(a, batch, head, rows, valid & needed, first_e, E, BLOCK_E)  # [BM, BE]
        inside = (e < E)[:, None] & (f < F)[None, :] & needed
        state_block = tl.load(state + e[:, None] * stride_se, mask=inside, other=0.0)  # [BE, BF]
        acc = tl.dot(a_block, state_block, acc, input_precision="ieee")
    return acc


@triton.jit
def add_block(
    acc,
    a,
    b,
    c,
    batch,
    head,
    rows,
    start,
    span,
    first_f,
    E: tl.constexpr,
    F: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    CAUSAL: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """Add (a_i · b_j) c_j for the block of j at start."""
    columns = start + tl.arange(0, BLOCK_N)
    valid = within(columns, span)
    scores = dot_rows(
        plane_base(a, batch, head),
        rows,
        within(rows, span),
        a.row_stride,
        a.column_stride,
        plane_base(b, batch, head),
        columns,
        valid,
        b.row_stride,
        b.column_stride,
        E,
        BLOCK_E,
    )
    if CAUSAL:
        visible = columns[None, :] >= rows[:, None] if REVERSED else columns[None, :] <= rows[:, None]
        scores = tl.where(visible, scores, 0.0)
    c_block = load_plane_rows(c, batch, head, columns, valid, first_f, F, BLOCK_F)  # [BN, BF]
    return tl.dot(scores.to(c_block.dtype), c_block, acc, input_precision="ieee")


@triton.jit(do_not_specialize=[*CHANGING, "heads_a_group", "members", "members_a_program", "num_programs", "num_tiles"])
def refined_projection_product_kernel(
    a,
    b,
    c,
    states,
    out,
    seq_lens,
    stride_ab,
    stride_ah,
    stride_an,
    stride_ae,
    stride_bb,
    stride_bh,
    stride_bn,
    stride_be,
    stride_cb,
    stride_ch,
    stride_cn,
    stride_cf,
    stride_se,
    stride_sf,
    stride_ob,
    stride_oh,
    stride_on,
    stride_of,
    num_heads,
    heads_a_group,
    members,
    members_a_program,
    num_programs,
    num_tiles,
    N,
    boundaries,
    scale,
    left_padded,
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
    """A tile of rows of one plane (batch entry and head), or summed over some of the planes that share c's gradient.

    Planes that share it are the members of a group: all, or those of one head.
    """
    F_BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    tile = tl.program_id(0) % num_tiles
    first_f = tl.program_id(0) // num_tiles % F_BLOCKS * BLOCK_F
    index = tl.program_id(0) // num_tiles // F_BLOCKS
    program, group = index % num_programs, index // num_programs
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
    a = Planes(a, stride_ab, stride_ah, stride_an, stride_ae)
    b = Planes(b, stride_bb, stride_bh, stride_bn, stride_be)
    c = Planes(c, stride_cb, stride_ch, stride_cn, stride_cf)
    out = Planes(out, stride_ob, stride_oh, stride_on, stride_of)
    acc = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)

    first_member = program * members_a_program
    num_members = tl.minimum(members_a_program, members - first_member)
    if states is not None:
        for i in range(0, num_members):
            batch = (first_member + i) // heads_a_group
            head = group + (first_member + i) % heads_a_group
            span = token_span(batch, N, seq_lens, left_padded)
            acc = add_state(
                acc,
                a,
                states,
                batch,
                head,
                batch * num_heads + head,
                rows,
                span,
                segment,
                first_f,
                boundaries,
                stride_se,
                stride_sf,
                E,
                F,
                BLOCK_E,
                BLOCK_F,
                SEGMENT,
                CAUSAL,
                REVERSED,
            )
    BLOCKS: tl.constexpr = CAUSAL or states is None
    if BLOCKS and SUMMED:
        # One loop over the members and their blocks keeps the loads of the next ahead.
        num_blocks = tl.cdiv(end - first, BLOCK_N)
        for step in range(0, num_members * num_blocks):
            member = first_member + step // num_blocks
            batch = member // heads_a_group
            head = group + member % heads_a_group
            start = first + step % num_blocks * BLOCK_N
            span = token_span(batch, N, seq_lens, left_padded)
            acc = add_block(
                acc, a, b, c, batch, head, rows, start, span, first_f, E, F, BLOCK_N, BLOCK_E, BLOCK_F, CAUSAL, REVERSED
            )
    elif BLOCKS:
        batch, head = first_member // heads_a_group, first_member % heads_a_group
        span = token_span(batch, N, seq_lens, left_padded)
        first = tl.maximum(first, span.first // BLOCK_N * BLOCK_N)
        # Rows of padding see nothing.
        end = tl.where(tl.max(within(rows, span).to(tl.int32), 0) > 0, tl.minimum(end, span.end), 0)
        for start in range(first, end, BLOCK_N):
            acc = add_block(
                acc, a, b, c, batch, head, rows, start, span, first_f, E, F, BLOCK_N, BLOCK_E, BLOCK_F, CAUSAL, REVERSED
            )
    if SUMMED:
        base = plane_base(out, program, group)
    else:
        base = plane_base(out, first_member // heads_a_group, first_member % heads_a_group)
    store_rows(base + first_f * stride_of, acc * scale, rows, rows < N, stride_on, stride_of, F - first_f, BLOCK_F)


# --- Launchers ---


class Order(NamedTuple):
    """What A's mask is."""

    seq_lens: Tensor | None
    causal: bool
    left_padded: bool


def launch_refined_projection_fwd(
    q: Tensor, k: Tensor, w: Tensor, seq_lens: Tensor | None, *, causal: bool, left_padded: bool, scale: float
) -> Tensor:
    """x [B, H, N, P] = A W for A = mask(scale · Q Kᵀ), zero at future and padded entries; zero at padding.

    q, k [B, H, N, D]; w [Nmax, P] or [H, Nmax, P], of which the first N rows are used; any strides.
    """
    order = Order(seq_lens, causal, left_padded)
    w = _per_plane(w, q)
    x = q.new_empty(*q.shape[:3], w.shape[3])
    _launch_product(q, k, w, _launch_states(k, w, order, reversed=False), x, order, scale)
    return x


def launch_refined_projection_bwd(
    dx: Tensor,
    q: Tensor,
    k: Tensor,
    w: Tensor,
    seq_lens: Tensor | None,
    *,
    causal: bool,
    left_padded: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dw from dx, in the dtypes of q, k and w; zero at padding and in the rows of w beyond N.

    The sum over sequences in dw is always taken in the same order.
    """
    order = Order(seq_lens, causal, left_padded)
    dw = w.new_zeros(w.shape)
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    planes = _per_plane(w, q)
    states = _launch_states(k, planes, order, reversed=False)  # [B·H, ., D, P]
    _launch_product(dx, planes, k, None if states is None else states.mT, dq, order, scale)
    del states  # its memory is wanted next
    states = _launch_states(q, dx, order, reversed=True)
    _launch_product(planes, dx, q, None if states is None else states.mT, dk, order, scale, reversed=True)
    shared = w.dim() == 2
    dw[..., : q.shape[2], :] = _launch_summed_product(k, q, dx, states, order, scale, shared)
    return dq, dk, dw


def _per_plane(w: Tensor, q: Tensor) -> Tensor:
    """[Nmax, P] or [H, Nmax, P] -> [B, H, N, P], a view."""
    return w[..., : q.shape[2], :].expand(*q.shape[:3], w.shape[-1])


def _launch_states(b: Tensor, c: Tensor, order: Order, *, reversed: bool) -> Tensor | None:
    """The states at the boundaries between segments, [B·H, ., E, F]; None where there is one segment."""
    B, H, N, E = b.shape
    F = c.shape[3]
    boundaries = (N - 1) // segment_length(E, F)
    if not order.causal:
        boundaries = min(boundaries, 1)
    if b.numel() == 0 or boundaries < 1:
        return None
    states = b.new_empty(B * H, boundaries, E, F)
    config = RefinedProjectionConfig.of_states(E, F, b.dtype, architecture_of(b))
    arguments = _states_arguments(b, c, states, order, reversed, config)
    grid = (B * H * triton.cdiv(E, config.block_e) * triton.cdiv(F, config.block_f),)
    with torch.cuda.device_of(b):
        launch_kernel(refined_projection_states_kernel, grid, arguments, **config.launch_options)
    return states


def _launch_product(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor | None,
    out: Tensor,
    order: Order,
    scale: float,
    *,
    reversed: bool = False,
) -> None:
    if out.numel() == 0:
        return
    B, H, _, E = a.shape
    config = RefinedProjectionConfig.of_product(E, c.shape[3], a.dtype, architecture_of(a))
    members = Members(H, B * H, 1, B * H)
    _launch(a, b, c, states, out, order, scale, members, reversed, False, config)


def _launch_summed_product(
    a: Tensor, b: Tensor, c: Tensor, states: Tensor | None, order: Order, scale: float, shared: bool
) -> Tensor:
    """The product summed over the batch, and over the heads where they share W: float32 [N, F] or [H, N, F]."""
    B, H, N, E = a.shape
    F = c.shape[3]
    groups, size = (1, B * H) if shared else (H, B)
    config = RefinedProjectionConfig.of_product(E, F, a.dtype, architecture_of(a))
    tiles = triton.cdiv(N, config.block_m) * triton.cdiv(F, config.block_f) * groups
    a_program = triton.cdiv(size, min(size, triton.cdiv(_PROGRAMS, max(tiles, 1)))) if size > 0 else 1
    members = Members(H if shared else 1, size, a_program, triton.cdiv(size, a_program))
    shares = a.new_empty(members.programs, groups, N, F, dtype=torch.float32)
    if shares.numel() > 0:
        _launch(a, b, c, states, shares, order, scale, members, True, True, config)
    total = shares.sum(0)
    return total[0] if shared else total


class Members(NamedTuple):
    """The planes of a group, in the order of batch entry and head, and how programs share them out."""

    heads: int  # of the group
    count: int
    a_program: int
    programs: int


def _launch(a, b, c, states, out, order, scale, members, reversed, summed, config) -> None:
    arguments = _product_arguments(a, b, c, states, out, order, scale, members, reversed, summed, config)
    groups = out.shape[1] if summed else 1
    tiles = arguments["num_tiles"] * triton.cdiv(c.shape[3], config.block_f)
    with torch.cuda.device_of(a):
        grid = (tiles * members.programs * groups,)
        launch_kernel(refined_projection_product_kernel, grid, arguments, **config.launch_options)


def _states_arguments(b, c, states, order, reversed, config) -> dict[str, object]:
    return {
        "b": b,
        "c": c,
        "states": states,
        **strides("b", b, "bhne"),
        **strides("c", c, "bhnf"),
        **_shared_arguments(b, c, states, order, reversed, config),
    }


def _product_arguments(a, b, c, states, out, order, scale, members, reversed, summed, config) -> dict[str, object]:
    return {
        "a": a,
        "b": b,
        "c": c,
        "states": states,
        "out": out,
        **strides("a", a, "bhne"),
        **strides("b", b, "bhne"),
        **strides("c", c, "bhnf"),
        **strides("s", None if states is None else states[0, 0], "ef"),
        **strides("o", out, "bhnf"),
        "heads_a_group": members.heads,
        "members": members.count,
        "members_a_program": members.a_program,
        "num_programs": members.programs,
        "num_tiles": triton.cdiv(a.shape[2], config.block_m),
        "scale": scale,
        **_shared_arguments(a, c, states, order, reversed, config),
        "BLOCK_M": config.block_m,
        "SUMMED": summed,
    }


def _shared_arguments(a, c, states, order, reversed, config) -> dict[str, object]:
    _, H, N, E = a.shape
    F = c.shape[3]
    return {
        "seq_lens": order.seq_lens,
        "num_heads": H,
        "N": N,
        "boundaries": 0 if states is None else states.shape[1],
        "left_padded": int(order.left_padded),
        "E": E,
        "F": F,
        "BLOCK_N": config.block_n,
        "BLOCK_E": config.block_e,
        "BLOCK_F": config.block_f,
        "SEGMENT": segment_length(E, F),
        "CAUSAL": order.causal,
        "REVERSED": reversed,
    }


def shipped_configurations() -> Iterator[Compilation]:
    """What is launched for the head dims and dtypes in use, with R = D; the lengths are of no help to alignment."""
    order = Order(torch.empty(2, dtype=torch.int64, device="meta"), causal=True, left_padded=False)
    for architecture, dtype, D in itertools.product(ARCHITECTURES, (torch.float32, torch.bfloat16), (32, 64, 128, 256)):
        q, x = (torch.empty(2, 8, 2000, width, dtype=dtype, device="meta") for width in (D, 2 * D))
        w = torch.empty(2000, 2 * D, dtype=dtype, device="meta").expand_as(x)
        states = torch.empty(16, 4, D, 2 * D, dtype=dtype, device="meta")
        name = f"{str(dtype).removeprefix('torch.')} D={D}"
        config = RefinedProjectionConfig.of_states(D, 2 * D, dtype, architecture)
        for reversed, c in ((False, w), (True, x)):
            arguments = _states_arguments(q, c, states, order, reversed, config)
            yield _compilation(refined_projection_states_kernel, name, architecture, arguments, config)
        one_by_one = Members(8, 16, 1, 16)
        for a, b, c, out, members, reversed in (
            (q, q, w, x, one_by_one, False),
            (x, w, q, q, one_by_one, False),
            (w, x, q, q, one_by_one, True),
            (q, q, x, torch.empty(4, 1, 2000, 2 * D, device="meta"), Members(8, 16, 4, 4), True),
        ):
            E, F = a.shape[3], c.shape[3]
            config = RefinedProjectionConfig.of_product(E, F, dtype, architecture)
            of = (a, b, c, states if E == D else states.mT, out, order, 0.125, members, reversed, out.shape[0] == 4)
            yield _compilation(
                refined_projection_product_kernel, name, architecture, _product_arguments(*of, config), config
            )


def _compilation(kernel, name, architecture, arguments, config) -> Compilation:
    label = f"{name} {arguments['E']}x{arguments['F']}" + " reversed" * arguments["REVERSED"]
    label += " summed" if arguments.get("SUMMED") else ""
    return Compilation.of(kernel, label, architecture, arguments, **config.launch_options)

"""LREA on a CPU.

The restored form never restores: with z = scale · q keysᵀ and y = φ(z W) Wᵀ it is y values, and the middle factor, a
two-layer map of hidden width L that all users share, is computed tile by tile. The backward recomputes its tiles.
`lrea_compress` and `lrea_absorbed_attention` are C++ (csrc/cpu), there when the extension was built.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import leaky_relu, leaky_relu_, pad

from recattn._check import expect_lengths, expect_offsets
from recattn._extension import MISSING
from recattn.ops._library import define
from recattn.ops._ragged import length_buckets

# Rows and columns of a tile of the middle factor: its scores stay in the cache.
_TILE_ROWS, _TILE_COLUMNS = 256, 512
# Elements of the products that the gradient of w_comp sums over users at a time.
_CHUNK_ELEMENTS = 1 << 20


def availability(device: str, op: str = "lrea_absorbed_attention") -> dict[str, str | None]:
    """Why each implementation of `op` cannot run on this device type (None: it can), best first."""
    cpu = None if device == "cpu" else f"the tensors are on {device}"
    if op == "lrea_attention":
        return {"cpu": cpu, "reference": None}
    cpu = cpu or MISSING.get("cpu")
    if op == "lrea_compress":
        return {"cpu": cpu, "reference": None}
    cuda = MISSING.get("cuda", MISSING.get("cpu")) if device == "cuda" else f"the tensors are on {device}"
    if device == "cpu":
        return {"cuda": cuda, "cpu": cpu, "reference": None}
    return {"reference": None, "cuda": cuda, "cpu": cpu}


class LreaAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, targets, keys, values, w_decomp, target_offsets, seq_lens, negative_slope, scale):
        z = lrea_user_matmul(targets, keys.mT, target_offsets) * scale  # [T, H, r]
        y = lrea_middle_factor_fwd(z, w_decomp, target_offsets, seq_lens, negative_slope)
        ctx.save_for_backward(targets, keys, values, w_decomp, target_offsets, seq_lens, z, y)
        ctx.negative_slope, ctx.scale = negative_slope, scale
        return lrea_user_matmul(y, values, target_offsets).to(targets.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        targets, keys, values, w_decomp, offsets, seq_lens, z, y = ctx.saved_tensors
        dvalues = lrea_user_outer(y, dout, offsets)
        dy = lrea_user_matmul(dout, values.mT, offsets)
        dz, dw_decomp = lrea_middle_factor_bwd(dy, z, w_decomp, offsets, seq_lens, ctx.negative_slope)
        dz = dz * ctx.scale
        dkeys = lrea_user_outer(dz, targets, offsets)
        dtargets = lrea_user_matmul(dz, keys, offsets)
        gradients = (gradient.to(targets.dtype) for gradient in (dtargets, dkeys, dvalues, dw_decomp))
        return *gradients, None, None, None, None


class LreaCompress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, behaviors, w_comp, seq_lens):
        ctx.save_for_backward(behaviors, w_comp, seq_lens)
        return torch.ops.recattn.lrea_compress(behaviors, w_comp, seq_lens)

    @staticmethod
    @once_differentiable
    def backward(ctx, dcompressed):
        behaviors, w_comp, seq_lens = ctx.saved_tensors
        dbehaviors = dw_comp = None
        if ctx.needs_input_grad[0]:
            dbehaviors = _compress_bwd_behaviors(dcompressed, w_comp, seq_lens, behaviors.shape[1])
        if ctx.needs_input_grad[1]:
            dw_comp = lrea_compress_bwd_w_comp(dcompressed, behaviors, seq_lens).to(w_comp.dtype)
            dw_comp = pad(dw_comp, (0, 0, 0, w_comp.shape[0] - behaviors.shape[1]))
        return dbehaviors, dw_comp, None


def absorb_values(values: Tensor, w_decomp: Tensor, seq_lens: Tensor | None, negative_slope: float) -> Tensor:
    """φ(W) Wᵀ values_u, W the columns of w_decomp that user u sees: [U, H, r, dv], differentiable."""
    w = w_decomp.to(_accumulate_dtype(w_decomp.dtype))
    weights = leaky_relu(w, negative_slope)
    gram = weights @ w.T if seq_lens is None else _gram_matrices(weights, w, seq_lens).unsqueeze(1)
    return (gram @ values.to(w.dtype)).to(values.dtype)


def _gram_matrices(left: Tensor, right: Tensor, seq_lens: Tensor) -> Tensor:
    """left[:, :n] right[:, :n]ᵀ for each n of seq_lens: [r, L], [r, L], [U] -> [U, r, r].

    Each length extends the next shorter one, so every column is multiplied once, however many users there are.
    """
    lengths, inverse = seq_lens.unique(return_inverse=True)
    gram = left.new_zeros(left.shape[0], right.shape[0])
    grams = []
    for start, end in pairwise([0, *lengths.tolist()]):
        gram = gram + left[:, start:end] @ right[:, start:end].T
        grams.append(gram)
    return torch.stack(grams)[inverse] if grams else gram.expand(0, -1, -1)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- Products of every target with a matrix of its user ---


def _user_matmul(rows: Tensor, matrices: Tensor, target_offsets: Tensor) -> Tensor:
    """out[t, h] = rows[t, h] matrices[user of t, h]: [T, H, k], [U, H, k, n] -> [T, H, n]"""
    expect_offsets("target_offsets", target_offsets, rows.shape[0])
    dtype = _accumulate_dtype(rows.dtype)
    out = rows.new_empty(*rows.shape[:2], matrices.shape[-1], dtype=dtype)
    for bucket in _user_buckets(target_offsets):
        gathered = rows[bucket.positions].to(dtype).transpose(1, 2)  # [b, H, n, k]
        product = gathered @ matrices[bucket.members].to(dtype)
        out[bucket.positions[bucket.valid]] = product.transpose(1, 2)[bucket.valid]
    return out


def _user_outer(left: Tensor, right: Tensor, target_offsets: Tensor) -> Tensor:
    """out[u, h] = Σ left[t, h] ⊗ right[t, h] over the targets of u: [T, H, k], [T, H, n] -> [U, H, k, n]"""
    expect_offsets("target_offsets", target_offsets, left.shape[0])
    dtype = _accumulate_dtype(left.dtype)
    users = target_offsets.shape[0] - 1
    out = left.new_zeros(users, left.shape[1], left.shape[2], right.shape[2], dtype=dtype)
    for bucket in _user_buckets(target_offsets):
        gathered = left[bucket.positions].to(dtype).masked_fill_(~bucket.valid[..., None, None], 0)  # [b, n, H, k]
        out[bucket.members] = gathered.permute(0, 2, 3, 1) @ right[bucket.positions].to(dtype).transpose(1, 2)
    return out


def _user_buckets(target_offsets: Tensor):
    offsets = target_offsets.long()
    return length_buckets(offsets[:-1], offsets.diff())


def _user_matmul_fake(rows, matrices, target_offsets):
    return rows.new_empty(*rows.shape[:2], matrices.shape[-1], dtype=_accumulate_dtype(rows.dtype))


def _user_outer_fake(left, right, target_offsets):
    users = target_offsets.shape[0] - 1
    dtype = _accumulate_dtype(left.dtype)
    return left.new_empty(users, left.shape[1], left.shape[2], right.shape[2], dtype=dtype)


lrea_user_matmul = define(
    "lrea_user_matmul(Tensor rows, Tensor matrices, Tensor target_offsets) -> Tensor",
    cpu=_user_matmul,
    fake=_user_matmul_fake,
)
lrea_user_outer = define(
    "lrea_user_outer(Tensor left, Tensor right, Tensor target_offsets) -> Tensor",
    cpu=_user_outer,
    fake=_user_outer_fake,
)


# --- The middle factor y = φ(z W) Wᵀ ---


class _RowBlock(NamedTuple):
    """Rows of z computed together."""

    members: slice | Tensor
    lengths: Tensor | None  # [n] columns of W that each row sees, descending; None: all
    longest: int

    def columns(self) -> Iterator[tuple[slice, Tensor | None]]:
        """Blocks of columns, and the entries [n, c] that are padding."""
        for start in range(0, self.longest, _TILE_COLUMNS):
            stop = min(start + _TILE_COLUMNS, self.longest)
            padding = None
            if self.lengths is not None and self.lengths[-1] < stop:
                padding = torch.arange(start, stop) >= self.lengths[:, None]
            yield slice(start, stop), padding


def _row_blocks(z: Tensor, length: int, target_offsets: Tensor, seq_lens: Tensor | None) -> Iterator[_RowBlock]:
    """Cut the T·H rows of z; with seq_lens, rows that see similar numbers of columns together."""
    targets, heads, _ = z.shape
    if seq_lens is None:
        for start in range(0, targets * heads, _TILE_ROWS):
            yield _RowBlock(slice(start, start + _TILE_ROWS), None, length)
        return
    expect_lengths("seq_lens", seq_lens, length)
    lengths = seq_lens.long().repeat_interleave(target_offsets.long().diff()).repeat_interleave(heads)
    descending, order = lengths.sort(descending=True, stable=True)
    for members, seen in zip(order.split(_TILE_ROWS), descending.split(_TILE_ROWS), strict=True):
        yield _RowBlock(members, seen, int(seen.max()) if len(seen) else 0)


def _middle_factor_fwd(
    z: Tensor, w_decomp: Tensor, target_offsets: Tensor, seq_lens: Tensor | None, negative_slope: float
) -> Tensor:
    w = w_decomp.to(z.dtype)
    z_rows = z.flatten(0, 1)
    y = z_rows.new_empty(z_rows.shape)
    for block in _row_blocks(z, w.shape[1], target_offsets, seq_lens):
        z_block = z_rows[block.members]  # [n, r]
        y_block = torch.zeros_like(z_block)
        for columns, padding in block.columns():
            weights = leaky_relu_(z_block @ w[:, columns], negative_slope)  # [n, c]
            if padding is not None:
                weights.masked_fill_(padding, 0)
            y_block.addmm_(weights, w[:, columns].T)
        y[block.members] = y_block
    return y.view(z.shape)


def _middle_factor_bwd(
    dy: Tensor,
    z: Tensor,
    w_decomp: Tensor,
    target_offsets: Tensor,
    seq_lens: Tensor | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    w = w_decomp.to(z.dtype)
    z_rows, dy_rows = z.flatten(0, 1), dy.flatten(0, 1)
    dz, dw = z_rows.new_empty(z_rows.shape), w.new_zeros(w.shape)
    for block in _row_blocks(z, w.shape[1], target_offsets, seq_lens):
        z_block, dy_block = z_rows[block.members], dy_rows[block.members]
        dz_block = torch.zeros_like(z_block)
        for columns, padding in block.columns():
            scores = z_block @ w[:, columns]
            dscores = torch.ops.aten.leaky_relu_backward(dy_block @ w[:, columns], scores, negative_slope, False)
            weights = leaky_relu_(scores, negative_slope)
            if padding is not None:
                weights.masked_fill_(padding, 0)
                dscores.masked_fill_(padding, 0)
            dz_block.addmm_(dscores, w[:, columns].T)
            dw[:, columns].addmm_(z_block.T, dscores).addmm_(dy_block.T, weights)
        dz[block.members] = dz_block
    return dz.view(z.shape), dw


def _middle_factor_fwd_fake(z, w_decomp, target_offsets, seq_lens, negative_slope):
    return z.new_empty(z.shape)


def _middle_factor_bwd_fake(dy, z, w_decomp, target_offsets, seq_lens, negative_slope):
    return z.new_empty(z.shape), z.new_empty(w_decomp.shape)


lrea_middle_factor_fwd = define(
    "lrea_middle_factor_fwd(Tensor z, Tensor w_decomp, Tensor target_offsets, Tensor? seq_lens, float negative_slope)"
    " -> Tensor",
    cpu=_middle_factor_fwd,
    fake=_middle_factor_fwd_fake,
)
lrea_middle_factor_bwd = define(
    "lrea_middle_factor_bwd(Tensor dy, Tensor z, Tensor w_decomp, Tensor target_offsets, Tensor? seq_lens,"
    " float negative_slope) -> (Tensor, Tensor)",
    cpu=_middle_factor_bwd,
    fake=_middle_factor_bwd_fake,
)


# --- Compression ---


def _padding(seq_lens: Tensor, length: int) -> Tensor:
    """[U, L, 1], True at padding."""
    return (torch.arange(length, device=seq_lens.device) >= seq_lens[:, None]).unsqueeze(-1)


def _compress_bwd_behaviors(dcompressed: Tensor, w_comp: Tensor, seq_lens: Tensor | None, length: int) -> Tensor:
    """dE = W dC [U, L, d]; allocates nothing else of that size."""
    w = w_comp[:length].expand(dcompressed.shape[0], -1, -1)  # [U, L, r]
    dbehaviors = torch.bmm(w, dcompressed)
    return dbehaviors if seq_lens is None else dbehaviors.masked_fill_(_padding(seq_lens, length), 0)


def _compress_bwd_w_comp(dcompressed: Tensor, behaviors: Tensor, seq_lens: Tensor | None) -> Tensor:
    """dW = Σ E dCᵀ over users [L, r]; the users of a chunk have their products in memory, and E's copy in float32."""
    dtype = _accumulate_dtype(behaviors.dtype)
    _, length, _ = behaviors.shape
    rank = dcompressed.shape[1]
    users = max(1, _CHUNK_ELEMENTS // max(1, length * rank))
    dw_comp = behaviors.new_zeros(length, rank, dtype=dtype)
    for chunk in range(0, behaviors.shape[0], users):
        members = slice(chunk, chunk + users)
        products = behaviors[members].to(dtype) @ dcompressed[members].to(dtype).mT  # [u, L, r]
        if seq_lens is not None:
            products.masked_fill_(_padding(seq_lens[members], length), 0)
        dw_comp += products.sum(0)
    return dw_comp


def _compress_bwd_w_comp_fake(dcompressed, behaviors, seq_lens):
    dtype = _accumulate_dtype(behaviors.dtype)
    return behaviors.new_empty(behaviors.shape[1], dcompressed.shape[1], dtype=dtype)


lrea_compress_bwd_w_comp = define(
    "lrea_compress_bwd_w_comp(Tensor dcompressed, Tensor behaviors, Tensor? seq_lens) -> Tensor",
    cpu=_compress_bwd_w_comp,
    fake=_compress_bwd_w_comp_fake,
)


# --- The operators in C++ ---

if "cpu" not in MISSING:

    @torch.library.register_fake("recattn::lrea_compress")
    def _compress_fake(behaviors, w_comp, seq_lens):
        return behaviors.new_empty(behaviors.shape[0], w_comp.shape[1], behaviors.shape[2])

    @torch.library.register_fake("recattn::lrea_absorbed_attention")
    def _absorbed_fake(targets, state_keys, state_values, slots, target_offsets, negative_slope):
        return targets.new_empty(*targets.shape[:2], state_values.shape[-1])

"""LREA: schemas, autograd, and what runs where.

The restored form never restores: with z = scale · q keysᵀ and y = φ(z W) Wᵀ it is y values, and the middle factor, a
two-layer map of hidden width L that all users share, is computed tile by tile. The backward recomputes its tiles.
On a GPU the kernels of training are Triton's, on a CPU C++ (csrc/cpu) beside PyTorch's products; those of serving are
C++ on both (csrc/cpu, csrc/cuda).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, pad

from recattn import reference
from recattn._check import expect_same_device
from recattn._dispatch import is_transformed
from recattn._extension import MISSING
from recattn.ops._library import as_dtype, define, differentiable_again, is_traced
from recattn.ops._ragged import length_buckets
from recattn.ops.lrea_attention import triton as by_triton

# Elements of the products that the gradient of w_comp sums over users at a time.
_CHUNK_ELEMENTS = 1 << 20
# Targets whose products are summed one after another: few roundings follow one another.
_PART_TARGETS = 32


def availability(
    device: str, op: str = "lrea_absorbed_attention", dtype: torch.dtype | None = None, rank: int = 0
) -> dict[str, str | None]:
    """Why each implementation of `op` cannot run on this device type (None: it can), best first.

    Of Triton's with a dtype and a rank: why not a call with these.
    """
    # Of tensors without values an operator tells the shapes; the reference would read offsets.
    cpu = MISSING.get("cpu") if device in ("cpu", "meta") else f"the tensors are on {device}"
    if op == "lrea_absorbed_attention":
        cuda = MISSING.get("cuda", MISSING.get("cpu")) if device == "cuda" else f"the tensors are on {device}"
        return {"cuda": cuda, "cpu": cpu, "reference": None}
    triton = by_triton.refusal(device, dtype, rank)
    if device == "cpu":  # where Triton's is an interpreter
        return {"cpu": cpu, "reference": None, "triton": triton}
    return {"triton": triton, "cpu": cpu, "reference": None}


def _takes_triton(x: Tensor, path: str) -> bool:
    """What `path` names: "auto" is Triton's on a GPU only, "triton" everywhere."""
    return path == "triton" or x.device.type != "cpu"


class Settings(NamedTuple):
    """What a call of lrea_attention holds besides its tensors."""

    negative_slope: float
    scale: float
    path: str


def _attention_reference(targets, keys, values, w_decomp, target_offsets, seq_lens, settings) -> Tensor:
    options = {"negative_slope": settings.negative_slope, "scale": settings.scale}
    return reference.lrea_attention(targets, keys, values, w_decomp, target_offsets, seq_lens=seq_lens, **options)


class LreaAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, targets, keys, values, w_decomp, target_offsets, seq_lens, settings):
        negative_slope, scale, path = settings
        z = lrea_user_matmul(targets, keys.mT, target_offsets, path) * scale  # [T, H, r]
        y = lrea_middle_factor_fwd(z, w_decomp, target_offsets, seq_lens, negative_slope, path)
        ctx.save_for_backward(targets, keys, values, w_decomp, target_offsets, seq_lens, z, y)
        ctx.options = settings
        return as_dtype(lrea_user_matmul(y, values, target_offsets, path), targets.dtype)

    @staticmethod
    @differentiable_again(_attention_reference)
    def backward(ctx, dout):
        targets, keys, values, w_decomp, offsets, seq_lens, z, y = ctx.saved_tensors
        negative_slope, scale, path = ctx.options
        dvalues = lrea_user_outer(y, dout, offsets, path)
        dy = lrea_user_matmul(dout, values.mT, offsets, path)
        dz, dw_decomp = lrea_middle_factor_bwd(dy, z, w_decomp, offsets, seq_lens, negative_slope, path)
        dz = dz * scale
        dkeys = lrea_user_outer(dz, targets, offsets, path)
        dtargets = lrea_user_matmul(dz, keys, offsets, path)
        gradients = (gradient.to(targets.dtype) for gradient in (dtargets, dkeys, dvalues, dw_decomp))
        return *gradients, None, None, None


def _compress_reference(behaviors, w_comp, seq_lens, _path) -> Tensor:
    return reference.lrea_compress(behaviors, w_comp, seq_lens)


class LreaCompress(torch.autograd.Function):
    @staticmethod
    def forward(ctx, behaviors, w_comp, seq_lens, path):
        ctx.save_for_backward(behaviors, w_comp, seq_lens)
        ctx.options = path
        return lrea_compress_items(behaviors, w_comp, seq_lens, None, path)

    @staticmethod
    @differentiable_again(_compress_reference)
    def backward(ctx, dcompressed):
        behaviors, w_comp, seq_lens = ctx.saved_tensors
        dbehaviors = dw_comp = None
        if ctx.needs_input_grad[0]:
            dbehaviors = lrea_compress_bwd_behaviors(dcompressed, w_comp, seq_lens, behaviors.shape[1], ctx.options)
        if ctx.needs_input_grad[1]:
            dw_comp = lrea_compress_bwd_w_comp(dcompressed, behaviors, seq_lens, ctx.options).to(w_comp.dtype)
            dw_comp = pad(dw_comp, (0, 0, 0, w_comp.shape[0] - behaviors.shape[1]))
        return dbehaviors, dw_comp, None, None


def lrea_compress_items(
    table: Tensor, w_comp: Tensor, seq_lens: Tensor | None, item_ids: Tensor | None, path: str
) -> Tensor:
    """Without a gradient; item_ids None: the table is behaviors [U, L, d]."""
    if _takes_triton(table, path):
        return lrea_compress_fwd(table, w_comp, seq_lens, item_ids)
    return torch.ops.recattn.lrea_compress(table, w_comp, seq_lens, item_ids)


def absorb_values(values: Tensor, w_decomp: Tensor, seq_lens: Tensor | None, negative_slope: float) -> Tensor:
    """φ(W) Wᵀ values_u, W the columns of w_decomp that user u sees: [U, H, r, dv], differentiable."""
    w = w_decomp.to(_accumulate_dtype(w_decomp.dtype))
    weights = leaky_relu(w, negative_slope)
    gram = weights @ w.T if seq_lens is None else _gram_matrices(weights, w, seq_lens).unsqueeze(1)
    return (gram @ values.to(w.dtype)).to(values.dtype)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- The Gram matrices of W's first columns, for absorption ---


def _gram_reference(left, right, seq_lens, _settings) -> Tensor:
    seen = torch.arange(left.shape[1], device=left.device) < seq_lens[:, None]  # [U, L]
    return (left * seen[:, None]) @ right.T


class GramMatrices(torch.autograd.Function):
    """left[:, :n] right[:, :n]ᵀ for each n of seq_lens: [r, L], [r, L], [U] -> [U, r, r]"""

    @staticmethod
    def forward(ctx, left, right, seq_lens, settings):
        ctx.save_for_backward(left, right, seq_lens)
        ctx.options = settings
        return lrea_gram_fwd(left, right, seq_lens)

    @staticmethod
    @differentiable_again(_gram_reference)
    def backward(ctx, dgrams):
        return *lrea_gram_bwd(dgrams, *ctx.saved_tensors), None, None


def _gram_matrices(left: Tensor, right: Tensor, seq_lens: Tensor) -> Tensor:
    if is_transformed():
        return _gram_reference(left, right, seq_lens, None)
    if is_traced(left) or (torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)):
        return GramMatrices.apply(left, right, seq_lens, None)
    return _gram_fwd(left, right, seq_lens)


# Each length extends the next shorter one, so every column is multiplied once, however many users there are.


def _gram_fwd(left: Tensor, right: Tensor, seq_lens: Tensor) -> Tensor:
    lengths, inverse = seq_lens.unique(return_inverse=True)
    gram = left.new_zeros(left.shape[0], right.shape[0])
    grams = gram.expand(len(lengths), -1, -1).contiguous()
    for i, (start, end) in enumerate(pairwise([0, *lengths.tolist()])):
        gram = torch.addmm(gram, left[:, start:end], right[:, start:end].T, out=grams[i])
    return grams[inverse]


def _gram_bwd(dgrams: Tensor, left: Tensor, right: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    lengths, inverse = seq_lens.unique(return_inverse=True)
    dleft, dright = torch.zeros_like(left), torch.zeros_like(right)
    of_length = dgrams.new_zeros(len(lengths), *dgrams.shape[1:]).index_add_(0, inverse, dgrams)
    of_longer = of_length.flip(0).cumsum(0).flip(0)  # and of those as long
    for dgram, (start, end) in zip(of_longer, pairwise([0, *lengths.tolist()]), strict=True):
        dleft[:, start:end] = dgram @ right[:, start:end]
        dright[:, start:end] = dgram.T @ left[:, start:end]
    return dleft, dright


lrea_gram_fwd = define(
    "lrea_gram_fwd(Tensor left, Tensor right, Tensor seq_lens) -> Tensor",
    cpu=_gram_fwd,
    cuda=_gram_fwd,
    fake=lambda left, right, seq_lens: left.new_empty(seq_lens.shape[0], left.shape[0], right.shape[0]),
)
lrea_gram_bwd = define(
    "lrea_gram_bwd(Tensor dgrams, Tensor left, Tensor right, Tensor seq_lens) -> (Tensor, Tensor)",
    cpu=_gram_bwd,
    cuda=_gram_bwd,
    fake=lambda dgrams, left, right, seq_lens: (torch.empty_like(left), torch.empty_like(right)),
)


# --- Products of every target with a matrix of its user ---


def _user_matmul(rows: Tensor, matrices: Tensor, target_offsets: Tensor, path: str = "auto") -> Tensor:
    """out[t, h] = rows[t, h] matrices[user of t, h]: [T, H, k], [U, H, k, n] -> [T, H, n]"""
    if _takes_triton(rows, path):
        return by_triton.user_matmul(rows, matrices, target_offsets)
    dtype = _accumulate_dtype(rows.dtype)
    if count := _even_count(target_offsets):
        by_user = rows.to(dtype).unflatten(0, (-1, count)).transpose(1, 2)  # [U, H, n, k]
        return (by_user @ matrices.to(dtype)).transpose(1, 2).flatten(0, 1).contiguous()
    out = rows.new_empty(*rows.shape[:2], matrices.shape[-1], dtype=dtype)
    for bucket in _user_buckets(target_offsets):
        gathered = rows[bucket.positions].to(dtype).transpose(1, 2)  # [b, H, n, k]
        product = gathered @ matrices[bucket.members].to(dtype)
        out[bucket.positions[bucket.valid]] = product.transpose(1, 2)[bucket.valid]
    return out


def _user_outer(left: Tensor, right: Tensor, target_offsets: Tensor, path: str = "auto") -> Tensor:
    """out[u, h] = Σ left[t, h] ⊗ right[t, h] over the targets of u: [T, H, k], [T, H, n] -> [U, H, k, n]"""
    if _takes_triton(left, path):
        return by_triton.user_outer(left, right, target_offsets)
    dtype = _accumulate_dtype(left.dtype)
    if count := _even_count(target_offsets):
        return _outer_in_parts(*(x.to(dtype).unflatten(0, (-1, count)) for x in (left, right)))
    users = target_offsets.shape[0] - 1
    out = left.new_zeros(users, left.shape[1], left.shape[2], right.shape[2], dtype=dtype)
    for bucket in _user_buckets(target_offsets):
        gathered = left[bucket.positions].to(dtype).masked_fill_(~bucket.valid[..., None, None], 0)  # [b, n, H, k]
        out[bucket.members] = _outer_in_parts(gathered, right[bucket.positions].to(dtype))
    return out


def _outer_in_parts(left: Tensor, right: Tensor) -> Tensor:
    """Σ left[:, t] ⊗ right[:, t]: [U, n, H, k], [U, n, H, m] -> [U, H, k, m]"""
    whole = left.shape[1] - left.shape[1] % _PART_TARGETS
    rest = left[:, whole:].permute(0, 2, 3, 1) @ right[:, whole:].transpose(1, 2)
    if not whole:
        return rest
    left, right = (x[:, :whole].unflatten(1, (-1, _PART_TARGETS)) for x in (left, right))  # [U, parts, 32, H, k]
    return (left.permute(0, 1, 3, 4, 2) @ right.transpose(2, 3)).sum(1) + rest


def _even_count(target_offsets: Tensor) -> int:
    """How many targets every user has; 0: not all as many, or none."""
    counts = target_offsets.diff()
    return int(counts[0]) if counts.numel() and bool((counts == counts[0]).all()) else 0


def _user_buckets(target_offsets: Tensor):
    offsets = target_offsets.long()
    return length_buckets(offsets[:-1], offsets.diff())


def _user_matmul_fake(rows, matrices, target_offsets, path="auto"):
    return rows.new_empty(*rows.shape[:2], matrices.shape[-1], dtype=_accumulate_dtype(rows.dtype))


def _user_outer_fake(left, right, target_offsets, path="auto"):
    users = target_offsets.shape[0] - 1
    dtype = _accumulate_dtype(left.dtype)
    return left.new_empty(users, left.shape[1], left.shape[2], right.shape[2], dtype=dtype)


lrea_user_matmul = define(
    'lrea_user_matmul(Tensor rows, Tensor matrices, Tensor target_offsets, str path="auto") -> Tensor',
    cpu=_user_matmul,
    cuda=_user_matmul,
    fake=_user_matmul_fake,
)
lrea_user_outer = define(
    'lrea_user_outer(Tensor left, Tensor right, Tensor target_offsets, str path="auto") -> Tensor',
    cpu=_user_outer,
    cuda=_user_outer,
    fake=_user_outer_fake,
)


# --- The middle factor y = φ(z W) Wᵀ ---


def _row_lengths(z: Tensor, target_offsets: Tensor, seq_lens: Tensor | None) -> Tensor | None:
    """[T·H] how many columns of W each row of z sees (None: all)."""
    if seq_lens is None:
        return None
    return seq_lens.repeat_interleave(target_offsets.diff()).repeat_interleave(z.shape[1])


def _middle_factor_fwd(
    z: Tensor,
    w_decomp: Tensor,
    target_offsets: Tensor,
    seq_lens: Tensor | None,
    negative_slope: float,
    path: str = "auto",
) -> Tensor:
    if _takes_triton(z, path):
        return by_triton.middle_factor_fwd(z, w_decomp, target_offsets, seq_lens, negative_slope)
    lengths = _row_lengths(z, target_offsets, seq_lens)
    rows_fwd = torch.ops.recattn.lrea_middle_factor_rows_fwd
    return rows_fwd(z.flatten(0, 1), w_decomp.to(z.dtype), lengths, negative_slope).view(z.shape)


def _middle_factor_bwd(
    dy: Tensor,
    z: Tensor,
    w_decomp: Tensor,
    target_offsets: Tensor,
    seq_lens: Tensor | None,
    negative_slope: float,
    path: str = "auto",
) -> tuple[Tensor, Tensor]:
    if _takes_triton(z, path):
        return by_triton.middle_factor_bwd(dy, z, w_decomp, target_offsets, seq_lens, negative_slope)
    lengths = _row_lengths(z, target_offsets, seq_lens)
    rows_bwd = torch.ops.recattn.lrea_middle_factor_rows_bwd
    dz, dw = rows_bwd(dy.flatten(0, 1), z.flatten(0, 1), w_decomp.to(z.dtype), lengths, negative_slope)
    return dz.view(z.shape), dw


def _middle_factor_fwd_fake(z, w_decomp, target_offsets, seq_lens, negative_slope, path="auto"):
    return z.new_empty(z.shape)


def _middle_factor_bwd_fake(dy, z, w_decomp, target_offsets, seq_lens, negative_slope, path="auto"):
    return z.new_empty(z.shape), z.new_empty(w_decomp.shape)


lrea_middle_factor_fwd = define(
    "lrea_middle_factor_fwd(Tensor z, Tensor w_decomp, Tensor target_offsets, Tensor? seq_lens, float negative_slope,"
    ' str path="auto") -> Tensor',
    cpu=_middle_factor_fwd,
    cuda=_middle_factor_fwd,
    fake=_middle_factor_fwd_fake,
)
lrea_middle_factor_bwd = define(
    "lrea_middle_factor_bwd(Tensor dy, Tensor z, Tensor w_decomp, Tensor target_offsets, Tensor? seq_lens,"
    ' float negative_slope, str path="auto") -> (Tensor, Tensor)',
    cpu=_middle_factor_bwd,
    cuda=_middle_factor_bwd,
    fake=_middle_factor_bwd_fake,
)


# --- Compression ---


def _padding(seq_lens: Tensor, length: int) -> Tensor:
    """[U, L, 1], True at padding."""
    return (torch.arange(length, device=seq_lens.device) >= seq_lens[:, None]).unsqueeze(-1)


def _compress_fwd(behaviors: Tensor, w_comp: Tensor, seq_lens: Tensor | None, item_ids: Tensor | None) -> Tensor:
    return by_triton.compress_fwd(behaviors, w_comp, seq_lens, item_ids)


def _compress_bwd_behaviors(
    dcompressed: Tensor, w_comp: Tensor, seq_lens: Tensor | None, length: int, path: str = "auto"
) -> Tensor:
    """dE = W dC [U, L, d]; allocates nothing else of that size."""
    if _takes_triton(dcompressed, path):
        return by_triton.compress_bwd_behaviors(dcompressed, w_comp, seq_lens, length)
    w = w_comp[:length].expand(dcompressed.shape[0], -1, -1)  # [U, L, r]
    dbehaviors = torch.bmm(w, dcompressed)
    return dbehaviors if seq_lens is None else dbehaviors.masked_fill_(_padding(seq_lens, length), 0)


def _compress_bwd_w_comp(dcompressed: Tensor, behaviors: Tensor, seq_lens: Tensor | None, path: str = "auto") -> Tensor:
    """dW = Σ E dCᵀ over users [L, r]; the users of a chunk have their products in memory, and E's copy in float32."""
    if _takes_triton(behaviors, path):
        return by_triton.compress_bwd_w_comp(dcompressed, behaviors, seq_lens)
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


def _compress_fake(behaviors, w_comp, seq_lens, item_ids):
    users = behaviors.shape[0] if item_ids is None else item_ids.shape[0]
    return behaviors.new_empty(users, w_comp.shape[1], behaviors.shape[-1])


def _compress_bwd_behaviors_fake(dcompressed, w_comp, seq_lens, length, path="auto"):
    return dcompressed.new_empty(dcompressed.shape[0], length, dcompressed.shape[2])


def _compress_bwd_w_comp_fake(dcompressed, behaviors, seq_lens, path="auto"):
    dtype = _accumulate_dtype(behaviors.dtype)
    return behaviors.new_empty(behaviors.shape[1], dcompressed.shape[1], dtype=dtype)


# Triton's; that of a CPU is C++.
lrea_compress_fwd = define(
    "lrea_compress_fwd(Tensor behaviors, Tensor w_comp, Tensor? seq_lens, Tensor? item_ids) -> Tensor",
    cpu=_compress_fwd,
    cuda=_compress_fwd,
    fake=_compress_fake,
)
lrea_compress_bwd_behaviors = define(
    "lrea_compress_bwd_behaviors(Tensor dcompressed, Tensor w_comp, Tensor? seq_lens, SymInt length,"
    ' str path="auto") -> Tensor',
    cpu=_compress_bwd_behaviors,
    cuda=_compress_bwd_behaviors,
    fake=_compress_bwd_behaviors_fake,
)
lrea_compress_bwd_w_comp = define(
    'lrea_compress_bwd_w_comp(Tensor dcompressed, Tensor behaviors, Tensor? seq_lens, str path="auto") -> Tensor',
    cpu=_compress_bwd_w_comp,
    cuda=_compress_bwd_w_comp,
    fake=_compress_bwd_w_comp_fake,
)


# --- The operators in C++ ---

if "cpu" not in MISSING:
    torch.library.register_fake("recattn::lrea_compress", _compress_fake)

    @torch.library.register_fake("recattn::lrea_absorbed_attention")
    @torch.library.register_fake("recattn::lrea_absorbed_attention.counting")
    def _absorbed_fake(
        targets,
        state_keys,
        state_values,
        slots,
        target_offsets,
        negative_slope,
        item_ids,
        key_scales,
        value_scales,
        invalid=None,
    ):
        states = {"state_keys": state_keys, "state_values": state_values}
        indices = {"slots": slots, "target_offsets": target_offsets, "item_ids": item_ids, "invalid": invalid}
        expect_same_device("targets", targets, **states, **indices)
        rows = targets.shape[0] if item_ids is None else item_ids.shape[0]
        return targets.new_empty(rows, targets.shape[1], state_values.shape[-1])

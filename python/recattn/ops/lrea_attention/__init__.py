"""LREA: operator schemas, autograd, and which implementation runs.

The restored form never restores. It takes three steps, all in the rank r of the compressed history:

    rank_scores  = scale · targets keysᵀ          jagged_dense_bmm
    rank_weights = φ(rank_scores W) Wᵀ            the middle factor: a two-layer MLP, its hidden layer L wide
    out          = rank_weights values            jagged_dense_bmm

All users share W, and the hidden layer is computed tile by tile; the backward recomputes its tiles. The kernels of
training are Triton's on a GPU, and on a CPU C++ (csrc/cpu) beside PyTorch's matmuls; those of serving are C++ on both.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, pad

from recattn import reference
from recattn._check import expect_same_device
from recattn._dispatch import is_transformed
from recattn._extension import MISSING
from recattn._options import LreaAttentionOptions
from recattn.ops._library import as_dtype, define, differentiable_again, is_traced
from recattn.ops._ragged import length_buckets
from recattn.ops.lrea_attention import triton as by_triton

# The gradient of w_comp sums over as many users at a time as have so many elements.
_CHUNK_ELEMENTS = 1 << 20
# Outer products are summed over so many targets at a time: a long sum in one go would round more often.
_PART_TARGETS = 32


def unsupported_reasons(
    device_type: str, op: str = "lrea_absorbed_attention", dtype: torch.dtype | None = None, rank: int = 0
) -> dict[str, str | None]:
    """Why each implementation of `op` cannot run (None: it can), best first.

    Without dtype and rank: on this type of device. With them: a call with these.
    """
    # Meta tensors may go to an operator, which tells shapes; the reference would read the offsets' values.
    cpu = MISSING.get("cpu") if device_type in ("cpu", "meta") else f"the tensors are on {device_type}"
    if op == "lrea_absorbed_attention":
        missing = MISSING.get("cuda", MISSING.get("cpu"))
        cuda = missing if device_type == "cuda" else f"the tensors are on {device_type}"
        return {"cuda": cuda, "cpu": cpu, "reference": None}
    triton = by_triton.unsupported_reason(device_type, dtype, rank)
    if device_type == "cpu":  # where Triton kernels are interpreted
        return {"cpu": cpu, "reference": None, "triton": triton}
    return {"triton": triton, "cpu": cpu, "reference": None}


def _takes_triton(x: Tensor, path: str) -> bool:
    """`path` "triton" takes Triton everywhere, "auto" on a GPU only."""
    return path == "triton" or x.device.type != "cpu"


# --- Autograd ---


def _attention_reference(targets, keys, values, w_decomp, target_offsets, seq_lens, options) -> Tensor:
    tensors = (targets, keys, values, w_decomp, target_offsets)
    slope, scale = options.negative_slope, options.scale
    return reference.lrea_attention(*tensors, seq_lens=seq_lens, negative_slope=slope, scale=scale)


class LreaAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, targets, keys, values, w_decomp, target_offsets, seq_lens, options: LreaAttentionOptions):
        slope, scale, path = options
        rank_scores = lrea_jagged_dense_bmm(targets, keys.mT, target_offsets, path) * scale  # [T, H, r]
        rank_weights = lrea_middle_factor_fwd(rank_scores, w_decomp, target_offsets, seq_lens, slope, path)
        ctx.save_for_backward(targets, keys, values, w_decomp, target_offsets, seq_lens, rank_scores, rank_weights)
        ctx.options = options
        return as_dtype(lrea_jagged_dense_bmm(rank_weights, values, target_offsets, path), targets.dtype)

    @staticmethod
    @differentiable_again(_attention_reference)
    def backward(ctx, dout):
        targets, keys, values, w_decomp, offsets, seq_lens, rank_scores, rank_weights = ctx.saved_tensors
        slope, scale, path = ctx.options
        dvalues = lrea_jagged_jagged_bmm(rank_weights, dout, offsets, path)
        dweights = lrea_jagged_dense_bmm(dout, values.mT, offsets, path)
        dscores, dw_decomp = lrea_middle_factor_bwd(dweights, rank_scores, w_decomp, offsets, seq_lens, slope, path)
        dscores = dscores * scale
        dkeys = lrea_jagged_jagged_bmm(dscores, targets, offsets, path)
        dtargets = lrea_jagged_dense_bmm(dscores, keys, offsets, path)
        gradients = (gradient.to(targets.dtype) for gradient in (dtargets, dkeys, dvalues, dw_decomp))
        return *gradients, None, None, None


def _compress_reference(behaviors, w_comp, seq_lens, _path) -> Tensor:
    return reference.lrea_compress(behaviors, w_comp, seq_lens)


class LreaCompressFunction(torch.autograd.Function):
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
    """lrea_compress without a gradient. item_ids None: the table is behaviors [U, L, d]."""
    if _takes_triton(table, path):
        return lrea_compress_fwd(table, w_comp, seq_lens, item_ids)
    return torch.ops.recattn.lrea_compress(table, w_comp, seq_lens, item_ids)


def absorb_values(values: Tensor, w_decomp: Tensor, seq_lens: Tensor | None, negative_slope: float) -> Tensor:
    """φ(W) Wᵀ values_u with the columns W of w_decomp that user u sees: [U, H, r, dv], differentiable."""
    w = w_decomp.to(_accumulate_dtype(w_decomp.dtype))
    weights = leaky_relu(w, negative_slope)
    gram = weights @ w.T if seq_lens is None else _gram_matrices(weights, w, seq_lens).unsqueeze(1)
    return (gram @ values.to(w.dtype)).to(values.dtype)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# --- The Gram matrices of W's first columns, for absorption ---


def _gram_reference(lhs, rhs, seq_lens, _options) -> Tensor:
    seen = torch.arange(lhs.shape[1], device=lhs.device) < seq_lens[:, None]  # [U, L]
    return (lhs * seen[:, None]) @ rhs.T


class GramMatricesFunction(torch.autograd.Function):
    """lhs[:, :n] rhs[:, :n]ᵀ for each n of seq_lens: [r, L], [r, L], [U] -> [U, r, r]"""

    @staticmethod
    def forward(ctx, lhs, rhs, seq_lens, options):
        ctx.save_for_backward(lhs, rhs, seq_lens)
        ctx.options = options
        return lrea_gram_fwd(lhs, rhs, seq_lens)

    @staticmethod
    @differentiable_again(_gram_reference)
    def backward(ctx, dgrams):
        return *lrea_gram_bwd(dgrams, *ctx.saved_tensors), None, None


def _gram_matrices(lhs: Tensor, rhs: Tensor, seq_lens: Tensor) -> Tensor:
    if is_transformed():
        return _gram_reference(lhs, rhs, seq_lens, None)
    if is_traced(lhs) or (torch.is_grad_enabled() and (lhs.requires_grad or rhs.requires_grad)):
        return GramMatricesFunction.apply(lhs, rhs, seq_lens, None)
    return _gram_fwd(lhs, rhs, seq_lens)


# A length's Gram matrix is that of the next shorter length plus the columns between: each column is multiplied once.


def _gram_fwd(lhs: Tensor, rhs: Tensor, seq_lens: Tensor) -> Tensor:
    lengths, inverse = seq_lens.unique(return_inverse=True)
    gram = lhs.new_zeros(lhs.shape[0], rhs.shape[0])
    grams = gram.expand(len(lengths), -1, -1).contiguous()
    for i, (start, end) in enumerate(pairwise([0, *lengths.tolist()])):
        gram = torch.addmm(gram, lhs[:, start:end], rhs[:, start:end].T, out=grams[i])
    return grams[inverse]


def _gram_bwd(dgrams: Tensor, lhs: Tensor, rhs: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    lengths, inverse = seq_lens.unique(return_inverse=True)
    dlhs, drhs = torch.zeros_like(lhs), torch.zeros_like(rhs)
    by_length = dgrams.new_zeros(len(lengths), *dgrams.shape[1:]).index_add_(0, inverse, dgrams)
    of_as_long_or_longer = by_length.flip(0).cumsum(0).flip(0)
    for dgram, (start, end) in zip(of_as_long_or_longer, pairwise([0, *lengths.tolist()]), strict=True):
        dlhs[:, start:end] = dgram @ rhs[:, start:end]
        drhs[:, start:end] = dgram.T @ lhs[:, start:end]
    return dlhs, drhs


lrea_gram_fwd = define(
    "lrea_gram_fwd(Tensor lhs, Tensor rhs, Tensor seq_lens) -> Tensor",
    cpu=_gram_fwd,
    cuda=_gram_fwd,
    fake=lambda lhs, rhs, seq_lens: lhs.new_empty(seq_lens.shape[0], lhs.shape[0], rhs.shape[0]),
)
lrea_gram_bwd = define(
    "lrea_gram_bwd(Tensor dgrams, Tensor lhs, Tensor rhs, Tensor seq_lens) -> (Tensor, Tensor)",
    cpu=_gram_bwd,
    cuda=_gram_bwd,
    fake=lambda dgrams, lhs, rhs, seq_lens: (torch.empty_like(lhs), torch.empty_like(rhs)),
)


# --- Products by user: targets as a jagged batch ---


def _jagged_dense_bmm(x: Tensor, y: Tensor, target_offsets: Tensor, path: str = "auto") -> Tensor:
    """out[t, h] = x[t, h] @ y[user of t, h]: [T, H, k], [U, H, k, n] -> [T, H, n]"""
    if _takes_triton(x, path):
        return by_triton.jagged_dense_bmm(x, y, target_offsets)
    dtype = _accumulate_dtype(x.dtype)
    if count := _even_count(target_offsets):
        by_user = x.to(dtype).unflatten(0, (-1, count)).transpose(1, 2)  # [U, H, n, k]
        return (by_user @ y.to(dtype)).transpose(1, 2).flatten(0, 1).contiguous()
    out = x.new_empty(*x.shape[:2], y.shape[-1], dtype=dtype)
    for bucket in _user_buckets(target_offsets):
        gathered = x[bucket.positions].to(dtype).transpose(1, 2)  # [b, H, n, k]
        product = gathered @ y[bucket.members].to(dtype)
        out[bucket.positions[bucket.valid]] = product.transpose(1, 2)[bucket.valid]
    return out


def _jagged_jagged_bmm(x: Tensor, y: Tensor, target_offsets: Tensor, path: str = "auto") -> Tensor:
    """out[u, h] = Σ x[t, h] ⊗ y[t, h] over the targets of u: [T, H, k], [T, H, n] -> [U, H, k, n]"""
    if _takes_triton(x, path):
        return by_triton.jagged_jagged_bmm(x, y, target_offsets)
    dtype = _accumulate_dtype(x.dtype)
    if count := _even_count(target_offsets):
        return _outer_sum(*(tensor.to(dtype).unflatten(0, (-1, count)) for tensor in (x, y)))
    users = target_offsets.shape[0] - 1
    out = x.new_zeros(users, x.shape[1], x.shape[2], y.shape[2], dtype=dtype)
    for bucket in _user_buckets(target_offsets):
        gathered = x[bucket.positions].to(dtype).masked_fill_(~bucket.valid[..., None, None], 0)  # [b, n, H, k]
        out[bucket.members] = _outer_sum(gathered, y[bucket.positions].to(dtype))
    return out


def _outer_sum(x: Tensor, y: Tensor) -> Tensor:
    """Σ x[:, t] ⊗ y[:, t]: [U, n, H, k], [U, n, H, m] -> [U, H, k, m]; in parts of _PART_TARGETS."""
    whole = x.shape[1] - x.shape[1] % _PART_TARGETS
    remainder = x[:, whole:].permute(0, 2, 3, 1) @ y[:, whole:].transpose(1, 2)
    if not whole:
        return remainder
    x, y = (tensor[:, :whole].unflatten(1, (-1, _PART_TARGETS)) for tensor in (x, y))  # [U, parts, 32, H, k]
    return (x.permute(0, 1, 3, 4, 2) @ y.transpose(2, 3)).sum(1) + remainder


def _even_count(target_offsets: Tensor) -> int:
    """How many targets every user has; 0 where the numbers differ, or there are no users."""
    counts = target_offsets.diff()
    return int(counts[0]) if counts.numel() and bool((counts == counts[0]).all()) else 0


def _user_buckets(target_offsets: Tensor):
    offsets = target_offsets.long()
    return length_buckets(offsets[:-1], offsets.diff())


def _jagged_dense_bmm_fake(x, y, target_offsets, path="auto"):
    return x.new_empty(*x.shape[:2], y.shape[-1], dtype=_accumulate_dtype(x.dtype))


def _jagged_jagged_bmm_fake(x, y, target_offsets, path="auto"):
    users = target_offsets.shape[0] - 1
    return x.new_empty(users, x.shape[1], x.shape[2], y.shape[2], dtype=_accumulate_dtype(x.dtype))


lrea_jagged_dense_bmm = define(
    'lrea_jagged_dense_bmm(Tensor x, Tensor y, Tensor target_offsets, str path="auto") -> Tensor',
    cpu=_jagged_dense_bmm,
    cuda=_jagged_dense_bmm,
    fake=_jagged_dense_bmm_fake,
)
lrea_jagged_jagged_bmm = define(
    'lrea_jagged_jagged_bmm(Tensor x, Tensor y, Tensor target_offsets, str path="auto") -> Tensor',
    cpu=_jagged_jagged_bmm,
    cuda=_jagged_jagged_bmm,
    fake=_jagged_jagged_bmm_fake,
)


# --- The middle factor: φ(x W) Wᵀ of x [T, H, r], W = w_decomp [r, L] ---


def _row_lengths(x: Tensor, target_offsets: Tensor, seq_lens: Tensor | None) -> Tensor | None:
    """[T·H] how many columns of W each row of x sees (None: all)."""
    if seq_lens is None:
        return None
    return seq_lens.repeat_interleave(target_offsets.diff()).repeat_interleave(x.shape[1])


def _middle_factor_fwd(x, w_decomp, target_offsets, seq_lens, negative_slope, path="auto") -> Tensor:
    if _takes_triton(x, path):
        return by_triton.middle_factor_fwd(x, w_decomp, target_offsets, seq_lens, negative_slope)
    lengths = _row_lengths(x, target_offsets, seq_lens)
    rows_fwd = torch.ops.recattn.lrea_middle_factor_rows_fwd
    return rows_fwd(x.flatten(0, 1), w_decomp.to(x.dtype), lengths, negative_slope).view(x.shape)


def _middle_factor_bwd(
    dout, x, w_decomp, target_offsets, seq_lens, negative_slope, path="auto"
) -> tuple[Tensor, Tensor]:
    """dx and dw_decomp."""
    if _takes_triton(x, path):
        return by_triton.middle_factor_bwd(dout, x, w_decomp, target_offsets, seq_lens, negative_slope)
    lengths = _row_lengths(x, target_offsets, seq_lens)
    rows_bwd = torch.ops.recattn.lrea_middle_factor_rows_bwd
    dx, dw = rows_bwd(dout.flatten(0, 1), x.flatten(0, 1), w_decomp.to(x.dtype), lengths, negative_slope)
    return dx.view(x.shape), dw


def _middle_factor_fwd_fake(x, w_decomp, target_offsets, seq_lens, negative_slope, path="auto"):
    return x.new_empty(x.shape)


def _middle_factor_bwd_fake(dout, x, w_decomp, target_offsets, seq_lens, negative_slope, path="auto"):
    return x.new_empty(x.shape), x.new_empty(w_decomp.shape)


_MIDDLE_FACTOR = (
    'Tensor x, Tensor w_decomp, Tensor target_offsets, Tensor? seq_lens, float negative_slope, str path="auto"'
)
lrea_middle_factor_fwd = define(
    f"lrea_middle_factor_fwd({_MIDDLE_FACTOR}) -> Tensor",
    cpu=_middle_factor_fwd,
    cuda=_middle_factor_fwd,
    fake=_middle_factor_fwd_fake,
)
lrea_middle_factor_bwd = define(
    f"lrea_middle_factor_bwd(Tensor dout, {_MIDDLE_FACTOR}) -> (Tensor, Tensor)",
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
    """dE = W dC [U, L, d], which is the only tensor of that size."""
    if _takes_triton(dcompressed, path):
        return by_triton.compress_bwd_behaviors(dcompressed, w_comp, seq_lens, length)
    w = w_comp[:length].expand(dcompressed.shape[0], -1, -1)  # [U, L, r]
    dbehaviors = torch.bmm(w, dcompressed)
    return dbehaviors if seq_lens is None else dbehaviors.masked_fill_(_padding(seq_lens, length), 0)


def _compress_bwd_w_comp(dcompressed: Tensor, behaviors: Tensor, seq_lens: Tensor | None, path: str = "auto") -> Tensor:
    """dW = Σ E dCᵀ over users [L, r]. In memory are a chunk of users' products, and E in float32."""
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


# Triton's. The C++ operator is recattn::lrea_compress.
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

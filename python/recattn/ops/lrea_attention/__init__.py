"""LREA: operator schemas, autograd, and which implementation runs.

The restored form never restores. It takes three steps, all in the rank r of the compressed history:

    x   = scale · targets keysᵀ
    y   = φ(x W) Wᵀ                    the middle factor: a two-layer MLP, its hidden layer L wide
    out = y values

All users share W, and the hidden layer is computed tile by tile; the backward recomputes its tiles. The kernels of
training are Triton's on a GPU and C++ (csrc/cpu) on a CPU; those of serving are C++ on both.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from recattn import reference
from recattn._check import expect_same_device
from recattn._dispatch import transform_unsupported_reason
from recattn._extension import MISSING
from recattn._options import LreaAttentionOptions, LreaCompressOptions
from recattn.ops._fallback import or_reference
from recattn.ops._library import apply, define, differentiable_again
from recattn.ops._support import resolve_scale
from recattn.ops.lrea_attention import triton as by_triton


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
        tensors = (targets, keys, values, w_decomp, target_offsets, seq_lens)
        if _takes_triton(targets, path):
            scale = resolve_scale(scale, targets.shape[2])
            out, *saved = by_triton.lrea_attention_fwd(*tensors, slope, scale)
        else:
            out, *saved = torch.ops.recattn.lrea_restored_fwd.default(*tensors, slope, scale)
        ctx.save_for_backward(*tensors, *saved)
        ctx.options = options
        return out

    @staticmethod
    @differentiable_again(_attention_reference)
    def backward(ctx, dout):
        saved = ctx.saved_tensors  # read once: checkpointing allows no more
        slope, scale, path = ctx.options
        targets = saved[0]
        if _takes_triton(targets, path):
            scale = resolve_scale(scale, targets.shape[2])
            gradients = by_triton.lrea_attention_bwd(dout, *saved, slope, scale)
        else:
            gradients = torch.ops.recattn.lrea_restored_bwd.default(dout, *saved, slope, scale)
        return *gradients, None, None, None


def _compress_reference(behaviors, w_comp, seq_lens, cu_seqlens, _options) -> Tensor:
    return reference.lrea_compress(behaviors, w_comp, seq_lens, cu_seqlens=cu_seqlens)


class LreaCompressFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, behaviors, w_comp, seq_lens, cu_seqlens, options: LreaCompressOptions):
        ctx.save_for_backward(behaviors, w_comp, seq_lens, cu_seqlens)
        ctx.options = options
        return lrea_compress_items(behaviors, w_comp, seq_lens, cu_seqlens, None, options)

    @staticmethod
    @differentiable_again(_compress_reference)
    def backward(ctx, dcompressed):
        behaviors, w_comp, *lengths = ctx.saved_tensors
        max_seqlen, path = ctx.options
        wants_dbehaviors, wants_dw_comp, *_ = ctx.needs_input_grad
        dbehaviors = dw_comp = None
        if not _takes_triton(behaviors, path):
            gradients = torch.ops.recattn.lrea_compress_bwd.default(
                dcompressed, behaviors, w_comp, *lengths, wants_dbehaviors, wants_dw_comp
            )
            wanted = zip(gradients, (wants_dbehaviors, wants_dw_comp), strict=True)
            dbehaviors, dw_comp = (x if wants else None for x, wants in wanted)
        else:
            if wants_dbehaviors:
                num_rows = behaviors.shape[-2]
                dbehaviors = lrea_compress_bwd_behaviors(dcompressed, w_comp, *lengths, num_rows, max_seqlen)
            if wants_dw_comp:
                dw_comp = lrea_compress_bwd_w_comp(dcompressed, behaviors, *lengths, w_comp.shape[0], max_seqlen)
        return dbehaviors, dw_comp, None, None, None


def lrea_compress_items(
    table: Tensor,
    w_comp: Tensor,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    item_ids: Tensor | None,
    options: LreaCompressOptions,
) -> Tensor:
    """lrea_compress without a gradient. item_ids None: the table is behaviors [U, L, d], or packed [T, d]."""
    tensors = (table, w_comp, seq_lens, cu_seqlens, item_ids)
    if _takes_triton(table, options.path):
        return lrea_compress_fwd(*tensors, options.max_seqlen)
    return torch.ops.recattn.lrea_compress.default(*tensors)


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
    if transform_unsupported_reason():
        return _gram_reference(lhs, rhs, seq_lens, None)
    return apply(GramMatricesFunction, lhs, rhs, seq_lens, None)


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


# --- Compression ---


# Triton's. The C++ operators are recattn::lrea_compress and lrea_compress_bwd.
_LENGTHS = "Tensor? seq_lens, Tensor? cu_seqlens"
lrea_compress_fwd = define(
    f"lrea_compress_fwd(Tensor behaviors, Tensor w_comp, {_LENGTHS}, Tensor? item_ids, SymInt? max_seqlen) -> Tensor",
    cpu=by_triton.compress_fwd,
    cuda=by_triton.compress_fwd,
    fake=by_triton.compress_fake,
)
# dE = W dC, [U, num_rows, d], or packed [num_rows, d]
lrea_compress_bwd_behaviors = define(
    f"lrea_compress_bwd_behaviors(Tensor dcompressed, Tensor w_comp, {_LENGTHS}, SymInt num_rows, SymInt? max_seqlen)"
    " -> Tensor",
    cpu=by_triton.compress_bwd_behaviors,
    cuda=by_triton.compress_bwd_behaviors,
    fake=by_triton.compress_bwd_behaviors_fake,
)
# dW = Σ E dCᵀ over the users, [longest, r]
lrea_compress_bwd_w_comp = define(
    f"lrea_compress_bwd_w_comp(Tensor dcompressed, Tensor behaviors, {_LENGTHS}, SymInt longest, SymInt? max_seqlen)"
    " -> Tensor",
    cpu=by_triton.compress_bwd_w_comp,
    cuda=by_triton.compress_bwd_w_comp,
    fake=by_triton.compress_bwd_w_comp_fake,
)


# --- The operators in C++ ---


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


def _absorbed_by_reference(
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
) -> Tensor:
    return reference.lrea_absorbed_attention(
        targets,
        state_keys,
        state_values,
        slots,
        target_offsets,
        item_ids=item_ids,
        key_scales=key_scales,
        value_scales=value_scales,
        negative_slope=negative_slope,
        invalid=invalid,
    )


def absorbed_attention(*arguments) -> Tensor:
    """The operator, with the arguments of its schema: the last, `invalid`, may be left out."""
    operator = torch.ops.recattn.lrea_absorbed_attention
    return (operator.default if len(arguments) == 9 else operator.counting)(*arguments)


absorbed_attention_or_reference = or_reference("lrea_absorbed_attention", _absorbed_by_reference, like=_absorbed_fake)(
    absorbed_attention
)

if "cpu" not in MISSING:
    torch.library.register_fake("recattn::lrea_compress", by_triton.compress_fake)

    @torch.library.register_fake("recattn::lrea_compress_bwd")
    def _compress_bwd_fake(dcompressed, behaviors, w_comp, seq_lens, cu_seqlens, wants_dbehaviors, wants_dw_comp):
        wanted = ((behaviors, wants_dbehaviors), (w_comp, wants_dw_comp))
        return tuple(x.new_empty(x.shape if wants else (0,)) for x, wants in wanted)

    @torch.library.register_fake("recattn::lrea_restored_fwd")
    def _restored_fwd_fake(targets, keys, values, w_decomp, target_offsets, seq_lens, negative_slope, scale):
        rank_scores = targets.new_empty(*targets.shape[:2], w_decomp.shape[0], dtype=_accumulate_dtype(targets.dtype))
        return targets.new_empty(*targets.shape[:2], values.shape[-1]), rank_scores, torch.empty_like(rank_scores)

    @torch.library.register_fake("recattn::lrea_restored_bwd")
    def _restored_bwd_fake(dout, targets, keys, values, w_decomp, *_):
        return tuple(x.new_empty(x.shape) for x in (targets, keys, values, w_decomp))

    torch.library.register_fake("recattn::lrea_absorbed_attention", _absorbed_fake)
    torch.library.register_fake("recattn::lrea_absorbed_attention.counting", _absorbed_fake)

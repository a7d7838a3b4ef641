"""refined_attention of any length by Triton kernels, "simple" and "stochastic", in memory linear in N.

    x = A [W_q | W_k]          source "logits": linear attention; "weights": plain attention with W as values
    out = softmax(mask(M)) V   plain attention with the halves of x as queries and keys ("stochastic": after mapping
                               each token to a vector)

Plain attention is sink_attention without sinks.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor

from recattn._options import RefinedAttentionOptions, SinkAttentionOptions, WassersteinAttentionOptions
from recattn.ops._fallback import or_reference, or_reference_gradients
from recattn.ops._library import apply, define, differentiable_again
from recattn.ops._support import (
    length_bound,
    resolve_scale,
    sequence_indices,
    token_positions,
    triton_kernels,
    triton_unsupported_reason,
)
from recattn.ops.refined_attention.chunked import gaussians, gaussians_backward
from recattn.ops.sink_attention import MAX_HEAD_DIM, SinkAttentionFunction, no_sinks
from recattn.reference.sink_attention import valid_tokens, visible_pairs
from recattn.reference.wasserstein_attention import attention_matrix, centre_


def unsupported_reason(q: Tensor, v: Tensor, w_q: Tensor, mechanism: str) -> str | None:
    """Why these kernels cannot serve a call (None: they can)."""
    if mechanism not in ("simple", "stochastic"):
        return f"its kernels hold M a tile at a time, and mechanism={mechanism!r} needs whole rows"
    if q.dtype == torch.float64:
        return "its kernels compute in float32, and q is float64"
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM:
        return f"its kernels hold head dims up to {MAX_HEAD_DIM}, and q or v has {max(q.shape[-1], v.shape[-1])}"
    widest = MAX_HEAD_DIM if mechanism == "simple" else MAX_HEAD_DIM - 2
    if w_q.shape[-1] > widest:
        return f"its kernels hold up to {widest} columns of w_q, and there are {w_q.shape[-1]}"
    return triton_unsupported_reason(q.device.type, q.dtype)


# Of a call: seq_lens, seq_starts, cu_seqlens.
LengthTensors = tuple[Tensor | None, Tensor | None, Tensor | None]


def refined_attention(q, k, v, w_q, w_k, lengths: LengthTensors, dropout_seed, options) -> Tensor:
    """`options.impl` is that of sink_attention."""
    options = options._replace(max_seqlen=_max_seqlen(q, w_q, lengths, options))
    x_q, x_k = _halves(_projections(q, k, w_q, w_k, lengths, options))
    width = w_q.shape[-1]
    if options.mechanism == "simple":  # the columns of zeros change no product
        return _attend(x_q, x_k, v, lengths, options, 1 / math.sqrt(width), dropout_seed, options.dropout_p)
    queries, keys = apply(GaussianVectorsFunction, x_q[..., :width], x_k[..., :width], lengths[0], lengths[2])
    # -W²/√R = 2 (g_i·g_j - ‖g_j‖²/2)/√R, up to the query's own term, which changes no softmax.
    return _attend(queries, keys, v, lengths, options, 2 / math.sqrt(width // 2), dropout_seed, options.dropout_p)


def project(
    q: Tensor,
    k: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    lengths: LengthTensors,
    options: RefinedAttentionOptions | WassersteinAttentionOptions,
) -> Tensor:
    """x = A [W_q | W_k]: [B, H, N, P], zero at padding; packed [T, H, P]."""
    width = w_q.shape[-1]
    options = options._replace(max_seqlen=_max_seqlen(q, w_q, lengths, options))
    projections = _projections(q, k, w_q, w_k, lengths, options)
    if len(projections) == 1 and _aligned(width) == width:
        return projections[0]
    return torch.cat([x[..., :width] for x in _halves(projections)], dim=-1)


def _max_seqlen(q: Tensor, w_q: Tensor, lengths: LengthTensors, options) -> int | None:
    return None if lengths[2] is None else length_bound(q, w_q, lengths[2], options.max_seqlen)


def _projections(q, k, w_q, w_k, lengths: LengthTensors, options) -> list[Tensor]:
    """[A W_q, A W_k], or the two as one [A W_q | A W_k]; each padded with columns of zeros as in `_joined`."""
    if options.source == "logits":
        settings = (options.causal, options.scale, options.max_seqlen)
        return [apply(RefinedProjectionFunction, q, k, _joined([w_q, w_k], q, options), *lengths, settings)]
    scale = resolve_scale(options.scale, q.shape[-1])
    fits = 2 * _aligned(w_q.shape[-1]) <= MAX_HEAD_DIM
    groups = [[w_q, w_k]] if fits else [[w_q], [w_k]]
    return [_attend(q, k, _as_values(_joined(x, q, options), q, lengths[2]), lengths, options, scale) for x in groups]


def _halves(projections: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(projections) if len(projections) == 2 else projections[0].chunk(2, dim=-1)


def _aligned(width: int) -> int:
    """`width` rounded up to a multiple of 16: Triton vectorizes loads of such rows."""
    return width + -width % 16


def _joined(matrices: list[Tensor], q: Tensor, options) -> Tensor:
    """The first N rows side by side, each padded with columns of zeros to an aligned width: [N, P], or [H, N, P] if
    any matrix is [H, ...]. Where packed, the first max_seqlen rows."""
    count = q.shape[2] if options.max_seqlen is None else options.max_seqlen
    rows = [w[..., :count, :] for w in matrices]
    if any(w.dim() == 3 for w in rows):
        rows = [w.expand(q.shape[1], -1, -1) for w in rows]
    return torch.cat([part for w in rows for part in (w, _missing_columns(w))], dim=-1)


def _as_values(w: Tensor, q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The rows of w at the positions of all tokens, [B, H, N, P] or packed [T, H, P]."""
    if cu_seqlens is None:
        return w.expand(*q.shape[:3], -1)
    return w[..., token_positions(cu_seqlens, q.shape[0]), :].expand(q.shape[1], -1, -1).transpose(0, 1)


def _missing_columns(x: Tensor) -> Tensor:
    width = x.shape[-1]
    return x.new_zeros(*x.shape[:-1], _aligned(width) - width)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: LengthTensors,
    options: RefinedAttentionOptions | WassersteinAttentionOptions,
    scale: float,
    dropout_seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(mask(scale · Q Kᵀ)) V."""
    attention = SinkAttentionOptions(options.causal, scale, dropout_p, options.max_seqlen, impl=options.impl)
    tensors = (q, k, v, *no_sinks(q, lengths[2]), None, *lengths, dropout_seed)
    return apply(SinkAttentionFunction, *tensors, attention)[0]


# --- Gaussians ---


class GaussianVectorsFunction(torch.autograd.Function):
    """Queries and keys [mean | x], Gaussians with Σ = elu(x) + 1, to vectors whose products are the scores:

        query [g, 1]    key [g, -‖g‖²/2]    where g = [mean, √Σ - 1] minus the mean over the keys

    Subtracting the same vector from all changes no distance and keeps products near 0, where they do not cancel. In
    half precision ‖g‖²/2 takes two columns, the second for what rounding takes from the first.
    """

    @staticmethod
    def forward(ctx, x_q, x_k, seq_lens, cu_seqlens):
        gaussian_q, gaussian_k = gaussians(x_q.float()), gaussians(x_k.float())
        mean = centre_tokens_(gaussian_q, gaussian_k, seq_lens, cu_seqlens)
        gaussian_q, gaussian_k = gaussian_q.to(x_q.dtype), gaussian_k.to(x_k.dtype)
        column = gaussian_k.float().square().sum(-1, keepdim=True) / -2
        columns = [column.to(x_k.dtype)]
        if x_k.dtype != torch.float32:
            columns.append((column - columns[0].float()).to(x_k.dtype))
        queries = _filled([gaussian_q, *(torch.ones_like(column, dtype=x_q.dtype) for column in columns)])
        keys = _filled([gaussian_k, *columns])
        ctx.save_for_backward(queries, keys, mean)
        ctx.width = x_q.shape[-1]
        return queries, keys

    @staticmethod
    def backward(ctx, dqueries, dkeys):  # by operations that autograd can differentiate again
        queries, keys, mean = ctx.saved_tensors
        width = ctx.width
        gaussian_k = keys[..., :width].float()
        dgaussian_k = dkeys[..., :width].float() - gaussian_k * dkeys[..., width : width + 1].float()
        dx_q = gaussians_backward(dqueries[..., :width].float(), queries[..., :width], mean)
        dx_k = gaussians_backward(dgaussian_k, gaussian_k, mean)
        return dx_q.to(queries.dtype), dx_k.to(keys.dtype), None, None


def centre_tokens_(query: Tensor, key: Tensor, seq_lens: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`centre_`; of packed [T, ..., D] the mean key of each token's sequence."""
    if cu_seqlens is None:
        return centre_(query, key, seq_lens)
    counts = cu_seqlens.diff().clamp(min=1).view(-1, *[1] * (key.dim() - 1))
    # Its sums are in one order, those of index_add_ are not.
    sums = torch.segment_reduce(key.detach().float(), "sum", offsets=cu_seqlens, axis=0, unsafe=True)
    mean = (sums / counts).nan_to_num_(0, 0, 0)[sequence_indices(cu_seqlens, key.shape[0])].to(key.dtype)
    query -= mean
    key -= mean
    return mean


def _filled(parts: list[Tensor]) -> Tensor:
    """Side by side, padded with columns of zeros to an aligned width."""
    x = torch.cat(parts, dim=-1)
    return torch.cat([x, _missing_columns(x)], dim=-1)


# --- The projection ---


def projection_reference(q, k, w, seq_lens, seq_starts, source, causal, scale) -> Tensor:
    """A W with A the logits scale · Q Kᵀ or their softmax. Holds A in memory."""
    valid = valid_tokens(q.shape[0], q.shape[2], seq_lens, seq_starts, q.device)
    if seq_lens is not None:
        q, k = (x.masked_fill(~valid[:, None, :, None], 0) for x in (q, k))
    return attention_matrix(scale * (q @ k.mT), ~visible_pairs(valid, causal), source) @ w


def _projection_reference(q, k, w, seq_lens, seq_starts, cu_seqlens, settings) -> Tensor:
    causal, scale, _ = settings
    scale = resolve_scale(scale, q.shape[-1])
    if cu_seqlens is None:
        return projection_reference(q, k, w, seq_lens, seq_starts, "logits", causal, scale)
    outs = [q.new_zeros(0, q.shape[1], w.shape[-1])]
    for start, stop in pairwise(cu_seqlens.tolist()):
        q_b, k_b = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k))
        out = projection_reference(q_b, k_b, w[..., : stop - start, :], None, None, "logits", causal, scale)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


class RefinedProjectionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, w, seq_lens, seq_starts, cu_seqlens, settings):
        tensors = (q, k, w, seq_lens, seq_starts, cu_seqlens)
        ctx.save_for_backward(*tensors)
        ctx.options = settings
        return refined_projection_fwd(*tensors, *settings)

    @staticmethod
    @differentiable_again(_projection_reference)
    def backward(ctx, dx):
        dq, dk, dw = refined_projection_bwd(dx, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dw, None, None, None, None


def _projection(q, k, w, seq_lens, seq_starts, cu_seqlens, *settings) -> Tensor:
    return _projection_reference(q, k, w, seq_lens, seq_starts, cu_seqlens, settings)


def _fake_fwd(q, k, w, *_) -> Tensor:
    return q.new_empty(*q.shape[:-1], w.shape[-1])


def _fake_bwd(dx, q, k, w, *_) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, w))


def _inputs(dx, *inputs):
    return (dx,), inputs


@or_reference("refined_projection", _projection, like=_fake_fwd)
def _fwd(q, k, w, seq_lens, seq_starts, cu_seqlens, causal, scale, max_seqlen) -> Tensor:
    batch = _batch(q, w, (seq_lens, seq_starts, cu_seqlens), causal, max_seqlen)
    kernels = triton_kernels("refined_attention")
    return kernels.launch_refined_projection_fwd(q, k, w, batch, resolve_scale(scale, q.shape[-1]))


@or_reference_gradients("refined_projection", _projection, like=_fake_bwd, split=_inputs, wrt=range(3))
def _bwd(dx, q, k, w, seq_lens, seq_starts, cu_seqlens, causal, scale, max_seqlen) -> tuple[Tensor, Tensor, Tensor]:
    batch = _batch(q, w, (seq_lens, seq_starts, cu_seqlens), causal, max_seqlen)
    kernels = triton_kernels("refined_attention")
    return kernels.launch_refined_projection_bwd(dx, q, k, w, batch, resolve_scale(scale, q.shape[-1]))


def _batch(q: Tensor, w: Tensor, lengths: LengthTensors, causal: bool, max_seqlen: int | None):
    cu_seqlens = lengths[2]
    size = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    positions = length_bound(q, w, cu_seqlens, max_seqlen)
    tensors = triton_kernels("common.ragged").as_lengths(*lengths)
    return triton_kernels("refined_attention").Batch(size, positions, tensors, causal)


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor w, Tensor? seq_lens, Tensor? seq_starts, Tensor? cu_seqlens, bool causal, "
    "float? scale, SymInt? max_seqlen"
)

refined_projection_fwd = define(
    f"refined_projection_fwd({_ARGUMENTS}) -> Tensor",
    cpu=_fwd,
    cuda=_fwd,
    fake=_fake_fwd,
)

refined_projection_bwd = define(
    f"refined_projection_bwd(Tensor dx, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_bwd,
    cuda=_bwd,
    fake=_fake_bwd,
)

"""refined_attention of any length by Triton kernels, "simple" and "stochastic", in memory linear in N.

    x = A [W_q | W_k]          source "logits": linear attention; "weights": plain attention with W as values
    out = softmax(mask(M)) V   plain attention with the halves of x as queries and keys ("stochastic": after mapping
                               each token to a vector)

Plain attention is sink_attention without sinks.
"""

import math

import torch
from torch import Tensor

from recattn._options import RefinedAttentionOptions, SinkAttentionOptions, WassersteinAttentionOptions
from recattn.ops._library import apply, define, differentiable_again
from recattn.ops._support import contiguous, resolve_scale, triton_unsupported_reason
from recattn.ops.refined_attention.chunked import gaussians, gaussians_backward
from recattn.ops.sink_attention import MAX_HEAD_DIM, SinkAttentionFunction, no_sinks
from recattn.reference.sink_attention import valid_tokens, visible_pairs, window_starts
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


def refined_attention(q, k, v, w_q, w_k, seq_lens, dropout_seed, options) -> Tensor:
    """`options.impl` is that of sink_attention."""
    x_q, x_k = _halves(_projections(q, k, w_q, w_k, seq_lens, options))
    width = w_q.shape[-1]
    if options.mechanism == "simple":  # the columns of zeros change no product
        return _attend(x_q, x_k, v, seq_lens, options, 1 / math.sqrt(width), dropout_seed, options.dropout_p)
    queries, keys = apply(GaussianVectorsFunction, x_q[..., :width], x_k[..., :width], seq_lens)
    # -W²/√R = 2 (g_i·g_j - ‖g_j‖²/2)/√R, up to the query's own term, which changes no softmax.
    return _attend(queries, keys, v, seq_lens, options, 2 / math.sqrt(width // 2), dropout_seed, options.dropout_p)


def project(
    q: Tensor,
    k: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    seq_lens: Tensor | None,
    options: RefinedAttentionOptions | WassersteinAttentionOptions,
) -> Tensor:
    """x = A [W_q | W_k]: [B, H, N, P], zero at padding."""
    width = w_q.shape[-1]
    projections = _projections(q, k, w_q, w_k, seq_lens, options)
    if len(projections) == 1 and _aligned(width) == width:
        return projections[0]
    return torch.cat([x[..., :width] for x in _halves(projections)], dim=-1)


def _projections(q, k, w_q, w_k, seq_lens, options) -> list[Tensor]:
    """[A W_q, A W_k], or the two as one [A W_q | A W_k]; each padded with columns of zeros as in `_joined`."""
    if options.source == "logits":
        settings = (options.causal, options.left_padded, options.scale)
        return [apply(RefinedProjectionFunction, q, k, _joined([w_q, w_k], q), seq_lens, settings)]
    scale = resolve_scale(options.scale, q.shape[-1])
    fits = 2 * _aligned(w_q.shape[-1]) <= MAX_HEAD_DIM
    groups = [[w_q, w_k]] if fits else [[w_q], [w_k]]
    return [
        _attend(q, k, _joined(matrices, q).expand(*q.shape[:3], -1), seq_lens, options, scale) for matrices in groups
    ]


def _halves(projections: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(projections) if len(projections) == 2 else projections[0].chunk(2, dim=-1)


def _aligned(width: int) -> int:
    """`width` rounded up to a multiple of 16: Triton vectorizes loads of such rows."""
    return width + -width % 16


def _joined(matrices: list[Tensor], q: Tensor) -> Tensor:
    """The first N rows side by side, each padded with columns of zeros to an aligned width: [N, P], or [H, N, P] if
    any matrix is [H, ...]."""
    rows = [w[..., : q.shape[2], :] for w in matrices]
    if any(w.dim() == 3 for w in rows):
        rows = [w.expand(q.shape[1], -1, -1) for w in rows]
    return torch.cat([part for w in rows for part in (w, _missing_columns(w))], dim=-1)


def _missing_columns(x: Tensor) -> Tensor:
    width = x.shape[-1]
    return x.new_zeros(*x.shape[:-1], _aligned(width) - width)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor | None,
    options: RefinedAttentionOptions | WassersteinAttentionOptions,
    scale: float,
    dropout_seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(mask(scale · Q Kᵀ)) V."""
    attention = SinkAttentionOptions(options.causal, scale, dropout_p, impl=options.impl)
    seq_starts = window_starts("left" if options.left_padded else "right", q.shape[2], seq_lens)
    tensors = (*no_sinks(q), None, seq_lens, seq_starts, None, dropout_seed)
    return apply(SinkAttentionFunction, q, k, v, *tensors, attention)[0]


# --- Gaussians ---


class GaussianVectorsFunction(torch.autograd.Function):
    """Queries and keys [mean | x], Gaussians with Σ = elu(x) + 1, to vectors whose products are the scores:

        query [g, 1]    key [g, -‖g‖²/2]    where g = [mean, √Σ - 1] minus the mean over the keys

    Subtracting the same vector from all changes no distance and keeps products near 0, where they do not cancel. In
    half precision ‖g‖²/2 takes two columns, the second for what rounding takes from the first.
    """

    @staticmethod
    def forward(ctx, x_q, x_k, seq_lens):
        gaussian_q, gaussian_k = gaussians(x_q.float()), gaussians(x_k.float())
        mean = centre_(gaussian_q, gaussian_k, seq_lens)
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
        return dx_q.to(queries.dtype), dx_k.to(keys.dtype), None


def _filled(parts: list[Tensor]) -> Tensor:
    """Side by side, padded with columns of zeros to an aligned width."""
    x = torch.cat(parts, dim=-1)
    return torch.cat([x, _missing_columns(x)], dim=-1)


# --- The projection ---


def projection_reference(q, k, w, seq_lens, source, causal, left_padded, scale) -> Tensor:
    """A W with A the logits scale · Q Kᵀ or their softmax. Holds A in memory."""
    seq_starts = window_starts("left" if left_padded else "right", q.shape[2], seq_lens)
    valid = valid_tokens(q.shape[0], q.shape[2], seq_lens, seq_starts, q.device)
    if seq_lens is not None:
        q, k = (x.masked_fill(~valid[:, None, :, None], 0) for x in (q, k))
    return attention_matrix(scale * (q @ k.mT), ~visible_pairs(valid, causal), source) @ w


def _projection_reference(q, k, w, seq_lens, settings) -> Tensor:
    causal, left_padded, scale = settings
    return projection_reference(q, k, w, seq_lens, "logits", causal, left_padded, resolve_scale(scale, q.shape[-1]))


class RefinedProjectionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, w, seq_lens, settings):
        ctx.save_for_backward(q, k, w, seq_lens)
        ctx.options = settings
        return refined_projection_fwd(q, k, w, seq_lens, *settings)

    @staticmethod
    @differentiable_again(_projection_reference)
    def backward(ctx, dx):
        dq, dk, dw = refined_projection_bwd(dx, *ctx.saved_tensors, *ctx.options)
        return dq, dk, dw, None, None


def _fwd(q, k, w, seq_lens, causal, left_padded, scale) -> Tensor:
    from recattn.triton_kernels.refined_attention.projection import Mask, launch_refined_projection_fwd

    mask = Mask(contiguous(seq_lens), causal, left_padded)
    return launch_refined_projection_fwd(q, k, w, mask, resolve_scale(scale, q.shape[-1]))


def _bwd(dx, q, k, w, seq_lens, causal, left_padded, scale) -> tuple[Tensor, Tensor, Tensor]:
    from recattn.triton_kernels.refined_attention.projection import Mask, launch_refined_projection_bwd

    mask = Mask(contiguous(seq_lens), causal, left_padded)
    return launch_refined_projection_bwd(dx, q, k, w, mask, resolve_scale(scale, q.shape[-1]))


_ARGUMENTS = "Tensor q, Tensor k, Tensor w, Tensor? seq_lens, bool causal, bool left_padded, float? scale"

refined_projection_fwd = define(
    f"refined_projection_fwd({_ARGUMENTS}) -> Tensor",
    cpu=_fwd,
    cuda=_fwd,
    fake=lambda q, k, w, *_: q.new_empty(*q.shape[:3], w.shape[-1]),
)

refined_projection_bwd = define(
    f"refined_projection_bwd(Tensor dx, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    cpu=_bwd,
    cuda=_bwd,
    fake=lambda dx, q, k, w, *_: tuple(x.new_empty(x.shape) for x in (q, k, w)),
)

"""refined_attention of any length by Triton kernels, "simple" and "stochastic", in memory linear in N.

x = A [W_q | W_k] comes first: of raw logits by linear attention, of softmax weights by plain attention with W for
values. Its halves are then queries and keys of a plain attention, for "stochastic" after a map of each token by itself.
Plain attention is sink_attention without sinks.
"""

import math

import torch
from torch import Tensor

from recattn._options import SinkAttentionOptions
from recattn.ops._library import define, differentiable_again
from recattn.ops._support import triton_unsupported_reason
from recattn.ops.refined_attention.chunked import gaussians, gaussians_backward
from recattn.ops.sink_attention import MAX_HEAD_DIM, SinkAttentionFunction, no_sinks
from recattn.reference.sink_attention import valid_tokens, visible_pairs
from recattn.reference.wasserstein_attention import attention_matrix, centre_


def refusal(q: Tensor, v: Tensor, w_q: Tensor, mechanism: str) -> str | None:
    """Why a call cannot be served (None: it can)."""
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


def refined_attention(q, k, v, w_q, w_k, seq_lens, dropout_seed, settings) -> Tensor:
    """`settings` is that of `recattn.ops.refined_attention`, its path one of sink_attention's."""
    x_q, x_k = _halves(_passes(q, k, w_q, w_k, seq_lens, settings))
    width = w_q.shape[-1]
    if settings.mechanism == "simple":  # the columns of zeros change no product
        return _attend(x_q, x_k, v, seq_lens, settings, 1 / math.sqrt(width), dropout_seed, settings.dropout_p)
    queries, keys = _GaussianOperands.apply(x_q[..., :width], x_k[..., :width], seq_lens)
    # -W²/√R = 2 (g_i·g_j - ‖g_j‖²/2)/√R but for the query's own term, which the softmax drops.
    return _attend(queries, keys, v, seq_lens, settings, 2 / math.sqrt(width // 2), dropout_seed, settings.dropout_p)


def project(q, k, w_q, w_k, seq_lens, settings) -> Tensor:
    """x = A [W_q | W_k]: [B, H, N, P], zero at padding."""
    width = w_q.shape[-1]
    passes = _passes(q, k, w_q, w_k, seq_lens, settings)
    if len(passes) == 1 and _aligned(width) == width:
        return passes[0]
    return torch.cat([x[..., :width] for x in _halves(passes)], dim=-1)


def _passes(q, k, w_q, w_k, seq_lens, settings) -> list[Tensor]:
    """A W_q and A W_k, or both side by side, with columns of zeros as `_joined` has them."""
    if settings.source == "logits":
        order = (settings.causal, settings.left_padded, settings.scale)
        return [RefinedProjection.apply(q, k, _joined([w_q, w_k], q), seq_lens, order)]
    scale = 1 / math.sqrt(q.shape[-1]) if settings.scale is None else settings.scale
    fits = 2 * _aligned(w_q.shape[-1]) <= MAX_HEAD_DIM
    groups = [[w_q, w_k]] if fits else [[w_q], [w_k]]
    return [
        _attend(q, k, _joined(matrices, q).expand(*q.shape[:3], -1), seq_lens, settings, scale) for matrices in groups
    ]


def _halves(passes: list[Tensor]) -> tuple[Tensor, ...]:
    return tuple(passes) if len(passes) == 2 else passes[0].chunk(2, dim=-1)


def _aligned(width: int) -> int:
    """Rows of so many columns are loaded whole: Triton looks for multiples of 16."""
    return width + -width % 16


def _joined(matrices: list[Tensor], q: Tensor) -> Tensor:
    """The first N rows side by side, each with columns of zeros up to an aligned width: [N, P], or [H, N, P] if one
    is a head's own."""
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
    settings,
    scale: float,
    dropout_seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(mask(scale · Q Kᵀ)) V."""
    impl = None if settings.path == "auto" else settings.path
    options = SinkAttentionOptions(settings.causal, settings.left_padded, scale, dropout_p, impl=impl)
    return SinkAttentionFunction.apply(q, k, v, *no_sinks(q), None, seq_lens, None, dropout_seed, options)[0]


# --- Gaussians ---


class _GaussianOperands(torch.autograd.Function):
    """[mean | x] of queries and keys, with Σ = elu(x) + 1, to vectors whose products are the scores.

    g = [mean, √Σ - 1] is a Gaussian, less the mean of the keys': no shift changes a distance, and near 0 products do
    not cancel. Queries are [g, 1] and keys [g, -‖g‖²/2]; in half precision that column is two, the rest of its
    rounding beside it.
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
    def backward(ctx, dqueries, dkeys):  # of the outputs, so that autograd can go on through it
        queries, keys, mean = ctx.saved_tensors
        width = ctx.width
        gaussian_k = keys[..., :width].float()
        dgaussian_k = dkeys[..., :width].float() - gaussian_k * dkeys[..., width : width + 1].float()
        dx_q = gaussians_backward(dqueries[..., :width].float(), queries[..., :width], mean)
        dx_k = gaussians_backward(dgaussian_k, gaussian_k, mean)
        return dx_q.to(queries.dtype), dx_k.to(keys.dtype), None


def _filled(parts: list[Tensor]) -> Tensor:
    """Side by side, with columns of zeros up to an aligned width."""
    x = torch.cat(parts, dim=-1)
    return torch.cat([x, _missing_columns(x)], dim=-1)


# --- The projection ---


def projection_reference(
    q: Tensor,
    k: Tensor,
    w: Tensor,
    seq_lens: Tensor | None,
    source: str,
    causal: bool,
    left_padded: bool,
    scale: float,
) -> Tensor:
    """A W with A the logits scale · Q Kᵀ or their softmax, in memory as a whole."""
    valid = valid_tokens(q.shape[0], q.shape[2], seq_lens, "left" if left_padded else "right", q.device)
    if seq_lens is not None:
        q, k = (x.masked_fill(~valid[:, None, :, None], 0) for x in (q, k))
    return attention_matrix(scale * (q @ k.mT), ~visible_pairs(valid, causal), source) @ w


def _projection_reference(q, k, w, seq_lens, settings) -> Tensor:
    return projection_reference(q, k, w, seq_lens, "logits", **_options(q, *settings))


class RefinedProjection(torch.autograd.Function):
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


def _fwd(q, k, w, seq_lens, *order) -> Tensor:
    from recattn.triton_kernels.refined_attention.projection import launch_refined_projection_fwd

    return launch_refined_projection_fwd(q, k, w, _contiguous(seq_lens), **_options(q, *order))


def _bwd(dx, q, k, w, seq_lens, *order) -> tuple[Tensor, Tensor, Tensor]:
    from recattn.triton_kernels.refined_attention.projection import launch_refined_projection_bwd

    return launch_refined_projection_bwd(dx, q, k, w, _contiguous(seq_lens), **_options(q, *order))


def _options(q: Tensor, causal: bool, left_padded: bool, scale: float | None) -> dict[str, object]:
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return {"causal": causal, "left_padded": left_padded, "scale": scale}


def _contiguous(seq_lens: Tensor | None) -> Tensor | None:
    return None if seq_lens is None else seq_lens.contiguous()


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

"""wasserstein_attention: schemas, autograd, and what runs where.

The distance of two Gaussians with diagonal covariances is the distance of the vectors [μ, √Σ], so the operators take
vectors. With w_q and w_k the vectors come from x = A [W_q | W_k], another product with an attention matrix.
"""

import torch
from torch import Tensor

from recattn._options import WassersteinAttentionOptions
from recattn.ops._library import define, differentiable_again, refuse_dropout
from recattn.ops._support import resolve_scale, triton_unsupported_reason
from recattn.ops.refined_attention.triton_long import project, projection_reference
from recattn.ops.sink_attention import MAX_HEAD_DIM
from recattn.ops.wasserstein_attention import cpu, triton
from recattn.reference.sink_attention import valid_tokens, visible_pairs
from recattn.reference.wasserstein_attention import centre_, masked_softmax, squared_wasserstein_distance


def unsupported_reasons(
    device_type: str,
    mean_q: Tensor | None = None,
    mean_v: Tensor | None = None,
    w_q: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
) -> dict[str, str | None]:
    """Why each implementation cannot run (None: it can), best first.

    Without mean_q and mean_v: on this type of device. With them: a call with these tensors.
    """
    triton = triton_unsupported_reason(device_type)
    if mean_q is not None:
        triton = triton or _triton_call_reason(mean_q, mean_v, w_q)
    if device_type == "cpu":  # where Triton's is an interpreter
        return {"cpu": "it has no dropout" if dropout_p > 0 else None, "reference": None, "triton": triton}
    return {"triton": triton, "cpu": f"the tensors are on {device_type}", "reference": None}


def _triton_call_reason(mean_q: Tensor, mean_v: Tensor, w_q: Tensor | None) -> str | None:
    if mean_q.dtype == torch.float64:
        return "its kernels compute in float32, and mean_q is float64"
    # The vectors of a projection have up to four more columns.
    vectors = 2 * mean_q.shape[3] + (0 if w_q is None else 4)
    widest = max(vectors, 2 * mean_v.shape[3], 0 if w_q is None else w_q.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"its kernels hold 2D (to refine 2D + 4), 2Dv and 2R up to {MAX_HEAD_DIM}, and one is {widest}"
    return triton_unsupported_reason(mean_q.device.type, mean_q.dtype)


# --- Gaussians as vectors ---


def wasserstein_attention(
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, w_q, w_k, seq_lens, dropout_seed, options
) -> tuple[Tensor, Tensor]:
    """The call by `options.impl`, "cpu" or "triton", which supports it."""
    # A CPU computes half precision in float32.
    dtype = mean_v.dtype if options.impl == "triton" else torch.promote_types(mean_v.dtype, torch.float32)
    tensors = mean_q, cov_q, mean_k, cov_k
    if seq_lens is not None:  # NaN in padding would reach the gradients of other tokens
        side = "left" if options.left_padded else "right"
        valid = valid_tokens(mean_q.shape[0], mean_q.shape[2], seq_lens, side, mean_q.device)[:, None, :, None]
        tensors = [x.masked_fill(~valid, 0) for x in tensors]
    mean_q, cov_q, mean_k, cov_k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
    query, key = _vectors(mean_q, cov_q), _vectors(mean_k, cov_k)
    centre_(query, key, seq_lens)
    if w_q is not None:
        x = _project(query, key, w_q, w_k, seq_lens, options, dtype)
        query, key = (_refined_vectors(part) for part in x.to(query.dtype).chunk(2, dim=-1))
        centre_(query, key, seq_lens)
        options = options._replace(scale=None)
    vectors = (query.to(dtype), key.to(dtype))
    return WassersteinAttentionFunction.apply(*vectors, mean_v, cov_v, seq_lens, dropout_seed, options)


def _vectors(mean: Tensor, cov: Tensor) -> Tensor:
    """[μ, √Σ]"""
    return torch.cat([mean, cov.clamp(min=torch.finfo(cov.dtype).tiny).sqrt()], dim=-1)


def _refined_vectors(x: Tensor) -> Tensor:
    """[μ, √Σ - 1] of Σ = elu(x) + 1. The -1 changes no distance; near 0 products do not cancel."""
    mean, x = x.chunk(2, dim=-1)
    positive, negative = x.clamp(min=0), x.clamp(max=0)
    return torch.cat([mean, torch.where(x > 0, positive / ((1 + positive).sqrt() + 1), (negative / 2).expm1())], dim=-1)


def _project(query, key, w_q, w_k, seq_lens, options: WassersteinAttentionOptions, dtype) -> Tensor:
    """A [W_q | W_k], [B, H, N, 4R], with A_ij = -scale · ‖query_i - key_j‖² or its softmax."""
    queries, keys = _distance_factors(query, key, dtype)
    if options.impl == "triton":
        scale = _resolve_scale(options.scale, query)
        return project(queries, keys, w_q, w_k, seq_lens, options._replace(scale=scale))
    w = _side_by_side(w_q, w_k, query).to(dtype)
    settings = (options.source, options.causal, options.left_padded, options.scale)
    return WassersteinProjectionFunction.apply(queries, keys, w, seq_lens, settings)


def _side_by_side(w_q: Tensor, w_k: Tensor, query: Tensor) -> Tensor:
    """[W_q | W_k]: [N, 4R], or [H, N, 4R] if either is [H, ...]."""
    w_q, w_k = (w[..., : query.shape[2], :] for w in (w_q, w_k))
    if w_q.dim() != w_k.dim():
        w_q, w_k = (w.expand(query.shape[1], -1, -1) for w in (w_q, w_k))
    return torch.cat([w_q, w_k], dim=-1)


def _distance_factors(query: Tensor, key: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Vectors whose products are -‖query_i - key_j‖²."""
    query_norms, key_norms = (_columns(-x.square().sum(-1, keepdim=True), dtype) for x in (query, key))
    ones = torch.ones_like(query_norms)
    return torch.cat([(2 * query).to(dtype), query_norms, ones], -1), torch.cat([key.to(dtype), ones, key_norms], -1)


def _columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 column in another dtype; in half precision two columns that add up to it, to keep its last bits."""
    high = x.to(dtype)
    return high if dtype == x.dtype else torch.cat([high, (x - high).to(dtype)], dim=-1)


# --- Autograd ---


def _attention_reference(query, key, mean_v, cov_v, seq_lens, _dropout_seed, options) -> tuple[Tensor, Tensor]:
    refuse_dropout("wasserstein_attention", options.dropout_p)
    side = "left" if options.left_padded else "right"
    valid = valid_tokens(query.shape[0], query.shape[2], seq_lens, side, query.device)
    if seq_lens is not None:
        mean_v, cov_v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (mean_v, cov_v))
    distances = squared_wasserstein_distance(*query.chunk(2, dim=-1), *key.chunk(2, dim=-1), valid)
    p = masked_softmax(-_resolve_scale(options.scale, query) * distances, ~visible_pairs(valid, options.causal))
    return (p @ mean_v.to(p.dtype)).to(mean_v.dtype), (p.square() @ cov_v.to(p.dtype)).to(cov_v.dtype)


class WassersteinAttentionFunction(torch.autograd.Function):
    """P μ_v and (P∘P) Σ_v with P = softmax(mask(-scale · ‖query_i - key_j‖²))."""

    @staticmethod
    def forward(ctx, query, key, mean_v, cov_v, seq_lens, dropout_seed, options):
        tensors = (query, key, mean_v, cov_v, seq_lens, dropout_seed)
        mean, cov, row_stats = wasserstein_attention_fwd(*tensors, *options)
        ctx.save_for_backward(*tensors, mean, cov, row_stats)
        ctx.options = options
        return mean, cov

    @staticmethod
    @differentiable_again(_attention_reference)
    def backward(ctx, dmean, dcov):
        *tensors, mean, cov, row_stats = ctx.saved_tensors
        return *wasserstein_attention_bwd(dmean, dcov, mean, cov, row_stats, *tensors, *ctx.options), None, None, None


def _projection_reference(query, key, w, seq_lens, settings) -> Tensor:
    source, causal, left_padded, scale = settings
    scale = _resolve_scale(scale, query, more_columns=2)
    return projection_reference(query, key, w, seq_lens, source, causal, left_padded, scale)


class WassersteinProjectionFunction(torch.autograd.Function):
    """A W with A = scale · query keyᵀ or its softmax, on a CPU. `scale` None is 1/√D, of vectors of 2D + 2 columns."""

    @staticmethod
    def forward(ctx, query, key, w, seq_lens, settings):
        ctx.save_for_backward(query, key, w, seq_lens)
        ctx.options = settings
        return wasserstein_projection_fwd(query, key, w, seq_lens, *settings)

    @staticmethod
    @differentiable_again(_projection_reference)
    def backward(ctx, dx):
        return *wasserstein_projection_bwd(dx, *ctx.saved_tensors, *ctx.options), None, None


# --- Registration ---


def _fwd(query, key, mean_v, cov_v, seq_lens, dropout_seed, *options):
    options = _with_scale(options, query)
    if options.impl == "cpu":
        mean, cov = cpu.wasserstein_attention_fwd(query, key, mean_v, cov_v, seq_lens, options)
        return mean, cov, _empty_row_stats(query, options.impl)
    return triton.wasserstein_attention_fwd(query, key, mean_v, cov_v, seq_lens, dropout_seed, options)


def _bwd(dmean, dcov, mean, cov, row_stats, query, key, mean_v, cov_v, seq_lens, dropout_seed, *options):
    options = _with_scale(options, query)
    if options.impl == "cpu":
        return cpu.wasserstein_attention_bwd(dmean, dcov, query, key, mean_v, cov_v, seq_lens, options)
    tensors = (query, key, mean_v, cov_v, seq_lens, dropout_seed)
    return triton.wasserstein_attention_bwd(dmean, dcov, mean, cov, row_stats, *tensors, options)


def _with_scale(options: tuple, query: Tensor) -> WassersteinAttentionOptions:
    options = WassersteinAttentionOptions(*options)
    return options._replace(scale=_resolve_scale(options.scale, query))


def _resolve_scale(scale: float | None, vectors: Tensor, more_columns: int = 0) -> float:
    """The scale, by default 1/√D, of vectors of 2D columns and `more_columns`."""
    return resolve_scale(scale, (vectors.shape[-1] - more_columns) // 2)


def _projection_fwd(query, key, w, seq_lens, source, causal, left_padded, scale):
    scale = _resolve_scale(scale, query, more_columns=2)
    return cpu.projection_fwd(query, key, w, seq_lens, source, causal, left_padded, scale)


def _projection_bwd(dx, query, key, w, seq_lens, source, causal, left_padded, scale):
    scale = _resolve_scale(scale, query, more_columns=2)
    return cpu.projection_bwd(dx, query, key, w, seq_lens, source, causal, left_padded, scale)


def _empty_row_stats(query: Tensor, impl: str) -> Tensor:
    """row_max and row_sum of each softmax, for the backward; empty on a CPU, whose backward recomputes the softmax."""
    return query.new_empty(0 if impl == "cpu" else (2, *query.shape[:3]), dtype=torch.float32)


def _fake_fwd(query, key, mean_v, cov_v, *context):
    return mean_v.new_empty(mean_v.shape), cov_v.new_empty(cov_v.shape), _empty_row_stats(query, context[-1])


def _fake_bwd(dmean, dcov, mean, cov, row_stats, query, key, mean_v, cov_v, *_):
    return tuple(x.new_empty(x.shape) for x in (query, key, mean_v, cov_v))


_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor mean_v, Tensor cov_v, Tensor? seq_lens, Tensor? dropout_seed, "
    "str source, bool causal, bool left_padded, float? scale, float dropout_p, str? impl"
)
wasserstein_attention_fwd = define(
    f"wasserstein_attention_fwd({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", cpu=_fwd, cuda=_fwd, fake=_fake_fwd
)
wasserstein_attention_bwd = define(
    "wasserstein_attention_bwd(Tensor dmean, Tensor dcov, Tensor mean, Tensor cov, Tensor row_stats, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_bwd,
    cuda=_bwd,
    fake=_fake_bwd,
)

_PROJECTION = (
    "Tensor query, Tensor key, Tensor w, Tensor? seq_lens, str source, bool causal, bool left_padded, float? scale"
)
wasserstein_projection_fwd = define(
    f"wasserstein_projection_fwd({_PROJECTION}) -> Tensor",
    cpu=_projection_fwd,
    fake=lambda query, key, w, *_: query.new_empty(*query.shape[:3], w.shape[-1]),
)
wasserstein_projection_bwd = define(
    f"wasserstein_projection_bwd(Tensor dx, {_PROJECTION}) -> (Tensor, Tensor, Tensor)",
    cpu=_projection_bwd,
    fake=lambda dx, query, key, w, *_: tuple(x.new_empty(x.shape) for x in (query, key, w)),
)

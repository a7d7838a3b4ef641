"""wasserstein_attention: schemas, autograd, and what runs where.

CPU: C++ (`cpu`). GPU: Triton, with w_q and w_k after a projection x = A [W_q | W_k], which gives other Gaussians.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn._options import WassersteinAttentionOptions
from recattn.ops._fallback import or_reference, or_reference_gradients
from recattn.ops._library import apply, define, differentiable_again, refuse_dropout
from recattn.ops._support import length_bound, resolve_scale, triton_kernels, triton_unsupported_reason
from recattn.ops.refined_attention.triton_long import project
from recattn.ops.sink_attention import MAX_HEAD_DIM
from recattn.ops.wasserstein_attention import cpu, triton
from recattn.reference.sink_attention import valid_tokens, visible_pairs
from recattn.reference.wasserstein_attention import (
    centre_,
    each_sequence,
    masked_softmax,
    squared_wasserstein_distance,
)


def unsupported_reasons(
    device_type: str,
    mean_q: Tensor | None = None,
    mean_v: Tensor | None = None,
    w_q: Tensor | None = None,
) -> dict[str, str | None]:
    """Why each implementation cannot run (None: it can), best first.

    Without mean_q and mean_v: on this type of device. With them: a call with these tensors.
    """
    triton = triton_unsupported_reason(device_type, None if mean_q is None else mean_q.dtype)
    if triton is None and mean_q is not None and mean_v is not None:
        triton = _triton_call_reason(mean_q, mean_v, w_q)
    if device_type == "cpu":  # where Triton's is an interpreter
        return {"cpu": cpu.unsupported_reason(mean_q), "reference": None, "triton": triton}
    return {"triton": triton, "cpu": f"the tensors are on {device_type}", "reference": None}


def _triton_call_reason(mean_q: Tensor, mean_v: Tensor, w_q: Tensor | None) -> str | None:
    if mean_q.dtype == torch.float64:
        return "its kernels compute in float32, and mean_q is float64"
    # The vectors of a projection have up to four more columns.
    widest = 2 * max(mean_q.shape[-1], mean_v.shape[-1])
    if w_q is not None:
        widest = max(widest, 2 * mean_q.shape[-1] + 4, w_q.shape[-1])
    if widest > MAX_HEAD_DIM:
        return f"its kernels hold 2D (to refine 2D + 4), 2Dv and 2R up to {MAX_HEAD_DIM}, and one is {widest}"
    return None


def wasserstein_attention(
    gaussians: tuple[Tensor, ...],
    w_q: Tensor | None,
    w_k: Tensor | None,
    lengths: tuple[Tensor | None, ...],
    dropout_seed: Tensor | None,
    options: WassersteinAttentionOptions,
) -> tuple[Tensor, Tensor]:
    """The call by `options.impl`, "cpu" or "triton", which supports it; lengths: seq_lens, seq_starts, cu_seqlens."""
    if options.impl == "cpu":
        return apply(cpu.WassersteinAttentionFunction, *gaussians, w_q, w_k, *lengths, dropout_seed, options)
    if w_q is not None:
        if lengths[2] is not None:
            bound = length_bound(gaussians[0], w_q, lengths[2], options.max_seqlen)
            options = options._replace(max_seqlen=bound)
        x = _project(gaussians[:4], w_q, w_k, lengths, options)
        gaussians, options = (*x.chunk(4, dim=-1), *gaussians[4:]), options._replace(scale=None, refined=True)
    return apply(WassersteinAttentionFunction, *gaussians, *lengths, dropout_seed, options)


# --- Gaussians as vectors ---


def _vectors(mean_q, cov_q, mean_k, cov_k, seq_lens, seq_starts, options) -> tuple[Tensor, Tensor]:
    """[μ, √Σ] of queries and keys, without the mean over the keys; at least float32."""
    tensors = mean_q, cov_q, mean_k, cov_k
    # NaN in padding would reach the gradients of other tokens. A projection is 0 there.
    if seq_lens is not None and not options.refined:
        valid = valid_tokens(mean_q.shape[0], mean_q.shape[2], seq_lens, seq_starts, mean_q.device)[:, None, :, None]
        tensors = [x.masked_fill(~valid, 0) for x in tensors]
    mean_q, cov_q, mean_k, cov_k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)
    standard_deviations = _refined_standard_deviations if options.refined else _standard_deviations
    query, key = (torch.cat([mean, standard_deviations(x)], -1) for mean, x in ((mean_q, cov_q), (mean_k, cov_k)))
    centre_(query, key, seq_lens)
    return query, key


def _standard_deviations(cov: Tensor) -> Tensor:
    return cov.clamp(min=torch.finfo(cov.dtype).tiny).sqrt()


def _refined_standard_deviations(x: Tensor) -> Tensor:
    """√Σ - 1 of Σ = elu(x) + 1. The -1 changes no distance; near 0 products do not cancel."""
    positive, negative = x.clamp(min=0), x.clamp(max=0)
    return torch.where(x > 0, positive / ((1 + positive).sqrt() + 1), (negative / 2).expm1())


def _project(gaussians, w_q, w_k, lengths, options: WassersteinAttentionOptions) -> Tensor:
    """A [W_q | W_k], [B, H, N, 4R] or packed [T, H, 4R], with A_ij = -scale · W²_ij or its softmax."""
    queries, keys = apply(WassersteinFactorsFunction, *gaussians, *lengths, options)
    scale = resolve_scale(options.scale, gaussians[0].shape[-1])
    return project(queries, keys, w_q, w_k, lengths, options._replace(scale=scale))


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

_MASKS = ("seq_lens", "seq_starts", "cu_seqlens", "_dropout_seed")


def _mean_and_cov(
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, seq_lens, seq_starts, cu_seqlens, _dropout_seed, options
) -> tuple[Tensor, ...]:
    """mean and cov, by the reference's steps."""
    tensors = mean_q, cov_q, mean_k, cov_k, mean_v, cov_v
    if cu_seqlens is not None:
        of_one = partial(_mean_and_cov, **dict.fromkeys(_MASKS), options=options)
        return each_sequence(of_one, tensors, cu_seqlens)
    query, key = (x.to(mean_v.dtype) for x in _vectors(*tensors[:4], seq_lens, seq_starts, options))
    valid = valid_tokens(query.shape[0], query.shape[2], seq_lens, seq_starts, query.device)
    if seq_lens is not None:
        mean_v, cov_v = (x.masked_fill(~valid[:, None, :, None], 0) for x in (mean_v, cov_v))
    (mean_q, std_q), (mean_k, std_k) = query.chunk(2, dim=-1), key.chunk(2, dim=-1)
    distances = squared_wasserstein_distance(mean_q, std_q, mean_k, std_k, valid)
    scale = resolve_scale(options.scale, mean_q.shape[-1])
    p = masked_softmax(-scale * distances, ~visible_pairs(valid, options.causal))
    p = F.dropout(p, options.dropout_p)
    return (p @ mean_v.to(p.dtype)).to(mean_v.dtype), (p.square() @ cov_v.to(p.dtype)).to(cov_v.dtype)


def _attention_reference(*inputs) -> tuple[Tensor, ...]:
    refuse_dropout("wasserstein_attention", inputs[-1].dropout_p)
    return _mean_and_cov(*inputs)


class WassersteinAttentionFunction(torch.autograd.Function):
    """P μ_v and (P∘P) Σ_v with P = softmax(mask(-scale · W²)), by Triton."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, options = inputs
        mean, cov, vectors, row_stats = wasserstein_attention_fwd(*tensors, options)
        ctx.save_for_backward(*tensors, mean, cov, vectors, row_stats)
        ctx.options = options
        return mean, cov

    @staticmethod
    @differentiable_again(_attention_reference)
    def backward(ctx, dmean, dcov):
        *tensors, mean, cov, vectors, row_stats = ctx.saved_tensors
        gradients = wasserstein_attention_bwd(dmean, dcov, mean, cov, vectors, row_stats, *tensors, ctx.options)
        return *gradients, None, None, None, None, None


def _factors_reference(mean_q, cov_q, mean_k, cov_k, seq_lens, seq_starts, cu_seqlens, options):
    tensors = mean_q, cov_q, mean_k, cov_k
    if cu_seqlens is not None:
        of_one = partial(_factors_reference, **dict.fromkeys(_MASKS[:3]), options=options)
        return each_sequence(of_one, tensors, cu_seqlens)
    return _distance_factors(*_vectors(*tensors, seq_lens, seq_starts, options), mean_q.dtype)


class WassersteinFactorsFunction(torch.autograd.Function):
    """Queries and keys whose products are -W², by Triton: those of `_distance_factors`, zeros at padding."""

    @staticmethod
    def forward(ctx, *inputs):
        *tensors, options = inputs
        queries, keys = wasserstein_factors_fwd(*tensors)
        ctx.save_for_backward(*tensors, queries, keys)
        ctx.options = options
        return queries, keys

    @staticmethod
    @differentiable_again(_factors_reference)
    def backward(ctx, dqueries, dkeys):
        *tensors, queries, keys = ctx.saved_tensors
        gradients = wasserstein_factors_bwd(dqueries, dkeys, queries, keys, *tensors)
        return *gradients, None, None, None, None


# --- Registration ---


def _fake_fwd(mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, _lens, _starts, _offsets, dropout_seed, options):
    *sizes, head_dim = mean_q.shape
    outs = mean_v.new_empty(mean_v.shape), cov_v.new_empty(cov_v.shape)
    has_more = options.refined or dropout_seed is not None
    if triton_kernels("wasserstein_attention").is_short(mean_q, mean_v, options.max_seqlen, has_more):
        return *outs, mean_q.new_empty(0), mean_q.new_empty(0, dtype=torch.float32)
    vectors, row_stats = mean_q.new_empty(2, *sizes, 2 * head_dim), mean_q.new_empty(2, *sizes, dtype=torch.float32)
    return *outs, vectors, row_stats


def _fake_bwd(dmean, dcov, mean, cov, vectors, row_stats, *tensors):
    return tuple(x.new_empty(x.shape) for x in tensors[:6])


_OPTIONS = "str source, bool causal, float? scale, float dropout_p, SymInt? max_seqlen, str? impl, bool refined"
_LENGTHS = "Tensor? seq_lens, Tensor? seq_starts, Tensor? cu_seqlens"
_ARGUMENTS = (
    "Tensor mean_q, Tensor cov_q, Tensor mean_k, Tensor cov_k, Tensor mean_v, Tensor cov_v, "
    f"{_LENGTHS}, Tensor? dropout_seed, {_OPTIONS}"
)


def _inputs(dmean, dcov, _mean, _cov, _vectors, _row_stats, *inputs):
    return (dmean, dcov), inputs


_fwd = or_reference("wasserstein_attention", _mean_and_cov, like=_fake_fwd)(triton.wasserstein_attention_fwd)
_bwd = or_reference_gradients("wasserstein_attention", _mean_and_cov, like=_fake_bwd, split=_inputs, wrt=range(6))(
    triton.wasserstein_attention_bwd
)
wasserstein_attention_fwd = define(
    f"wasserstein_attention_fwd({_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_fwd,
    cuda=_fwd,
    fake=_fake_fwd,
    options=WassersteinAttentionOptions,
)
wasserstein_attention_bwd = define(
    "wasserstein_attention_bwd(Tensor dmean, Tensor dcov, Tensor mean, Tensor cov, Tensor vectors, Tensor row_stats, "
    f"{_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cpu=_bwd,
    cuda=_bwd,
    fake=_fake_bwd,
    options=WassersteinAttentionOptions,
)


def _fake_factors(mean_q, *_):
    *sizes, head_dim = mean_q.shape
    columns = 2 if mean_q.dtype == torch.float32 else 4
    return tuple(mean_q.new_empty(*sizes, 2 * head_dim + columns) for _ in range(2))


def _fake_factors_bwd(dqueries, dkeys, queries, keys, *tensors):
    return tuple(x.new_empty(x.shape) for x in tensors[:4])


def _factors(mean_q, cov_q, mean_k, cov_k, seq_lens, seq_starts, cu_seqlens):
    options = WassersteinAttentionOptions("logits", False, None)
    return _factors_reference(mean_q, cov_q, mean_k, cov_k, seq_lens, seq_starts, cu_seqlens, options)


def _factors_inputs(dqueries, dkeys, _queries, _keys, *inputs):
    return (dqueries, dkeys), inputs


_factors_fwd = or_reference("wasserstein_factors", _factors, like=_fake_factors)(triton.wasserstein_factors_fwd)
_factors_bwd = or_reference_gradients(
    "wasserstein_factors", _factors, like=_fake_factors_bwd, split=_factors_inputs, wrt=range(4)
)(triton.wasserstein_factors_bwd)
_FACTORS = f"Tensor mean_q, Tensor cov_q, Tensor mean_k, Tensor cov_k, {_LENGTHS}"
wasserstein_factors_fwd = define(
    f"wasserstein_factors_fwd({_FACTORS}) -> (Tensor, Tensor)",
    cpu=_factors_fwd,
    cuda=_factors_fwd,
    fake=_fake_factors,
)
wasserstein_factors_bwd = define(
    f"wasserstein_factors_bwd(Tensor dqueries, Tensor dkeys, Tensor queries, Tensor keys, {_FACTORS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    cpu=_factors_bwd,
    cuda=_factors_bwd,
    fake=_fake_factors_bwd,
)

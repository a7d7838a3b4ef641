"""wasserstein_attention on a CPU, in C++ (csrc/cpu/wasserstein_attention.cpp)."""

import torch
from torch import Tensor

from recattn import reference
from recattn._extension import MISSING
from recattn.ops._library import differentiable_again, refuse_dropout
from recattn.ops.refined_attention.cpu import gaussian_options

_OPS = torch.ops.recattn


def unsupported_reason(mean_q: Tensor | None) -> str | None:
    """Why the kernels cannot run a call (None: they can)."""
    if mean_q is not None and mean_q.dtype == torch.float64:
        return "its kernels compute in float32, and mean_q is float64"
    return MISSING.get("cpu")


def _reference(
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, w_q, w_k, seq_lens, seq_starts, cu_seqlens, _dropout_seed, options
) -> tuple[Tensor, Tensor]:
    refuse_dropout("wasserstein_attention", options.dropout_p)
    return reference.wasserstein_attention(
        mean_q,
        cov_q,
        mean_k,
        cov_k,
        mean_v,
        cov_v,
        w_q=w_q,
        w_k=w_k,
        source=options.source,
        causal=options.causal,
        seq_lens=seq_lens,
        seq_starts=seq_starts,
        cu_seqlens=cu_seqlens,
        scale=options.scale,
    )


class WassersteinAttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        *tensors, options = inputs
        ctx.save_for_backward(*tensors)
        ctx.options = options
        return _OPS.wasserstein_attention_pairs_fwd.default(*tensors, *gaussian_options(options))

    @staticmethod
    @differentiable_again(_reference)
    def backward(ctx, dmean, dcov):
        tensors = ctx.saved_tensors
        gradients = _OPS.wasserstein_attention_pairs_bwd.default(dmean, dcov, *tensors, *gaussian_options(ctx.options))
        if tensors[6] is None:
            gradients = (*gradients[:6], None, None)
        return *gradients, None, None, None, None, None


if "cpu" not in MISSING:

    def _empty_like(x: Tensor | None, like: Tensor) -> Tensor:
        return like.new_empty(0) if x is None else like.new_empty(x.shape)

    @torch.library.register_fake("recattn::wasserstein_attention_pairs_fwd")
    def _fake_fwd(mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, *_):
        return mean_v.new_empty(mean_v.shape), _empty_like(cov_v, mean_v)

    @torch.library.register_fake("recattn::wasserstein_attention_pairs_bwd")
    def _fake_bwd(dmean, dcov, *tensors):
        return tuple(_empty_like(x, dmean) for x in tensors[:8])

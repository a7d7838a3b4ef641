"""An attention without bias in PyTorch, in float64, for the correction path of sink_attention to correct anywhere."""

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from recattn.ops import sink_attention as ops
from recattn.ops.backends import BACKENDS, AttentionBackend
from recattn.triton_kernels.sink_attention import CorrectionConfig, PairsConfig
from tests.helpers.interpreted import DEVICE


@contextlib.contextmanager
def eager_backend_on_any_device() -> Iterator[None]:
    """`impl="correction:eager"`, on a CPU too, by Triton's interpreter."""
    unsupported_reasons = ops.unsupported_reasons

    def with_correction(*args, **options) -> dict:
        return {**unsupported_reasons(*args, **options), "correction": None}

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.dict(BACKENDS, eager=EAGER))
        patches.enter_context(mock.patch.object(ops, "unsupported_reasons", with_correction))
        if DEVICE == "cpu":
            # The interpreter's time goes by the number of tiles; the shipped ones have tests in tests/triton.
            for config in (CorrectionConfig, PairsConfig):
                tiles = config(32, 32, 16, num_warps=4, num_stages=1)
                patches.enter_context(mock.patch.object(config, "heuristic", return_value=tiles))
        yield


def unbiased(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    """Token-major scores [B, Hq, N, N], -inf where masked."""
    q, k = q.transpose(1, 2).double(), k.transpose(1, 2).double()
    scores = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf) if causal else scores


def eager_fwd(q, k, v, options):
    if options.cu_seqlens is not None:
        parts = [eager_fwd(*one, options._replace(cu_seqlens=None)) for one in sequences(options, q, k, v)]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], 1)
    scores = unbiased(q, k, options.scale, options.causal)
    values = v.transpose(1, 2).double().repeat_interleave(q.shape[2] // v.shape[2], 1)
    return (scores.softmax(-1) @ values).to(q.dtype).transpose(1, 2), scores.logsumexp(-1).float()


def eager_bwd(dout, q, k, v, out, lse, options):
    if options.cu_seqlens is not None:
        parts = [
            eager_bwd(*one[:5], rows.unsqueeze(0), options._replace(cu_seqlens=None))
            for *one, rows in zip(
                *zip(*sequences(options, dout, q, k, v, out), strict=True),
                lse.split(options.cu_seqlens.diff().tolist(), 1),
                strict=True,
            )
        ]
        return tuple(torch.cat([part[i][0] for part in parts]) for i in range(3))
    groups = q.shape[2] // k.shape[2]
    weights = (unbiased(q, k, options.scale, options.causal) - lse.unsqueeze(-1)).exp()
    dout, out, q, k, v = (x.transpose(1, 2).double() for x in (dout, out, q, k, v))
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    dscores = options.scale * weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True))
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dscores.mT @ q, weights.mT @ dout))
    return tuple(x.transpose(1, 2) for x in (dscores @ k, dk, dv))


def sequences(options, *packed: Tensor) -> list[tuple[Tensor, ...]]:
    lengths = options.cu_seqlens.diff().tolist()
    return [tuple(x.unsqueeze(0) for x in one) for one in zip(*(x.split(lengths) for x in packed), strict=True)]


def eager_grads(dout, q, k, v, *others):
    return tuple(grad.to(x.dtype) for grad, x in zip(eager_bwd(dout, q, k, v, *others), (q, k, v), strict=True))


EAGER = AttentionBackend("eager", lambda call: None, eager_fwd, eager_grads, deterministic=True)

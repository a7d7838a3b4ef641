"""An attention without bias in PyTorch, in float64, for the correction path of sink_attention to correct anywhere."""

import contextlib
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from recattn.ops import sink_attention as ops
from recattn.ops.backends import BACKENDS, AttentionBackend
from recattn.triton_kernels.sink_attention import CorrectionConfig, PairsConfig
from tests.helpers.backend_stand_ins import attend, attend_backward
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


def sequences(options, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Those of tensors [B, N, ...], or of packed [T, ...]."""
    if options.cu_seqlens is None:
        return list(zip(*tensors, strict=True))
    lengths = options.cu_seqlens.diff().tolist()
    return list(zip(*(x.split(lengths) for x in tensors), strict=True))


def joined(options, parts: Sequence[Tensor], tokens: int = 0) -> Tensor:
    return torch.stack(list(parts)) if options.cu_seqlens is None else torch.cat(list(parts), tokens)


def eager_fwd(q, k, v, options):
    outs, lses = zip(*(attend(*one, options.causal, options.scale) for one in sequences(options, q, k, v)), strict=True)
    return joined(options, outs).to(q.dtype), joined(options, lses, tokens=1).float()


def eager_bwd(dout, q, k, v, out, lse, options):
    rows = lse if options.cu_seqlens is None else lse.split(options.cu_seqlens.diff().tolist(), 1)
    parts = zip(sequences(options, dout, q, k, v, out), rows, strict=True)
    grads = zip(*(attend_backward(*one, row, options.causal, options.scale) for one, row in parts), strict=True)
    return tuple(joined(options, grad).to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))


EAGER = AttentionBackend("eager", lambda call: None, eager_fwd, eager_bwd, deterministic=True)

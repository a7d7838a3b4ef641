"""Which implementation of sink_attention runs a call on a GPU: the fused kernel, or the correction of a backend.

dispatch.json holds measurements per device, written by `python -m benchmarks.tools.tune_dispatch`: the row of the
nearest shape decides. A device without rows gets a heuristic. The choice depends only on the call, so a backward makes
the choice of its forward.
"""

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recattn._dispatch import format_implementation, parse_implementation
from recattn._options import SinkAttentionOptions
from recattn.ops.backends import BACKENDS, Call

FUSED = "triton"
CORRECTION = "correction"
_TABLE = Path(__file__).with_suffix(".json")
# Up to this length the correction's extra launches cost more than a faster backend saves.
_SHORT = 512
# Beyond this share of sinks the M×M kernels cost more than a faster backend saves.
_MANY_SINKS = 0.3


class Shape(NamedTuple):
    """What the choice depends on, besides which backends support the call."""

    device: str
    dtype: str
    head_dim: int
    length: int
    sink_share: float
    causal: bool
    packed: bool


def resolve(
    options: SinkAttentionOptions,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_positions: Tensor,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[str, str | None]:
    """The (impl, backend) that run a call.

    A backend that the options name must support the call; otherwise a supported one is chosen.
    """
    packed = cu_seqlens is not None
    unbounded = packed and options.max_seqlen is None  # no backend serves it
    fused_only = options.dropout_p > 0 or seq_lens is not None or unbounded or q.dtype == torch.float64
    if options.impl == FUSED or (options.impl is None and fused_only):
        return FUSED, None
    if options.backend is not None:
        reason = BACKENDS[options.backend].unsupported_reason(_call(options, q, k, v, cu_seqlens))
        if reason is not None:
            name = format_implementation(CORRECTION, options.backend)
            raise NotImplementedError(f"sink_attention cannot run impl={name!r} here: {reason}")
        return CORRECTION, options.backend
    length = options.max_seqlen or q.shape[0] if packed else q.shape[2]
    measured = _measurements()
    if options.impl is None and length <= _SHORT and (not measured or _device_name(q.device) not in measured):
        return FUSED, None  # the heuristic's choice, sooner
    shape = Shape(
        _device_name(q.device),
        "float32" if q.dtype == torch.float32 else "bfloat16",  # float16 runs at its speed
        max(q.shape[-1], v.shape[-1]),
        length,
        sink_positions.shape[1] / max(length, 1),
        options.causal,
        packed,
    )
    # Which backends support the call is asked last: it takes longer than a small call.
    call = None
    for impl, backend in ranked(shape):
        if impl == FUSED and options.impl is None:
            return FUSED, None
        if backend is not None:
            call = call or _call(options, q, k, v, cu_seqlens)
            if BACKENDS[backend].unsupported_reason(call) is None:
                return CORRECTION, backend
    call = call or _call(options, q, k, v, cu_seqlens)
    listed = "; ".join(f"{name}: {backend.unsupported_reason(call)}" for name, backend in BACKENDS.items())
    raise NotImplementedError(f"sink_attention cannot run impl='correction' here, no backend supports it: {listed}")


def _call(options: SinkAttentionOptions, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Call:
    return Call.of(q, k, v, scale=options.scale, cu_seqlens=cu_seqlens, max_seqlen=options.max_seqlen)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


@functools.lru_cache(4096)
def ranked(shape: Shape) -> list[tuple[str | None, str | None]]:
    """Every (impl, backend), the fastest first: the heuristic's choice where nothing was measured."""
    return [parse_implementation(name) for name in ranking(shape, tuple(BACKENDS), _measurements())]


def ranking(shape: Shape, backends: Sequence[str], measurements: dict) -> list[str]:
    """The implementations' names as in the table ("triton", "correction:flash"), the fastest first.

    The nearest measured row comes first, with its own order, and the heuristic's order last.
    """
    rows = measurements.get(shape.device, {"rows": []})["rows"]
    kind = (shape.dtype, shape.causal, shape.packed)
    rows_of_kind = [row for row in rows if (row["dtype"], row["causal"], row["packed"]) == kind]
    names = [
        name
        for row in sorted(rows_of_kind, key=functools.partial(_distance, shape))
        for name in sorted(row["times_ms"], key=row["times_ms"].__getitem__)
    ]
    prefers_fused = shape.length <= _SHORT or shape.sink_share > _MANY_SINKS or shape.dtype == "float32"
    corrections = [format_implementation(CORRECTION, backend) for backend in backends]
    every = [FUSED, *corrections] if prefers_fused else [*corrections, FUSED]
    return list(dict.fromkeys([*(name for name in names if name in every), *every]))


def _distance(shape: Shape, row: dict) -> float:
    """In doublings. A head dim counts most, for it changes the kernels; a share of sinks counts least."""
    return (
        4 * abs(math.log2(shape.head_dim / row["head_dim"]))
        + abs(math.log2(max(shape.length, 1) / row["length"]))
        + abs(math.log2((shape.sink_share + 0.01) / (row["sink_share"] + 0.01)))
    )


@functools.cache
def _measurements() -> dict:
    return json.loads(_TABLE.read_text()) if _TABLE.exists() else {}

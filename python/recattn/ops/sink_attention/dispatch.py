"""Which implementation of sink_attention runs a call on a GPU: the fused kernel, or the correction of a backend.

dispatch.json holds measurements per device, written by `python -m benchmarks.tools.tune_dispatch`: the row of the
nearest shape decides. A device without rows gets a heuristic. The choice depends only on the call, so a backward makes
the choice of its forward.
"""

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recattn._dispatch import format_implementation
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
    fused_only = options.dropout_p > 0 or seq_lens is not None or q.dtype == torch.float64
    if options.impl == FUSED or (options.impl is None and fused_only):
        return FUSED, None
    if options.backend is not None:
        call = Call.of(q, k, v, scale=options.scale, cu_seqlens=cu_seqlens, max_seqlen=options.max_seqlen)
        reason = BACKENDS[options.backend].unsupported_reason(call)
        if reason is not None:
            name = format_implementation(CORRECTION, options.backend)
            raise NotImplementedError(f"sink_attention cannot run impl={name!r} here: {reason}")
        return CORRECTION, options.backend
    packed = cu_seqlens is not None
    length = (options.max_seqlen if packed else q.shape[2]) or q.shape[0]
    shape = Shape(
        _device_name(q.device),
        "float32" if q.dtype == torch.float32 else "bfloat16",  # float16 runs at its speed
        max(q.shape[-1], v.shape[-1]),
        length,
        sink_positions.shape[1] / max(length, 1),
        options.causal,
        packed,
    )
    call = None
    reasons: dict[str, str] = {}
    for name in (*_measured_order(shape), *_heuristic_order(shape)):
        if name == FUSED:
            if options.impl is None:
                return FUSED, None
            continue
        backend = name.removeprefix(f"{CORRECTION}:")
        if backend not in BACKENDS or backend in reasons:
            continue
        # What a backend supports is asked only here: a call takes 20 µs to ask them all.
        call = call or Call.of(q, k, v, scale=options.scale, cu_seqlens=cu_seqlens, max_seqlen=options.max_seqlen)
        reason = BACKENDS[backend].unsupported_reason(call)
        if reason is None:
            return CORRECTION, backend
        reasons[backend] = reason
    listed = "; ".join(f"{name}: {reasons[name]}" for name in BACKENDS)
    raise NotImplementedError(f"sink_attention cannot run impl='correction' here, no backend supports it: {listed}")


def choose(shape: Shape, supported: list[str], measurements: dict) -> str:
    """The fastest of the supported implementations in the nearest measured row, else the heuristic's choice.

    Implementations are named as in the table: "triton", "correction:flash".
    """
    order = (*measured_order(shape, measurements), *_heuristic_order(shape, supported))
    return next(name for name in order if name in supported)


def measured_order(shape: Shape, measurements: dict) -> tuple[str, ...]:
    """The implementations measured on a device: the nearest row's first, the fastest of a row first."""
    rows = [
        row
        for row in measurements.get(shape.device, {"rows": []})["rows"]
        if (row["dtype"], row["causal"], row["packed"]) == (shape.dtype, shape.causal, shape.packed)
    ]
    by_distance = sorted(rows, key=functools.partial(_distance, shape))
    return tuple(
        dict.fromkeys(name for row in by_distance for name in sorted(row["times_ms"], key=row["times_ms"].get))
    )


@functools.lru_cache(maxsize=4096)
def _measured_order(shape: Shape) -> tuple[str, ...]:
    return measured_order(shape, _measurements())


def _heuristic_order(shape: Shape, names: Iterable[str] | None = None) -> tuple[str, ...]:
    """All implementations, or those given, in the order to try them where nothing was measured."""
    if names is None:
        names = [format_implementation(CORRECTION, name) for name in BACKENDS]
    corrections = [name for name in names if name != FUSED]
    prefers_fused = shape.length <= _SHORT or shape.sink_share > _MANY_SINKS or shape.dtype == "float32"
    return (FUSED, *corrections) if prefers_fused else (*corrections, FUSED)


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


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

"""Which implementation of sink_attention runs a call on a GPU: the fused kernel, or the correction of a backend.

dispatch.json holds measurements per device, written by `python -m benchmarks.tools.tune_dispatch`: the row of the
nearest shape decides. A device without rows gets a heuristic. The choice depends only on the call, so a backward makes
the choice of its forward.
"""

import functools
import json
import math
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
    call = Call.of(q, k, v, scale=options.scale, cu_seqlens=cu_seqlens, max_seqlen=options.max_seqlen)
    if options.backend is not None:
        reason = BACKENDS[options.backend].unsupported_reason(call)
        if reason is not None:
            name = format_implementation(CORRECTION, options.backend)
            raise NotImplementedError(f"sink_attention cannot run impl={name!r} here: {reason}")
        return CORRECTION, options.backend
    reasons = {name: backend.unsupported_reason(call) for name, backend in BACKENDS.items()}
    choices = [(CORRECTION, name) for name, reason in reasons.items() if reason is None]
    if options.impl is None:
        choices.insert(0, (FUSED, None))
    elif not choices:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"sink_attention cannot run impl='correction' here, no backend supports it: {listed}")
    length = call.max_seqlen or q.shape[0]
    shape = Shape(
        torch.cuda.get_device_name(q.device),
        "float32" if q.dtype == torch.float32 else "bfloat16",  # float16 runs at its speed
        max(call.head_dim, call.value_dim),
        length,
        sink_positions.shape[1] / max(length, 1),
        options.causal,
        call.packed,
    )
    by_name = {format_implementation(*choice): choice for choice in choices}
    return by_name[choose(shape, list(by_name), _measurements())]


def choose(shape: Shape, supported: list[str], measurements: dict) -> str:
    """The fastest of the supported implementations in the nearest measured row, else the heuristic's choice.

    Implementations are named as in the table: "triton", "correction:flash".
    """
    rows = measurements.get(shape.device, {"rows": []})["rows"]
    rows_of_kind = [
        row
        for row in rows
        if (row["dtype"], row["causal"], row["packed"]) == (shape.dtype, shape.causal, shape.packed)
        and any(name in row["times_ms"] for name in supported)
    ]
    if rows_of_kind:
        times = min(rows_of_kind, key=functools.partial(_distance, shape))["times_ms"]
        return min((name for name in supported if name in times), key=times.get)
    corrections = [name for name in supported if name != FUSED]
    prefers_fused = shape.length <= _SHORT or shape.sink_share > _MANY_SINKS or shape.dtype == "float32"
    if not corrections or (prefers_fused and FUSED in supported):
        return FUSED
    return corrections[0]


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

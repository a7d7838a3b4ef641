"""Which path of sink_attention runs a call on a GPU: "triton" (fused), or "correction:<base>".

What was measured on a device decides there (dispatch.json, written by `python -m benchmarks.tools.tune_dispatch`):
the row whose shape is nearest. Elsewhere a heuristic does. The choice depends on nothing but the call, so the backward
comes to that of its forward.
"""

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from recattn.ops.backends import BASES, Call

FUSED = "triton"
CORRECTION = "correction"
_TABLE = Path(__file__).with_suffix(".json")
# Below this length the correction's launches cost more than a faster base saves; with so many sinks its pairs do.
_SHORT = 512
_MANY_SINKS = 0.3


class Shape(NamedTuple):
    """What the choice depends on besides what the bases can serve."""

    device: str
    dtype: str
    head_dim: int
    length: int
    sink_share: float
    causal: bool
    packed: bool


def resolve(
    path: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_positions: Tensor,
    seq_lens: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    causal: bool,
    scale: float,
    dropout_p: float,
    max_seqlen: int | None,
) -> str:
    """The path that runs a call; a path that names its base is checked, "correction" finds one."""
    if path == FUSED or (path == "auto" and (dropout_p > 0 or seq_lens is not None or q.dtype == torch.float64)):
        return FUSED
    call = Call.of(q, k, v, scale=scale, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    bases = {f"{CORRECTION}:{base.name}": base.refusal(call) for base in BASES.values()}
    if path in bases:
        if bases[path] is not None:
            raise NotImplementedError(f"sink_attention cannot run base={path.partition(':')[2]!r} here: {bases[path]}")
        return path
    usable = [name for name, why in bases.items() if why is None]
    if path == CORRECTION and not usable:
        reasons = "; ".join(f"{name.partition(':')[2]}: {why}" for name, why in bases.items())
        raise NotImplementedError(f"sink_attention cannot run impl='correction' here, it finds no base: {reasons}")
    length = call.max_seqlen or q.shape[0]
    shape = Shape(
        torch.cuda.get_device_name(q.device),
        "float32" if q.dtype == torch.float32 else "bfloat16",  # float16 runs at its speed
        max(call.head_dim, call.value_dim),
        length,
        sink_positions.shape[1] / max(length, 1),
        causal,
        call.packed,
    )
    return choose(shape, usable if path == CORRECTION else [FUSED, *usable], _measurements())


def choose(shape: Shape, usable: list[str], measurements: dict) -> str:
    """The fastest usable path of the nearest row measured, or the heuristic's."""
    rows = measurements.get(shape.device, {"rows": []})["rows"]
    same_kind = [
        row
        for row in rows
        if (row["dtype"], row["causal"], row["packed"]) == (shape.dtype, shape.causal, shape.packed)
        and any(path in row["times_ms"] for path in usable)
    ]
    if same_kind:
        times = min(same_kind, key=functools.partial(_distance, shape))["times_ms"]
        return min((path for path in usable if path in times), key=times.get)
    corrections = [path for path in usable if path != FUSED]
    fused_suits = shape.length <= _SHORT or shape.sink_share > _MANY_SINKS or shape.dtype == "float32"
    if not corrections or (fused_suits and FUSED in usable):
        return FUSED
    return corrections[0]


def _distance(shape: Shape, row: dict) -> float:
    """In doublings; the head dim changes the kernels, the length their number, the share of sinks little."""
    return (
        4 * abs(math.log2(shape.head_dim / row["head_dim"]))
        + abs(math.log2(max(shape.length, 1) / row["length"]))
        + abs(math.log2((shape.sink_share + 0.01) / (row["sink_share"] + 0.01)))
    )


@functools.cache
def _measurements() -> dict:
    return json.loads(_TABLE.read_text()) if _TABLE.exists() else {}

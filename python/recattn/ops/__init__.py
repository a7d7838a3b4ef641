"""Operators: schemas, fake kernels, kernels of each device, autograd. One package or file per operator."""

from collections.abc import Callable
from functools import partial

from recattn.ops import inter_sink_bias, lrea_attention, refined_attention, sink_attention, wasserstein_attention

# For each public operator: device type -> {implementation: why it cannot run there (None: it can)}, best first.
UNSUPPORTED_REASONS: dict[str, Callable[..., dict[str, str | None]]] = {
    "sink_attention": sink_attention.unsupported_reasons,
    "inter_sink_bias": inter_sink_bias.unsupported_reasons,
    "refined_attention": refined_attention.unsupported_reasons,
    "wasserstein_attention": wasserstein_attention.unsupported_reasons,
    "lrea_compress": partial(lrea_attention.unsupported_reasons, op="lrea_compress"),
    "lrea_attention": partial(lrea_attention.unsupported_reasons, op="lrea_attention"),
    "lrea_absorbed_attention": partial(lrea_attention.unsupported_reasons, op="lrea_absorbed_attention"),
}

"""Operators: schemas, fake kernels, CPU kernels, autograd. One file an operator."""

from functools import partial

from recattn.ops import inter_sink_bias, lrea_attention, refined_attention, sink_attention, wasserstein_attention

# For each public operator, what runs on a device type: implementation -> why not (None: it can), best first.
AVAILABILITY = {
    "sink_attention": sink_attention.availability,
    "inter_sink_bias": inter_sink_bias.availability,
    "refined_attention": refined_attention.availability,
    "wasserstein_attention": wasserstein_attention.availability,
    "lrea_compress": partial(lrea_attention.availability, op="lrea_compress"),
    "lrea_attention": partial(lrea_attention.availability, op="lrea_attention"),
    "lrea_absorbed_attention": partial(lrea_attention.availability, op="lrea_absorbed_attention"),
}

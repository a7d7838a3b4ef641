"""The projection x = A W of refined_attention, forward and backward."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.refined_attention.projection import Batch, Group, launch_product, launch_states
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

BATCH, HEADS, LENGTH = 2, 8, 2000


def shipped_configurations() -> Iterator[Compilation]:
    """Head dims and dtypes in use, with R = D. The length is not divisible by 16 times a power of two."""
    ones = meta(BATCH, dtype=torch.int64)
    batch = Batch(BATCH, LENGTH, Lengths(ones, ones), causal=True)
    for architecture, dtype, D in itertools.product(ARCHITECTURES, DTYPES, (32, 64, 128, 256)):
        q, x = (meta(BATCH, HEADS, LENGTH, width, dtype=dtype) for width in (D, 2 * D))
        w = meta(LENGTH, 2 * D, dtype=dtype).expand_as(x)
        states = meta(BATCH * HEADS, 4, D, 2 * D, dtype=dtype)
        label = f"{name_of(dtype)} D={D} {{E}}x{{F}}"
        yield from recorded(label, architecture, partial(launch_states, q, w, batch))
        yield from recorded(f"{label} reversed", architecture, partial(launch_states, q, x, batch, reversed=True))
        yield from recorded(label, architecture, partial(launch_product, q, q, w, states, x, batch, 0.125))
        yield from recorded(label, architecture, partial(launch_product, x, w, q, states.mT, q, batch, 0.125))
        yield from recorded(
            f"{label} reversed",
            architecture,
            partial(launch_product, w, x, q, states.mT, q, batch, 0.125, reversed=True),
        )
        partials, group = meta(4, 1, LENGTH, 2 * D), Group(HEADS, BATCH * HEADS, 4, 4)
        yield from recorded(
            f"{label} reversed summed",
            architecture,
            partial(launch_product, q, q, x, states, partials, batch, 0.125, reversed=True, summed_over=group),
        )
        tokens, packed = meta(LENGTH, HEADS, D, dtype=dtype), batch._replace(lengths=Lengths(cu_seqlens=ones))
        x = meta(LENGTH, HEADS, 2 * D, dtype=dtype)
        yield from recorded(f"{label} packed", architecture, partial(launch_states, tokens, w, packed))
        yield from recorded(
            f"{label} packed", architecture, partial(launch_product, tokens, tokens, w, states, x, packed, 0.125)
        )

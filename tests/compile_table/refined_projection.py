"""The projection x = A W of refined_attention, forward and backward."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from recattn.triton_kernels.refined_attention.projection import Group, Mask, launch_product, launch_states
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

BATCH, HEADS, LENGTH = 2, 8, 2000


def shipped_configurations() -> Iterator[Compilation]:
    """Head dims and dtypes in use, with R = D. The length is not divisible by 16 times a power of two."""
    mask = Mask(meta(BATCH, dtype=torch.int64), causal=True, left_padded=False)
    for architecture, dtype, D in itertools.product(ARCHITECTURES, DTYPES, (32, 64, 128, 256)):
        q, x = (meta(BATCH, HEADS, LENGTH, width, dtype=dtype) for width in (D, 2 * D))
        w = meta(LENGTH, 2 * D, dtype=dtype).expand_as(x)
        states = meta(BATCH * HEADS, 4, D, 2 * D, dtype=dtype)
        label = f"{name_of(dtype)} D={D} {{E}}x{{F}}"
        yield from recorded(label, architecture, partial(launch_states, q, w, mask))
        yield from recorded(f"{label} reversed", architecture, partial(launch_states, q, x, mask, reversed=True))
        yield from recorded(label, architecture, partial(launch_product, q, q, w, states, x, mask, 0.125))
        yield from recorded(label, architecture, partial(launch_product, x, w, q, states.mT, q, mask, 0.125))
        yield from recorded(
            f"{label} reversed",
            architecture,
            partial(launch_product, w, x, q, states.mT, q, mask, 0.125, reversed=True),
        )
        partials, group = meta(4, 1, LENGTH, 2 * D), Group(HEADS, BATCH * HEADS, 4, 4)
        yield from recorded(
            f"{label} reversed summed",
            architecture,
            partial(launch_product, q, q, x, states, partials, mask, 0.125, reversed=True, summed_over=group),
        )

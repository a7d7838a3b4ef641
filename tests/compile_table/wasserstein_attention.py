"""wasserstein_attention, forward and backward."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout
from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.wasserstein_attention import (
    Forward,
    factors_width,
    launch_wasserstein_attention_bwd,
    launch_wasserstein_attention_fwd,
    launch_wasserstein_attention_short_bwd,
    launch_wasserstein_attention_short_fwd,
    launch_wasserstein_attention_vectors,
    launch_wasserstein_factors_bwd,
    launch_wasserstein_factors_fwd,
)
from recattn.triton_kernels.wasserstein_attention.config import LARGEST_SHORT_HEAD_DIM
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

SHAPE = BATCH, HEADS, LENGTH = 2, 8, 500
# Of the vectors, twice the head dim, and of the values: STOSA's heads of 16 to 128, and R = 100.
WIDTHS = ((32, 16), (64, 32), (128, 64), (256, 128), (200, 16))
REFINED_WIDTH = PACKED_WIDTH = 64
# STOSA's heads. With dropout or a refinement, the largest takes the most registers.
SHORT_LENGTHS = (32, 64, 128)
SHORT_HEAD_DIMS = (16, 32, 64)
OPTIONS = WassersteinAttentionOptions("logits", causal=True, scale=0.125)


def shipped_configurations() -> Iterator[Compilation]:
    lengths, seed = Lengths(meta(BATCH, dtype=torch.int64)), meta(1, dtype=torch.int64)
    for architecture, dtype, (width, value_dim) in itertools.product(ARCHITECTURES, DTYPES, WIDTHS):
        x, v = meta(*SHAPE, width // 2, dtype=dtype), meta(*SHAPE, value_dim, dtype=dtype)
        forward = Forward(x, x, x, x, v, v, v, v, meta(2, *SHAPE, width, dtype=dtype), meta(2, *SHAPE))
        gradients = (x, x, x, x, v, v)
        if width < max(WIDTHS)[0]:
            factors = meta(*SHAPE, factors_width(width // 2, dtype), dtype=dtype)
            label = f"{name_of(dtype)} W={width}"
            tensors = ((x, x, x, x), factors, factors, lengths)
            yield from recorded(label, architecture, launch_wasserstein_factors_fwd, *tensors)
            tensors = (factors, factors, factors, factors, x, x, (x, x, x, x), lengths)
            yield from recorded(label, architecture, launch_wasserstein_factors_bwd, *tensors)
        # A refinement changes what comes before the loops and after them.
        kinds = {"": (OPTIONS, NO_DROPOUT), " dropout": (OPTIONS, Dropout(seed, 6554))}
        if width == REFINED_WIDTH:
            kinds[" refined"] = (OPTIONS._replace(refined=True), NO_DROPOUT)
        for kind, (options, dropout) in kinds.items():
            label = f"{name_of(dtype)} W={width} Dv={value_dim}"
            if kind != " dropout":
                yield from recorded(
                    label + kind, architecture, launch_wasserstein_attention_vectors, forward, lengths, options
                )
            label += " {BLOCK_M}x{BLOCK_N}" + kind
            launch = partial(launch_wasserstein_attention_fwd, forward)
            yield from recorded(label, architecture, launch, lengths, options, dropout=dropout)
            launch = partial(launch_wasserstein_attention_bwd, forward, v, v, gradients)
            yield from recorded(label, architecture, launch, lengths, options, dropout=dropout)
    yield from short_configurations()
    yield from packed_configurations()


def short_configurations() -> Iterator[Compilation]:
    lengths, seed = Lengths(meta(BATCH, dtype=torch.int64)), meta(1, dtype=torch.int64)
    kinds = {"": (OPTIONS, NO_DROPOUT), " dropout": (OPTIONS, Dropout(seed, 6554))}
    kinds[" refined"] = (OPTIONS._replace(refined=True), NO_DROPOUT)
    for architecture, length, head_dim in itertools.product(ARCHITECTURES, SHORT_LENGTHS, SHORT_HEAD_DIMS):
        x = meta(BATCH, HEADS, length, head_dim, dtype=torch.bfloat16)
        for kind, (options, dropout) in kinds.items():
            largest = LARGEST_SHORT_HEAD_DIM[architecture][0 if length <= 64 else 2 if kind else 1]
            if head_dim > largest or (kind and head_dim < largest):
                continue
            label = f"bfloat16 N={length} D={head_dim}{kind}"
            tensors = ([x] * 6, x, x, lengths, options)
            yield from recorded(label, architecture, launch_wasserstein_attention_short_fwd, *tensors, dropout=dropout)
            tensors = (x, x, [x] * 6, [x] * 6, lengths, options)
            yield from recorded(label, architecture, launch_wasserstein_attention_short_bwd, *tensors, dropout=dropout)


def packed_configurations() -> Iterator[Compilation]:
    """Packed sequences differ in where tiles and rows lie."""
    tokens, lengths = BATCH * LENGTH, Lengths(cu_seqlens=meta(BATCH + 1, dtype=torch.int64))
    width, head_dim = PACKED_WIDTH, PACKED_WIDTH // 2
    for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES):
        x, factors = (meta(tokens, HEADS, d, dtype=dtype) for d in (head_dim, factors_width(head_dim, dtype)))
        forward = Forward(*[x] * 8, meta(2, tokens, HEADS, width, dtype=dtype), meta(2, tokens, HEADS))
        label = f"{name_of(dtype)} W={width} Dv={head_dim}"
        record = partial(recorded, f"{label} packed", architecture)
        yield from record(launch_wasserstein_factors_fwd, [x] * 4, factors, factors, lengths)
        yield from record(launch_wasserstein_factors_bwd, *[factors] * 4, x, x, [x] * 4, lengths)
        yield from record(launch_wasserstein_attention_vectors, forward, lengths, OPTIONS)
        record = partial(recorded, label + " {BLOCK_M}x{BLOCK_N} packed", architecture)
        yield from record(launch_wasserstein_attention_fwd, forward, lengths, OPTIONS)
        yield from record(launch_wasserstein_attention_bwd, forward, x, x, [x] * 6, lengths, OPTIONS)
        if dtype == torch.bfloat16:
            options = OPTIONS._replace(max_seqlen=64)
            record = partial(recorded, f"bfloat16 N=64 D={head_dim} packed", architecture)
            yield from record(launch_wasserstein_attention_short_fwd, [x] * 6, x, x, lengths, options)
            yield from record(launch_wasserstein_attention_short_bwd, x, x, [x] * 6, [x] * 6, lengths, options)

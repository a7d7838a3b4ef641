"""wasserstein_attention, forward and backward."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout
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
REFINED_WIDTH = 64
# STOSA's heads. With dropout or a refinement, the largest takes the most registers.
SHORT_LENGTHS = (32, 64, 128)
SHORT_HEAD_DIMS = (16, 32, 64)
OPTIONS = WassersteinAttentionOptions("logits", causal=True, left_padded=False, scale=0.125)


def shipped_configurations() -> Iterator[Compilation]:
    seq_lens, seed = meta(BATCH, dtype=torch.int64), meta(1, dtype=torch.int64)
    for architecture, dtype, (width, value_dim) in itertools.product(ARCHITECTURES, DTYPES, WIDTHS):
        x, v = meta(*SHAPE, width // 2, dtype=dtype), meta(*SHAPE, value_dim, dtype=dtype)
        forward = Forward(x, x, x, x, v, v, v, v, meta(2, *SHAPE, width, dtype=dtype), meta(2, *SHAPE))
        gradients = (x, x, x, x, v, v)
        if width < max(WIDTHS)[0]:
            factors = meta(*SHAPE, factors_width(width // 2, dtype), dtype=dtype)
            label = f"{name_of(dtype)} W={width}"
            tensors = ((x, x, x, x), factors, factors, seq_lens, False)
            yield from recorded(label, architecture, launch_wasserstein_factors_fwd, *tensors)
            tensors = (factors, factors, factors, factors, x, x, (x, x, x, x), seq_lens, False)
            yield from recorded(label, architecture, launch_wasserstein_factors_bwd, *tensors)
        # A refinement changes what comes before the loops and after them.
        kinds = {"": (OPTIONS, NO_DROPOUT), " dropout": (OPTIONS, Dropout(seed, 6554))}
        if width == REFINED_WIDTH:
            kinds[" refined"] = (OPTIONS._replace(refined=True), NO_DROPOUT)
        for kind, (options, dropout) in kinds.items():
            label = f"{name_of(dtype)} W={width} Dv={value_dim}"
            if kind != " dropout":
                yield from recorded(
                    label + kind, architecture, launch_wasserstein_attention_vectors, forward, seq_lens, options
                )
            label += " {BLOCK_M}x{BLOCK_N}" + kind
            launch = partial(launch_wasserstein_attention_fwd, forward)
            yield from recorded(label, architecture, launch, seq_lens, options, dropout=dropout)
            launch = partial(launch_wasserstein_attention_bwd, forward, v, v, gradients)
            yield from recorded(label, architecture, launch, seq_lens, options, dropout=dropout)
    yield from short_configurations()


def short_configurations() -> Iterator[Compilation]:
    seq_lens, seed = meta(BATCH, dtype=torch.int64), meta(1, dtype=torch.int64)
    kinds = {"": (OPTIONS, NO_DROPOUT), " dropout": (OPTIONS, Dropout(seed, 6554))}
    kinds[" refined"] = (OPTIONS._replace(refined=True), NO_DROPOUT)
    for architecture, length, head_dim in itertools.product(ARCHITECTURES, SHORT_LENGTHS, SHORT_HEAD_DIMS):
        x = meta(BATCH, HEADS, length, head_dim, dtype=torch.bfloat16)
        for kind, (options, dropout) in kinds.items():
            largest = LARGEST_SHORT_HEAD_DIM[architecture][0 if length <= 64 else 2 if kind else 1]
            if head_dim > largest or (kind and head_dim < largest):
                continue
            label = f"bfloat16 N={length} D={head_dim}{kind}"
            tensors = ([x] * 6, x, x, seq_lens, options)
            yield from recorded(label, architecture, launch_wasserstein_attention_short_fwd, *tensors, dropout=dropout)
            tensors = (x, x, [x] * 6, [x] * 6, seq_lens, options)
            yield from recorded(label, architecture, launch_wasserstein_attention_short_bwd, *tensors, dropout=dropout)

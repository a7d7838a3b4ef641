"""wasserstein_attention, forward and backward."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from recattn._options import WassersteinAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout
from recattn.triton_kernels.wasserstein_attention.backward import launch_wasserstein_attention_bwd
from recattn.triton_kernels.wasserstein_attention.forward import launch_wasserstein_attention_fwd
from recattn.triton_kernels.wasserstein_attention.shared import Forward
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

SHAPE = BATCH, HEADS, LENGTH = 2, 8, 500
# Vectors and values: STOSA's heads of 16 to 128, and R = 100.
WIDTHS = ((32, 16), (64, 32), (128, 64), (256, 128), (200, 16))
OPTIONS = WassersteinAttentionOptions("logits", causal=True, left_padded=False, scale=0.125)


def shipped_configurations() -> Iterator[Compilation]:
    seq_lens, seed = meta(BATCH, dtype=torch.int64), meta(1, dtype=torch.int64)
    for architecture, dtype, (width, value_dim), dropout in itertools.product(
        ARCHITECTURES, DTYPES, WIDTHS, (NO_DROPOUT, Dropout(seed, 6554))
    ):
        x, v, row = meta(*SHAPE, width, dtype=dtype), meta(*SHAPE, value_dim, dtype=dtype), meta(*SHAPE)
        forward = Forward(x, x, v, v, v, v, row, row)
        label = f"{name_of(dtype)} W={width} Dv={value_dim} {{BLOCK_M}}x{{BLOCK_N}}"
        label += " dropout" if dropout is not NO_DROPOUT else ""
        yield from recorded(
            label,
            architecture,
            partial(launch_wasserstein_attention_fwd, forward, seq_lens, OPTIONS, dropout=dropout),
        )
        yield from recorded(
            label,
            architecture,
            partial(launch_wasserstein_attention_bwd, forward, v, v, x, x, v, v, seq_lens, OPTIONS, dropout=dropout),
        )

"""refined_attention of short sequences, forward and backward."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from recattn._options import RefinedAttentionOptions
from recattn.triton_kernels.common.dropout import Dropout
from recattn.triton_kernels.refined_attention.config import largest_n
from recattn.triton_kernels.refined_attention.short import launch_refined_attention_fwd
from recattn.triton_kernels.refined_attention.short_backward import launch_refined_attention_bwd
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

# "value" asks for no more than these.
KINDS = ((64, "simple"), (128, "simple"), (32, "additive"), (64, "additive"), (128, "additive"))
HEADS, NMAX = 4, 200


def shipped_configurations() -> Iterator[Compilation]:
    """Head dims and dtypes in use, with every option."""
    for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES):
        lengths = [N for N in (32, 50, 100) if largest_n(dtype, architecture) >= N]
        for N, (head_dim, mechanism) in itertools.product(lengths, KINDS):
            label = f"{name_of(dtype)} {mechanism} D={head_dim} {{BLOCK_M}}x{{BLOCK_N}}"
            q, w = meta(1, HEADS, N, head_dim, dtype=dtype), meta(NMAX, NMAX, dtype=dtype)
            dropout = Dropout(meta(1, dtype=torch.int64), 100)
            tensors = (q, q, q, w, w, None if mechanism == "simple" else w, meta(1, dtype=torch.int64))
            options = RefinedAttentionOptions(mechanism, "weights", causal=True, left_padded=False, scale=0.125)
            yield from recorded(
                label, architecture, partial(launch_refined_attention_fwd, *tensors, options, dropout=dropout)
            )
            yield from recorded(
                f"{label} stage {{STAGE}}",
                architecture,
                partial(launch_refined_attention_bwd, q, *tensors, options, dropout=dropout),
            )

"""refined_attention of short sequences, forward and backward."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch

from recattn._options import RefinedAttentionOptions
from recattn.triton_kernels.common.dropout import Dropout
from recattn.triton_kernels.common.launch import host_block_width
from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.refined_attention import (
    largest_n,
    launch_refined_attention_bwd,
    launch_refined_attention_fwd,
    launch_weights_bwd,
    launch_weights_product,
)
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

# "value" asks for no more than these.
KINDS = ((64, "simple"), (128, "simple"), (32, "additive"), (64, "additive"), (128, "additive"))
LENGTHS = (32, 50, 100)
HEADS, NMAX = 4, 200


def shipped_configurations() -> Iterator[Compilation]:
    """Head dims and dtypes in use, with every option."""
    for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES):
        for N in (N for N in LENGTHS if largest_n(dtype, architecture) >= N):
            yield from of_weights(N, dtype, architecture)
            for head_dim, mechanism in KINDS:
                yield from of_tokens(N, head_dim, mechanism, dtype, architecture)


def of_tokens(N: int, head_dim: int, mechanism: str, dtype: torch.dtype, architecture: int) -> Iterator[Compilation]:
    label = f"{name_of(dtype)} {mechanism} D={head_dim} {{BLOCK_M}}x{{BLOCK_N}}"
    q, w_v = meta(1, HEADS, N, head_dim, dtype=dtype), meta(NMAX, NMAX, dtype=dtype)
    size, w_v = host_block_width(N), None if mechanism == "simple" else w_v
    squares = meta(1 if w_v is None else 2, size, size, dtype=dtype)
    dropout = Dropout(meta(1, dtype=torch.int64), 100)
    ones = meta(2, dtype=torch.int64)
    inputs = (q, q, q, squares, w_v, Lengths(ones, ones))
    options = RefinedAttentionOptions(mechanism, "weights", causal=True, scale=0.125)
    fwd = partial(launch_refined_attention_fwd, *inputs, options, dropout=dropout)
    yield from recorded(label, architecture, fwd)
    bwd = partial(launch_refined_attention_bwd, q, *inputs, options, dropout=dropout)
    yield from recorded(f"{label} stage {{STAGE}}", architecture, bwd)
    if size == 128 and mechanism == "simple" and head_dim == 64:  # without dropout in one launch
        for source in ("logits", "weights"):
            of_source = options._replace(source=source)
            bwd = partial(launch_refined_attention_bwd, q, *inputs, of_source)
            yield from recorded(f"{label} stage {{STAGE}} {source} no dropout", architecture, bwd)
    if head_dim == 64:
        tokens, lengths = meta(N, HEADS, head_dim, dtype=dtype), Lengths(cu_seqlens=ones)
        inputs = (tokens, tokens, tokens, squares, w_v, lengths, options._replace(max_seqlen=N))
        fwd = partial(launch_refined_attention_fwd, *inputs, dropout=dropout)
        yield from recorded(f"{label} packed", architecture, fwd)
        bwd = partial(launch_refined_attention_bwd, tokens, *inputs, dropout=dropout)
        yield from recorded(f"{label} stage {{STAGE}} packed", architecture, bwd)


def of_weights(N: int, dtype: torch.dtype, architecture: int) -> Iterator[Compilation]:
    w, size = meta(NMAX, NMAX, dtype=dtype), host_block_width(N)
    label = f"{name_of(dtype)} {size}"
    yield from recorded(label, architecture, partial(launch_weights_product, w, w, w, N))
    sums = meta(1000, 1, size, size)
    yield from recorded(label, architecture, partial(launch_weights_bwd, w, w, w, sums, sums, N))

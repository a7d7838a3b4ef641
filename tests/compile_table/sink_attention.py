"""sink_attention: the fused path, the pairs of sinks and the correction, for the head dims and dtypes in use."""

import itertools
from collections.abc import Iterator

import torch

from recattn._options import SinkAttentionOptions
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout
from recattn.triton_kernels.sink_attention import (
    NO_LENGTHS,
    CorrectionConfig,
    Lengths,
    SinkInputs,
    Streams,
    launch_sink_attention_bwd,
    launch_sink_attention_correction_delta,
    launch_sink_attention_correction_fwd,
    launch_sink_attention_fwd,
    launch_sink_attention_pairs_bwd,
    launch_sink_attention_streams,
)
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

# Lengths that nothing divides.
B, HQ, HKV, N, M = 2, 8, 4, 500, 49
HEAD_DIMS = (32, 64, 128, 256)
OPTIONS = SinkAttentionOptions(causal=True, scale=0.125)


def shipped_configurations() -> Iterator[Compilation]:
    positions = meta(B, M, dtype=torch.int64)
    q = meta(B, HQ, N, 64)
    for architecture in ARCHITECTURES:
        arguments = (q, positions, NO_LENGTHS)
        yield from recorded("", architecture, launch_sink_attention_streams, *arguments)
    for architecture, dtype, head_dim in itertools.product(ARCHITECTURES, DTYPES, HEAD_DIMS):
        yield from fused(architecture, dtype, head_dim)
        yield from pairs(architecture, dtype, head_dim)
        yield from correction(architecture, dtype, head_dim)


def tensors(dtype: torch.dtype, head_dim: int, bias_heads: int):
    """q, k, lse, sink_stats and the sinks."""
    q, kv = (meta(B, heads, N, head_dim, dtype=dtype) for heads in (HQ, HKV))
    sinks = SinkInputs(meta(B, M, dtype=torch.int64), meta(B, bias_heads, M, M))
    return q, kv, meta(B, HQ, N), meta(2, B, HQ, M), sinks


def windows() -> Lengths:
    return Lengths(meta(B, dtype=torch.int64), meta(B, dtype=torch.int64))


def fused(architecture: int, dtype: torch.dtype, head_dim: int) -> Iterator[Compilation]:
    q, kv, lse, stats, sinks = tensors(dtype, head_dim, 1)
    streams = Streams(meta(B, N, dtype=torch.int8), meta(B, N, dtype=torch.int32), meta(B, 2, dtype=torch.int32))
    of_training = windows(), Dropout(meta(1, dtype=torch.int64), 6554)
    for kind, (lengths, dropout) in (("", (NO_LENGTHS, NO_DROPOUT)), (" dropout padded", of_training)):
        label = f"{name_of(dtype)} D={head_dim} {{BLOCK_M}}x{{BLOCK_N}}{kind}"
        rest = (sinks, lengths, streams, dropout)
        forward, backward = (q, kv, kv, q, lse, stats), (q, kv, kv, q, q, lse, stats, (q, kv, kv))
        yield from recorded(label, architecture, launch_sink_attention_fwd, *forward, *rest, options=OPTIONS)
        yield from recorded(label, architecture, launch_sink_attention_bwd, *backward, *rest, options=OPTIONS)


def pairs(architecture: int, dtype: torch.dtype, head_dim: int) -> Iterator[Compilation]:
    q, kv, _, stats, sinks = tensors(dtype, head_dim, HQ)
    lengths, seed = windows(), meta(1, dtype=torch.int64)
    kinds = (("corrects", True, NO_DROPOUT), ("fused", False, NO_DROPOUT), ("dropout", False, Dropout(seed, 6554)))
    for kind, corrects, dropout in kinds:
        yield from recorded(
            f"{name_of(dtype)} D={head_dim} {kind} {{BLOCK_M}}x{{BLOCK_N}}",
            architecture,
            launch_sink_attention_pairs_bwd,
            *(q, kv, kv, q, stats, meta(B, HQ, M), (q, kv, kv), sinks, lengths, dropout),
            options=OPTIONS,
            corrects=corrects,
        )


def correction(architecture: int, dtype: torch.dtype, head_dim: int) -> Iterator[Compilation]:
    q, kv, lse, stats, sinks = tensors(dtype, head_dim, HQ)
    lengths = windows()
    label = f"{name_of(dtype)} D={head_dim}"
    block_k = CorrectionConfig.heuristic(head_dim, dtype, architecture).block_k
    yield from recorded(
        f"{label} {{BLOCK_M}}x{{BLOCK_N}}x{block_k}",
        architecture,
        launch_sink_attention_correction_fwd,
        *(q, kv, kv, q, lse, sinks._replace(logits=meta(HQ)), lengths),
        options=OPTIONS,
    )
    arguments = (q, q, sinks.positions, stats, lse, lengths)
    yield from recorded(label, architecture, launch_sink_attention_correction_delta, *arguments)

"""Inputs of sink_attention: sinks at random positions."""

import torch
from torch import Tensor


def draw(
    batch=2,
    heads=4,
    kv_heads=4,
    length=100,
    dim=16,
    value_dim=None,
    sinks=20,
    bias_heads=1,
    bias_scale=1.0,
    dtype=torch.float32,
) -> dict[str, Tensor]:
    value_dim = dim if value_dim is None else value_dim
    positions = torch.stack([torch.randperm(length)[:sinks].sort().values for _ in range(batch)])
    return {
        "q": torch.randn(batch, heads, length, dim, dtype=dtype),
        "k": torch.randn(batch, kv_heads, length, dim, dtype=dtype),
        "v": torch.randn(batch, kv_heads, length, value_dim, dtype=dtype),
        "sink_positions": positions,
        "inter_sink_bias": torch.randn(batch, bias_heads, sinks, sinks) * bias_scale,
    }


def draw_packed(sequence_lengths: list[int], sinks: list[int], heads=4, kv_heads=2, dim=16, dtype=torch.float32):
    total, most = sum(sequence_lengths), max(sinks)
    positions = torch.full((len(sinks), most), -1)
    for b, (n, m) in enumerate(zip(sequence_lengths, sinks, strict=True)):
        positions[b, :m] = torch.randperm(n)[:m].sort().values
    return {
        "q": torch.randn(total, heads, dim, dtype=dtype),
        "k": torch.randn(total, kv_heads, dim, dtype=dtype),
        "v": torch.randn(total, kv_heads, dim, dtype=dtype),
        "sink_positions": positions,
        "inter_sink_bias": torch.randn(len(sinks), heads, most, most),
        "cu_seqlens": torch.tensor([0, *sequence_lengths]).cumsum(0),
    }

"""Launch every Triton kernel at least once, on small shapes, for compute-sanitizer.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer python tests/cuda/gpu_sanitizer_targets.py
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import recattn

N, M = 129, 21
FUSED = {"impl": "triton"}
CORRECTION = {"impl": "correction:flash"}
# The memory-efficient attention is the one that takes float32.
CORRECTION_FP32 = {"impl": "correction:efficient"}
# What a kernel's text depends on: each dtype and head dim, and each option, with another.
PLAIN = (
    (FUSED, torch.bfloat16, 32),
    (FUSED, torch.bfloat16, 128),
    (FUSED, torch.bfloat16, 256),
    (FUSED, torch.float32, 64),
    (CORRECTION, torch.bfloat16, 32),
    (CORRECTION, torch.bfloat16, 128),
    (CORRECTION, torch.float16, 256),
    (CORRECTION_FP32, torch.float32, 64),
)
OPTIONS = {
    "grouped": {"heads": 4},
    "a bias a head": {"bias_heads": 2, "causal": True},
    "suppressed": {"bias": -50.0, "causal": True},
    "sink_logits": {"sink_logits": True},
    "padded": {"lengths": (N, 0, 70)},
    "left-padded": {"lengths": (N, 0, 70), "padding_side": "left", "causal": True},
    "packed": {"lengths": (N, 0, 70), "packed": True, "causal": True, "bias": -50.0},
}
# Sequences that one program holds, in one launch of the backward and in several, and longer ones.
REFINED = (
    ("simple", "logits", torch.bfloat16, 50, True),
    ("additive", "weights", torch.bfloat16, 50, False),
    ("simple", "weights", torch.bfloat16, 100, True),
    ("value", "logits", torch.bfloat16, 100, True),
    ("value", "logits", torch.float32, 20, True),
    ("simple", "logits", torch.bfloat16, 300, True),
    ("simple", "logits", torch.float32, 300, False),
    ("stochastic", "weights", torch.bfloat16, 129, True),
    ("value", "logits", torch.bfloat16, 200, True),
)


def cases(device: torch.device) -> Iterator[tuple[str, Callable[[], None]]]:
    """On a CPU they run the default implementation."""
    for path, dtype, dim in PLAIN:
        yield f"{'-'.join(path.values())} {dtype} D={dim}", partial(attend, device, path, dtype, dim)
    for name, options in OPTIONS.items():
        # No backend masks the padding of a dense batch.
        for path in (FUSED,) if "lengths" in options and "packed" not in options else (FUSED, CORRECTION):
            yield f"{'-'.join(path.values())} {name}", partial(attend, device, path, torch.bfloat16, 64, **options)
    yield "dropout", partial(attend, device, FUSED, torch.bfloat16, 64, dropout_p=0.2)
    for mechanism, source, dtype, length, causal in REFINED:
        name = f"refined_attention {mechanism} {source} {dtype} N={length} causal={causal}"
        yield name, partial(refine, device, mechanism, source, dtype, length, causal)
    for dtype in (torch.float32, torch.bfloat16):
        yield f"wasserstein_attention {dtype}", partial(attend_gaussians, device, dtype)
    for dtype in (torch.float32, torch.bfloat16):
        for lengths in ((N, N, N), (N, 0, 70)):
            yield f"lrea_attention {dtype} {lengths}", partial(attend_histories, device, dtype, lengths)
            yield f"lrea_compress {dtype} {lengths}", partial(compress_histories, device, dtype, lengths)
    for dtype in (torch.float32, torch.bfloat16):
        # In half precision: by multiply-adds, and on tensor cores for ranks of up to 16, 32 and 64.
        for sizes in ((20, 40, 70), (16, 16, 16), (32, 64, 64), (33, 72, 24)):
            yield f"lrea_absorbed_attention {dtype} {sizes}", partial(serve_states, device, dtype, *sizes)
    for heads, sinks, causal in ((1, 1, True), (4, 49, False), (3, 129, True)):
        yield f"inter_sink_bias M={sinks}", partial(bias_of_sinks, device, (2, heads, sinks, 32), causal)


def attend(
    device: torch.device,
    path: dict[str, str],
    dtype: torch.dtype,
    dim: int,
    *,
    heads: int = 2,
    bias_heads: int = 1,
    bias: float = 1.0,
    lengths: tuple[int, ...] = (),
    packed: bool = False,
    sink_logits: bool = False,
    **options,
) -> None:
    """One forward and backward."""
    batch, kv_heads = len(lengths) or 2, 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    if packed:
        tensors = [normal(sum(lengths), h, dim) for h in (heads, kv_heads, kv_heads)]
        ends = torch.tensor(lengths, device=device).cumsum(0)
        options |= {"cu_seqlens": torch.nn.functional.pad(ends, (1, 0)).int(), "max_seqlen": max(lengths)}
    else:
        tensors = [normal(batch, h, N, dim) for h in (heads, kv_heads, kv_heads)]
        if lengths:
            options["seq_lens"] = torch.tensor(lengths, device=device)
    spots = [torch.randperm(n)[: M * n // N].sort().values for n in lengths or (N,) * batch]
    positions = torch.nn.utils.rnn.pad_sequence(spots, batch_first=True, padding_value=-1)
    if options.get("padding_side") == "left":
        positions = torch.where(positions < 0, -1, positions + N - torch.tensor(lengths)[:, None])
    inter_sink_bias = torch.full((batch, bias_heads, M, M), bias, device=device, requires_grad=True)
    if sink_logits:
        options["sink_logits"] = torch.randn(heads, device=device, requires_grad=True)
    if device.type == "cuda":
        options |= path
    out = recattn.sink_attention(*tensors, positions.to(device), inter_sink_bias, **options)
    out.sum().backward()


def bias_of_sinks(device: torch.device, shape: tuple[int, ...], causal: bool) -> None:
    q_s, k_s = (torch.randn(shape, device=device, requires_grad=True) for _ in range(2))
    recattn.inter_sink_bias(q_s, k_s, causal=causal).sum().backward()


def refine(device: torch.device, mechanism: str, source: str, dtype: torch.dtype, length: int, causal: bool) -> None:
    """One forward and backward of left-padded sequences, with dropout where it is supported."""
    q, k, v = (torch.randn(2, 2, length, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    columns = [64, 64] + ([length] if mechanism in ("value", "additive") else [])
    weights = [torch.randn(length, n, device=device, dtype=dtype, requires_grad=True) for n in columns]
    options = {"mechanism": mechanism, "source": source, "causal": causal, "padding_side": "left"}
    options["seq_lens"] = torch.tensor([length, length // 3], device=device)
    options["dropout_p"] = 0.2 if mechanism == "simple" or length <= 128 else 0.0
    recattn.refined_attention(q, k, v, *weights, **options).sum().backward()


def attend_gaussians(device: torch.device, dtype: torch.dtype) -> None:
    """STOSA's attention, plain and refined."""
    tensors = [torch.rand(2, 2, N, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(6)]
    weights = [torch.randn(N, 32, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    for options in ({}, {"w_q": weights[0], "w_k": weights[1]}):
        mean, cov = recattn.wasserstein_attention(*tensors, **options, dropout_p=0.1)
        (mean + cov).sum().backward()


def attend_histories(device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    """LREA's restored form, for users with many targets, none and one."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)

    offsets = torch.tensor([0, 100, 100, 101], device=device)
    tensors = (normal(101, 2, 40), normal(3, 2, 20, 40), normal(3, 2, 20, 70), normal(20, N))
    seq_lens = torch.tensor(lengths, device=device)
    recattn.lrea_attention(*tensors, offsets, seq_lens=seq_lens if 0 in lengths else None).sum().backward()


def compress_histories(device: torch.device, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
    behaviors, w_comp = (torch.randn(size, device=device, dtype=dtype) for size in ((3, N, 70), (N, 20)))
    seq_lens = torch.tensor(lengths, device=device)
    item_ids = torch.randint(N, (3, N), device=device)
    recattn.lrea_compress(behaviors[0], w_comp, seq_lens, item_ids=item_ids)
    recattn.lrea_compress(behaviors.requires_grad_(), w_comp.requires_grad_(), seq_lens).sum().backward()


def serve_states(device: torch.device, dtype: torch.dtype, rank: int, dim: int, value_dim: int) -> None:
    """Items read by id, for users with many candidates, none and one; states in their own dtype and in int8.

    Then a batch whose slots, item ids and offsets are out of range.
    """
    offsets, slots = torch.tensor([0, 150, 150, 151], device=device), torch.tensor([4, 0, 2], device=device)
    items = torch.randn(30, 2, dim, device=device, dtype=dtype)
    item_ids = torch.randint(30, (151,), device=device)
    states = [torch.randn(5, 2, rank, width, device=device, dtype=dtype) for width in (dim, value_dim)]
    recattn.lrea_absorbed_attention(items, *states, slots, offsets, item_ids=item_ids)
    (keys, key_scales), (values, value_scales) = map(recattn.lrea_quantize, states)
    scales = {"key_scales": key_scales, "value_scales": value_scales}
    recattn.lrea_absorbed_attention(items, keys, values, slots, offsets, item_ids=item_ids, **scales)
    invalid = torch.zeros(1, dtype=torch.int64, device=device)
    wild = torch.tensor([70, 1 << 40, -(1 << 40), 100], device=device)
    item_ids[::7], slots[2] = -1, 5
    for tables, options in ((states, {}), ((keys, values), scales)):
        recattn.lrea_absorbed_attention(items, *tables, slots, wild, item_ids=item_ids, invalid=invalid, **options)


def main() -> None:
    for name, call in cases(torch.device("cuda")):
        call()
        torch.cuda.synchronize()
        print(name, flush=True)


if __name__ == "__main__":
    main()

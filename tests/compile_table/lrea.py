"""LREA's training: attention and compression."""

import dataclasses
import itertools
from collections.abc import Iterator

import torch

from recattn.triton_kernels.common.ragged import Lengths
from recattn.triton_kernels.lrea import attention as launches
from recattn.triton_kernels.lrea import compress, jagged
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

TILE = ("BLOCK_M", "BLOCK_T", "BLOCK_N")
USERS, LENGTH, WIDTH = 256, 10_000, 64
TARGETS, FEW_TARGETS, HEADS, TARGET_USERS = 8192, 128, 2, 128


def shipped_configurations() -> Iterator[Compilation]:
    """Ranks of 32 to 256, heads of 64, histories of one length and of many, and item ids."""
    ranks = (*((torch.bfloat16, rank) for rank in (32, 64, 128, 256)), (torch.float32, 64))
    for architecture, (dtype, rank) in itertools.product(ARCHITECTURES, ranks):
        yield from attention(architecture, dtype, rank, "sorted")
    for architecture in ARCHITECTURES:
        yield from attention(architecture, torch.bfloat16, 64, "of one length")
        yield from attention(architecture, torch.bfloat16, 64, "split")
    for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES):
        yield from compression(architecture, dtype, rank=32)
    for architecture in ARCHITECTURES:
        yield from compression_packed(architecture, torch.float32, rank=32)


def attention(architecture: int, dtype: torch.dtype, rank: int, kind: str) -> Iterator[Compilation]:
    """The launches of a forward and a backward, with histories of many lengths if their users are sorted."""
    users, targets = TARGET_USERS, FEW_TARGETS if kind == "split" else TARGETS
    q = meta(targets, HEADS, WIDTH, dtype=dtype)
    states, w = meta(users, HEADS, rank, WIDTH, dtype=dtype), meta(rank, LENGTH, dtype=dtype)
    seq_lens = meta(users, dtype=torch.int64) if kind == "sorted" else None
    tensors = (q, states, states, w, meta(users + 1, dtype=torch.int64), seq_lens)
    x = meta(1 if dtype == torch.float32 else 2, targets, HEADS, rank, dtype=dtype)
    y, plan = meta(targets, HEADS, rank), meta(targets, dtype=torch.int32)
    label = f"{name_of(dtype)} r={rank} {kind}"
    directions = {
        "fwd": (launches.launch_lrea_attention_fwd, *tensors, 0.01, 0.125),
        "bwd": (launches.launch_lrea_attention_bwd, q, *tensors, x, y, plan, 0.01, 0.125),
    }
    for direction, call in directions.items():
        for made in recorded("", architecture, *call):
            if made.kernel is jagged.lrea_sort_users_kernel and (dtype, rank) != (torch.bfloat16, 64):
                continue  # the same for all
            tile = "x".join(str(size) for name, size in made.constexprs.items() if name in TILE)
            yield dataclasses.replace(made, label=f"{label} {direction} {tile}")


def compression(architecture: int, dtype: torch.dtype, rank: int) -> Iterator[Compilation]:
    lengths, item_ids = Lengths(seq_lens=meta(USERS, dtype=torch.int64)), meta(USERS, LENGTH, dtype=torch.int64)
    behaviors, w_comp = meta(USERS, LENGTH, WIDTH, dtype=dtype), meta(LENGTH, rank, dtype=dtype)
    dcompressed = meta(USERS, rank, WIDTH, dtype=dtype)
    name = f"{name_of(dtype)} r={rank}"
    yield from recorded(
        f"{name} {{BLOCK_R}}x{{BLOCK_L}}",
        architecture,
        compress.launch_lrea_compress_fwd,
        *(behaviors[0], w_comp, lengths, item_ids, None),
    )
    tile = "{BLOCK_L}x{BLOCK_D}"
    by_w_comp = (compress.launch_lrea_compress_bwd_w_comp, dcompressed, behaviors, lengths, LENGTH, None)
    yield from recorded(f"{name} dW {tile}", architecture, *by_w_comp)
    if dtype == torch.float32:  # in half precision it needs few registers
        by_behaviors = (compress.launch_lrea_compress_bwd_behaviors, dcompressed, w_comp, lengths, LENGTH, None)
        yield from recorded(f"{name} dE {tile}", architecture, *by_behaviors)


def compression_packed(architecture: int, dtype: torch.dtype, rank: int) -> Iterator[Compilation]:
    lengths = Lengths(cu_seqlens=meta(USERS + 1, dtype=torch.int64))
    behaviors, w_comp = meta(USERS * LENGTH, WIDTH, dtype=dtype), meta(LENGTH, rank, dtype=dtype)
    dcompressed, name = meta(USERS, rank, WIDTH, dtype=dtype), f"{name_of(dtype)} r={rank} packed"
    for label, call in {
        "": (compress.launch_lrea_compress_fwd, behaviors, w_comp, lengths, None, None),
        " dW": (compress.launch_lrea_compress_bwd_w_comp, dcompressed, behaviors, lengths, LENGTH, None),
        " dE": (compress.launch_lrea_compress_bwd_behaviors, dcompressed, w_comp, lengths, len(behaviors), None),
    }.items():
        yield from recorded(f"{name}{label}", architecture, *call)

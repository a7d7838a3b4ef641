"""LREA's training: the middle factor, the products by user, compression."""

import itertools
from collections.abc import Iterator

import torch

from recattn.triton_kernels.lrea import compress, core, jagged
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

USERS, LENGTH, WIDTH = 256, 10_000, 64
TARGETS, HEADS, TARGET_USERS = 4096, 2, 8


def shipped_configurations() -> Iterator[Compilation]:
    """Ranks of 32 to 128, heads of 64, many targets a user, ragged histories, and item ids."""
    ranks = ((torch.bfloat16, 32), (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 64))
    for architecture, (dtype, rank) in itertools.product(ARCHITECTURES, ranks):
        yield from middle_factor(architecture, dtype, rank)
    for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES):
        yield from products_by_user(architecture, dtype)
        yield from compression(architecture, dtype, rank=32)


def middle_factor(architecture: int, dtype: torch.dtype, rank: int) -> Iterator[Compilation]:
    x, w = meta(TARGETS, rank, dtype=dtype), meta(rank, LENGTH, dtype=dtype)
    x_error = None if dtype == torch.float32 else x
    ragged = core.RaggedRows(meta(TARGETS, dtype=torch.int32), meta(TARGETS, dtype=torch.int64))
    name = f"{name_of(dtype)} r={rank}"
    fwd = f"{name} {{BLOCK_M}}x{{BLOCK_N}}"
    yield from recorded(fwd, architecture, core.launch_lrea_middle_factor_fwd, x, w, ragged, 0.01)
    backward = (core.launch_lrea_middle_factor_bwd, x, x, x_error, w, ragged, 0.01)
    yield recorded(f"{name} dz {{BLOCK_M}}x{{BLOCK_N}}", architecture, *backward)[0]
    yield recorded(f"{name} dW {{BLOCK_N}}x{{BLOCK_M}}", architecture, *backward)[1]


def products_by_user(architecture: int, dtype: torch.dtype) -> Iterator[Compilation]:
    offsets = meta(TARGET_USERS + 1, dtype=torch.int64)
    weights, targets = meta(TARGETS, HEADS, WIDTH), meta(TARGETS, HEADS, WIDTH, dtype=dtype)
    states = meta(TARGET_USERS, HEADS, WIDTH, WIDTH, dtype=dtype)
    label = f"{name_of(dtype)} {{}} {{{{BLOCK_T}}}}x{{{{BLOCK_K}}}}"
    launch = jagged.launch_lrea_jagged_dense_bmm
    yield from recorded(label.format("out"), architecture, launch, weights, states, offsets)
    if dtype == torch.bfloat16:  # where its product is another
        yield from recorded(label.format("z"), architecture, launch, targets, states.mT, offsets)


def compression(architecture: int, dtype: torch.dtype, rank: int) -> Iterator[Compilation]:
    seq_lens, item_ids = meta(USERS, dtype=torch.int64), meta(USERS, LENGTH, dtype=torch.int64)
    behaviors, w_comp = meta(USERS, LENGTH, WIDTH, dtype=dtype), meta(LENGTH, rank, dtype=dtype)
    dcompressed = meta(USERS, rank, WIDTH, dtype=dtype)
    name = f"{name_of(dtype)} r={rank}"
    yield from recorded(
        f"{name} {{BLOCK_K}}x{{BLOCK_T}}",
        architecture,
        compress.launch_lrea_compress_fwd,
        *(behaviors[0], w_comp, seq_lens, item_ids),
    )
    tile = "{BLOCK_L}x{BLOCK_D}"
    by_w_comp = (compress.launch_lrea_compress_bwd_w_comp, dcompressed, behaviors, seq_lens)
    yield from recorded(f"{name} dW {tile}", architecture, *by_w_comp)
    if dtype == torch.float32:  # in half precision it needs few registers
        by_behaviors = (compress.launch_lrea_compress_bwd_behaviors, dcompressed, w_comp, seq_lens, LENGTH)
        yield from recorded(f"{name} dE {tile}", architecture, *by_behaviors)

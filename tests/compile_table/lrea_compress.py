"""lrea_compress: its forward and backward, and the sum of outer products that lrea_attention's backward shares."""

import itertools
from collections.abc import Iterator

import torch

from recattn.triton_kernels.lrea import compress as kernels
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

USERS, LENGTH, RANK, WIDTH = 256, 10_000, 32, 64


def shipped_configurations() -> Iterator[Compilation]:
    """A rank of 32 and behaviours of 64, with item ids."""
    seq_lens, item_ids = meta(USERS, dtype=torch.int64), meta(USERS, LENGTH, dtype=torch.int64)
    for architecture, dtype in itertools.product(ARCHITECTURES, DTYPES):
        behaviors, w_comp = meta(USERS, LENGTH, WIDTH, dtype=dtype), meta(LENGTH, RANK, dtype=dtype)
        dcompressed = meta(USERS, RANK, WIDTH, dtype=dtype)
        name = f"{name_of(dtype)} r={RANK}"
        yield from recorded(
            f"{name} {{BLOCK_K}}x{{BLOCK_T}}",
            architecture,
            kernels.launch_lrea_compress_fwd,
            *(behaviors[0], w_comp, seq_lens, item_ids),
        )
        yield from recorded(
            f"{name} dW {{BLOCK_L}}x{{BLOCK_D}}",
            architecture,
            kernels.launch_lrea_compress_bwd_w_comp,
            *(dcompressed, behaviors, seq_lens),
        )
        if dtype == torch.float32:  # in half precision it needs few registers
            yield from recorded(
                f"{name} dE {{BLOCK_L}}x{{BLOCK_D}}",
                architecture,
                kernels.launch_lrea_compress_bwd_behaviors,
                *(dcompressed, w_comp, seq_lens, LENGTH),
            )

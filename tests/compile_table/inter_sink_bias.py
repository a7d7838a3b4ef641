"""inter_sink_bias: forward and backward."""

import itertools
from collections.abc import Iterator

import torch

from recattn._options import InterSinkBiasOptions
from recattn.triton_kernels.inter_sink_bias import launch_inter_sink_bias_bwd, launch_inter_sink_bias_fwd
from tests.compile_table.compilation import ARCHITECTURES, DTYPES, Compilation, meta, name_of, recorded

HEAD_DIM_AND_SINKS = ((32, 15), (64, 49), (128, 49), (64, 100), (128, 100))


def shipped_configurations() -> Iterator[Compilation]:
    """The head dims and dtypes in use, with every option."""
    for architecture, dtype, (head_dim, M) in itertools.product(ARCHITECTURES, DTYPES, HEAD_DIM_AND_SINKS):
        label = f"{name_of(dtype)} D={head_dim} {{BLOCK_M}}x{{BLOCK_N}}x{{BLOCK_K}}"
        q_s, bias, dbias_scale_rows = meta(2, 8, M, head_dim, dtype=dtype), meta(2, 1, M, M), meta(2, 8, M)
        inputs = (q_s, q_s, meta(2, M, dtype=torch.bool), meta(), meta(1, dtype=torch.int64))
        options = InterSinkBiasOptions(1.0, causal=True, dropout_p=0.1, scale=0.125)
        yield from recorded(label, architecture, launch_inter_sink_bias_fwd, *inputs, bias, options)
        gradients = (q_s, q_s, dbias_scale_rows)
        yield from recorded(label, architecture, launch_inter_sink_bias_bwd, bias, *inputs, *gradients, options)

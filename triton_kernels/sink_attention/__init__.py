"""sink_attention: softmax(scale · Q Kᵀ + mask + β) V, with a bias β between sink tokens.

split_tokens.py   each sequence's tokens into sinks and non-sinks, and which tile of the grid belongs to which sequence
forward.py        the fused forward: FlashAttention, and the line where β is added (`softmax_block`)
backward.py       the fused backward: dQ, then dK and dV without the pairs of sinks
sink_pairs.py     what only pairs of sinks have: dβ and their part of dK and dV, for the fused and correction paths;
                  sink_pair_tiles.py has its tiles
correction.py     the correction path: adds β to the result of any attention without it
common.py         what these share
config.py         tile sizes, warps and pipeline stages
"""

from recattn.triton_kernels.common.ragged import NO_LENGTHS, Lengths, as_lengths
from recattn.triton_kernels.sink_attention.backward import launch_sink_attention_bwd
from recattn.triton_kernels.sink_attention.common import SinkInputs
from recattn.triton_kernels.sink_attention.config import CorrectionConfig, PairsConfig, SinkAttentionConfig, TileConfig
from recattn.triton_kernels.sink_attention.correction import (
    launch_sink_attention_correction_delta,
    launch_sink_attention_correction_fwd,
)
from recattn.triton_kernels.sink_attention.forward import launch_sink_attention_fwd
from recattn.triton_kernels.sink_attention.sink_pairs import launch_sink_attention_pairs_bwd
from recattn.triton_kernels.sink_attention.split_tokens import Streams, launch_sink_attention_streams

__all__ = [
    "NO_LENGTHS",
    "CorrectionConfig",
    "Lengths",
    "PairsConfig",
    "SinkAttentionConfig",
    "SinkInputs",
    "Streams",
    "TileConfig",
    "as_lengths",
    "launch_sink_attention_bwd",
    "launch_sink_attention_correction_delta",
    "launch_sink_attention_correction_fwd",
    "launch_sink_attention_fwd",
    "launch_sink_attention_pairs_bwd",
    "launch_sink_attention_streams",
]

"""sink_attention: the kernels of the fused path (forward, backward), of the correction path, and what both share."""

from recattn.triton_kernels.sink_attention.config import SinkAttentionConfig, TileConfig
from recattn.triton_kernels.sink_attention.correction import (
    CorrectionConfig,
    launch_sink_attention_correction_delta,
    launch_sink_attention_correction_fwd,
)
from recattn.triton_kernels.sink_attention.forward import (
    Streams,
    launch_sink_attention_bwd,
    launch_sink_attention_fwd,
    launch_sink_attention_streams,
)
from recattn.triton_kernels.sink_attention.sink_pairs import PairsConfig, launch_sink_attention_pairs_bwd

__all__ = [
    "CorrectionConfig",
    "PairsConfig",
    "SinkAttentionConfig",
    "Streams",
    "TileConfig",
    "launch_sink_attention_bwd",
    "launch_sink_attention_correction_delta",
    "launch_sink_attention_correction_fwd",
    "launch_sink_attention_fwd",
    "launch_sink_attention_pairs_bwd",
    "launch_sink_attention_streams",
]

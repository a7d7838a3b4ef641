"""The specification of every operator in plain PyTorch: any floating dtype, any device, slow and simple.

Read these first. The kernels use the same names: q, k, v, qk, p, out, lse.
"""

from recattn.reference.inter_sink_bias import inter_sink_bias
from recattn.reference.lrea_attention import (
    lrea_absorb,
    lrea_absorbed_attention,
    lrea_attention,
    lrea_compress,
    lrea_nonnegativity_loss,
)
from recattn.reference.refined_attention import refined_attention
from recattn.reference.sink_attention import sink_attention
from recattn.reference.wasserstein_attention import wasserstein_attention

__all__ = [
    "inter_sink_bias",
    "lrea_absorb",
    "lrea_absorbed_attention",
    "lrea_attention",
    "lrea_compress",
    "lrea_nonnegativity_loss",
    "refined_attention",
    "sink_attention",
    "wasserstein_attention",
]

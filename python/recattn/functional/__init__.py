"""The public functions: the equation, validation, the choice of implementation."""

from recattn.functional.inter_sink_bias import inter_sink_bias
from recattn.functional.lrea_attention import (
    lrea_absorb,
    lrea_absorbed_attention,
    lrea_attention,
    lrea_nonnegativity_loss,
    lrea_quantize,
)
from recattn.functional.lrea_compress import lrea_compress
from recattn.functional.refined_attention import refined_attention
from recattn.functional.sink_attention import sink_attention
from recattn.functional.validation import validate
from recattn.functional.wasserstein_attention import wasserstein_attention

__all__ = [
    "inter_sink_bias",
    "lrea_absorb",
    "lrea_absorbed_attention",
    "lrea_attention",
    "lrea_compress",
    "lrea_nonnegativity_loss",
    "lrea_quantize",
    "refined_attention",
    "sink_attention",
    "validate",
    "wasserstein_attention",
]

"""Fused attention kernels for recommender models."""

from importlib.metadata import version

from recattn import nn, serving
from recattn.functional import (
    inter_sink_bias,
    lrea_absorb,
    lrea_absorbed_attention,
    lrea_attention,
    lrea_compress,
    lrea_nonnegativity_loss,
    lrea_quantize,
    refined_attention,
    sink_attention,
    validate,
    wasserstein_attention,
)
from recattn.integrations.patching import patch

__version__ = version("recattn")

__all__ = [
    "inter_sink_bias",
    "lrea_absorb",
    "lrea_absorbed_attention",
    "lrea_attention",
    "lrea_compress",
    "lrea_nonnegativity_loss",
    "lrea_quantize",
    "nn",
    "patch",
    "refined_attention",
    "serving",
    "sink_attention",
    "validate",
    "wasserstein_attention",
]

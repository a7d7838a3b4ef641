"""Fused attention kernels for recommender models."""

from importlib.metadata import version

from recattn import functional, nn, serving
from recattn.functional import *  # noqa: F403 (all of functional.__all__)
from recattn.integrations.patching import patch

__version__ = version("recattn")

__all__ = ["nn", "patch", "serving"]
__all__ += functional.__all__

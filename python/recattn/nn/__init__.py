"""Modules around the operators."""

from recattn.nn.refined_self_attention import RefinedSelfAttention
from recattn.nn.stochastic_refined_self_attention import StochasticRefinedSelfAttention

__all__ = ["RefinedSelfAttention", "StochasticRefinedSelfAttention"]

"""Modules around the operators."""

from recattn.nn.lrea import LREA, Fidelity, LREAState
from recattn.nn.refined_self_attention import RefinedSelfAttention
from recattn.nn.stochastic_refined_self_attention import StochasticRefinedSelfAttention

__all__ = ["LREA", "Fidelity", "LREAState", "RefinedSelfAttention", "StochasticRefinedSelfAttention"]

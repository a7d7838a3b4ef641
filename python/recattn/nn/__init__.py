"""Modules around the operators."""

from recattn.nn.inter_sink_bias import InterSinkBias
from recattn.nn.lrea import LREA, LREAState
from recattn.nn.lrea_fidelity import Fidelity
from recattn.nn.refined_self_attention import RefinedSelfAttention
from recattn.nn.sink_attention import SinkAttention
from recattn.nn.sink_tokens import (
    SinkEmbeddings,
    SinkTokenEmbedding,
    SinkTokens,
    at_sinks,
    insert_sink_embeddings,
    insert_sinks,
    replace_sink_embeddings,
)
from recattn.nn.sink_training import SinkPooling, TwoStageSchedule
from recattn.nn.stochastic_refined_self_attention import StochasticRefinedSelfAttention
from recattn.nn.target_attention import TargetAttention

__all__ = [
    "LREA",
    "Fidelity",
    "InterSinkBias",
    "LREAState",
    "RefinedSelfAttention",
    "SinkAttention",
    "SinkEmbeddings",
    "SinkPooling",
    "SinkTokenEmbedding",
    "SinkTokens",
    "StochasticRefinedSelfAttention",
    "TargetAttention",
    "TwoStageSchedule",
    "at_sinks",
    "insert_sink_embeddings",
    "insert_sinks",
    "replace_sink_embeddings",
]

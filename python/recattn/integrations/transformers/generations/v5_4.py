"""transformers from 5.4: every architecture calls the table of attention functions."""

from transformers import AttentionInterface, AttentionMaskInterface

from recattn.integrations.transformers.attention import NAME, sink_attention_forward
from recattn.integrations.transformers.generations._interface import (
    ARCHITECTURES,
    InterfaceAdapter,
    sink_attention_mask,
)

ADAPTERS = dict.fromkeys(ARCHITECTURES, InterfaceAdapter())

AttentionInterface.register(NAME, sink_attention_forward)
AttentionMaskInterface.register(NAME, sink_attention_mask)

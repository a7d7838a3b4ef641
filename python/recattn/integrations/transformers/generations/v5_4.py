"""transformers from 5.4: every architecture calls the table of attention functions."""

from transformers import AttentionInterface, AttentionMaskInterface

from recattn.integrations.transformers.attention import NAME, sink_attention_forward
from recattn.integrations.transformers.generations._interface import InterfaceAdapter, sink_attention_mask

ADAPTERS = dict.fromkeys(
    ("bert", "roberta", "distilbert", "modernbert", "qwen2", "qwen3", "llama", "mistral"), InterfaceAdapter()
)

AttentionInterface.register(NAME, sink_attention_forward)
AttentionMaskInterface.register(NAME, sink_attention_mask)

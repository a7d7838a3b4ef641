"""transformers 5.0: as 5.1, but ModernBERT has a table of attention functions of its own."""

from recattn.integrations.transformers.generations import v5_1
from recattn.integrations.transformers.generations._encoders import ModernBertAdapter

ADAPTERS = {**v5_1.ADAPTERS, "modernbert": ModernBertAdapter()}
sink_attention_mask = v5_1.sink_attention_mask

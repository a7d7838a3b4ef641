"""transformers from 4.53 to 4.57: decoders as in 5.1, no encoder calls the table of attention functions.

Gemma 3 is missing: there its heads do not say which of their modules is the base model.
"""

from recattn.integrations.transformers.generations import v5_1
from recattn.integrations.transformers.generations._encoders import ENCODERS
from recattn.integrations.transformers.generations._interface import InterfaceAdapter

ADAPTERS = {
    **ENCODERS,
    **dict.fromkeys(("qwen2", "qwen3", "llama", "mistral", "gpt_oss"), InterfaceAdapter()),
}
sink_attention_mask = v5_1.sink_attention_mask

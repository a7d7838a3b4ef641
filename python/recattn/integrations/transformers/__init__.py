"""CTR-Sink (arXiv 2508.03668) in language models of Hugging Face transformers.

`enable_sink_attention` sets `recattn.sink_attention` as the attention of a loaded model and adds a
`recattn.nn.InterSinkBias` to each chosen layer. It replaces no module of the model, and `restore` undoes it:

- the base model's forward first finds the sinks and the padding side of the batch (hooks.py);
- a hook before each attention computes its bias from the hidden states that the attention reads (hooks.py);
- importing this package registers the attention function "recattn_sink" and its mask function, without which
  transformers would drop causality and padding (attention.py).
"""

from recattn.integrations.transformers.architectures import BIAS
from recattn.integrations.transformers.attention import NAME, Sinks, sink_attention_forward
from recattn.integrations.transformers.enable import SinkAttentionHandle, enable_sink_attention
from recattn.integrations.transformers.generations import generation
from recattn.integrations.transformers.loading import from_pretrained

sink_attention_mask = generation.sink_attention_mask

__all__ = [
    "BIAS",
    "NAME",
    "SinkAttentionHandle",
    "Sinks",
    "enable_sink_attention",
    "from_pretrained",
    "sink_attention_forward",
    "sink_attention_mask",
]

"""CTR-Sink (arXiv 2508.03668) on the language models of Hugging Face transformers.

`enable_sink_attention` makes `recattn.sink_attention` the attention of a model in memory and gives each chosen layer a
`recattn.nn.InterSinkBias`; nothing of the model's own is replaced, and `restore` takes all of it back:

- a hook before the base model finds the sinks of the batch and the sides of its padding;
- a hook before each attention makes its bias of the hidden states that the attention reads;
- the attention function "recattn_sink", and the mask function without which transformers would drop causality and
  padding, are registered when this module is imported.
"""

try:
    import transformers.masking_utils  # noqa: F401
except ImportError as error:
    raise ImportError('recattn.integrations.transformers needs transformers: pip install "recattn[hf]"') from error

from recattn.integrations.transformers.architectures import BIAS
from recattn.integrations.transformers.attention import NAME, Sinks, sink_attention_forward, sink_attention_mask
from recattn.integrations.transformers.enable import SinkAttentionHandle, enable_sink_attention
from recattn.integrations.transformers.loading import from_pretrained

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

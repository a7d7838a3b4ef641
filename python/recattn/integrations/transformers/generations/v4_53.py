"""transformers from 4.53 to 4.57: decoders as in 5.1, no encoder calls the table of attention functions."""

from recattn.integrations.transformers.generations import v5_1
from recattn.integrations.transformers.generations._encoders import BertAdapter, DistilBertAdapter, ModernBertAdapter

ADAPTERS = {
    **v5_1.ADAPTERS,
    "bert": BertAdapter(),
    "roberta": BertAdapter(),
    "distilbert": DistilBertAdapter(),
    "modernbert": ModernBertAdapter(),
}
sink_attention_mask = v5_1.sink_attention_mask

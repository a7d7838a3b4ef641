"""transformers from 5.1 to 5.3: as later, but a mask function gets the positions of the queries, not their number."""

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from recattn.integrations.transformers.attention import NAME, sink_attention_forward
from recattn.integrations.transformers.generations import _interface
from recattn.integrations.transformers.generations._interface import ARCHITECTURES, InterfaceAdapter

ADAPTERS = dict.fromkeys(ARCHITECTURES, InterfaceAdapter())


def sink_attention_mask(cache_position: Tensor, kv_length: int, **kwargs: object) -> Tensor | None:
    """transformers' mask function, with `cache_position` [Nq]."""
    return _interface.sink_attention_mask(len(cache_position), kv_length, cache_position=cache_position, **kwargs)


AttentionInterface.register(NAME, sink_attention_forward)
AttentionMaskInterface.register(NAME, sink_attention_mask)

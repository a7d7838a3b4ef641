"""transformers from 4.48 to 4.52: decoders call the table of attention functions, but make their masks themselves."""

import functools

from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recattn.integrations.transformers.attention import NAME
from recattn.integrations.transformers.generations._by_mask import (
    MaskAdapter,
    SinkMask,
    as_sink_mask,
    sink_mask_attention_forward,
)
from recattn.integrations.transformers.generations._encoders import ENCODERS


class DecoderAdapter(MaskAdapter):
    """Under gradient checkpointing the layers get no keyword arguments, but the mask."""

    def replacements(self, base: nn.Module, attentions: list[nn.Module]) -> list[tuple[nn.Module, str, object]]:
        return [(base, "_update_causal_mask", functools.partial(sink_attention_mask, base))]


def sink_attention_mask(
    base: nn.Module,
    attention_mask: SinkMask | Tensor | None,
    input_tensor: Tensor,
    cache_position: Tensor,
    past_key_values: object,
    output_attentions: bool = False,
) -> SinkMask:
    """`_update_causal_mask` of a decoder: the padding mask if only causality and padding hide keys, else its own."""
    whole, shape = as_sink_mask(attention_mask), input_tensor.shape[:2]
    window = getattr(base.config, "sliding_window", None)
    wide = window is None or shape[1] <= window
    first = past_key_values is None or (
        isinstance(past_key_values, DynamicCache) and not past_key_values.get_seq_length()
    )
    if wide and first and (whole.mask is None or whole.mask.shape == shape):
        return whole
    mask = type(base)._update_causal_mask(
        base, whole.mask, input_tensor, cache_position, past_key_values, output_attentions
    )
    return whole._replace(mask=mask)


ADAPTERS = {
    **ENCODERS,
    **dict.fromkeys(("qwen2", "qwen3", "llama", "mistral"), DecoderAdapter()),
}

ALL_ATTENTION_FUNCTIONS[NAME] = sink_mask_attention_forward

"""Models that call transformers' table of attention functions and pass their keyword arguments on to it."""

from torch import Tensor
from transformers import masking_utils

from recattn.integrations.transformers.generations._adapter import Adapter

ARCHITECTURES = (
    *("bert", "roberta", "xlm-roberta", "distilbert", "modernbert"),
    *("qwen2", "qwen3", "llama", "mistral", "gemma3_text", "gpt_oss"),
)

# Before 5.0 there is only the first.
_WITHOUT_WINDOW = [
    getattr(masking_utils, name)
    for name in ("causal_mask_function", "bidirectional_mask_function")
    if hasattr(masking_utils, name)
]


class InterfaceAdapter(Adapter):
    """Sinks and bias travel as keyword arguments of the model, its layers and the attention function."""

    def pass_sinks(self, arguments: dict[str, object], sinks: object) -> None:
        arguments["sinks"] = sinks

    def read_sinks(self, arguments: dict[str, object]) -> object:
        return arguments.get("sinks")

    def pass_bias(self, arguments: dict[str, object], bias: Tensor) -> None:
        arguments["inter_sink_bias"] = bias


def sink_attention_mask(
    q_length: int,
    kv_length: int,
    mask_function: object = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: object,
) -> Tensor | None:
    """transformers' mask function, the mask that `sink_attention_forward` gets.

    If only causality and padding hide keys, it is the padding mask [B, N] or None; otherwise [B, 1, Nq, Nk], True where
    a key is visible.
    """
    wide = local_size is not None and kv_length <= local_size and (allow_is_causal_skip or allow_is_bidirectional_skip)
    plain = wide or mask_function in _WITHOUT_WINDOW
    fits = attention_mask is None or attention_mask.shape[1] == kv_length
    if plain and fits and q_length == kv_length:
        return attention_mask
    return masking_utils.sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )

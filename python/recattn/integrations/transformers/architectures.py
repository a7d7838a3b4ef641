"""Where the supported architectures have their attention modules, and the bias added to each."""

from typing import Any

from torch import nn

from recattn._check import expect, expect_choice
from recattn.integrations.transformers.attention import NAME
from recattn.integrations.transformers.generations import generation
from recattn.integrations.transformers.generations._adapter import Adapter
from recattn.nn import InterSinkBias

# Name of the bias within an attention module. For PEFT: LoraConfig(..., modules_to_save=[BIAS]).
BIAS = "sink_interaction"

# Paths of the layers in the base model and of the self-attention in a layer.
_LAYERS = {
    "bert": ("encoder.layer", "attention.self"),
    "roberta": ("encoder.layer", "attention.self"),
    "xlm-roberta": ("encoder.layer", "attention.self"),
    "distilbert": ("transformer.layer", "attention"),
    "modernbert": ("layers", "attn"),
    "qwen2": ("layers", "self_attn"),
    "qwen3": ("layers", "self_attn"),
    "llama": ("layers", "self_attn"),
    "mistral": ("layers", "self_attn"),
    "gemma3_text": ("layers", "self_attn"),
    "gpt_oss": ("layers", "self_attn"),
}
_ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "modernbert")


def find_attentions(base: Any) -> list[Any]:
    """The self-attention of each layer of a base model."""
    layers, attention = _LAYERS[base.config.model_type]
    return [layer.get_submodule(attention) for layer in base.get_submodule(layers)]


def find_adapter(model: Any) -> Adapter:
    """How the architecture gets sink attention in the installed transformers."""
    return generation.ADAPTERS[model.config.model_type]


def is_causal(attention: Any) -> bool:
    """Whether an attention is a decoder's. The encoders of old generations do not say."""
    return getattr(attention, "is_causal", False)


def is_bias_parameter(parameter: str) -> bool:
    """Whether the name is that of a parameter of a bias."""
    return f".{BIAS}." in parameter


def find_supported_attentions(model: Any) -> list[Any]:
    """The self-attention of each layer. Raise if `enable_sink_attention` does not support the model."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    own = "one whose attention can be replaced: DeBERTa computes its own, with relative positions in its scores"
    expect(model_type not in ("deberta", "deberta-v2"), "the architecture of model", own, repr(model_type))
    expect_choice("the architecture of model", model_type, tuple(generation.ADAPTERS))
    expect(not getattr(config, "add_cross_attention", False), "model", "without cross-attention", "one with it")
    without = "without sink attention: restore() first (models that share a config count as one)"
    expect(model.config._attn_implementation != NAME, "model", without, "one with it")
    attentions = find_attentions(model.base_model)
    causal_by_config = getattr(config, "is_causal", True)
    expect(causal_by_config or not is_causal(attentions[0]), "config.is_causal", "True of a decoder", False)
    shared = all(getattr(attention, "config", config) is config for attention in attentions)
    expect(shared, "model", "one whose layers read its own config", "one whose layers have another")
    find_adapter(model).expect_supported(model)
    return attentions


def find_token_read_by_head(model: Any) -> str | None:
    """ "first" or "last" if the head of a model reads only that token; None if it reads all, or has no head."""
    heads = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
    pools_one = getattr(model.config, "classifier_pooling", "cls") == "cls"  # an option of ModernBERT
    if not pools_one or not any(own.__name__.endswith(heads) for own in type(model).__mro__):
        return None
    return "first" if model.config.model_type in _ENCODERS else "last"


def make_bias(attention: Any, model: Any, bias_scale: float | None, dropout: float | None) -> InterSinkBias:
    """The bias for an attention module; None means the defaults of `enable_sink_attention`."""
    causal, config = is_causal(attention), model.config
    own = getattr(attention, "dropout", None)
    own_dropout = own.p if isinstance(own, nn.Dropout) else attention.attention_dropout
    if bias_scale is None:
        bias_scale = 1.0 if causal else 10.0
    bias = InterSinkBias(
        config.hidden_size,
        config.num_attention_heads,
        dropout=own_dropout if dropout is None else dropout,
        bias_scale=bias_scale,
        causal=causal,
        device=next(attention.parameters()).device,
        dtype=model.dtype,
    )
    return bias.train(attention.training)

"""`enable_sink_attention`, and the handle that undoes it."""

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from recattn._check import expect, expect_choice, expect_numbers, expect_probability
from recattn._typing import PaddingSide
from recattn.integrations.transformers.architectures import (
    BIAS,
    find_adapter,
    find_attentions,
    find_supported_attentions,
    find_token_read_by_head,
    make_bias,
)
from recattn.integrations.transformers.hooks import BiasAdder, SinkReader, rename_official_scale


class SinkAttentionHandle:
    """The result of `enable_sink_attention`; `restore` undoes it.

    Attributes:
        settings: the keyword arguments of `enable_sink_attention`, also stored in `model.config.recattn_sink`.
    """

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._model = model
        self._previous_settings = getattr(model.config, "recattn_sink", None)
        self._hooks: list[Any] = []
        self._disable: Callable[[], None]

    @property
    def biases(self) -> dict[int, nn.Module]:
        """The `recattn.nn.InterSinkBias` of each chosen layer (or PEFT's wrapper of it), by layer index."""
        return {i: getattr(x, BIAS) for i, x in enumerate(find_attentions(self._model.base_model)) if hasattr(x, BIAS)}

    def restore(self) -> None:
        """Undo everything: the model is then bit for bit what it was before. A second call does nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for i in self.biases:
            delattr(find_attentions(self._model.base_model)[i], BIAS)
        if self._previous_settings is None:
            del self._model.config.recattn_sink
        else:
            self._model.config.recattn_sink = self._previous_settings
        self._disable()

    def _install(self) -> None:
        model, settings = self._model, self.settings
        base, attentions, adapter = model.base_model, find_attentions(model.base_model), find_adapter(model)
        chosen = [attentions[i] for i in settings["layers"]]
        self._disable = adapter.enable(model, attentions)
        model.config.recattn_sink = dict(settings)
        for attention in chosen:
            attention.add_module(BIAS, make_bias(attention, model, settings["bias_scale"], settings["dropout"]))
        reader, adder = SinkReader(adapter, base, chosen, settings), BiasAdder(adapter, chosen[0])
        reader.install()
        self._hooks = [reader]
        self._hooks += [x.register_forward_pre_hook(adder, with_kwargs=True) for x in chosen]
        self._hooks += [x.register_load_state_dict_pre_hook(rename_official_scale) for x in chosen]


def enable_sink_attention(
    model: nn.Module,
    *,
    sink_token_id: int | None = None,
    layers: int | Sequence[int] | None = None,
    bias_scale: float | None = None,
    dropout: float | None = None,
    max_sinks: int | None = None,
    padding_side: PaddingSide | None = None,
) -> SinkAttentionHandle:
    """Add a learned bias between sink tokens to the attention of a Hugging Face language model, in the chosen layers:

        O = softmax(Q Kᵀ/√D + mask + β) V,    β = `recattn.nn.InterSinkBias` of the layer's input, between sinks only

    The sinks of a batch are the tokens `sink_token_id` in `input_ids`, or the positions `sink_positions` [B, M] if the
    model is called with them (a Trainer passes them only with `remove_unused_columns=False`). Without sinks, or with
    `bias.scale` 0, the model computes the same as before, except for hidden states at padding. No valid token sees
    these, but a head that pools position 0 does: pad BERT on the right.

    Padding on either side, `output_attentions` (dense weights, bias included), gradient checkpointing and autocast
    work. So does `generate` with a cache, if all sinks are in the prompt (`bad_words_ids` prevents new ones). Sliding
    windows shorter than the sequence and custom masks run with dense masks. So do packed sequences without sinks; with
    sinks they are an error.

    The new parameters are the modules `sink_interaction` of the attentions. State dicts of the official code load,
    including its `sink_scale`. `save_pretrained` saves the parameters, and these settings in the config; load them with
    `from_pretrained` of this package: transformers' own leaves the bias out, with a warning. PEFT freezes and does not
    save unknown modules: enable first, then call get_peft_model with
    `LoraConfig(..., modules_to_save=["sink_interaction"])`. Also enable before loading an adapter.

    Args:
        model: BERT, RoBERTa, XLM-RoBERTa, DistilBERT, ModernBERT, Qwen2, Qwen3, Llama, Mistral, Gemma 3 (text) or
            gpt-oss, with any head, or a PeftModel of one.
        sink_token_id: id of [SINK]. With None, every call needs `sink_positions`.
        layers: the layers with a bias: the first n, or their indices; all by default. The official code uses the first
            half of Qwen2, the first third of Qwen3 and the first two layers of BERT. Leave out the last layer where the
            head reads one token (classification of sequences): only sinks have a bias, so that the last layer's gets no
            gradient unless that token is a sink. A warning says so.
        bias_scale: initial `scale`; by default, as in the official code, 1 in decoders and 10 in encoders.
        dropout: dropout probability of the softmax weights of the bias, by default that of the model's attention.
        max_sinks: the largest number of sinks per sequence in `input_ids`. Without it each batch is read, which costs a
            synchronisation on a GPU and a graph break in a compiled model.
        padding_side: "left" or "right" says that the tokens of each row of an attention mask have no gap, and saves the
            reading of each batch (on a GPU a synchronisation). With None a batch whose tokens have gaps runs with dense
            masks, and is an error in a compiled model.

    Returns:
        A handle, whose `restore()` undoes everything.

    Raises:
        ValueError: an unsupported architecture, a model that is already enabled (models that share a config count as
            one), or options out of range. Later calls of the model raise it for a batch without `input_ids` and
            `sink_positions`, positions out of order or range, more sinks than `max_sinks`, and sinks after the prompt
            or in packed sequences.
    """
    get_base_model = getattr(model, "get_base_model", None)
    if get_base_model is not None:
        model = get_base_model()
        warnings.warn(
            "a bias that is added to a PeftModel trains, but is not saved with its adapter: enable_sink_attention "
            f"first, then get_peft_model with modules_to_save=[{BIAS!r}]",
            stacklevel=2,
        )
    settings = {
        "sink_token_id": sink_token_id,
        "layers": layers,
        "bias_scale": bias_scale,
        "dropout": dropout,
        "max_sinks": max_sinks,
        "padding_side": padding_side,
    }
    handle = enable_by_settings(model, settings)
    _warn_of_unread_layer(model, handle.settings["layers"])
    return handle


def enable_by_settings(model: Any, settings: dict[str, Any]) -> SinkAttentionHandle:
    """`enable_sink_attention` with its keyword arguments as a dict, without its warnings."""
    attentions = find_supported_attentions(model)
    handle = SinkAttentionHandle(model, _check_settings(model, len(attentions), **settings))
    handle._install()
    return handle


def _check_settings(
    model: Any,
    layer_count: int,
    *,
    sink_token_id: int | None,
    layers: int | Sequence[int] | None,
    bias_scale: float | None,
    dropout: float | None,
    max_sinks: int | None,
    padding_side: PaddingSide | None,
) -> dict[str, Any]:
    """The settings, with the indices of all chosen layers. Raise if one is out of range."""
    if dropout is not None:
        expect_probability("dropout", dropout)
    expect_numbers(bias_scale=bias_scale)
    if padding_side is not None:
        expect_choice("padding_side", padding_side, ("right", "left"))
    last = model.config.vocab_size - 1
    return {
        "sink_token_id": None if sink_token_id is None else _check_integer("sink_token_id", sink_token_id, 0, last),
        "layers": _resolve_layers(layers, layer_count),
        "bias_scale": bias_scale,
        "dropout": dropout,
        "max_sinks": None if max_sinks is None else _check_integer("max_sinks", max_sinks, 1, None),
        "padding_side": padding_side,
    }


def _check_integer(name: str, value: Any, low: int, high: int | None) -> int:
    expected = f"an integer of at least {low}" if high is None else f"an integer between {low} and {high}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        raise ValueError(f"{name} must be {expected}, got {value!r}")
    return number


def _resolve_layers(layers: int | Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if isinstance(layers, Sequence) and not isinstance(layers, str):
        expect(len(layers) > 0, "layers", "at least one index", layers)
        return sorted({_check_integer("layers", i, 0, count - 1) for i in layers})
    return list(range(_check_integer("layers", layers, 1, count)))


def _warn_of_unread_layer(model: Any, layers: list[int]) -> None:
    """Warn if the last layer has a bias that the head of the model does not see."""
    token, last = find_token_read_by_head(model), len(find_attentions(model.base_model)) - 1
    if token is None or layers[-1] != last:
        return
    rest = layers[:-1]
    first_n = rest == list(range(len(rest)))
    better = f"; take layers={len(rest) if first_n else rest}" if rest else ""
    warnings.warn(
        f"{type(model).__name__} reads only the {token} token of the last layer, and only sinks have a bias there: the "
        f"bias of layer {last} gets no gradient unless the {token} token is a sink{better}",
        stacklevel=3,
    )

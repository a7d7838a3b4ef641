"""`enable_sink_attention` and the handle that undoes it."""

import inspect
import operator
import warnings
from collections.abc import Sequence

from torch import nn

from recattn._check import expect, expect_choice, expect_numbers, expect_probability
from recattn.integrations.transformers.architectures import BIAS, attentions_of, bias_of, supported_attentions
from recattn.integrations.transformers.attention import NAME
from recattn.integrations.transformers.hooks import SinkReader, add_bias, take_official_scale


class SinkAttentionHandle:
    """What `enable_sink_attention` did to a model.

    Attributes:
        settings: the keyword arguments of `enable_sink_attention`, as they stand in `model.config.recattn_sink`.
    """

    def __init__(self, model: nn.Module, settings: dict[str, object]) -> None:
        self.settings = settings
        self._model, self._previous = model, model.config._attn_implementation
        self._had = getattr(model.config, "recattn_sink", None)
        self._hooks: list[object] = []

    @property
    def biases(self) -> dict[int, nn.Module]:
        """The `recattn.nn.InterSinkBias` of each chosen layer (or what PEFT wrapped it in), by its index."""
        return {i: getattr(x, BIAS) for i, x in enumerate(attentions_of(self._model.base_model)) if hasattr(x, BIAS)}

    def restore(self) -> None:
        """Take everything back: the model is then bit for bit what it was. A second call does nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for i in self.biases:
            delattr(attentions_of(self._model.base_model)[i], BIAS)
        if self._had is None:
            del self._model.config.recattn_sink
        else:
            self._model.config.recattn_sink = self._had
        self._model.set_attn_implementation(self._previous)

    def _install(self) -> None:
        model, settings = self._model, self.settings
        base, attentions = model.base_model, attentions_of(model.base_model)
        names = [name for name, p in inspect.signature(base.forward).parameters.items() if p.kind != p.VAR_KEYWORD]
        chosen = [attentions[i] for i in settings["layers"]]
        model.set_attn_implementation(NAME)
        model.config.recattn_sink = dict(settings)
        for attention in chosen:
            attention.add_module(BIAS, bias_of(attention, model, settings["bias_scale"], settings["dropout"]))
        reader = SinkReader(names, chosen, settings)
        self._hooks = [base.register_forward_pre_hook(reader, with_kwargs=True)]
        self._hooks += [x.register_forward_pre_hook(add_bias, with_kwargs=True) for x in chosen]
        self._hooks += [x.register_load_state_dict_pre_hook(take_official_scale) for x in chosen]


def enable_sink_attention(
    model: nn.Module,
    *,
    sink_token_id: int | None = None,
    layers: int | Sequence[int] | None = None,
    bias_scale: float | None = None,
    dropout: float | None = None,
    max_sinks: int | None = None,
    padding_side: str | None = None,
) -> SinkAttentionHandle:
    """Let a language model of Hugging Face attend with a learned bias between its sink tokens, in each chosen layer:

        O = softmax(Q Kᵀ/√D + mask + β) V,    β = `recattn.nn.InterSinkBias` of the layer's input, between sinks only

    The sinks of a batch are the tokens `sink_token_id` of its `input_ids`, or those at `sink_positions` [B, M] if the
    model is called with them (which a Trainer lets through with `remove_unused_columns=False` only). Without sinks, or
    with `bias.scale` at 0, the model computes what it did before, but for the hidden states at padding, which no valid
    token sees (a head that pools position 0 does: pad BERT on the right). Padding on either side, `output_attentions`
    (the dense weights, bias included), gradient checkpointing, autocast and `generate` with a cache work, if the sinks
    are in the prompt (`bad_words_ids` keeps it from making more). Sliding windows that bite and masks of one's own are
    served by dense masks, as are packed sequences without sinks; with sinks these are refused.

    The new parameters are those of the attentions' `sink_interaction`; state dicts of the official code load, its
    `sink_scale` included. `save_pretrained` writes them, and these settings with the config; load by `from_pretrained`
    of this module. PEFT freezes and does not save what it is not told of: enable first, then get_peft_model with
    `LoraConfig(..., modules_to_save=["sink_interaction"])`; and enable before an adapter is loaded.

    Args:
        model: BERT, RoBERTa, DistilBERT, ModernBERT, Qwen2, Qwen3, Llama or Mistral, with any head, or as a PeftModel.
        sink_token_id: of [SINK]. None: each call gives `sink_positions`.
        layers: those that have a bias: the first n, or their indices; all by default. The official code takes the first
            half of Qwen2, the first third of Qwen3 and the first two of BERT.
        bias_scale: where `scale` begins; by default, as in the official code, at 1 in decoders and at 10 in encoders.
        dropout: of the bias's weights, by default that of the model's attention.
        max_sinks: the most sinks of a sequence of `input_ids`. Known, it spares a look at the batch, which on a GPU is
            a synchronisation and in a compiled model a graph break.
        padding_side: "left" or "right", where the attention mask has its padding. None looks at each batch; a compiled
            model cannot look, and without this serves masked batches by dense masks.

    Returns:
        A handle, whose `restore()` undoes it all.

    Raises:
        ValueError: a model of another architecture or already enabled (models that share a config count as one),
            options out of range; and, at calls, a batch without `input_ids` or `sink_positions`, positions out of order
            or range, more sinks than `max_sinks`, a sink after the prompt or in packed sequences.
    """
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
        warnings.warn(
            "a bias that is added to a PeftModel trains, but is not saved with its adapter: enable_sink_attention "
            f"first, then get_peft_model with modules_to_save=[{BIAS!r}]",
            stacklevel=2,
        )
    attentions = supported_attentions(model)
    if dropout is not None:
        expect_probability("dropout", dropout)
    expect_numbers(bias_scale=bias_scale)
    if padding_side is not None:
        expect_choice("padding_side", padding_side, ("right", "left"))
    last = model.config.vocab_size - 1
    settings = {
        "sink_token_id": None if sink_token_id is None else _integer("sink_token_id", sink_token_id, 0, last),
        "layers": _chosen(layers, len(attentions)),
        "bias_scale": bias_scale,
        "dropout": dropout,
        "max_sinks": None if max_sinks is None else _integer("max_sinks", max_sinks, 1, None),
        "padding_side": padding_side,
    }
    handle = SinkAttentionHandle(model, settings)
    handle._install()
    return handle


def _integer(name: str, value: object, low: int, high: int | None) -> int:
    expected = f"an integer of at least {low}" if high is None else f"an integer between {low} and {high}"
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    fits = number is not None and not isinstance(value, bool) and low <= number and (high is None or number <= high)
    expect(fits, name, expected, repr(value))
    return number


def _chosen(layers: int | Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if isinstance(layers, Sequence) and not isinstance(layers, str):
        expect(len(layers) > 0, "layers", "at least one index", layers)
        return sorted({_integer("layers", i, 0, count - 1) for i in layers})
    return list(range(_integer("layers", layers, 1, count)))

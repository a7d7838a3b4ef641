"""CTR-Sink (arXiv 2508.03668) on the language models of Hugging Face transformers.

`enable_sink_attention` makes `recattn.sink_attention` the attention of a model in memory and gives each chosen layer a
`recattn.nn.InterSinkBias`; nothing of the model's own is replaced, and `restore` takes all of it back:

- a hook before the base model finds the sinks of the batch and the sides of its padding;
- a hook before each attention makes its bias of the hidden states that the attention reads;
- the attention function "recattn_sink", and the mask function without which transformers would drop causality and
  padding, are registered when this module is imported.
"""

import inspect
import math
import operator
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError('recattn.integrations.transformers needs transformers: pip install "recattn[hf]"') from error

from recattn._check import expect, expect_choice, expect_index, expect_numbers, expect_probability
from recattn.functional import sink_attention
from recattn.functional.validation import checked_indices, expect_values, values_are_checked
from recattn.nn import InterSinkBias
from recattn.ops.sink_attention import no_sinks
from recattn.reference.sink_attention import dense_bias, softmax_or_zeros, valid_tokens

NAME = "recattn_sink"
# What PEFT is to train and save beside its adapters: LoraConfig(..., modules_to_save=[BIAS]).
BIAS = "sink_interaction"

# Of a base model: its layers, and the self-attention of a layer.
_LAYERS = {
    "bert": ("encoder.layer", "attention.self"),
    "roberta": ("encoder.layer", "attention.self"),
    "distilbert": ("transformer.layer", "attention"),
    "modernbert": ("layers", "attn"),
    "qwen2": ("layers", "self_attn"),
    "qwen3": ("layers", "self_attn"),
    "llama": ("layers", "self_attn"),
    "mistral": ("layers", "self_attn"),
}


class Sinks(NamedTuple):
    """What the layers of one forward share. `padding_side` None: padding, if any, is known by the mask alone."""

    positions: Tensor | None  # [B, M]; None where no query is a sink
    valid: Tensor | None  # [B, M] bool
    seq_lens: Tensor | None  # [B]; None where nothing is padding
    padding_side: str | None


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
        return {i: getattr(x, BIAS) for i, x in enumerate(_attentions(self._model.base_model)) if hasattr(x, BIAS)}

    def restore(self) -> None:
        """Take everything back: the model is then bit for bit what it was. A second call does nothing."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for i in self.biases:
            delattr(_attentions(self._model.base_model)[i], BIAS)
        if self._had is None:
            del self._model.config.recattn_sink
        else:
            self._model.config.recattn_sink = self._had
        self._model.set_attn_implementation(self._previous)

    def _install(self) -> None:
        model, settings = self._model, self.settings
        base, attentions = model.base_model, _attentions(model.base_model)
        names = [name for name, p in inspect.signature(base.forward).parameters.items() if p.kind != p.VAR_KEYWORD]
        chosen = [attentions[i] for i in settings["layers"]]
        model.set_attn_implementation(NAME)
        model.config.recattn_sink = dict(settings)
        for attention in chosen:
            attention.add_module(BIAS, _bias_of(attention, model, settings["bias_scale"], settings["dropout"]))
        reader = _SinkReader(names, chosen, settings)
        self._hooks = [base.register_forward_pre_hook(reader, with_kwargs=True)]
        self._hooks += [x.register_forward_pre_hook(_add_bias, with_kwargs=True) for x in chosen]
        self._hooks += [x.register_load_state_dict_pre_hook(_take_official_scale) for x in chosen]


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
    attentions = _supported_attentions(model)
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


def from_pretrained(model_class: type, path: str, **kwargs: object) -> tuple[nn.Module, SinkAttentionHandle]:
    """`model_class.from_pretrained(path, **kwargs)` of a model that was saved with sink attention, and its handle.

    transformers alone drops the parameters of the bias, and says so by a report of unexpected weights.

    Raises:
        ValueError: a config without sink settings, or weights whose biases are not those that these name.
    """
    model = model_class.from_pretrained(path, **kwargs)
    settings = getattr(model.config, "recattn_sink", None)
    expect(settings is not None, "path", "a model saved with sink attention", f"{path}, whose config has none")
    handle = enable_sink_attention(model, **settings)
    saved = _saved_biases(path, model.base_model_prefix, **kwargs)
    own = set(filter(_is_of_bias, model.base_model.state_dict()))
    differing = sorted(own ^ saved.keys())
    expect(not differing, "path", "weights with just the biases of its config", f"{path}, which differs by {differing}")
    model.base_model.load_state_dict(saved, strict=False)
    return model, handle


# --- What the hooks do ---


class _SinkReader:
    """Before the base model: the sinks of the batch, as the argument `sinks` that each layer hands to its attention."""

    def __init__(self, names: list[str], attentions: list[nn.Module], settings: dict[str, object]) -> None:
        self.names, self.attentions = names, attentions
        self.sink_token_id, self.max_sinks = settings["sink_token_id"], settings["max_sinks"]
        self.padding_side = settings["padding_side"]
        self.warned = False

    def __call__(self, base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        kwargs["sinks"] = self.read(kwargs, kwargs.pop("sink_positions", None))
        if base.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._warn_of_frozen_biases()
        return (), kwargs

    def read(self, arguments: dict[str, object], positions: Tensor | None) -> Sinks:
        mask, input_ids, embeddings, cache = (
            arguments.get(name) for name in ("attention_mask", "input_ids", "inputs_embeds", "past_key_values")
        )
        tokens = embeddings if input_ids is None else input_ids
        if tokens is None:  # transformers says so
            return Sinks(None, None, None, None)
        if cache is not None and self._continues(cache.get_seq_length(), tokens.shape[1], input_ids, positions):
            return Sinks(None, None, None, None)
        visible = _sees_itself(mask)
        if positions is None:
            positions = self._positions(input_ids, visible)
        else:
            expect_index({"B": tokens.shape[0]}, "sink_positions", positions, "B M")
            length = tokens.shape[1]
            positions = checked_indices(positions.device, sink_positions=positions, seq_len=length).sink_positions
        valid = positions >= 0
        if visible is not None:
            valid = valid & visible.gather(1, positions.long().clamp(min=0))
        if mask is None and cache is None:
            self._expect_unpacked(arguments.get("position_ids"), valid)
        if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
            return Sinks(positions, valid, *self._padding(visible))
        return Sinks(positions, valid, None, None)

    def _is_sink(self, input_ids: Tensor | None) -> Tensor | None:
        """[B, N]; None: unknown."""
        return None if self.sink_token_id is None or input_ids is None else input_ids == self.sink_token_id

    def _positions(self, input_ids: Tensor | None, visible: Tensor | None) -> Tensor:
        """[B, M] of the sinks that are no padding."""
        is_sink = self._is_sink(input_ids)
        what = "given where the model has no sink_token_id or is called without input_ids"
        expect(is_sink is not None, "sink_positions", what, None)
        if visible is not None:
            is_sink = is_sink & visible
        counts = is_sink.sum(dim=1)
        if self.max_sinks is None:
            expect(not torch.compiler.is_exporting(), "max_sinks", "given to export the model", None)
            # At least one: parameters that no batch of a process uses would stop DDP.
            most = max(1, int(counts.max())) if counts.numel() else 1
        else:
            most = self.max_sinks
            self._expect_at_most(most, counts)
        length = input_ids.shape[1]
        tokens = torch.arange(length, device=input_ids.device)
        positions = torch.where(is_sink, tokens, length).sort(dim=1).values[:, :most]
        return positions.masked_fill(positions == length, -1)

    @staticmethod
    def _expect_at_most(most: int, counts: Tensor) -> None:
        expected = f"input_ids must be of at most max_sinks = {most} sinks a sequence"
        if values_are_checked(counts.device):
            expect_values(counts <= most, expected, lambda row: counts[row].item())
        else:  # without a synchronisation
            torch._assert_async((counts <= most).all(), expected)

    def _expect_unpacked(self, position_ids: Tensor | None, valid: Tensor) -> None:
        """Of decoders, to which positions that begin anew are another sequence: each would have sinks of its own."""
        if position_ids is None or not self.attentions[0].is_causal:
            return
        unpacked = ~valid.any() | (position_ids.diff(dim=-1) == 1).all()
        expected = "position_ids must be ascending by 1 in sequences with sinks"
        expect_values(unpacked, expected, lambda: "packed sequences")

    def _padding(self, mask: Tensor | None) -> tuple[Tensor | None, str | None]:
        """seq_lens and the side of a padding mask [B, N], True at tokens."""
        if mask is None:
            return None, "right"
        side = self.padding_side
        if side is None:
            if torch.compiler.is_compiling():
                return None, None
            if mask.all():
                return None, "right"
            side = _side_of(mask)
        elif values_are_checked(mask.device):
            expected = f"attention_mask must be padded on the {side}, as padding_side says"
            expect_values(_padded_on(mask, side) == mask, expected, lambda row, _: f"{mask[row].int().tolist()}")
        return (None if side is None else mask.sum(dim=1)), side

    def _continues(self, seen: int | Tensor, length: int, input_ids: Tensor | None, positions: Tensor | None) -> bool:
        """Whether the tokens follow a prompt, among which no sink may be: its bias takes their hidden states."""
        is_sink = self._is_sink(input_ids)
        if torch.compiler.is_compiling() and isinstance(seen, Tensor):  # of a static cache
            late = is_sink if positions is None else positions >= seen
            if late is not None:
                torch._assert_async((seen == 0) | ~late.any(), "the sinks must be among the tokens of the prompt")
            return length == 1
        seen = int(seen)
        among = f"among the {seen} tokens of the prompt: a later one would need their hidden states"
        if seen > 0 and positions is not None:
            largest = int(positions.max()) if positions.numel() else -1
            expect(largest < seen, "sink_positions", among, largest)
        elif seen > 0 and is_sink is not None:
            expect(not is_sink.any(), "the sinks", among, "one after it")
        return seen > 0

    def _warn_of_frozen_biases(self) -> None:
        named = (pair for attention in self.attentions for pair in getattr(attention, BIAS).named_parameters())
        # PEFT has the parameter twice: the one it keeps, and that of modules_to_save.
        if not self.warned and not any(p.requires_grad for name, p in named if name.endswith("scale")):
            self.warned = True
            warnings.warn(
                "every bias between sinks is frozen; with PEFT, let it train: "
                f"LoraConfig(..., modules_to_save=[{BIAS!r}])",
                stacklevel=2,
            )


def _add_bias(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Before an attention: its bias, as an argument that it hands to the attention function."""
    sinks, implementation = kwargs.get("sinks"), attention.config._attn_implementation
    expect(implementation == NAME, "the attention of the model", f"{NAME!r} until restore()", repr(implementation))
    if sinks is None or sinks.positions is None:
        return args, kwargs
    hidden_states = args[0] if args else kwargs["hidden_states"]
    bias = getattr(attention, BIAS)(hidden_states, sinks.positions, sinks.valid)
    return args, {**kwargs, "inter_sink_bias": bias}


def _take_official_scale(attention: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """The official code has the scale as a scalar of the attention itself."""
    if f"{prefix}sink_scale" in state_dict:
        state_dict[f"{prefix}{BIAS}.scale"] = state_dict.pop(f"{prefix}sink_scale").reshape(1)


# --- What transformers calls ---


def sink_attention_mask(
    q_length: int,
    kv_length: int,
    mask_function: object = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: object,
) -> Tensor | None:
    """Of attention in which nothing but causality and padding hides a key: the padding mask [B, N], or None. Of any
    other, [B, 1, Nq, Nk], True where a key is visible."""
    wide = local_size is not None and kv_length <= local_size and (allow_is_causal_skip or allow_is_bidirectional_skip)
    plain = wide or mask_function in (causal_mask_function, bidirectional_mask_function)
    fits = attention_mask is None or attention_mask.shape[1] == kv_length
    if plain and fits and q_length == kv_length:
        return attention_mask
    return sdpa_mask(
        q_length=q_length,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **kwargs,
    )


def sink_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sinks: Sinks | None = None,
    inter_sink_bias: Tensor | None = None,
    output_attentions: bool = False,
    **kwargs: object,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function: [B, H, Nq, D], [B, Hkv, Nk, D] twice -> [B, Nq, H, D] and, of
    output_attentions, the weights [B, H, Nq, Nk]."""
    for name in ("softcap", "position_bias", "s_aux"):
        expect(kwargs.get(name) is None, name, "None: sink attention has no such term", type(kwargs.get(name)).__name__)
    causal = module.is_causal if is_causal is None else is_causal
    output_attentions = output_attentions or getattr(module.config, "output_attentions", False)
    unmasked = attention_mask is None or (attention_mask.dim() == 2 and sinks is not None and sinks.padding_side)
    if sinks is None or not unmasked or output_attentions or query.shape[2] != key.shape[2]:
        bias = None if inter_sink_bias is None else _dense_bias(query, key, sinks, inter_sink_bias)
        mask = _dense_mask(attention_mask, query.shape[2], key.shape[2], causal, query.device)
        return _dense_attention(query, key, value, mask, bias, dropout, scaling, output_attentions)
    out = sink_attention(
        query,
        key,
        value,
        *(no_sinks(query) if inter_sink_bias is None else (sinks.positions, inter_sink_bias)),
        causal=causal,
        seq_lens=None if attention_mask is None else sinks.seq_lens,
        padding_side=sinks.padding_side or "right",
        dropout_p=dropout,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def _dense_bias(query: Tensor, key: Tensor, sinks: Sinks, inter_sink_bias: Tensor) -> Tensor | None:
    """[B, 1, Nq, Nk]; a static cache has keys that are none yet, after those of the prompt."""
    if sinks.positions.shape[1] == 0:
        return None
    bias = dense_bias(sinks.positions, inter_sink_bias, query.shape[2])
    return F.pad(bias, (0, key.shape[2] - query.shape[2]))


def _dense_mask(
    mask: Tensor | None, q_length: int, kv_length: int, causal: bool, device: torch.device
) -> Tensor | None:
    """[B, 1, Nq, Nk], bool (True: visible) or additive; None: everything is visible."""
    if mask is not None and mask.dim() == 4:
        return mask
    visible = None if mask is None else mask.bool()[:, None, None, :]
    if causal:
        past = torch.ones(q_length, kv_length, dtype=torch.bool, device=device).tril(kv_length - q_length)
        visible = past[None, None] if visible is None else visible & past
    return visible


def _dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout: float,
    scaling: float | None,
    weights_wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    added = sum(x for x in (mask, bias) if x is not None) if mask is not None or bias is not None else None
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    if not weights_wanted:
        added = None if added is None else added.to(query.dtype)
        out = F.scaled_dot_product_attention(query, key, value, added, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores if added is None else scores + added
    weights = F.dropout(softmax_or_zeros(scores), dropout).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register(NAME, sink_attention_forward)
AttentionMaskInterface.register(NAME, sink_attention_mask)


# --- Of a model ---


def _attentions(base: nn.Module) -> list[nn.Module]:
    layers, attention = _LAYERS[base.config.model_type]
    return [layer.get_submodule(attention) for layer in base.get_submodule(layers)]


def _is_of_bias(parameter: str) -> bool:
    return f".{BIAS}." in parameter


def _supported_attentions(model: nn.Module) -> list[nn.Module]:
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    expect_choice("the architecture of model", model_type, tuple(_LAYERS))
    expect(not getattr(config, "add_cross_attention", False), "model", "without cross-attention", "one with it")
    without = "without sink attention: restore() first (models that share a config count as one)"
    expect(config._attn_implementation != NAME, "model", without, "one with it")
    attentions = _attentions(model.base_model)
    causal_by_config = getattr(config, "is_causal", True)
    expect(causal_by_config or not attentions[0].is_causal, "config.is_causal", "True of a decoder", False)
    shared = all(attention.config is config for attention in attentions)
    expect(shared, "model", "one whose layers read its own config", "one whose layers have another")
    return attentions


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


def _sees_itself(mask: object) -> Tensor | None:
    """[B, N] bool, False at padding, of a mask [B, N], one [B, 1, N, N], in which padding is hidden from itself, or a
    dict of such for the kinds of layers; None: not known."""
    if isinstance(mask, dict):
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask.bool()
    own = mask[:, 0].diagonal(dim1=1, dim2=2)
    return own if own.dtype == torch.bool else own > torch.finfo(own.dtype).min / 2


def _bias_of(attention: nn.Module, model: nn.Module, bias_scale: float | None, dropout: float | None) -> InterSinkBias:
    causal, config = attention.is_causal, model.config
    if dropout is None:
        own = getattr(attention, "dropout", None)
        dropout = own.p if isinstance(own, nn.Dropout) else attention.attention_dropout
    if bias_scale is None:
        bias_scale = 1.0 if causal else 10.0
    bias = InterSinkBias(
        config.hidden_size,
        config.num_attention_heads,
        dropout=dropout,
        bias_scale=bias_scale,
        causal=causal,
        device=next(attention.parameters()).device,
        dtype=model.dtype,
    )
    return bias.train(attention.training)


def _side_of(mask: Tensor) -> str | None:
    """The side of a mask's padding; None: it is on both or has holes."""
    return next((side for side in ("right", "left") if torch.equal(_padded_on(mask, side), mask)), None)


def _padded_on(mask: Tensor, side: str) -> Tensor:
    """The mask of as many tokens whose padding is on that side."""
    return valid_tokens(*mask.shape, mask.sum(dim=1), side, mask.device)


def _saved_biases(path: str, prefix: str, **kwargs: object) -> dict[str, Tensor]:
    """The parameters of the biases in a checkpoint, named as in the base model."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    options = ("cache_dir", "revision", "subfolder", "token", "local_files_only")
    hub = {name: kwargs[name] for name in options if name in kwargs}
    expect(kwargs.get("variant") is None, "variant", "None: sink attention is saved without one", kwargs.get("variant"))
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **hub)
    if index:
        files, _ = get_checkpoint_shard_files(path, index, **hub)
    else:
        files = [cached_file(path, SAFE_WEIGHTS_NAME, **hub)]
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in filter(_is_of_bias, tensors.keys()):
                found[name.removeprefix(f"{prefix}.")] = tensors.get_tensor(name)
    return found

"""Encoders before they called transformers' table of attention functions."""

import functools
import inspect

from torch import Tensor, nn

from recattn._check import expect
from recattn.integrations.transformers.attention import NAME, attend
from recattn.integrations.transformers.generations._by_mask import MaskAdapter, as_sink_mask


class BertAdapter(MaskAdapter):
    """BERT and RoBERTa, whose attention is a class per implementation: the forward of the instances is replaced."""

    def expect_supported(self, model: nn.Module) -> None:
        expect(not model.config.is_decoder, "model", "an encoder before transformers 5.0", "a decoder")
        embedding = getattr(model.config, "position_embedding_type", "absolute")
        expect(embedding == "absolute", "config.position_embedding_type", "'absolute'", repr(embedding))

    def replacements(self, base: nn.Module, attentions: list[nn.Module]) -> list[tuple[nn.Module, str, object]]:
        of_base = [(base, "attn_implementation", NAME), (base, "get_extended_attention_mask", _keep_mask)]
        return of_base + [(x, "forward", functools.partial(_bert_forward, x, _names(x))) for x in attentions]


class DistilBertAdapter(MaskAdapter):
    """DistilBERT, whose attention is a class per implementation as well."""

    hidden_states, attention_mask = "query", "mask"

    def replacements(self, base: nn.Module, attentions: list[nn.Module]) -> list[tuple[nn.Module, str, object]]:
        # Up to 4.56 the model reads these, later its config.
        of_base = [(base, "_use_sdpa", False), (base, "_use_flash_attention_2", False)]
        return of_base + [(x, "forward", functools.partial(_distilbert_forward, x, _names(x))) for x in attentions]


class ModernBertAdapter(MaskAdapter):
    """ModernBERT with a table of attention functions of its own, up to 5.0."""

    def replacements(self, base: nn.Module, attentions: list[nn.Module]) -> list[tuple[nn.Module, str, object]]:
        from transformers.models.modernbert import modeling_modernbert

        modeling_modernbert.MODERNBERT_ATTENTION_FUNCTION[NAME] = functools.partial(
            _modernbert_forward, modeling_modernbert.apply_rotary_pos_emb
        )
        return [(base, "_update_attention_mask", functools.partial(_modernbert_masks, base))]


def _names(attention: nn.Module) -> list[str]:
    return list(inspect.signature(type(attention).forward).parameters)[1:]


def _keep_mask(mask: object, *_: object, **__: object) -> object:
    return mask


def _attend_encoder(
    attention: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: object, dropout: float, weights_wanted: bool
) -> tuple[Tensor, ...]:
    """Queries, keys and values [B, H, N, D] of an encoder -> the output [B, N, H D] and, if wanted, the weights."""
    mask, sinks, bias = as_sink_mask(mask)
    out, weights = attend(
        query,
        key,
        value,
        mask,
        sinks,
        bias,
        causal=False,
        dropout=dropout if attention.training else 0.0,
        scaling=None,
        weights_wanted=weights_wanted,
    )
    return (out.flatten(2), weights) if weights_wanted else (out.flatten(2),)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H D] -> [B, H, N, D]"""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _bert_forward(attention: nn.Module, names: list[str], *args: object, **kwargs: object) -> tuple[Tensor, ...]:
    arguments = dict(zip(names, args, strict=False)) | kwargs
    expect(arguments.get("head_mask") is None, "head_mask", "None: sink attention has no such term", "a mask")
    hidden_states = arguments["hidden_states"]
    return _attend_encoder(
        attention,
        *(
            _split_heads(projection(hidden_states), attention.num_attention_heads)
            for projection in (attention.query, attention.key, attention.value)
        ),
        arguments.get("attention_mask"),
        attention.dropout.p,
        bool(arguments.get("output_attentions")),
    )


def _distilbert_forward(attention: nn.Module, names: list[str], *args: object, **kwargs: object) -> tuple[Tensor, ...]:
    arguments = dict(zip(names, args, strict=False)) | kwargs
    expect(arguments.get("head_mask") is None, "head_mask", "None: sink attention has no such term", "a mask")
    out, *weights = _attend_encoder(
        attention,
        *(
            _split_heads(projection(arguments[name]), attention.n_heads)
            for name, projection in (
                ("query", attention.q_lin),
                ("key", attention.k_lin),
                ("value", attention.v_lin),
            )
        ),
        arguments["mask"],
        attention.dropout.p,
        bool(arguments.get("output_attentions")),
    )
    return attention.out_lin(out), *weights


def _modernbert_masks(base: nn.Module, attention_mask: object, output_attentions: bool) -> tuple[object, object]:
    """The masks of the global and of the local layers; of the latter a dense one where the window is shorter."""
    whole = as_sink_mask(attention_mask)
    if whole.mask.shape[-1] - 1 <= base.config.local_attention // 2:
        return whole, None
    _, local = type(base)._update_attention_mask(base, whole.mask, False)
    return whole, local


def _modernbert_forward(
    apply_rotary: object,
    attention: nn.Module,
    qkv: Tensor,
    attention_mask: object,
    sliding_window_mask: Tensor | None,
    local_attention: tuple[int, int],
    position_ids: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    output_attentions: bool = False,
    **_: object,
) -> tuple[Tensor, ...]:
    """An entry of ModernBERT's table of attention functions; qkv [B, N, 3, H, D]."""
    if position_embeddings is None:  # before 5.0
        position_embeddings = attention.rotary_emb(qkv, position_ids=position_ids)
    query, key, value = qkv.transpose(3, 1).unbind(dim=2)
    query, key = apply_rotary(query, key, *position_embeddings)
    mask = as_sink_mask(attention_mask)
    if local_attention != (-1, -1) and sliding_window_mask is not None:
        mask = mask._replace(mask=sliding_window_mask)
    return _attend_encoder(attention, query, key, value, mask, attention.attention_dropout, bool(output_attentions))


# Before 5.0.
ENCODERS = {
    "bert": BertAdapter(),
    "roberta": BertAdapter(),
    "xlm-roberta": BertAdapter(),
    "distilbert": DistilBertAdapter(),
    "modernbert": ModernBertAdapter(),
}

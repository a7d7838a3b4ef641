"""Sink attention in Hugging Face models: what is refused, and by which message."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
from recattn.integrations import transformers as integration  # noqa: E402
from recattn.integrations.transformers import enable_sink_attention  # noqa: E402
from tests.helpers.transformers_models import (  # noqa: E402
    CONFIGS,
    PRECISION,
    SINK,
    SIZES,
    VERSION,
    batch_of,
    enabled,
    hidden_of,
    model_of,
    set_attention,
)

# --- Refusals ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": 3}, r"layers must be an integer between 1 and 2, got 3"),
        ({"layers": [0, 2]}, r"layers must be an integer between 0 and 1, got 2"),
        ({"layers": []}, r"layers must be at least one index, got \[\]"),
        ({"layers": "01"}, r"layers must be an integer between 1 and 2, got '01'"),
        ({"layers": True}, r"layers must be an integer between 1 and 2, got True"),
        ({"sink_token_id": "[SINK]"}, r"sink_token_id must be an integer between 0 and 59, got '\[SINK\]'"),
        ({"sink_token_id": 60}, r"sink_token_id must be an integer between 0 and 59, got 60"),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1, got 1.0"),
        ({"max_sinks": 0}, r"max_sinks must be an integer of at least 1, got 0"),
        ({"max_sinks": 2.5}, r"max_sinks must be an integer of at least 1, got 2.5"),
        ({"bias_scale": math.inf}, r"bias_scale must be finite, got inf"),
        ({"padding_side": "top"}, r"padding_side must be 'right' or 'left', got 'top'"),
    ],
)
def test_wrong_options(options, message):
    model = model_of("bert")
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        enable_sink_attention(model, **{"sink_token_id": SINK, **options})
    assert list(model.state_dict()) == keys and model.config._attn_implementation == "sdpa"


def test_other_architectures():
    """DeBERTa would ignore a custom attention with a mere warning."""
    config = transformers.DebertaV2Config(
        **{k: v for k, v in SIZES.items() if k not in ("bos_token_id", "eos_token_id")}
    )
    with pytest.raises(ValueError, match=r"can be replaced: DeBERTa computes its own, .*, got 'deberta-v2'"):
        enable_sink_attention(transformers.AutoModel.from_config(config), sink_token_id=SINK)
    with pytest.raises(ValueError, match=r"architecture of model must be 'bert' or .*, got 'Linear'"):
        enable_sink_attention(nn.Linear(2, 2))
    cross = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    with pytest.raises(ValueError, match="model must be without cross-attention, got one with it"):
        enable_sink_attention(transformers.BertModel(cross), sink_token_id=SINK)


def test_wrong_calls():
    model, batch = model_of("bert"), batch_of("right")
    handle = enabled(model, max_sinks=3)
    with pytest.raises(ValueError, match=r"model must be without sink attention: restore\(\) first.*got one with it"):
        enable_sink_attention(model, sink_token_id=SINK)
    with pytest.raises(ValueError, match=r"input_ids must be of at most max_sinks = 3 sinks a sequence, got 4"):
        model(**batch)
    handle.restore()
    handle = enabled(model, padding_side="left")
    holed = batch["attention_mask"].clone()
    holed[1, 3] = 0
    with pytest.raises(ValueError, match=r"must have no gap, as padding_side says, got \[1, 1, 1, 0, 1, .* in row 1"):
        model(**batch | {"attention_mask": holed})
    with pytest.raises(ValueError, match=r"sink_positions must be \[B, M\] = \[3, 2\], got \[2, 2\]"):
        model(**batch, sink_positions=torch.tensor([[0, 1], [0, 1]]))
    embeddings = torch.randn(3, 24, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"sink_positions must be given where .* without input_ids, got None"):
        model(inputs_embeds=embeddings)
    handle.restore()
    enable_sink_attention(model)
    with pytest.raises(ValueError, match="sink_positions must be given where the model has no sink_token_id"):
        model(**batch_of("left"))


def test_positions_out_of_order_or_range():
    """On every path: mistral's window is shorter than the sequence, so its masks are dense."""
    for name in ("bert", "mistral"):
        model, batch = model_of(name), batch_of("right")
        enabled(model)
        for positions, message in (
            ([8, 2, 7], "sink_positions must be strictly ascending, padded with -1 at the end, got 2"),
            ([2, 2, 7], "sink_positions must be strictly ascending, padded with -1 at the end, got 2"),
            ([2, 7, 24], "sink_positions must be below the sequence length 24, got 24"),
            ([2, 7, -5], "sink_positions must be token positions, or -1 for padding, got -5"),
        ):
            with pytest.raises(ValueError, match=message):
                model(**batch, sink_positions=torch.tensor([positions] * 3))
        none = torch.empty(3, 0, dtype=torch.long)
        with torch.no_grad():
            bare = hidden_of(model, batch, sink_positions=none)
            dense = hidden_of(model, batch, sink_positions=none, output_attentions=True)
        assert (bare - dense).abs().max() <= PRECISION[name]


def test_output_attentions_by_the_config():
    model, batch = model_of("bert", attention="eager"), batch_of("right")
    model.config.output_attentions = True
    enabled(model)
    with torch.no_grad():
        output, named = model(**batch), model(**batch, output_attentions=True)
    assert len(output.attentions) == 2 and all(map(torch.equal, output.attentions, named.attentions))


def test_models_that_share_a_config():
    config = CONFIGS["bert"]()
    first, second = transformers.BertModel(config), transformers.BertModel(config)
    handle = enabled(first)
    with pytest.raises(
        ValueError, match=r"model must be without sink attention.*models that share a config count as one"
    ):
        enable_sink_attention(second, sink_token_id=SINK)
    handle.restore()
    enabled(second)


def test_another_attention_while_enabled():
    """It would silently leave the bias out."""
    model, batch = model_of("qwen2"), batch_of("right")
    enabled(model)
    set_attention(model, "sdpa")
    with pytest.raises(
        ValueError, match=r"attention of the model must be 'recattn_sink' until restore\(\), got 'sdpa'"
    ):
        model(**batch)


def test_layers_with_another_config():
    """An EncoderDecoderModel's encoder has such layers: they would go on reading the other config."""
    model = model_of("qwen2")
    model.config = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match="model must be one whose layers read its own config, got one whose layers"):
        enable_sink_attention(model, sink_token_id=SINK)


@pytest.mark.skipif(VERSION >= (5, 0), reason="of encoders whose attention is a class per implementation")
def test_encoders_before_they_had_an_attention_interface():
    decoder = transformers.BertModel(transformers.BertConfig(**SIZES, is_decoder=True))
    with pytest.raises(ValueError, match=r"model must be an encoder before transformers 5.0, got a decoder"):
        enable_sink_attention(decoder, sink_token_id=SINK)
    relative = transformers.BertModel(transformers.BertConfig(**SIZES, position_embedding_type="relative_key"))
    with pytest.raises(ValueError, match=r"config.position_embedding_type must be 'absolute', got 'relative_key'"):
        enable_sink_attention(relative, sink_token_id=SINK)
    for name in ("bert", "distilbert"):
        model, batch = model_of(name), batch_of("right")
        enabled(model)
        with pytest.raises(ValueError, match="head_mask must be None: sink attention has no such term, got a mask"):
            model(**batch, head_mask=torch.ones(2, 4))


def test_terms_it_does_not_know_are_refused():
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="softcap must be None: sink attention has no such term, got float"):
        integration.sink_attention_forward(nn.Linear(1, 1), x, x, x, None, softcap=30.0)


def test_signature_names_what_is_stored():
    names = set(inspect.signature(enable_sink_attention).parameters) - {"model"}
    assert enabled(model_of("bert")).settings.keys() == names

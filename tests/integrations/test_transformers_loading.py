"""Sink attention in Hugging Face models: what loading takes, reports and refuses; layers that a head does not read."""

import contextlib
import json
import logging
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers", reason="needs transformers")
from recattn.integrations.transformers import BIAS, enable_sink_attention, from_pretrained  # noqa: E402
from tests.helpers.transformers_models import CONFIGS, ENCODERS, SINK, batch_of, enabled, model_of  # noqa: E402

LOST = r"saved with sink attention, whose bias is not loaded: use recattn.integrations.transformers.from_pretrained"
CLASSIFIER, BODY, MASKED = (
    getattr(transformers, name) for name in ("AutoModelForSequenceClassification", "AutoModel", "AutoModelForMaskedLM")
)


@contextlib.contextmanager
def messages_of_transformers():
    """What transformers logs."""
    logger, found = logging.getLogger("transformers"), []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield found
    logger.setLevel(level)
    logger.removeHandler(handler)


def saved(tmp_path, auto: str = "AutoModelForSequenceClassification", **options) -> torch.nn.Module:
    """A model with sink attention and biases of its own, saved to tmp_path."""
    model = model_of("bert", auto, torch.float32)
    enabled(model, **{"layers": [0], "max_sinks": 6, "padding_side": "right", **options})
    model.save_pretrained(tmp_path)
    return model


def without(path, *names: str) -> None:
    """Rename parameters of the checkpoint, so that they are neither expected nor found."""
    file = path / "model.safetensors"
    weights = {f"{key}.other" if key in names else key: value for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


# --- from_pretrained of recattn ---


def test_options_in_the_place_of_the_saved_ones(tmp_path):
    model, batch = saved(tmp_path), batch_of("right")
    options = {"max_sinks": 9, "padding_side": None, "dropout": 0.25, "sink_token_id": 8, "layers": 1}
    loaded, handle = from_pretrained(CLASSIFIER, tmp_path, **options)
    assert handle.settings == {**options, "layers": [0], "bias_scale": None} == loaded.config.recattn_sink
    assert handle.biases[0].dropout == 0.25
    embedding = loaded.get_input_embeddings().weight
    batch["input_ids"][batch["input_ids"] == 8] = 9
    with torch.no_grad():
        expected = model(**batch).logits
        embedding[8] = embedding[SINK]
        batch["input_ids"][batch["input_ids"] == SINK] = 8
        assert (loaded(**batch).logits - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": [1]}, r"layers must be \[0\], as of the biases in .*, got \[1\]"),
        ({"layers": None}, r"layers must be \[0\], as of the biases in .*, got \[0, 1\]"),
        ({"bias_scale": 3.0}, r"bias_scale must be None, as of the biases in .*, got 3.0"),
        ({"max_sinks": 0}, r"max_sinks must be an integer of at least 1, got 0"),
        ({"padding_side": "top"}, r"padding_side must be 'right' or 'left', got 'top'"),
        ({"output_loading_info": True}, r"output_loading_info must be left out, got True"),
        ({"variant": "fp16"}, r"variant must be left out, got fp16"),
    ],
)
def test_options_that_contradict_the_biases_or_are_wrong(tmp_path, options, message):
    saved(tmp_path)
    with pytest.raises(ValueError, match=message):
        from_pretrained(CLASSIFIER, tmp_path, **options)


def test_restore_leaves_a_config_without_a_bias(tmp_path):
    saved(tmp_path)
    model, handle = from_pretrained(CLASSIFIER, tmp_path)
    handle.restore()
    assert not hasattr(model.config, "recattn_sink") and not any(BIAS in name for name in model.state_dict())


@pytest.mark.parametrize("auto", [CLASSIFIER, BODY, transformers.BertForSequenceClassification, MASKED])
@pytest.mark.parametrize("source", ["AutoModelForSequenceClassification", "AutoModel"])
def test_its_own_biases_are_not_reported(tmp_path, auto, source):
    saved(tmp_path, auto=source)
    with messages_of_transformers() as messages, warnings.catch_warnings():
        warnings.simplefilter("error")
        from_pretrained(auto, tmp_path)
    assert not any(BIAS in message for message in messages)


def test_everything_else_unexpected_is_reported(tmp_path):
    saved(tmp_path)
    prefix = "bert.encoder.layer.0.attention"
    without(tmp_path, "bert.embeddings.LayerNorm.weight")
    weights = load_file(tmp_path / "model.safetensors")
    # Named as a bias is, but not where transformers or recattn would look for one.
    weights[f"{prefix}.self.{BIAS}_of_old.scale"] = torch.ones(1)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with messages_of_transformers() as messages:
        from_pretrained(CLASSIFIER, tmp_path)
    report = "\n".join(messages)
    assert "bert.embeddings.LayerNorm.weight.other" in report and f"{BIAS}_of_old.scale" in report
    assert f"{BIAS}.scale" not in report and f"{BIAS}.norm" not in report
    # The next load of the class reports everything again.
    assert transformers.BertForSequenceClassification._keys_to_ignore_on_load_unexpected is None
    assert "_keys_to_ignore_on_load_unexpected" not in vars(transformers.BertForSequenceClassification)


def test_a_bias_that_its_config_does_not_name_is_refused(tmp_path):
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights |= {key.replace("layer.0", "layer.1"): value.clone() for key, value in weights.items() if BIAS in key}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"path must be weights with just the biases of its config.*differs by"):
        from_pretrained(CLASSIFIER, tmp_path)


# --- from_pretrained of transformers ---


@pytest.mark.parametrize("verbosity", [logging.WARNING, logging.ERROR])
@pytest.mark.parametrize("auto", [CLASSIFIER, BODY, transformers.BertForSequenceClassification])
def test_a_plain_load_warns_once_that_it_leaves_the_bias_out(tmp_path, auto, verbosity):
    saved(tmp_path)
    previous = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(verbosity)
    try:
        for _ in range(2):
            with pytest.warns(UserWarning, match=LOST) as told:
                model = auto.from_pretrained(tmp_path)
            assert len([x for x in told if BIAS in str(x.message) or "recattn" in str(x.message)]) == 1
    finally:
        transformers.logging.set_verbosity(previous)
    assert not any(BIAS in name for name in model.state_dict())


def test_a_model_saved_after_a_plain_load_claims_no_bias(tmp_path):
    saved(tmp_path / "with")
    with pytest.warns(UserWarning, match=LOST):
        model, info = CLASSIFIER.from_pretrained(tmp_path / "with", output_loading_info=True)
    assert any(BIAS in key for key in info["unexpected_keys"])
    model.save_pretrained(tmp_path / "without")
    assert "recattn_sink" not in json.loads((tmp_path / "without" / "config.json").read_text())
    with pytest.raises(
        ValueError, match=r"path must be a model saved with sink attention, got .* whose config has none"
    ):
        from_pretrained(CLASSIFIER, tmp_path / "without")
    # Where recattn was not imported the config still claims the bias.
    model.config.recattn_sink = {"layers": [0], "sink_token_id": SINK, "bias_scale": None, "dropout": None}
    model.config.recattn_sink |= {"max_sinks": None, "padding_side": None}
    model.save_pretrained(tmp_path / "claims")
    with pytest.raises(ValueError, match=r"path must be weights with just the biases of its config.*differs by"):
        from_pretrained(CLASSIFIER, tmp_path / "claims")


def test_other_plain_loads_warn_of_nothing(tmp_path):
    model_of("bert").save_pretrained(tmp_path / "plain")
    saved(tmp_path / "with", auto="AutoModel")

    class Enabled(transformers.BertModel):
        """Has the bias when transformers loads the weights."""

        def __init__(self, config):
            super().__init__(config)
            del config.recattn_sink
            enable_sink_attention(self, sink_token_id=SINK, layers=[0])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BODY.from_pretrained(tmp_path / "plain")
        model = Enabled.from_pretrained(tmp_path / "with")
    scales = [value for name, value in model.state_dict().items() if name.endswith(f"{BIAS}.scale")]
    assert [scale.item() for scale in scales] == [20.0] and hasattr(model.config, "recattn_sink")


# --- Layers that the head does not read ---

ONE_TOKEN = ("ForSequenceClassification", "ForMultipleChoice", "ForNextSentencePrediction")
ENCODER_HEADS = ("ForSequenceClassification", "ForTokenClassification", "ForMaskedLM")
DECODER_HEADS = ("ForSequenceClassification", "ForCausalLM")
CASES = [(name, head) for name in CONFIGS for head in (ENCODER_HEADS if name in ENCODERS else DECODER_HEADS)]


def gradients(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> list[float]:
    """The largest gradient of the bias of each layer."""
    outputs = [x for name, x in model(**batch).items() if torch.is_tensor(x) and name != "past_key_values"]
    model.zero_grad()
    sum(x.square().sum() for x in outputs).backward()
    biases = [x for name, x in model.named_modules() if name.endswith(BIAS)]
    return [max(0.0 if p.grad is None else p.grad.abs().max().item() for p in x.parameters()) for x in biases]


@pytest.mark.parametrize("name, head", [*CASES, ("bert", "ForMultipleChoice"), ("bert", "ForNextSentencePrediction")])
def test_the_warning_of_a_layer_that_the_head_does_not_read_is_true(name, head):
    model, batch = model_of(name, f"AutoModel{head}"), batch_of("right")
    if head == "ForMultipleChoice":
        batch = {key: x[None] for key, x in batch.items()}
    token = "first" if name in ENCODERS else "last"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        enabled(model)
    told = [str(x.message) for x in told if "gets no gradient" in str(x.message)]
    first, last = gradients(model, batch)
    assert first > 0 and (last == 0) == (head in ONE_TOKEN)
    if head in ONE_TOKEN:
        rest = f"the bias of layer 1 gets no gradient unless the {token} token is a sink; take layers=1"
        assert told == [
            f"{type(model).__name__} reads only the {token} token of the last layer, and only sinks have a bias there: "
            + rest
        ]
        place = 0 if token == "first" else batch["attention_mask"].sum(-1) - 1
        batch["input_ids"][..., torch.arange(3), place] = SINK
        assert min(gradients(model, batch)) > 0
    else:
        assert not told


def test_modernbert_that_pools_all_tokens():
    model = model_of("modernbert", "AutoModelForSequenceClassification", classifier_pooling="mean")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enabled(model)
    assert min(gradients(model, batch_of("right"))) > 0


@pytest.mark.parametrize("layers, advice", [([0, 1], "; take layers=1"), ([1], " is a sink")])
def test_the_layers_to_take(layers, advice):
    with pytest.warns(UserWarning, match="gets no gradient") as told:
        enabled(model_of("bert", "AutoModelForSequenceClassification"), layers=layers)
    assert str(told[0].message).endswith(advice)


def test_layers_that_the_head_reads_and_loading_warn_of_nothing(tmp_path):
    with pytest.warns(UserWarning, match="gets no gradient"):
        saved(tmp_path, layers=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enabled(model_of("bert", "AutoModelForSequenceClassification"), layers=[0])
        from_pretrained(CLASSIFIER, tmp_path)

"""Sink attention in Hugging Face models: saving, loading, PEFT."""

import copy
import warnings

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")
from recattn.integrations.transformers import BIAS, from_pretrained  # noqa: E402
from tests.helpers.transformers_models import DTYPE, batch_of, enabled, model_of  # noqa: E402

# --- Saving, loading, PEFT ---


def test_saves_and_loads(tmp_path):
    model, batch = model_of("bert", "AutoModelForSequenceClassification"), batch_of("right")
    handle = enabled(model, layers=[1], max_sinks=6, padding_side="right")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded, again = from_pretrained(
        transformers.AutoModelForSequenceClassification, str(tmp_path), **{DTYPE: torch.float64}
    )
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert again.settings == handle.settings and not loaded.training and list(again.biases) == [1]
    # Into the body alone, whose parameters have other names.
    body, _ = from_pretrained(transformers.AutoModel, str(tmp_path), **{DTYPE: torch.float64})
    with torch.no_grad():
        assert torch.equal(body(**batch)[0], model.bert(**batch)[0])


def test_loads_only_what_was_saved_with_sinks(tmp_path):
    model_of("bert").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"path must be a model saved with sink attention, got .* whose config has none"
    ):
        from_pretrained(transformers.AutoModel, str(tmp_path))
    model = model_of("bert")
    handle = enabled(model)
    settings = handle.settings
    handle.restore()
    model.config.recattn_sink = settings
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"path must be weights with just the biases of its config.*differs by \['enc"):
        from_pretrained(transformers.AutoModel, str(tmp_path))


def test_parameters_of_the_official_code_load():
    model = model_of("bert")
    handle = enabled(model)
    state = model.state_dict()
    official = {name: value + 1 for name, value in state.items() if BIAS in name}
    for name in [name for name in official if name.endswith("scale")]:
        official[name.replace(f"{BIAS}.scale", "sink_scale")] = official.pop(name).reshape(())
    report = model.load_state_dict(official, strict=False)
    assert not report.unexpected_keys and not any(BIAS in name for name in report.missing_keys)
    assert all(bias.scale.item() == 21.0 for bias in handle.biases.values())
    names = [name for name in state if name.endswith("query_proj.weight")]
    assert all(torch.equal(model.state_dict()[name], official[name]) for name in names) and names


def test_trains_and_is_saved_under_peft(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft")
    model, batch = model_of("bert", "AutoModelForSequenceClassification", torch.float32), batch_of("right")
    enabled(model)
    bare = copy.deepcopy(model.state_dict())
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["query", "value"], modules_to_save=["classifier", BIAS])
    ).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted(**batch, labels=torch.tensor([0, 1, 0])).loss.backward()
    own = {name: p for name, p in adapted.named_parameters() if BIAS in name and p.requires_grad}
    assert len(own) == 14 and all(p.grad is not None for p in own.values())
    assert any(p.grad.abs().max() > 0 for name, p in own.items() if name.endswith("scale"))
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 10)
    adapted.save_pretrained(tmp_path)

    other = model_of("bert", "AutoModelForSequenceClassification", torch.float32)
    enabled(other)
    other.load_state_dict(bare)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, adapted.eval()(**batch).logits)


def test_a_bias_that_peft_froze_is_told_once():
    peft = pytest.importorskip("peft", reason="needs peft")
    model, batch = model_of("bert"), batch_of("right")
    enabled(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])).train()
    with pytest.warns(UserWarning, match=r"every bias between sinks is frozen.*modules_to_save=\['sink_interaction'\]"):
        adapted(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted(**batch)


def test_a_peft_model_is_enabled_as_what_it_wraps():
    peft = pytest.importorskip("peft", reason="needs peft")
    model, batch = model_of("bert"), batch_of("right")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"])).eval()
    with torch.no_grad():
        plain = adapted(**batch)[0]
        with pytest.warns(UserWarning, match="trains, but is not saved with its adapter"):
            handle = enabled(adapted)
        assert (adapted(**batch)[0] - plain).abs().max() > 1e-3
        handle.restore()
        assert torch.equal(adapted(**batch)[0], plain)

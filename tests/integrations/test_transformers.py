"""Sink attention in Hugging Face models, against transformers itself and an eager formulation of it."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers")
from recattn.integrations.transformers import attention as functions  # noqa: E402
from recattn.integrations.transformers import enable_sink_attention  # noqa: E402
from tests.helpers.transformers_models import (  # noqa: E402
    CONFIGS,
    ENCODERS,
    PRECISION,
    SINK,
    VERSION,
    VOCABULARY,
    batch_of,
    enabled,
    hidden_of,
    model_of,
    run_eager,
    static_cache,
)

every_architecture = pytest.mark.parametrize("name", CONFIGS)
both_sides = pytest.mark.parametrize("side", ["right", "left"])


# --- Results ---


@every_architecture
@both_sides
def test_without_a_bias_it_is_the_model_and_restore_leaves_nothing(name, side):
    model, batch = model_of(name), batch_of(side)
    with torch.no_grad():
        expected = model(**batch)[0]
        keys, settings = list(model.state_dict()), model.config.to_dict()
        attributes = [set(vars(x)) for x in model.modules()]
        handle = enabled(model, scale=0.0)
        assert list(model.state_dict()) != keys
        patched = hidden_of(model, batch)
        handle.restore()
        handle.restore()
        restored = model(**batch)[0]
    valid = batch["attention_mask"].bool()
    assert (patched - expected[valid]).abs().max() <= PRECISION[name]
    assert torch.equal(restored, expected)
    assert list(model.state_dict()) == keys and model.config.to_dict() == settings
    assert not any(x._forward_pre_hooks or "forward" in vars(x) for x in model.modules())
    assert [set(vars(x)) for x in model.modules()] == attributes


@every_architecture
@both_sides
@pytest.mark.parametrize("layers", [None, [1]])
def test_equals_the_eager_formulation(name, side, layers):
    model, batch = model_of(name), batch_of(side)
    with torch.no_grad():
        plain = hidden_of(model, batch)
    handle = enabled(model, layers=layers)
    parameters = list(model.parameters())
    own = hidden_of(model, batch)
    incoming = torch.randn_like(own)
    gradients = torch.autograd.grad(own, parameters, incoming, allow_unused=True)
    expected, _ = run_eager(model, batch, handle)
    references = torch.autograd.grad(expected, parameters, incoming, allow_unused=True)
    assert (own - plain).abs().max() > 1e-3  # the bias tells
    assert (own - expected).abs().max() <= PRECISION[name]
    used = 0
    for gradient, reference in zip(gradients, references, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None:
            used += 1
            assert (gradient - reference).abs().max() <= 100 * PRECISION[name] * (1 + reference.abs().max())
    assert used >= len(parameters) - 5  # poolers and their like aside


@every_architecture
def test_which_layers_need_dense_masks(name, monkeypatch):
    """Only layers whose window is shorter than the sequence."""
    fused, dense = [], []
    for function, calls in (("sink_attention", fused), ("_dense_attention", dense)):
        own = getattr(functions, function)
        monkeypatch.setattr(
            functions,
            function,
            lambda *args, own=own, calls=calls, **kw: calls.append(kw) or own(*args, **kw),
        )
    model, batch = model_of(name), batch_of("left")
    enabled(model)
    model(**batch)
    windows = {"modernbert": 1, "mistral": 2, "gemma3": 1, "gpt-oss": 1}.get(name, 0)
    assert (len(fused), len(dense)) == (2 - windows, windows)
    lengths = torch.tensor([24, 19, 13])
    for call in fused:
        assert torch.equal(call["seq_lens"], lengths) and torch.equal(call["seq_starts"], 24 - lengths)
    assert all(call["causal"] == (name not in ENCODERS) for call in fused)


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen2", "mistral", "gemma3", "gpt-oss"])
def test_output_attentions_are_the_weights_with_the_bias(name):
    model, batch = model_of(name), batch_of("right")
    handle = enabled(model, layers=1)
    with torch.no_grad():
        hidden = hidden_of(model, batch)
        output = model(**batch, output_attentions=True)
        _, expected = run_eager(model, batch, handle, weights=True)
    valid = batch["attention_mask"].bool()
    assert (output[0][valid] - hidden).abs().max() <= PRECISION[name]
    for weights, reference in zip(output.attentions, expected, strict=True):
        difference = (weights - reference).abs().amax(dim=(1, 3))[valid]
        assert difference.max() <= (1e-6 if name == "modernbert" else PRECISION[name])  # its eager softmax: float32


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_sink_positions_in_the_place_of_a_token_id(name):
    model, batch = model_of(name), batch_of("right")
    handle = enabled(model)
    with torch.no_grad():
        by_id = hidden_of(model, batch)
        biases = {i: bias.state_dict() for i, bias in handle.biases.items()}
        handle.restore()
        handle = enable_sink_attention(model)
        for i, bias in handle.biases.items():
            bias.load_state_dict(biases[i])
        # The sink in the padding of the second sequence is named, and must not count.
        positions = torch.tensor([[2, 7, 8, 20, -1], [1, 6, 12, 18, 22], [12, -1, -1, -1, -1]])
        named = hidden_of(model, batch, sink_positions=positions)
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        embedded = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
        by_embeddings = model(**embedded, sink_positions=positions)[0][batch["attention_mask"].bool()]
    assert (named - by_id).abs().max() <= PRECISION[name]  # with another number of sinks
    assert torch.equal(by_embeddings, named)


def test_forward_called_directly():
    """As sentence-transformers does. The signature stays, by which it filters what it passes."""
    model, batch = model_of("bert"), batch_of("right")
    signature = inspect.signature(model.forward)
    enabled(model)
    with torch.no_grad():
        assert torch.equal(model.forward(**batch)[0], model(**batch)[0])
    assert inspect.signature(model.forward) == signature
    hidden = model.embeddings(batch["input_ids"])
    with pytest.raises(
        ValueError, match="the base model must be called to find the sinks, got a call of its layers alone"
    ):
        model.encoder(hidden)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(copied):
    model, batch = model_of("bert"), batch_of("right")
    with torch.no_grad():
        plain = hidden_of(model, batch)
        handle = enabled(model)
        own = hidden_of(model, batch)
        other = copied(model)
        assert torch.equal(hidden_of(other, batch), own)
        for bias in handle.biases.values():
            bias.scale.zero_()
        assert torch.equal(hidden_of(other, batch), own)
        assert (hidden_of(model, batch) - plain).abs().max() <= PRECISION["bert"]


@both_sides
def test_gemma3_without_causality(side):
    """As in EmbeddingGemma."""
    model, batch = model_of("gemma3", use_bidirectional_attention=True), batch_of(side)
    with torch.no_grad():
        plain = hidden_of(model, batch)
        handle = enabled(model, scale=0.0)
        assert not any(bias.causal for bias in handle.biases.values())
        assert (hidden_of(model, batch) - plain).abs().max() <= PRECISION["gemma3"]
        handle.restore()
        enabled(model)
        assert (hidden_of(model, batch) - plain).abs().max() > 1e-3


def test_arguments_by_position():
    model, batch = model_of("bert"), batch_of("right")
    enabled(model)
    with torch.no_grad():
        by_name = model(**batch)[0]
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"])[0], by_name)


@pytest.mark.parametrize("name", ["bert", "distilbert", "modernbert", "qwen2"])
def test_a_copy_is_a_model_of_its_own(name):
    model, batch = model_of(name), batch_of("right")
    enabled(model)
    with torch.no_grad():
        expected = hidden_of(model, batch)
        copied = copy.deepcopy(model)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(hidden_of(copied, batch), expected)


@pytest.mark.parametrize("max_sinks", [4, 9])
def test_a_known_number_of_sinks_changes_nothing(max_sinks):
    model, batch = model_of("bert"), batch_of("right")
    handle = enabled(model)
    state = model.state_dict()
    with torch.no_grad():
        expected = hidden_of(model, batch)
        handle.restore()
        enabled(model, max_sinks=max_sinks, padding_side="right")
        model.load_state_dict(state)
        assert (hidden_of(model, batch) - expected).abs().max() <= 1e-12


def test_masks_of_ones_own_and_with_holes():
    """They are supported by dense masks."""
    model, batch = model_of("bert"), batch_of("right")
    batch["attention_mask"][0, 4:6] = 0
    handle = enabled(model)
    results = [hidden_of(model, batch)]
    valid = batch["attention_mask"].bool()
    four = valid[:, None, None, :].expand(-1, 1, 24, -1)
    additive = torch.zeros(four.shape, dtype=torch.float64).masked_fill(~four, torch.finfo(torch.float64).min)
    for mask in (four, additive):
        results.append(model(input_ids=batch["input_ids"], attention_mask=mask)[0][valid])
    expected, _ = run_eager(model, batch, handle)
    assert all((own - expected).abs().max() <= 1e-12 for own in results)


@pytest.mark.skipif(VERSION < (4, 53), reason="transformers has such masks from 4.53")
def test_masks_by_the_kind_of_layer():
    model, batch = model_of("qwen2"), batch_of("left")
    enabled(model)
    with torch.no_grad():
        expected = hidden_of(model, batch)
        named = model(input_ids=batch["input_ids"], attention_mask={"full_attention": batch["attention_mask"]})[0]
    assert (named[batch["attention_mask"].bool()] - expected).abs().max() <= PRECISION["qwen2"]


@pytest.mark.skipif(VERSION < (4, 53), reason="transformers finds packed sequences from 4.53")
def test_packed_sequences():
    """Where positions begin anew a sequence begins, as in transformers: tokens see only their own."""
    model = model_of("qwen2")
    input_ids = torch.randint(10, VOCABULARY, (1, 20))
    position_ids = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with torch.no_grad():
        expected = model(input_ids=input_ids, position_ids=position_ids)[0]
        enabled(model)
        assert (model(input_ids=input_ids, position_ids=position_ids)[0] - expected).abs().max() <= PRECISION["qwen2"]
        input_ids[0, 5] = SINK
        with pytest.raises(ValueError, match="position_ids must be ascending by 1 in sequences with sinks, got packed"):
            model(input_ids=input_ids, position_ids=position_ids)
        model(input_ids=input_ids, position_ids=torch.arange(20)[None])


# --- Training and generation ---


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def test_gradient_checkpointing():
    model, batch = model_of("qwen2", "AutoModelForCausalLM").train(), batch_of("right")
    enabled(model)
    loss, gradients = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable()
    checkpointed, again = loss_and_gradients(model, batch)
    assert torch.equal(checkpointed, loss)
    assert all(map(torch.equal, gradients, again))
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("scale"))


def test_autocast():
    model, batch = model_of("bert", dtype=torch.float32), batch_of("right")
    handle = enabled(model)
    with torch.no_grad():
        exact = hidden_of(model, batch)
        with torch.autocast("cpu", torch.bfloat16):
            low = hidden_of(model, batch)
            handle.restore()
            plain = hidden_of(model, batch)
    assert low.dtype == exact.dtype  # of the last LayerNorm
    assert (low - exact).abs().max() < (plain - exact).abs().max() / 4  # nearer than without the bias


def test_a_batch_without_sinks_trains_every_parameter():
    """DDP would hang on parameters that one process does not use."""
    model, batch = model_of("bert", "AutoModelForMaskedLM").train(), batch_of("right")
    enabled(model, dropout=0.5)
    batch["input_ids"].fill_(11)
    _, gradients = loss_and_gradients(model, batch)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name, padded", [("qwen2", True), ("qwen2", False), ("gemma3", True), ("gpt-oss", True)])
def test_generates_with_a_cache_as_without(name, padded):
    model, batch = model_of(name, "AutoModelForCausalLM"), batch_of("left")
    if not padded:
        batch["attention_mask"].fill_(1)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 5, "do_sample": False, "bad_words_ids": [[SINK]], "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    plain = model.generate(**batch, **options)
    enabled(model, scale=60.0)
    cached = model.generate(**batch, **options, use_cache=True)
    anew = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(cached.sequences, anew.sequences)
    for step, expected, without in zip(cached.logits, anew.logits, plain.logits, strict=True):
        assert (step - expected).abs().max() <= PRECISION[name]
        assert (step - without).abs().max() > 1e-3


def test_a_static_cache():
    model, batch = model_of("qwen2", "AutoModelForCausalLM"), batch_of("left")
    enabled(model, scale=60.0)
    following = torch.randint(10, VOCABULARY, (3, 1))
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    logits = []
    with torch.no_grad():
        for cache in (transformers.DynamicCache(), static_cache(model, 30)):
            model(**batch, use_cache=True, past_key_values=cache)
            step = {"input_ids": following, "attention_mask": mask, "past_key_values": cache}
            logits.append(model(**step).logits)
            with pytest.raises(ValueError, match=r"the sinks must be among the \d+ tokens of the prompt"):
                model(**{**step, "input_ids": torch.full((3, 1), SINK)})
    assert (logits[0] - logits[1]).abs().max() <= PRECISION["qwen2"]


def test_a_sink_after_a_prompt_of_a_compiled_static_cache():
    model, batch = model_of("qwen2", num_hidden_layers=1), batch_of("left")
    batch["attention_mask"].fill_(1)
    enabled(model, max_sinks=6)
    compiled = torch.compile(model, backend="eager")
    first, second = batch["input_ids"].split([21, 3], dim=1)
    second = second.masked_fill(second == SINK, 11)
    for sinks_follow in (False, True):
        cache = static_cache(model, 24)
        if sinks_follow:
            second = second.index_fill(1, torch.tensor([1]), SINK)
        with torch.no_grad():
            model(input_ids=first, past_key_values=cache, use_cache=True)
            step = {"input_ids": second, "past_key_values": cache, "position_ids": torch.arange(21, 24)[None]}
            if sinks_follow:
                with pytest.raises(RuntimeError, match="the sinks must be among the tokens of the prompt"):
                    compiled(**step)
            else:
                expected = model(input_ids=torch.cat([first, second], dim=1))[0][:, 21:]
                assert (compiled(**step)[0] - expected).abs().max() <= PRECISION["qwen2"]


def test_a_sink_after_the_prompt_is_refused():
    model, batch = model_of("qwen2", "AutoModelForCausalLM"), batch_of("left")
    enabled(model)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        following = {"attention_mask": torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)}
        with pytest.raises(ValueError, match=r"the sinks must be among the 24 tokens of the prompt.*got one after it"):
            model(input_ids=torch.full((3, 1), SINK), **following, past_key_values=copy.deepcopy(cache))
        late = torch.tensor([[24]] * 3)
        with pytest.raises(ValueError, match=r"sink_positions must be among the 24 tokens of the prompt.*got 24"):
            model(input_ids=torch.full((3, 1), 11), **following, past_key_values=cache, sink_positions=late)


@pytest.mark.parametrize("name", ["bert", "qwen2"])
def test_compiles_without_a_graph_break(name):
    model, batch = model_of(name, dtype=torch.float32, num_hidden_layers=1), batch_of("right")
    enabled(model, max_sinks=6)
    parameters = list(model.parameters())
    eager = hidden_of(model, batch)
    graph = torch.compile(model, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="the tokens of an attention_mask must have no gap in a compiled model"):
        graph(**batch | {"attention_mask": batch["attention_mask"].index_fill(1, torch.tensor([3]), 0)})
    compiled = graph(**batch)[0][batch["attention_mask"].bool()]
    assert (compiled - eager).abs().max() <= 1e-5
    for gradient, reference in zip(
        *(torch.autograd.grad(x.square().sum(), parameters, allow_unused=True) for x in (compiled, eager)), strict=True
    ):
        if reference is not None:
            assert (gradient - reference).abs().max() <= 1e-4 * (1 + reference.abs().max())


@pytest.mark.skipif(VERSION < (5, 0), reason="older models do not export")
def test_exports_for_lengths_below_max_sinks():
    model = model_of("bert", "AutoModelForTokenClassification", dtype=torch.float32, num_hidden_layers=1)
    enabled(model, max_sinks=12)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2, max=64)}
    batch = batch_of("left")
    exported = torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, sizes), strict=False).module()
    for side, length in (("right", 24), ("left", 40)):
        batch = {name: x[:, :9] if side == "right" else x for name, x in batch_of(side, length).items()}
        torch.testing.assert_close(exported(**batch)[0], model(**batch)[0])

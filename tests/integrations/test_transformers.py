"""Sink attention in Hugging Face models, against transformers itself and an eager formulation written here."""

import copy
import inspect
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs transformers")

from recattn.integrations import transformers as integration  # noqa: E402
from recattn.integrations.transformers import BIAS, enable_sink_attention, from_pretrained  # noqa: E402
from recattn.integrations.transformers import attention as functions  # noqa: E402
from recattn.integrations.transformers.architectures import attentions_of  # noqa: E402

SINK, VOCABULARY = 7, 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES),
    "distilbert": lambda: transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64
    ),
    # Its first layer sees everything, its second a window of 9.
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, local_attention=8, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED, head_dim=8),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "mistral": lambda: transformers.MistralConfig(**GROUPED, sliding_window=11),
    "mistral, wide window": lambda: transformers.MistralConfig(**GROUPED, sliding_window=4096),
}
ENCODERS = ("bert", "roberta", "distilbert", "modernbert")
# RMSNorm and the rotations of these compute in float32, whatever the model is in.
PRECISION = {name: 1e-12 if name in ENCODERS else 2e-5 for name in CONFIGS}
every_architecture = pytest.mark.parametrize("name", CONFIGS)
both_sides = pytest.mark.parametrize("side", ["right", "left"])


def model_of(name: str, auto: str = "AutoModel", dtype: torch.dtype = torch.float64) -> nn.Module:
    config = CONFIGS[name]()
    config.use_cache = False
    return getattr(transformers, auto).from_config(config, attn_implementation="sdpa").to(dtype).eval()


def batch_of(side: str = "right", length: int = 24) -> dict[str, Tensor]:
    """Three sequences, two of them padded; the sinks stand unevenly, one in the padding, and the last has one alone."""
    input_ids = torch.randint(10, VOCABULARY, (3, length))
    mask = torch.ones_like(input_ids)
    for row, padding in ((1, 5), (2, 11)):
        mask[row, slice(length - padding, None) if side == "right" else slice(0, padding)] = 0
    input_ids[0, [2, 7, 8, 20]] = SINK
    input_ids[1, [1, 6, 12, 18, 22]] = SINK
    input_ids[2, 11 if side == "left" else 12] = SINK
    return {"input_ids": input_ids, "attention_mask": mask}


def enabled(model: nn.Module, scale: float = 20.0, **options):
    """With biases that differ from layer to layer and tell."""
    handle = enable_sink_attention(model, **{"sink_token_id": SINK, **options})
    for bias in handle.biases.values():
        nn.init.normal_(bias.query_proj.weight)
        nn.init.normal_(bias.key_proj.bias)
        nn.init.normal_(bias.norm.bias)
        nn.init.constant_(bias.scale, scale)
    return handle


def hidden_of(model: nn.Module, batch: dict[str, Tensor], **kwargs) -> Tensor:
    """At the valid tokens: what transformers computes at padding is nobody's concern."""
    return model(**batch, **kwargs)[0][batch["attention_mask"].bool()]


# --- The eager formulation, one sequence and one head at a time ---


class Eager:
    """An attention function of transformers that adds the bias to its scores, and keeps the weights."""

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], layers: list[int]) -> None:
        self.batch, self.weights, self.hidden = batch, [], None
        attentions = attentions_of(model.base_model)
        self.chosen = {id(attentions[i]) for i in layers}
        self.hooks = [x.register_forward_pre_hook(self.keep_hidden, with_kwargs=True) for x in attentions]

    def keep_hidden(self, module, args, kwargs):
        self.hidden = args[0] if args else kwargs["hidden_states"]

    def bias(self, module, row: int) -> Tensor:
        """[N, N] of one sequence."""
        ids, mask = (self.batch[name][row] for name in ("input_ids", "attention_mask"))
        beta = torch.zeros(len(ids), len(ids), dtype=torch.float64)
        at = [i for i, token in enumerate(ids.tolist()) if token == SINK and mask[i]]
        if id(module) not in self.chosen or not at:
            return beta
        own = getattr(module, BIAS)
        x = own.norm(self.hidden[row, at])
        q, k = (projection(x).chunk(own.num_heads, dim=-1) for projection in (own.query_proj, own.key_proj))
        scores = torch.stack([a @ b.T / math.sqrt(a.shape[-1]) for a, b in zip(q, k, strict=True)])
        if module.is_causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -math.inf)
        sinks = own.scale * scores.softmax(-1).mean(0)
        return beta.index_put(torch.meshgrid(torch.tensor(at), torch.tensor(at), indexing="ij"), sinks.double())

    def __call__(self, module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **_):
        assert dropout == 0
        groups = query.shape[1] // key.shape[1]
        i, j = torch.arange(query.shape[2])[:, None], torch.arange(query.shape[2])
        visible = self.batch["attention_mask"].bool()[:, None, None, :].expand(-1, 1, query.shape[2], -1)
        if module.is_causal:
            visible = visible & (j <= i)
        if sliding_window is not None:
            visible = visible & ((i - j).abs() < sliding_window)
        biases = torch.stack([self.bias(module, row) for row in range(len(query))])[:, None]
        scores = query @ key.repeat_interleave(groups, 1).mT * scaling + biases
        weights = scores.masked_fill(~visible, -1e30).softmax(-1).to(value.dtype)
        self.weights.append(weights)
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2), weights


def run_eager(model: nn.Module, batch: dict[str, Tensor], layers: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Of a model with its biases, without our hooks and functions."""
    own = {module: dict(module._forward_pre_hooks) for module in model.modules()}
    for module in own:
        module._forward_pre_hooks.clear()
    eager = Eager(model, batch, layers)
    transformers.AttentionInterface.register("eager_with_sinks", eager)
    transformers.AttentionMaskInterface.register("eager_with_sinks", transformers.masking_utils.eager_mask)
    previous, model.config._attn_implementation = model.config._attn_implementation, "eager_with_sinks"
    out = hidden_of(model, batch)
    model.config._attn_implementation = previous
    for hook in eager.hooks:
        hook.remove()
    for module, hooks in own.items():
        module._forward_pre_hooks.update(hooks)
    return out, eager.weights


# --- Results ---


@every_architecture
@both_sides
def test_without_a_bias_it_is_the_model_and_restore_leaves_nothing(name, side):
    model, batch = model_of(name), batch_of(side)
    keys, settings = list(model.state_dict()), model.config.to_dict()
    with torch.no_grad():
        expected = model(**batch)[0]
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
    assert not any(x._forward_pre_hooks for x in model.modules())


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
    expected, _ = run_eager(model, batch, handle.settings["layers"])
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
    """Only where a window bites."""
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
    windows = {"modernbert": 1, "mistral": 2}.get(name, 0)
    assert (len(fused), len(dense)) == (2 - windows, windows)
    assert all(call["padding_side"] == "left" and call["seq_lens"].tolist() == [24, 19, 13] for call in fused)
    assert all(call["causal"] == (name not in ENCODERS) for call in fused)


@pytest.mark.parametrize("name", ["bert", "modernbert", "qwen2", "mistral"])
def test_output_attentions_are_the_weights_with_the_bias(name):
    model, batch = model_of(name), batch_of("right")
    enabled(model, layers=1)
    with torch.no_grad():
        hidden = hidden_of(model, batch)
        output = model(**batch, output_attentions=True)
        _, expected = run_eager(model, batch, [0])
    valid = batch["attention_mask"].bool()
    assert (output[0][valid] - hidden).abs().max() <= PRECISION[name]
    for weights, reference in zip(output.attentions, expected, strict=True):
        difference = (weights - reference).abs().amax(dim=(1, 3))[valid]
        assert difference.max() <= PRECISION[name]


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


def test_arguments_by_position():
    model, batch = model_of("bert"), batch_of("right")
    enabled(model)
    with torch.no_grad():
        by_name = model(**batch)[0]
        assert torch.equal(model(batch["input_ids"], batch["attention_mask"])[0], by_name)


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
    """Served by dense masks."""
    model, batch = model_of("bert"), batch_of("right")
    batch["attention_mask"][0, 4:6] = 0
    enabled(model)
    expected, _ = run_eager(model, batch, [0, 1])
    assert (hidden_of(model, batch) - expected).abs().max() <= 1e-12
    valid = batch["attention_mask"].bool()
    four = valid[:, None, None, :].expand(-1, 1, 24, -1)
    additive = torch.zeros(four.shape, dtype=torch.float64).masked_fill(~four, torch.finfo(torch.float64).min)
    for mask in (four, additive):
        own = model(input_ids=batch["input_ids"], attention_mask=mask)[0]
        assert (own[valid] - expected).abs().max() <= 1e-12


def test_masks_by_the_kind_of_layer():
    model, batch = model_of("qwen2"), batch_of("left")
    enabled(model)
    with torch.no_grad():
        expected = hidden_of(model, batch)
        named = model(input_ids=batch["input_ids"], attention_mask={"full_attention": batch["attention_mask"]})[0]
    assert (named[batch["attention_mask"].bool()] - expected).abs().max() <= PRECISION["qwen2"]


def test_packed_sequences():
    """Positions that begin anew: nothing is seen across, as transformers has it."""
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
    """Parameters that one process leaves out would stop DDP."""
    model, batch = model_of("bert", "AutoModelForMaskedLM").train(), batch_of("right")
    enabled(model, dropout=0.5)
    batch["input_ids"].fill_(11)
    _, gradients = loss_and_gradients(model, batch)
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("padded", [True, False])
def test_generates_with_a_cache_as_without(padded):
    model, batch = model_of("qwen2", "AutoModelForCausalLM"), batch_of("left")
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
        assert (step - expected).abs().max() <= PRECISION["qwen2"]
        assert (step - without).abs().max() > 1e-3


def test_a_static_cache():
    model, batch = model_of("qwen2", "AutoModelForCausalLM"), batch_of("left")
    enabled(model, scale=60.0)
    following = torch.randint(10, VOCABULARY, (3, 1))
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    logits = []
    with torch.no_grad():
        for cache in (transformers.DynamicCache(), transformers.StaticCache(model.config, max_cache_len=30)):
            model(**batch, use_cache=True, past_key_values=cache)
            step = {"input_ids": following, "attention_mask": mask, "past_key_values": cache}
            logits.append(model(**step).logits)
            with pytest.raises(ValueError, match=r"the sinks must be among the \d+ tokens of the prompt"):
                model(**{**step, "input_ids": torch.full((3, 1), SINK)})
    assert (logits[0] - logits[1]).abs().max() <= PRECISION["qwen2"]


def test_a_sink_after_a_prompt_of_a_compiled_static_cache():
    model, batch = model_of("qwen2"), batch_of("left")
    batch["attention_mask"].fill_(1)
    enabled(model, max_sinks=6)
    compiled = torch.compile(model, backend="eager")
    first, second = batch["input_ids"].split([21, 3], dim=1)
    second = second.masked_fill(second == SINK, 11)
    for sinks_follow in (False, True):
        cache = transformers.StaticCache(model.config, max_cache_len=24)
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
    model, batch = model_of(name, dtype=torch.float32), batch_of("right")
    enabled(model, max_sinks=6, padding_side="right")
    parameters = list(model.parameters())
    eager = hidden_of(model, batch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch)[0][batch["attention_mask"].bool()]
    assert (compiled - eager).abs().max() <= 1e-5
    for gradient, reference in zip(
        *(torch.autograd.grad(x.square().sum(), parameters, allow_unused=True) for x in (compiled, eager)), strict=True
    ):
        if reference is not None:
            assert (gradient - reference).abs().max() <= 1e-4 * (1 + reference.abs().max())


# --- Saving, loading, PEFT ---


def test_saves_and_loads(tmp_path):
    model, batch = model_of("bert", "AutoModelForSequenceClassification"), batch_of("right")
    handle = enabled(model, layers=[1], max_sinks=6, padding_side="right")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded, again = from_pretrained(transformers.AutoModelForSequenceClassification, str(tmp_path), dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert again.settings == handle.settings and not loaded.training and list(again.biases) == [1]
    # Into the body alone, whose parameters have other names.
    body, _ = from_pretrained(transformers.AutoModel, str(tmp_path), dtype=torch.float64)
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
    with pytest.raises(ValueError, match=r"architecture of model must be 'bert' or .* or 'mistral', got 'deberta-v2'"):
        enable_sink_attention(transformers.AutoModel.from_config(config), sink_token_id=SINK)
    with pytest.raises(ValueError, match=r"architecture of model must be .*, got 'Linear'"):
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
    with pytest.raises(ValueError, match="attention_mask must be padded on the left, as padding_side says"):
        model(**batch)
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
    """On every path: the mistral's window bites, so its masks are dense."""
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
    model, batch = model_of("bert"), batch_of("right")
    model.set_attn_implementation("eager")
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
    """It would leave the bias out without a word."""
    model, batch = model_of("bert"), batch_of("right")
    enabled(model)
    model.set_attn_implementation("sdpa")
    with pytest.raises(
        ValueError, match=r"attention of the model must be 'recattn_sink' until restore\(\), got 'sdpa'"
    ):
        model(**batch)


def test_layers_with_another_config():
    """As the encoder of an EncoderDecoderModel has them: the layers would go on reading the other one."""
    model = model_of("bert")
    model.config = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match="model must be one whose layers read its own config, got one whose layers"):
        enable_sink_attention(model, sink_token_id=SINK)


def test_terms_it_does_not_know_are_refused():
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="softcap must be None: sink attention has no such term, got float"):
        integration.sink_attention_forward(nn.Linear(1, 1), x, x, x, None, softcap=30.0)


def test_signature_names_what_is_stored():
    names = set(inspect.signature(enable_sink_attention).parameters) - {"model"}
    assert enabled(model_of("bert")).settings.keys() == names

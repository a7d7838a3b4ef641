import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from recattn.inspect import SinkMass, plot_sink_mass, sink_mass
from recattn.nn.sink_tokens import insert_sinks

transformers = pytest.importorskip("transformers")

SINK = 9
LAYERS, HEADS, WINDOW = 2, 4, 4
HISTORIES = [[[1, 2], [3, 4, 5], [6], [7, 8]], [[2, 3], [4]], [[5, 6, 7]], [[1], [2]]]
SIZES = {
    "vocab_size": 10,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "initializer_range": 0.5,
}


def bert(attention="eager"):
    config = transformers.BertConfig(**SIZES, attn_implementation=attention)
    return transformers.BertModel(config, add_pooling_layer=False).double().eval()


def qwen2(attention="eager", **options):
    # In float32: in float64 its eager attention gives NaN at the tokens after padding on the left.
    config = transformers.Qwen2Config(**SIZES, num_key_value_heads=2, attn_implementation=attention, **options)
    return transformers.Qwen2Model(config).eval()


def sliding_qwen2(attention="eager"):
    return qwen2(attention, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)


MODELS = {
    "bert": (bert, lambda layer, i, j: True),
    "qwen2": (qwen2, lambda layer, i, j: j <= i),
    "sliding qwen2": (sliding_qwen2, lambda layer, i, j: j <= i and (layer == 0 or i - j < WINDOW)),
}


def tokens_of(side="right"):
    tokens = insert_sinks(HISTORIES, SINK, padding_side=side)
    return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}, tokens.sink_positions


def mean(numbers):
    return sum(numbers) / len(numbers) if numbers else torch.nan


def by_hand(attentions, mask, positions, sees):
    """The fields of SinkMass, entry by entry."""
    batch = len(mask)
    fields = [torch.zeros(LAYERS, batch, HEADS), torch.zeros(LAYERS, batch, HEADS)]
    fields = [x.double() for x in [*fields, torch.zeros(LAYERS, batch), torch.zeros(LAYERS, batch)]]
    for layer, weights in enumerate(attentions):
        for b in range(batch):
            tokens = mask[b].nonzero()[:, 0].tolist()
            sinks = [i for i in positions[b].tolist() if i in tokens]
            shares = {}
            for i in tokens:
                visible = [j for j in tokens if sees(layer, i, j)]
                shares[i] = len([j for j in visible if j in sinks]) / len(visible)
            for field, queries in zip((0, 1), (tokens, sinks), strict=True):
                for h in range(HEADS):
                    fields[field][layer, b, h] = mean([sum(weights[b, h, i, j].item() for j in sinks) for i in queries])
                fields[field + 2][layer, b] = mean([shares[i] for i in queries])
    return fields


def assert_fields(mass, expected):
    for actual, field in zip(mass, expected, strict=False):
        bound = {"atol": 1e-10, "rtol": 0} if actual.dtype == torch.float64 else {}
        torch.testing.assert_close(actual, field.to(actual.dtype), **bound, equal_nan=True)


# --- sink_mass ---


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", MODELS)
def test_mass_by_hand(name, attention, side):
    make, sees = MODELS[name]
    model = make(attention)
    batch, positions = tokens_of(side)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = eager(**batch, output_attentions=True).attentions
    expected = by_hand(attentions, batch["attention_mask"], positions, sees)
    mass = sink_mass(model, batch, sink_positions=positions)
    assert mass.layers == (0, 1) and mass.to_sinks.dtype == model.dtype
    assert_fields(mass, expected)
    assert_fields(sink_mass(model, batch, sink_token_id=SINK), expected)
    assert_fields(sink_mass(model, {**batch, "sink_positions": positions}), expected)
    assert_fields(sink_mass(model, {**batch, "sink_positions": positions[:, :0]}, sink_token_id=SINK), expected)
    assert mass.among_sinks[:, 2].isnan().all() and (mass.to_sinks[:, 2] == 0).all()  # a row without sinks
    last = sink_mass(model, batch, sink_positions=positions, layers=[1])
    assert last.layers == (1,) and torch.equal(last.to_sinks, mass.to_sinks[1:])


def test_without_an_attention_mask_every_token_counts():
    model = bert()
    ids = torch.tensor([[1, SINK, 2, 3], [SINK, 4, 5, SINK]])
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    positions = torch.tensor([[1, -1], [0, 3]])
    expected = by_hand(attentions, torch.ones_like(ids), positions, lambda *_: True)
    assert_fields(sink_mass(model, {"input_ids": ids}, sink_token_id=SINK), expected)
    embeds = model.get_input_embeddings()(ids)
    assert_fields(sink_mass(model, {"inputs_embeds": embeds}, sink_positions=positions), expected)


def test_sinks_in_padding_do_not_count():
    model = bert()
    batch, positions = tokens_of()
    expected = sink_mass(model, batch, sink_positions=positions)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, SINK)
    assert_fields(sink_mass(model, batch, sink_token_id=SINK), expected[:4])


def test_half_precision_is_summed_in_float32():
    model = qwen2().bfloat16()
    batch, positions = tokens_of()
    mass = sink_mass(model, batch, sink_positions=positions)
    assert mass.to_sinks.dtype == torch.float32
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    assert_fields(mass, by_hand(attentions, batch["attention_mask"], positions, MODELS["qwen2"][1]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_modes_and_attention_are_restored(attention):
    model = bert(attention)
    model.train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    batch, positions = tokens_of()
    mass = sink_mass(model, batch, sink_positions=positions)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == attention
    assert not mass.to_sinks.requires_grad
    assert torch.equal(mass.to_sinks, sink_mass(model.eval(), batch, sink_positions=positions).to_sinks)
    model.train()
    with pytest.raises(IndexError):
        sink_mass(model, {"input_ids": torch.tensor([[1000]])}, sink_token_id=SINK)
    assert all(module.training for module in model.modules()) and model.config._attn_implementation == attention


@pytest.fixture
def register():
    """Registers attention functions for a test."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    names = []

    def add(name, function):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, eager_mask)
        names.append(name)

    yield add
    for name in names:
        del AttentionInterface._global_mapping[name], AttentionMaskInterface._global_mapping[name]


def test_an_attention_of_ones_own_is_kept(register):
    seen = []

    def biased(module, query, key, value, attention_mask, scaling=None, sink_positions=None, **kwargs):
        seen.append(sink_positions)
        scores = query @ key.mT * scaling + attention_mask
        columns = torch.zeros(len(query), 1, 1, key.shape[2], dtype=query.dtype)
        for b, positions in enumerate(sink_positions):
            columns[b, :, :, positions[positions >= 0]] = 50.0
        weights = (scores + columns).softmax(-1)
        return (weights @ value).transpose(1, 2), weights

    register("biased", biased)
    model = bert("biased")
    batch, positions = tokens_of()
    mass = sink_mass(model, batch, sink_positions=positions)
    assert len(seen) == LAYERS and all(x is positions for x in seen)
    assert (mass.to_sinks[:, [0, 1, 3]] > 0.999).all() and (mass.to_sinks[:, 2] == 0).all()
    assert model.config._attn_implementation == "biased"


def test_weights_that_do_not_come_are_missed(register):
    def silent(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return nn.functional.scaled_dot_product_attention(query, key, value, attention_mask).transpose(1, 2), None

    register("silent", silent)
    batch, positions = tokens_of()
    message = r"model must be one that returns the attention weights of all its 2 layers .* got those of 0 .* 'silent'"
    with pytest.raises(ValueError, match=message):
        sink_mass(bert("silent"), batch, sink_positions=positions)


def test_a_model_with_sink_attention():
    """recattn's attention stays in place, and its bias is part of the weights."""
    integration = pytest.importorskip("recattn.integrations.transformers")
    plain = bert("sdpa")
    batch, positions = tokens_of()
    before = sink_mass(plain, batch, sink_token_id=SINK)
    model = copy.deepcopy(plain)
    handle = integration.enable_sink_attention(model, sink_token_id=SINK, layers=1, bias_scale=20.0)
    by_token, by_position = (
        sink_mass(model, batch, **x) for x in ({"sink_token_id": SINK}, {"sink_positions": positions})
    )
    assert model.config._attn_implementation == "recattn_sink"
    assert_fields(by_token, by_position[:4])
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions
    assert_fields(by_token, by_hand(attentions, batch["attention_mask"], positions, MODELS["bert"][1]))
    has_sinks = [0, 1, 3]
    assert (by_token.among_sinks[0, has_sinks] > before.among_sinks[0, has_sinks]).all()
    handle.restore()
    assert_fields(sink_mass(model, batch, sink_token_id=SINK), before[:4])


def test_wrong_calls_are_refused():
    model = bert()
    batch, positions = tokens_of()
    for arguments, options, message in (
        ((nn.Linear(1, 1), batch), {"sink_positions": positions}, "model must be a transformers model, got Linear"),
        ((model, batch), {}, r"sink_positions must be given, or sink_token_id .* got \(None, None\)"),
        ((model, batch), {"sink_positions": positions, "sink_token_id": SINK}, "sink_positions must be given, or"),
        ((model, batch), {"sink_token_id": 0, "layers": []}, "sink_token_id 0 must be somewhere .* got no sink"),
        ((model, batch), {"sink_positions": torch.full((4, 2), -1)}, "sink_positions must be somewhere .* got no sink"),
        (
            (model, batch),
            {"sink_positions": positions[1:]},
            r"sink_positions must be \[B, M\] = \[4, 3\], got \[3, 3\]",
        ),
        ((model, batch), {"sink_positions": positions + 30}, "sink_positions must be below the sequence length 11"),
        ((model, batch), {"sink_positions": positions, "layers": [2]}, "layers must be between 0 and 1, got 2"),
        ((model, batch), {"sink_positions": positions, "layers": []}, "layers must be at least one, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            sink_mass(*arguments, **options)
    embeds = {"inputs_embeds": model.get_input_embeddings()(batch["input_ids"])}
    with pytest.raises(
        ValueError, match=r"input_ids must be in the batch, to find sink_token_id in, got \['inputs_emb"
    ):
        sink_mass(model, embeds, sink_token_id=SINK)


def test_a_model_of_nan_has_no_mass():
    model = bert()
    batch, positions = tokens_of()
    with torch.no_grad():
        model.encoder.layer[1].attention.self.key.weight[0, 0] = torch.nan
    mass = sink_mass(model, batch, sink_positions=positions)
    assert mass.to_sinks[0].isfinite().all() and mass.to_sinks[1, [0, 1, 3], 0].isnan().all()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.fill_(torch.nan)
    assert sink_mass(model, batch, sink_positions=positions).to_sinks[:, [0, 1, 3]].isnan().all()


# --- plot_sink_mass ---


def masses():
    torch.manual_seed(3)
    before = torch.rand(LAYERS, 3, HEADS, dtype=torch.float64)
    before[:, 1] = torch.nan
    uniform = torch.tensor([[0.2, torch.nan, 0.4]] * LAYERS, dtype=torch.float64)
    make = lambda mass: SinkMass(mass / 2, mass, uniform / 2, uniform, (0, 3))  # noqa: E731
    return make(before), make(before**0.5)


@pytest.mark.parametrize("quantity", ["to_sinks", "among_sinks"])
def test_lines_and_bands(quantity, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "mass.png"
    figure = plot_sink_mass(*masses(), quantity=quantity, labels=("plain", "trained"), path=path)
    (ax,) = figure.axes
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines) == ["plain", "trained", "uniform attention"]
    for mass, label, band in zip(masses(), ("plain", "trained"), ax.collections, strict=True):
        by_head = getattr(mass, quantity)[:, [0, 2]].mean(dim=1)
        assert tuple(lines[label].get_xdata()) == (0, 3)
        assert torch.as_tensor(lines[label].get_ydata()).tolist() == pytest.approx(by_head.mean(1).tolist())
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(by_head.min().item())
        assert heights.max() == pytest.approx(by_head.max().item())
    expected = 0.15 if quantity == "to_sinks" else 0.3
    assert torch.as_tensor(lines["uniform attention"].get_ydata()).tolist() == pytest.approx([expected] * 2)
    assert ax.get_xlabel() == "layer" and "sinks" in ax.get_ylabel()
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("quantity", ["to_sinks", "among_sinks"])
def test_a_row_of_nan_is_not_averaged_away(quantity):
    """Only rows without sinks, whose share is NaN by design, are left out."""
    pytest.importorskip("matplotlib")
    before, after = masses()
    for mass in after[:2]:
        mass[1, 2] = torch.nan
    (ax,) = plot_sink_mass(before, after, quantity=quantity).axes
    first, second = (torch.as_tensor(line.get_ydata()) for line in ax.get_lines()[:2])
    assert first.isfinite().all() and second.isnan().tolist() == [False, True]


def test_drawing_into_given_axes():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    left, right = figure.subplots(1, 2)
    assert plot_sink_mass(*masses(), ax=right) is figure
    assert len(right.get_lines()) == 3 and not left.get_lines()


def test_masses_that_do_not_belong_together():
    pytest.importorskip("matplotlib")
    before, after = masses()
    with pytest.raises(ValueError, match=r"after must be of the layers of before, \(0, 3\), got \(0, 1\)"):
        plot_sink_mass(before, after._replace(layers=(0, 1)))
    with pytest.raises(ValueError, match="after must be of the batch of before, got other sinks or visible keys"):
        plot_sink_mass(before, after._replace(uniform_to_sinks=before.uniform_to_sinks * 2))
    with pytest.raises(ValueError, match="quantity must be 'to_sinks' or 'among_sinks', got 'mass'"):
        plot_sink_mass(before, after, quantity="mass")


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plot_sink_mass needs matplotlib: pip install matplotlib"):
        plot_sink_mass(*masses())


def test_optional_libraries_are_not_imported():
    code = "import sys, recattn.inspect; print({'transformers', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"

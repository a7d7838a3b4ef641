"""RecBole's own SASRec and BERT4Rec, refined: the layer against a formula, the masks, training and restoring."""

import importlib
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from benchmarks.data import movielens
from benchmarks.quality.sasrec import pad_left
from recattn import reference
from recattn.integrations.recbole import RefinedMultiHeadAttention, patch_recbole, read_attention_mask

MECHANISMS = ("simple", "value", "additive", "stochastic")
E, H, N, B, ITEMS = 16, 2, 8, 5, 40
LENGTHS = torch.tensor([8, 5, 1, 3, 7])


@pytest.fixture(scope="module", autouse=True)
def recbole():
    """Import RecBole's models without its data loaders; TensorBoard is replaced by its name."""
    with pytest.MonkeyPatch.context() as patched:
        if importlib.util.find_spec("tensorboard") is None:
            stand_in = types.SimpleNamespace(SummaryWriter=None)
            patched.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
        try:
            models = importlib.import_module("recbole.model.sequential_recommender")
        except ImportError as error:
            pytest.skip(f"RecBole's models cannot be imported: {error}")
    torch.autograd.set_detect_anomaly(False)  # which importing them turns on for the whole process
    return models


def build(kind, items=ITEMS, length=N, dropout=0.0, **changes):
    """A RecBole model, with only the configuration and data set fields that its constructor reads."""
    config = {
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "item_length",
        "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": length,
        "device": "cpu",
        "n_layers": 2,
        "n_heads": H,
        "hidden_size": E,
        "inner_size": 2 * E,
        "hidden_dropout_prob": dropout,
        "attn_dropout_prob": dropout,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.3,
        "loss_type": "CE",
        "mask_ratio": 0.3,
        "MASK_ITEM_SEQ": "masked",
        "POS_ITEMS": "positive",
        "NEG_ITEMS": "negative",
        "MASK_INDEX": "indices",
    }
    return kind(config | changes, types.SimpleNamespace(num=lambda field: items))


def sequences(lengths=LENGTHS, length=N, items=ITEMS):
    drawn = torch.randint(1, items, (len(lengths), length))
    return drawn.masked_fill(torch.arange(length) >= lengths[:, None], 0)


def attention(dropout=0.0, dtype=torch.float64):
    layers = importlib.import_module("recbole.model.layers")
    made = layers.MultiHeadAttention(H, E, dropout, dropout, 1e-12).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def mask_of(item_seq, bidirectional, models):
    return models.SASRec.get_attention_mask(None, item_seq, bidirectional)


# --- The layer ---


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("source", ["logits", "weights"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_output_and_every_gradient(mechanism, source, bidirectional, recbole):
    """Compared with the formula: RecBole's linear maps, residual and norm around the reference."""
    old = attention()
    layer = RefinedMultiHeadAttention(old, N + 2, mechanism=mechanism, source=source, rank=5, per_head=bidirectional)
    for matrix in layer._matrices():
        nn.init.normal_(matrix)
    drawn = torch.randn(B, N, E, dtype=torch.float64, requires_grad=True)
    actual = layer(drawn, mask_of(sequences(), bidirectional, recbole))
    x = drawn.masked_fill((torch.arange(N) >= LENGTHS[:, None])[..., None], 0)

    parameters = dict(layer.named_parameters())
    q, k, v = (
        torch.stack((x @ parameters[f"{name}.weight"].T + parameters[f"{name}.bias"]).split(E // H, -1), 1)
        for name in ("query", "key", "value")
    )
    matrices = [parameters[name] for name in ("w_q", "w_k", "w_v") if name in parameters]
    options = {"mechanism": mechanism, "source": source, "causal": not bidirectional, "seq_lens": LENGTHS}
    heads = torch.cat(reference.refined_attention(q, k, v, *matrices, **options).unbind(1), -1)
    sums = heads @ parameters["dense.weight"].T + parameters["dense.bias"] + x
    centred = sums - sums.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    expected = normalised * parameters["LayerNorm.weight"] + parameters["LayerNorm.bias"]

    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    leaves = [drawn, *layer.parameters()]
    incoming = torch.randn_like(actual)
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_without_a_refinement_it_is_recboles_own_layer(bidirectional, recbole):
    """With W_V = 0 additive is plain attention. In ours padding sees nothing; in RecBole's it sees tokens."""
    old = attention()
    layer = RefinedMultiHeadAttention(old, N, mechanism="additive")
    nn.init.zeros_(layer.w_v)
    items = sequences()
    x, mask = torch.randn(B, N, E, dtype=torch.float64), mask_of(items, bidirectional, recbole)
    tokens = items != 0
    torch.testing.assert_close(layer(x, mask)[tokens], old(x, mask)[tokens], atol=1e-10, rtol=0)
    at_padding = layer.LayerNorm(layer.dense.bias).expand(int((~tokens).sum()), E)
    torch.testing.assert_close(layer(x, mask)[~tokens], at_padding, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_padding_may_hold_anything(value, bidirectional, recbole):
    """This includes the norm of the residual, which has gradients of its own."""
    layer = RefinedMultiHeadAttention(attention(), N, mechanism="value")
    items = sequences()
    mask, padding = mask_of(items, bidirectional, recbole), (items == 0)[..., None]
    x, incoming = torch.randn(B, N, E, dtype=torch.float64), torch.randn(B, N, E, dtype=torch.float64)
    results = []
    for filled in (x.masked_fill(padding, 0), x.masked_fill(padding, value)):
        out = layer(filled.requires_grad_(), mask)
        leaves = [filled, *layer.parameters()]
        results.append([out, *torch.autograd.grad(out, leaves, incoming.masked_fill(padding, 0))])
    assert all(torch.equal(clean, dirty) and dirty.isfinite().all() for clean, dirty in zip(*results, strict=True))


def test_the_layers_and_the_state_dict_are_the_old_ones():
    old = attention(dropout=0.25).eval()
    layer = RefinedMultiHeadAttention(old, N, mechanism="value", rank=3, per_head=True)
    theirs, ours = dict(old.named_parameters()), dict(layer.named_parameters())
    assert set(ours) - set(theirs) == {"w_q", "w_k", "w_v"}
    assert all(ours[name] is parameter for name, parameter in theirs.items())
    assert layer.attn_dropout.p == layer.out_dropout.p == 0.25 and not layer.training
    assert layer.w_q.shape == (H, N, 3) and layer.w_q.dtype == torch.float64
    assert "mechanism='value'" in repr(layer)


def test_both_dropouts_are_of_training(recbole):
    old = attention(dropout=0.5)
    layer = RefinedMultiHeadAttention(old, N)
    x, mask = torch.randn(B, N, E, dtype=torch.float64), mask_of(sequences(), False, recbole)
    for silent in ("attn_dropout", "out_dropout"):
        dropout = getattr(layer, silent)
        dropout.p = 0.0
        assert not torch.equal(layer(x, mask), layer(x, mask)), silent  # the other one still drops
        dropout.p = 0.5
    layer.eval()
    assert torch.equal(layer(x, mask), layer(x, mask))


# --- The mask ---


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_lengths_of_the_mask(bidirectional, side, recbole):
    items = sequences(torch.tensor([8, 5, 1, 0, 7]))
    items = items.flip(1) if side == "left" else items
    visible, valid = read_attention_mask(mask_of(items, bidirectional, recbole), torch.empty(B, N, E))
    assert visible["seq_lens"].tolist() == [8, 5, 1, 0, 7] and torch.equal(valid, items > 0)
    assert visible["seq_starts"].tolist() == ([0, 3, 7, 0, 1] if side == "left" else [0] * 5)
    assert visible["causal"] is not bidirectional


def test_other_masks_are_refused(recbole):
    x = torch.randn(B, N, E)
    items = sequences()
    causal, both = (mask_of(items, bidirectional, recbole) for bidirectional in (False, True))
    hole = items.clone()
    hole[1, 2] = 0
    with pytest.raises(
        ValueError, match=r"hide padding before and after the tokens and no other key, got one that .*sequence 1"
    ):
        read_attention_mask(mask_of(hole, True, recbole), x)
    with pytest.raises(ValueError, match=r"must hide later keys .* got one that shows key 1 to query 0 of sequence 0"):
        read_attention_mask(both.expand(B, 1, N, N), x)
    with pytest.raises(ValueError, match=r"0 where visible and -10000 where hidden, got -5000\.0"):
        read_attention_mask(causal / 2, x)
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, 1, 1 or N, N\] = .*, got \[5, 1, 7, 8\]"):
        read_attention_mask(causal[:, :, 1:], x)
    with pytest.raises(ValueError, match=r"attention_mask must be a torch.Tensor, got NoneType"):
        read_attention_mask(None, x)
    layer = RefinedMultiHeadAttention(attention(), N)
    with pytest.raises(ValueError, match=r"input_tensor must be \[B, N, E\] = \[5, 8, 16\], got \[5, 8, 15\]"):
        layer(x[..., 1:], causal)
    with pytest.raises(ValueError, match="max_len must be an integer of at least 1, got 0"):
        RefinedMultiHeadAttention(attention(), 0)
    with pytest.warns(FutureWarning, match="padding_side goes in the next release"):
        RefinedMultiHeadAttention(attention(), N, padding_side="left")


def test_values_are_not_read_where_that_synchronises(recbole):
    """The meta device has no values, so reading one would raise."""
    layer = RefinedMultiHeadAttention(attention().to("meta"), N, impl="reference")
    mask = mask_of(sequences(), False, recbole).to("meta")
    assert layer(torch.randn(B, N, E, device="meta", dtype=torch.float64), mask).shape == (B, N, E)


# --- RecBole's models ---


@pytest.mark.parametrize("name", ["SASRec", "BERT4Rec"])
def test_models_are_patched_and_restored(name, recbole):
    model = build(getattr(recbole, name)).eval()
    items = sequences()
    call = (lambda: model(items, LENGTHS)) if name == "SASRec" else (lambda: model(items))
    before, keys = call(), set(model.state_dict())
    old = [layer.multi_head_attention for layer in model.trm_encoder.layer]
    handle = patch_recbole(model, mechanism="additive")
    assert handle.replaced == [f"trm_encoder.layer.{i}.multi_head_attention" for i in range(2)]
    assert set(model.state_dict()) - keys == {f"{n}.w_{x}" for n in handle.replaced for x in "qkv"}
    assert all(layer.multi_head_attention.max_len == N for layer in model.trm_encoder.layer)
    assert (call() - before).abs().max() > 1e-3
    for layer in model.trm_encoder.layer:
        nn.init.zeros_(layer.multi_head_attention.w_v)
    tokens = slice(None) if name == "SASRec" else items != 0
    torch.testing.assert_close(call()[tokens], before[tokens], atol=1e-5, rtol=1e-5)
    handle.restore()
    assert [layer.multi_head_attention for layer in model.trm_encoder.layer] == old
    assert torch.equal(call(), before)


@pytest.mark.parametrize("name", ["SASRec", "BERT4Rec"])
def test_a_state_depends_on_its_own_sequence_only(name, recbole):
    """It depends neither on padding nor on the batch and, in SASRec, not on later items."""
    model = build(getattr(recbole, name), length=20).eval()
    patch_recbole(model)
    items = sequences(length=20)
    encode = (lambda x, n: model(x, n)) if name == "SASRec" else (lambda x, n: model(x)[torch.arange(len(x)), n - 1])
    alone = torch.cat([encode(items[i : i + 1], LENGTHS[i : i + 1]) for i in range(B)])
    shorter = encode(items[:, :N], LENGTHS)
    for states in (alone, shorter):
        torch.testing.assert_close(states, encode(items, LENGTHS), atol=1e-5, rtol=1e-5)


def test_sasrec_learns_from_movielens(recbole):
    """A few steps with RecBole's own loss, on real sequences or, without the data, on drawn ones of real lengths."""
    sample = movielens.load(offline=True).sample(64, longest=21)
    lengths = torch.tensor([len(items) - 1 for items in sample])
    left = pad_left([items[:-1] for items in sample], 20)
    rolled = torch.stack([row.roll(int(n)) for row, n in zip(left, lengths, strict=True)])  # RecBole pads on the right
    batch = {"item_id_list": rolled, "item_length": lengths, "item_id": torch.stack([items[-1] for items in sample])}
    losses = {}
    for mechanism in (None, "simple", "value"):
        torch.manual_seed(0)
        model = build(recbole.SASRec, movielens.ITEMS + 1, 20, dropout=0.1, initializer_range=0.02)
        handle = patch_recbole(model, mechanism=mechanism) if mechanism else None
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        before = [p.detach().clone() for p in handle.added_parameters] if handle else []
        losses[mechanism] = []
        for _ in range(15):
            loss = model.calculate_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[mechanism].append(loss.item())
        if handle:
            assert all(not torch.equal(p, q) for p, q in zip(handle.added_parameters, before, strict=True))
            scores = model.eval().full_sort_predict(batch)
            handle.restore()
            assert (model.full_sort_predict(batch) - scores).abs().max() > 1e-4
    assert all(curve[-1] < 0.95 * curve[0] for curve in losses.values()), losses
    assert len({round(curve[-1], 6) for curve in losses.values()}) == len(losses)


def test_recbole_is_the_same_after(recbole):
    layers = importlib.import_module("recbole.model.layers")
    own = layers.MultiHeadAttention
    with patch_recbole(build(recbole.SASRec)):
        assert layers.MultiHeadAttention is own
        assert type(build(recbole.SASRec).trm_encoder.layer[0].multi_head_attention) is own


# --- Refusals ---


def test_wrong_models_are_refused(recbole):
    with pytest.raises(ValueError, match="model must have a MultiHeadAttention inside that is replaced, got a GRU4Rec"):
        patch_recbole(build(recbole.GRU4Rec, embedding_size=E, num_layers=1, dropout_prob=0.0))
    encoder = build(recbole.SASRec).trm_encoder
    with pytest.raises(ValueError, match="max_len must be given for a model without max_seq_length, got None"):
        patch_recbole(encoder)
    assert patch_recbole(encoder, max_len=N).replaced == [f"layer.{i}.multi_head_attention" for i in range(2)]
    with pytest.raises(ValueError, match=r"mechanism must be 'simple' or .*, got 'simpel'"):
        patch_recbole(build(recbole.SASRec), mechanism="simpel")

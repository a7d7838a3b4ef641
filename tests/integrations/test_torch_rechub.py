"""LREA in torch-rechub's DIN: its unit compared with LREA user by user, and swapped into a model that trains."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from recattn.integrations.torch_rechub import LREAActivationUnit, replace_attention, without_padding

B, N, D = 6, 9, 8
MAX_LEN, RANK = 12, 3


def padded_histories():
    """Zero rows at the end, at the start, in between, everywhere, and nowhere."""
    history = torch.randn(B, N, D, dtype=torch.float64)
    for row, padding in enumerate(([6, 7, 8], [0, 1], [3, 5], range(N), [], [0, 8])):
        history[row, list(padding)] = 0
    history[4, :, 0] = 0  # a zero in a row does not make it padding
    return history


def unit(**options):
    made = LREAActivationUnit(D, MAX_LEN, RANK, **{"dtype": torch.float64} | options)
    with torch.no_grad():
        made.lrea.w_comp.normal_()
        made.lrea.w_decomp.normal_()
    return made


# --- The unit ---


def test_the_unit_is_lrea_of_the_rows_that_are_not_zero():
    lrea_unit = unit(num_heads=2)
    history, target = padded_histories().requires_grad_(), torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    leaves = [history, target, *lrea_unit.parameters()]
    actual = lrea_unit(history, target)
    rows = []
    for events, q in zip(history, target, strict=True):
        kept = events[events.abs().sum(1) > 0]
        rows.append(lrea_unit.lrea(q[None], kept[None])[0] if len(kept) else torch.zeros_like(q))
    expected = torch.stack(rows)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    assert torch.equal(actual[3], torch.zeros(D)) and (actual[[0, 1, 2, 4, 5]].abs().amax(1) > 0.1).all()
    incoming = torch.randn_like(actual)
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-9)


def test_without_padding_keeps_the_order_and_serves():
    lrea_unit, history = unit(), padded_histories()
    behaviors, seq_lens = without_padding(history)
    assert seq_lens.tolist() == [6, 7, 7, 0, 9, 7]
    for events, packed, n in zip(history, behaviors, seq_lens, strict=True):
        assert torch.equal(packed[:n], events[events.any(1)]) and not packed[n:].any()
    # With slope 1 the served form is the trained one.
    linear = unit(negative_slope=1.0)
    target = torch.randn(B, D, dtype=torch.float64)
    state = linear.lrea.export_state(behaviors, seq_lens)
    torch.testing.assert_close(linear.lrea.attend(target, state), linear(history, target), atol=1e-11, rtol=0)
    assert lrea_unit.lrea.loss(lrea_unit.lrea.compress(behaviors, seq_lens), "mean") > 0


def test_refused():
    with pytest.raises(ValueError, match="N of history must be at most max_len, 12, got 13"):
        unit()(torch.randn(2, 13, D, dtype=torch.float64), torch.randn(2, D, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"history must be \[B, N, D\]"):
        unit()(torch.randn(2, D), torch.randn(2, D))
    with pytest.raises(ValueError, match="num_heads · head_dim must be embed_dim, 8, got 6"):
        unit(num_heads=2, head_dim=3)


# --- In torch-rechub's DIN ---

ITEMS, CATEGORIES, USERS = 40, 5, 7


@pytest.fixture(scope="module")
def rechub():
    reason = "torch-rechub is not installed: pip install torch-rechub"
    return pytest.importorskip("torch_rechub.models.ranking.din", reason=reason, exc_type=ImportError)


@pytest.fixture
def model(rechub):
    from torch_rechub.basic.features import SequenceFeature, SparseFeature
    from torch_rechub.basic.initializers import RandomNormal

    options = {"embed_dim": D, "initializer": RandomNormal(0, D**-0.5)}
    sizes = {"item": ITEMS + 1, "category": CATEGORIES + 1}
    return rechub.DIN(
        features=[SparseFeature("user", USERS, **options)],
        history_features=[
            SequenceFeature(f"past_{x}", n, pooling="concat", shared_with=x, padding_idx=0, **options)
            for x, n in sizes.items()
        ],
        target_features=[SparseFeature(x, n, padding_idx=0, **options) for x, n in sizes.items()],
        mlp_params={"dims": [16]},
        attention_mlp_params={"dims": [12]},
    )


@pytest.fixture
def batch():
    """A user likes items of the category, (item − 1) % CATEGORIES + 1, that most of the history has."""
    generator = torch.Generator().manual_seed(0)
    users = 256
    taste = torch.randint(CATEGORIES, (users, 1), generator=generator)
    past = 1 + taste + CATEGORIES * torch.randint(ITEMS // CATEGORIES, (users, N), generator=generator)
    lengths = torch.randint(1, N + 1, (users, 1), generator=generator)
    past[torch.arange(N) >= lengths] = 0
    liked = torch.rand(users, 1, generator=generator) < 0.5
    item = 1 + taste + CATEGORIES * torch.randint(ITEMS // CATEGORIES, (users, 1), generator=generator)
    item = torch.where(liked, item, 1 + item % ITEMS)  # the next category where it is not liked
    features = {"user": torch.zeros(users).long(), "item": item[:, 0], "past_item": past}
    features |= {"category": (features["item"] - 1) % CATEGORIES + 1, "past_category": (past - 1) % CATEGORIES + 1}
    features["past_category"][past == 0] = 0
    return features, liked[:, 0].float()


def test_every_unit_is_replaced_and_put_back(model, batch):
    features, _ = batch
    model.eval()
    before, units = model(features), list(model.attention_layers)
    names = list(model.state_dict())
    with replace_attention(model, MAX_LEN, RANK) as handle:
        assert handle.replaced == ["attention_layers.0", "attention_layers.1"]
        assert all(isinstance(layer, LREAActivationUnit) for layer in model.attention_layers)
        assert not torch.equal(model(features), before)
        assert len(handle.added_parameters) == 2 * 5
    assert list(model.attention_layers) == units and list(model.state_dict()) == names
    assert not any(module.training for module in model.modules())
    assert torch.equal(model(features), before)


def test_what_stands_at_padding_does_not_matter_nor_on_which_side(model, batch):
    features, _ = batch
    model.eval()
    replace_attention(model, MAX_LEN, RANK)
    out = model(features)
    rolled = dict(features)
    for name in ("past_item", "past_category"):
        shifts = (features[name] == 0).sum(1).tolist()
        rolled[name] = torch.stack([row.roll(n) for row, n in zip(features[name], shifts, strict=True)])
        assert (rolled[name][:, -1] != 0).all()
    assert torch.equal(model(rolled), out)
    longer = dict(features) | {name: F.pad(features[name], (0, 3)) for name in ("past_item", "past_category")}
    assert torch.equal(model(longer), out)


def test_it_trains_and_the_old_units_are_as_they_were(model, batch):
    features, labels = batch
    model.eval()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    before, units = model(features), [unit.state_dict() for unit in model.attention_layers]
    handle = replace_attention(model, MAX_LEN, RANK)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    new = [parameter.detach().clone() for parameter in handle.added_parameters]
    model.train()
    for _ in range(60):
        loss = F.binary_cross_entropy(model(features), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # knowing nothing of the history it is 0.69
    assert all(not torch.equal(old, now) for old, now in zip(new, handle.added_parameters, strict=True))
    for table in model.embedding.embed_dict.values():
        assert table.padding_idx is None or not table.weight[table.padding_idx].any()
    handle.restore()
    for layer, old in zip(model.attention_layers, units, strict=True):
        assert all(torch.equal(value, old[name]) for name, value in layer.state_dict().items())
    model.load_state_dict(initial)
    assert torch.equal(model.eval()(features), before)


def test_device_and_dtype_are_the_units_own(model):
    model.double().to("meta")
    replace_attention(model, MAX_LEN, RANK, num_heads=2, orientation="weights")
    lrea = model.attention_layers[1].lrea
    assert (lrea.w_q.dtype, lrea.w_q.device.type) == (torch.float64, "meta")
    assert (lrea.num_heads, lrea.orientation, lrea.max_len, lrea.rank) == (2, "weights", MAX_LEN, RANK)


def test_a_model_without_units_is_refused(rechub):
    with pytest.raises(ValueError, match="ActivationUnit"):
        replace_attention(nn.Sequential(nn.Linear(2, 2)), MAX_LEN, RANK)

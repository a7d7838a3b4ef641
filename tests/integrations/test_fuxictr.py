"""LREA and refined attention in FuxiCTR's layers and in models of its zoo, which train."""

import functools

import pytest
import torch
from torch import nn

import recattn
from recattn.integrations.fuxictr import (
    LREATargetAttention,
    MaskedSelfAttention,
    refine_self_attention,
    replace_target_attention,
)

B, N, D = 6, 9, 8
MAX_LEN, RANK = 12, 3
ITEMS = 40


def padded_histories():
    """A history and its mask: padding at the end, at the start, in between, everywhere, nowhere."""
    history, mask = torch.randn(B, N, D, dtype=torch.float64), torch.ones(B, N)
    for row, padding in enumerate(([6, 7, 8], [0, 1], [3, 5], range(N), [], [0, 8])):
        mask[row, list(padding)] = 0
        history[row, list(padding)] = torch.nan
    return history, mask


def attention(**options):
    made = LREATargetAttention(D, MAX_LEN, RANK, **{"dtype": torch.float64} | options)
    with torch.no_grad():
        made.lrea.w_comp.normal_()
        made.lrea.w_decomp.normal_()
    return made


# --- The layer ---


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
@pytest.mark.parametrize("out_proj", [False, True])
def test_the_layer_is_lrea_of_the_rows_that_the_mask_keeps(dtype, out_proj):
    options = {"num_heads": 2}
    if out_proj:
        options |= {"head_dim": 3, "out_proj": nn.Linear(6, D, dtype=torch.float64)}
    layer = attention(**options)
    history, mask = padded_histories()
    history.requires_grad_()
    target = torch.randn(B, D, dtype=torch.float64, requires_grad=True)
    leaves = [history, target, *layer.parameters()]
    actual = layer(target, history, mask.to(dtype))
    width = layer.lrea.num_heads * layer.lrea.head_dim
    rows = []
    for events, keep, q in zip(history, mask.bool(), target, strict=True):
        rows.append(layer.lrea(q[None], events[keep][None])[0] if keep.any() else q.new_zeros(width))
    expected = torch.stack(rows)
    expected = layer.out_proj(expected) if out_proj else expected
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    incoming = torch.randn_like(actual)
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-9)


def test_without_a_mask_all_rows_count():
    layer, history, target = attention(), torch.randn(B, N, D).double(), torch.randn(B, D).double()
    torch.testing.assert_close(layer(target, history), layer(target, history, torch.ones(B, N)), atol=1e-12, rtol=0)
    torch.testing.assert_close(layer(target, history), layer.lrea(target, history), atol=0, rtol=0)


def test_it_serves_what_it_trained():
    layer = attention(negative_slope=1.0)
    history, mask = padded_histories()
    target = torch.randn(B, D, dtype=torch.float64)
    state = layer.lrea.export_state(*layer.without_padding(history, mask))
    torch.testing.assert_close(layer.lrea.attend(target, state), layer(target, history, mask), atol=1e-11, rtol=0)


def test_refused():
    layer, target = attention(), torch.randn(2, D).double()
    with pytest.raises(ValueError, match="N of history_sequence must be at most max_len, 12, got 13"):
        layer(target, torch.randn(2, 13, D).double())
    with pytest.raises(ValueError, match=r"history_sequence must be \[B, N, D\]"):
        layer(target, torch.randn(2, D).double())
    with pytest.raises(ValueError, match=r"mask must be \[B, N\]"):
        layer(target, torch.randn(2, 5, D).double(), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"num_heads · head_dim must be embed_dim, 8, .*, got 6"):
        attention(num_heads=2, head_dim=3)


# --- A mask per user and head, as BST passes it ---

HEADS, E = 2, 6
PADDINGS = ["pre", "post", "scattered"]


def tokens_of_users(side):
    """[N, N] bool, False at padding. User b has b behaviours before the target, which is the last token."""
    if side == "scattered":
        behaviors = torch.rand(N, N - 1).argsort(dim=1) < torch.arange(N)[:, None]
    else:
        behaviors = torch.arange(N - 1) < torch.arange(N)[:, None]
        behaviors = behaviors.flip(1) if side == "pre" else behaviors
    return torch.cat([behaviors, torch.ones(N, 1, dtype=torch.bool)], dim=1)


def mask_per_head(valid, causal, heads=HEADS):
    """BST's: [B·H, N, N], True where a key is hidden."""
    hidden = ~valid[:, None] | torch.full((N, N), causal).triu(1)
    hidden.diagonal(dim1=1, dim2=2).fill_(False)
    return hidden.repeat_interleave(heads, dim=0)


def masked_attention(causal, **options):
    module = MaskedSelfAttention(E, HEADS, max_len=N, causal=causal, **{"dtype": torch.float64} | options)
    nn.init.normal_(module.in_proj_bias)
    nn.init.normal_(module.out_proj.bias)
    return module


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("causal", [False, True])
def test_with_values_of_zero_it_is_pytorchs_attention_of_the_mask(padding, causal):
    """With w_v = 0 "additive" is plain attention. Of every length, at the tokens that are not padding."""
    module = masked_attention(causal, mechanism="additive")
    nn.init.zeros_(module.w_v)
    plain = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=torch.float64)
    plain.load_state_dict(module.state_dict(), strict=False)
    valid, x = tokens_of_users(padding), torch.randn(N, N, E, dtype=torch.float64, requires_grad=True)
    mask = mask_per_head(valid, causal)
    actual, expected = (attention(x, x, x, attn_mask=mask)[0] for attention in (module, plain))
    torch.testing.assert_close(actual[valid], expected[valid], atol=1e-12, rtol=0)
    bias = module.out_proj.bias.expand_as(actual)
    torch.testing.assert_close(actual[~valid], bias[~valid], atol=0, rtol=0)
    incoming = torch.randn_like(actual) * valid[..., None]
    parameters = dict(plain.named_parameters())
    mine = torch.autograd.grad(actual, [x, *(module.get_parameter(name) for name in parameters)], incoming)
    for gradient, other in zip(mine, torch.autograd.grad(expected, [x, *parameters.values()], incoming), strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("causal, mechanism, side", [(False, "simple", "left"), (True, "value", "right")])
def test_it_is_the_reference_of_each_users_tokens(padding, causal, mechanism, side):
    """Whose tokens are moved by hand; the output and all gradients."""
    module = masked_attention(causal, mechanism=mechanism, padding_side=side, per_head=True)
    valid, x = tokens_of_users(padding), torch.randn(N, N, E, dtype=torch.float64, requires_grad=True)
    actual, weights = module(x, x, x, attn_mask=mask_per_head(valid, causal))
    assert weights is None
    rows = []
    for tokens, keep in zip(x, valid, strict=True):
        places = [(~keep).nonzero()[:, 0], keep.nonzero()[:, 0]]
        places = torch.cat(places if side == "left" else places[::-1])
        q, k, v = (
            (tokens[places] @ module.in_proj_weight.T + module.in_proj_bias).view(N, 3, HEADS, -1).permute(1, 2, 0, 3)
        )
        matrices = [w for w in (module.w_q, module.w_k, module.w_v) if w is not None]
        options = {"mechanism": mechanism, "causal": causal, "padding_side": side, "seq_lens": keep.sum()[None]}
        moved = recattn.reference.refined_attention(q[None], k[None], v[None], *matrices, **options)[0]
        rows.append(module.out_proj(moved.transpose(0, 1).flatten(1))[places.argsort()])
    expected = torch.stack(rows)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    incoming = torch.randn_like(actual)
    leaves = [x, *module.parameters()]
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=1e-9)


def test_masks_of_other_kinds_are_those_of_refined_self_attention():
    module, x = masked_attention(None), torch.randn(N, N, E, dtype=torch.float64)
    lengths = torch.arange(N)
    options = {
        "key_padding_mask": torch.arange(N).flip(0) >= lengths[:, None],
        "attn_mask": torch.ones(N, N).triu(1) > 0,
    }
    for chosen in ({}, options, options | {"need_weights": True, "average_attn_weights": False}):
        expected = recattn.nn.RefinedSelfAttention.forward(module, x, x, x, **chosen)
        torch.testing.assert_close(module(x, x, x, **chosen), expected, atol=0, rtol=0)


def test_masks_that_are_not_bsts_are_refused():
    module, valid, x = masked_attention(False), tokens_of_users("pre"), torch.randn(N, N, E, dtype=torch.float64)
    mask = mask_per_head(valid, causal=False)

    def refused(match, attn_mask=mask, module=module, inputs=(x, x, x), **options):
        with pytest.raises(ValueError, match=match):
            module(*inputs, attn_mask=attn_mask, **options)

    refused(
        r"must hide padding only, .*\(causal=False\), got one that hides key 8 from query 0",
        mask_per_head(valid, causal=True),
    )
    other = mask_per_head(valid, causal=False)
    other[2 * (N - 1) + 1, 3, 2] = True
    refused(f"got one that hides key 2 from query 3 in head 1 of user {N - 1}", other)
    other = mask_per_head(valid, causal=False)
    other[0, 4, 4] = True
    refused(
        r"and no token from itself \(causal=False\), got one that hides key 4 from query 4 in head 0 of user 0", other
    )
    causal = masked_attention(True)
    refused(r"keys after a query only, .* \(causal=True\), got one that shows key 8 to query 0", module=causal)
    refused("causal must be given with attn_mask", module=masked_attention(None))
    refused("must be bool, .* the 1 of DMIN hides nothing.* got torch.float32", mask.float())
    refused(r"attn_mask must be \[B·H, N, N\] = \[18, 9, 9\], got \[9, 9, 9\]", mask[::2])
    refused(
        r"must be the only option, got \['key_padding_mask', 'need_weights'\]",
        key_padding_mask=~valid,
        need_weights=True,
    )
    refused("key and value must be query itself", inputs=(x, x, x.clone()))
    refused("batch_first must be True", module=masked_attention(False, batch_first=False))


class BehaviorTransformer(nn.Module):
    """The calls, the pooling and the optimizer of FuxiCTR's BST."""

    def __init__(self, use_causal_mask):
        super().__init__()
        self.use_causal_mask, self.items = use_causal_mask, nn.Embedding(ITEMS + 1, E, padding_idx=0)
        self.blocks = nn.ModuleList(nn.MultiheadAttention(E, HEADS, batch_first=True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(E), nn.Linear(E, 1)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)

    def forward(self, items):
        mask = mask_per_head(items != 0, self.use_causal_mask)
        x = self.items(items)
        for attention in self.blocks:
            out, _ = attention(x, x, x, attn_mask=mask)
            out += x
            x = self.norm(out)
        return self.head((x * (items != 0)[..., None]).sum(dim=1))


@pytest.mark.parametrize("use_causal_mask", [False, True])
def test_bst_trains_wherever_its_padding_is_and_comes_back(use_causal_mask):
    model, items = BehaviorTransformer(use_causal_mask), torch.randint(1, ITEMS, (N, N))
    pre = items * tokens_of_users("pre")
    post = torch.stack([torch.cat([row[:-1].roll(b), row[-1:]]) for b, row in enumerate(pre)])
    assert torch.equal(post != 0, tokens_of_users("post"))
    before = model(pre)
    with refine_self_attention(model, N) as handle:
        assert handle.replaced == ["blocks.0", "blocks.1"]
        first = model(pre)
        assert not torch.equal(first, before)
        torch.testing.assert_close(model(post), first, atol=1e-6, rtol=1e-6)
        initial = [parameter.clone() for parameter in handle.added_parameters]
        model(post).square().mean().backward()
        model.optimizer.step()
        assert all(not torch.equal(new, old) for new, old in zip(handle.added_parameters, initial, strict=True))
        assert not torch.equal(model(pre), first)
        trained = {name: parameter.clone() for name, parameter in model.named_parameters() if ".w_" not in name}
    plain = BehaviorTransformer(use_causal_mask)
    plain.load_state_dict(trained)
    assert torch.equal(model(pre), plain(pre))


# --- In FuxiCTR ---

CATEGORIES, USERS = 5, 256


@pytest.fixture(scope="module")
def zoo():
    reason = "FuxiCTR is not installed: pip install fuxictr==2.3.10"
    return pytest.importorskip("model_zoo.LongCTR", reason=reason, exc_type=ImportError)


@pytest.fixture
def build(zoo, tmp_path):
    from fuxictr.features import FeatureMap
    from fuxictr.pytorch.torch_utils import seed_everything

    def build(name, **sizes):
        features = FeatureMap("tiny", str(tmp_path))
        features.labels, features.default_emb_dim = ["liked"], D
        for feature, source, size in (("user", "", USERS + 1), ("movie", "item", ITEMS + 1)):
            features.features[feature] = {
                "source": source, "type": "categorical", "padding_idx": 0, "vocab_size": size
            }  # fmt: skip
        options = {"embedding_dim": D, "optimizer": "adam", "loss": "binary_crossentropy", "learning_rate": 1e-2}
        options |= {"metrics": ["AUC"], "model_root": str(tmp_path), "verbose": 0, "epochs": 3} | sizes
        seed_everything(0)
        model = getattr(zoo, name)(features, **options)
        (tmp_path / "tiny").mkdir(exist_ok=True)
        return model

    return build


@pytest.fixture(params=["pre", "post"])
def side(request):
    return request.param


def batches(side, size=64):
    """As LongCTRDataLoader yields them. A user likes items of the category that the history has."""
    generator = torch.Generator().manual_seed(0)
    taste = torch.randint(CATEGORIES, (USERS, 1), generator=generator)
    past = 1 + taste + CATEGORIES * torch.randint(ITEMS // CATEGORIES, (USERS, N), generator=generator)
    lengths = torch.randint(0, N + 1, (USERS, 1), generator=generator)
    lengths[:4] = torch.tensor([0, N, 1, N - 1])[:, None]
    past[torch.arange(N) >= lengths if side == "post" else torch.arange(N) < N - lengths] = 0
    liked = torch.rand(USERS, 1, generator=generator) < 0.5
    item = 1 + taste + CATEGORIES * torch.randint(ITEMS // CATEGORIES, (USERS, 1), generator=generator)
    item = torch.where(liked, item, 1 + item % ITEMS)  # the next category where it is not liked
    made = []
    for rows in torch.arange(USERS).split(size):
        batch = {"user": 1 + rows, "liked": liked[rows, 0]}
        mask = (past[rows] > 0).float()
        made.append((batch, {"movie": torch.cat([past[rows], item[rows]], dim=1).flatten()}, mask))
    return made


def predictions(model, data):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(clone(batch))["y_pred"] for batch in data])


def clone(batch):
    """TransAct writes to the mask, and get_inputs to the dictionary."""
    values, items, mask = batch
    return dict(values), dict(items), mask.clone()


SMALL = {"dnn_hidden_units": [16], "attention_hidden_units": [12]}
SIM = {"dnn_hidden_units": [16], "attention_dim": 6, "num_heads": 2, "short_seq_len": 5}
TRANSACT = {"dcn_hidden_units": [16], "dim_feedforward": 16, "num_heads": 2, "transformer_layers": 2}


@pytest.mark.parametrize(
    "name, sizes, replaced",
    [
        ("DIN", SMALL, ["attention_layers"]),
        ("SIM", SIM, ["short_attention", "long_attention"]),
    ],
)
def test_target_attentions_are_replaced_train_and_come_back(build, side, name, sizes, replaced):
    model, data = build(name, **sizes), batches(side)
    before, names = predictions(model, data), list(model.state_dict())
    handle = replace_target_attention(model, MAX_LEN, RANK)
    assert handle.replaced == replaced
    assert all(isinstance(model.get_submodule(layer), LREATargetAttention) for layer in replaced)
    assert not torch.equal(predictions(model, data), before)
    initial = [parameter.clone() for parameter in handle.added_parameters]
    assert len(initial) == 5 * len(replaced)
    model.fit([*map(clone, data)], validation_data=[*map(clone, data)], epochs=3)
    assert all(not torch.equal(new, old) for new, old in zip(handle.added_parameters, initial, strict=True))
    handle.restore()
    assert list(model.state_dict()) == names and model.optimizer.param_groups[-1]["params"] == handle.added_parameters


def test_restored_predictions_are_the_same_bits(build, side):
    for name, sizes, replace in (
        ("DIN", SMALL, functools.partial(replace_target_attention, max_len=MAX_LEN, rank=RANK)),
        ("TransAct", TRANSACT, functools.partial(refine_self_attention, max_len=MAX_LEN)),
    ):
        model, data = build(name, **sizes), batches("pre" if name == "TransAct" else side)
        before = predictions(model, data)
        with replace(model):
            assert not torch.equal(predictions(model, data), before)
        assert torch.equal(predictions(model, data), before)


def test_din_with_lrea_does_not_read_the_side_of_the_padding(build):
    model = build("DIN", **SMALL)
    replace_target_attention(model, MAX_LEN, RANK)
    for parameter in model.attention_layers.lrea.parameters():
        nn.init.normal_(parameter)
    pre, post = (predictions(model, batches(side)) for side in ("pre", "post"))
    torch.testing.assert_close(pre, post, atol=1e-6, rtol=0)


def test_din_with_lrea_learns_and_loads_its_checkpoint(build):
    model, data = build("DIN", **SMALL), batches("pre")
    replace_target_attention(model, MAX_LEN, RANK)
    model.fit([*map(clone, data)], validation_data=[*map(clone, data)], epochs=25)
    assert model.evaluate([*map(clone, data)])["AUC"] > 0.9
    other = build("DIN", **SMALL)
    replace_target_attention(other, MAX_LEN, RANK)
    other.load_weights(model.checkpoint)
    assert torch.equal(predictions(other, data), predictions(model, data))


def test_transact_reads_our_masks_as_pytorchs(build):
    """With sink attention and no sinks the model computes what it did; refined attention takes the same masks."""
    model, data = build("TransAct", **TRANSACT), batches("pre")
    before = predictions(model, data)
    own = functools.partial(recattn.nn.SinkAttention, padding_side="left")
    with recattn.patch(model, {nn.MultiheadAttention: own}) as handle:
        assert len(handle.replaced) == 2
        torch.testing.assert_close(predictions(model, data), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mechanism", ["simple", "value"])
def test_transact_with_refined_attention_trains(build, mechanism):
    model, data = build("TransAct", **TRANSACT), batches("pre")
    handle = refine_self_attention(model, MAX_LEN, mechanism=mechanism)
    initial = [parameter.clone() for parameter in handle.added_parameters]
    model.fit([*map(clone, data)], validation_data=[*map(clone, data)], epochs=2)
    assert all(not torch.equal(new, old) for new, old in zip(handle.added_parameters, initial, strict=True))


def test_models_without_such_layers_are_refused(zoo):
    with pytest.raises(ValueError, match="model must have a DIN_Attention or MultiHeadTargetAttention inside"):
        replace_target_attention(nn.Sequential(nn.Linear(2, 2)), MAX_LEN, RANK)
    with pytest.raises(ValueError, match="model must have a MultiheadAttention inside"):
        refine_self_attention(nn.Sequential(nn.Linear(2, 2)), MAX_LEN)

"""Replacing modules by instance: what is called, what is shared, and what restoring gives back."""

import copy
import functools
import gc
import weakref

import pytest
import torch
from torch import nn

from recattn.integrations.patching import patch
from recattn.nn import RefinedSelfAttention, SinkAttention

E, H, N, B = 16, 2, 7, 3
LENGTHS = torch.tensor([7, 4, 2])
PADDING = torch.arange(N) >= LENGTHS[:, None]
CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)
REFINED = functools.partial(RefinedSelfAttention, max_len=N, padding_side="right")


def encoder(layers=2, dtype=torch.float64, nested=True, **options):
    layer = nn.TransformerEncoderLayer(E, H, 32, dropout=0.0, batch_first=True, dtype=dtype, **options)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested)


def tokens(dtype=torch.float64):
    return torch.randn(B, N, E, dtype=dtype)


def calls(model, kind):
    """A list that grows with each call of a module of this `kind`."""
    made = []
    for module in model.modules():
        if isinstance(module, kind):
            forward = module.forward
            # A forward hook would itself keep the encoder layer off its fast path.
            module.forward = lambda *args, _forward=forward, **options: made.append(1) or _forward(*args, **options)
    return made


# --- What the patched model computes ---


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", [SinkAttention, REFINED], ids=["sink", "refined"])
@pytest.mark.parametrize(
    "masks", [{}, {"mask": CAUSAL}, {"src_key_padding_mask": PADDING}], ids=["none", "causal", "pad"]
)
def test_inference_of_an_encoder_calls_ours(masks, kind, nested):
    """PyTorch's fused layer and nested tensors would compute plain attention from our weights, or fail in ours."""
    model = encoder(nested=nested).eval()
    x = tokens()
    handle = patch(model, {nn.MultiheadAttention: kind})
    ours = type(model.layers[0].self_attn)
    made = calls(model, ours)
    with torch.no_grad():
        actual = model(x, **masks)
    assert len(made) == 2
    expected = x
    seen = {"attn_mask": masks.get("mask"), "key_padding_mask": masks.get("src_key_padding_mask")}
    for layer in model.layers:
        attended = layer.norm1(expected + layer.self_attn(expected, expected, expected, **seen)[0])
        expected = layer.norm2(attended + layer.linear2(layer.linear1(attended).relu()))
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    handle.restore()
    made.clear()
    with torch.no_grad():
        plain = model(x, **masks)
    assert made == [] and model.use_nested_tensor == nested
    valid = ~PADDING if "src_key_padding_mask" in masks else torch.ones(B, N, dtype=torch.bool)
    difference = (actual - plain)[valid].abs().max()
    assert difference < 1e-12 if ours is SinkAttention else difference > 1e-3


def decoder(**options):
    layer = nn.TransformerDecoderLayer(E, H, 32, dropout=0.0, dtype=torch.float64, **options)
    return nn.TransformerDecoder(layer, 2)


MEMORIES = [
    pytest.param(N, PADDING, id="padded"),
    pytest.param(N, PADDING.flip(1), id="padded-left"),
    pytest.param(N + 4, torch.arange(N + 4) >= LENGTHS[:, None], id="longer-padded"),
    pytest.param(3, None, id="shorter"),
    pytest.param(N, None, id="plain"),
]


@pytest.mark.parametrize("memory_length, padded", MEMORIES)
@pytest.mark.parametrize("form", [{}, {"norm_first": True}, {"batch_first": False}])
@pytest.mark.parametrize("training", [True, False])
def test_a_decoder_with_sink_attention_is_itself(training, form, memory_length, padded):
    """In every row: the memory's padding does not apply to the target."""
    form = {"batch_first": True, **form}
    model = decoder(**form).train(training)
    target, memory = tokens(), torch.randn(B, memory_length, E, dtype=torch.float64)
    target, memory = (x if form["batch_first"] else x.transpose(0, 1) for x in (target, memory))
    options = {"memory_key_padding_mask": padded, "tgt_mask": CAUSAL}
    leaves = [target.requires_grad_(), memory.requires_grad_(), *model.parameters()]
    expected = model(target, memory, **options)
    handle = patch(model, {nn.MultiheadAttention: SinkAttention})
    assert len(handle.replaced) == 4 and handle.left == []
    actual = model(target, memory, **options)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    incoming = torch.randn_like(expected)
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-11, rtol=0)


def test_a_decoder_with_sink_attention_compiles_whole():
    """The compiler knows which tensors are the same."""
    model = decoder(batch_first=True)
    target, memory = tokens(), tokens()
    options = {"memory_key_padding_mask": PADDING, "tgt_mask": CAUSAL, "tgt_is_causal": True}
    expected = model(target, memory, **options)
    patch(model, {nn.MultiheadAttention: SinkAttention})
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(target, memory, **options), expected, atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_with_sink_attention_is_itself():
    """At every token of the target that is not its own padding."""
    model = nn.Transformer(E, H, 1, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    source, target, own = tokens(), tokens(), PADDING.roll(1, 0)
    masks = {"src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING, "tgt_key_padding_mask": own}
    expected = model(source, target, **masks)
    with patch(model, {nn.MultiheadAttention: SinkAttention}) as handle:
        actual = model(source, target, **masks)
    assert len(handle.replaced) == 3
    torch.testing.assert_close(actual[~own], expected[~own], atol=1e-12, rtol=0)


def test_cross_attention_is_left_where_the_new_class_has_none():
    model = decoder(batch_first=True)
    cross = [layer.multihead_attn for layer in model.layers]
    handle = patch(model, {nn.MultiheadAttention: REFINED})
    assert handle.replaced == ["layers.0.self_attn", "layers.1.self_attn"]
    assert handle.left == ["layers.0.multihead_attn", "layers.1.multihead_attn"]
    assert repr(handle) == f"PatchHandle(replaced={handle.replaced}, left={handle.left})"
    assert [layer.multihead_attn for layer in model.layers] == cross
    made = calls(model, nn.MultiheadAttention)
    out = model(tokens(), tokens(), memory_key_padding_mask=PADDING, tgt_mask=CAUSAL)
    assert len(made) == 2 and out.isfinite().all()
    alone = nn.ModuleDict({"cross": nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)})
    patch(alone, {nn.MultiheadAttention: REFINED})  # of whose calls nothing is known
    with pytest.raises(ValueError, match="refined attention is no cross-attention"):
        alone["cross"](tokens(), *[tokens()] * 2, key_padding_mask=PADDING)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_return_with_the_old_modules():
    """Once restored, the encoder drops padding again: its output there is zero, ours is not."""
    model = encoder().eval()
    x = tokens()
    with torch.no_grad():
        before = model(x, src_key_padding_mask=PADDING)
        with patch(model, {nn.MultiheadAttention: SinkAttention}):
            assert not model.use_nested_tensor
            patched = model(x, src_key_padding_mask=PADDING)
        after = model(x, src_key_padding_mask=PADDING)
    assert torch.equal(before, after) and (before[PADDING] == 0).all() and (patched[PADDING] != 0).all()
    torch.testing.assert_close(patched[~PADDING], before[~PADDING], atol=1e-12, rtol=0)


def test_an_encoder_whose_layers_were_not_touched_keeps_its_nested_tensors():
    model = nn.ModuleDict({"patched": encoder(), "left": encoder()})
    left = {f"left.layers.{i}.self_attn" for i in range(2)}
    handle = patch(model, {nn.MultiheadAttention: lambda old, name: None if name in left else SinkAttention(E, H)})
    assert handle.replaced == ["patched.layers.0.self_attn", "patched.layers.1.self_attn"]
    assert model.left.use_nested_tensor and not model.patched.use_nested_tensor


@pytest.mark.parametrize("mechanism", ["simple", "value", "additive", "stochastic"])
def test_built_from_the_old_modules_sizes_with_its_very_parameters(mechanism):
    plain = nn.MultiheadAttention(E, H, dropout=0.25, bias=False, batch_first=False, dtype=torch.float64).eval()
    model = nn.Sequential(plain)
    handle = patch(model, {nn.MultiheadAttention: functools.partial(REFINED, mechanism=mechanism, rank=3)})
    refined = model[0]
    assert type(refined) is RefinedSelfAttention and (refined.mechanism, refined.rank) == (mechanism, 3)
    assert (refined.embed_dim, refined.num_heads, refined.dropout, refined.batch_first) == (E, H, 0.25, False)
    assert refined.in_proj_bias is None and refined.w_q.dtype == torch.float64 and not refined.training
    own, theirs = dict(refined.named_parameters()), dict(plain.named_parameters())
    assert all(own[name] is parameter for name, parameter in theirs.items())
    added = [own[name] for name in own if name not in theirs]
    assert [id(p) for p in handle.added_parameters] == [id(p) for p in added]
    assert {name for name in own if name not in theirs} == {"w_q", "w_k"} | (
        {"w_v"} if mechanism in ("value", "additive") else set()
    )


def test_state_dict_keys_stay():
    model = encoder()
    before = list(model.state_dict())
    with patch(model, {nn.MultiheadAttention: SinkAttention}):
        assert list(model.state_dict()) == before
    with patch(model, {nn.MultiheadAttention: REFINED}):
        added = [name for name in model.state_dict() if name not in before]
        assert added == [f"layers.{i}.self_attn.w_{x}" for i in range(2) for x in "qk"]
        assert set(before) < set(model.state_dict())


# --- Training and restoring ---


def test_an_optimizer_made_before_trains_the_patched_model_and_restoring_keeps_it():
    model = encoder().train()
    old = [layer.self_attn for layer in model.layers]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = tokens(), tokens()
    handle = patch(model, {nn.MultiheadAttention: REFINED})
    optimizer.add_param_group({"params": handle.added_parameters})
    assert len(handle.added_parameters) == 4
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(5):
        loss = (model(x, mask=CAUSAL) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if "w_" not in name}
    handle.restore()
    assert [layer.self_attn for layer in model.layers] == old
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert all(parameter in known for parameter in model.parameters())
    assert all(torch.equal(p, trained[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("training", [True, False])
def test_restored_outputs_are_bit_identical(training):
    model = encoder(dtype=torch.float32).train(training)
    x = tokens(torch.float32)
    before = model(x, mask=CAUSAL)
    handle = patch(model, {nn.MultiheadAttention: REFINED})
    assert not torch.allclose(model(x, mask=CAUSAL), before, atol=1e-3)
    handle.restore()
    assert torch.equal(model(x, mask=CAUSAL), before)
    handle.restore()  # a second time does nothing
    assert torch.equal(model(x, mask=CAUSAL), before)


def test_with_restores_even_after_an_error():
    model = encoder()
    old = model.layers[0].self_attn
    with pytest.raises(KeyError), patch(model, {nn.MultiheadAttention: REFINED}) as handle:
        assert handle.replaced == ["layers.0.self_attn", "layers.1.self_attn"]
        raise KeyError
    assert model.layers[0].self_attn is old


def test_mode_follows():
    model = encoder().train()
    handle = patch(model, {nn.MultiheadAttention: REFINED})
    model.eval()
    handle.restore()
    assert not any(module.training for module in model.modules())


def test_parameters_that_are_other_objects_since_are_handed_back():
    """load_state_dict(assign=True) puts new parameters into the new modules; the old ones would keep theirs."""
    model = encoder()
    other = encoder().state_dict()
    handle = patch(model, {nn.MultiheadAttention: REFINED})
    model.load_state_dict(other, strict=False, assign=True)
    model.double()
    handle.restore()
    assert all(torch.equal(x, other[name]) for name, x in model.state_dict().items())
    x = tokens()
    twin = encoder()
    twin.load_state_dict(other)
    assert torch.equal(model(x), twin(x))


def test_dtype_and_device_of_a_patched_model_reach_the_old_modules():
    model = encoder(dtype=torch.float32)
    handle = patch(model, {nn.MultiheadAttention: REFINED})
    model.double()
    handle.restore()
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert model(tokens()).dtype == torch.float64


def test_patches_are_undone_in_reverse():
    model = encoder()
    old = model.layers[0].self_attn
    first = patch(model, {nn.MultiheadAttention: REFINED})
    second = patch(model, {RefinedSelfAttention: lambda module, name: nn.Identity()})
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn was replaced again since: restore the later patch"):
        first.restore()
    assert isinstance(model.layers[1].self_attn, nn.Identity)
    second.restore()
    first.restore()
    assert model.layers[0].self_attn is old


def test_nothing_keeps_the_old_modules_but_the_handle():
    model = nn.Sequential(nn.MultiheadAttention(E, H))
    old = weakref.ref(model[0])
    handle = patch(model, {nn.MultiheadAttention: REFINED})
    assert old() is not None
    del handle
    gc.collect()
    assert old() is None


def test_copies_are_independent():
    model = encoder()
    handle = patch(model, {nn.MultiheadAttention: REFINED})
    twin = copy.deepcopy(model)
    x = tokens()
    assert torch.equal(twin(x), model(x))
    handle.restore()
    assert isinstance(twin.layers[0].self_attn, RefinedSelfAttention)


# --- Which modules ---


class Shared(nn.Module):
    """One attention under two names of a module, and in a list as well."""

    def __init__(self):
        super().__init__()
        self.first = nn.MultiheadAttention(E, H, batch_first=True)
        self.second = self.first
        self.many = nn.ModuleList([self.first, nn.MultiheadAttention(E, H, batch_first=True)])
        self.none = None
        self.register_module("absent", None)


def test_a_module_under_several_names_is_replaced_by_one():
    model = Shared()
    seen = []

    def factory(old, name):
        seen.append(name)
        return RefinedSelfAttention.from_multihead_attention(old, max_len=N)

    handle = patch(model, {nn.MultiheadAttention: factory})
    assert seen == ["first", "many.1"]
    assert handle.replaced == ["first", "second", "many.0", "many.1"]
    assert model.first is model.second is model.many[0] and model.first is not model.many[1]
    assert len(handle.added_parameters) == 4
    handle.restore()
    assert type(model.first) is nn.MultiheadAttention and model.first is model.second is model.many[0]


def test_several_modules_may_become_one():
    model = encoder()
    old = [layer.self_attn for layer in model.layers]
    one = SinkAttention.from_multihead_attention(old[0])
    handle = patch(model, {nn.MultiheadAttention: lambda module, name: one})
    assert model.layers[0].self_attn is model.layers[1].self_attn is one and handle.added_parameters == []
    handle.restore()
    assert [layer.self_attn for layer in model.layers] == old


class Derived(nn.MultiheadAttention):
    pass


def test_the_most_derived_key_decides_and_none_leaves():
    model = nn.ModuleDict({"plain": nn.MultiheadAttention(E, H), "derived": Derived(E, H), "linear": nn.Linear(E, E)})
    old = dict(model.items())
    handle = patch(
        model,
        {
            nn.Module: lambda module, name: None,
            nn.MultiheadAttention: REFINED,
            Derived: lambda module, name: nn.Identity() if name == "derived" else None,
        },
    )
    assert handle.replaced == ["plain", "derived"] and handle.left == ["linear"]
    assert type(model["plain"]) is RefinedSelfAttention and type(model["derived"]) is nn.Identity
    assert model["linear"] is old["linear"]
    handle.restore()
    assert dict(model.items()) == old
    handle = patch(model, {nn.MultiheadAttention: REFINED, nn.Linear: lambda module, name: nn.Identity()})
    assert handle.replaced == ["plain", "derived", "linear"]
    assert isinstance(model["plain"].out_proj, nn.Linear)


def test_a_name_replaces_one_module_and_wins_over_a_class():
    model = encoder()
    old = [layer.self_attn for layer in model.layers]
    handle = patch(model, {"layers.1.self_attn": REFINED})
    assert handle.replaced == ["layers.1.self_attn"] and handle.left == []
    assert model.layers[0].self_attn is old[0] and isinstance(model.layers[1].self_attn, RefinedSelfAttention)
    assert [p is model.layers[1].self_attn.w_q for p in handle.added_parameters] == [True, False]
    handle.restore()
    handle = patch(model, {nn.MultiheadAttention: REFINED, "layers.0.self_attn": SinkAttention})
    assert [type(layer.self_attn) for layer in model.layers] == [SinkAttention, RefinedSelfAttention]
    handle.restore()
    assert [layer.self_attn for layer in model.layers] == old
    assert patch(model, {nn.MultiheadAttention: REFINED, "layers.1.self_attn": lambda *_: None}).left == [
        "layers.1.self_attn"
    ]


def test_a_name_of_a_shared_module():
    """Of a module with two parents one place is replaced; a parent with two names has one place."""
    shared = nn.MultiheadAttention(E, H)
    model = nn.ModuleDict({"a": nn.ModuleList([shared]), "b": nn.ModuleList([shared])})
    model["c"] = model["b"]
    handle = patch(model, {"a.0": SinkAttention, "c.0": REFINED})
    assert handle.replaced == ["a.0", "b.0", "c.0"]
    assert [type(model[name][0]) for name in "abc"] == [SinkAttention, RefinedSelfAttention, RefinedSelfAttention]
    assert len(handle.added_parameters) == 2
    handle.restore()
    assert all(model[name][0] is shared for name in "abc")


def test_a_module_that_is_left_is_searched():
    model = encoder(1)
    handle = patch(model, {nn.TransformerEncoderLayer: lambda old, name: None, nn.MultiheadAttention: REFINED})
    assert handle.replaced == ["layers.0.self_attn"] and handle.left == ["layers.0"]


def test_classes_and_other_models_are_left_alone():
    model, other = encoder(), encoder()
    forward = nn.MultiheadAttention.forward
    with patch(model, {nn.MultiheadAttention: REFINED}):
        assert nn.MultiheadAttention.forward is forward and type(other.layers[0].self_attn) is nn.MultiheadAttention
        assert type(nn.TransformerEncoderLayer(E, H).self_attn) is nn.MultiheadAttention


# --- Refusals ---


@pytest.mark.parametrize(
    "option, message",
    [
        ({"kdim": 5}, r"1: kdim of an nn.MultiheadAttention to be replaced must be 16, got 5"),
        ({"vdim": 5}, r"1: vdim of an nn.MultiheadAttention to be replaced must be 16, got 5"),
        ({"add_bias_kv": True}, r"1: add_bias_kv of an nn.MultiheadAttention to be replaced must be False, got True"),
        ({"add_zero_attn": True}, r"1: add_zero_attn of an .* to be replaced must be False, got True"),
    ],
)
def test_attention_without_a_counterpart_is_refused_and_nothing_changed(option, message):
    model = nn.Sequential(nn.MultiheadAttention(E, H), nn.MultiheadAttention(E, H, **option))
    old = list(model)
    for kind in (REFINED, SinkAttention):
        with pytest.raises(ValueError, match=message):
            patch(model, {nn.MultiheadAttention: kind})
        assert list(model) == old
    left = patch(model, {nn.MultiheadAttention: lambda module, name: SinkAttention(E, H) if name == "0" else None})
    assert left.replaced == ["0"]


def test_nothing_to_replace():
    found = "a TransformerEncoder of 3 Dropout, 2 LayerNorm, 2 Linear, 1 ModuleList, 1 MultiheadAttention, "
    with pytest.raises(ValueError, match=rf"model must have a LSTM or GRU inside that is replaced, got {found}"):
        patch(encoder(1), {nn.LSTM: REFINED, nn.GRU: REFINED})
    listed = r"got .* 2 MultiheadAttention, .* \(left: layers\.0\.self_attn, layers\.1\.self_attn\)"
    with pytest.raises(ValueError, match=rf"must have a MultiheadAttention inside that is replaced, {listed}"):
        patch(encoder(), {nn.MultiheadAttention: lambda old, name: None})
    with pytest.raises(ValueError, match="got a Linear of nothing"):
        patch(nn.Linear(2, 2), {nn.Linear: lambda old, name: nn.Identity()})


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"model must be an nn.Module, got list"):
        patch([], {nn.MultiheadAttention: REFINED})
    with pytest.raises(ValueError, match=r"keys must be nn.Module classes or names of submodules, got <class 'int'>"):
        patch(encoder(), {int: REFINED})
    for key in ("MultiheadAttention", ""):
        with pytest.raises(ValueError, match=rf"keys must be names of submodules of the model, got '{key}'$"):
            patch(encoder(), {key: REFINED})
    with pytest.raises(ValueError, match=r"got 'layer\.1\.self_attn' \(did you mean 'layers\.1\.self_attn' or 'layers"):
        patch(encoder(), {"layer.1.self_attn": REFINED})
    with pytest.raises(
        ValueError, match=r"keys must be names outside of replaced modules, got \['layers\.0\.self_attn'"
    ):
        patch(encoder(), {nn.TransformerEncoderLayer: lambda *_: nn.Identity(), "layers.0.self_attn": REFINED})
    with pytest.raises(ValueError, match=r"what replaces layers\.0\.self_attn must be an nn.Module or None, got int"):
        patch(encoder(), {nn.MultiheadAttention: lambda old, name: 3})
    with pytest.raises(ValueError, match=r"options of RefinedSelfAttention must be keywords .*, got \(50,\)"):
        patch(encoder(), {nn.MultiheadAttention: functools.partial(RefinedSelfAttention, 50)})
    with pytest.raises(ValueError, match=r"^0: attention must be an nn.MultiheadAttention, got Linear"):
        patch(nn.Sequential(nn.Linear(E, E)), {nn.Linear: SinkAttention})

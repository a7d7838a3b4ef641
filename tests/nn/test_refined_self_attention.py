import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from recattn import reference
from recattn.nn import RefinedSelfAttention
from recattn.testing import compare_with_reference
from tests.helpers.modules import assert_twins, copied_both_ways, set_identity_projections

MECHANISMS = ("simple", "value", "additive", "stochastic")
E, H, N, B = 12, 3, 7, 4
LENGTHS = torch.tensor([7, 4, 0, 1])
CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)


def module(mechanism="simple", heads=H, max_len=N + 2, **options):
    """With matrices large enough for the refinement to matter, and nonzero biases."""
    options = {"padding_side": "left", **options}
    attention = RefinedSelfAttention(E, heads, max_len=max_len, mechanism=mechanism, **options)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.startswith("w_") or name.endswith("bias"):
                parameter.normal_()
    return attention


def inputs(dtype=torch.float64):
    return [torch.randn(B, N, E, dtype=dtype) for _ in range(3)]


def padding(side, lengths=LENGTHS):
    valid = torch.arange(N) < lengths[:, None]
    return ~valid.flip(1) if side == "left" else ~valid


def by_reference(attention, query, key, value, **options):
    """nn.MultiheadAttention's own projections, split by hand, around the reference; [B, N, E] and [B, H, N, N]."""
    e, h = attention.embed_dim, attention.num_heads
    bias = torch.zeros(3 * e, dtype=query.dtype) if attention.in_proj_bias is None else attention.in_proj_bias
    projected = []
    for i, x in enumerate((query, key, value)):
        rows = slice(i * e, (i + 1) * e)
        x = x @ attention.in_proj_weight[rows].T + bias[rows]
        projected.append(torch.stack(x.split(e // h, dim=-1), dim=1))
    matrices = [w for w in (attention.w_q, attention.w_k, attention.w_v) if w is not None]
    options |= {"mechanism": attention.mechanism, "source": attention.source, "padding_side": attention.padding_side}
    q, k, v = projected
    heads = reference.refined_attention(q, k, v, *matrices, **options)
    identity = torch.eye(N, dtype=q.dtype).expand(len(q), h, N, N)
    weights = reference.refined_attention(q, k, identity, *matrices, **options)
    return attention.out_proj(torch.cat(list(heads.unbind(1)), dim=-1)), weights


# --- Against nn.MultiheadAttention's projections and the reference ---


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("source", ["logits", "weights"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_output_and_every_gradient(mechanism, source, causal, side):
    options = {"source": source, "rank": 5, "per_head": causal, "padding_side": side, "bias": side == "left"}
    attention = module(mechanism, dtype=torch.float64, **options)
    leaves = [*(x.requires_grad_() for x in inputs()), *attention.parameters()]
    actual, weights = attention(*leaves[:3], seq_lens=LENGTHS, is_causal=causal)
    assert weights is None
    expected, _ = by_reference(attention, *leaves[:3], seq_lens=LENGTHS, causal=causal)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    incoming = torch.randn_like(actual)
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("shared", ["all", "key and value", "query and key", "none"])
def test_inputs_that_are_one_tensor(shared):
    attention = module(dtype=torch.float64)
    x, y, z = inputs()
    query, key, value = {
        "all": (x, x, x),
        "key and value": (x, y, y),
        "query and key": (x, x, y),
        "none": (x, y, z),
    }[shared]
    actual, _ = attention(query, key, value, is_causal=True)
    torch.testing.assert_close(actual, by_reference(attention, query, key, value, causal=True)[0])


def test_projections_are_those_of_multihead_attention():
    """With W_V = 0, additive is plain attention."""
    plain = nn.MultiheadAttention(E, H, batch_first=True, dtype=torch.float64)
    nn.init.normal_(plain.in_proj_bias)
    nn.init.normal_(plain.out_proj.bias)
    attention = module("additive", dtype=torch.float64)
    report = attention.load_state_dict(plain.state_dict(), strict=False)
    assert report.missing_keys == ["w_q", "w_k", "w_v"] and report.unexpected_keys == []
    nn.init.zeros_(attention.w_v)
    x, y, z = inputs()
    expected, expected_weights = plain(x, y, z, attn_mask=CAUSAL)
    actual, weights = attention(x, y, z, attn_mask=CAUSAL, need_weights=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_have_the_names_and_shapes_of_multihead_attention(bias):
    theirs = dict(nn.MultiheadAttention(E, H, bias=bias).named_parameters())
    ours = dict(RefinedSelfAttention(E, H, max_len=N, bias=bias).named_parameters())
    assert {name: p.shape for name, p in theirs.items()} == {
        name: p.shape for name, p in ours.items() if name not in ("w_q", "w_k")
    }


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("per_head", [True, False])
def test_shapes_of_the_matrices(mechanism, per_head):
    attention = RefinedSelfAttention(E, H, max_len=N, mechanism=mechanism, rank=4, per_head=per_head)
    heads = (H,) if per_head else ()
    columns = 8 if mechanism == "stochastic" else 4
    assert attention.w_q.shape == attention.w_k.shape == (*heads, N, columns)
    if mechanism in ("value", "additive"):
        assert attention.w_v.shape == (*heads, N, N)
    else:
        assert attention.w_v is None
    assert f"mechanism={mechanism!r}" in repr(attention) and "rank=4" in repr(attention)


def test_sequence_first_layout():
    attention = module(dtype=torch.float64)
    x, y, _ = inputs()
    mask = padding("left")
    expected, expected_weights = attention(x, y, y, key_padding_mask=mask, attn_mask=CAUSAL, need_weights=True)
    attention.batch_first = False
    x, y = x.transpose(0, 1), y.transpose(0, 1)
    actual, weights = attention(x, y, y, key_padding_mask=mask, attn_mask=CAUSAL, need_weights=True)
    torch.testing.assert_close(actual.transpose(0, 1), expected)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("batch_first", [True, False])
def test_heads_are_views(batch_first):
    attention = module(batch_first=batch_first)
    x = torch.randn(B, N, 3 * E)[..., :E]
    heads = attention._split_heads(x if batch_first else x.transpose(0, 1))
    assert heads.shape == (B, H, N, E // H)
    assert heads.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_weights(mechanism):
    attention = module(mechanism, dtype=torch.float64)
    x, y, _ = inputs()
    options = {"key_padding_mask": padding("left"), "is_causal": True, "need_weights": True}
    _, weights = attention(x, y, y, average_attn_weights=False, **options)
    _, expected = by_reference(attention, x, y, y, seq_lens=LENGTHS, causal=True)
    torch.testing.assert_close(weights, expected, atol=1e-10, rtol=0)
    visible = ~padding("left")
    torch.testing.assert_close(weights.sum(-1), visible[:, None].expand(B, H, N).double())
    _, mean = attention(x, y, y, **options)
    torch.testing.assert_close(mean, expected.mean(1), atol=1e-10, rtol=0)


# --- Masks ---


def additive(mask, dtype=torch.float64):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


@pytest.mark.parametrize("side", ["left", "right"])
def test_forms_of_the_masks(side):
    attention = module(padding_side=side, dtype=torch.float64)
    x, y, _ = inputs()
    expected, _ = attention(x, y, y, seq_lens=LENGTHS, is_causal=True)
    mask = padding(side)
    for options in (
        {"key_padding_mask": mask, "attn_mask": CAUSAL},
        {"key_padding_mask": additive(mask), "attn_mask": additive(CAUSAL)},
        {"key_padding_mask": mask, "attn_mask": CAUSAL, "is_causal": True},
        {"seq_lens": LENGTHS.int(), "attn_mask": CAUSAL},
    ):
        assert torch.equal(attention(x, y, y, **options)[0], expected)


def test_no_mask_sees_everything():
    attention = module(dtype=torch.float64)
    x, y, _ = inputs()
    actual, _ = attention(x, x, y)
    torch.testing.assert_close(actual, by_reference(attention, x, x, y, causal=False)[0])
    assert not torch.allclose(actual, attention(x, x, y, is_causal=True)[0])


def test_output_at_padding_is_the_bias():
    attention = module()
    x, y, _ = inputs(torch.float32)
    mask = padding("left")
    x[mask] = torch.nan
    out, _ = attention(x, y, y, key_padding_mask=mask, is_causal=True)
    assert torch.equal(out[mask], attention.out_proj.bias.expand(int(mask.sum()), E))
    assert out.isfinite().all()


def test_wrong_masks_are_refused():
    attention = module()
    x, *_ = inputs(torch.float32)
    call = functools.partial(attention, x, x, x)
    holes = padding("left")
    holes[1, 5] = True
    with pytest.raises(ValueError, match=r"key_padding_mask .* got \[1, 1, 1, 0, 0, 1, 0\] in row 1"):
        call(key_padding_mask=holes)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[B, N\] = \[4, 7\], got \[7, 4\]"):
        call(key_padding_mask=padding("left").T)
    with pytest.raises(ValueError, match="key_padding_mask must be 0 where visible and -inf where hidden, got"):
        call(key_padding_mask=padding("left").float() * -1e4)
    with pytest.raises(ValueError, match=r"key_padding_mask must be bool, or floating .*, got torch.int64"):
        call(key_padding_mask=padding("left").long())
    with pytest.raises(ValueError, match="seq_lens must be None beside a key_padding_mask"):
        call(key_padding_mask=padding("left"), seq_lens=LENGTHS)
    with pytest.raises(ValueError, match=r"attn_mask must be the causal mask.*got one that shows key 1 to query 0"):
        call(attn_mask=torch.zeros(N, N, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got one that hides key 0 from query 0"):
        call(attn_mask=~CAUSAL)
    with pytest.raises(ValueError, match=r"attn_mask must be \[Nq, Nk\] = \[7, 7\], got \[12, 7, 7\]"):
        call(attn_mask=CAUSAL.expand(B * H, N, N))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of 5 heads, got 12"):
        RefinedSelfAttention(E, 5, max_len=N)
    with pytest.raises(ValueError, match=r"mechanism must be 'simple' or .*, got 'simpel'"):
        RefinedSelfAttention(E, H, max_len=N, mechanism="simpel")
    with pytest.raises(ValueError, match=r"dropout must be .* below 1, got 1\.0"):
        RefinedSelfAttention(E, H, max_len=N, dropout=1.0)
    with pytest.raises(ValueError, match=r"max_len must be an integer of at least 1, got 0\.2"):
        RefinedSelfAttention(E, H, max_len=0.2)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        RefinedSelfAttention(E, H, max_len=N, rank=0)
    attention = module()
    x, *_ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"value must be \[B, N, embed_dim\] = \[4, 7, 12\], got \[4, 6, 12\]"):
        attention(x, x, x[:, 1:])
    with pytest.raises(ValueError, match="at least N = 10"):
        attention(*[torch.randn(B, 10, E)] * 3)


@pytest.mark.parametrize("length", [N, N - 1])
@pytest.mark.parametrize("masked", [True, False])
def test_cross_attention_is_refused(masked, length):
    """A causal mask or seq_lens describe one sequence of tokens, not two. A padding mask does not."""
    attention = module()
    x, y, _ = inputs(torch.float32)
    options = {"key_padding_mask": padding("left")[:, :length]} if masked else {}
    with pytest.raises(ValueError, match=r"key must be query itself.* \(refined attention is no cross-attention\)"):
        attention(x, y[:, :length], y[:, :length], **options)
    with pytest.raises(ValueError, match=r"key must be \[B, N, embed_dim\] = \[4, 7, 12\], got \[4, 6, 12\]"):
        attention(x, y[:, 1:], y[:, 1:], is_causal=True)
    for told in ({"is_causal": True}, {"attn_mask": CAUSAL}, {"seq_lens": LENGTHS}):
        attention(x, y, y, **told)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_queries_may_be_the_normalised_keys(mechanism):
    """As SASRec calls it, also under torch.compile: the mechanisms differ in what one operator is told."""
    attention = module(mechanism)
    x, *_ = inputs(torch.float32)

    def block(x, **options):
        return attention(nn.functional.layer_norm(x, (E,)), x, x, is_causal=True, **options)[0]

    functions = [block]
    if mechanism in ("simple", "stochastic"):
        functions.append(torch.compile(block, fullgraph=True, backend="aot_eager"))
    for options in ({}, {"key_padding_mask": padding("left")}):
        seen = {"seq_lens": LENGTHS} if options else {}
        expected, _ = by_reference(attention, nn.functional.layer_norm(x, (E,)), x, x, causal=True, **seen)
        for function in functions:
            torch.testing.assert_close(function(x, **options), expected, atol=1e-4, rtol=1e-4)


# --- Dropout ---


def test_dropout_in_training_only():
    attention = module(dropout=0.5, dtype=torch.float64)
    x, y, _ = inputs()
    dropped = attention(x, y, y, is_causal=True)[0]
    assert not torch.equal(dropped, attention(x, y, y, is_causal=True)[0])
    attention.eval()
    kept = attention(x, y, y, is_causal=True)[0]
    assert torch.equal(kept, attention(x, y, y, is_causal=True)[0])
    attention.train().dropout = 0.0
    assert torch.equal(kept, attention(x, y, y, is_causal=True)[0])


def test_dropout_statistics():
    """Identity projections show the weights: each is 0 with probability p, otherwise scaled by 1/(1 - p)."""
    p, samples = 0.3, 4000
    attention = module(heads=1, dropout=p, dtype=torch.float64)
    set_identity_projections(attention)
    x = torch.randn(1, N, E, dtype=torch.float64)
    value = torch.eye(N, E, dtype=torch.float64)[None]
    weights = attention.eval()(x, x, value, need_weights=True)[1]
    many = x.expand(samples, N, E)
    out = attention.train()(many, many, value.expand(samples, N, E))[0][..., :N]
    kept = out != 0
    torch.testing.assert_close(out[kept], (weights / (1 - p)).expand_as(out)[kept])
    deviation = (p * (1 - p) / samples) ** 0.5
    assert ((kept.double().mean(0) - (1 - p)).abs() < 5 * deviation).all()


# --- What PyTorch does with modules ---


def as_function(attention, impl):
    """The module as a function of its inputs and parameters."""

    def call(query, key, **parameters):
        own = copy.copy(attention)
        own.impl = impl
        options = {"key_padding_mask": padding("left"), "is_causal": True}
        return torch.func.functional_call(own, parameters, (query, key, key), options)[0]

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    attention = module(dtype=dtype)
    x, y, _ = inputs(dtype)
    tensors = {"query": x, "key": y, **{name: p.detach() for name, p in attention.named_parameters()}}
    errors = compare_with_reference(as_function(attention, None), as_function(attention, "reference"), tensors)
    assert all(error.passed for error in errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights):
    attention = module("value")
    x, y, _ = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = attention(x, y, y, key_padding_mask=padding("left"), is_causal=True, need_weights=need_weights)
    assert out.dtype == torch.bfloat16 and (weights is None or weights.dtype == torch.bfloat16)
    out.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in attention.parameters())


def test_compile_is_one_graph_for_all_sizes():
    """aot_eager traces forward and backward as inductor does, and generates no code."""
    attention = module("additive", max_len=64)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, n in ((4, 7), (5, 9), (3, 64)):
            x = torch.randn(batch, n, E, requires_grad=True)
            mask = torch.arange(n) < torch.arange(batch)[:, None]
            options = {"key_padding_mask": mask, "attn_mask": torch.ones(n, n, dtype=torch.bool).triu(1)}
            results = []
            for call in (attention, compiled):
                out = call(x, 2 * x, 2 * x, **options)[0]
                results.append([out, *torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(traced, eager, atol=1e-4, rtol=1e-4)


def test_checkpointing_repeats_the_dropout():
    attention = module(dropout=0.4)
    x, y, _ = inputs(torch.float32)
    gradients = []
    for call in (attention, functools.partial(checkpoint, attention, use_reentrant=False)):
        torch.manual_seed(3)
        attention.zero_grad()
        call(x, y, y, is_causal=True)[0].square().sum().backward()
        gradients.append([p.grad for p in attention.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@copied_both_ways
def test_copies(copied):
    attention = module("additive", per_head=True)
    x, y, _ = inputs(torch.float32)
    assert_twins(copied(attention), attention, lambda a: a(x, y, y, is_causal=True)[0])


def test_state_dict_round_trip():
    attention, other = (module("value", per_head=True) for _ in range(2))
    other.load_state_dict(attention.state_dict())
    x, y, _ = inputs(torch.float32)
    assert torch.equal(other(x, x, y)[0], attention(x, x, y)[0])


@pytest.mark.parametrize("training", [True, False])
def test_inside_a_transformer_encoder(training):
    """Otherwise its inference would compute plain attention from our weights, by PyTorch's fused operator."""
    attention = module(heads=2, padding_side="right")
    layer = nn.TransformerEncoderLayer(E, 2, 16, dropout=0.0, batch_first=True)
    layer.self_attn = attention
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).train(training)
    own = encoder.layers[0]
    x = torch.randn(B, N, E)
    mask = padding("right", torch.tensor([7, 4, 2, 1]))
    forms = {"mask": CAUSAL}, {"src_key_padding_mask": mask}, {"mask": CAUSAL, "src_key_padding_mask": mask}
    with torch.no_grad():
        for options in forms:
            seen = {"attn_mask": options.get("mask"), "key_padding_mask": options.get("src_key_padding_mask")}
            attended = own.norm1(x + own.self_attn(x, x, x, **seen)[0])
            expected = own.norm2(attended + own.linear2(own.linear1(attended).relu()))
            torch.testing.assert_close(encoder(x, **options), expected)


def test_values_are_not_read_where_that_synchronises():
    """The meta device has no values: reading one would raise."""
    attention = module(device="meta", impl="reference")
    x = torch.randn(B, N, E, device="meta")
    out, _ = attention(x, x, x, key_padding_mask=padding("left").to("meta"), attn_mask=CAUSAL.to("meta"))
    assert out.shape == x.shape


@pytest.mark.parametrize("rank", [8, 50])
@pytest.mark.parametrize("source", ["logits", "weights"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_initial_refinement_is_neither_uniform_nor_saturated(mechanism, source, rank):
    """Of normalised queries and of keys from as large to three times as large: plain attention's is 0.055 and 0.25."""
    attention = RefinedSelfAttention(64, 1, max_len=50, mechanism=mechanism, source=source, rank=rank)
    for size in (1.0, 3.0):
        x = torch.randn(64, 50, 64)
        out, weights = attention(x, size * x, size * x, is_causal=True, need_weights=True)
        largest = weights[:, -1].max(dim=-1).values.mean()
        assert 1.05 / 50 < largest < 0.5
        gradients = torch.autograd.grad((out * torch.randn_like(out)).sum(), list(attention.parameters()))
        assert all(gradient.norm() > 1e-2 for gradient in gradients)

import copy
import functools

import pytest
import torch
from torch import nn

from recattn import inter_sink_bias, reference
from recattn.nn import SinkAttention
from recattn.testing import assert_matches_reference
from tests.helpers.modules import assert_twins, copied_both_ways, set_identity_projections

E, H, N, B, M = 12, 6, 9, 4, 3
LENGTHS = torch.tensor([9, 4, 0, 1])
CAUSAL = torch.ones(N, N, dtype=torch.bool).triu(1)
SINKS = torch.tensor([[1, 4, 8], [0, 3, -1], [2, -1, -1], [0, -1, -1]])


def module(**options):
    """With nonzero biases."""
    attention = SinkAttention(E, options.pop("heads", H), **options)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return attention


def inputs(dtype=torch.float64):
    return [torch.randn(B, N, E, dtype=dtype) for _ in range(3)]


def bias(heads=1, dtype=torch.float64):
    return torch.randn(B, heads, M, M, dtype=dtype) * 3


def padding(side, lengths=LENGTHS):
    valid = torch.arange(N) < lengths[:, None]
    return ~valid.flip(1) if side == "left" else ~valid


def by_reference(attention, query, key, value, sinks, sink_bias, **options):
    """The projections split by hand around the reference; [B, N, E] and [B, H, N, N]."""
    width, kv = attention.embed_dim // attention.num_heads, attention.num_kv_heads
    ends = torch.tensor([attention.embed_dim, kv * width, kv * width]).cumsum(0).tolist()
    projected = []
    for x, start, stop in zip((query, key, value), [0, *ends], ends, strict=False):
        x = x @ attention.in_proj_weight[start:stop].T
        x = x if attention.in_proj_bias is None else x + attention.in_proj_bias[start:stop]
        projected.append(torch.stack(x.split(width, dim=-1), dim=1))
    q, k, v = projected
    heads = reference.sink_attention(q, k, v, sinks, sink_bias, **options)
    identity = torch.eye(N, dtype=q.dtype).expand(len(q), kv, N, N)
    weights = reference.sink_attention(q, k, identity, sinks, sink_bias, **options)
    return attention.out_proj(torch.cat(list(heads.unbind(1)), dim=-1)), weights


# --- Against nn.MultiheadAttention, and the reference ---


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("bias_heads", [1, H])
def test_output_and_every_gradient(bias_heads, kv_heads, causal, side):
    attention = module(num_kv_heads=kv_heads, padding_side=side, bias=causal, dtype=torch.float64)
    leaves = [*(x.requires_grad_() for x in (*inputs(), bias(bias_heads))), *attention.parameters()]
    options = {"key_padding_mask": padding(side), "is_causal": causal, "sink_positions": SINKS}
    actual, weights = attention(*leaves[:3], **options, inter_sink_bias=leaves[3])
    assert weights is None
    seen = {"seq_lens": LENGTHS, "causal": causal, "padding_side": side}
    expected, _ = by_reference(attention, *leaves[:3], SINKS, leaves[3], **seen)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    incoming = torch.randn_like(actual)
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_without_sinks_it_is_multihead_attention(with_bias, batch_first, masked):
    plain = nn.MultiheadAttention(E, H, batch_first=batch_first, bias=with_bias, dtype=torch.float64)
    attention = SinkAttention(E, H, batch_first=batch_first, bias=with_bias, dtype=torch.float64)
    attention.load_state_dict(plain.state_dict())
    options = {}
    if masked:
        options = {"attn_mask": CAUSAL, "key_padding_mask": padding("right", torch.tensor([9, 4, 1, 1]))}
    triple = [x if batch_first else x.transpose(0, 1) for x in inputs()]
    expected, expected_weights = plain(*triple, **options)
    actual, weights = attention(*triple, **options, need_weights=True)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=1e-12, rtol=0)
    query, _, value = triple
    expected, actual = plain(query, query, value, **options)[0], attention(query, query, value, **options)[0]
    if masked:  # a self-attention leaves the queries in the padding without an answer
        valid = ~options["key_padding_mask"]
        actual, expected = (x[valid if batch_first else valid.T] for x in (actual, expected))
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)


def heads_of(attention, query, key, value):
    """Project and split into [B, H, N, D]; shared key and value heads are repeated."""
    kv = attention.num_kv_heads * attention.head_dim
    rows = attention.in_proj_weight.split((E, kv, kv)), attention.in_proj_bias.split((E, kv, kv))
    projected = [x @ w.T + b for x, w, b in zip((query, key, value), *rows, strict=True)]
    heads = [x.unflatten(-1, (-1, attention.head_dim)) for x in projected]
    return [x.transpose(1, 2).repeat_interleave(H // x.shape[2], dim=1) for x in heads]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("keys", [N, 5, 14])
def test_cross_attention(keys, batch_first, kv_heads, causal):
    """Padding hides keys only, wherever it is: every query of every row, and every gradient."""
    attention = module(num_kv_heads=kv_heads, batch_first=batch_first, dropout=0.5, dtype=torch.float64).eval()
    query, key = torch.randn(B, N, E, dtype=torch.float64), torch.randn(B, keys, E, dtype=torch.float64)
    hidden = torch.rand(B, keys) < 0.4
    hidden[0], hidden[1] = False, True
    leaves = [query.requires_grad_(), key.requires_grad_(), *attention.parameters()]
    swapped = [x if batch_first else x.transpose(0, 1) for x in (query, key)]
    options = {"key_padding_mask": hidden, "is_causal": causal, "need_weights": True}
    actual, weights = attention(*swapped, swapped[1], average_attn_weights=False, **options)
    actual = actual if batch_first else actual.transpose(0, 1)

    q, k, v = heads_of(attention, query, key, key)
    scores = (q @ k.mT * attention.head_dim**-0.5).masked_fill(hidden[:, None, None], -torch.inf)
    scores = scores.masked_fill(torch.ones(N, keys, dtype=torch.bool).triu(1), -torch.inf) if causal else scores
    nothing = scores.isinf().all(-1, keepdim=True)
    expected_weights = scores.masked_fill(nothing, 0).softmax(-1) * ~nothing
    expected = attention.out_proj((expected_weights @ v).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(weights, expected_weights, atol=1e-12, rtol=0)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(attention(*swapped, swapped[1], **options)[1], weights.mean(1))
    incoming = torch.randn_like(actual)
    for mine, other in zip(*(torch.autograd.grad(o, leaves, incoming) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-11, rtol=0)


def test_what_a_self_attention_is():
    """The same tensor object, sinks, or seq_lens: padding then applies to queries too."""
    attention = module(dtype=torch.float64)
    x, y, _ = inputs()
    mask = padding("right")
    told = [
        attention(x, x, y, key_padding_mask=mask)[0],
        attention(x, y, y, seq_lens=LENGTHS)[0],
        attention(x, y, y, key_padding_mask=mask, sink_positions=SINKS, inter_sink_bias=bias())[0],
    ]
    for out in told:
        assert torch.equal(out[mask], attention.out_proj.bias.expand_as(out[mask]))
    out = attention(x, y, y, key_padding_mask=mask)[0]
    sees_keys = mask & (LENGTHS > 0)[:, None]
    assert (out[sees_keys] - attention.out_proj.bias).abs().amin(dim=0).max() > 0.01
    torch.testing.assert_close(out[~mask], told[1][~mask], atol=1e-12, rtol=0)


def test_dropout_of_a_cross_attention():
    attention = module(dropout=0.5)
    x, y, _ = inputs(torch.float32)
    call = functools.partial(attention, x, y, y, key_padding_mask=padding("right"))
    assert not torch.equal(call()[0], call()[0])
    attention.eval()
    assert torch.equal(call()[0], call()[0])


def test_the_bias_of_the_operator_and_a_bias_of_zeros():
    attention = module(dtype=torch.float64)
    x, *_ = inputs()
    heads = torch.randn(2, B, 2, M, 5, dtype=torch.float64)
    made = inter_sink_bias(heads[0], heads[1], sink_mask=(LENGTHS[:, None] > SINKS) & (SINKS >= 0), bias_scale=10.0)
    call = functools.partial(attention, x, x, x, seq_lens=LENGTHS, is_causal=True)
    plain, _ = call()
    out, _ = call(sink_positions=SINKS, inter_sink_bias=made)
    expected, _ = by_reference(attention, x, x, x, SINKS, made, seq_lens=LENGTHS, causal=True)
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)
    assert (out - plain).abs().max() > 0.01
    zeros, _ = call(sink_positions=SINKS, inter_sink_bias=torch.zeros_like(made))
    torch.testing.assert_close(zeros, plain, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kv_heads", [None, 3])
@pytest.mark.parametrize("shared", ["all", "key and value", "query and key", "none"])
def test_inputs_that_are_one_tensor(shared, kv_heads):
    attention = module(num_kv_heads=kv_heads, dtype=torch.float64)
    x, y, z = inputs()
    triple = {"all": (x, x, x), "key and value": (x, y, y), "query and key": (x, x, y), "none": (x, y, z)}[shared]
    beta = bias()
    actual, _ = attention(*triple, sink_positions=SINKS, inter_sink_bias=beta)
    torch.testing.assert_close(actual, by_reference(attention, *triple, SINKS, beta)[0])


@pytest.mark.parametrize("with_bias", [True, False])
def test_state_dict_is_that_of_multihead_attention(with_bias):
    theirs = nn.MultiheadAttention(E, H, bias=with_bias).state_dict()
    ours = SinkAttention(E, H, bias=with_bias).state_dict()
    assert [(name, x.shape) for name, x in ours.items()] == [(name, x.shape) for name, x in theirs.items()]
    grouped = SinkAttention(E, H, num_kv_heads=2, bias=with_bias).state_dict()
    assert list(grouped) == list(theirs) and grouped["in_proj_weight"].shape == (E + 2 * 2 * E // H, E)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_weights(kv_heads):
    attention = module(num_kv_heads=kv_heads, dropout=0.5, dtype=torch.float64)
    x, y, _ = inputs()
    beta = bias(H)
    options = {"seq_lens": LENGTHS, "is_causal": True, "need_weights": True}
    options |= {"sink_positions": SINKS, "inter_sink_bias": beta}
    _, weights = attention(x, y, y, average_attn_weights=False, **options)
    _, expected = by_reference(attention, x, y, y, SINKS, beta, seq_lens=LENGTHS, causal=True)
    torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(weights.sum(-1), (~padding("right"))[:, None].expand(B, H, N).double())
    _, mean = attention(x, y, y, **options)
    torch.testing.assert_close(mean, expected.mean(1), atol=1e-12, rtol=0)


def test_forms_of_the_masks():
    attention = module(dtype=torch.float64)
    x, y, _ = inputs()
    call = functools.partial(attention, x, y, y, sink_positions=SINKS, inter_sink_bias=bias())
    expected, _ = call(seq_lens=LENGTHS, is_causal=True)
    mask = padding("right")
    additive = {"key_padding_mask": mask, "attn_mask": CAUSAL}
    additive = {k: torch.zeros(m.shape, dtype=torch.float64).masked_fill(m, -torch.inf) for k, m in additive.items()}
    for options in ({"key_padding_mask": mask, "attn_mask": CAUSAL}, additive, {"seq_lens": LENGTHS.int()}):
        assert torch.equal(call(**{"is_causal": "attn_mask" not in options, **options})[0], expected)


# --- Dropout, precision, and what PyTorch does with modules ---


def test_dropout_statistics():
    """Identity projections show the weights: each is 0 with probability p, otherwise scaled by 1/(1 - p)."""
    p, samples = 0.3, 3000
    attention = module(heads=1, dropout=p, dtype=torch.float64)
    set_identity_projections(attention)
    x, value = torch.randn(1, N, E, dtype=torch.float64), torch.eye(N, E, dtype=torch.float64)[None]
    beta = torch.randn(1, 1, M, M)
    sinks = {"sink_positions": SINKS[:1], "inter_sink_bias": beta}
    weights = attention.eval()(x, x, value, need_weights=True, **sinks)[1]
    many = {"sink_positions": SINKS[:1].expand(samples, M), "inter_sink_bias": beta.expand(samples, 1, M, M)}
    out = attention.train()(*(t.expand(samples, N, E) for t in (x, x, value)), **many)[0][..., :N]
    kept = out != 0
    torch.testing.assert_close(out[kept], (weights / (1 - p)).expand_as(out)[kept])
    deviation = (p * (1 - p) / samples) ** 0.5
    assert ((kept.double().mean(0) - (1 - p)).abs() < 5 * deviation).all()
    attention.dropout = 0.0
    assert torch.equal(attention(x, x, value, **sinks)[0][..., :N], attention.eval()(x, x, value, **sinks)[0][..., :N])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_sinks", [True, False])
def test_low_precision(with_sinks, dtype):
    attention = module(num_kv_heads=2, dtype=dtype)
    x, y, _ = inputs(dtype)

    def as_function(impl):
        def call(query, key, inter_sink_bias, **parameters):
            own = copy.copy(attention)
            own.impl = impl
            options = {"seq_lens": LENGTHS, "is_causal": True}
            if with_sinks:
                options |= {"sink_positions": SINKS, "inter_sink_bias": inter_sink_bias}
            return torch.func.functional_call(own, parameters, (query, key, key), options)[0]

        return call

    tensors = {"query": x, "key": y, **{name: p.detach() for name, p in attention.named_parameters()}}
    tensors["inter_sink_bias"] = bias(dtype=torch.float32)
    assert_matches_reference(as_function(None), as_function("reference"), tensors)


@pytest.mark.parametrize("need_weights", [True, False])
def test_autocast(need_weights):
    attention = module()
    x, *_ = inputs(torch.float32)
    beta = bias(dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        options = {"seq_lens": LENGTHS, "need_weights": need_weights}
        out, weights = attention(x, x, x, sink_positions=SINKS, inter_sink_bias=beta, **options)
    assert out.dtype == torch.bfloat16 and (weights is None or weights.isfinite().all())
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in (beta, *attention.parameters()))
    assert beta.grad.abs().sum() > 0


def test_compile_is_one_graph_for_all_sizes():
    """aot_eager traces forward and backward as inductor does, and generates no code."""
    attention = module(num_kv_heads=2)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, n in ((4, 7), (5, 9), (3, 64)):
            x = torch.randn(batch, n, E, requires_grad=True)
            beta = torch.randn(batch, 1, 3, 3, requires_grad=True)
            mask = torch.arange(n) >= torch.arange(2, batch + 2)[:, None]
            options = {"key_padding_mask": mask, "attn_mask": torch.ones(n, n, dtype=torch.bool).triu(1)}
            sinks = {"sink_positions": torch.tensor([0, 2, 5]).repeat(batch, 1), "inter_sink_bias": beta}
            results = []
            for call in (attention, compiled):
                out = call(x, x, x, **options, **sinks)[0]
                results.append([out, *torch.autograd.grad(out.square().sum(), [x, beta, *attention.parameters()])])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(traced, eager, atol=1e-4, rtol=1e-4)


@copied_both_ways
def test_copies(copied):
    attention = module(num_kv_heads=3)
    x, *_ = inputs(torch.float32)
    assert_twins(copied(attention), attention, lambda a: a(x, x, x, is_causal=True)[0])


def test_values_are_not_read_where_that_synchronises():
    """The meta device has no values: reading one would raise."""
    attention = module(device="meta", impl="reference")
    x = torch.randn(B, N, E, device="meta")
    masks = {"key_padding_mask": padding("right").to("meta"), "attn_mask": CAUSAL.to("meta")}
    sinks = {"sink_positions": SINKS.to("meta"), "inter_sink_bias": bias().to("meta")}
    out, _ = attention(x, x, x, **masks, **sinks)
    assert out.shape == x.shape and out.device.type == "meta"


# --- From nn.MultiheadAttention ---


def test_from_multihead_attention_shares_the_parameters():
    plain = nn.MultiheadAttention(E, H, dropout=0.3, batch_first=False, dtype=torch.float64).eval()
    attention = SinkAttention.from_multihead_attention(plain, padding_side="left")
    assert (attention.dropout, attention.batch_first, attention.padding_side) == (0.3, False, "left")
    assert not attention.training and attention.out_proj is plain.out_proj
    theirs, ours = (dict(m.named_parameters()) for m in (plain, attention))
    assert list(theirs) == list(ours) and all(ours[name] is parameter for name, parameter in theirs.items())
    x, y, z = inputs()
    torch.testing.assert_close(attention(x, y, z)[0], plain(x, y, z)[0], atol=1e-12, rtol=0)
    assert SinkAttention.from_multihead_attention(plain, dropout=0.1).dropout == 0.1


@pytest.mark.parametrize(
    "option, message",
    [
        ({"kdim": 5}, "kdim of an nn.MultiheadAttention to be replaced must be 12, got 5"),
        ({"vdim": 5}, "vdim of an nn.MultiheadAttention to be replaced must be 12, got 5"),
        ({"add_bias_kv": True}, "add_bias_kv of an nn.MultiheadAttention to be replaced must be False, got True"),
        ({"add_zero_attn": True}, "add_zero_attn of an nn.MultiheadAttention to be replaced must be False, got True"),
    ],
)
def test_what_has_no_counterpart_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        SinkAttention.from_multihead_attention(nn.MultiheadAttention(E, H, **option))


def test_not_from_anything_else():
    with pytest.raises(ValueError, match=r"attention must be an nn.MultiheadAttention, got Linear"):
        SinkAttention.from_multihead_attention(nn.Linear(E, E))
    with pytest.raises(ValueError, match=r"num_kv_heads must be None, as nn.MultiheadAttention's heads all have keys"):
        SinkAttention.from_multihead_attention(nn.MultiheadAttention(E, H), num_kv_heads=2)


# --- Wrong arguments ---


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of 5 heads, got 12"):
        SinkAttention(E, 5)
    with pytest.raises(ValueError, match="num_kv_heads must be a divisor of 6 heads, got 4"):
        SinkAttention(E, H, num_kv_heads=4)
    with pytest.raises(ValueError, match="num_kv_heads must be a divisor of 6 heads, got 0"):
        SinkAttention(E, H, num_kv_heads=0)
    with pytest.raises(ValueError, match=r"dropout must be .* below 1, got 1\.0"):
        SinkAttention(E, H, dropout=1.0)
    with pytest.raises(ValueError, match="padding_side must be 'right' or 'left', got 'both'"):
        SinkAttention(E, H, padding_side="both")
    attention = module()
    x, *_ = inputs(torch.float32)
    call = functools.partial(attention, x, x, x)
    with pytest.raises(ValueError, match="inter_sink_bias must be given with sink_positions, got one of them"):
        call(sink_positions=SINKS)
    with pytest.raises(ValueError, match="inter_sink_bias must be given with sink_positions, got one of them"):
        call(inter_sink_bias=bias())
    with pytest.raises(ValueError, match=r"inter_sink_bias must be \[B, 1 or Hq, M, M\] .*, got \[4, 2, 3, 3\]"):
        call(sink_positions=SINKS, inter_sink_bias=bias(2))
    with pytest.raises(ValueError, match="sink_positions must be strictly ascending"):
        call(sink_positions=SINKS.flip(1), inter_sink_bias=bias())
    for told in ({"seq_lens": LENGTHS}, {"sink_positions": SINKS, "inter_sink_bias": bias()}):
        with pytest.raises(ValueError, match=r"key must be \[B, N, embed_dim\] = \[4, 9, 12\], got \[4, 8, 12\]"):
            attention(x, x[:, 1:], x[:, 1:], **told)
    with pytest.raises(ValueError, match=r"value must be \[B, Nk, embed_dim\] = \[4, 8, 12\], got \[4, 9, 12\]"):
        attention(x, x[:, 1:], x)
    with pytest.raises(ValueError, match=r"key_padding_mask must be \[B, N\] = \[4, 8\], got \[4, 9\]"):
        attention(x, x[:, 1:], x[:, 1:], key_padding_mask=padding("right"))
    with pytest.raises(ValueError, match=r"attn_mask must be \[Nq, Nk\] = \[9, 8\], got \[9, 9\]"):
        attention(x, x[:, 1:], x[:, 1:], attn_mask=CAUSAL)
    with pytest.raises(NotImplementedError, match=r"SinkAttention cannot run impl='reference' here: PyTorch attends"):
        module(impl="reference")(x, x[:, 1:], x[:, 1:])
    nested = torch.nested.nested_tensor([torch.randn(3, E)], layout=torch.strided)
    with pytest.raises(ValueError, match=r"query must be nested of layout=torch.jagged .*, got layout=torch.strided"):
        attention(nested, nested, nested)


def test_wrong_masks_are_refused():
    attention = module()
    x, *_ = inputs(torch.float32)
    call = functools.partial(attention, x, x, x)
    with pytest.raises(ValueError, match=r"key_padding_mask must be False at tokens without a gap, .*, got \[0, 1, 0"):
        call(key_padding_mask=padding("right", torch.tensor([1, 4, 0, 1])) ^ (torch.arange(N) == 2))
    with pytest.raises(ValueError, match=r"attn_mask must be the causal mask.*got one that shows key 1 to query 0"):
        call(attn_mask=torch.zeros(N, N, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask must be \[Nq, Nk\] = \[9, 9\], got \[24, 9, 9\]"):
        call(attn_mask=CAUSAL.expand(B * H, N, N))
    with pytest.raises(ValueError, match="seq_lens must be None beside a key_padding_mask"):
        call(key_padding_mask=padding("right"), seq_lens=LENGTHS)


@pytest.mark.parametrize("form", [{}, {"num_kv_heads": 2, "dropout": 0.1, "padding_side": "left"}])
def test_repr(form):
    text = repr(SinkAttention(E, H, **form))
    kv_heads, side = form.get("num_kv_heads", H), form.get("padding_side", "right")
    assert f"embed_dim=12, num_heads=6, num_kv_heads={kv_heads}, padding_side={side!r}" in text

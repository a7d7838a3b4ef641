"""How modules take sequences: windows by mask or by lengths, packed, nested; and arguments whose meaning changes."""

import warnings

import pytest
import torch
from torch import nn

from recattn.nn import RefinedSelfAttention, SinkAttention, StochasticRefinedSelfAttention

E, H, N = 8, 2, 6
LENGTHS, STARTS = torch.tensor([6, 0, 3, 1]), torch.tensor([0, 0, 2, 5])
B, T = len(LENGTHS), int(LENGTHS.sum())
SINKS = torch.tensor([[0, 2], [-1, -1], [1, 2], [0, -1]])  # within each sequence
BIAS = 3 * torch.randn(B, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

MODULES = {
    "SinkAttention": lambda **options: SinkAttention(E, H, **options),
    "RefinedSelfAttention": lambda **options: RefinedSelfAttention(E, H, max_len=N, mechanism="value", **options),
    "StochasticRefinedSelfAttention": lambda **options: StochasticRefinedSelfAttention(
        E, H, max_len=N, causal=True, **options
    ),
}
every_module = pytest.mark.parametrize("name", MODULES)
refining_modules = pytest.mark.parametrize("name", [name for name in MODULES if "Refined" in name])


def build(name, dtype=torch.float64, **options):
    """With matrices and biases that tell."""
    module = MODULES[name](dtype=dtype, **options)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.startswith("w_") or key.endswith("bias"):
                parameter.normal_()
    return module


def attend(module, x, *, starts=None, **options):
    """The output, [.., E] or of Gaussians [.., 2E]. Sinks count on the N axis where `starts` are given."""
    if isinstance(module, StochasticRefinedSelfAttention):
        return torch.cat(module(x, 2 * x, **options), dim=-1)
    if isinstance(module, SinkAttention):
        sinks = SINKS if starts is None else torch.where(SINKS >= 0, SINKS + starts[:, None], -1)
        options |= {"sink_positions": sinks, "inter_sink_bias": BIAS.to(x.dtype)}
    return module(x, x, x, is_causal=True, **options)[0]


def tokens(lengths=LENGTHS, starts=None):
    position = torch.arange(N)
    starts = torch.zeros_like(lengths) if starts is None else starts
    return (position >= starts[:, None]) & (position < (starts + lengths)[:, None])


def gradients(module, x, out, incoming):
    return torch.autograd.grad(out, [x, *module.parameters()], incoming)


@every_module
def test_packed_and_nested_equal_padded(name):
    """Output and every gradient; in a float64 call the reference runs, in float32 the kernels."""
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        module, valid = build(name, dtype, padding_side="right"), tokens()
        x, offsets = torch.randn(T, E, dtype=dtype, requires_grad=True), nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
        padded = x.new_zeros(B, N, E).masked_scatter(valid[..., None], x)
        expected = attend(module, padded, seq_lens=LENGTHS)[valid]
        incoming = torch.randn_like(expected)
        by_padded = gradients(module, x, expected, incoming)
        nested = torch.nested.nested_tensor_from_jagged(x, offsets)
        out = attend(module, nested)
        assert out.is_nested and out.offsets() is offsets and out.shape[:2] == nested.shape[:2]
        packed = attend(module, x, cu_seqlens=offsets, max_seqlen=N)
        for actual in (packed, out.values()):
            torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
            for mine, other in zip(gradients(module, x, actual, incoming), by_padded, strict=True):
                torch.testing.assert_close(mine, other, atol=tolerance, rtol=tolerance)


def test_nested_compiles_as_one_graph_for_all_lengths():
    """One module: the tests of the operators have each."""
    module = build("RefinedSelfAttention", torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([6, 2, 3, 4], [5, 6, 4, 2]):
            offsets = torch.tensor([0, *lengths]).cumsum(0)
            x = torch.randn(sum(lengths), E, requires_grad=True)
            nested = torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=2, max_seqlen=6)
            results = []
            for function in (attend, compiled):
                out = function(module, nested).values()
                results.append([out, *gradients(module, x, out, torch.ones_like(out))])
            for eager, traced in zip(*results, strict=True):
                torch.testing.assert_close(traced, eager, atol=1e-4, rtol=1e-4)


@every_module
@pytest.mark.parametrize("additive", [True, False])
def test_a_mask_says_where_the_tokens_are(name, additive):
    """Whatever the module's padding side is: on the left, on the right, on both sides."""
    module = build(name, padding_side="left")
    x = torch.randn(B, N, E, dtype=torch.float64, requires_grad=True)
    for starts in (torch.zeros(B, dtype=torch.int64), N - LENGTHS, STARTS):
        valid = tokens(starts=starts)
        mask = torch.zeros(B, N).masked_fill(~valid, -torch.inf) if additive else ~valid
        expected = attend(module, x, starts=starts, seq_lens=LENGTHS, seq_starts=starts)
        actual = attend(module, x.masked_fill(~valid[..., None], torch.nan), starts=starts, key_padding_mask=mask)
        assert torch.equal(actual, expected)
        incoming = torch.randn_like(actual)
        for mine, other in zip(*(gradients(module, x, out, incoming) for out in (actual, expected)), strict=True):
            torch.testing.assert_close(mine, other, atol=1e-12, rtol=1e-12)
        for row in range(B):  # positions on the N axis count, not other rows or padding
            alone = torch.where(valid[row], 0, torch.nan)[None, :, None] + x[row : row + 1]
            if not isinstance(module, SinkAttention):
                out = attend(module, alone, key_padding_mask=~valid[row : row + 1])
                torch.testing.assert_close(out[0], actual[row], atol=1e-12, rtol=1e-12)


@every_module
def test_wrong_sequences_are_refused(name):
    module, x, offsets = build(name), torch.randn(B, N, E, dtype=torch.float64), torch.tensor([0, 2, 2, 5, 6])
    gap = ~tokens()
    gap[2] = torch.tensor([0, 1, 0, 1, 1, 1])
    nested = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), torch.arange(0, B * N + 1, N))
    starts, lengths = {"seq_starts": STARTS}, {"seq_lens": LENGTHS}
    packed = {"cu_seqlens": offsets}
    for given, options, message in (
        (x, {"key_padding_mask": gap}, r"without a gap, .* got \[0, 1, 0, 1, 1, 1\] in row 2"),
        (x, {"key_padding_mask": ~tokens(), **lengths}, "seq_lens must be None beside a key_padding_mask"),
        (x, starts, "seq_lens must be given with seq_starts, got None"),
        (x, {"max_seqlen": 3}, "max_seqlen must be None but with cu_seqlens, got 3"),
        (x, packed, r" must be \[T, (embed_dim|E)\] = .*, got \[4, 6, 8\]"),
        (x[0], {**packed, **lengths}, "seq_lens must be None beside cu_seqlens"),
        (x[0], {**packed, "key_padding_mask": ~tokens()}, "key_padding_mask must be None beside packed sequences"),
        (x[0], {**packed, "need_weights": True}, "need_weights must be False with packed sequences, got True"),
        (nested, packed, "cu_seqlens must be None beside a nested (query|mean)"),
        (nested.transpose(1, 2), {}, "must be nested with sequences on axis 1, got one with them on axis 2"),
    ):
        with pytest.raises(ValueError, match=message):
            attend(module, given, **options)
    if name != "StochasticRefinedSelfAttention":
        mask = torch.ones(N, N, dtype=torch.bool).triu(1)
        with pytest.raises(ValueError, match="attn_mask must be None beside packed sequences: give is_causal"):
            module(x[0], x[0], x[0], attn_mask=mask, cu_seqlens=offsets)


@pytest.mark.parametrize(
    "keyword, answer",
    [
        ("dropout_p", r" \(scaled_dot_product_attention\): use dropout"),
        ("kdim", r" \(nn.MultiheadAttention\): keys have embed_dim columns"),
        ("paddingside", r": did you mean padding_side\?"),
        ("blue", ": it has embed_dim, num_heads, "),
    ],
)
@every_module
def test_keywords_of_other_constructors(name, keyword, answer):
    with pytest.raises(TypeError, match=rf"^{name}\(\) has no keyword {keyword}{answer}"):
        MODULES[name](**{keyword: 0.1})


@pytest.mark.parametrize(
    "keyword, answer",
    [
        ("causal", r" \(the functions\): use is_causal"),
        ("softmax_scale", r" \(flash-attn\): the scale is 1/√D"),
        ("attention_mask", r" \(transformers\): use key_padding_mask; True is padding"),
    ],
)
@pytest.mark.parametrize("kind", [SinkAttention, RefinedSelfAttention])
def test_keywords_of_other_calls(kind, keyword, answer):
    x = torch.randn(1, N, E)
    module = MODULES[kind.__name__]()
    with pytest.raises(TypeError, match=rf"^{kind.__name__}\.forward\(\) has no keyword {keyword}{answer}"):
        module(x, x, x, **{keyword: None})


# --- What changes in the next release ---


@refining_modules
def test_lengths_without_a_padding_side_warn(name):
    module, x = build(name), torch.randn(B, N, E, dtype=torch.float64)
    with pytest.warns(FutureWarning, match="seq_lens without padding_side count as padding_side='left'") as warned:
        out = attend(module, x, seq_lens=LENGTHS)
    assert warned[0].filename == __file__
    assert torch.equal(out, attend(module, x, key_padding_mask=~tokens(starts=N - LENGTHS)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attend(module, x, seq_lens=LENGTHS, seq_starts=STARTS)
        module.padding_side = "left"
        assert torch.equal(out, attend(module, x, seq_lens=LENGTHS))
        attend(build("SinkAttention"), x, seq_lens=LENGTHS)


@pytest.mark.parametrize("kind", [RefinedSelfAttention, StochasticRefinedSelfAttention])
def test_max_len_by_position_warns(kind):
    name = kind.__name__
    with pytest.warns(FutureWarning, match=rf"{name} takes max_len by name only .*: write max_len=5") as warned:
        assert kind(E, H, 5, dropout=0.2).max_len == 5
    assert warned[0].filename == __file__
    message = rf"third argument of {name} must be left out: give dropout and max_len by name, got 0\.2"
    with pytest.raises(ValueError, match=message):
        kind(E, H, 0.2)
    with pytest.raises(ValueError, match=r"by position must be embed_dim and num_heads, got 4 of them"):
        kind(E, H, 5, 0.2)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'max_len'"):
        kind(E, H)

"""The gradients of sink pairs, against a full softmax in float64, on a GPU or by the interpreter."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

from recattn._options import SinkAttentionOptions
from recattn.reference.sink_attention import dense_bias, softmax_or_zeros
from recattn.testing import assert_matches_reference
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout, dropout_weights
from recattn.triton_kernels.sink_attention import (
    NO_LENGTHS,
    Lengths,
    PairsConfig,
    SinkInputs,
    launch_sink_attention_pairs_bwd,
)
from tests.compile_table.compilation import recorded
from tests.helpers.corrected_attention import (
    BIASES,
    PAIRS_TILES,
    SCALE,
    corrected_attention,
    expand_heads,
    half_precision_biases,
    lengths_of,
    live_sinks,
    padding_of,
    random_inputs,
    reference_attention,
    strided_copy,
    unbiased_scores,
    with_bias,
)
from tests.helpers.interpreted import DTYPES, with_dtypes
from tests.helpers.large_biases import any_dtype, assert_holds_beside_large_biases, large_biases

GRADS = ("q", "k", "v", "inter_sink_bias")


def assert_corrects(inputs: dict) -> None:
    assert_matches_reference(corrected_attention, reference_attention, inputs, grads=GRADS)


# --- With the correction ---


SIZES = [(1, 0), (1, 1), (63, 63), (100, 1), (129, 40)]


@pytest.mark.parametrize("sizes, causal, dtype", with_dtypes(SIZES, [False, True]), ids=str)
def test_full_softmax(sizes, causal, dtype):
    assert_corrects(random_inputs(*sizes, B=1, dtype=dtype, causal=causal))


@pytest.mark.parametrize("Hq, Hkv, bias_heads", [(2, 2, 1), (2, 2, 2), (4, 1, 4), (4, 2, 1)])
@pytest.mark.parametrize("suppressed", [False, True])
def test_heads(suppressed, Hq, Hkv, bias_heads):
    inputs = random_inputs(63, 30, B=1, Hq=Hq, Hkv=Hkv, bias_heads=bias_heads, causal=True)
    inputs["inter_sink_bias"][:, 0] -= 50 * suppressed
    assert_corrects(inputs)


@pytest.mark.parametrize(
    "bias, causal, layout",
    [("-50", False, "right"), ("30", True, "window"), ("-50", False, "packed"), ("30", True, "packed")],
)
def test_ragged(bias, causal, layout):
    assert_corrects(
        with_bias(random_inputs(70, 66, Hq=1, lengths=[70, 0, 1, 64, 0], layout=layout, causal=causal), bias)
    )


@pytest.mark.parametrize("layout", ["right", "window", "packed"])
def test_ragged_float16(layout):
    inputs = random_inputs(63, 63, Hq=1, lengths=[63, 0, 30], layout=layout, dtype=torch.float16)
    inputs["inter_sink_bias"] -= 1.5
    assert_corrects(inputs)


@half_precision_biases
def test_bias_range_float16(bias):
    assert_corrects(with_bias(random_inputs(63, 63, B=1, dtype=torch.float16, causal=True), bias))


@pytest.mark.parametrize("M, causal", [(30, False), (63, True)])
@pytest.mark.parametrize("bias", BIASES)
def test_bias_range(bias, M, causal):
    assert_corrects(with_bias(random_inputs(63, M, B=1, causal=causal), bias))


@pytest.mark.parametrize("logit", [-math.inf, 5.0])
@pytest.mark.parametrize("bias", ["30", "-50", "-1.5"])
def test_sink_logits(bias, logit):
    inputs = with_bias(random_inputs(40, 40, Hq=1, lengths=[40, 20], layout="packed", causal=True), bias)
    inputs["sink_logits"] = logit + torch.randn(1, device=inputs["q"].device)
    assert_corrects(inputs)


@pytest.mark.parametrize("D, Dv", [(16, 64), (64, 16), (50, 50), (100, 24), (256, 256)])
@pytest.mark.parametrize("suppressed", [False, True])
def test_head_dims(D, Dv, suppressed):
    inputs = random_inputs(40, 30, B=1, Hq=1, D=D, Dv=Dv, causal=True)
    inputs["inter_sink_bias"] -= 50 * suppressed
    assert_corrects(inputs)


@pytest.mark.parametrize("tile", [None, (16, 32, 64), (64, 16, 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_tile(dtype, tile):
    """None is the shipped tile."""
    inputs = random_inputs(50, 40, B=1, Hq=1, D=64, dtype=dtype, causal=True)
    inputs["inter_sink_bias"] = 60 * inputs["inter_sink_bias"] - 50
    inputs["pairs_tiles"] = tile and PairsConfig(*tile, num_warps=4, num_stages=1)
    assert_corrects(inputs)


@pytest.mark.parametrize("bias", [1e-6, -1e-6, 1e-3])
def test_small_bias_relative_accuracy(bias):
    """Added to zeros, what a small bias gives to dq, dk and dv is held to its own scale, which is the bias's."""
    inputs = random_inputs(40, 40, B=1, Hq=1)
    q, k, v, positions = (inputs[name] for name in ("q", "k", "v", "sink_positions"))
    beta, dout = torch.full_like(inputs["inter_sink_bias"], bias), torch.randn_like(q)
    weights, scores = SCALE * q.double() @ k.double().mT, SCALE * q.double() @ k.double().mT + bias
    lse = scores.logsumexp(-1, keepdim=True)
    missing = (weights - lse).exp() * math.expm1(bias)
    out = (scores - lse).exp() @ v.double()
    delta = (dout * out).sum(-1)
    g = SCALE * missing * (dout.double() @ v.double().mT - delta[..., None])
    expected = g @ k.double(), g.mT @ q.double(), missing.mT @ dout.double()
    stats = torch.stack([lse.squeeze(-1), torch.ones_like(delta)]).float()
    actual = [torch.zeros_like(x) for x in (q, k, v)]
    launch_sink_attention_pairs_bwd(
        *(q, k, v, dout, stats, delta.float(), actual, SinkInputs(positions, beta), NO_LENGTHS),
        options=SinkAttentionOptions(causal=False, scale=SCALE),
        **{"corrects": True, "config": PAIRS_TILES},
    )
    for x, y in zip(actual, expected, strict=True):
        assert (x - y).abs().max() < 1e-5 * y.abs().max()


@large_biases
@any_dtype
def test_large_biases(bias, dtype):
    def attention(**inputs):
        return corrected_attention(**inputs, scale=0.25)[0]

    assert_holds_beside_large_biases(attention, bias, dtype)


# --- What is read and written ---


def gradients(inputs: dict, dout: Tensor) -> list[Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in GRADS}
    out, _ = corrected_attention(**(inputs | leaves))
    return list(torch.autograd.grad(out, list(leaves.values()), dout))


@pytest.mark.parametrize("suppressed", [False, True])
@pytest.mark.parametrize("layout", ["right", "window", "packed"])
def test_ignored_sinks_and_padding_are_not_read(layout, suppressed):
    inputs = random_inputs(40, 30, Hq=1, lengths=[40, 0, 25], layout=layout)
    inputs["inter_sink_bias"] -= 50 * suppressed
    dout = torch.randn_like(inputs["q"])
    expected = gradients(inputs, dout)
    poisoned = inputs | {"inter_sink_bias": inputs["inter_sink_bias"].clone()}
    for b in range(3):
        ignored = ~live_sinks(inputs, b)
        pairs = ignored[:, None] | ignored
        poisoned["inter_sink_bias"][b].masked_fill_(pairs, math.nan)
        assert (expected[3][b][:, pairs] == 0).all()
    if layout != "packed":
        padding = padding_of(inputs)
        poisoned |= {name: x.masked_fill(padding, math.nan) for name, x in inputs.items() if name in "qkv"}
        dout = dout.masked_fill(padding, math.nan)
    assert all(map(torch.equal, gradients(poisoned, dout), expected))


@pytest.mark.parametrize("layout", ["right", "window", "packed"])
def test_touches_sink_rows_only(layout):
    """No row is done again here, and dq, dk and dv of other tokens stay what they are, NaN say."""
    inputs = random_inputs(63, 30, Hkv=2, lengths=[63, 0, 41], layout=layout)
    q, positions, bias = inputs["q"], inputs["sink_positions"], inputs["inter_sink_bias"]
    stats = torch.ones(2, 3, 2, 30, device=q.device)
    is_sink = torch.zeros_like(q, dtype=torch.bool)
    for b in range(3):
        sinks = positions[b, live_sinks(inputs, b)]
        if layout == "packed":
            is_sink[inputs["cu_seqlens"][b] + sinks] = True
        else:
            is_sink[b, :, sinks] = True
    dq, dk, dv = (torch.where(is_sink, 1.0, math.nan) for _ in range(3))
    launch_sink_attention_pairs_bwd(
        *(q, inputs["k"], inputs["v"], q, stats, stats[0], (dq, dk, dv), SinkInputs(positions, bias)),
        lengths_of(inputs),
        options=SinkAttentionOptions(causal=False, scale=SCALE),
        **{"corrects": True, "config": PAIRS_TILES},
    )
    for x in (dq, dk, dv):
        assert torch.equal(x.isnan(), ~is_sink)
        assert (x[is_sink] != 1).all()


@pytest.mark.parametrize("suppressed", [False, True])
@pytest.mark.parametrize("layout", ["right", "packed"])
def test_non_contiguous(layout, suppressed):
    inputs = random_inputs(40, 20, bias_heads=2, lengths=[40], layout=layout, causal=True)
    inputs["inter_sink_bias"] -= 50 * suppressed
    dout = torch.randn_like(inputs["q"])
    strided = {name: strided_copy(x) if isinstance(x, Tensor) else x for name, x in inputs.items()}
    assert all(map(torch.equal, gradients(strided, strided_copy(dout)), gradients(inputs, dout)))


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_int32_indices(layout):
    inputs = random_inputs(40, 20, Hq=1, lengths=[40, 30], layout=layout)
    narrow = {n: x.int() if isinstance(x, Tensor) and not x.is_floating_point() else x for n, x in inputs.items()}
    dout = torch.randn_like(inputs["q"])
    assert all(map(torch.equal, gradients(narrow, dout), gradients(inputs, dout)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bias_dtypes(dtype):
    inputs = random_inputs(40, 20, Hq=1)
    inputs["inter_sink_bias"] = inputs["inter_sink_bias"].to(dtype)
    single = inputs | {"inter_sink_bias": inputs["inter_sink_bias"].float()}
    dout = torch.randn_like(inputs["q"])
    *actual, dbias = gradients(inputs, dout)
    *expected, expected_dbias = gradients(single, dout)
    assert all(map(torch.equal, actual, expected)) and torch.equal(dbias, expected_dbias.to(dtype))


def test_bitwise_equal_reruns():
    inputs = random_inputs(100, 100, B=1, causal=True)
    inputs["inter_sink_bias"] *= 30
    dout = torch.randn_like(inputs["q"])
    assert all(map(torch.equal, gradients(inputs, dout), gradients(inputs, dout)))


@pytest.mark.parametrize(
    "empty", [{"B": 0}, {"N": 0, "M": 0}, {"N": 4, "M": 0}, {"lengths": [0, 0], "layout": "packed"}]
)
def test_nothing_to_do(empty):
    inputs = random_inputs(**({"N": 4, "M": 2} | empty))
    *_, dbias = gradients(inputs, torch.randn_like(inputs["q"]))
    assert dbias.shape == inputs["inter_sink_bias"].shape and (dbias == 0).all()


# --- Without: the pairs whole, as the fused path has them ---


@triton.jit
def dropout_weights_kernel(seed, out, dropped, M, BLOCK: tl.constexpr):
    bh = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    weights = dropout_weights(tl.load(seed), bh, 1, index, 0, dropped, BLOCK)
    mask = (index[:, None] < M) & (index[None, :] < M)
    tl.store(out + (bh * M + index[:, None]) * M + index[None, :], weights, mask=mask)


def sink_pairs(sink_positions: Tensor, N: int) -> Tensor:
    """[B, 1, N, N], True where both tokens are sinks."""
    ones = torch.ones(*sink_positions.shape, sink_positions.shape[1], device=sink_positions.device)
    return dense_bias(sink_positions, ones.unsqueeze(1), N) > 0


def whole_attention(q, k, v, inter_sink_bias, kept, sink_positions, causal, scale, seq_lens) -> Tensor:
    """The reference, with the weights of sink pairs multiplied by kept [B, Hq, M, M]."""
    scores = scale * q @ expand_heads(k, q.shape[1]).mT + dense_bias(sink_positions, inter_sink_bias, q.shape[2])
    visible = unbiased_scores(q, k, seq_lens, None, None, causal, scale) > -math.inf
    weights = softmax_or_zeros(scores.masked_fill(~visible, -math.inf))
    kept = dense_bias(sink_positions, kept, q.shape[2]).where(sink_pairs(sink_positions, q.shape[2]), 1)
    return (weights * kept).to(v.dtype) @ expand_heads(v, q.shape[1])


class WholePairs(torch.autograd.Function):
    """Attention whose backward leaves dk, dv and dbias of sink pairs to the kernel."""

    @staticmethod
    def forward(ctx, q, k, v, sink_positions, inter_sink_bias, kept, causal, scale, seq_lens, seed, dropped):
        tensors = (q, k, v, sink_positions, inter_sink_bias, kept, seq_lens, seed)
        ctx.save_for_backward(*tensors)
        ctx.settings = (causal, scale, dropped)
        double = (x.double() for x in (q, k, v, inter_sink_bias, kept))
        return whole_attention(*double, sink_positions, causal, scale, seq_lens).to(q.dtype)

    @staticmethod
    def backward(ctx, dout):
        q, k, v, sink_positions, inter_sink_bias, kept, seq_lens, seed = ctx.saved_tensors
        causal, scale, dropped = ctx.settings
        q_, k_, v_, dout_, bias, kept = (x.double() for x in (q, k, v, dout, inter_sink_bias, kept))
        pairs = sink_pairs(sink_positions, q.shape[2])
        scores = unbiased_scores(q, k, seq_lens, None, None, causal, scale)
        scores = scores + dense_bias(sink_positions, bias, q.shape[2])
        weights = softmax_or_zeros(scores)
        kept = dense_bias(sink_positions, kept, q.shape[2]).where(pairs, 1)
        dweights = kept * (dout_ @ expand_heads(v_, q.shape[1]).mT)
        delta = (weights * dweights).sum(-1)  # [B, Hq, N]
        g = scale * weights * (dweights - delta[..., None])
        dq = (g @ expand_heads(k_, q.shape[1])).to(q.dtype)
        dk = (g.masked_fill(pairs, 0).mT @ q_).unflatten(1, (k.shape[1], -1)).sum(2).to(k.dtype)
        dv = (weights.masked_fill(pairs, 0).mT @ dout_).unflatten(1, (k.shape[1], -1)).sum(2).to(v.dtype)

        unit = 1.0 if q.dtype == torch.float32 else math.log2(math.e)  # log2e_scale
        row_max = (unit * scores.amax(-1)).float().double()  # row_sum is that of row_max as it is stored
        row_sum = (scores - row_max.masked_fill(row_max.isneginf(), 0.0)[..., None] / unit).exp().sum(-1)
        empty = row_sum == 0
        stats = [row_max.masked_fill(empty, math.inf), row_sum.masked_fill(empty, -1.0), delta]
        rows = sink_positions.clamp(min=0)[:, None].expand(-1, q.shape[1], -1)
        ignored = sink_positions[:, None] < 0
        row_max, row_sum, delta = (x.float().gather(2, rows).masked_fill(ignored, math.nan) for x in stats)
        dbias = launch_sink_attention_pairs_bwd(
            *(q, k, v, dout, torch.stack([row_max, row_sum]), delta, (None, dk, dv)),
            *(SinkInputs(sink_positions, inter_sink_bias), Lengths(seq_lens)),
            NO_DROPOUT if seed is None else Dropout(seed, dropped),
            options=SinkAttentionOptions(causal, scale=scale),
            **{"corrects": False, "config": PAIRS_TILES},
        )
        return dq, dk, dv, None, dbias, *[None] * 6


def assert_whole_pairs(inputs: dict, dropout_p: float) -> None:
    B, M = inputs["sink_positions"].shape
    heads, device = inputs["q"].shape[1], inputs["q"].device
    seed, dropped = None, round(dropout_p * 65536)
    kept = torch.ones(B, heads, M, M, device=device)
    if dropped:
        seed = torch.tensor([2**40 + 7], device=device)
        dropout_weights_kernel[(B * heads,)](seed, kept, dropped, M, BLOCK=triton.next_power_of_2(max(M, 16)))
        assert abs((kept == 0).float().mean() - dropout_p) < 0.05

    def whole_pairs(q, k, v, sink_positions, inter_sink_bias, causal, scale, seq_lens=None):
        tensors = (q, k, v, sink_positions, inter_sink_bias, kept)
        return WholePairs.apply(*tensors, causal, scale, seq_lens, seed, dropped)

    def reference(q, k, v, sink_positions, inter_sink_bias, causal, scale, seq_lens=None):
        weights = kept.to(inter_sink_bias.dtype)
        return whole_attention(q, k, v, inter_sink_bias, weights, sink_positions, causal, scale, seq_lens)

    assert_matches_reference(whole_pairs, reference, inputs, grads=GRADS)


@pytest.mark.parametrize("dropout_p, causal, dtype", with_dtypes([0.0, 0.3], [False, True]), ids=str)
def test_whole_pairs(dropout_p, causal, dtype):
    assert_whole_pairs(random_inputs(100, 50, B=1, Hq=4, Hkv=2, dtype=dtype, causal=causal), dropout_p)


@pytest.mark.parametrize("bias", ["30", "-8", "all -inf", "small"])
def test_whole_pairs_bias_range(bias):
    inputs = random_inputs(63, 63, bias_heads=2, lengths=[63, 40, 0], causal=True)
    inputs["inter_sink_bias"] = BIASES[bias](inputs["inter_sink_bias"])
    assert_whole_pairs(inputs, dropout_p=0.3)


# --- Compilation ---


@pytest.mark.parametrize("corrects", [False, True])
@pytest.mark.parametrize("layout", ["right", "packed"])
def test_no_recompilation(layout, corrects):
    """The kernel does not depend on the numbers of tokens, sinks and sequences."""

    def compilation(N, M, lengths):
        inputs = random_inputs(N, M, lengths=lengths, layout=layout, D=64, Hq=4, Hkv=2)
        q, k, v, positions, bias = (inputs[name] for name in ("q", "k", "v", "sink_positions", "inter_sink_bias"))
        stats, delta = torch.empty(2, len(lengths), 4, M), torch.empty(len(lengths), 4, M)
        arguments = (q, k, v, q, stats, delta, (q, k, v), SinkInputs(positions, bias))
        of_batch = lengths_of(inputs)
        options = SinkAttentionOptions(causal=N % 2 == 0, scale=SCALE)
        return recorded(
            "", 90, launch_sink_attention_pairs_bwd, *arguments, of_batch, options=options, corrects=corrects
        )

    first = compilation(17, 3, [17, 4, 2])
    for N, M, lengths in [(1, 1, [1]), (64, 16, [64, 16] * 8), (100, 50, [100, 60])]:
        assert compilation(N, M, lengths) == first

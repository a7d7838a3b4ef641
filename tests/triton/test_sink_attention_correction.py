"""The correction of an unbiased attention, against a full softmax in float64, on a GPU or by the interpreter."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from recattn._options import SinkAttentionOptions
from recattn.testing import assert_matches_reference, measure_error
from recattn.triton_kernels.sink_attention import (
    CorrectionConfig,
    SinkInputs,
    launch_sink_attention_correction_delta,
    launch_sink_attention_correction_fwd,
)
from tests.compile_table.compilation import recorded
from tests.helpers.corrected_attention import (
    BIASES,
    CORRECTION_TILES,
    SCALE,
    corrected_attention,
    half_precision_biases,
    lengths_of,
    live_sinks,
    padding_of,
    random_inputs,
    reference_attention,
    strided_copy,
    unbiased_attention,
    unbiased_scores,
    with_bias,
)
from tests.helpers.interpreted import DTYPES, with_dtypes


def unbiased(inputs: dict) -> tuple[Tensor, Tensor]:
    return unbiased_attention(
        *(inputs.get(name) for name in ("q", "k", "v", "sink_logits", "seq_lens", "seq_starts", "cu_seqlens")),
        causal=inputs["causal"],
        scale=inputs["scale"],
    )


def options_of(inputs: dict) -> SinkAttentionOptions:
    return SinkAttentionOptions(inputs["causal"], inputs["scale"])


def correct(inputs: dict, out: Tensor, lse: Tensor, config: CorrectionConfig | None = CORRECTION_TILES) -> Tensor:
    return launch_sink_attention_correction_fwd(
        *(inputs[name] for name in ("q", "k", "v")),
        *(out, lse),
        SinkInputs(*(inputs.get(name) for name in ("sink_positions", "inter_sink_bias", "sink_logits"))),
        lengths_of(inputs),
        options=options_of(inputs),
        config=config,
    )


def assert_corrects(inputs: dict) -> None:
    assert_matches_reference(corrected_attention, reference_attention, inputs)


SIZES = [(1, 0), (1, 1), (63, 20), (100, 1), (100, 100), (129, 40)]


@pytest.mark.parametrize("sizes, causal, dtype", with_dtypes(SIZES, [False, True]), ids=str)
def test_full_softmax(sizes, causal, dtype):
    assert_corrects(random_inputs(*sizes, dtype=dtype, causal=causal))


@pytest.mark.parametrize("Hq, Hkv, bias_heads", [(2, 2, 1), (2, 2, 2), (4, 1, 4)])
def test_heads(Hq, Hkv, bias_heads):
    assert_corrects(random_inputs(63, 30, B=1, Hq=Hq, Hkv=Hkv, bias_heads=bias_heads, causal=True))


@pytest.mark.parametrize("layout", ["right", "window", "packed"])
@pytest.mark.parametrize("bias, causal", [("-50", False), ("30", True)])
def test_ragged(bias, causal, layout):
    assert_corrects(
        with_bias(random_inputs(129, 70, Hq=1, lengths=[129, 0, 1, 64, 0], layout=layout, causal=causal), bias)
    )


@pytest.mark.parametrize("layout", ["right", "window", "packed"])
def test_ragged_float16(layout):
    assert_corrects(random_inputs(63, 63, lengths=[63, 0, 30], layout=layout, dtype=torch.float16))


@pytest.mark.parametrize("M, causal", [(30, False), (63, True)])
@pytest.mark.parametrize("bias", BIASES)
def test_bias_range(bias, M, causal):
    """Every token is a sink: a row has no other key to fall back on."""
    assert_corrects(with_bias(random_inputs(63, M, B=1, causal=causal), bias))


@half_precision_biases
def test_bias_range_float16(bias):
    assert_corrects(with_bias(random_inputs(63, 63, B=1, dtype=torch.float16, causal=True), bias))


@pytest.mark.parametrize("logit", [-math.inf, -3.0, 5.0])
@pytest.mark.parametrize("bias", ["30", "-50", "all -inf"])
def test_sink_logits(bias, logit):
    inputs = with_bias(random_inputs(63, 63, Hq=2, lengths=[63, 20], layout="packed", causal=True), bias)
    inputs["sink_logits"] = logit + torch.randn(4)[::2].to(inputs["q"].device)
    assert_corrects(inputs)


@pytest.mark.parametrize("D, Dv", [(16, 64), (64, 16), (50, 50), (100, 24), (256, 256)])
@pytest.mark.parametrize("suppressed", [False, True])
def test_head_dims(D, Dv, suppressed):
    inputs = random_inputs(40, 40, B=1, D=D, Dv=Dv, causal=True)
    inputs["inter_sink_bias"] -= 50 * suppressed
    assert_corrects(inputs)


@pytest.mark.parametrize("tile", [None, (16, 16, 16), (32, 16, 64), (16, 64, 32)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_tile(dtype, tile):
    """None is the shipped tile."""
    inputs = random_inputs(100, 70, B=1, D=64, dtype=dtype, causal=True)
    inputs["inter_sink_bias"] = 60 * inputs["inter_sink_bias"] - 50
    inputs["correction_tiles"] = tile and CorrectionConfig(*tile, num_warps=4, num_stages=1)
    assert_corrects(inputs)


@pytest.mark.parametrize("bias", [1e-12, -1e-12, 1e-6, 1e-3, 0.499, 0.501])
def test_small_bias_relative_accuracy(bias):
    """Correcting an output of zeros leaves Σ Δ v / z alone, which is then held to its own scale."""
    inputs = random_inputs(63, 63, B=1)
    inputs["inter_sink_bias"].fill_(bias)
    _, lse = unbiased(inputs)
    out = torch.zeros_like(inputs["q"])

    def correction_of_zeros(q, k, v, bias, lse):
        delta = (SCALE * q @ k.mT - lse[..., None]).exp() * bias.expm1()
        return delta @ v / (1 + delta.sum(-1, keepdim=True))

    correct(inputs, out, lse.clone())
    tensors = {"q": inputs["q"], "k": inputs["k"], "v": inputs["v"], "bias": inputs["inter_sink_bias"], "lse": lse}
    assert_matches_reference(lambda **_: out, correction_of_zeros, tensors)


@pytest.mark.parametrize("layout", ["right", "window", "packed"])
@pytest.mark.parametrize("bias", ["30", "-50"])
def test_touches_sink_rows_only(bias, layout):
    inputs = with_bias(random_inputs(63, 30, lengths=[63, 0, 41], layout=layout, causal=True), bias)
    before, after = unbiased(inputs), unbiased(inputs)
    correct(inputs, *after)
    rows = torch.zeros_like(after[1], dtype=torch.bool)  # as lse
    for b in range(3):
        sinks = inputs["sink_positions"][b, live_sinks(inputs, b)]
        if layout == "packed":
            rows[inputs["cu_seqlens"][b] + sinks] = True
        else:
            rows[b, :, sinks] = True
    for x, y in zip(after, before, strict=True):
        assert torch.equal(x[~rows], y[~rows])
        assert not torch.equal(x[rows], y[rows])


@pytest.mark.parametrize("layout", ["right", "window", "packed"])
@pytest.mark.parametrize("bias", ["small", "-1.5", "all -inf"])
def test_sink_stats(bias, layout):
    """The probabilities of sink pairs, which rows are marked as recomputed, and nothing where a sink is ignored."""
    inputs = with_bias(random_inputs(40, 40, lengths=[40, 0, 25], layout=layout, causal=True), bias)
    out, lse = unbiased(inputs)
    row_max, row_sum = correct(inputs, out, lse)
    promoted = {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }
    scores = unbiased_scores(
        *(promoted.get(name) for name in ("q", "k", "seq_lens", "seq_starts", "cu_seqlens")),
        causal=True,
        scale=SCALE,
    ).double()
    for b in range(3):
        live = live_sinks(inputs, b)
        assert (row_max[b, :, ~live] == 0).all() and (row_sum[b, :, ~live] == 0).all()
        sinks = inputs["sink_positions"][b, live].long()
        if layout == "packed":
            sinks = sinks + inputs["cu_seqlens"][b]
            sink_scores, row_lse = scores[0][:, sinks[:, None], sinks], lse[sinks].T
        else:
            sink_scores, row_lse = scores[b][:, sinks[:, None], sinks], lse[b, :, sinks]
        biased = sink_scores + inputs["inter_sink_bias"][b][:, live][:, :, live]
        empty = row_lse.isneginf()
        assert torch.equal(row_max[b, :, live].isposinf(), empty) and (row_sum[b, :, live][empty] == -1).all()
        probability = (biased - row_max[b, :, live, None]).exp() / row_sum[b, :, live, None].abs()
        expected = (biased - row_lse.masked_fill(empty, math.inf)[..., None].double()).exp()
        torch.testing.assert_close(probability, expected, rtol=1e-4, atol=1e-6)
        assert (row_sum[b, :, live] > 0).all() if bias == "small" else bias == "-1.5" or (row_sum[b, :, live] < 0).all()


@pytest.mark.parametrize("suppressed", [False, True])
@pytest.mark.parametrize("layout", ["right", "window", "packed"])
def test_ignored_sinks_and_padding_are_not_read(layout, suppressed):
    inputs = random_inputs(63, 50, lengths=[63, 0, 41], layout=layout)
    inputs["inter_sink_bias"] -= 50 * suppressed
    expected = unbiased(inputs)
    correct(inputs, *expected)
    poisoned = inputs | {"inter_sink_bias": inputs["inter_sink_bias"].clone()}
    for b in range(3):
        ignored = ~live_sinks(inputs, b)
        poisoned["inter_sink_bias"][b].masked_fill_(ignored[:, None] | ignored, math.nan)
    if layout == "packed":
        poisoned |= {
            name: torch.cat([x, torch.full_like(x[:5], math.nan)]) for name, x in inputs.items() if name in "qkv"
        }
        actual = [torch.cat([x, torch.full_like(x[:5], math.nan)]) for x in unbiased(inputs)]
    else:
        padding = padding_of(inputs)
        poisoned |= {n: x.masked_fill(padding, math.nan) for n, x in inputs.items() if n in "qkv"}
        actual = unbiased(inputs)
    correct(poisoned, *actual)
    assert all(torch.equal(x[: len(y)], y) for x, y in zip(actual, expected, strict=True))


def test_no_seq_lens():
    inputs = random_inputs(100, 20, lengths=[100, 100], causal=True)
    runs = [unbiased(inputs) for _ in range(2)]
    correct(inputs, *runs[0])
    del inputs["seq_lens"]
    correct(inputs, *runs[1])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("suppressed", [False, True])
@pytest.mark.parametrize("layout", ["right", "packed"])
def test_non_contiguous(layout, suppressed):
    inputs = random_inputs(63, 40, bias_heads=2, lengths=[63, 50], layout=layout, causal=True)
    inputs["inter_sink_bias"] -= 50 * suppressed
    expected = unbiased(inputs)
    strided = [strided_copy(x) for x in expected]
    correct(inputs, *expected)
    correct({n: strided_copy(x) if isinstance(x, Tensor) else x for n, x in inputs.items()}, *strided)
    assert all(map(torch.equal, strided, expected))


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_int32_indices(layout):
    inputs = random_inputs(63, 40, lengths=[63, 30], layout=layout)
    narrow = {n: x.int() if isinstance(x, Tensor) and not x.is_floating_point() else x for n, x in inputs.items()}
    expected, actual = (unbiased(inputs) for _ in range(2))
    correct(inputs, *expected)
    correct(narrow, *actual)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_bias_dtypes(dtype):
    inputs = random_inputs(63, 40)
    inputs["inter_sink_bias"] = inputs["inter_sink_bias"].to(dtype)
    expected, actual = (unbiased(inputs) for _ in range(2))
    correct(inputs | {"inter_sink_bias": inputs["inter_sink_bias"].float()}, *expected)
    correct(inputs, *actual)
    assert all(map(torch.equal, actual, expected))


def test_bitwise_equal_reruns():
    inputs = random_inputs(100, 100, causal=True)
    inputs["inter_sink_bias"] *= 30
    runs = [unbiased(inputs) for _ in range(2)]
    states = [correct(inputs, *run) for run in runs]
    assert all(map(torch.equal, *runs))
    assert torch.equal(states[0].nan_to_num(), states[1].nan_to_num())


@pytest.mark.parametrize(
    "empty", [{"B": 0}, {"N": 0, "M": 0}, {"N": 4, "M": 0}, {"lengths": [0, 0], "layout": "packed"}]
)
def test_nothing_to_do(empty):
    inputs = random_inputs(**({"N": 4, "M": 2} | empty))
    out, lse = unbiased(inputs)
    sink_stats = correct(inputs, out, lse)
    B, M = inputs["sink_positions"].shape
    assert sink_stats.shape == (2, B, 2, M)
    launch_sink_attention_correction_delta(
        *(out, out, inputs["sink_positions"], sink_stats, lse, lengths_of(inputs)),
    )


# --- What the backward reads of a sink row ---


@pytest.mark.parametrize("layout", ["right", "window", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_delta(dtype, layout):
    inputs = random_inputs(63, 50, lengths=[63, 0, 41], layout=layout, dtype=dtype, Dv=100)
    inputs["inter_sink_bias"] -= 1.5
    out, lse = unbiased(inputs)
    sink_stats = correct(inputs, out, lse)
    dout, backend_lse = torch.randn_like(out), lse.clone()
    sink_delta = launch_sink_attention_correction_delta(
        out, dout, inputs["sink_positions"], sink_stats, backend_lse, lengths_of(inputs)
    )
    delta = (out.double() * dout.double()).sum(-1)  # as lse
    recomputed = torch.zeros_like(lse, dtype=torch.bool)
    for b in range(3):
        live = live_sinks(inputs, b)
        sinks = inputs["sink_positions"][b, live].long()
        assert sink_delta[b, :, ~live].isnan().all()
        rows = inputs["cu_seqlens"][b] + sinks if layout == "packed" else sinks
        expected = delta[rows].T if layout == "packed" else delta[b, :, rows]
        error = measure_error(
            "delta", sink_delta[b, :, live], expected.float(), expected, torch.finfo(torch.float32).eps
        )
        assert error.passed, error
        if layout == "packed":
            recomputed[rows] = sink_stats[1, b, :, live].T < 0
        else:
            recomputed[b, :, rows] = sink_stats[1, b, :, live] < 0
    assert recomputed.any() and not recomputed.all()
    assert torch.equal(backend_lse, lse.masked_fill(recomputed, math.inf))


# --- Compilation ---


@pytest.mark.parametrize("layout", ["right", "packed"])
def test_no_recompilation(layout):
    """Kernels do not depend on the numbers of tokens, sinks and sequences."""

    def compilations(N, M, lengths):
        inputs = random_inputs(N, M, lengths=lengths, layout=layout, D=64, Hq=4, Hkv=2)
        out, lse = unbiased(inputs)
        stats, of_batch = torch.empty(2, len(lengths), 4, M), lengths_of(inputs)
        sinks = SinkInputs(inputs["sink_positions"], inputs["inter_sink_bias"])
        forward = (*(inputs[name] for name in "qkv"), out, lse, sinks, of_batch)
        backward = (out, out, sinks.positions, stats, lse, of_batch)
        options = SinkAttentionOptions(causal=N % 2 == 0, scale=SCALE)
        return [
            *recorded("", 90, launch_sink_attention_correction_fwd, *forward, options=options),
            *recorded("", 90, launch_sink_attention_correction_delta, *backward),
        ]

    first = compilations(17, 3, [17, 4, 2])
    for N, M, lengths in [(1, 1, [1]), (64, 16, [64, 16] * 8), (100, 50, [100, 60])]:
        assert compilations(N, M, lengths) == first

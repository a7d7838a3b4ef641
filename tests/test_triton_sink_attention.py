"""The Triton kernels of sink_attention against a full softmax in float64, on a GPU or by the interpreter."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from recattn.testing import measure_error
from recattn.triton_kernels.sink_attention import CorrectionConfig, launch_sink_attention_correction_fwd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
SCALE = 0.3


def random_inputs(N, M, *, B=2, Hq=2, Hkv=1, D=32, Dv=None, bias_heads=1, dtype=torch.float32, seq_lens=None) -> dict:
    """Sinks at random positions, each sequence with one less than the one before; the bias of ignored sinks is NaN."""
    seq_lens = torch.tensor([N] * B if seq_lens is None else seq_lens)
    sink_positions = torch.full((B, M), -1)
    bias = torch.randn(B, bias_heads, M, M)
    for b in range(B):
        sinks = torch.randperm(N)[: max(M - b, 0)].sort().values
        sink_positions[b, : len(sinks)] = sinks
        ignored = (sink_positions[b] < 0) | (sink_positions[b] >= seq_lens[b])
        bias[b].masked_fill_(ignored[:, None] | ignored, math.nan)
    inputs = {
        "q": torch.randn(B, Hq, N, D).to(dtype),
        "k": torch.randn(B, Hkv, N, D).to(dtype),
        "v": torch.randn(B, Hkv, N, Dv or D).to(dtype),
        "sink_positions": sink_positions,
        "bias": bias,
        "seq_lens": seq_lens,
    }
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def sinks_of(inputs: dict, b: int) -> Tensor:
    sinks = inputs["sink_positions"][b].long()
    return sinks[(sinks >= 0) & (sinks < inputs["seq_lens"][b])]


def softmax_attention(scores: Tensor, v: Tensor, seq_lens: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """out and lse; rows that see no key have zeros and -inf."""
    token = torch.arange(scores.shape[-1], device=scores.device)
    valid = token < seq_lens[:, None]  # [B, N]
    visible = valid[:, None, :] & valid[:, :, None]  # [B, N, N]
    if causal:
        visible = visible & (token <= token[:, None])
    scores = scores.masked_fill(~visible[:, None], -math.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()
    return weights.to(v.dtype) @ v.repeat_interleave(scores.shape[1] // v.shape[1], 1), lse


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return SCALE * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT


def biased_attention(inputs: dict, causal: bool) -> tuple[Tensor, Tensor]:
    """softmax(scale · Q Kᵀ + mask + β) V with β in full, in the inputs' dtype."""
    scores, bias = scores_of(inputs["q"], inputs["k"]), inputs["bias"]
    beta = torch.zeros_like(scores, dtype=bias.dtype)
    for b in range(len(beta)):
        sinks = sinks_of(inputs, b)
        beta[b, :, sinks[:, None], sinks] = bias[b, :, : len(sinks), : len(sinks)]
    return softmax_attention(scores + beta, inputs["v"], inputs["seq_lens"], causal)


def unbiased_attention(inputs: dict, causal: bool) -> tuple[Tensor, Tensor]:
    """As a fused attention leaves it: computed in float32, out in the inputs' dtype and lse in float32."""
    q, k, v = (inputs[name].float() for name in "qkv")
    out, lse = softmax_attention(scores_of(q, k), v, inputs["seq_lens"], causal)
    return out.to(inputs["q"].dtype), lse


def correct(inputs: dict, out: Tensor, lse: Tensor, causal: bool, config: CorrectionConfig | None = None) -> None:
    launch_sink_attention_correction_fwd(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        out,
        lse,
        inputs["sink_positions"],
        inputs["bias"],
        inputs["seq_lens"],
        causal=causal,
        scale=SCALE,
        config=config,
    )


def assert_corrects(inputs: dict, causal: bool, config: CorrectionConfig | None = None) -> tuple[Tensor, Tensor]:
    """The correction meets the error bound at the sink rows and touches no other."""
    base_out, base_lse = unbiased_attention(inputs, causal)
    out, lse = base_out.clone(), base_lse.clone()
    correct(inputs, out, lse, causal, config)
    low_out, low_lse = biased_attention(inputs, causal)
    promoted = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    ref_out, ref_lse = biased_attention(promoted, causal)
    finite = ref_lse.isfinite()
    assert torch.equal(lse.isneginf(), ~finite)
    eps = torch.finfo(out.dtype).eps
    errors = [
        measure_error("out", out, low_out, ref_out, eps),
        measure_error("lse", lse[finite], low_lse[finite], ref_lse[finite], eps),
    ]
    assert all(error.passed for error in errors), "\n".join(map(str, errors))
    for b in range(len(out)):
        others = torch.ones(out.shape[2], dtype=torch.bool, device=out.device).index_fill_(
            0, sinks_of(inputs, b), False
        )
        assert torch.equal(out[b][:, others], base_out[b][:, others])
        assert torch.equal(lse[b][:, others], base_lse[b][:, others])
    return out, lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, M", [(1, 0), (1, 1), (63, 20), (100, 1), (100, 100), (129, 40)])
def test_full_softmax(N, M, dtype, causal):
    assert_corrects(random_inputs(N, M, dtype=dtype), causal)


@pytest.mark.parametrize("Hq, Hkv, bias_heads", [(2, 2, 1), (2, 2, 2), (4, 1, 4)])
def test_heads(Hq, Hkv, bias_heads):
    assert_corrects(random_inputs(63, 30, B=1, Hq=Hq, Hkv=Hkv, bias_heads=bias_heads), causal=True)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged(dtype, causal):
    out, lse = assert_corrects(random_inputs(129, 129, B=4, Hq=1, dtype=dtype, seq_lens=[129, 0, 1, 64]), causal)
    assert (out[1] == 0).all() and lse[1].isneginf().all()


def test_no_seq_lens():
    inputs = random_inputs(100, 20)
    expected = unbiased_attention(inputs, causal=True)
    correct(inputs, *expected, causal=True)
    actual = unbiased_attention(inputs, causal=True)
    correct(inputs | {"seq_lens": None}, *actual, causal=True)
    assert all(map(torch.equal, actual, expected))


def some_suppressed(bias: Tensor) -> Tensor:
    return bias.masked_fill(bias > 0.5, -math.inf)


BIASES = {
    "30": lambda bias: 30 * bias,
    "-50": lambda bias: torch.full_like(bias, -50.0),
    "-50 and less": lambda bias: bias - 50,
    "-1.5": lambda bias: bias - 1.5,
    "+200": lambda bias: bias + 200,
    "200": lambda bias: 200 * bias,
    "some -inf": some_suppressed,
    "some -inf, others 30": lambda bias: 30 * some_suppressed(bias),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("M", [30, 63])
@pytest.mark.parametrize("bias", BIASES)
def test_bias_range(bias, M, causal):
    """Every token a sink: no key but the suppressed ones is left to carry a row."""
    inputs = random_inputs(63, M, B=1)
    inputs["bias"] = BIASES[bias](inputs["bias"])
    assert_corrects(inputs, causal)


@pytest.mark.parametrize("bias", ["-50", "200", "some -inf"])
def test_bias_range_float16(bias):
    inputs = random_inputs(63, 63, B=1, dtype=torch.float16)
    inputs["bias"] = BIASES[bias](inputs["bias"])
    assert_corrects(inputs, causal=True)


@pytest.mark.parametrize("causal", [False, True])
def test_no_mass(causal):
    """A sequence of sinks that suppress each other: zeros, not NaN."""
    inputs = random_inputs(63, 63, B=1)
    inputs["bias"].fill_(-math.inf)
    out, lse = assert_corrects(inputs, causal)
    assert (out == 0).all() and lse.isneginf().all()


@pytest.mark.parametrize("bias", [1e-12, -1e-12, 1e-6, 1e-3, 0.499, 0.501])
def test_small_bias_relative_accuracy(bias):
    """Correcting an output of zeros leaves Σ Δ v / z alone, which is then held to its own scale."""
    inputs = random_inputs(63, 63, B=1)
    inputs["bias"].fill_(bias)
    _, lse = unbiased_attention(inputs, causal=False)
    out = torch.zeros_like(inputs["q"])

    def correction_of_zeros(q, k, v, bias, lse):
        delta = (scores_of(q, k) - lse[..., None]).exp() * bias.expm1()
        return delta @ v.repeat_interleave(q.shape[1] // v.shape[1], 1) / (1 + delta.sum(-1, keepdim=True))

    tensors = [inputs["q"], inputs["k"], inputs["v"], inputs["bias"], lse]
    low, ref64 = correction_of_zeros(*tensors), correction_of_zeros(*(x.double() for x in tensors))
    correct(inputs, out, lse.clone(), causal=False)
    error = measure_error("out", out, low, ref64, torch.finfo(torch.float32).eps)
    assert error.passed, error


@pytest.mark.parametrize("D, Dv", [(16, 64), (64, 16), (50, 50), (100, 24), (256, 256)])
@pytest.mark.parametrize("suppressed", [False, True])
def test_head_dims(D, Dv, suppressed):
    inputs = random_inputs(40, 40, B=1, D=D, Dv=Dv)
    if suppressed:
        inputs["bias"] -= 50
    assert_corrects(inputs, causal=True)


def strided_copy(x: Tensor) -> Tensor:
    """The same values with the axes reversed in memory and NaN, or the largest integer, between them."""
    gap = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    memory = x.new_full((*x.shape[::-1][:-1], 3 * x.shape[0]), gap)
    view = memory[..., ::3].permute(*reversed(range(x.dim())))
    return view.copy_(x)


@pytest.mark.parametrize("suppressed", [False, True])
def test_non_contiguous(suppressed):
    inputs = random_inputs(63, 40, bias_heads=2)
    if suppressed:
        inputs["bias"] -= 50
    expected = unbiased_attention(inputs, causal=True)
    strided = [strided_copy(x) for x in expected]
    correct(inputs, *expected, causal=True)
    correct({name: strided_copy(x) for name, x in inputs.items()}, *strided, causal=True)
    assert all(map(torch.equal, strided, expected))


def test_int32_indices():
    inputs = random_inputs(63, 40, seq_lens=[63, 30])
    narrow = inputs | {name: inputs[name].int() for name in ("sink_positions", "seq_lens")}
    expected, actual = (unbiased_attention(inputs, causal=True) for _ in range(2))
    correct(inputs, *expected, causal=True)
    correct(narrow, *actual, causal=True)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("block_m, block_n, block_k", [(16, 16, 16), (32, 16, 64), (16, 64, 32), (64, 64, 16)])
def test_any_tile(block_m, block_n, block_k):
    inputs = random_inputs(100, 70, B=1)
    inputs["bias"] = BIASES["-50"](inputs["bias"]) + 60 * inputs["bias"]
    assert_corrects(inputs, causal=True, config=CorrectionConfig(block_m, block_n, block_k, num_warps=4, num_stages=1))


def test_bitwise_equal_reruns():
    inputs = random_inputs(100, 100)
    inputs["bias"] *= 30
    runs = [unbiased_attention(inputs, causal=True) for _ in range(2)]
    for out, lse in runs:
        correct(inputs, out, lse, causal=True)
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("empty", [{"B": 0}, {"N": 0, "M": 0}, {"Dv": 0}])
def test_nothing_to_do(empty):
    inputs = random_inputs(**({"N": 4, "M": 2, "seq_lens": None} | empty))
    correct(inputs, *unbiased_attention(inputs, causal=True), causal=True)

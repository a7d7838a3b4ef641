"""inter_sink_bias in C++ against the reference. Tests of all kernels: tests/ops/test_inter_sink_bias.py."""

import functools
import math

import pytest
import torch
from torch import Tensor

from recattn import inter_sink_bias, reference
from recattn._extension import MISSING
from recattn.ops.inter_sink_bias import unsupported_reasons
from recattn.testing import assert_matches_reference

pytestmark = pytest.mark.skipif("cpu" in MISSING, reason="needs the compiled extension")
cpu = functools.partial(inter_sink_bias, impl="cpu")
GRADS = ("q_s", "k_s")
HALF = (torch.bfloat16, torch.float16)


def draw(sinks, dim=16, batch=4, heads=3, dtype=torch.float32, **options) -> dict[str, object]:
    """Sequences with all of their sinks, with gaps between them, padded on either side, and without any."""
    mask = torch.ones(batch, sinks, dtype=torch.bool)
    for b in range(1, batch):
        padded = torch.arange(sinks) < sinks // 2
        mask[b] = [torch.rand(sinks) < 0.7, padded, ~padded, torch.tensor(False)][b % 4]
    q_s, k_s = (torch.randn(batch, heads, sinks, dim, dtype=dtype) for _ in range(2))
    return {"q_s": q_s, "k_s": k_s, "sink_mask": mask, "bias_scale": torch.tensor(1.5)} | options


def check(inputs: dict[str, object]) -> None:
    assert_matches_reference(cpu, reference.inter_sink_bias, inputs, grads=GRADS)


def run(inputs: dict[str, object], names: tuple[str, ...] = (*GRADS, "bias_scale")) -> list[Tensor]:
    """The output and the gradients."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    out = cpu(**inputs | leaves)
    incoming = torch.linspace(-1, 2, out.numel()).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), incoming)]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sinks, dim", [(1, 1), (2, 3), (15, 50), (47, 16), (49, 64), (97, 65), (130, 8)])
def test_error(sinks, dim, causal):
    """One, two and three blocks of rows; head dims below, at and beside whole registers."""
    check(draw(sinks, dim, batch=5, causal=causal))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("sinks, dim", [(7, 5), (49, 64), (100, 50)])
def test_half_precision(sinks, dim, dtype):
    for causal in (False, True):
        check(draw(sinks, dim, dtype=dtype, causal=causal))


def test_without_mask_and_with_a_scale():
    check(draw(60) | {"sink_mask": None, "bias_scale": -10.0, "scale": 0.7})
    check(draw(60, scale=40.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_dtypes_of_bias_scale(dtype):
    inputs = draw(21)
    out, *_, dbias_scale = run(inputs | {"bias_scale": torch.full((1,), 2.0, dtype=dtype)})
    expected, *_, gradient = run(inputs | {"bias_scale": torch.tensor(2.0)})
    assert dbias_scale.dtype == dtype and dbias_scale.shape == (1,)
    torch.testing.assert_close(dbias_scale.float()[0], gradient, rtol=1e-2, atol=1e-2)
    assert_same_bits([out], [expected])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_views(dtype, causal):
    """Heads behind tokens, a cut last axis, and a last axis that is not contiguous, which alone is copied."""
    inputs = draw(33, 20, dtype=dtype, causal=causal)
    expected = run(inputs)
    for view in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.nn.functional.pad(x, (3, 5), value=math.nan)[..., 3:-5],
        lambda x: x.mT.contiguous().mT,
    ):
        views = {name: view(inputs[name]) for name in GRADS}
        views["sink_mask"] = inputs["sink_mask"].T.contiguous().T
        assert_same_bits(run(inputs | views), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_masked_sinks_reach_nothing(causal):
    clean = draw(101, 24, batch=5, causal=causal)
    masked = ~clean["sink_mask"][:, None, :, None]
    dirty = {name: clean[name].masked_fill(masked, math.nan) for name in GRADS}
    results = run(clean)
    assert_same_bits(run(clean | dirty), results)
    assert not results[0].masked_select(masked | masked.mT).any()
    for gradient in results[1:3]:
        assert not gradient.masked_select(masked).any()


def test_a_sequence_never_sees_another():
    """One full of NaN changes nothing, nor does the scratch memory that it leaves."""
    inputs = draw(55, batch=6, causal=True)
    expected = run(inputs, GRADS)
    dirty = {name: inputs[name].clone() for name in GRADS}
    for x in dirty.values():
        x[::2] = math.nan
    assert_same_bits([x[1::2] for x in run(inputs | dirty, GRADS)], [x[1::2] for x in expected])


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.3}], ids=str)
def test_threads_change_no_bit(options):
    inputs = draw(101, 64, batch=7, heads=8, **options)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        torch.manual_seed(5)
        results.append(run(inputs))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert_same_bits(others, results[0])


def test_dropout_keeps_the_mean():
    """More than 128 sinks, which no Triton kernel takes."""
    inputs = draw(150, batch=3, heads=2)
    dropped = torch.stack([cpu(**inputs, dropout_p=0.25) for _ in range(400)])
    expected = cpu(**inputs)
    seen = expected > 0
    assert ((dropped.mean(0) / expected)[seen] - 1).abs().mean() < 0.03
    assert ((dropped == 0) & seen).float().sum() / (400 * seen.sum()) < 0.25**2 + 0.01


def test_what_is_served():
    assert unsupported_reasons("cpu", draw(300)["q_s"])["cpu"] is None
    with pytest.raises(NotImplementedError, match="cannot run impl='cpu' here: it computes in float32"):
        cpu(**draw(5, dtype=torch.float64))
    assert inter_sink_bias(**draw(5, dtype=torch.float64)).dtype == torch.float64
    assert "for a CPU" in unsupported_reasons("cuda")["cpu"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k_s": torch.zeros(4, 3, 5, 15)}, r"k_s must be \[B, H, M, D\] = \[4, 3, 5, 16\], got \[4, 3, 5, 15\]"),
        ({"k_s": torch.zeros(4, 3, 5, 16).half()}, "k_s must have the dtype of q_s, float32, got float16"),
        ({"sink_mask": torch.ones(4, 6).bool()}, r"sink_mask must be \[B, M\] = \[4, 5\], got \[4, 6\]"),
        ({"sink_mask": torch.ones(4, 5).long()}, "sink_mask must be .*got int64"),
        ({"bias_scale": torch.ones(2)}, "bias_scale must have one element, got 2"),
    ],
)
def test_operators_refuse_what_does_not_fit(changes, message):
    tensors = draw(5) | changes
    with pytest.raises(ValueError, match=message):
        torch.ops.recattn.inter_sink_bias_cpu_fwd(*tensors.values(), None, 1.0, False, 0.0, None)

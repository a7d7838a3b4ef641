"""Inputs whose elements share memory, such as sliding windows and expanded tensors: every kernel reads them right."""

import pytest
import torch
from torch import Tensor

import recattn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="on a CPU")
# Of [2, 2, N, 4], and N.
STRIDES = [((32, 1, 4, 1), 8), ((1, 1, 1, 1), 8), ((22, 11, 1, 1), 3), ((64, 32, 3, 1), 8), ((0, 0, 4, 1), 3)]
POSITIONS = torch.tensor([[1, 2], [0, -1]])


def overlapping(strides: tuple[int, ...], n: int) -> Tensor:
    storage = torch.randn(sum((size - 1) * stride for size, stride in zip((2, 2, n, 4), strides, strict=True)) + 1)
    return storage.to(DEVICE).as_strided((2, 2, n, 4), strides)


def sink_attention(q, k, v, **options):
    bias = torch.linspace(-1, 1, 8, device=q.device).view(2, 1, 2, 2)
    return recattn.sink_attention(q, k, v, POSITIONS.to(q.device), bias, causal=True, **options)


def refined_attention(q, k, v, **options):
    w = torch.linspace(-0.3, 0.3, 32, device=q.device, dtype=q.dtype).view(8, 4)
    return recattn.refined_attention(q, k, v, w, w.flip(0), **options)


def wasserstein_attention(q, k, v, **options):
    return recattn.wasserstein_attention(q, v.square() + 0.1, k, q.square() + 0.1, v, k.square(), **options)


def inter_sink_bias(q, k, v, **options):
    return recattn.inter_sink_bias(q, k, **options) + recattn.inter_sink_bias(v, v, **options)


def lrea_attention(q, k, v, **options):
    w_decomp = torch.linspace(-1, 1, 7 * k.shape[2], device=q.device, dtype=q.dtype).view(k.shape[2], 7)
    return recattn.lrea_attention(q[:, :, 0], k, v, w_decomp, torch.tensor([0, 1, 2], device=q.device), **options)


def lrea_compress(q, k, v, **options):
    return recattn.lrea_compress(q[0], k[0, 0], **options) + recattn.lrea_compress(v[0], k[0, 0], **options)


@pytest.mark.parametrize("strides, n", STRIDES, ids=str)
@pytest.mark.parametrize(
    "operator, impl",
    [
        pytest.param(sink_attention, "cpu", marks=ON_CPU),
        (sink_attention, "triton"),
        pytest.param(refined_attention, "cpu", marks=ON_CPU),
        (refined_attention, "triton"),
        pytest.param(wasserstein_attention, "cpu", marks=ON_CPU),
        (wasserstein_attention, "triton"),
        pytest.param(inter_sink_bias, "cpu", marks=ON_CPU),
        (inter_sink_bias, "triton"),
        pytest.param(lrea_attention, "cpu", marks=ON_CPU),
        (lrea_attention, "triton"),
        pytest.param(lrea_compress, "cpu", marks=ON_CPU),
        (lrea_compress, "triton"),
    ],
)
def test_overlapping_inputs(operator, impl, strides, n):
    """Outputs and gradients equal those of contiguous copies, also for overlapping incoming gradients."""
    if impl == "triton":
        pytest.importorskip("triton")
    tensors, incoming = ([overlapping(strides, n) for _ in range(count)] for count in (3, 2))

    def run(layout):
        leaves = [layout(x).detach().requires_grad_() for x in tensors]
        outs = operator(*leaves, impl=impl)
        outs = outs if isinstance(outs, tuple) else (outs,)
        douts = [
            layout(x) if x.shape == out.shape else torch.ones_like(out) for x, out in zip(incoming, outs, strict=False)
        ]
        return [*outs, *torch.autograd.grad(outs, leaves, douts)]

    for actual, expected in zip(run(lambda x: x), run(Tensor.contiguous), strict=True):
        torch.testing.assert_close(actual, expected)

"""The attentions that the correction path stands on, on a GPU: their numbers, layouts and determinism."""

import pytest
import torch

from recattn.ops._support import token_major
from recattn.ops.backends import BACKENDS, AttentionBackend, Call
from tests.helpers.backend_checks import check, draw

# --- On a GPU ---


def or_skip(backend: AttentionBackend, q, k, v, *, causal: bool, **options) -> None:
    reason = backend.unsupported_reason(Call.of(q, k, v, **options))
    if reason is not None:
        pytest.skip(reason)


def on_gpu(backend: AttentionBackend, *drawn, causal: bool, dim: int, **more) -> None:
    """Check a backend against the reference: as it is, and with a logit in each softmax and rows left out."""
    (q, k, v), options = draw(*drawn, device="cuda", **more)
    options |= {"causal": causal, "scale": dim**-0.5}
    or_skip(backend, q, k, v, **options)
    check(backend, q, k, v, **options)
    rows = q.shape[:-1]
    left_out = torch.rand(rows, device="cuda") < 0.2
    check(backend, q, k, v, **options, sink_logits=2 * torch.randn(q.shape[1], device="cuda"), left_out=left_out)


def groups_on_gpu(name: str) -> list[tuple[int, int]]:
    return [(4, 4)] if name == "efficient" else [(4, 4), (4, 2), (4, 1)]


def every_kind(test):
    """Parametrize over every backend, half-precision dtype and usual head dim."""
    for name, values in (
        ("name", BACKENDS),
        ("dtype", [torch.bfloat16, torch.float16]),
        ("dim", [64, 128]),
        ("causal", [False, True]),
    ):
        test = pytest.mark.parametrize(name, values)(test)
    return pytest.mark.gpu(test)


@every_kind
def test_dense_on_gpu(name, dtype, dim, causal):
    same = {"causal": causal, "dim": dim, "dims": (dim, dim), "dtype": dtype}
    for heads in groups_on_gpu(name):
        for layout in ("heads first", "tokens first", "sliced"):
            on_gpu(BACKENDS[name], layout, (3, 129), heads=heads, **same)
    for length in (2, 63, 100, 192, 448):
        on_gpu(BACKENDS[name], "tokens first", (3, length), **same)


@every_kind
def test_packed_on_gpu(name, dtype, dim, causal):
    same = {"causal": causal, "dim": dim, "dims": (dim, dim), "dtype": dtype}
    for heads in groups_on_gpu(name):
        for lengths in [(100, 0, 63, 1, 129, 0), (448, 64)]:
            on_gpu(BACKENDS[name], "packed", lengths, heads=heads, **same)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("layout, lengths", [("tokens first", (3, 1)), ("packed", (0, 1)), ("packed", (1, 0, 1, 1))])
def test_single_tokens_on_gpu(layout, lengths, name):
    for heads in groups_on_gpu(name):
        on_gpu(BACKENDS[name], layout, lengths, causal=True, dim=64, heads=heads, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("layout, lengths", [("heads first", (3, 129)), ("packed", (100, 0, 63, 1))])
@pytest.mark.parametrize(
    "dims, dtype",
    [
        ((64, 32), torch.bfloat16),
        ((32, 64), torch.bfloat16),
        ((40, 40), torch.bfloat16),
        ((96, 96), torch.bfloat16),
        ((192, 192), torch.bfloat16),
        ((256, 256), torch.bfloat16),
        ((64, 64), torch.float32),
        ((20, 36), torch.float32),
    ],
)
@pytest.mark.parametrize("name", BACKENDS)
def test_other_dims_on_gpu(name, dims, dtype, layout, lengths):
    on_gpu(BACKENDS[name], layout, lengths, causal=True, dim=dims[0], dims=dims, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_misaligned_on_gpu(name):
    on_gpu(BACKENDS[name], "misaligned", (3, 129), causal=True, dim=64, dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_large_scores_on_gpu(name):
    """lse far below and above 0, so that its exponential would overflow."""
    for offset in (-8.0, 8.0):
        (q, k, v), _ = draw("tokens first", (2, 192), dtype=torch.bfloat16, device="cuda")
        q, k = q.clone(), k.clone()
        q[..., 0], k[..., 0] = 16.0, offset
        options = {"causal": True, "scale": 1.0}
        or_skip(BACKENDS[name], q, k, v, **options)
        left_out = torch.rand(q.shape[:-1], device="cuda") < 0.2
        check(BACKENDS[name], q, k, v, **options, left_out=left_out)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BACKENDS)
def test_layouts_of_dout_on_gpu(name):
    """Two calls differ in the layout of dout only: what a backend caches for one must not serve the other."""
    (q, k, v), _ = draw("heads first", (3, 129), dtype=torch.bfloat16, device="cuda")
    options = {"causal": True, "scale": 0.125}
    or_skip(BACKENDS[name], q, k, v, **options)
    for swap in (False, True, False):
        check(BACKENDS[name], q, k, v, **options, swap=swap)


@pytest.mark.gpu
@pytest.mark.parametrize("ours", [False, True], ids=["dout like q", "dout transposed"])
@pytest.mark.parametrize("theirs", [False, True], ids=["SDPA's like q", "SDPA's transposed"])
def test_cudnn_plans_of_others_on_gpu(theirs, ours):
    """PyTorch caches backward plans by a key without dout's strides: ours must not reuse a plan of SDPA.

    Each case has its own length, because plans live as long as the process.
    """
    (q, k, v), _ = draw("heads first", (2, 136 + 16 * theirs + 32 * ours), dtype=torch.bfloat16, device="cuda")
    options = {"causal": True, "scale": 0.125}
    or_skip(BACKENDS["cudnn"], q, k, v, **options)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.125)
    dout = torch.randn_like(out)
    torch.autograd.grad(out, leaves, token_major(dout) if theirs else dout)
    check(BACKENDS["cudnn"], q, k, v, **options, swap=ours)


@pytest.mark.gpu
@pytest.mark.parametrize("layout, lengths", [("tokens first", (3, 448)), ("packed", (100, 0, 448, 1))])
@pytest.mark.parametrize("name", BACKENDS)
def test_determinism_on_gpu(name, layout, lengths):
    torch.use_deterministic_algorithms(True)
    (q, k, v), options = draw(layout, lengths, dtype=torch.bfloat16, device="cuda")
    options |= {"causal": True, "scale": 0.125}
    or_skip(BACKENDS[name], q, k, v, **options)
    out, lse = BACKENDS[name].forward(q, k, v, **options)
    first = BACKENDS[name].backward(out, q, k, v, out, lse, **options)
    for _ in range(10):
        again = BACKENDS[name].backward(out, q, k, v, out, lse, **options)
        assert all(a.equal(b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("layout, lengths", [("tokens first", (3, 129)), ("packed", (100, 0, 63, 1))])
@pytest.mark.parametrize("name", BACKENDS)
def test_no_synchronisation_on_gpu(name, layout, lengths):
    (q, k, v), options = draw(layout, lengths, dtype=torch.bfloat16, device="cuda")
    options |= {"causal": True, "scale": 0.125}
    or_skip(BACKENDS[name], q, k, v, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = BACKENDS[name].forward(q, k, v, **options)
        BACKENDS[name].backward(out, q, k, v, out, lse, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")

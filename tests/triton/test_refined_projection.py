"""The projection A W of raw attention logits, on a GPU or by Triton's interpreter, against float64."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from recattn.ops.refined_attention.triton_long import (
    RefinedProjectionFunction,
    refined_projection_bwd,
    refined_projection_fwd,
)
from recattn.reference.sink_attention import valid_tokens, visible_pairs, window_starts
from recattn.testing import assert_matches_reference
from recattn.triton_kernels.common.ragged import NO_LENGTHS
from recattn.triton_kernels.refined_attention import projection as kernels
from tests.compile_table.compilation import meta, recorded
from tests.helpers.memory import LargestTensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
GRADS = ["q", "k", "w"]


def draw(b=2, h=1, n=63, d=16, p=24, n_max=None, per_head=False, dtype=torch.float32) -> dict:
    shapes = {"q": (b, h, n, d), "k": (b, h, n, d), "w": (*([h] if per_head else []), n_max or n, p)}
    return {name: torch.randn(shape, device=DEVICE).to(dtype) for name, shape in shapes.items()}


def by_triton(q, k, w, seq_lens=None, seq_starts=None, cu_seqlens=None, causal=True, padding_side="right", scale=None):
    seq_starts = window_starts(padding_side, q.shape[-2], seq_lens, seq_starts)
    return RefinedProjectionFunction.apply(q, k, w, seq_lens, seq_starts, cu_seqlens, (causal, scale, None))


def in_full(q, k, w, seq_lens=None, seq_starts=None, cu_seqlens=None, causal=True, padding_side="right", scale=None):
    if cu_seqlens is not None:
        sequences = [[q[s:e].transpose(0, 1)[None], k[s:e].transpose(0, 1)[None]] for s, e in pairwise(cu_seqlens)]
        return torch.cat([in_full(*x, w, causal=causal, scale=scale)[0].transpose(0, 1) for x in sequences])
    n = q.shape[2]
    valid = valid_tokens(q.shape[0], n, seq_lens, window_starts(padding_side, n, seq_lens, seq_starts), q.device)
    q, k = (x.masked_fill(~valid[:, None, :, None], 0) for x in (q, k))
    a = (1 / math.sqrt(q.shape[3]) if scale is None else scale) * (q @ k.mT)
    return a.masked_fill(~visible_pairs(valid, causal), 0) @ w[..., :n, :]


def check(inputs: dict) -> None:
    assert_matches_reference(by_triton, in_full, inputs, grads=GRADS)


def with_gradients(inputs: dict) -> list[Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in GRADS}
    x = by_triton(**{**inputs, **leaves})
    torch.manual_seed(7)
    return [x.detach(), *torch.autograd.grad(x, list(leaves.values()), torch.randn_like(x))]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 63, 100, 129])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, n, causal):
    """129 positions are three segments."""
    check({**draw(b=1, n=n, n_max=n + 3, dtype=dtype), "causal": causal})


def test_several_boundaries():
    check({**draw(b=1, n=200, p=14, dtype=torch.float16), "scale": -0.7})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padded(padding_side, causal, dtype):
    lengths = torch.tensor([70, 0, 37, 1], dtype=torch.int32, device=DEVICE)
    inputs = draw(b=4, n=70, per_head=causal, dtype=dtype)
    check({**inputs, "seq_lens": lengths, "padding_side": padding_side, "causal": causal})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_and_packed(dtype, causal):
    """Windows that begin anywhere, and packed sequences of up to three segments: rows of W count from their starts."""
    starts, lengths = (torch.tensor(x, device=DEVICE) for x in ([3, 70, 30, 65], [60, 0, 37, 1]))
    inputs = draw(b=4, n=70, per_head=causal, dtype=dtype)
    check({**inputs, "seq_lens": lengths, "seq_starts": starts, "causal": causal})
    cu_seqlens = torch.tensor([0, 70, 70, 71, 200], dtype=torch.int32, device=DEVICE)
    tensors = {name: torch.randn(200, 2, 16, device=DEVICE).to(dtype) for name in ("q", "k")}
    w = draw(h=2, n=140, per_head=causal, dtype=dtype)["w"]
    check({**tensors, "w": w, "cu_seqlens": cu_seqlens, "causal": causal})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("d, p", [(8, 3), (136, 20), (72, 300)])
def test_widths(d, p, causal, monkeypatch):
    """Dot products of several blocks of components, outputs of several blocks of columns."""
    monkeypatch.setattr(kernels, "segment_length", lambda *_: 64)
    check({**draw(b=1, n=70, d=d, p=p, dtype=torch.float16), "causal": causal})


@pytest.mark.parametrize("programs", [1, 3, 512])
@pytest.mark.parametrize("per_head", [True, False])
def test_the_sum_over_sequences_is_shared_out(per_head, programs, monkeypatch):
    monkeypatch.setattr(kernels, "FULL_GRID", programs)
    inputs = draw(b=5, h=2, n=20, p=8, per_head=per_head)
    check({**inputs, "seq_lens": torch.tensor([20, 3, 0, 11, 19], device=DEVICE)})


@pytest.mark.parametrize("block_m, block_n", [(32, 64), (64, 16)])
def test_any_tile(block_m, block_n, monkeypatch):
    config = kernels.RefinedProjectionConfig(block_m, block_n, 16, 16, num_warps=4, num_stages=1)
    monkeypatch.setattr(kernels.RefinedProjectionConfig, "of_product", lambda *_: config)
    monkeypatch.setattr(kernels.RefinedProjectionConfig, "of_states", lambda *_: config)
    lengths = torch.tensor([70, 66], device=DEVICE)
    check({**draw(n=70, dtype=torch.float16), "seq_lens": lengths, "padding_side": "left"})


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_may_hold_anything(padding_side, causal):
    n, lengths = 70, (67, 5, 0)
    inputs = {**draw(b=3, n=n, n_max=n + 5, dtype=torch.float16), "seq_lens": torch.tensor(lengths, device=DEVICE)}
    dirty = {name: inputs[name].clone() for name in GRADS}
    dirty["w"][n:] = math.nan
    padding = [slice(length, n) if padding_side == "right" else slice(0, n - length) for length in lengths]
    for b, rows in enumerate(padding):
        dirty["q"][b, :, rows] = math.inf
        dirty["k"][b, :, rows] = math.nan
    options = {"padding_side": padding_side, "causal": causal}
    clean, actual = (with_gradients({**inputs, **values, **options}) for values in ({}, dirty))
    assert all(map(torch.equal, clean, actual))
    for b, rows in enumerate(padding):
        assert not any(x[b, :, rows].any() for x in actual[:3])
    assert not actual[3][n:].any()


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_incoming_gradients_of_padding_are_ignored(padding_side):
    inputs = draw(n=70, dtype=torch.float16)
    seq_lens = torch.tensor([66, 3], device=DEVICE)
    seq_starts = window_starts(padding_side, 70, seq_lens)
    arguments = (*inputs.values(), seq_lens, seq_starts, None, True, None, None)
    valid = valid_tokens(2, 70, seq_lens, seq_starts, torch.device(DEVICE))[:, None, :, None]
    dx = torch.randn(2, 1, 70, 24, device=DEVICE).half()
    clean, dirty = (refined_projection_bwd(dx.masked_fill(~valid, value), *arguments) for value in (0, math.nan))
    assert all(map(torch.equal, clean, dirty))


def test_views_that_are_not_contiguous():
    inputs = draw(b=1, h=2, n=70, p=12, dtype=torch.float16)
    views = {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.randn(1, 2, 16, 70, device=DEVICE).half().mT,
        "w": torch.randn(12, 140, device=DEVICE).half().T[::2],
    }
    check({**inputs, **views})
    dx = torch.randn(1, 70, 2, 12, device=DEVICE).half().transpose(1, 2)
    arguments = (*inputs.values(), None, None, None, True, None, None)
    strided, dense = (refined_projection_bwd(x, *arguments) for x in (dx, dx.contiguous()))
    assert all(map(torch.equal, strided, dense))


def test_reruns_agree_to_the_bit():
    inputs = draw(b=3, n=70, dtype=torch.float16)
    assert all(map(torch.equal, with_gradients(inputs), with_gradients(inputs)))


@pytest.mark.parametrize("sizes", [{"b": 0}, {"h": 0}, {"n": 0, "n_max": 4}])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
def test_nothing_to_do(sizes, causal, per_head):
    results = with_gradients({**draw(**sizes, per_head=per_head), "causal": causal})
    assert not any(x.any() for x in results)


def test_memory_is_linear_in_the_positions():
    inputs = draw(b=1, n=512, d=8, p=8, dtype=torch.float16)
    arguments = (*inputs.values(), None, None, None, True, None, None)
    with LargestTensor() as largest:
        refined_projection_bwd(refined_projection_fwd(*arguments), *arguments)
    assert largest.elements <= 512 * 8 * 8  # partial sums of dW


@pytest.mark.parametrize("per_head", [True, False])
def test_opcheck(per_head):
    lengths = torch.tensor([18, 7], device=DEVICE) if per_head else None
    starts = None if lengths is None else 19 - lengths
    arguments = (*draw(h=2, n=20, n_max=22, per_head=per_head).values(), lengths, starts, None, per_head, None, None)
    operators = torch.ops.recattn
    torch.library.opcheck(operators.refined_projection_fwd.default, arguments)
    dx = torch.randn(2, 2, 20, 24, device=DEVICE)
    torch.library.opcheck(operators.refined_projection_bwd.default, (dx, *arguments))


def signatures(b: int, n: int) -> list:
    """What the launches of these sizes compile for."""
    q, x = (meta(b, 8, n, width, dtype=torch.bfloat16) for width in (64, 128))
    w = meta(n, 128, dtype=torch.bfloat16).expand_as(x)
    batch = kernels.Batch(b, n, NO_LENGTHS, causal=True)
    states, partials = meta(b * 8, n // 128, 64, 128, dtype=torch.bfloat16), meta(b, 1, n, 128)
    group = kernels.Group(8, b * 8, 8, b)

    def launch() -> None:
        kernels.launch_states(q, w, batch)
        kernels.launch_product(q, q, x, states, partials, batch, 1 / n, reversed=True, summed_over=group)

    return [(c.kernel, c.signature, c.constexprs) for c in recorded("", 90, launch)]


def test_no_recompile_for_other_sizes():
    first, *others = (signatures(*sizes) for sizes in [(8, 4096), (1, 513), (16, 333), (3, 129)])
    assert len(first) == 2 and all(other == first for other in others)

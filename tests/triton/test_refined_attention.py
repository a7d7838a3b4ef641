"""The Triton kernels of refined_attention, on a GPU or by Triton's interpreter, against the reference in float64."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

import recattn
from recattn import reference
from recattn._options import RefinedAttentionOptions
from recattn.ops.refined_attention.triton_short import unsupported_reason
from recattn.reference.sink_attention import window_starts
from recattn.testing import assert_matches_reference
from recattn.triton_kernels.common.dropout import NO_DROPOUT, Dropout, dropout_weights
from recattn.triton_kernels.common.launch import ARCHITECTURES
from recattn.triton_kernels.common.ragged import NO_LENGTHS, Lengths, as_lengths
from recattn.triton_kernels.refined_attention import (
    batch_sizes,
    launch_refined_attention_bwd,
    launch_refined_attention_fwd,
    launch_weights_bwd,
    launch_weights_product,
    short_backward,
    short_weights,
)
from recattn.triton_kernels.refined_attention.config import RefinedAttentionConfig, StageConfig, TileConfig, largest_n
from tests.compile_table.compilation import meta, recorded
from tests.helpers.interpreted import DEVICE, DTYPES, with_dtypes

MECHANISMS = ("simple", "value", "additive")
SOURCES = ("logits", "weights")
TENSORS = ("q", "k", "v", "w_q", "w_k", "w_v")
LENGTHS = (1, 16, 32, 50, 63, 100, 128)


class Launched(torch.autograd.Function):
    """The launchers as one differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, w_q, w_k, w_v, lengths, options, launch):
        ctx.positions = batch_sizes(q, lengths, options)[2]
        squares = launch_weights_product(w_q, w_k, w_v, ctx.positions)
        ctx.weights, ctx.arguments, ctx.launch = (w_q, w_k, w_v), (q, k, v, squares, w_v, lengths, options), launch
        return launch_refined_attention_fwd(*ctx.arguments, **launch)

    @staticmethod
    def backward(ctx, dout):
        grads = launch_refined_attention_bwd(dout, *ctx.arguments, **ctx.launch)
        dweights = launch_weights_bwd(*ctx.weights, grads.dg, grads.dw_v, ctx.positions)
        return grads.dq, grads.dk, grads.dv, *dweights, *([None] * (6 - len(dweights)))


@pytest.fixture(autouse=True)
def several_launches_of_the_backward(monkeypatch):
    """The interpreter's batches are small."""
    if DEVICE == "cpu":
        monkeypatch.setattr(short_backward, "pairs_per_launch", lambda q, N, groups: 3)


def launched(
    q,
    k,
    v,
    w_q,
    w_k,
    w_v=None,
    *,
    mechanism="simple",
    source="logits",
    causal=True,
    scale=None,
    dropout=NO_DROPOUT,
    config=None,
    **lengths,
):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    options = RefinedAttentionOptions(mechanism, source, causal, scale, max_seqlen=w_q.shape[-2])
    launch = {"dropout": dropout, "config": config}
    return Launched.apply(q, k, v, w_q, w_k, w_v, kernel_lengths(q, **lengths), options, launch)


def kernel_lengths(q, seq_lens=None, seq_starts=None, padding_side="right", cu_seqlens=None) -> Lengths:
    return as_lengths(seq_lens, window_starts(padding_side, q.shape[-2], seq_lens, seq_starts), cu_seqlens)


def draw(mechanism="simple", b=2, h=1, n=20, d=16, dv=None, r=None, n_max=None, per_head=(), dtype=torch.float32):
    """q, k, v and the matrices; `per_head` names the matrices of which each head has its own.

    Scores stay moderate: in a row of large ones the largest error would be the luck of its own rounding.
    """
    n_max, r = n if n_max is None else n_max, n if r is None else r
    columns = {"w_q": r, "w_k": r} | ({} if mechanism == "simple" else {"w_v": n_max})
    inputs = {name: torch.randn(b, h, n, width) for name, width in (("q", d), ("k", d), ("v", dv or d))}
    for name, width in columns.items():
        inputs[name] = torch.randn(*([h] if name in per_head else []), n_max, width) / (2 * max(n, 1) ** 0.5)
    return {name: x.to(DEVICE, dtype) for name, x in inputs.items()} | {"mechanism": mechanism}


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def gradients(function, inputs: dict) -> list[Tensor]:
    """The output and every gradient, for an incoming gradient that differs between entries."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in TENSORS if name in inputs}
    out = function(**{**inputs, **leaves})
    incoming = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), incoming)]


def check(inputs: dict, expected=reference.refined_attention) -> None:
    assert_matches_reference(launched, expected, inputs, grads=[name for name in TENSORS if name in inputs])


# --- Against the reference ---


@pytest.mark.parametrize("mechanism, source, causal, dtype", with_dtypes(MECHANISMS, SOURCES, [True, False]), ids=str)
def test_error(mechanism, source, causal, dtype):
    """Padding, R apart from N, Nmax above it, several launches of the backward."""
    inputs = draw(mechanism, b=3, h=2, n=27, d=24, dv=20, r=30, n_max=37, dtype=dtype)
    side = "left" if causal else "right"
    check({**inputs, "source": source, "causal": causal, "seq_lens": lengths(27, 0, 19), "padding_side": side})


@pytest.mark.parametrize(
    "n, mechanism, dtype",
    [
        (n, MECHANISMS[(i + turn) % len(MECHANISMS)], dtype)
        for turn, dtype in enumerate(DTYPES)
        for i, n in enumerate(LENGTHS)
        if n <= largest_n(dtype, 90)
    ],
    ids=str,
)
def test_lengths(n, mechanism, dtype):
    """The mechanisms in turn: `test_error` and `test_more_than_64_tokens` have them all."""
    check(draw(mechanism, b=1, n=n, dtype=dtype))


@pytest.mark.parametrize("source, causal, side", [("logits", True, "left"), ("weights", False, "right")])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_blocks_of_rows(mechanism, source, causal, side):
    """Longer sequences: one program per block of rows, and a backward of three launches."""
    stages = tuple(StageConfig(16, 16, 4, stage) for stage in (1, 2, 3))
    config = RefinedAttentionConfig(TileConfig(16, 16, 4), stages)
    inputs = draw(mechanism, b=2, h=2, n=27, d=24, dv=20, per_head=("w_k",))
    seq_lens = lengths(27, 19) if causal else lengths(19, 0)
    inputs |= {"source": source, "causal": causal, "seq_lens": seq_lens, "padding_side": side}
    kernel = functools.partial(launched, config=config)
    grads = [name for name in TENSORS if name in inputs]
    assert_matches_reference(kernel, reference.refined_attention, inputs, grads=grads)


@pytest.mark.parametrize("source, causal, side", [("logits", True, "left"), ("weights", False, "right")])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_more_than_64_tokens(mechanism, source, causal, side):
    """All rows in one program, and with "simple" a backward of one launch."""
    inputs = draw(mechanism, b=3, n=70, d=32, dv=20, dtype=torch.float16)
    check({**inputs, "source": source, "causal": causal, "seq_lens": lengths(70, 0, 41), "padding_side": side})


def packed(mechanism: str, lengths: list[int], dtype: torch.dtype, **sizes) -> dict:
    """Packed sequences; with matrices for up to 3 tokens more than the longest."""
    inputs = draw(mechanism, b=1, h=2, n=sum(lengths), n_max=max(lengths) + 3, dtype=dtype, **sizes)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=DEVICE)
    return inputs | {name: inputs[name][0].transpose(0, 1) for name in "qkv"} | {"cu_seqlens": offsets}


@pytest.mark.parametrize("mechanism, source, causal, dtype", with_dtypes(MECHANISMS, SOURCES, [True, False]), ids=str)
def test_packed(mechanism, source, causal, dtype):
    inputs = packed(mechanism, [0, 19, 1, 0, 27, 0], dtype, d=24, dv=20, r=9, per_head=("w_k",) if causal else ())
    check({**inputs, "source": source, "causal": causal})


@pytest.mark.parametrize("mechanism", ["simple", "additive"])
def test_windows_and_packed_in_blocks_of_rows(mechanism):
    """Windows that begin anywhere on the N axis, and packed sequences; a backward of three launches."""
    stages = tuple(StageConfig(16, 16, 4, stage) for stage in (1, 2, 3))
    kernel = functools.partial(launched, config=RefinedAttentionConfig(TileConfig(16, 16, 4), stages))
    windows = {"seq_lens": lengths(20, 0, 5), "seq_starts": lengths(3, 27, 16)}
    for inputs in (draw(mechanism, b=3, n=27) | windows, packed(mechanism, [5, 0, 25], torch.float32)):
        grads = [name for name in TENSORS if name in inputs]
        assert_matches_reference(kernel, reference.refined_attention, inputs, grads=grads)


def test_packed_tokens_beside_others_are_left_alone():
    """Tokens of a neighbour, and rows of W that no sequence reaches, may hold anything but NaN in W."""
    inputs = packed("value", [5, 9, 7], torch.float32)
    clean = gradients(launched, inputs)
    dirty = {name: inputs[name].clone() for name in ("q", "k", "v")}
    for x in dirty.values():
        x[5:14] = math.nan
    for actual, expected in zip(gradients(launched, inputs | dirty)[:4], clean, strict=False):
        assert torch.equal(actual[:5], expected[:5]) and torch.equal(actual[14:], expected[14:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, dv, r", [(7, 13, 3), (64, 32, 90), (20, 256, 256)])
def test_dimensions(d, dv, r, dtype):
    check(draw(n=24, d=d, dv=dv, r=r, dtype=dtype))


@pytest.mark.parametrize("per_head", [("w_q",), ("w_k",), ("w_v",), ("w_q", "w_k", "w_v")], ids=str)
def test_matrices_a_head(per_head):
    check(draw("additive", b=3, h=2, n=20, n_max=25, r=10, per_head=per_head))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 2.0])
def test_any_scale(scale):
    inputs = draw("value")
    inputs["q"] *= 0.25
    check({**inputs, "scale": scale})


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_padding_may_hold_anything(mechanism, padding_side):
    inputs = {**draw(mechanism, b=3), "seq_lens": lengths(12, 0, 20), "padding_side": padding_side}
    dirty = {name: inputs[name].clone() for name in ("q", "k", "v")}
    for b, length in enumerate((12, 0, 20)):
        padding = slice(length, None) if padding_side == "right" else slice(0, 20 - length)
        for x in dirty.values():
            x[b, :, padding] = math.nan
    clean, spoiled = (gradients(launched, {**inputs, **values}) for values in ({}, dirty))
    assert all(map(torch.equal, clean, spoiled))
    out, dq, dk, dv, *_ = clean
    for b, length in enumerate((12, 0, 20)):
        padding = slice(length, None) if padding_side == "right" else slice(0, 20 - length)
        assert not any(x[b, :, padding].any() for x in (out, dq, dk, dv))


def test_views_that_are_not_contiguous():
    views = {
        "q": torch.randn(2, 20, 2, 16, device=DEVICE).transpose(1, 2),
        "k": torch.randn(2, 2, 16, 20, device=DEVICE).transpose(2, 3),
        "v": torch.randn(2, 4, 20, 32, device=DEVICE)[:, ::2, :, ::2],
        "w_q": torch.randn(9, 20, device=DEVICE).t() / 9,
        "w_k": torch.randn(20, 18, device=DEVICE)[:, ::2] / 9,
        "w_v": torch.randn(25, 25, device=DEVICE).t()[:20, :20] / 9,
    }
    check({**views, "mechanism": "additive"})


def test_incoming_gradient_that_is_expanded():
    inputs = draw("value")
    results = []
    for function in (launched, reference.refined_attention):
        leaves = {name: inputs[name].clone().requires_grad_() for name in TENSORS}
        out = function(**{**inputs, **leaves})
        results.append(torch.autograd.grad(out.sum(), list(leaves.values())))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("b, n, dv", [(0, 5, 16), (2, 0, 16), (2, 3, 0)])
def test_nothing_to_do(b, n, dv):
    inputs = draw("value", b=b, n=n, r=4, n_max=5)
    inputs["v"] = inputs["v"][..., :dv]
    kernel = functools.partial(recattn.refined_attention, impl="triton")
    for actual, expected in zip(gradients(kernel, inputs), gradients(reference.refined_attention, inputs), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("n, per_head", [(5, ("w_k",)), (20, ())], ids=str)
@pytest.mark.parametrize("block_p", [4, 8])
def test_partial_sums_that_are_not_loaded_at_once(block_p, n, per_head, monkeypatch):
    """Sums of dG and dW_v of 11 programs: more than 2 · block_p are first reduced by a launch of its own."""
    block_m = 16 if n == 5 else 32
    monkeypatch.setattr(short_weights, "LOADED", block_p * block_m * short_weights.BLOCK_K.value)
    monkeypatch.setattr(short_backward, "pairs_per_launch", lambda q, N, groups: 33)
    check(draw("value", b=11, h=1 if not per_head else 2, n=n, n_max=n + 2, r=7, per_head=per_head))


@pytest.mark.parametrize("n_max, r", [(70, 3), (40, 45)])
def test_matrices_of_several_tiles(n_max, r):
    """Rows of the gradients beyond N are zero, in tiles of their own too."""
    check(draw("value", n=35, n_max=n_max, r=r, dtype=torch.float16))


def test_infinite_weights_stay_in_the_first_rows():
    """Rows beyond N of G and of the gradients are zero, not 0 · inf."""
    w_q, w_k = (torch.full((20, 3), math.inf, device=DEVICE) for _ in range(2))
    g = launch_weights_product(w_q, w_k, None, 18)
    assert not g[:, 18:].any() and not g[..., 18:].any() and g[:, :18, :18].isinf().all()
    dg = torch.ones(2, 1, 32, 32, device=DEVICE)
    for dw in launch_weights_bwd(w_q, w_k, None, dg, None, 18):
        assert not dw[18:].any() and dw[:18].isinf().all()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_reruns_agree_to_the_bit(mechanism):
    inputs = draw(mechanism, h=2, per_head=("w_q",))
    assert all(map(torch.equal, gradients(launched, inputs), gradients(launched, inputs)))


# --- Dropout ---


@triton.jit
def store_dropout_weights_kernel(seed, out, bh, dropped, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    weights = dropout_weights(tl.load(seed), bh, 0, rows, 0, dropped, SIZE)
    tl.store(out + rows[:, None] * SIZE + rows[None, :], weights)


def dropout_mask(dropout: Dropout, count: int, n: int) -> Tensor:
    size = max(16, triton.next_power_of_2(n))
    out = torch.empty(count, size, size, device=DEVICE)
    for bh in range(count):
        store_dropout_weights_kernel[(1,)](dropout.seed, out[bh], bh, dropout.threshold, size)
    return out[:, :n, :n]


def with_mask(keep, v, **inputs):
    """The equation with an explicit mask: with V the identity, the reference returns the weights themselves."""
    n = v.shape[2]
    identity = torch.eye(n, dtype=v.dtype, device=v.device).expand(*v.shape[:3], n)
    return (reference.refined_attention(v=identity, **inputs) * keep).to(v.dtype) @ v


@pytest.mark.parametrize("mechanism, dtype", with_dtypes(MECHANISMS), ids=str)
def test_dropout(mechanism, dtype):
    inputs = draw(mechanism, b=2, h=2, n=40, dtype=dtype)
    dropout = Dropout(torch.tensor([1234567], device=DEVICE), 19661)
    keep = dropout_mask(dropout, 4, 40).view(2, 2, 40, 40)
    assert 0.25 < (keep == 0).float().mean() < 0.35

    def kernel(keep, **arguments):
        return launched(**arguments, dropout=dropout)

    grads = [name for name in TENSORS if name in inputs]
    assert_matches_reference(kernel, with_mask, {**inputs, "keep": keep}, grads=grads)


# --- Launches ---


def signature(B: int, N: int, R: int) -> list:
    """What the launches of these sizes compile for, all of one BLOCK_N."""
    shapes = ((B, 8, N, 64), (N + R, R), (N + R, N + R), (2, 64, 64))
    q, w, w_v, squares = (meta(*shape, dtype=torch.bfloat16) for shape in shapes)
    options = RefinedAttentionOptions("value", "logits", causal=N % 2 == 0, scale=1 / N)
    config = RefinedAttentionConfig(TileConfig(64, 32, 4), (StageConfig(64, 32, 4),))
    dg = meta(20 * B, 1, 64, 64)

    def launch() -> None:
        launch_weights_product(w, w, w_v, N)
        launch_refined_attention_fwd(q, q, q, squares, w_v, NO_LENGTHS, options, config=config)
        launch_refined_attention_bwd(q, q, q, q, squares, w_v, NO_LENGTHS, options, config=config)
        launch_weights_bwd(w, w, w_v, dg, dg, N)

    made = [(c.kernel, c.signature, c.constexprs) for c in recorded("", 90, launch)]
    return [compiled for i, compiled in enumerate(made) if compiled not in made[:i]]  # the backward is launched often


def test_no_recompile_for_other_sizes():
    signatures = [signature(*sizes) for sizes in [(8, 64, 64), (1, 33, 200), (16, 48, 48), (3, 50, 15)]]
    assert all(other == signatures[0] for other in signatures[1:])


def test_what_is_refused():
    def why(mechanism="simple", dtype=torch.float16, n=20, d=16, dv=16):
        q, v = (torch.empty(1, 1, n, width, dtype=dtype, device=DEVICE) for width in (d, dv))
        return unsupported_reason(q, v, n, mechanism)

    assert why() is None and why("additive", n=64) is None and why(dtype=torch.float32, n=32) is None
    assert why("stochastic") == "it has no mechanism 'stochastic'"
    assert why(dtype=torch.float64) == "it computes in float32, and q is float64"
    assert why(dv=257) == "it holds head dims up to 256, and one is 257"
    assert why(n=129).endswith("tokens in float16, and there are 129")
    assert why(dtype=torch.float32, n=33) == "it holds up to 32 tokens in float32, and there are 33"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registers_of_a_launch_fit_a_multiprocessor(dtype, architecture):
    """The compiler may use 255 registers per thread, of 65536 per multiprocessor."""
    for n, mechanism in itertools.product(range(1, largest_n(dtype, architecture) + 1, 7), MECHANISMS):
        fwd, bwd = RefinedAttentionConfig.heuristic(n, 64, dtype, architecture, mechanism)
        assert all(tiles.num_warps <= 8 for tiles in (fwd, *bwd))

"""wasserstein_attention's Triton kernels against the reference, by Triton's interpreter where there is no GPU."""

import functools
import math

import pytest
import torch

import recattn
from recattn import reference
from recattn._options import WassersteinAttentionOptions
from recattn.ops import wasserstein_attention as ops
from tests.helpers.interpreted import DEVICE, DTYPES, assert_matches_reference_twice_of_three, with_dtypes
from tests.helpers.wasserstein_inputs import (
    NAMES,
    assert_packed_equals_padded,
    assert_reruns_agree,
    draw,
    gradients,
    largest_tensor,
    offsets_of,
    packed,
    with_offset,
)

pytest.importorskip("triton")

import triton
import triton.language as tl

from recattn.triton_kernels.common.dropout import dropout_weights
from recattn.triton_kernels.common.ragged import NO_LENGTHS
from recattn.triton_kernels.wasserstein_attention import (
    Forward,
    launch_wasserstein_attention_bwd,
    launch_wasserstein_attention_fwd,
    launch_wasserstein_attention_vectors,
)
from tests.compile_table.compilation import meta, recorded

by_triton = functools.partial(recattn.wasserstein_attention, impl="triton")


def draw_here(dtype=torch.float32, **sizes):
    return {name: x.to(DEVICE) for name, x in draw(**sizes, dtype=dtype).items()}


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def check(inputs, **options):
    kernel, low = (functools.partial(f, **options) for f in (by_triton, reference.wasserstein_attention))
    assert_matches_reference_twice_of_three(kernel, low, inputs, grads=list(inputs))


SIZES = [(1, 5, 7), (63, 16, 16), (100, 5, 40), (129, 8, 3)]


@pytest.mark.parametrize("sizes, causal, dtype", with_dtypes(SIZES, [True, False]), ids=str)
def test_matches_reference(sizes, causal, dtype):
    n, d, dv = sizes
    b, h = (1, 1) if n > 63 else (2, 2)
    check(draw_here(b=b, h=h, n=n, d=d, dv=dv, dtype=dtype), causal=causal)


@pytest.mark.parametrize(
    "n, padding_side, causal, dtype", with_dtypes([70, 130], ["right", "left"], [True, False]), ids=str
)
def test_ragged(n, padding_side, causal, dtype):
    """70 tokens of half precision are short."""
    inputs = draw_here(b=5, h=1, n=n, d=7, dv=16, dtype=dtype)
    check(inputs, causal=causal, seq_lens=lengths(n, 0, 1, 33, 64), padding_side=padding_side)


@pytest.mark.parametrize("n, d, dv", [(1, 16, 3), (16, 7, 16), (17, 32, 5), (33, 33, 16), (128, 20, 32)])
@pytest.mark.parametrize("causal", [True, False])
def test_short_sequences(n, d, dv, causal):
    """In half precision one program holds a sequence whole, and its tile is the next power of two."""
    check(draw_here(b=2, h=1 + (n < 64), n=n, d=d, dv=dv, dtype=torch.float16), causal=causal)


def test_short_sequences_take_two_launches():
    """And no vectors: their size is the sign of it."""
    options = WassersteinAttentionOptions("logits", True, None)
    for n, count in ((128, 0), (129, 2 * 4 * 129 * 32)):
        inputs = draw_here(b=2, h=2, n=n, d=16, dv=16, dtype=torch.float16)
        vectors = ops.wasserstein_attention_fwd(*inputs.values(), *[None] * 4, options)[2]
        assert vectors.numel() == count
    tokens = packed(inputs, [100, 128]).values()
    for max_seqlen, count in ((128, 0), (None, 2 * 228 * 2 * 32)):  # without a bound, T
        lengths = (None, None, offsets_of([100, 128], DEVICE), None)
        vectors = ops.wasserstein_attention_fwd(*tokens, *lengths, options._replace(max_seqlen=max_seqlen))[2]
        assert vectors.numel() == count


@pytest.mark.parametrize("source, causal, dtype", with_dtypes(["logits", "weights"], [True, False]), ids=str)
def test_refined(source, causal, dtype):
    check(draw_here(b=3, n=63, d=6, dv=16, rank=10, n_max=70, source=source, dtype=dtype), causal=causal, source=source)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("source", ["logits", "weights"])
def test_refined_ragged(source, padding_side):
    rank = 40 if padding_side == "right" else 10
    inputs = draw_here(b=3, n=40, d=6, dv=16, rank=rank, per_head=("w_k",), source=source)
    check(inputs, source=source, seq_lens=lengths(33, 0, 1), padding_side=padding_side)


@pytest.mark.parametrize("rank, dtype", [(4, torch.float32)] + [(None, dtype) for dtype in DTYPES], ids=str)
def test_windows(rank, dtype):
    inputs = draw_here(b=3, h=1, n=20, d=6, dv=5, rank=rank, dtype=dtype)
    check(inputs, seq_lens=lengths(9, 0, 17), seq_starts=lengths(6, 20, 1))


@pytest.mark.parametrize(
    "counts, dtype, causal, dropout_p",
    [
        ((70, 0, 7, 33), torch.float32, False, 0.3),
        ((20, 0, 7, 33), torch.float16, True, 0.0),
        ((20, 0, 7, 33), torch.float16, False, 0.3),
        ((130, 0, 7, 33), torch.float16, True, 0.0),
    ],
    ids=str,
)
def test_packed_equals_padded(counts, dtype, causal, dropout_p):
    """To the bit. Of half precision 33 tokens are short."""
    inputs = draw_here(b=4, h=2, n=max(counts), d=6, dv=5, dtype=dtype)
    function = functools.partial(by_triton, causal=causal, dropout_p=dropout_p)
    assert_packed_equals_padded(function, inputs, list(counts), atol=0, rtol=0)


@pytest.mark.parametrize("source", ["logits", "weights"])
def test_refined_packed_equals_padded(source):
    inputs = draw_here(b=3, h=2, n=20, d=6, dv=5, rank=4, per_head=("w_k",), source=source)
    assert_packed_equals_padded(functools.partial(by_triton, source=source), inputs, [20, 0, 7], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("counts", [[], [0, 0]], ids=str)
def test_empty_packed_batches(counts):
    inputs = packed(draw_here(b=2), [0, 0])
    results = gradients(by_triton, inputs, cu_seqlens=offsets_of(counts, DEVICE))
    for name, x in inputs.items():
        assert results[f"d{name}"].shape == x.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d, dv", [(64, 64), (128, 16)])
def test_wide_heads(d, dv, dtype):
    check(draw_here(b=2, h=1, n=40, d=d, dv=dv, dtype=dtype))


@pytest.mark.parametrize(
    "rank, source, dtype",
    [(None, "logits", dtype) for dtype in DTYPES] + [(6, source, torch.float32) for source in ("logits", "weights")],
)
@pytest.mark.parametrize("part, offset", [("mean", 100), ("mean", 1000), ("cov", 100)])
def test_offset(part, offset, rank, source, dtype):
    """It changes no distance, but loses digits of ‖q‖² + ‖k‖² - 2 q·k; the reference uses plain differences."""
    inputs = draw_here(b=2, n=30, d=16, dv=8, rank=rank, source=source, dtype=dtype)
    padding = {"seq_lens": lengths(30, 12), "padding_side": "left"}
    check(with_offset(inputs, part, offset), source=source, **padding)


def test_offset_of_the_refined_gaussians():
    """Rows of A sum to 1, so an offset of W_q and W_k moves every Gaussian. A larger one loses digits in A W itself."""
    inputs = draw_here(b=2, n=28, d=16, dv=8, rank=6, source="weights")
    inputs |= {name: inputs[name] + 10 for name in ("w_q", "w_k")}
    padding = {"seq_lens": lengths(28, 12), "padding_side": "left"}
    check(inputs, source="weights", **padding)


@pytest.mark.parametrize("scale, dtype", with_dtypes([-0.1, 0.0, 0.5]), ids=str)
def test_any_scale(scale, dtype):
    check(draw_here(n=40, dtype=dtype), scale=scale)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("rank, dtype", [(4, torch.float32)] + [(None, dtype) for dtype in DTYPES], ids=str)
def test_padding_never_matters(rank, dtype, padding_side):
    inputs = draw_here(n=20, rank=rank, dtype=dtype)
    tokens, padding = (slice(0, 13), slice(13, 20)) if padding_side == "right" else (slice(7, 20), slice(0, 7))
    dirty = {name: x.clone() for name, x in inputs.items()}
    for name in NAMES:
        dirty[name][0, :, padding] = math.nan
        dirty[name][1] = math.inf
    alone = {name: x[:1, :, tokens] if name in NAMES else x[tokens] for name, x in inputs.items()}
    actual = gradients(by_triton, dirty, seq_lens=lengths(13, 0), padding_side=padding_side)
    # Half precision differs from the reference by its rounding.
    expected = reference.wasserstein_attention if dtype == torch.float32 else by_triton
    for name, out in zip(("mean", "cov"), expected(**alone), strict=True):
        torch.testing.assert_close(actual[name][:1, :, tokens], out)
    for name, x in actual.items():
        assert x.isfinite().all(), name
        if x.dim() == 4:
            assert not x[0, :, padding].any() and not x[1].any(), name


def test_zero_covariances():
    inputs = draw_here(n=40)
    inputs["cov_q"][0] = 0
    inputs["cov_k"][:, :, 2:] = 0
    inputs["cov_v"][1] = 0
    check(inputs)


@pytest.mark.parametrize("rank, dtype", [(10, torch.float32), (None, torch.float16)], ids=str)
def test_views_that_are_not_contiguous(rank, dtype):
    inputs = draw_here(n=20, rank=rank, dtype=dtype)
    views = {
        "mean_q": inputs["mean_q"].transpose(1, 2).contiguous().transpose(1, 2),
        "cov_k": torch.cat([inputs["cov_k"]] * 2, dim=-1)[..., :3],
        "mean_v": inputs["mean_v"].mT.contiguous().mT,
    }
    if rank is not None:
        views["w_q"] = inputs["w_q"].T.contiguous().T
    expected = gradients(by_triton, inputs)
    for name, x in gradients(by_triton, inputs | views).items():
        torch.testing.assert_close(x, expected[name])


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("sizes", [{"b": 0}, {"n": 0, "n_max": 4}, {"dv": 0}])
def test_nothing_to_do(sizes, rank):
    inputs = draw_here(rank=rank, **sizes)
    results = gradients(by_triton, inputs)
    for name, x in inputs.items():
        assert results[f"d{name}"].shape == x.shape and not results[f"d{name}"].any()


@pytest.mark.parametrize("n, dtype", [(129, torch.float32), (50, torch.float16)])
def test_reruns_agree_to_the_bit(n, dtype):
    assert_reruns_agree(by_triton, draw_here(n=n, dtype=dtype))


@pytest.mark.parametrize("rank, source", [(None, "logits"), (8, "logits"), (8, "weights")])
def test_no_tensor_of_n_squared_elements(rank, source):
    n = 256
    inputs = draw_here(b=1, h=1, n=n, d=8, dv=8, rank=rank, source=source, dtype=torch.float16)
    assert largest_tensor(by_triton, inputs, source=source) <= n * n // 4


# --- Dropout ---


@triton.jit
def factors_kernel(seed, out, dropped, N, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    factors = dropout_weights(tl.load(seed), tl.program_id(0), 0, rows, 0, dropped, BLOCK)
    addresses = out + tl.program_id(0) * N * N + rows[:, None] * N + rows[None, :]
    tl.store(addresses, factors, mask=(rows < N)[:, None] & (rows < N)[None, :])


def with_factors(mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, *, factors, **options):
    """The equation with given factors [B, H, N, N] of the weights, which come from values that are identities."""
    n = mean_q.shape[2]
    identity = torch.eye(n, dtype=mean_q.dtype, device=mean_q.device).expand(*mean_q.shape[:2], n, n)
    p, _ = reference.wasserstein_attention(mean_q, cov_q, mean_k, cov_k, identity, identity, **options)
    p = p * factors.to(p.dtype)
    return p @ mean_v, p.square() @ cov_v


@pytest.mark.parametrize("causal, dtype", with_dtypes([True, False]), ids=str)
def test_dropout_is_of_both_products(causal, dtype):
    """The weights that one seed drops, in both directions, by tiles of any size.

    Of p = ½ the factors are exact: a row of one key has no gradient, in float32 too.
    """
    n, p = 50, 0.5
    inputs = draw_here(b=2, h=2, n=n, d=5, dv=7, dtype=dtype)
    seed = torch.tensor([1234], device=DEVICE)
    factors = torch.empty(2, 2, n, n, device=DEVICE)
    factors_kernel[(4,)](seed, factors, round(p * 65536), n, BLOCK=64)
    assert 0.45 < (factors == 0).float().mean() < 0.55
    options = WassersteinAttentionOptions("logits", causal, None, p, impl="triton")

    def seeded(**gaussians):
        return ops.wasserstein_attention(tuple(gaussians.values()), None, None, (None, None, None), seed, options)

    expected = functools.partial(with_factors, causal=causal)
    assert_matches_reference_twice_of_three(
        lambda factors, **tensors: seeded(**tensors), expected, {**inputs, "factors": factors}, grads=NAMES
    )


def test_dropout_follows_the_generator():
    inputs = draw_here(n=40)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(by_triton(**inputs, dropout_p=0.5)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


# --- The operators and their launches ---


def of_layout(layout, inputs):
    """Inputs of three sequences of 9, 0 and 4 tokens, with seq_lens, seq_starts and cu_seqlens."""
    if layout == "windows":
        return [*inputs.values(), lengths(9, 0, 4), lengths(0, 3, 2), None]
    return [*packed(inputs, [9, 0, 4]).values(), None, None, offsets_of([9, 0, 4], DEVICE)]


@pytest.mark.parametrize("layout, dtype", [("windows", torch.float32), ("packed", torch.float16)])
def test_opcheck(layout, dtype):
    options = ("logits", True, None, 0.1, 9 if layout == "packed" else None, "triton", False)
    tokens = of_layout(layout, draw_here(b=3, n=9, d=3, dv=4, dtype=dtype))
    arguments = (*tokens, torch.tensor([5], device=DEVICE), *options)
    torch.library.opcheck(torch.ops.recattn.wasserstein_attention_fwd.default, arguments)
    outs = torch.ops.recattn.wasserstein_attention_fwd(*arguments)
    torch.library.opcheck(torch.ops.recattn.wasserstein_attention_bwd.default, (*outs[:2], *outs, *arguments))


@pytest.mark.parametrize("layout", ["windows", "packed"])
def test_opcheck_factors(layout):
    inputs = draw_here(b=3, n=9, d=3, dtype=torch.float16)
    arguments = of_layout(layout, {name: inputs[name] for name in NAMES[:4]})
    torch.library.opcheck(torch.ops.recattn.wasserstein_factors_fwd.default, arguments)
    factors = torch.ops.recattn.wasserstein_factors_fwd(*arguments)
    torch.library.opcheck(torch.ops.recattn.wasserstein_factors_bwd.default, (*factors, *factors, *arguments))


def test_compiles_whole_without_recompiling():
    torch.compiler.reset()
    compiled = torch.compile(by_triton, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, h, n in ((3, 2, 9), (2, 3, 20)):
        inputs = draw_here(b=b, h=h, n=n, d=8, dv=13, rank=7, n_max=n + 3)
        expected = gradients(by_triton, inputs)
        with torch.compiler.set_stance("fail_on_recompile" if b < 3 else "default"):
            actual = gradients(compiled, inputs)
        for name, x in actual.items():
            torch.testing.assert_close(x, expected[name])


def test_launches_compile_alike_for_any_batch_and_length():
    """B, H, N and the options are not constants of the kernels."""
    signatures = []
    for b, h, n, scale, causal in ((2, 2, 16, 1.0, True), (3, 1, 17, 0.3, False)):
        x = meta(b, h, n, 32)
        forward = Forward(*[x] * 8, meta(2, b, h, n, 64), meta(2, b, h, n))
        options = WassersteinAttentionOptions("logits", causal, scale)
        made = recorded("", 90, functools.partial(launch_wasserstein_attention_vectors, forward, NO_LENGTHS, options))
        made += recorded("", 90, functools.partial(launch_wasserstein_attention_fwd, forward, NO_LENGTHS, options))
        backward = functools.partial(launch_wasserstein_attention_bwd, forward, x, x, [x] * 6, NO_LENGTHS, options)
        made += recorded("", 90, backward)
        signatures.append([(c.kernel, c.signature, c.constexprs) for c in made])
    assert len(signatures[0]) == 4 and signatures[0] == signatures[1]


def test_refusals():
    with pytest.raises(NotImplementedError, match="its kernels compute in float32, and mean_q is float64"):
        by_triton(**draw_here(dtype=torch.float64))
    with pytest.raises(NotImplementedError, match="its kernels hold"):
        by_triton(**draw_here(d=129))
    with pytest.raises(NotImplementedError, match="its kernels hold"):
        by_triton(**draw_here(rank=129))

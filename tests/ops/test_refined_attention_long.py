"""refined_attention of any length by Triton kernels, on a GPU or by the interpreter, against float64."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from recattn import reference
from recattn._options import RefinedAttentionOptions
from recattn.ops.refined_attention import triton_long as long
from recattn.reference.sink_attention import window_starts
from recattn.testing import assert_matches_reference
from tests.helpers.interpreted import DEVICE, DTYPES, assert_matches_reference_twice_of_three, with_dtypes
from tests.helpers.memory import LargestTensor
from tests.helpers.refined_inputs import packed
from tests.triton.test_sink_attention import dropout_mask

GRADS = ["q", "k", "v", "w_q", "w_k"]
MECHANISMS, SOURCES = ("simple", "stochastic"), ("logits", "weights")
EVERY = [*itertools.product(MECHANISMS, SOURCES)]


def draw(mechanism, source, b=1, h=1, n=63, d=16, dv=12, r=7, n_max=None, per_head=(), dtype=torch.float32) -> dict:
    """Refined scores of ordinary size: of logits A W is a sum, of weights a mean."""
    columns = 2 * r if mechanism == "stochastic" else r
    size = 1 if source == "weights" else 1 / (2 * max(n, 1) ** 0.5)
    inputs = {"q": torch.randn(b, h, n, d), "k": torch.randn(b, h, n, d), "v": torch.randn(b, h, n, dv)}
    for name in ("w_q", "w_k"):
        inputs[name] = size * torch.randn(*([h] if name in per_head else []), n_max or n, columns)
    options = {"mechanism": mechanism, "source": source}
    return {name: x.to(DEVICE, dtype) for name, x in inputs.items()} | options


def by_triton(
    q,
    k,
    v,
    w_q,
    w_k,
    mechanism,
    source,
    causal=True,
    scale=None,
    dropout_p=0.0,
    seed=None,
    max_seqlen=None,
    **lengths,
) -> Tensor:
    options = RefinedAttentionOptions(mechanism, source, causal, scale, dropout_p, max_seqlen, "triton")
    return long.refined_attention(q, k, v, w_q, w_k, length_tensors(q, **lengths), seed, options)


def length_tensors(q, seq_lens=None, seq_starts=None, padding_side="right", cu_seqlens=None) -> long.LengthTensors:
    return seq_lens, window_starts(padding_side, q.shape[-2], seq_lens, seq_starts), cu_seqlens


def check(inputs: dict, function=by_triton) -> None:
    assert_matches_reference_twice_of_three(function, reference.refined_attention, inputs, grads=GRADS)


def with_gradients(function, inputs: dict) -> list[Tensor]:
    leaves = {name: inputs[name].detach().requires_grad_() for name in GRADS}
    out = function(**{**inputs, **leaves})
    torch.manual_seed(7)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out))]


@pytest.mark.parametrize("mechanism, source, causal, dtype", with_dtypes(MECHANISMS, SOURCES, [True, False]), ids=str)
def test_dense(mechanism, source, causal, dtype):
    check({**draw(mechanism, source, n_max=66, dtype=dtype), "causal": causal})


@pytest.mark.parametrize("source, n", [*itertools.product(SOURCES, [1, 100]), ("logits", 129), ("logits", 200)])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_sizes(mechanism, source, n):
    check({**draw(mechanism, source, n=n, dtype=torch.float16), "scale": 0.4})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vanishing_covariances(dtype):
    """The standard deviations of the queries are less than what their difference from the keys' mean rounds off."""
    inputs = draw("stochastic", "weights", r=8, dtype=dtype)
    inputs["w_q"][:, 8:] -= 30
    check(inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mechanism, source", EVERY)
def test_padded(mechanism, source, causal):
    """The sides in turn, so that each meets each mechanism, source and mask."""
    padding_side = ("right", "left")[(MECHANISMS.index(mechanism) + SOURCES.index(source) + causal) % 2]
    inputs = draw(mechanism, source, b=3, n=70, dtype=torch.float16)
    lengths = torch.tensor([66, 0, 1], device=DEVICE)
    check({**inputs, "seq_lens": lengths, "padding_side": padding_side, "causal": causal})


@pytest.mark.parametrize("mechanism, source", EVERY)
def test_windows_and_packed(mechanism, source):
    """Windows that begin anywhere, and packed sequences with a bound above the longest; causal in turn."""
    causal = (MECHANISMS.index(mechanism) + SOURCES.index(source)) % 2 == 0
    inputs = draw(mechanism, source, b=4, h=2, n=70, n_max=73, per_head=("w_k",), dtype=torch.float16)
    inputs |= {"causal": causal}
    starts, lengths = (torch.tensor(x, device=DEVICE) for x in ([9, 70, 3, 69], [60, 0, 20, 1]))
    check({**inputs, "seq_lens": lengths, "seq_starts": starts})
    of_packed = functools.partial(by_triton, max_seqlen=72)
    check(packed(inputs, [66, 0, 1, 37]), of_packed)


@pytest.mark.parametrize("per_head", [("w_q", "w_k"), ("w_k",)])
@pytest.mark.parametrize("mechanism, source", EVERY)
def test_matrices_per_head(mechanism, source, per_head):
    check(draw(mechanism, source, h=2, n=9, r=5, per_head=per_head))


@pytest.mark.parametrize("mechanism, source, rank", [("simple", "logits", 256), ("simple", "weights", 130)])
def test_many_columns(mechanism, source, rank):
    """The most columns that the kernels hold, and weights multiplied in two passes."""
    check(draw(mechanism, source, n=24, d=32, r=rank, dtype=torch.float16))


@pytest.mark.parametrize("rank", [50, 127])
def test_wide_gaussians(rank):
    check(draw("stochastic", "logits", n=24, d=32, r=rank, dtype=torch.float16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [-30, 6])
def test_extreme_covariances(shift, dtype):
    """elu(x) rounds to -1 where its covariance is still a normal number; ‖g‖² beyond the bits of half precision."""
    inputs = draw("stochastic", "weights", n=20, dtype=dtype)
    inputs["w_q"][:, 7:] += shift
    inputs["w_k"][:, 7:] += shift
    assert all(x.isfinite().all() for x in with_gradients(by_triton, inputs))
    check(inputs)


@pytest.mark.parametrize("offset", [0, 10])
def test_offset_of_the_gaussians(offset):
    """Rows of A sum to 1, so an offset of W_q and W_k moves every Gaussian. A larger one loses digits in A W itself."""
    padding = {"seq_lens": torch.tensor([20, 12], device=DEVICE), "padding_side": "left"}
    inputs = draw("stochastic", "weights", b=2, n=20) | padding
    inputs |= {name: inputs[name] + offset for name in ("w_q", "w_k")}
    # The softmax of A loses digits of dq and dk by the same offset, in dA - Σ A∘dA.
    assert_matches_reference(by_triton, reference.refined_attention, inputs, grads=["v", "w_q", "w_k"])


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("mechanism, source", EVERY)
def test_padding_may_hold_anything(mechanism, source, padding_side):
    n, lengths = 20, (17, 0)
    inputs = draw(mechanism, source, b=2, n=n, n_max=n + 5, dtype=torch.float16)
    options = {"seq_lens": torch.tensor(lengths, device=DEVICE), "padding_side": padding_side}
    dirty = {name: inputs[name].clone() for name in GRADS}
    for name in ("w_q", "w_k"):
        dirty[name][n:] = math.nan
    for b, length in enumerate(lengths):
        for name in ("q", "k", "v"):
            dirty[name][b, :, slice(length, n) if padding_side == "right" else slice(0, n - length)] = math.nan
    clean, actual = (with_gradients(by_triton, {**inputs, **values, **options}) for values in ({}, dirty))
    assert all(map(torch.equal, clean, actual))


@pytest.mark.parametrize("source", ["logits", "weights"])
def test_views_that_are_not_contiguous(source):
    inputs = draw("simple", source, h=2, n=20, dtype=torch.float16)
    views = {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": inputs["k"].repeat_interleave(2, dim=-1)[..., ::2],
        "v": inputs["v"].mT.contiguous().mT,
        "w_q": inputs["w_q"].T.contiguous().T,
    }
    check({**inputs, **views})


@pytest.mark.parametrize("mechanism, source", EVERY)
def test_reruns_agree_to_the_bit(mechanism, source):
    inputs = draw(mechanism, source, b=2, n=20)
    assert all(map(torch.equal, *(with_gradients(by_triton, inputs) for _ in range(2))))


@pytest.mark.parametrize("sizes", [{"b": 0}, {"h": 0}, {"n": 0, "n_max": 4}])
@pytest.mark.parametrize("mechanism, source", EVERY)
def test_nothing_to_do(mechanism, source, sizes):
    assert not any(x.any() for x in with_gradients(by_triton, draw(mechanism, source, **sizes)))


@pytest.mark.parametrize("mechanism, source", EVERY)
def test_no_tensor_of_n_squared_elements(mechanism, source):
    n = 256
    with LargestTensor() as largest:
        with_gradients(by_triton, draw(mechanism, source, n=n, d=8, dv=8, r=3, dtype=torch.float16))
    assert largest.elements <= n * 64


# --- Dropout ---


def with_mask(q, k, v, keep, **options) -> Tensor:
    """(P ∘ keep) V in full; P is the output for values that tell keys apart."""
    each = torch.eye(q.shape[2], dtype=q.dtype, device=q.device).expand(*q.shape[:3], -1)
    return (reference.refined_attention(q, k, each, **options) * keep).to(v.dtype) @ v


@pytest.mark.parametrize("mechanism, source, dtype", with_dtypes(MECHANISMS, SOURCES), ids=str)
def test_dropout_of_the_final_weights(mechanism, source, dtype):
    b, h, n = 2, 2, 20
    inputs = draw(mechanism, source, b=b, h=h, n=n, dtype=dtype)
    seed = torch.tensor([5], device=DEVICE)
    masks = [dropout_mask(seed, bh, 0, n, round(0.3 * 65536)) for bh in range(b * h)]
    inputs["keep"] = torch.stack(masks).reshape(b, h, n, n)

    def dropped(keep, **arguments):
        return by_triton(**arguments, dropout_p=0.3, seed=seed)

    assert_matches_reference_twice_of_three(dropped, with_mask, inputs, grads=GRADS)


# --- torch.compile, and what is refused ---


@pytest.mark.parametrize("mechanism, source", [("stochastic", "weights")])
def test_compiles_to_one_graph_without_recompiling(mechanism, source):
    torch._dynamo.reset()
    compiled = torch.compile(
        functools.partial(by_triton, mechanism=mechanism, source=source),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for b, n in ((3, 9), (4, 12)):
        inputs = draw(mechanism, source, b=b, h=2, n=n, n_max=n + 2)
        inputs["seq_lens"] = torch.randint(n, (b,), device=DEVICE)
        tensors = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        with torch.compiler.set_stance("fail_on_recompile" if b > 3 else "default"):
            actual = with_gradients(compiled, tensors)
        assert all(map(torch.equal, actual, with_gradients(by_triton, inputs)))


@pytest.mark.parametrize("source", ["logits", "weights"])
@pytest.mark.parametrize("rank", [16, 7, 130])
def test_project(rank, source):
    inputs = draw("simple", source, n=20, r=rank)
    arguments = [inputs[name] for name in ("q", "k", "w_q", "w_k")]
    x = long.project(
        *arguments, (None, None, None), RefinedAttentionOptions("simple", source, True, 0.5, impl="triton")
    )
    logits = 0.5 * inputs["q"] @ inputs["k"].mT
    future = torch.ones(20, 20, dtype=torch.bool, device=DEVICE).triu(1)
    a = logits.tril() if source == "logits" else logits.masked_fill(future, -math.inf).softmax(-1)
    torch.testing.assert_close(x, a @ torch.cat([inputs["w_q"], inputs["w_k"]], dim=-1))


def test_refusals():
    def why(mechanism="simple", r=8, **options):
        inputs = draw(mechanism, "logits", n=4, r=r, **options)
        return long.unsupported_reason(inputs["q"], inputs["v"], inputs["w_q"], mechanism)

    assert all(why(*args) is None for args in (("simple",), ("stochastic",), ("simple", 256), ("stochastic", 127)))
    assert "mechanism='value' needs whole rows" in why("value")
    assert why(dtype=torch.float64) == "its kernels compute in float32, and q is float64"
    assert why(d=257) == why(dv=257) == "its kernels hold head dims up to 256, and q or v has 257"
    assert why(r=257) == "its kernels hold up to 256 columns of w_q, and there are 257"
    assert why("stochastic", r=128) == "its kernels hold up to 254 columns of w_q, and there are 256"
    if DEVICE == "cpu":
        assert why(dtype=torch.bfloat16) == "Triton's interpreter computes bfloat16 wrongly"

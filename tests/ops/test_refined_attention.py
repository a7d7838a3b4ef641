import functools
import math
from itertools import accumulate, product

import pytest
import torch

from benchmarks.harness.memory import cpu_allocations, peak_memory
from recattn import reference, refined_attention
from recattn.testing import assert_matches_reference
from tests.helpers.by_differences import stochastic_by_differences
from tests.helpers.refined_inputs import cpu, packed, views_of

MECHANISMS = ("simple", "value", "additive", "stochastic")
SOURCES = ("logits", "weights")
TENSORS = ("q", "k", "v", "w_q", "w_k", "w_v")


def draw(mechanism, b=3, h=2, n=9, d=16, dv=5, r=6, n_max=None, per_head=(), dtype=torch.float32):
    """q, k, v and the matrices; `per_head` names the matrices of which each head has its own.

    Scores stay moderate: in a row of large ones the largest error would be the luck of its own rounding.
    """
    n_max = n if n_max is None else n_max
    columns = {"w_q": r, "w_k": r, "w_v": n_max}
    if mechanism == "stochastic":
        columns |= {"w_q": 2 * r, "w_k": 2 * r}
    if mechanism not in ("value", "additive"):
        del columns["w_v"]
    inputs = {"q": torch.randn(b, h, n, d), "k": torch.randn(b, h, n, d), "v": torch.randn(b, h, n, dv)}
    for name, width in columns.items():
        inputs[name] = torch.randn(*([h] if name in per_head else []), n_max, width) / (2 * max(n, 1) ** 0.5)
    return {name: x.to(dtype) for name, x in inputs.items()}


def gradients(function, inputs, **options):
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves, **options)
    torch.manual_seed(7)
    return dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), torch.randn_like(out)), strict=True))


def check(inputs, **options):
    kernel, low = (functools.partial(f, **options) for f in (cpu, reference.refined_attention))
    assert_matches_reference(kernel, low, inputs, grads=[name for name in TENSORS if name in inputs])


# --- The reference ---


def by_hand(q, k, v, w_q, w_k, w_v=None, *, mechanism, source, causal, lengths, padding_side, scale):
    """Entry by entry, over the valid tokens only."""
    out = torch.zeros_like(v)
    b, h, n, _ = q.shape
    for batch, head in product(range(b), range(h)):
        length = n if lengths is None else lengths[batch]
        tokens = list(range(length) if padding_side == "right" else range(n - length, n))
        seen = {i: [j for j in tokens if j <= i or not causal] for i in tokens}
        w = {name: x[head] if x.dim() == 3 else x for name, x in (("q", w_q), ("k", w_k), ("v", w_v)) if x is not None}

        def softmax(row):
            total = sum(math.exp(x) for x in row.values())
            return {j: math.exp(x) / total for j, x in row.items()}

        a = {i: {j: scale * float(q[batch, head, i] @ k[batch, head, j]) for j in seen[i]} for i in tokens}
        if source == "weights":
            a = {i: softmax(row) for i, row in a.items()}

        def projected(name, a=a, w=w):
            return {i: sum(x * w[name][j] for j, x in row.items()) for i, row in a.items()}

        queries, keys = projected("q"), projected("k")
        if mechanism == "stochastic":
            rank = w_q.shape[-1] // 2

            def gaussian(x, rank=rank):
                return x[:rank], torch.nn.functional.elu(x[rank:]) + 1

            def score(i, j, queries=queries, keys=keys, rank=rank):
                (mean_i, cov_i), (mean_j, cov_j) = gaussian(queries[i]), gaussian(keys[j])
                distance = (mean_i - mean_j).pow(2).sum() + (cov_i.sqrt() - cov_j.sqrt()).pow(2).sum()
                return -float(distance) / math.sqrt(rank)
        else:

            def score(i, j, queries=queries, keys=keys):
                return float(queries[i] @ keys[j]) / math.sqrt(w_q.shape[-1])

        m = {i: {j: score(i, j) for j in seen[i]} for i in tokens}
        if w_v is not None:
            values = projected("v")
            m = {i: softmax(row) for i, row in m.items()}
            m = {i: {t: sum(p * float(values[j][t]) for j, p in m[i].items()) for t in seen[i]} for i in tokens}
        if mechanism == "additive":
            m = {i: {j: a[i][j] + x for j, x in row.items()} for i, row in m.items()}
        for i in tokens:
            out[batch, head, i] = sum(p * v[batch, head, j] for j, p in softmax(m[i]).items())
    return out


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths, padding_side", [(None, "right"), ([3, 0], "right"), ([3, 0], "left")])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_reference_by_hand(mechanism, source, lengths, padding_side, causal):
    inputs = draw(mechanism, b=2, n=5, n_max=7, r=3, per_head=("w_k",), dtype=torch.float64)
    options = {"mechanism": mechanism, "source": source, "causal": causal, "padding_side": padding_side, "scale": 0.8}
    seq_lens = None if lengths is None else torch.tensor(lengths)
    expected = by_hand(**inputs, lengths=lengths, **options)
    actual = reference.refined_attention(**inputs, seq_lens=seq_lens, **options)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    if mechanism == "stochastic":
        del options["mechanism"]
        actual = stochastic_by_differences(**inputs, seq_lens=seq_lens, **options)
        torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_reference_gradcheck(mechanism, source, causal):
    inputs = draw(mechanism, h=1, n=3, d=2, dv=2, r=2, n_max=4, dtype=torch.float64)
    call = functools.partial(
        reference.refined_attention,
        mechanism=mechanism,
        source=source,
        causal=causal,
        seq_lens=torch.tensor([3, 0, 2]),
        padding_side="left",
    )
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *args: call(**dict(zip(inputs, args, strict=True))), leaves)


def test_stochastic_survives_tiny_covariances():
    """elu(x) rounds to -1 where its covariance is still a normal number."""
    inputs = draw("stochastic")
    inputs["w_q"][:, 6:] -= 30
    for function in (reference.refined_attention, cpu):
        for gradient in gradients(function, inputs, mechanism="stochastic", source="weights").values():
            assert gradient.isfinite().all()
    check(inputs, mechanism="stochastic", source="weights")


@pytest.mark.parametrize("function", [reference.refined_attention, cpu])
@pytest.mark.parametrize("offset", [0, 10])
def test_offset_of_the_gaussians(offset, function):
    """Rows of A sum to 1, so an offset of W_q and W_k moves every Gaussian. A larger one loses digits in A W itself."""
    inputs = draw("stochastic", n=30)
    inputs |= {name: inputs[name] + offset for name in ("w_q", "w_k")}
    few = torch.tensor([30, 0, 5])  # a mean that counts padding leaves most of the offset
    for padding in ({}, {"seq_lens": few}, {"seq_lens": few, "padding_side": "left"}):
        options = {"source": "weights", **padding}
        kernel = functools.partial(function, mechanism="stochastic", **options)
        low = functools.partial(stochastic_by_differences, **options)
        assert_matches_reference(kernel, low, inputs, grads=["q", "k", "v", "w_q", "w_k"])


# --- The CPU implementation ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [6, 70])  # below N, and at least N
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cpu_error(mechanism, source, causal, rank, dtype):
    inputs = draw(mechanism, b=4, n=63, dv=12, r=rank, n_max=70, dtype=dtype)
    check(inputs, mechanism=mechanism, source=source, causal=causal)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cpu_ragged_error(mechanism, source, causal, padding_side):
    inputs = draw(mechanism, b=6, h=1, n=40, r=41)
    seq_lens = torch.tensor([40, 0, 1, 33, 40, 17], dtype=torch.int32)
    check(inputs, mechanism=mechanism, source=source, causal=causal, seq_lens=seq_lens, padding_side=padding_side)


@pytest.mark.parametrize("n", [1, 100, 129, 200])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cpu_sizes(mechanism, causal, n):
    """Several blocks of rows, and chunks of the linear form with a state before and after them."""
    for source, rank in (("logits", 4), ("weights", 4), ("logits", n)):
        check(draw(mechanism, n=n, r=rank), mechanism=mechanism, source=source, causal=causal)


@pytest.mark.parametrize("per_head", [("w_q", "w_k", "w_v"), ("w_k",), ("w_q", "w_v")])
@pytest.mark.parametrize("mechanism", ["simple", "additive"])
def test_cpu_matrices_per_head(mechanism, per_head):
    for rank in (5, 12):
        inputs = draw(mechanism, h=3, n=10, r=rank, n_max=12, per_head=per_head)
        check(inputs, mechanism=mechanism, seq_lens=torch.tensor([10, 4, 0]), padding_side="left")


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cpu_float64_is_float64(mechanism):
    inputs = draw(mechanism, n=20, r=7, dtype=torch.float64)
    expected = gradients(reference.refined_attention, inputs, mechanism=mechanism)
    for name, gradient in gradients(cpu, inputs, mechanism=mechanism).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=0)


@pytest.mark.parametrize("mechanism", ["simple", "additive"])
def test_cpu_views(mechanism):
    """Heads behind tokens, a cut last axis, a transposed matrix."""
    inputs = draw(mechanism, n=20, r=20)
    views = views_of(inputs)
    check(inputs | views, mechanism=mechanism)
    check(inputs | views, mechanism=mechanism, seq_lens=torch.tensor([20, 4, 7]))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_cpu_reruns_are_bitwise_equal(mechanism):
    inputs = draw(mechanism, b=40, n=50, r=50)
    first, second = (gradients(cpu, inputs, mechanism=mechanism) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(cpu(**inputs, mechanism=mechanism), cpu(**inputs, mechanism=mechanism))


@pytest.mark.parametrize("function", [cpu, reference.refined_attention])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_past_never_sees_the_future(mechanism, source, function):
    for rank in (4, 12):
        inputs = draw(mechanism, n=12, r=rank, dtype=torch.float64)
        changed = {name: x.clone() for name, x in inputs.items()}
        for name in ("q", "k", "v"):
            changed[name][:, :, 7:] = torch.randn_like(changed[name][:, :, 7:])
        before, after = (function(**x, mechanism=mechanism, source=source) for x in (inputs, changed))
        torch.testing.assert_close(before[:, :, :7], after[:, :, :7], atol=1e-14, rtol=0)
        assert not torch.allclose(before[:, :, 7:], after[:, :, 7:])


@pytest.mark.parametrize("function", [cpu, reference.refined_attention])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_padding_never_matters(mechanism, padding_side, causal, function):
    """Padding may hold anything: outputs and gradients are those of the tokens alone, and zero at padding."""
    n = 10
    options = {"mechanism": mechanism, "causal": causal}
    for source, rank in product(SOURCES, (4, n)):
        inputs = draw(mechanism, b=2, n=n, r=rank, dtype=torch.float64)
        tokens, padding = slice(0, 6), slice(6, n)
        if padding_side == "left":
            tokens, padding = slice(4, n), slice(0, 4)
        dirty = {name: x.clone() for name, x in inputs.items()}
        alone = {name: x[:1, :, tokens] if name in "qkv" else x[tokens] for name, x in inputs.items()}
        if "w_v" in alone:
            alone["w_v"] = alone["w_v"][:, tokens]
        for name in ("q", "k", "v"):
            dirty[name][0, :, padding] = math.nan
            dirty[name][1] = math.inf
        padded = options | {"source": source, "seq_lens": torch.tensor([6, 0]), "padding_side": padding_side}
        out = function(**dirty, **padded)
        torch.testing.assert_close(out[:1, :, tokens], reference.refined_attention(**alone, source=source, **options))
        assert not out[0, :, padding].any() and not out[1].any()
        for name, gradient in gradients(function, dirty, **padded).items():
            assert gradient.isfinite().all(), name
            if name in "qkv":
                assert not gradient[0, :, padding].any() and not gradient[1].any()


@pytest.mark.parametrize("mechanism", ["simple", "additive"])
def test_rows_beyond_the_positions_are_unused(mechanism):
    inputs = draw(mechanism, n=10, r=4, n_max=14)
    for name in ("w_q", "w_k", "w_v"):
        if name in inputs:
            inputs[name][10:] = math.nan
    if mechanism == "additive":
        inputs["w_v"][:, 10:] = math.nan
    for function in (cpu, reference.refined_attention):
        assert function(**inputs, mechanism=mechanism).isfinite().all()
    for name, gradient in gradients(cpu, inputs, mechanism=mechanism).items():
        assert gradient.isfinite().all()
        assert not name.startswith("w") or not gradient[10:].any()


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("sizes", [{"b": 0}, {"h": 0}, {"n": 0, "n_max": 4}, {"dv": 0}])
@pytest.mark.parametrize("padded", [True, False])
def test_empty_sizes(mechanism, sizes, padded):
    inputs = draw(mechanism, **sizes)
    seq_lens = torch.zeros(inputs["q"].shape[0], dtype=torch.int64) if padded else None
    out = cpu(**inputs, mechanism=mechanism, seq_lens=seq_lens)
    assert out.shape == inputs["v"].shape
    for name, gradient in gradients(cpu, inputs, mechanism=mechanism, seq_lens=seq_lens).items():
        assert gradient.shape == inputs[name].shape
        assert not gradient.any()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism", ["simple", "stochastic"])
def test_memory_is_linear_in_the_positions(mechanism, source):
    peaks = {}
    for n in (512, 1024):
        inputs = draw(mechanism, b=2, h=1, n=n, d=32, dv=32, r=16)
        sizes = cpu_allocations(lambda inputs=inputs: gradients(cpu, inputs, mechanism=mechanism, source=source))
        peaks[n] = max(accumulate(sizes))
    assert max(sizes) <= 1024**2 * 4 / 4  # a quarter of one head's A
    assert peaks[1024] < 2.2 * peaks[512]


def test_memory_is_at_most_half_of_the_reference():
    """Not counting the output, its incoming gradient and the gradients, which both implementations hold."""
    inputs = draw("simple", b=256, h=1, n=50, d=50, dv=50, r=50)
    device = inputs["q"].device
    functions = (cpu, reference.refined_attention)
    ours, eager = (peak_memory(lambda f=f: gradients(f, inputs), device) for f in functions)
    shared = 5 * inputs["q"].nbytes
    assert ours - shared <= (eager - shared) / 2


# --- Packed and nested sequences ---


@pytest.mark.parametrize("function", [cpu, reference.refined_attention])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_packed_is_padded(mechanism, source, causal, function):
    """Outputs and every gradient, in float64."""
    inputs = draw(mechanism, b=5, r=4, n_max=12, per_head=("w_k",) if causal else (), dtype=torch.float64)
    options = {"mechanism": mechanism, "source": source, "causal": causal}
    lengths = [0, 9, 1, 0, 4]
    dense = gradients_of_tokens(function, inputs, **options, seq_lens=torch.tensor(lengths))
    tokens = packed(inputs, lengths)
    cu_seqlens = tokens.pop("cu_seqlens")
    actual = gradients_of_tokens(function, tokens, **options, cu_seqlens=cu_seqlens)
    expected = packed(dense, lengths) | {"out": packed({**dense, "q": dense["out"]}, lengths)["q"]}
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name], atol=1e-12, rtol=0)


def gradients_of_tokens(function, inputs, **options):
    """The output and the gradients of a sum that padding adds nothing to."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves, **options)
    gradients = torch.autograd.grad(out.square().sum(), [*leaves.values()])
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("function", ["eager", "compiled"])
def test_nested(function):
    """As packed, without a copy of the tokens; in one graph for all sizes."""
    torch.compiler.reset()
    call = functools.partial(refined_attention, mechanism="additive")
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for lengths in ([5, 0, 9, 2], [3, 8, 1, 1, 7]):
        inputs = draw("additive", b=len(lengths), n=max(lengths), n_max=12)
        tokens = packed(inputs, lengths)
        cu_seqlens = tokens.pop("cu_seqlens").long()
        expected = gradients_of_tokens(call, tokens, cu_seqlens=cu_seqlens)
        leaves = {name: x.detach().requires_grad_() for name, x in tokens.items()}
        nested = {
            name: torch.nested.nested_tensor_from_jagged(leaves[name], cu_seqlens).transpose(1, 2) for name in "qkv"
        }
        out = (compiled if function == "compiled" else call)(**{**leaves, **nested})
        assert out.is_nested and out.shape[1] == 2
        values = out.transpose(1, 2).values()
        torch.testing.assert_close(values, expected["out"])
        for name, gradient in zip(leaves, torch.autograd.grad(values.square().sum(), [*leaves.values()]), strict=True):
            torch.testing.assert_close(gradient, expected[name])


# --- The operators ---


@pytest.mark.parametrize("layout", ["windows", "packed"])
@pytest.mark.parametrize("mechanism", ["simple", "value"])
def test_opcheck(mechanism, layout):
    inputs = draw(mechanism)
    lengths = (torch.tensor([9, 0, 4]), torch.tensor([0, 9, 3]), None)
    if layout == "packed":
        inputs = packed(inputs, [9, 0, 4])
        lengths = (None, None, inputs["cu_seqlens"])
    max_seqlen = 9 if layout == "packed" else None
    options = (mechanism, "logits", True, 0.4, 0.0, max_seqlen, "cpu")
    arguments = (*(inputs.get(name) for name in TENSORS), *lengths, None, *options)
    torch.library.opcheck(torch.ops.recattn.refined_attention_fwd.default, arguments)
    dout = torch.randn_like(arguments[2])
    torch.library.opcheck(torch.ops.recattn.refined_attention_bwd.default, (dout, *arguments))


@pytest.mark.parametrize("mechanism", ["simple", "additive"])
def test_compiles_whole_without_recompiling(mechanism):
    torch.compiler.reset()
    compiled = torch.compile(refined_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, h, n, d, r in ((3, 2, 9, 8, 6), (5, 4, 20, 12, 10), (4, 3, 31, 16, 40)):
        inputs = draw(mechanism, b=b, h=h, n=n, d=d, dv=d + 5, r=r, n_max=n + 3)
        options = {"mechanism": mechanism, "seq_lens": torch.randint(n, (b,))}
        expected = gradients(cpu, inputs, **options)
        with torch.compiler.set_stance("fail_on_recompile" if b > 3 else "default"):
            actual = gradients(compiled, inputs, **options)
        for name in inputs:
            torch.testing.assert_close(actual[name], expected[name])


def test_autocast_casts_the_inputs():
    """As for PyTorch's own attention. Nothing inside the operator is cast."""
    inputs = draw("simple", n=20)
    low = {name: x.bfloat16() for name, x in inputs.items()}
    expected, expected_gradients = cpu(**low), gradients(cpu, low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, actual = cpu(**inputs), gradients(cpu, inputs)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    for name, gradient in actual.items():
        assert torch.equal(gradient, expected_gradients[name].float())


# --- Dispatch and bad input ---


def test_implementations():
    inputs = draw("simple", dtype=torch.float64)
    default = refined_attention(**inputs)
    assert torch.equal(default, cpu(**inputs))
    torch.testing.assert_close(default, refined_attention(**inputs, impl="reference"))
    with pytest.raises(NotImplementedError, match="refined_attention has no impl='correction'"):
        refined_attention(**inputs, impl="correction")
    with pytest.raises(NotImplementedError, match="cannot run impl='cpu' here: the tensors are on meta"):
        refined_attention(**{name: x.to("meta") for name, x in inputs.items()}, impl="cpu")


def zeros(*shape):
    return torch.zeros(shape)


PACKED = {"q": zeros(13, 2, 16), "k": zeros(13, 2, 16), "v": zeros(13, 2, 5), "cu_seqlens": torch.tensor([0, 9, 13])}


@pytest.mark.parametrize(
    "mechanism, changes, message",
    [
        ("simple", {"mechanism": "plain"}, "mechanism must be 'simple' or 'value' or .* got 'plain'"),
        ("simple", {"source": "scores"}, "source must be 'logits' or 'weights', got 'scores'"),
        ("simple", {"padding_side": "both"}, "padding_side must be 'right' or 'left', got 'both'"),
        ("simple", {"scale": math.nan}, "scale must be finite, got nan"),
        ("simple", {"q": None}, "q must be a torch.Tensor, got NoneType"),
        ("simple", {"q": zeros(3, 9, 8)}, r"q must be \[B, H, N, D\], got \[3, 9, 8\]"),
        ("simple", {"k": zeros(3, 2, 9, 7)}, r"k must be \[B, H, N, D\] = \[3, 2, 9, 16\], got \[3, 2, 9, 7\]"),
        ("simple", {"v": zeros(3, 2, 8, 5)}, r"v must be \[B, H, N, Dv\] = \[3, 2, 9, 5\], got \[3, 2, 8, 5\]"),
        ("simple", {"q": zeros(3, 2, 9, 0), "k": zeros(3, 2, 9, 0)}, "D of q and k must be at least 1, got 0"),
        ("simple", {"w_q": zeros(9)}, r"w_q must be \[Nmax, R\], got \[9\]"),
        ("simple", {"w_q": zeros(3, 9, 6)}, r"w_q must be \[H, Nmax, R\] = \[2, 9, 6\], got \[3, 9, 6\]"),
        ("simple", {"w_k": zeros(9, 5)}, r"w_k must be \[Nmax, R\] = \[9, 6\], got \[9, 5\]"),
        ("simple", {"w_k": zeros(2, 10, 6)}, r"w_k must be \[H, Nmax, R\] = \[2, 9, 6\], got \[2, 10, 6\]"),
        ("simple", {"w_q": zeros(8, 6), "w_k": zeros(8, 6)}, "Nmax of w_q and w_k must be at least N = 9, got 8"),
        ("simple", {"w_q": zeros(9, 0), "w_k": zeros(9, 0)}, "R of w_q and w_k must be at least 1, got 0"),
        ("stochastic", {"w_q": zeros(9, 5), "w_k": zeros(9, 5)}, "2R of w_q and w_k must be even .* got 5"),
        ("value", {"w_v": None}, "w_v must be a torch.Tensor, got NoneType"),
        ("value", {"w_v": zeros(9, 8)}, r"w_v must be \[Nmax, Nmax\] = \[9, 9\], got \[9, 8\]"),
        ("additive", {"w_v": zeros(3, 9, 9)}, r"w_v must be \[H, Nmax, Nmax\] = \[2, 9, 9\], got \[3, 9, 9\]"),
        ("simple", {"w_v": zeros(9, 9)}, "w_v must be None for mechanism='simple', got a tensor"),
        ("stochastic", {"w_v": zeros(9, 9)}, "w_v must be None for mechanism='stochastic', got a tensor"),
        ("simple", {"q": torch.zeros(3, 2, 9, 16, dtype=torch.int64)}, "q must be float64 or .* got int64"),
        ("simple", {"k": zeros(3, 2, 9, 16).double()}, "k must have the dtype of q, float32, got float64"),
        ("simple", {"w_k": zeros(9, 6).half()}, "w_k must have the dtype of q, float32, got float16"),
        ("simple", {"v": torch.zeros(3, 2, 9, 5, device="meta")}, "v must be on the device of q, cpu, got meta"),
        ("simple", {"seq_lens": [9, 9, 9]}, "seq_lens must be a torch.Tensor, got list"),
        ("simple", {"seq_lens": torch.tensor([9, 9])}, r"seq_lens must be \[B\] = \[3\], got \[2\]"),
        ("simple", {"seq_lens": zeros(3)}, "seq_lens must be int64 or int32, got float32"),
        ("simple", {"seq_lens": torch.tensor([9, 10, 0])}, "seq_lens must be between 0 and 9, got 10"),
        ("simple", {"seq_lens": torch.tensor([9, -1, 0])}, "seq_lens must be between 0 and 9, got -1"),
        ("simple", {"seq_starts": torch.tensor([0, 1, 0])}, "seq_lens must be given with seq_starts, got None"),
        ("simple", {"cu_seqlens": torch.tensor([0, 9])}, r"q must be \[T, H, D\], got \[3, 2, 9, 16\]"),
        ("simple", {"max_seqlen": 9}, "max_seqlen must be None but with cu_seqlens, got 9"),
        ("simple", PACKED | {"seq_lens": torch.tensor([9, 4])}, "seq_lens must be None beside cu_seqlens"),
        ("simple", PACKED | {"cu_seqlens": torch.tensor([], dtype=torch.int64)}, r"cu_seqlens must be \[B \+ 1\]"),
        ("simple", PACKED | {"cu_seqlens": torch.tensor([0, 9, 12])}, "cu_seqlens must be offsets from 0 to 13"),
        (
            "simple",
            PACKED | {"cu_seqlens": torch.tensor([0, 10, 13])},
            "Nmax of w_q and w_k must be at least the longest",
        ),
        ("simple", PACKED | {"max_seqlen": 8}, "max_seqlen must be at least the longest"),
    ],
)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_bad_input(mechanism, changes, message, impl):
    arguments = {**draw(mechanism), "mechanism": mechanism, "impl": impl, **changes}
    with pytest.raises(ValueError, match=message):
        refined_attention(**arguments)

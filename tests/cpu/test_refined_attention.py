"""refined_attention's CPU implementations: short and long sequences in C++, and chunked PyTorch matmuls."""

import functools
import math
from itertools import product

import pytest
import torch

from recattn import reference, refined_attention
from recattn._extension import MISSING
from recattn.ops.refined_attention import chunked
from recattn.ops.refined_attention import cpu as on_cpu
from recattn.testing import assert_matches_reference
from tests.helpers.instruction_sets import CAPABILITIES, results_at
from tests.helpers.interpreted import assert_matches_reference_twice_of_three
from tests.helpers.philox import dropout_weights
from tests.helpers.refined_inputs import cpu, packed, views_of

MECHANISMS = ("simple", "value", "additive")
SOURCES = ("logits", "weights")
compiled_kernels = pytest.mark.skipif("cpu" in MISSING, reason="needs the compiled extension")


@pytest.fixture(params=[pytest.param("short", marks=compiled_kernels), "chunked"])
def path(request, monkeypatch):
    """Run a test by both implementations of short sequences."""
    if request.param == "chunked":
        monkeypatch.setitem(on_cpu.MISSING, "cpu", "not compiled")
    return request.param


@pytest.fixture(
    params=[
        *(pytest.param((by, mechanism), marks=compiled_kernels) for by, mechanism in product(["short"], MECHANISMS)),
        pytest.param(("long", "simple"), marks=compiled_kernels),
        *product(["chunked"], MECHANISMS),
    ],
    ids="-".join,
)
def mechanism_and_n(request, monkeypatch):
    """Run a test by each implementation: the mechanisms and the length that it serves."""
    by, mechanism = request.param
    if by == "chunked":
        monkeypatch.setitem(on_cpu.MISSING, "cpu", "not compiled")
    return mechanism, on_cpu._LONGEST_IN_CPP + 5 if by == "long" else 21


@pytest.fixture
def served_by(monkeypatch):
    """The implementations that ran, in order."""
    calls = []
    for module, name in (
        (on_cpu, "cpp_fwd"),
        (on_cpu, "cpp_bwd"),
        (on_cpu, "long_fwd"),
        (on_cpu, "long_bwd"),
        (chunked, "chunked_fwd"),
        (chunked, "chunked_bwd"),
    ):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, name=name, function=function: calls.append(name) or function(*args)
        )
    return calls


def draw(mechanism, b=3, h=2, n=21, d=13, dv=7, r=5, n_max=None, per_head=False, dtype=torch.float32):
    """q, k, v and the matrices; scores stay moderate."""
    n_max = n + 2 if n_max is None else n_max
    columns = {"w_q": r, "w_k": r} | ({} if mechanism == "simple" else {"w_v": n_max})
    heads = [h] if per_head else []
    inputs = {"q": torch.randn(b, h, n, d), "k": torch.randn(b, h, n, d), "v": torch.randn(b, h, n, dv)}
    for name, width in columns.items():
        inputs[name] = torch.randn(*heads, n_max, width) / (2 * max(n, 1) ** 0.5)
    return {name: x.to(dtype) for name, x in inputs.items()}


def check(inputs, **options):
    kernel, low = (functools.partial(f, **options) for f in (cpu, reference.refined_attention))
    assert_matches_reference_twice_of_three(kernel, low, inputs, grads=list(inputs))


def run(function, inputs, **options):
    """The output and the gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(**leaves, **options)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), incoming)]


# --- Errors ---


@pytest.mark.parametrize("rank", [5, 24])  # below N, and at least N: W_q W_kᵀ folded
@pytest.mark.parametrize("lengths, padding_side", [(None, "right"), ([21, 0, 1, 8], "right"), ([21, 0, 1, 8], "left")])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_error(mechanism, source, causal, lengths, padding_side, rank, path):
    seq_lens = None if lengths is None else torch.tensor(lengths)
    options = {"causal": causal, "seq_lens": seq_lens, "padding_side": padding_side}
    check(draw(mechanism, b=4, r=rank), mechanism=mechanism, source=source, **options)


@pytest.mark.parametrize("n", [1, 15, 63, 100, 129])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_sizes(mechanism, causal, n, path):
    """Odd sizes of every axis, and ragged lengths."""
    # Every pair of them.
    for source, rank, padding_side in (
        ("logits", 7, "right"),
        ("logits", n + 1, "left"),
        ("weights", 7, "left"),
        ("weights", n + 1, "right"),
    ):
        seq_lens = torch.tensor([n, (n + 1) // 2, 0], dtype=torch.int32)
        options = {"source": source, "causal": causal, "seq_lens": seq_lens, "padding_side": padding_side}
        check(draw(mechanism, h=1, n=n, d=17, dv=33, r=rank), mechanism=mechanism, **options)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("n", [255, 256, 257, 512, 513])
def test_lengths_around_the_longest_short_one(n, source):
    for causal, lengths, padding_side in product((True, False), (None, [n, n - 97, 0]), ("right", "left")):
        if lengths is None and padding_side == "left":
            continue
        inputs = draw("simple", b=1 if lengths is None else 3, h=1, n=n, r=9)
        seq_lens = None if lengths is None else torch.tensor(lengths)
        check(inputs, source=source, causal=causal, seq_lens=seq_lens, padding_side=padding_side)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [5, 24])
def test_half_precision(rank, dtype, mechanism_and_n):
    mechanism, n = mechanism_and_n
    for source in SOURCES:
        inputs = draw(mechanism, n=n, r=rank, d=40, dtype=dtype)
        check(inputs, mechanism=mechanism, source=source, seq_lens=torch.tensor([n, 9, 0]), padding_side="left")


@pytest.mark.parametrize("rank", [5, 24])
def test_matrices_per_head(rank, mechanism_and_n):
    mechanism, n = mechanism_and_n
    inputs = draw(mechanism, h=3, n=n, r=rank, per_head=True)
    check(inputs, mechanism=mechanism, seq_lens=torch.tensor([n, 4, 0]), padding_side="left")
    if mechanism == "simple":
        inputs["w_k"] = inputs["w_k"][0].clone()
        check(inputs, source="weights")


@pytest.mark.parametrize("rank", [5, 24])
def test_views(rank, mechanism_and_n):
    """Heads behind tokens, a cut last axis, a transposed last axis, a transposed matrix, expanded gradients."""
    mechanism, n = mechanism_and_n
    inputs = draw(mechanism, n=n, d=16, r=rank)
    views = views_of(inputs)
    check(inputs | views, mechanism=mechanism)
    leaves = {name: x.requires_grad_() for name, x in (inputs | views).items()}
    gradients = torch.autograd.grad(cpu(**leaves, mechanism=mechanism).sum(), list(leaves.values()))
    out = reference.refined_attention(**leaves, mechanism=mechanism)
    for actual, expected in zip(gradients, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_chunks_and_blocks(mechanism, monkeypatch):
    """One batch-head a chunk, and three rows a block, where the defaults would make one of each."""
    monkeypatch.setitem(on_cpu.MISSING, "cpu", "not compiled")
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(chunked, "BLOCK_ROWS", 3)
    for rank, causal, source in product((4, 10), (True, False), SOURCES):
        inputs = draw(mechanism, n=10, r=rank)
        check(inputs, mechanism=mechanism, source=source, causal=causal, seq_lens=torch.tensor([10, 4, 7]))


@compiled_kernels
@pytest.mark.parametrize("magnitude", [1e2, 1e4])
@pytest.mark.parametrize("source", SOURCES)
def test_scores_beyond_what_exp_holds(source, magnitude):
    """Probabilities down to zero, also by the C++ exponential."""
    inputs = {name: x.double() for name, x in draw("additive", r=24).items()}
    options = {"mechanism": "additive", "source": source, "scale": magnitude}
    actual = run(cpu, {name: x.float() for name, x in inputs.items()}, **options)
    assert all(x.isfinite().all() for x in actual)
    low = run(reference.refined_attention, {name: x.float() for name, x in inputs.items()}, **options)[0]
    expected = run(reference.refined_attention, inputs, **options)[0]
    assert (actual[0] - expected).abs().max() <= 2 * (low - expected).abs().max() + 1e-5


# --- Padding ---


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_never_matters(padding_side, causal, mechanism_and_n):
    """Padding, and matrix rows beyond every token, may hold anything: the results are those of the tokens alone."""
    mechanism, n = mechanism_and_n
    length = n - 4
    for source, rank in product(SOURCES, (5, n)):
        options = {"mechanism": mechanism, "source": source, "causal": causal}
        inputs = draw(mechanism, n=n, r=rank, n_max=n)
        padding = slice(length, n) if padding_side == "right" else slice(0, n - length)
        clean, dirty = ({name: x.clone() for name, x in inputs.items()} for _ in range(2))
        for name in ("q", "k", "v"):
            for x, filling in ((clean, 0), (dirty, math.nan)):
                x[name][0, :, padding] = filling
                x[name][1] = filling
        seq_lens = {"seq_lens": torch.tensor([length, 0, n]), "padding_side": padding_side}
        actual, expected = (run(cpu, x, **options, **seq_lens) for x in (dirty, clean))
        assert all(map(torch.equal, actual, expected))
        for x in actual[:4]:  # out, dq, dk, dv
            assert not x[0, :, padding].any() and not x[1].any()
        assert all(x.isfinite().all() for x in actual)


def test_a_sequence_never_sees_another(mechanism_and_n):
    """A sequence full of NaN earlier in the batch changes nothing, nor does the scratch memory that it leaves."""
    mechanism, n = mechanism_and_n
    for rank, causal in product((5, 24), (True, False)):
        inputs = draw(mechanism, b=6, n=n, r=rank)
        options = {"mechanism": mechanism, "causal": causal, "seq_lens": torch.tensor([n, 4, n, 7, n, 18])}
        expected = run(cpu, inputs, **options)
        for name in ("q", "k", "v"):
            inputs[name][::2] = math.nan
        for actual, clean in zip(run(cpu, inputs, **options)[:4], expected, strict=False):
            assert torch.equal(actual[1::2], clean[1::2])


# --- Windows, and packed sequences ---


@pytest.mark.parametrize("rank", [5, 24])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_and_packed(rank, causal, mechanism_and_n):
    """Windows that begin anywhere on the N axis, and packed sequences, some of them empty."""
    mechanism, n = mechanism_and_n
    for source in SOURCES:
        options = {"mechanism": mechanism, "source": source, "causal": causal}
        inputs = draw(mechanism, b=4, n=n, r=rank, per_head=causal)
        starts, lengths = torch.tensor([2, n, 7, 1]), torch.tensor([n - 2, 0, 9, n - 3])
        check(inputs, **options, seq_lens=lengths, seq_starts=starts)
        check_packed(packed(inputs, [0, n, 9, n - 3]), **options)


def check_packed(inputs, **options):
    kernel, low = (functools.partial(f, **options) for f in (cpu, reference.refined_attention))
    grads = [name for name in inputs if name != "cu_seqlens"]
    of_packed = functools.partial(kernel, max_seqlen=int(inputs["cu_seqlens"].diff().max()))
    assert_matches_reference_twice_of_three(of_packed, low, inputs, grads=grads)


def test_packed_reruns_and_neighbours(mechanism_and_n):
    """The bits of a sequence depend neither on the run nor on the other sequences, even if these are NaN."""
    mechanism, n = mechanism_and_n
    inputs = draw(mechanism, b=4, n=n)
    options = {"mechanism": mechanism, "cu_seqlens": torch.tensor([0, 0, 9, 9 + n, 14 + n])}
    inputs |= {name: packed(inputs, [0, 9, n, 5])[name] for name in "qkv"}
    first, second = (run(cpu, inputs, **options) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for name in "qkv":
        inputs[name] = inputs[name].clone()
        inputs[name][9 : 9 + n] = math.nan
    for actual, clean in zip(run(cpu, inputs, **options)[:4], first, strict=False):
        assert torch.equal(actual[:9], clean[:9]) and torch.equal(actual[9 + n :], clean[9 + n :])


@compiled_kernels
@pytest.mark.parametrize("mechanism, n", [("value", 21), ("simple", 263)])
def test_packed_dropout_is_that_of_the_padded(mechanism, n):
    lengths = [n, n // 2, 0]
    inputs = draw(mechanism, n=n)
    results = []
    cu = packed(inputs, lengths)["cu_seqlens"]
    for options in ({"seq_lens": torch.tensor(lengths)}, {"cu_seqlens": cu}):
        torch.manual_seed(7)
        tensors = inputs if "seq_lens" in options else {**inputs, **{x: packed(inputs, lengths)[x] for x in "qkv"}}
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        out = cpu(**leaves, mechanism=mechanism, dropout_p=0.3, **options)
        gradients = torch.autograd.grad(out.square().sum(), list(leaves.values()))
        named = {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}
        if "seq_lens" in options:
            named |= {"q": named["q"], "k": named["k"], "v": named["v"]}
            flat = packed(named, lengths)
            flat["out"] = packed({x: named["out"] for x in "qkv"}, lengths)["q"]
            named = {name: flat[name] for name in named}
        results.append(named)
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, msg=name)


# --- Dropout ---


def with_mask(q, k, v, keep, **options) -> torch.Tensor:
    """(P ∘ keep) V in full; P is the output for values that tell keys apart."""
    each = torch.eye(q.shape[2], dtype=q.dtype).expand(*q.shape[:3], -1)
    p = reference.refined_attention(q, k, each, **options)
    return (p * keep).to(v.dtype) @ v


def dropout_masks(seed: int, b: int, h: int, n: int, lengths: list[int], padding_side: str) -> torch.Tensor:
    """[b, h, n, n]: rows and columns count from each sequence's first token."""
    masks = torch.ones(b, h, n, n, dtype=torch.float64)
    for batch, head in product(range(b), range(h)):
        start = n - lengths[batch] if padding_side == "left" else 0
        tokens = slice(start, start + lengths[batch])
        size = lengths[batch]
        masks[batch, head, tokens, tokens] = dropout_weights(seed, batch * h + head, 0, size, size, 0.3)
    return masks


@compiled_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "mechanism, n, rank",
    [*((mechanism, 21, rank) for mechanism in MECHANISMS for rank in (5, 24)), ("simple", 263, 7), ("value", 263, 7)],
)
def test_dropout(mechanism, n, rank, source, dtype):
    heads = 2 if n == 21 else 1
    for causal, padding_side in ((True, "right"), (False, "left")):
        inputs = draw(mechanism, h=heads, n=n, r=rank, dtype=dtype)
        lengths = [n, n // 2, 0]
        torch.manual_seed(7)
        seed = torch.randint(2**63 - 1, (1,)).item()
        inputs["keep"] = dropout_masks(seed, 3, heads, n, lengths, padding_side).to(dtype)
        options = {"mechanism": mechanism, "source": source, "causal": causal}
        options |= {"seq_lens": torch.tensor(lengths), "padding_side": padding_side}

        def dropped(keep, options=options, **tensors):
            torch.manual_seed(7)
            return cpu(**tensors, **options, dropout_p=0.3)

        expected = functools.partial(with_mask, **options)
        assert_matches_reference(dropped, expected, inputs, grads=[name for name in inputs if name != "keep"])


@pytest.mark.parametrize(
    "changes, reason",
    [({"dtype": torch.float64}, "computes in float32"), ({"missing": True}, "it has no dropout")],
)
def test_dropout_that_runs_the_reference(changes, reason, monkeypatch):
    if changes.pop("missing", False) or "cpu" in MISSING:
        monkeypatch.setitem(on_cpu.MISSING, "cpu", "not compiled")
    inputs = draw("simple", **changes)
    torch.manual_seed(7)
    out = refined_attention(**inputs, dropout_p=0.3)
    torch.manual_seed(7)
    torch.testing.assert_close(out, refined_attention(**inputs, dropout_p=0.3, impl="reference"))
    if "cpu" not in MISSING or "no dropout" in reason:
        with pytest.raises(NotImplementedError, match=reason):
            cpu(**inputs, dropout_p=0.3)


# --- Determinism ---


@pytest.mark.parametrize("rank", [5, 50])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_reruns_are_bitwise_equal(mechanism, rank, path):
    inputs = draw(mechanism, b=40, n=50, r=rank)
    options = {"mechanism": mechanism, "seq_lens": torch.randint(51, (40,)), "padding_side": "left"}
    assert all(map(torch.equal, run(cpu, inputs, **options), run(cpu, inputs, **options)))


@compiled_kernels
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mechanism, b, n", [*((mechanism, 40, 50) for mechanism in MECHANISMS), ("simple", 3, 400)])
def test_threads_change_no_bit(mechanism, b, n, source, dropout_p):
    inputs = draw(mechanism, b=b, n=n, r=50)
    options = {"mechanism": mechanism, "source": source, "dropout_p": dropout_p}
    options |= {"seq_lens": torch.randint(n + 1, (b,)), "padding_side": "left"}
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(7)
        results.append(run(cpu, inputs, **options))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


# --- Instruction sets ---


def run_each(cases):
    results = []
    for inputs, incoming, options in cases:
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        out = refined_attention(**leaves, **options, impl="cpu")
        results.append([out.detach(), *torch.autograd.grad(out, list(leaves.values()), incoming)])
    return results


@compiled_kernels
@pytest.mark.parametrize("capability", CAPABILITIES[:3])
def test_every_instruction_set(capability, tmp_path):
    cases = []
    for mechanism, source, causal, rank in product(MECHANISMS, SOURCES, (True, False), (19, 71)):
        inputs = draw(mechanism, n=63, d=37, dv=45, r=rank)
        options = {"mechanism": mechanism, "source": source, "causal": causal, "padding_side": "left"}
        cases.append((inputs, torch.randn_like(inputs["v"]), options | {"seq_lens": torch.tensor([63, 0, 22])}))
    for source, causal in product(SOURCES, (True, False)):
        inputs = draw("simple", b=1, n=271, d=37, dv=45, r=19)
        cases.append((inputs, torch.randn_like(inputs["v"]), {"source": source, "causal": causal}))
    results = results_at(capability, run_each, cases, tmp_path)
    for (inputs, incoming, options), result in zip(cases, results, strict=True):

        def all_results(inputs=inputs, incoming=incoming, options=options, **tensors):
            leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
            out = reference.refined_attention(**leaves, **options)
            return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), incoming.to(out.dtype))]

        assert_matches_reference(lambda result=result, **_: result, all_results, inputs)


# --- What runs where ---


@compiled_kernels
def test_what_the_compiled_kernels_serve(served_by):
    run(cpu, draw("simple"))
    run(cpu, draw("value", dtype=torch.bfloat16), mechanism="value")
    assert served_by == ["cpp_fwd", "cpp_bwd"] * 2
    served_by.clear()
    long = {"n": on_cpu._LONGEST_IN_CPP + 1, "b": 1, "h": 1}
    run(cpu, draw("simple", **long))
    assert served_by == ["long_fwd", "long_bwd"]
    served_by.clear()
    run(cpu, draw("additive", **long), mechanism="additive", dropout_p=0.5)
    assert served_by == ["cpp_fwd", "cpp_bwd"]


@pytest.mark.parametrize(
    "inputs",
    [
        draw("simple", dtype=torch.float64),
        draw("simple", n=on_cpu._LONGEST_IN_CPP + 1, b=1, h=1, r=on_cpu._LONGEST_IN_CPP + 1),
        draw("value", n=on_cpu._LONGEST_IN_CPP + 1, b=1, h=1) | {"mechanism": "value"},
        draw("simple", b=0),
        draw("simple", n=0),
        draw("additive", dv=0) | {"mechanism": "additive"},
    ],
    ids=["float64", "long, R = N", "long, value", "no sequences", "no positions", "no values"],
)
def test_what_is_chunked(inputs, served_by):
    options = {"mechanism": inputs.get("mechanism", "simple")}
    tensors = {name: x for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    out, *gradients = run(cpu, tensors, **options)
    assert served_by == ["chunked_fwd", "chunked_bwd"]
    expected, *expected_gradients = run(reference.refined_attention, tensors, **options)
    torch.testing.assert_close(out, expected)
    for actual, gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-4, rtol=1e-4)


def test_all_is_chunked_without_the_extension(served_by, monkeypatch):
    monkeypatch.setitem(on_cpu.MISSING, "cpu", "not compiled")
    for mechanism in MECHANISMS:
        check(draw(mechanism), mechanism=mechanism)
    assert set(served_by) == {"chunked_fwd", "chunked_bwd"}


PACKED = {"q": torch.zeros(40, 2, 13), "k": torch.zeros(40, 2, 13), "v": torch.zeros(40, 2, 7)}


@compiled_kernels
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": torch.zeros(3, 2, 21, 12)}, r"k must be \[B, H, N, D\] = \[3, 2, 21, 13\], got \[3, 2, 21, 12\]"),
        ({"v": torch.zeros(3, 2, 20, 7)}, r"v must be \[B, H, N, Dv\] = \[3, 2, 21, 7\], got \[3, 2, 20, 7\]"),
        ({"v": torch.zeros(3, 2, 21, 7).half()}, "v must have the dtype of q, float32, got float16"),
        ({"w_q": torch.zeros(3, 23, 5)}, r"w_q must be \[H, Nmax, R\] = \[2, 23, 5\], got \[3, 23, 5\]"),
        ({"w_k": torch.zeros(23, 6)}, r"w_k must be \[Nmax, R\] = \[23, 5\], got \[23, 6\]"),
        ({"w_q": torch.zeros(20, 5), "w_k": torch.zeros(20, 5)}, "Nmax of w_q and w_k must be at least N = 21, got 20"),
        ({"w_v": torch.zeros(23, 22)}, r"w_v must be \[Nmax, Nmax\] = \[23, 23\], got \[23, 22\]"),
        ({"w_k": torch.zeros(23, 5).double()}, "w_k must have the dtype of q, float32, got float64"),
        ({"seq_lens": torch.tensor([21, 22, 0])}, "seq_lens must be between 0 and 21, got 22"),
        ({"seq_lens": torch.tensor([21, -1, 0])}, "seq_lens must be between 0 and 21, got -1"),
        ({"seq_lens": torch.tensor([21, 1])}, r"seq_lens must be \[B\] = \[3\], got \[2\]"),
        (
            {"seq_lens": torch.tensor([21, 2, 0]), "seq_starts": torch.tensor([0, 20, 0])},
            r"seq_starts must be between 0 and N - seq_lens = 19, got 20 at index \[1\]",
        ),
        ({"seq_starts": torch.tensor([0, 2, 0])}, "seq_starts must be None without seq_lens"),
        ({"cu_seqlens": torch.tensor([0, 21])}, r"q must be \[T, H, D\], got \[3, 2, 21, 13\]"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 8, 42])}, "cu_seqlens must be offsets from 0 to 40"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 24, 40])}, "Nmax of .* at least the longest sequence, 24, got 23"),
        (PACKED | {"cu_seqlens": torch.tensor([0, 20, 8, 40])}, r"cu_seqlens must be ascending, got 8 at index \[2\]"),
    ],
)
def test_operators_refuse_what_does_not_fit(changes, message):
    inputs = draw("simple")
    tensors = {**inputs, **dict.fromkeys(("w_v", "seq_lens", "seq_starts", "cu_seqlens")), **changes}
    options = (False, False, True, None, None, 0.0)
    with pytest.raises(ValueError, match=message):
        torch.ops.recattn.refined_attention_pairs_fwd(*tensors.values(), *options)
    with pytest.raises(ValueError, match=message):
        torch.ops.recattn.refined_attention_pairs_bwd(inputs["v"], *tensors.values(), *options)

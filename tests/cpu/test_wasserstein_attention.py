"""The C++ kernels of wasserstein_attention and of refined_attention's stochastic mechanism."""

import functools
import math
from itertools import product

import pytest
import torch

import recattn
from recattn import reference, refined_attention, wasserstein_attention
from recattn._extension import MISSING
from recattn._options import RefinedAttentionOptions, WassersteinAttentionOptions
from recattn.ops import refined_attention as refined_ops
from recattn.ops import wasserstein_attention as ops
from recattn.ops.refined_attention import cpu as on_cpu
from recattn.reference.sink_attention import window_starts
from recattn.testing import assert_matches_reference
from tests.helpers.instruction_sets import CAPABILITIES, results_at
from tests.helpers.refined_inputs import views_of
from tests.helpers.wasserstein_inputs import NAMES
from tests.helpers.wasserstein_inputs import draw as draw_gaussians

pytestmark = pytest.mark.skipif("cpu" in MISSING, reason="needs the compiled extension")

# Plain, refined, and refined_attention's stochastic mechanism with either source.
KINDS = ("plain", "refined logits", "refined weights", "stochastic logits", "stochastic weights")
HALF = [torch.bfloat16, torch.float16]


def draw(kind, b=3, h=2, n=21, d=13, dv=7, rank=5, n_max=None, per_head=(), dtype=torch.float32) -> dict:
    mechanism, _, source = kind.partition(" ")
    if mechanism != "stochastic":
        rank = None if kind == "plain" else rank
        return draw_gaussians(b, h, n, d, dv, rank, n_max, per_head, source, dtype)
    inputs = {name: torch.randn(b, h, n, size) for name, size in (("q", d), ("k", d), ("v", dv))}
    for name in ("w_q", "w_k"):
        matrix = torch.randn(*[h] * (name in per_head), n + 2 if n_max is None else n_max, 2 * rank)
        inputs[name] = matrix / (1 if source == "weights" else 2 * max(n, 1) ** 0.5)
    return {name: x.to(dtype) for name, x in inputs.items()}


def functions(kind, impl="cpu", **options):
    """The function and its reference."""
    mechanism, _, source = kind.partition(" ")
    if source:
        options["source"] = source
    if mechanism == "stochastic":
        pair = refined_attention, reference.refined_attention
        options["mechanism"] = mechanism
    else:
        pair = wasserstein_attention, reference.wasserstein_attention
    return functools.partial(pair[0], impl=impl, **options), functools.partial(pair[1], **options)


def check(kind, inputs, **options):
    assert_matches_reference(*functions(kind, **options), inputs, grads=list(inputs))


def run(function, inputs, incoming=None):
    """The outputs and the gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outs = function(**leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    if incoming is None:
        generator = torch.Generator().manual_seed(7)
        incoming = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, list(leaves.values()), incoming)]


# --- Errors ---


@pytest.mark.parametrize("lengths, padding_side", [(None, "right"), ([21, 0, 1, 8], "right"), ([21, 0, 1, 8], "left")])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_error(kind, causal, lengths, padding_side):
    seq_lens = None if lengths is None else torch.tensor(lengths)
    check(kind, draw(kind, b=4), causal=causal, seq_lens=seq_lens, padding_side=padding_side)


@pytest.mark.parametrize("n", [1, 15, 128, 129, 200])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind, causal, n):
    """Odd sizes of every axis, and ragged lengths: one block of rows, or several."""
    seq_lens = torch.tensor([n, min(n, 128), (n + 1) // 2, 0], dtype=torch.int32)
    for rank, padding_side in ((7, "right"), (n + 1, "left")):
        inputs = draw(kind, b=4, h=1, n=n, d=17, dv=33, rank=rank)
        check(kind, inputs, causal=causal, seq_lens=seq_lens, padding_side=padding_side)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, dtype):
    check(kind, draw(kind, d=40, dtype=dtype), seq_lens=torch.tensor([21, 9, 0]), padding_side="left")


@pytest.mark.parametrize("per_head", [("w_q",), ("w_q", "w_k")], ids=str)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_matrices_per_head(kind, per_head):
    inputs = draw(kind, h=3, n_max=24, per_head=per_head)
    check(kind, inputs, seq_lens=torch.tensor([21, 4, 0]), padding_side="left")


@pytest.mark.parametrize("kind", KINDS[3:])
def test_views(kind):
    """Heads behind tokens, a cut last axis, a transposed last axis, a transposed matrix, expanded gradients."""
    inputs = draw(kind, d=16)
    views = inputs | views_of(inputs)
    check(kind, views)
    kernel, expected = functions(kind)
    ones = [torch.ones(()).expand(inputs["v"].shape)]
    for actual, gradient in zip(run(kernel, views, ones), run(expected, views, ones), strict=True):
        torch.testing.assert_close(actual, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("x", [0.0, -1e-6, 1e-6, -0.6, -40.0, -100.0, 60.0])
def test_standard_deviations_of_elu(x):
    """Covariances elu(x) + 1 near 1, near 0 and large, of every row."""
    inputs = draw("stochastic weights", n=9)
    inputs["w_q"][:, 5:], inputs["w_k"][:, 5:] = x + inputs["w_q"][:, 5:] / 8, x + inputs["w_k"][:, 5:] / 8
    check("stochastic weights", inputs)


# --- Dropout ---


def with_mask(function, *, keep, **inputs):
    """The outputs for weights P ∘ keep; P is the output for values that tell keys apart."""
    values = ("mean_v", "cov_v") if "mean_v" in inputs else ("v",)
    given = {name: inputs.pop(name) for name in values}
    each = torch.eye(keep.shape[-1], dtype=keep.dtype).expand(*keep.shape[:3], -1)
    p = function(**inputs, **dict.fromkeys(values, each))
    p = (p[0] if len(values) == 2 else p) * keep
    outs = tuple(weights @ x for weights, x in zip((p, p.square()), given.values(), strict=False))
    return outs if len(values) == 2 else outs[0]


def dropped(kind, seed, seq_lens, padding_side, p, **inputs):
    mechanism, _, source = kind.partition(" ")
    seq_starts = window_starts(padding_side, next(iter(inputs.values())).shape[2], seq_lens)
    if mechanism == "stochastic":
        tensors = [inputs[name] for name in ("q", "k", "v", "w_q", "w_k")]
        options = RefinedAttentionOptions("stochastic", source or "logits", True, None, p, impl="cpu")
        return refined_ops.refined_attention(*tensors, None, seq_lens, seq_starts, None, seed, options)
    tensors = [inputs.get(name) for name in (*NAMES, "w_q", "w_k")]
    lengths = (seq_lens, seq_starts, None)
    options = WassersteinAttentionOptions(source or "logits", True, None, p, impl="cpu")
    return ops.wasserstein_attention(tuple(tensors[:6]), *tensors[6:], lengths, seed, options)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind, padding_side):
    """The mask of the Triton kernels, in both products and in every gradient."""
    pytest.importorskip("triton")
    from tests.triton.test_sink_attention import dropout_mask

    n, lengths = 40, [40, 0, 23]
    inputs, seed = draw(kind, n=n), torch.tensor([2**40 + 5])
    keep = torch.zeros(3, 2, n, n)
    for bh, (batch, head) in enumerate(product(range(3), range(2))):
        start = 0 if padding_side == "right" else n - lengths[batch]
        tokens = slice(start, start + lengths[batch])
        mask = dropout_mask(seed, bh, 0, n, round(0.3 * 65536))
        keep[batch, head, tokens, tokens] = mask[: lengths[batch], : lengths[batch]].float()
    mask = {"seq_lens": torch.tensor(lengths), "padding_side": padding_side}
    low = functools.partial(with_mask, functions(kind, **mask)[1])
    kernel = functools.partial(dropped, kind, seed, p=0.3, **mask)
    grads = list(inputs)
    assert_matches_reference(lambda keep, **x: kernel(**x), low, inputs | {"keep": keep}, grads=grads)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_long_sequences(kind):
    """Where rows come in blocks, with a mask that the kernel gives for values that tell keys apart."""
    n, seed = 150, torch.tensor([11])
    inputs = draw(kind, b=1, h=1, n=n)
    values = ("mean_v", "cov_v") if "mean_v" in inputs else ("v",)
    each = dict.fromkeys(values, torch.eye(n).expand(1, 1, n, n))
    kernel = functools.partial(dropped, kind, seed, None, "right", 0.25)
    p = kernel(**inputs | each)
    keep = ((p[0] if len(values) == 2 else p) != 0) / 0.75
    assert 0.70 < (keep != 0).sum() / (n * (n + 1) / 2) < 0.80
    low = functools.partial(with_mask, functions(kind)[1])
    assert_matches_reference(lambda keep, **x: kernel(**x), low, inputs | {"keep": keep}, grads=list(inputs))


def test_dropout_is_drawn_from_the_generator():
    for kind in ("plain", "stochastic weights"):
        kernel, inputs = functions(kind, impl=None, dropout_p=0.5)[0], draw(kind)
        results = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            results.append(run(kernel, inputs))
        assert all(map(torch.equal, results[0], results[1]))
        assert not torch.equal(results[0][0], results[2][0])


def test_no_second_derivative_of_dropout():
    for kind in ("plain", "stochastic weights"):
        inputs = {name: x.requires_grad_() for name, x in draw(kind).items()}
        out = functions(kind, dropout_p=0.5)[0](**inputs)
        out = out[0] if isinstance(out, tuple) else out
        with pytest.raises(NotImplementedError, match="has no second derivative"):
            torch.autograd.grad(out.sum(), list(inputs.values()), create_graph=True, allow_unused=True)


# --- Padding ---


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_never_matters(kind, padding_side, causal):
    """Padding, and matrix rows beyond every token, may hold anything: the results are those of the tokens alone."""
    n, length = 21, 17
    inputs = draw(kind, n=n, n_max=n)
    padding = slice(length, n) if padding_side == "right" else slice(0, n - length)
    clean, dirty = ({name: x.clone() for name, x in inputs.items()} for _ in range(2))
    tokens = [name for name, x in inputs.items() if x.dim() == 4]
    for x, filling in ((clean, 0), (dirty, math.nan)):
        for name in tokens:
            x[name][0, :, padding] = filling
            x[name][1] = filling
    kernel, _ = functions(kind, causal=causal, seq_lens=torch.tensor([length, 0, n]), padding_side=padding_side)
    actual, expected = (run(kernel, x) for x in (dirty, clean))
    assert all(map(torch.equal, actual, expected))
    assert all(x.isfinite().all() for x in actual)
    for x in actual:
        if x.dim() == 4:
            assert not x[0, :, padding].any() and not x[1].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_never_sees_another(kind, causal):
    """A sequence full of NaN earlier in the batch changes nothing, nor does the scratch memory that it leaves."""
    inputs = draw(kind, b=6)
    kernel, _ = functions(kind, causal=causal, seq_lens=torch.tensor([21, 4, 21, 7, 21, 18]))
    expected = run(kernel, inputs)
    tokens = [name for name, x in inputs.items() if x.dim() == 4]
    for name in tokens:
        inputs[name][::2] = math.nan
    for actual, clean in zip(run(kernel, inputs), expected, strict=True):
        if clean.dim() == 4:
            assert torch.equal(actual[1::2], clean[1::2])


# --- Determinism ---


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_threads_change_no_bit(kind, dropout_p):
    inputs = draw(kind, b=40, n=50, rank=50)
    kernel, _ = functions(kind, seq_lens=torch.randint(51, (40,)), padding_side="left", dropout_p=dropout_p)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        torch.manual_seed(5)
        results.append(run(kernel, inputs))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


# --- Instruction sets ---


def run_each(cases):
    return [
        run(functools.partial(getattr(recattn, name), **options, impl="cpu"), inputs, incoming)
        for name, inputs, incoming, options in cases
    ]


@pytest.mark.parametrize("capability", CAPABILITIES[:3])
def test_every_instruction_set(capability, tmp_path):
    cases, expected = [], []
    for kind, causal in product(KINDS, (True, False)):
        inputs = draw(kind, n=63, d=37, dv=45, rank=19)
        kernel, low = functions(kind, causal=causal, padding_side="left", seq_lens=torch.tensor([63, 0, 22]))
        count = 1 if "v" in inputs else 2
        incoming = [torch.randn(3, 2, 63, 45) for _ in range(count)]
        options = {name: x for name, x in kernel.keywords.items() if name != "impl"}
        cases.append((kernel.func.__name__, inputs, incoming, options))
        expected.append(
            lambda low=low, incoming=incoming, **x: run(
                low, x, [dout.to(x["w_q" if "q" in x else "mean_q"]) for dout in incoming]
            )
        )
    results = results_at(capability, run_each, cases, tmp_path)
    for (_, inputs, *_), low, result in zip(cases, expected, results, strict=True):
        assert_matches_reference(lambda result=result, **_: result, low, inputs)


# --- What runs where, and what is refused ---


def test_what_the_compiled_kernels_serve(monkeypatch):
    calls = []
    for name in ("stochastic_fwd", "stochastic_bwd"):
        function = getattr(on_cpu, name)
        monkeypatch.setattr(on_cpu, name, lambda *x, name=name, f=function: calls.append((name, x[0].dtype)) or f(*x))
    kernel, _ = functions("stochastic logits")
    for dtype in (torch.float32, torch.float16, torch.float64):
        run(kernel, draw("stochastic logits", dtype=dtype))
    monkeypatch.setattr(on_cpu, "_LONGEST_QUADRATIC", 20)
    run(kernel, draw("stochastic logits"))
    assert calls == list(product(("stochastic_fwd", "stochastic_bwd"), (torch.float32,))) + list(
        product(("stochastic_fwd", "stochastic_bwd"), (torch.float16,))
    )


def test_without_the_extension(monkeypatch):
    monkeypatch.setitem(MISSING, "cpu", "not compiled")
    assert ops.unsupported_reasons("cpu")["cpu"] == "not compiled"
    assert "not compiled" in refined_ops.unsupported_reasons("cpu", mechanism="stochastic", dropout_p=0.5)["cpu"]
    for kind in KINDS:
        kernel, low = functions(kind, impl=None)
        for actual, expected in zip(run(kernel, draw(kind)), run(low, draw(kind)), strict=True):
            assert actual.shape == expected.shape


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"mean_k": torch.zeros(3, 2, 21, 12)},
            r"mean_k must be \[B, H, N, D\] = \[3, 2, 21, 13\], got \[3, 2, 21, 12\]",
        ),
        (
            {"cov_q": torch.zeros(3, 2, 21, 12)},
            r"cov_q must be \[B, H, N, D\] = \[3, 2, 21, 13\], got \[3, 2, 21, 12\]",
        ),
        ({"cov_v": torch.zeros(3, 2, 20, 7)}, r"cov_v must be \[B, H, N, Dv\] = \[3, 2, 21, 7\], got \[3, 2, 20, 7\]"),
        ({"mean_v": torch.zeros(3, 2, 21, 7).half()}, "mean_v must have the dtype of mean_q, float32, got float16"),
        ({"cov_k": None}, "cov_q, cov_k and cov_v must be given together"),
        ({"w_k": None}, "w_q and w_k must be given together"),
        (dict.fromkeys(("cov_q", "cov_k", "cov_v", "w_q", "w_k")), "w_q must be a tensor without cov_q"),
        ({"w_q": torch.zeros(3, 21, 10)}, r"w_q must be \[H, Nmax, 2R\] = \[2, 21, 10\], got \[3, 21, 10\]"),
        ({"w_k": torch.zeros(21, 6)}, r"w_k must be \[Nmax, 2R\] = \[21, 10\], got \[21, 6\]"),
        (dict.fromkeys(("w_q", "w_k"), torch.zeros(20, 10)), "Nmax of w_q and w_k must be at least N = 21, got 20"),
        (dict.fromkeys(("w_q", "w_k"), torch.zeros(21, 5)), "2R of w_q and w_k must be even and at least 2, got 5"),
        ({"w_k": torch.zeros(21, 10).double()}, "w_k must have the dtype of mean_q, float32, got float64"),
        ({"seq_lens": torch.tensor([21, 22, 0])}, "seq_lens must be between 0 and 21, got 22"),
        ({"seq_lens": torch.tensor([21, -1, 0])}, "seq_lens must be between 0 and 21, got -1"),
        ({"seq_lens": torch.tensor([21, 1])}, r"seq_lens must be \[B\] = \[3\], got \[2\]"),
    ],
)
def test_operators_refuse_what_does_not_fit(changes, message):
    absent = dict.fromkeys(("seq_lens", "seq_starts", "cu_seqlens", "dropout_seed"))
    inputs = draw("refined logits") | absent | changes
    options = (False, True, None, 0.0)
    with pytest.raises(ValueError, match=message):
        torch.ops.recattn.wasserstein_attention_pairs_fwd(*inputs.values(), *options)
    douts = torch.zeros(3, 2, 21, 7), None if inputs["cov_v"] is None else torch.zeros(3, 2, 21, 7)
    with pytest.raises(ValueError, match=message):
        torch.ops.recattn.wasserstein_attention_pairs_bwd(*douts, *inputs.values(), *options)

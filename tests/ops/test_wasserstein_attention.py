"""wasserstein_attention: the reference against the definition, the CPU implementation against the reference."""

import functools
import math
from itertools import product

import pytest
import torch

import recattn
from recattn import reference
from recattn.testing import assert_matches_reference
from tests.helpers.by_differences import wasserstein_by_differences
from tests.helpers.wasserstein_inputs import (
    NAMES,
    assert_packed_equals_padded,
    assert_reruns_agree,
    draw,
    gradients,
    largest_tensor,
    offsets_of,
    pack,
    packed,
    with_offset,
)

SOURCES = ("logits", "weights")
# Lengths, and where the tokens begin.
PADDINGS = [(None, None), ([3, 0], None), ([3, 0], [2, 5]), ([3, 1], [1, 3])]
cpu = functools.partial(recattn.wasserstein_attention, impl="cpu")
DTYPE = {reference.wasserstein_attention: torch.float64, cpu: torch.float32}


def check(inputs, **options):
    kernel, low = (functools.partial(f, **options) for f in (cpu, reference.wasserstein_attention))
    assert_matches_reference(kernel, low, inputs, grads=list(inputs))


# --- The reference ---


def by_hand(mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, w_q=None, w_k=None, *, source="logits", causal, lengths, **o):
    """One query at a time; the 2-Wasserstein distance of two Gaussians from its definition."""
    mean, covariance = torch.zeros_like(mean_v), torch.zeros_like(cov_v)
    b, h, n, _ = mean_q.shape
    for pair in product(range(b), range(h)):
        length = n if lengths is None else lengths[pair[0]]
        start = 0 if o["starts"] is None else o["starts"][pair[0]]
        tokens = range(start, start + length)
        seen = {i: [j for j in tokens if j <= i or not causal] for i in tokens}
        queries = {i: (mean_q[pair][i], cov_q[pair][i]) for i in tokens}
        keys = {j: (mean_k[pair][j], cov_k[pair][j]) for j in tokens}
        scores = {i: {j: -o["scale"] * distance(queries[i], keys[j]) for j in seen[i]} for i in tokens}
        if w_q is not None:
            a = scores if source == "logits" else {i: softmax(row) for i, row in scores.items()}
            of_query, of_key = (w if w.dim() == 2 else w[pair[1]] for w in (w_q, w_k))
            rank = w_q.shape[-1] // 2
            queries, keys = ({i: projected(row, w) for i, row in a.items()} for w in (of_query, of_key))
            scores = {i: {j: -distance(queries[i], keys[j]) / rank**0.5 for j in seen[i]} for i in tokens}
        for i in tokens:
            for j, p in softmax(scores[i]).items():
                mean[pair][i] += p * mean_v[pair][j]
                covariance[pair][i] += p**2 * cov_v[pair][j]
    return mean, covariance


def distance(a, b) -> float:
    """Tr(A + B - 2 (A^½ B A^½)^½) with diagonal A and B, beside the means' distance."""
    (mean_i, cov_i), (mean_j, cov_j) = a, b
    trace = (cov_i + cov_j - 2 * (cov_i.sqrt() * cov_j * cov_i.sqrt()).sqrt()).sum()
    return float((mean_i - mean_j).pow(2).sum() + trace)


def softmax(row: dict[int, float]) -> dict[int, float]:
    total = math.fsum(math.exp(x) for x in row.values())
    return {j: math.exp(x) / total for j, x in row.items()}


def projected(row: dict[int, float], w):
    """The Gaussian of a row of A."""
    x = sum(a * w[j] for j, a in row.items())
    mean, x = x.chunk(2)
    return mean, torch.nn.functional.elu(x) + 1


BY_TENSORS = [reference.wasserstein_attention, wasserstein_by_differences]


@pytest.mark.parametrize("function", BY_TENSORS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths, starts", PADDINGS)
def test_by_hand(causal, lengths, starts, function):
    inputs = draw()
    seq_lens, seq_starts = (None if x is None else torch.tensor(x) for x in (lengths, starts))
    options = {"causal": causal, "scale": 0.3}
    actual = function(**inputs, seq_lens=seq_lens, seq_starts=seq_starts, **options)
    for a, e in zip(actual, by_hand(**inputs, lengths=lengths, starts=starts, **options), strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)


@pytest.mark.parametrize("function", BY_TENSORS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths, starts", PADDINGS)
@pytest.mark.parametrize("source", SOURCES)
def test_refined_by_hand(source, causal, lengths, starts, function):
    inputs = draw(rank=3, n_max=7, per_head=("w_k",), source=source)
    seq_lens, seq_starts = (None if x is None else torch.tensor(x) for x in (lengths, starts))
    options = {"source": source, "causal": causal, "scale": 0.8}
    actual = function(**inputs, seq_lens=seq_lens, seq_starts=seq_starts, **options)
    for a, e in zip(actual, by_hand(**inputs, lengths=lengths, starts=starts, **options), strict=True):
        torch.testing.assert_close(a, e, atol=1e-10, rtol=0)


@pytest.mark.parametrize("source", SOURCES)
def test_the_refinement_is_that_of_refined_attention(source):
    """Its stochastic mechanism, for vectors whose dot products are the distances."""
    inputs = draw(n=6, rank=4, source=source)
    for name in ("mean_q", "mean_k"):  # of one length
        inputs[name] = torch.nn.functional.normalize(inputs[name], dim=-1)
    inputs["cov_q"], inputs["cov_k"] = (torch.zeros_like(inputs["cov_q"]) for _ in range(2))
    mean, _ = reference.wasserstein_attention(**inputs, source=source, scale=0.5)
    # A = 0.5 (2 q·k - 2): the constant as one more entry of the vectors.
    ones = torch.ones_like(inputs["mean_q"][..., :1])
    q, k = torch.cat([inputs["mean_q"], -ones], -1), torch.cat([inputs["mean_k"], ones], -1)
    matrices = inputs["w_q"], inputs["w_k"]
    options = {"mechanism": "stochastic", "source": source, "scale": 1.0}
    expected = reference.refined_attention(q, k, inputs["mean_v"], *matrices, **options)
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rank, source", [(None, "logits"), (2, "logits"), (2, "weights")])
@pytest.mark.parametrize("causal", [True, False])
def test_reference_gradcheck(causal, rank, source):
    inputs = draw(b=2, h=1, n=4, d=2, rank=rank, source=source)
    leaves = [x.requires_grad_() for x in inputs.values()]
    options = {"causal": causal, "source": source, "seq_lens": torch.tensor([3, 0]), "padding_side": "left"}

    def function(*args):
        return reference.wasserstein_attention(**dict(zip(inputs, args, strict=True)), **options)

    assert torch.autograd.gradcheck(function, leaves)


def test_reference_dropout_drops_weights_of_both_products():
    """With identities as values the outputs are P and P∘P with one mask."""
    n = 40
    inputs = draw(n=n)
    inputs["mean_v"] = inputs["cov_v"] = torch.eye(n, dtype=torch.float64).expand(2, 2, n, n)
    p, _ = reference.wasserstein_attention(**inputs)
    dropped, squares = recattn.wasserstein_attention(**inputs, dropout_p=0.25)
    torch.testing.assert_close(squares, dropped.square())
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], p[kept] / 0.75)
    share = kept.sum() / (p != 0).sum()
    assert abs(share - 0.75) < 0.03


def test_distance_is_a_dot_product_with_row_and_column_terms():
    """So attention over vectors with two or four more entries computes it: the row term cancels."""
    mean_q, cov_q, mean_k, cov_k, mean_v, cov_v = draw(n=7).values()
    d = mean_q.shape[-1]
    query, key = torch.cat([mean_q, cov_q.sqrt()], -1), torch.cat([mean_k, cov_k.sqrt()], -1)
    difference = query.unsqueeze(-2) - key.unsqueeze(-3)  # [B, H, N, N, 2D]
    row, column = query.square().sum(-1, keepdim=True), key.square().sum(-1, keepdim=True)
    torch.testing.assert_close(difference.square().sum(-1), row + column.mT - 2 * query @ key.mT)

    query, key = torch.cat([2 * query, -torch.ones_like(row)], -1), torch.cat([key, column], -1)
    mean = torch.nn.functional.scaled_dot_product_attention(query, key, mean_v, is_causal=True, scale=d**-0.5)
    torch.testing.assert_close(mean, reference.wasserstein_attention(mean_q, cov_q, mean_k, cov_k, mean_v, cov_v)[0])


@pytest.mark.parametrize("function", [reference.wasserstein_attention, cpu])
@pytest.mark.parametrize("rank, source", [(None, "logits"), (4, "logits"), (4, "weights")])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_never_matters(padding_side, causal, rank, source, function):
    """Padding may hold anything: outputs and gradients are those of the tokens alone, and zero at padding."""
    inputs = draw(n=6, rank=rank, source=source, dtype=DTYPE[function])
    options = {"causal": causal, "source": source}
    tokens, padding = (slice(0, 4), slice(4, 6)) if padding_side == "right" else (slice(2, 6), slice(0, 2))
    dirty = {name: x.clone() for name, x in inputs.items()}
    for name in NAMES:
        dirty[name][0, :, padding] = math.nan
        dirty[name][1] = math.inf
    alone = {name: x[:1, :, tokens] if name in NAMES else x[tokens] for name, x in inputs.items()}
    expected = reference.wasserstein_attention(**alone, **options)
    actual = gradients(function, dirty, seq_lens=torch.tensor([4, 0]), padding_side=padding_side, **options)
    for name, out in zip(("mean", "cov"), expected, strict=True):
        torch.testing.assert_close(actual[name][:1, :, tokens], out)
    for name, x in actual.items():
        assert x.isfinite().all(), name
        if x.dim() == 4:
            assert not x[0, :, padding].any() and not x[1].any(), name


@pytest.mark.parametrize("function", [reference.wasserstein_attention, cpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_covariances_have_finite_gradients(dtype, function):
    inputs = draw(dtype=dtype)
    inputs["cov_q"][0] = 0
    inputs["cov_k"][:, :, 2:] = 0
    inputs["cov_v"][1] = 0
    for name, x in gradients(function, inputs).items():
        assert x.isfinite().all(), name


@pytest.mark.parametrize("function", [reference.wasserstein_attention, cpu])
@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("sizes", [{"b": 0}, {"h": 0}, {"n": 0, "n_max": 4}, {"dv": 0}])
@pytest.mark.parametrize("padded", [True, False])
def test_empty_sizes(sizes, padded, rank, function):
    inputs = draw(rank=rank, dtype=DTYPE[function], **sizes)
    seq_lens = torch.zeros(inputs["mean_q"].shape[0], dtype=torch.int64) if padded else None
    results = gradients(function, inputs, seq_lens=seq_lens)
    assert results["mean"].shape == results["cov"].shape == inputs["mean_v"].shape
    for name, x in inputs.items():
        assert results[f"d{name}"].shape == x.shape and not results[f"d{name}"].any()


@pytest.mark.parametrize("function", [reference.wasserstein_attention, cpu])
@pytest.mark.parametrize("rank, source", [(None, "logits"), (4, "logits"), (4, "weights")])
def test_the_past_never_sees_the_future(rank, source, function):
    inputs = draw(n=12, rank=rank, source=source, dtype=DTYPE[function])
    changed = {name: x.clone() for name, x in inputs.items()}
    for name in NAMES:
        changed[name][:, :, 7:] = torch.rand_like(changed[name][:, :, 7:])
    before, after = (function(**x, source=source) for x in (inputs, changed))
    for b, a in zip(before, after, strict=True):
        torch.testing.assert_close(b[:, :, :7], a[:, :, :7], atol=8 * torch.finfo(b.dtype).eps, rtol=0)
        assert not torch.allclose(b[:, :, 7:], a[:, :, 7:])


# --- Windows, packed and nested sequences ---

KINDS = [(None, "logits"), (5, "logits"), (5, "weights")]
LENGTHS = [7, 0, 20, 1, 13]


@pytest.mark.parametrize("function", [reference.wasserstein_attention, cpu])
@pytest.mark.parametrize("rank, source", KINDS)
def test_windows(rank, source, function):
    """A window gives what padding on the right gives to the same tokens, with the rows of W from its start on."""
    inputs = draw(n=20, rank=rank, n_max=26, source=source, dtype=DTYPE[function])
    function = functools.partial(function, source=source)
    window = {"seq_lens": torch.tensor([9, 0]), "seq_starts": torch.tensor([6, 20])}
    rows = {name: inputs[name][6:] for name in ("w_q", "w_k") if rank is not None}
    tokens = {name: torch.cat([inputs[name][:, :, 6:], inputs[name][:, :, :6]], 2) for name in NAMES}
    expected = function(**tokens, **rows, seq_lens=torch.tensor([9, 0]))
    for actual, e in zip(function(**inputs, **window), expected, strict=True):
        torch.testing.assert_close(actual, torch.cat([e[:, :, 14:], e[:, :, :14]], 2))
    check({name: x.float() for name, x in inputs.items()}, source=source, **window)
    dirty = {name: x.clone() for name, x in inputs.items()}
    for name in NAMES:
        dirty[name][0, :, :6] = dirty[name][0, :, 15:] = math.nan
        dirty[name][1] = math.inf
    clean = gradients(function, inputs, **window)
    for name, x in gradients(function, dirty, **window).items():
        torch.testing.assert_close(x, clean[name], atol=0, rtol=0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("rank, source", KINDS)
def test_packed_equals_padded(rank, source, causal, dropout_p):
    inputs = draw(b=5, n=20, d=9, dv=7, rank=rank, per_head=("w_q",), source=source, dtype=torch.float32)
    function = functools.partial(cpu, causal=causal, source=source, dropout_p=dropout_p)
    assert_packed_equals_padded(function, inputs, LENGTHS, atol=0, rtol=0)


@pytest.mark.parametrize("rank, source", KINDS)
def test_reference_of_packed_equals_padded(rank, source):
    inputs = draw(b=5, n=20, d=9, dv=7, rank=rank, source=source)
    function = functools.partial(recattn.wasserstein_attention, source=source)
    assert_packed_equals_padded(function, inputs, LENGTHS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank, source", KINDS)
def test_cpu_packed_error(rank, source, dtype):
    inputs = packed(draw(b=5, n=140, d=9, dv=7, rank=rank, source=source, dtype=dtype), [140, *LENGTHS[1:]])
    check(inputs, source=source, cu_seqlens=offsets_of([140, *LENGTHS[1:]]))


@pytest.mark.parametrize("function", [reference.wasserstein_attention, cpu])
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_empty_packed_batches(lengths, rank, function):
    inputs = packed(draw(b=max(len(lengths), 1), rank=rank, dtype=DTYPE[function]), lengths or [0])
    results = gradients(function, inputs, cu_seqlens=offsets_of(lengths))
    assert results["mean"].shape == results["cov"].shape == (0, 2, 2)
    for name, x in inputs.items():
        assert results[f"d{name}"].shape == x.shape and not results[f"d{name}"].any()


@pytest.mark.parametrize("rank, compiled", [(None, False), (5, False), (5, True)])
def test_nested(rank, compiled):
    """Nested in, nested out, with the bits of a packed batch; other lengths compile nothing anew."""
    function = cpu
    if compiled:
        torch.compiler.reset()
        function = torch.compile(cpu, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths, stance in (([7, 0, 12], "default"), ([3, 20, 5, 1], "fail_on_recompile")):
        inputs = draw(b=len(lengths), n=20, d=9, dv=7, rank=rank, dtype=torch.float32)
        expected = gradients(cpu, packed(inputs, lengths), cu_seqlens=offsets_of(lengths))
        leaves = {name: pack(x, lengths) if name in NAMES else x for name, x in inputs.items()}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        nested, offsets = dict(leaves), offsets_of(lengths).long()
        for name in NAMES:
            x = torch.nested.nested_tensor_from_jagged(leaves[name], offsets, min_seqlen=0, max_seqlen=max(lengths))
            nested[name] = x.transpose(1, 2)
        with torch.compiler.set_stance(stance if compiled else "default"):
            outs = function(**nested)
        assert all(out.is_nested and out.shape[:2] == (len(lengths), 2) for out in outs)
        values = [out.transpose(1, 2).values() for out in outs]
        torch.manual_seed(7)
        grads = torch.autograd.grad(values, list(leaves.values()), [torch.randn(x.shape) for x in values])
        actual = dict(zip(("mean", "cov"), values, strict=True))
        actual |= {f"d{name}": gradient for name, gradient in zip(leaves, grads, strict=True)}
        for name, x in actual.items():
            torch.testing.assert_close(x.detach(), expected[name], atol=0, rtol=0)


# --- Offsets, which change no distance but are lost digits of ‖q‖² + ‖k‖² - 2 q·k ---


def check_by_differences(function, inputs, **options):
    few = torch.tensor([30, 0, 5])  # a mean that counts padding leaves most of an offset
    for padding in ({}, {"seq_lens": few}, {"seq_lens": few, "padding_side": "left"}):
        kernel, low = (functools.partial(f, **options, **padding) for f in (function, wasserstein_by_differences))
        assert_matches_reference(kernel, low, inputs, grads=list(inputs))


@pytest.mark.parametrize("function", [reference.wasserstein_attention, cpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank, source", [(None, "logits"), (6, "logits"), (6, "weights")])
@pytest.mark.parametrize("part", ["mean", "cov"])
@pytest.mark.parametrize("offset", [0, 10, 100, 1000])
def test_offset(offset, part, rank, source, dtype, function):
    inputs = draw(b=3, n=30, d=16, dv=8, rank=rank, source=source, dtype=dtype)
    check_by_differences(function, with_offset(inputs, part, offset), source=source)


@pytest.mark.parametrize("function", [reference.wasserstein_attention, cpu])
@pytest.mark.parametrize("offset", [0, 10])
def test_offset_of_the_refined_gaussians(offset, function):
    """Rows of A sum to 1, so an offset of W_q and W_k moves every Gaussian. A larger one loses digits in A W itself."""
    inputs = draw(b=3, n=30, d=16, dv=8, rank=6, source="weights", dtype=torch.float32)
    inputs |= {name: inputs[name] + offset for name in ("w_q", "w_k")}
    check_by_differences(function, inputs, source="weights")


@pytest.mark.parametrize("function", [reference.wasserstein_attention, cpu])
def test_offset_of_each_sequence_and_head(function):
    inputs = draw(b=3, n=30, d=16, dv=8, dtype=torch.float32)
    offsets = torch.tensor([[0.0, 300.0], [-200.0, 0.0], [1000.0, -1000.0]])[..., None, None]
    check_by_differences(function, inputs | {name: inputs[name] + offsets for name in ("mean_q", "mean_k")})


# --- The CPU implementation ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 63, 100, 129])
def test_cpu_error(n, causal, dtype):
    check(draw(b=4, n=n, d=5, dv=7, dtype=dtype), causal=causal)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 63, 129])
@pytest.mark.parametrize("source", SOURCES)
def test_cpu_refined_error(source, n, causal, dtype):
    inputs = draw(b=4, n=n, d=5, dv=7, rank=6, n_max=n + 3, source=source, dtype=dtype)
    check(inputs, causal=causal, source=source)


@pytest.mark.parametrize("rank, source", [(None, "logits"), (41, "logits"), (6, "weights")])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_cpu_ragged_error(padding_side, causal, rank, source):
    inputs = draw(b=6, n=40, d=16, dv=16, rank=rank, per_head=("w_q",), source=source, dtype=torch.float32)
    seq_lens = torch.tensor([40, 0, 1, 33, 40, 17], dtype=torch.int32)
    check(inputs, causal=causal, source=source, seq_lens=seq_lens, padding_side=padding_side)


@pytest.mark.parametrize("scale", [-0.1, 0.0, 0.5])
def test_cpu_scale(scale):
    check(draw(b=4, n=20, rank=5, dtype=torch.float32), scale=scale)
    check(draw(b=4, n=20, dtype=torch.float32), scale=scale)


def test_cpu_zero_covariances_error():
    inputs = draw(b=4, n=20, dtype=torch.float32)
    inputs["cov_q"][0] = 0
    inputs["cov_k"][:, :, 10:] = 0
    check(inputs)


def test_cpu_views():
    """Heads behind tokens, a cut last axis, a transposed matrix."""
    inputs = draw(n=20, rank=10, dtype=torch.float32)
    views = {
        "mean_q": inputs["mean_q"].transpose(1, 2).contiguous().transpose(1, 2),
        "cov_k": torch.cat([inputs["cov_k"]] * 2, dim=-1)[..., :3],
        "mean_v": inputs["mean_v"].mT.contiguous().mT,
        "w_q": inputs["w_q"].T.contiguous().T,
    }
    expected = gradients(cpu, inputs, seq_lens=torch.tensor([20, 4]))
    for name, x in gradients(cpu, inputs | views, seq_lens=torch.tensor([20, 4])).items():
        torch.testing.assert_close(x, expected[name])


def test_one_tensor_for_several_arguments():
    inputs = draw(n=9, d=4, dv=4, dtype=torch.float32)
    inputs |= {"mean_k": inputs["mean_q"], "mean_v": inputs["mean_q"], "cov_v": inputs["mean_q"]}
    for actual, expected in zip(cpu(**inputs), reference.wasserstein_attention(**inputs), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("rank", [None, 50])
def test_cpu_reruns_are_bitwise_equal(rank):
    inputs = draw(b=20, n=50, rank=rank, dtype=torch.float32)
    assert_reruns_agree(cpu, inputs)


@pytest.mark.parametrize("rank, source", [(None, "logits"), (16, "logits"), (16, "weights")])
def test_cpu_has_no_tensor_of_n_squared_elements(rank, source):
    n = 1024
    inputs = draw(b=1, h=1, n=n, d=16, dv=16, rank=rank, source=source, dtype=torch.float32)
    assert largest_tensor(cpu, inputs, source=source) <= n * n // 8


# --- The operators ---


@pytest.mark.parametrize("layout", ["windows", "packed"])
@pytest.mark.parametrize("rank", [None, 3])
def test_opcheck(rank, layout):
    inputs = draw(n=9, rank=rank, dtype=torch.float32)
    tensors = [inputs.get(name) for name in (*NAMES, "w_q", "w_k")]
    if layout == "packed":
        tensors, lengths = list(packed(inputs, [9, 4]).values()), (None, None, offsets_of([9, 4]))
        tensors += [None] * (8 - len(tensors))
    else:
        lengths = (torch.tensor([9, 4]), torch.tensor([0, 5]), None)
    arguments = (*tensors, *lengths, torch.tensor([3]), True, True, None, 0.1)
    torch.library.opcheck(torch.ops.recattn.wasserstein_attention_pairs_fwd.default, arguments)
    douts = torch.randn_like(tensors[4]), torch.randn_like(tensors[4])
    torch.library.opcheck(torch.ops.recattn.wasserstein_attention_pairs_bwd.default, (*douts, *arguments))


def test_compiles_whole_without_recompiling():
    torch.compiler.reset()
    compiled = torch.compile(recattn.wasserstein_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, h, n, d, rank in ((3, 2, 9, 8, 7), (5, 4, 20, 12, 11), (6, 3, 31, 16, 40)):
        inputs = draw(b, h, n, d, d + 5, rank, n + 3, dtype=torch.float32)
        options = {"seq_lens": torch.randint(n, (b,)), "padding_side": "left"}
        expected = gradients(cpu, inputs, **options)
        with torch.compiler.set_stance("fail_on_recompile" if b > 3 else "default"):
            actual = gradients(compiled, inputs, **options)
        for name, x in actual.items():
            torch.testing.assert_close(x, expected[name])


@pytest.mark.parametrize("rank", [None, 5])
def test_autocast_casts_the_inputs(rank):
    inputs = draw(n=20, rank=rank, dtype=torch.float32)
    expected = gradients(cpu, {name: x.bfloat16() for name, x in inputs.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(cpu, inputs)
    for name, x in actual.items():
        torch.testing.assert_close(x, expected[name].to(x), atol=0, rtol=0)


# --- Dispatch and bad input ---


def test_implementations():
    inputs = draw(dtype=torch.float32)
    for default, chosen in zip(recattn.wasserstein_attention(**inputs), cpu(**inputs), strict=True):
        assert torch.equal(default, chosen)
    with pytest.raises(NotImplementedError, match="wasserstein_attention has no impl='correction'"):
        recattn.wasserstein_attention(**inputs, impl="correction")
    with pytest.raises(NotImplementedError, match="'cpu' here: its kernels compute in float32, and mean_q is float64"):
        recattn.wasserstein_attention(**draw(), impl="cpu")
    with pytest.raises(NotImplementedError, match="cannot run impl='cpu' here: the tensors are on meta"):
        recattn.wasserstein_attention(**{name: x.to("meta") for name, x in inputs.items()}, impl="cpu")


def test_float64_runs_the_reference():
    inputs = draw(n=20, rank=5)
    for default, expected in zip(
        recattn.wasserstein_attention(**inputs), reference.wasserstein_attention(**inputs), strict=True
    ):
        assert torch.equal(default, expected)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"source": "scores"}, "source must be 'logits' or 'weights', got 'scores'"),
        ({"padding_side": "both"}, "padding_side must be 'right' or 'left', got 'both'"),
        ({"scale": math.nan}, "scale must be finite, got nan"),
        ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, got 1.0"),
        ({"mean_q": None}, "mean_q must be a torch.Tensor, got NoneType"),
        ({"mean_q": zeros(2, 5, 3)}, r"mean_q must be \[B, H, N, D\], got \[2, 5, 3\]"),
        ({"cov_q": zeros(2, 2, 5, 4)}, r"cov_q must be \[B, H, N, D\] = \[2, 2, 5, 3\], got \[2, 2, 5, 4\]"),
        ({"mean_k": zeros(2, 2, 6, 3)}, r"mean_k must be \[B, H, N, D\] = \[2, 2, 5, 3\], got \[2, 2, 6, 3\]"),
        ({"cov_v": zeros(2, 2, 5, 3)}, r"cov_v must be \[B, H, N, Dv\] = \[2, 2, 5, 2\], got \[2, 2, 5, 3\]"),
        (dict.fromkeys(NAMES[:4], zeros(2, 2, 5, 0)), "D of mean_q and mean_k must be at least 1, got 0"),
        ({"w_q": None}, "w_q must be a torch.Tensor, got NoneType"),
        ({"w_k": zeros(3, 5, 8)}, r"w_k must be \[H, Nmax, 2R\] = \[2, 5, 8\], got \[3, 5, 8\]"),
        ({"w_k": zeros(5, 6)}, r"w_k must be \[Nmax, 2R\] = \[5, 8\], got \[5, 6\]"),
        (dict.fromkeys(("w_q", "w_k"), zeros(4, 8)), "Nmax of w_q and w_k must be at least N = 5, got 4"),
        (dict.fromkeys(("w_q", "w_k"), zeros(5, 7)), "2R of w_q and w_k must be even and at least 2, got 7"),
        (dict.fromkeys(("w_q", "w_k"), zeros(5, 0)), "2R of w_q and w_k must be even and at least 2, got 0"),
        ({"cov_k": torch.zeros(2, 2, 5, 3)}, "cov_k must have the dtype of mean_q, float64, got float32"),
        ({"mean_q": zeros(2, 2, 5, 3).long()}, "mean_q must be float64 or .* got int64"),
        ({"cov_v": zeros(2, 2, 5, 2).to("meta")}, "cov_v must be on the device of mean_q, cpu, got meta"),
        ({"seq_lens": torch.tensor([5])}, r"seq_lens must be \[B\] = \[2\], got \[1\]"),
        ({"seq_lens": torch.tensor([5, 6])}, "seq_lens must be between 0 and 5, got 6"),
        ({"seq_lens": torch.tensor([5, -1])}, "seq_lens must be between 0 and 5, got -1"),
        ({"seq_starts": torch.tensor([0, 0])}, "seq_lens must be given with seq_starts, got None"),
        ({"seq_lens": torch.tensor([5, 1]), "seq_starts": torch.tensor([0, 5])}, "seq_starts"),
        ({"seq_lens": torch.tensor([5, 1]), "seq_starts": torch.tensor([0])}, r"seq_starts must be \[B\] = \[2\]"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"mean_q must be \[T, H, D\], got \[2, 2, 5, 3\]"),
        ({"max_seqlen": 5}, "max_seqlen must be None but with cu_seqlens, got 5"),
        ({"cu_seqlens": torch.tensor([0, 5]), "seq_lens": torch.tensor([5, 5])}, "seq_lens must be None beside cu_seq"),
    ],
)
@pytest.mark.parametrize("impl", [None, "reference"])
def test_bad_input(changes, message, impl):
    with pytest.raises(ValueError, match=message):
        recattn.wasserstein_attention(**{**draw(rank=4), "impl": impl, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cu_seqlens": torch.tensor([0, 5, 9])}, "cu_seqlens must be offsets from 0 to 10, got offsets from 0 to 9"),
        ({"cu_seqlens": torch.tensor([0, 7, 5, 10])}, "cu_seqlens must be ascending, got 5 at index"),
        ({"cu_seqlens": torch.zeros(2, 2).long()}, r"cu_seqlens must be \[B\+1\]"),
        ({"mean_k": zeros(9, 2, 3)}, r"mean_k must be \[T, H, D\] = \[10, 2, 3\], got \[9, 2, 3\]"),
        ({"cu_seqlens": torch.tensor([0, 4, 10])}, "Nmax of w_q and w_k must be at least the longest sequence, .*5"),
    ],
)
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_bad_packed_input(changes, message, impl):
    dtype = torch.float32 if impl == "cpu" else torch.float64
    inputs = packed(draw(rank=4, dtype=dtype), [5, 5]) | {"cu_seqlens": torch.tensor([0, 5, 10])}
    changes = {name: x.to(dtype) if x.is_floating_point() else x for name, x in changes.items()}
    with pytest.raises(ValueError, match=message):
        recattn.wasserstein_attention(**{**inputs, "impl": impl, **changes})


def test_a_max_seqlen_that_is_no_bound():
    inputs = packed(draw(), [5, 5])
    with pytest.raises(ValueError, match=r"max_seqlen must be at least the longest sequence, got 4 and a length of 5"):
        recattn.wasserstein_attention(**inputs, cu_seqlens=offsets_of([5, 5]), max_seqlen=4)

"""sink_attention's C++ kernels: errors, padding, dropout, threads, instruction sets, memory and bad arguments."""

import functools
import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import recattn
from recattn import reference
from recattn._extension import MISSING
from recattn.testing import assert_matches_reference
from tests.helpers.instruction_sets import CAPABILITIES, results_at
from tests.helpers.interpreted import assert_matches_reference_twice_of_three, twice_of_three
from tests.helpers.large_biases import assert_weights_sum_to_1, large_biases
from tests.helpers.philox import dropout_weights

pytestmark = pytest.mark.skipif("cpu" in MISSING, reason="needs the compiled extension")
cpu = functools.partial(recattn.sink_attention, impl="cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = (37, 0, 1, 21)
LAYOUTS = ("dense", "right", "window", "packed", "strided", "token-major")
# Key heads of four query heads, heads of the bias, whether there are sink_logits.
VARIANTS = [(4, 1, False), (2, 4, True), (1, 1, True), (2, 4, False)]


def draw(
    layout="dense",
    dtype=torch.float32,
    heads=4,
    kv_heads=4,
    dim=13,
    value_dim=9,
    lengths=LENGTHS,
    sinks=8,
    bias_heads=1,
    logits=False,
    causal=False,
) -> dict:
    """Arguments of a call. Three sequences in four have sinks missing; padding hides some."""
    batch, longest = len(lengths), max(lengths)
    positions = torch.full((batch, sinks), -1)
    for b, length in enumerate(lengths):
        extent = length if layout == "packed" else longest
        found = torch.randperm(extent)[: max(0, sinks - b % 4)].sort().values
        positions[b, : len(found)] = found
    tokens = (sum(lengths),) if layout == "packed" else (batch, longest)
    widths = {"q": (heads, dim), "k": (kv_heads, dim), "v": (kv_heads, value_dim)}
    inputs: dict = {name: as_laid_out(torch.randn(*tokens, *shape).to(dtype), layout) for name, shape in widths.items()}
    inputs |= {"sink_positions": positions, "inter_sink_bias": 2 * torch.randn(batch, bias_heads, sinks, sinks)}
    inputs["causal"] = causal
    if logits:
        inputs["sink_logits"] = torch.randn(heads)
    if layout == "packed":
        inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0)
    if layout in ("right", "window"):
        inputs["seq_lens"] = torch.tensor(lengths, dtype=torch.int32)
    if layout == "window":
        inputs["seq_starts"] = (longest - inputs["seq_lens"]) * 2 // 3
    return inputs


def as_laid_out(x: Tensor, layout: str) -> Tensor:
    """[B, N, H, D] (packed [T, H, D]) as [B, H, N, D] in memory as `layout` says."""
    if layout == "packed":
        return x
    x = x.transpose(1, 2)
    if layout == "token-major":
        return x
    if layout == "strided":  # tokens first, with room between heads and between tokens
        b, h, n, d = x.shape
        return x.new_full((n, b, h + 1, d + 3), math.nan)[:, :, :h, :d].permute(1, 2, 0, 3).copy_(x)
    return x.contiguous()


def grads_of(inputs: dict) -> list[str]:
    return [name for name in ("q", "k", "v", "inter_sink_bias", "sink_logits") if name in inputs]


def check(inputs: dict) -> None:
    assert_matches_reference_twice_of_three(cpu, reference.sink_attention, inputs, grads=grads_of(inputs))


def run(inputs: dict, function=cpu, **options) -> list[Tensor]:
    """The output and the gradients."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in grads_of(inputs)}
    out = function(**{**inputs, **leaves}, **options)
    incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), incoming)]


# --- Errors ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_error(layout, causal, dtype):
    for kv_heads, bias_heads, logits in VARIANTS:
        variant = {"kv_heads": kv_heads, "bias_heads": bias_heads, "logits": logits}
        check(draw(layout, dtype, **variant, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim, value_dim", [(1, 1), (16, 33), (50, 20), (64, 64), (130, 256)])
@pytest.mark.parametrize("length", [1, 7, 31, 48, 65, 97, 200])
def test_sizes(length, dim, value_dim, causal):
    """No sinks, one, some and all, with groups of one, three and six query heads."""
    variants = ((6, 0), (2, 1), (1, length // 3), (2, length))
    for kv_heads, sinks in variants[(causal + length) % 2 :: 2]:  # each causal with some lengths, and not with others
        sizes = {"heads": 6, "kv_heads": kv_heads, "dim": dim, "value_dim": value_dim, "sinks": sinks}
        # Many short sequences, so that the largest error is not the luck of a few entries.
        check(draw(**sizes, lengths=(length,) * max(2, 100 // length), bias_heads=6, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["window", "packed"])
def test_long_sequences(layout, causal):
    sizes = {"heads": 2, "kv_heads": 1, "dim": 16, "value_dim": 16, "sinks": 150}
    check(draw(layout, **sizes, lengths=(1201, 300), causal=causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("layout", ["dense", "window", "packed"])
def test_rows_that_see_no_key(layout, logits, dtype):
    """A sink that a bias of -inf hides from itself is the first token: under a causal mask it sees nothing."""
    lengths = (20, 20)
    inputs = draw(layout, dtype, lengths=lengths, sinks=20, logits=logits, causal=True)
    inputs["inter_sink_bias"][:, :, :7] = -math.inf
    check(inputs)
    out, lse = cpu(**inputs, return_lse=True)
    assert not out[0].any() if layout == "packed" else not out[:1, :, :7].any()
    if not logits:
        assert (lse[:, 0] if layout == "packed" else lse[0, :, :7]).isneginf().all()


@large_biases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_biases(bias, dtype):
    assert_weights_sum_to_1(functools.partial(cpu, scale=0.25), bias, dtype)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 0.3, 3.0])
def test_scales(scale):
    check(draw("right", dim=40, sinks=20) | {"scale": scale})


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("causal", [False, True])
def test_log_sum_exp(causal, layout):
    inputs = draw(layout, kv_heads=2, bias_heads=4, logits=True, causal=causal)

    def finite_lse(function, **inputs):
        out, lse = function(**inputs, return_lse=True)
        return out, lse.masked_fill(lse.isneginf(), 0.0)

    kernel, low = (functools.partial(finite_lse, f) for f in (cpu, reference.sink_attention))
    assert_matches_reference(kernel, low, inputs, grads=grads_of(inputs))


@pytest.mark.parametrize("name", ["inter_sink_bias", "sink_logits"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_of_the_bias_and_logits(name, dtype):
    inputs = draw(logits=True, bias_heads=4)
    other = run({**inputs, name: inputs[name].to(dtype)})
    expected = run({**inputs, name: inputs[name].to(dtype).float()})
    gradient = 1 + grads_of(inputs).index(name)
    assert other[gradient].dtype == dtype
    for i, (actual, wanted) in enumerate(zip(other, expected, strict=True)):
        if i == gradient:
            torch.testing.assert_close(actual, wanted.to(dtype), rtol=torch.finfo(dtype).eps + 1e-6, atol=1e-6)
        else:
            assert torch.equal(actual, wanted)


def test_strided_bias_and_incoming_gradient():
    inputs = draw()
    bias = inputs["inter_sink_bias"]
    check(inputs | {"inter_sink_bias": torch.randn(*bias.shape[:3], 2 * bias.shape[3])[..., ::2].mT})
    leaves = {name: inputs[name].requires_grad_() for name in grads_of(inputs)}
    gradients = [torch.autograd.grad(f(**inputs).sum(), list(leaves.values())) for f in (cpu, reference.sink_attention)]
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


# --- Padding and other sequences ---


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layout", ["right", "window"])
def test_padding_never_matters(layout, causal):
    """Padding, and the bias of sinks in it, may hold anything: nothing of it reaches a result."""
    lengths = (30, 0, 17)
    clean = draw(layout, kv_heads=2, lengths=lengths, sinks=12, causal=causal)
    dirty = {name: x.clone() if isinstance(x, Tensor) else x for name, x in clean.items()}
    for b, length in enumerate(lengths):
        start = clean["seq_starts"][b] if layout == "window" else 0
        for name in ("q", "k", "v"):
            dirty[name][b, :, :start] = dirty[name][b, :, start + length :] = math.nan
        positions = clean["sink_positions"][b]
        ignored = (positions < max(start, 0)) | (positions >= start + length)
        dirty["inter_sink_bias"][b, :, ignored] = math.nan
        dirty["inter_sink_bias"][b, :, :, ignored] = math.nan
    for p in (0.0, 0.3):
        torch.manual_seed(1)
        expected = run(clean, dropout_p=p)
        torch.manual_seed(1)
        actual = run(dirty, dropout_p=p)
        assert all(map(torch.equal, actual, expected))
        for x in actual[:4]:
            start = 8 if layout == "window" else 0
            assert not x[1].any() and not x[2, :, :start].any() and not x[2, :, start + 17 :].any()


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_sequence_never_sees_another(layout):
    """Sequences full of NaN change nothing in the others, nor does the scratch memory that they leave."""
    lengths = (21, 21, 21, 21)
    inputs = draw(layout, lengths=lengths, causal=True)
    expected = run(inputs)
    for name in ("q", "k", "v"):
        x = inputs[name].view(4, 21, *inputs[name].shape[1:]) if layout == "packed" else inputs[name]
        x[::2] = math.nan
    for actual, clean in zip(run(inputs)[:4], expected, strict=False):
        actual, clean = (x.reshape(4, -1) for x in (actual, clean))
        assert torch.equal(actual[1::2], clean[1::2]) and actual[::2].isnan().any(1).all()


# --- Dropout ---


def mask_of(inputs: dict, seed: int, dropout_p: float) -> list[Tensor]:
    """The mask of each call of F.dropout in the reference, [B, H, N, N]. Tokens count from their sequence's first."""
    packed = "cu_seqlens" in inputs
    q, heads = inputs["q"], inputs["q"].shape[1]
    batch = len(inputs["sink_positions"])
    longest = q.shape[0] if packed else q.shape[2]
    lengths = inputs["cu_seqlens"].diff() if packed else inputs.get("seq_lens", torch.full((batch,), longest))
    masks = []
    for b, length in enumerate(lengths.tolist()):
        extent = length if packed else longest
        start = inputs["seq_starts"][b] if "seq_starts" in inputs else 0
        mask = torch.ones(1, heads, extent, extent, dtype=torch.float64)
        for h in range(heads):
            weights = dropout_weights(seed, b * heads + h, 0, length, length, dropout_p)
            mask[0, h, start : start + length, start : start + length] = weights
        masks.append(mask)
    return masks if packed else [torch.cat(masks)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["dense", "right", "window", "packed"])
@pytest.mark.parametrize("dtype, dropout_p", [(torch.float32, 0.1), (torch.float32, 0.6), (torch.bfloat16, 0.25)])
def test_dropout_is_the_reference_with_philoxs_mask(dtype, dropout_p, layout, causal, monkeypatch):
    for kv_heads, bias_heads, logits in VARIANTS[1:3]:
        variant = {"kv_heads": kv_heads, "bias_heads": bias_heads, "logits": logits}
        inputs = draw(layout, dtype, **variant, lengths=(150, 0, 1, 67), causal=causal)
        torch.manual_seed(7)
        masks = itertools.cycle(mask_of(inputs, int(torch.randint(2**63 - 1, (1,))), dropout_p))
        masked = SimpleNamespace(dropout=lambda p, _, masks=masks: p * next(masks).to(p.dtype))
        monkeypatch.setitem(reference.sink_attention.__globals__, "F", masked)

        def kernel(**inputs):
            torch.manual_seed(7)
            return cpu(**inputs, dropout_p=dropout_p)

        assert_matches_reference_twice_of_three(kernel, reference.sink_attention, inputs, grads=grads_of(inputs))


@pytest.mark.parametrize("dropout_p", [1 / 65536, 0.999])
def test_share_of_dropped_weights(dropout_p):
    """By an identity for v, whose rows of output are the weights."""
    inputs = draw(dim=8, value_dim=256, lengths=(256,) * 8, sinks=0)
    inputs["v"] = torch.eye(256).expand(8, 4, -1, -1)
    weights = cpu(**inputs, dropout_p=dropout_p)
    kept = (weights != 0).double().mean().item()
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / weights.numel())
    assert abs(kept - (1 - dropout_p)) < 5 * deviation
    scale = (weights / cpu(**inputs))[weights != 0]
    torch.testing.assert_close(scale, torch.full_like(scale, 65536 / (65536 - round(dropout_p * 65536))))


def test_dropout_follows_the_seed():
    inputs, outs = draw(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(cpu(**inputs, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_dropout_under_checkpointing():
    inputs = draw()
    leaf, gradients = inputs["q"].requires_grad_(), []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        call = functools.partial(cpu, **inputs, dropout_p=0.4)
        out = checkpoint(call, use_reentrant=False) if checkpointed else call()
        gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert torch.equal(*gradients)


def test_compiled_dropout_is_the_eager_one():
    inputs = draw(causal=True)
    compiled = torch.compile(functools.partial(cpu, dropout_p=0.4), fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, functools.partial(cpu, dropout_p=0.4)):
        torch.manual_seed(5)
        results.append(run(inputs, function))
    assert all(map(torch.equal, *results))


# --- Determinism, memory ---


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["dense", "window", "packed"])
def test_threads_change_no_bit(layout, causal, dropout_p):
    lengths = (400,) if layout == "dense" else (400, 0, 31, 200, 1, 64, 77)
    sizes = {"dim": 32, "value_dim": 32, "sinks": 60, "logits": True}
    inputs = draw(layout, kv_heads=2, lengths=lengths, **sizes, causal=causal)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3, 3):
        torch.set_num_threads(count)
        torch.manual_seed(0)
        results.append(run(inputs, dropout_p=dropout_p))
    torch.set_num_threads(threads)
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))


PEAK = """
import resource, sys, torch, recattn
torch.set_num_threads(2)
n = int(sys.argv[1])
q = torch.randn(1, 1, n, 8, requires_grad=True)
sinks = torch.arange(0, n, n // 64)[None]
recattn.sink_attention(q[:, :, :64], q[:, :, :64], q[:, :, :64], sinks[:, :1], torch.zeros(1, 1, 1, 1)).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bias = torch.randn(1, 1, sinks.shape[1], sinks.shape[1], requires_grad=True)
recattn.sink_attention(q, q, q, sinks, bias, impl="cpu").sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_no_memory_of_n_squared():
    """Of 64 MB, if there were any."""
    result = subprocess.run([sys.executable, "-c", PEAK, "4096"], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 20_000  # KB


# --- Instruction sets ---


def run_each(cases):
    results = []
    for inputs, douts, grads in cases:
        leaves = {name: inputs[name].detach().requires_grad_() for name in grads}
        out = cpu(**inputs | leaves)
        gradients = [torch.autograd.grad(out, list(leaves.values()), dout, retain_graph=True) for dout in douts]
        results.append([[out.detach(), *of_dout] for of_dout in gradients])
    return results


@pytest.mark.parametrize("capability", CAPABILITIES[:3])
def test_every_instruction_set(capability, tmp_path):
    cases = []
    for dtype, causal, layout in itertools.product(DTYPES, (True, False), ("window", "packed")):
        sizes = {"kv_heads": 2, "dim": 37, "value_dim": 45, "sinks": 20, "bias_heads": 4, "logits": True}
        inputs = draw(layout, dtype, **sizes, lengths=(131, 0, 22), causal=causal)
        out = inputs["q"].new_empty(*inputs["q"].shape[:-1], 45)
        cases.append((inputs, [torch.randn_like(out) for _ in range(4)], grads_of(inputs)))
    results = results_at(capability, run_each, cases, tmp_path)
    for (inputs, douts, grads), results_by_dout in zip(cases, results, strict=True):

        def kernel(seed, results_by_dout=results_by_dout, **_):
            return results_by_dout[seed]

        def all_results(seed, douts=douts, grads=grads, **inputs):
            leaves = {name: inputs[name].detach().requires_grad_() for name in grads}
            out = reference.sink_attention(**inputs | leaves)
            return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), douts[seed].to(out.dtype))]

        def assert_matches(seed, inputs=inputs, kernel=kernel, all_results=all_results):
            assert_matches_reference(functools.partial(kernel, seed), functools.partial(all_results, seed), inputs)

        twice_of_three(assert_matches)


# --- What it cannot serve ---


def test_float64_is_the_references(monkeypatch):
    inputs = draw(dtype=torch.float64)
    assert torch.equal(recattn.sink_attention(**inputs), reference.sink_attention(**inputs))
    with pytest.raises(NotImplementedError, match="impl='cpu' here: it computes in float32, and q is float64"):
        cpu(**inputs)


def test_without_the_extension_the_reference_runs(monkeypatch):
    monkeypatch.setitem(MISSING, "cpu", "not compiled")
    inputs = draw()
    assert torch.equal(recattn.sink_attention(**inputs), reference.sink_attention(**inputs))
    with pytest.raises(NotImplementedError, match="impl='cpu' here: not compiled"):
        cpu(**inputs)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"k": torch.zeros(4, 4, 37, 12)}, r"k must be .* = .*13\], got \[4, 4, 37, 12\]"),
        ({"v": torch.zeros(4, 4, 36, 9)}, r"v must be .* got \[4, 4, 36, 9\]"),
        ({"v": torch.zeros(4, 4, 37, 9).half()}, "v must have the dtype of q, float32, got float16"),
        ({"sink_positions": torch.zeros(3, 8).long()}, r"sink_positions must be .* got \[3, 8\]"),
        ({"sink_positions": torch.zeros(4, 8)}, "sink_positions must be int64 or int32, got float32"),
        ({"inter_sink_bias": torch.zeros(4, 1, 8, 7)}, r"inter_sink_bias must be .* got \[4, 1, 8, 7\]"),
        ({"inter_sink_bias": torch.zeros(4, 2, 8, 8)}, "inter_sink_bias must have 1 or Hq = 4 heads, got 2"),
        ({"sink_logits": torch.zeros(3)}, r"sink_logits must be .* got \[3\]"),
        ({"seq_lens": torch.tensor([37, 38, 0, 0])}, "seq_lens must be between 0 and 37, got 38"),
        ({"seq_lens": torch.tensor([37, -1, 0, 0])}, "seq_lens must be between 0 and 37, got -1"),
        ({"seq_lens": torch.tensor([37, 1])}, r"seq_lens must be \[B\] = \[4\], got \[2\]"),
        ({"seq_lens": torch.full((4,), 9), "seq_starts": torch.arange(4) * 10}, "between 0 and N - .* = 28, got 30 at"),
        (
            {"seq_lens": torch.full((4,), 9), "seq_starts": -torch.arange(4)},
            "between 0 and N - .* = 28, got -1 at",
        ),
        ({"seq_lens": torch.ones(4).long(), "seq_starts": torch.ones(3).long()}, r"seq_starts must be \[B\] = \[4\]"),
        ({"seq_starts": torch.ones(4).long()}, "seq_starts must be None without seq_lens"),
    ],
)
def test_operators_refuse_what_does_not_fit(changes, message):
    inputs = draw()
    names = ("q", "k", "v", "sink_positions", "inter_sink_bias", "sink_logits", "seq_lens", "seq_starts", "cu_seqlens")
    tensors = {name: inputs.get(name) for name in names} | changes
    options = (None, True, 0.3, 0.0)
    with pytest.raises(ValueError, match=message):
        torch.ops.recattn.sink_attention_cpu_fwd(*tensors.values(), *options)
    out, row_stats = torch.zeros(4, 4, 37, 9), torch.zeros(2, 4, 4, 37)
    q, k, v, *others = tensors.values()
    with pytest.raises(ValueError, match=message):
        torch.ops.recattn.sink_attention_cpu_bwd(out, q, k, v, out, row_stats, *others, *options)

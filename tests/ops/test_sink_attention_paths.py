"""The correction path of sink_attention as an operator, and which path runs a call."""

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import recattn
from recattn import reference
from recattn._options import SinkAttentionOptions
from recattn.ops import sink_attention as ops
from recattn.ops.backends import BACKENDS
from recattn.ops.sink_attention import dispatch
from recattn.testing import assert_matches_reference
from tests.helpers.eager_backend import eager_backend_on_any_device
from tests.helpers.interpreted import with_dtypes
from tests.helpers.sink_inputs import draw, draw_packed

GRADS = ["q", "k", "v", "inter_sink_bias"]


@pytest.fixture
def eager_backend():
    with eager_backend_on_any_device():
        yield


def by(impl: str, backend: str | None = None):
    """sink_attention by one implementation; on a CPU the interpreter runs it."""

    def attention(
        q, k, v, sink_positions, inter_sink_bias, *, sink_logits=None, causal=False, cu_seqlens=None, max_seqlen=None
    ):
        options = SinkAttentionOptions(causal, 1 / math.sqrt(q.shape[-1]), 0.0, max_seqlen, impl, backend)
        tensors = (sink_positions, inter_sink_bias, sink_logits, None, None, cu_seqlens, None)
        return ops.SinkAttentionFunction.apply(q, k, v, *tensors, options)[0]

    return attention


def specification(*args, max_seqlen=None, **kwargs):
    return reference.sink_attention(*args, **kwargs)


correction = by("correction", "eager")


@pytest.mark.parametrize("sinks, causal, dtype", with_dtypes([0, 20, 63], [False, True]), ids=str)
def test_dense(eager_backend, sinks, causal, dtype):
    inputs = draw(batch=2, heads=2, kv_heads=1, length=63, sinks=sinks, bias_scale=3.0, dtype=dtype)
    assert_matches_reference(correction, specification, {**inputs, "causal": causal}, grads=GRADS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [-50.0, -math.inf, 200.0])
def test_extreme_bias(eager_backend, causal, bias):
    inputs = draw(batch=1, heads=2, kv_heads=2, length=63, sinks=63)
    inputs["inter_sink_bias"] = torch.where(torch.rand(inputs["inter_sink_bias"].shape) < 0.5, bias, 0.0)
    inputs["inter_sink_bias"][:, :, 3] = bias
    assert_matches_reference(correction, specification, {**inputs, "causal": causal}, grads=GRADS)


@pytest.mark.parametrize("causal, with_logits", [(False, True), (True, False)])
def test_packed(eager_backend, causal, with_logits):
    inputs = draw_packed([70, 0, 33, 1], [30, 0, 33, 1], heads=2, kv_heads=1)
    inputs |= {"causal": causal, "max_seqlen": 70}
    if with_logits:
        inputs["sink_logits"] = torch.randn(2)
    grads = [*GRADS, "sink_logits"] if with_logits else GRADS
    assert_matches_reference(correction, specification, inputs, grads=grads)


def test_sink_logits(eager_backend):
    inputs = draw(batch=2, heads=2, kv_heads=2, length=63, sinks=40, bias_scale=3.0)
    inputs["inter_sink_bias"][:, :, 3] = -50.0
    inputs |= {"sink_logits": torch.randn(2), "causal": True}
    assert_matches_reference(correction, specification, inputs, grads=[*GRADS, "sink_logits"])


def test_an_infinite_sink_logit_shows(eager_backend):
    inputs = draw(batch=2, heads=2, kv_heads=2, length=63, sinks=40)
    out = correction(**inputs, sink_logits=torch.tensor([math.inf, 1.0]))
    assert out[:, 0].isnan().all()
    expected = specification(**inputs, sink_logits=torch.ones(2))
    torch.testing.assert_close(out[:, 1], expected[:, 1])


@pytest.mark.parametrize("fwd, bwd", itertools.permutations([("triton", None), ("correction", "eager")]))
def test_a_backward_takes_any_forward(eager_backend, fwd, bwd):
    """What the choice depends on, such as torch.nn.attention.sdpa_kernel, may change between forward and backward."""
    inputs = draw(batch=1, heads=2, kv_heads=1, length=63, sinks=40, bias_scale=20.0)
    context = (*list(inputs.values())[3:], None, None, None, None, None, True, 0.25, 0.0, None)
    qkv = [inputs[name] for name in ("q", "k", "v")]
    results = torch.ops.recattn.sink_attention_fwd(*qkv, *context, *fwd)
    dout = torch.randn_like(results[0])
    mixed = torch.ops.recattn.sink_attention_bwd(dout, *qkv, *results, *context, *bwd)
    leaves = {name: inputs[name].double().requires_grad_() for name in GRADS}
    out = reference.sink_attention(**{**inputs, **leaves}, causal=True, scale=0.25)
    expected = torch.autograd.grad(out, list(leaves.values()), dout.double())
    for got, want in zip(mixed, expected, strict=False):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


def test_opcheck(eager_backend):
    inputs = draw(batch=2, heads=2, kv_heads=1, length=20, sinks=5)
    inputs["sink_positions"][1, 3:] = -1
    options = SinkAttentionOptions(True, 0.25, impl="correction", backend="eager")
    arguments = [*inputs.values(), torch.randn(2), None, None, None, None, *options]
    torch.library.opcheck(torch.ops.recattn.sink_attention_fwd.default, arguments)
    results = torch.ops.recattn.sink_attention_fwd(*arguments)
    backward = [torch.ones_like(results[0]), *arguments[:3], *results, *arguments[3:]]
    torch.library.opcheck(torch.ops.recattn.sink_attention_bwd.default, backward)


# --- The choice ---


SHAPE = dispatch.Shape("a GPU", "bfloat16", 64, 2048, 0.1, False, False)
USABLE = ["triton", "correction:cudnn", "correction:flash"]


def choose(shape: dispatch.Shape, usable: list[str], table: dict) -> str:
    return next(name for name in dispatch.ranking(shape, ("cudnn", "flash", "efficient"), table) if name in usable)


@pytest.mark.parametrize(
    "change, usable, expected",
    [
        ({}, USABLE, "correction:cudnn"),
        ({"length": 512}, USABLE, "triton"),
        ({"sink_share": 0.6}, USABLE, "triton"),
        ({"dtype": "float32"}, USABLE, "triton"),
        ({}, ["triton"], "triton"),
        ({"length": 64}, ["correction:flash"], "correction:flash"),
    ],
)
def test_heuristic(change, usable, expected):
    assert choose(SHAPE._replace(**change), usable, {}) == expected


def measured(**row) -> dict:
    shape = {"dtype": "bfloat16", "head_dim": 64, "length": 2048, "sink_share": 0.1, "causal": False, "packed": False}
    return {**shape, "choice": "", **row}


def test_the_nearest_measurement_decides():
    rows = [
        measured(length=1024, times_ms={"triton": 1.0, "correction:cudnn": 2.0}),
        measured(length=4096, times_ms={"triton": 3.0, "correction:cudnn": 2.0, "correction:flash": 2.5}),
        measured(length=4096, head_dim=128, times_ms={"triton": 1.0, "correction:cudnn": 2.0}),
        measured(length=1100, causal=True, times_ms={"correction:flash": 1.0}),
    ]
    table = {"a GPU": {"torch": "2.11", "triton": "3.6", "rows": rows}}

    def choice(usable=USABLE, **change):
        return choose(SHAPE._replace(**change), usable, table)

    assert choice(length=1100) == "triton"
    assert choice(length=3500) == "correction:cudnn"
    assert choice(length=3500, head_dim=128) == "triton"
    assert choice(length=3500, usable=["triton", "correction:flash"]) == "correction:flash"
    assert choice(length=1100, causal=True) == "correction:flash"
    assert choice(device="another GPU") == choose(SHAPE, USABLE, {})
    assert choice(length=1100, usable=["correction:efficient"]) == "correction:efficient"  # measured nowhere


def test_the_committed_table_is_one_that_is_read():
    for device in dispatch._measurements().values():
        for row in device["rows"]:
            assert row["choice"] == min(row["times_ms"], key=row["times_ms"].get)


@pytest.mark.parametrize("impl", [None, "triton"])
def test_dropout_padding_and_float64_are_the_fused_kernels(impl):
    inputs = draw(length=20, sinks=5)
    arguments = [inputs[name] for name in ("q", "k", "v", "sink_positions")]
    for dropout_p, seq_lens in ((0.1, None), (0.0, torch.tensor([3, 4]))):
        options = SinkAttentionOptions(False, 1.0, dropout_p, impl=impl)
        assert dispatch.resolve(options, *arguments, seq_lens, None) == ("triton", None)


def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    inputs = draw(length=20, sinks=5)
    arguments = [inputs[name] for name in ("q", "k", "v", "sink_positions")]
    options = SinkAttentionOptions(False, 1.0, impl="correction", backend="flash")
    with pytest.raises(
        NotImplementedError, match="cannot run impl='correction:flash' here: it needs float16 or bfloat16"
    ):
        dispatch.resolve(options, *arguments, None, None)
    half = [x.half() for x in arguments[:3]]
    assert dispatch.resolve(options, *half, arguments[3], None, None) == ("correction", "flash")


def test_a_short_call_asks_no_backend_and_a_correction_the_best_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_device_name", lambda device: "a GPU")
    inputs = draw(length=20, sinks=5)
    arguments = [*(inputs[name].half() for name in ("q", "k", "v")), inputs["sink_positions"], None, None]
    asked = []
    for name, backend in BACKENDS.items():
        unsupported = None if name == "efficient" else "a reason"
        own = lambda call, name=name, unsupported=unsupported: asked.append(name) or unsupported  # noqa: E731
        monkeypatch.setitem(BACKENDS, name, replace(backend, own_unsupported_reason=own))
    options = SinkAttentionOptions(False, 1.0)
    assert dispatch.resolve(options, *arguments) == ("triton", None) and asked == []
    assert dispatch.resolve(options._replace(impl="correction"), *arguments) == ("correction", "efficient")
    assert asked == list(BACKENDS)
    monkeypatch.setitem(
        BACKENDS, "efficient", replace(BACKENDS["efficient"], own_unsupported_reason=lambda call: "none here")
    )
    with pytest.raises(NotImplementedError, match=r"supports it: flash_attn_3: a reason; .*; efficient: none"):
        dispatch.resolve(options._replace(impl="correction"), *arguments)


# --- The public arguments ---


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("BACKEND of impl='correction:BACKEND' must be 'flash_attn_3' or .* got 'fast'", {"impl": "correction:fast"}),
        ("BACKEND of impl='correction:BACKEND' must be 'flash_attn_3' or .* got ''", {"impl": "correction:"}),
        ("impl must be without a backend, but for .* got reference:flash", {"impl": "reference:flash"}),
        ("impl must be None or one of .* got 'flash'", {"impl": "flash:cudnn"}),
        ("max_seqlen must be None but with cu_seqlens, got 5", {"max_seqlen": 5}),
    ],
)
def test_bad_input(message, arguments):
    with pytest.raises(ValueError, match=message):
        recattn.sink_attention(**draw(length=20, sinks=5), **arguments)


def test_what_the_kernels_cannot_serve():
    inputs = draw(length=20, sinks=5)
    wide = draw(length=20, sinks=5, dim=300)
    with pytest.raises(NotImplementedError, match="float64"):
        double = {name: inputs[name].double() for name in ("q", "k", "v")}
        recattn.sink_attention(**{**inputs, **double}, impl="triton")
    with pytest.raises(NotImplementedError, match="head dims up to 256, and q or v has 300"):
        recattn.sink_attention(**wide, impl="triton")


def test_autocast_casts_as_for_pytorchs_attention():
    inputs = draw(length=20, sinks=5)
    leaf = inputs["q"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = recattn.sink_attention(**inputs)
        plain = torch.nn.functional.scaled_dot_product_attention(*(inputs[name] for name in ("q", "k", "v")))
    assert out.dtype == plain.dtype == torch.bfloat16
    low = {name: inputs[name].bfloat16() for name in ("q", "k", "v")}
    assert torch.equal(out, recattn.sink_attention(**{**inputs, **low}))
    assert torch.autograd.grad(out.float().sum(), leaf)[0].dtype == torch.float32


# --- On a card ---


def on_gpu(**options) -> dict:
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "length": 700, "sinks": 70, "dim": 64, "dtype": torch.bfloat16}
    inputs = draw(**{**shape, **options})
    return {name: x.cuda() for name, x in inputs.items()}


PATHS = [
    {},
    {"impl": "triton"},
    {"impl": "correction"},
    {"impl": "correction:flash"},
    {"impl": "correction:cudnn"},
]


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias_scale", [1.0, 30.0])
def test_bfloat16_on_gpu(path, causal, bias_scale):
    inputs = {**on_gpu(bias_scale=bias_scale), "causal": causal}
    kernel = functools.partial(recattn.sink_attention, **path)
    assert_matches_reference(kernel, reference.sink_attention, inputs, grads=GRADS)


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS[:4], ids=str)
def test_packed_on_gpu(path):
    packed = draw_packed([300, 0, 129, 1, 64], [30, 0, 129, 1, 0], dim=64, dtype=torch.bfloat16)
    inputs = {name: x.cuda() for name, x in packed.items()}
    kernel = functools.partial(recattn.sink_attention, max_seqlen=300, **path)
    assert_matches_reference(kernel, reference.sink_attention, {**inputs, "causal": True}, grads=GRADS)


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_no_synchronisation_and_cuda_graphs(path):
    """A captured step, replayed on other values, gives what a plain step gives."""
    inputs = on_gpu(bias_scale=30.0)
    leaves = {name: inputs[name].requires_grad_() for name in GRADS}

    def step():
        out = recattn.sink_attention(**{**inputs, **leaves}, causal=True, **path)
        return out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.copy_(torch.randn_like(leaf))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS[:4], ids=str)
def test_deterministic_on_gpu(path):
    inputs = on_gpu(bias_scale=10.0)
    leaves = {name: inputs[name].requires_grad_() for name in GRADS}
    torch.use_deterministic_algorithms(True)
    runs = []
    for _ in range(3):
        out = recattn.sink_attention(**{**inputs, **leaves}, causal=True, **path)
        runs.append((out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))))
    assert all(torch.equal(*pair) for run in runs[1:] for pair in zip(runs[0], run, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS[:4], ids=str)
def test_compiled_on_gpu(path):
    torch._dynamo.reset()
    call = functools.partial(recattn.sink_attention, causal=True, **path)
    compiled = torch.compile(lambda **inputs: call(**inputs), fullgraph=True, dynamic=True)
    for batch, length, sinks in ((3, 500, 50), (4, 700, 70), (5, 1000, 90)):
        inputs = on_gpu(batch=batch, length=length, sinks=sinks, heads=2)
        leaves = {name: inputs[name].requires_grad_() for name in GRADS}
        with torch.compiler.set_stance("fail_on_recompile" if batch > 3 else "default"):
            out = compiled(**inputs)
        torch.testing.assert_close(out, call(**inputs), rtol=1e-2, atol=1e-2)
        torch.autograd.grad(out.float().sum(), list(leaves.values()))

"""The attentions that the correction path stands on: their arguments, layouts and limits.

Every adapter runs over a stand-in that has the signature and the layouts of what it calls, computes in float64, and
checks what that takes for granted. PyTorch's operators keep their own schemas, and on the meta device their own shapes.
"""

import math
import sys
from dataclasses import replace
from itertools import pairwise
from types import ModuleType

import pytest
import torch

from recattn.ops import backends
from recattn.ops.backends import BACKENDS, AttentionBackend, Call, empty_backward, empty_forward, register
from recattn.ops.backends.aten import _pack_lse, _unpack_lse
from recattn.ops.backends.flash_attn import package_unsupported_reason
from tests.helpers.backend_checks import IN_TORCH, PACKAGES, call, check, draw, expect_same_layout, grouped
from tests.helpers.backend_stand_ins import (
    ATEN,
    FLASH_ATTN_2,
    FLASH_ATTN_3_BWD,
    FLASH_ATTN_3_FWD,
    _flash_attn_bwd,
    _flash_attn_fwd,
    attend,
    attend_backward,
    flash_attn_3_bwd,
    flash_attn_3_fwd,
    seen,
)


def supporting(call: Call) -> list[AttentionBackend]:
    return [backend for backend in backends.BACKENDS.values() if backend.unsupported_reason(call) is None]


def test_the_stand_in_is_the_attention():
    q, k, v, dout = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 6), torch.randn(9, 4, 6)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out, lse = attend(q, k, v, True, 0.3)
    expected = torch.autograd.grad(out, (q, k, v), dout.double())
    for got, want in zip(attend_backward(dout, q, k, v, out, lse, True, 0.3), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def install(monkeypatch, name: str, **contents) -> None:
    """Make `import` find this module and its parents."""
    *parents, last = name.split(".")
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    if parents:
        parent = ".".join(parents)
        if parent not in sys.modules:
            install(monkeypatch, parent)
        monkeypatch.setattr(sys.modules[parent], last, module, raising=False)


@pytest.fixture
def packages(monkeypatch):
    """Dao's packages, as far as the adapters can tell."""
    package_unsupported_reason.cache_clear()
    install(monkeypatch, "flash_attn.flash_attn_interface", **{f._opoverload._opname: f for f in FLASH_ATTN_2})
    install(monkeypatch, "flash_attn.cute.interface", _flash_attn_fwd=_flash_attn_fwd, _flash_attn_bwd=_flash_attn_bwd)
    install(monkeypatch, "flash_attn_3._C")
    yield
    package_unsupported_reason.cache_clear()


@pytest.fixture(scope="module")
def operators():
    """PyTorch's operators and FlashAttention 3's, on the CPU."""
    with (
        torch.library._scoped_library("aten", "IMPL") as aten,
        torch.library._scoped_library("flash_attn_3", "DEF") as fa3,
    ):
        for name, kernel in ATEN.items():
            aten.impl(name, kernel, "CPU")
        fa3.define(FLASH_ATTN_3_FWD)
        fa3.define(FLASH_ATTN_3_BWD)
        fa3.impl("fwd", flash_attn_3_fwd, "CPU")
        fa3.impl("bwd", flash_attn_3_bwd, "CPU")
        yield


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)


# --- Through the stand-ins ---


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "sliced", "misaligned"])
@pytest.mark.parametrize("name", BACKENDS)
def test_dense(name, layout, causal, operators, packages):
    for length in (1, 33, 64):
        if name == "cudnn" and length == 1:
            continue
        tensors, _ = draw(layout, (2, length), grouped(name), dims=(16, 16))
        for swap in (False, True):
            check(BACKENDS[name], *tensors, causal=causal, scale=0.3, swap=swap)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "cudnn"])
def test_packed(name, causal, operators, packages):
    for lengths in [(5, 0, 33, 1, 0), (1, 0), (0, 0, 1)]:
        tensors, options = draw("packed", lengths, grouped(name), dims=(16, 16))
        check(BACKENDS[name], *tensors, causal=causal, scale=0.3, **options)
        longer = {**options, "max_seqlen": 1000, "cu_seqlens": options["cu_seqlens"].int()}
        check(BACKENDS[name], *tensors, causal=causal, scale=0.3, **longer)


@pytest.mark.parametrize("layout", ["tokens first", "packed"])
@pytest.mark.parametrize("name", BACKENDS)
def test_corrected(name, layout, operators, packages):
    if (name, layout) == ("cudnn", "packed"):
        pytest.skip("it takes dense batches only")
    tensors, options = draw(layout, (5, 0, 33, 9) if layout == "packed" else (2, 33), grouped(name), dims=(16, 16))
    rows = tensors[0].shape[:-1]
    left_out = torch.rand(rows) < 0.2
    check(BACKENDS[name], *tensors, **options, causal=True, scale=0.3, sink_logits=torch.randn(4), left_out=left_out)


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_other_value_dim(name, operators):
    for layout in ("heads first", "tokens first"):
        tensors, _ = draw(layout, (2, 33), dims=(16, 24))
        check(BACKENDS[name], *tensors, causal=False, scale=0.3)


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "sliced", "packed"])
@pytest.mark.parametrize("name", BACKENDS)
def test_an_adapter_reads_its_inputs_where_they_lie(name, layout):
    """Even a dout in another order than q is not copied before its adapter."""
    read = []

    def bwd(dout, q, k, v, out, lse, options):
        read.extend((dout, q, k, v, out))
        return tuple(map(torch.empty_like, (q, k, v)))

    (q, k, v), options = draw(layout, (5, 0, 33) if layout == "packed" else (2, 33), grouped(name), dims=(16, 16))
    out, lse = empty_forward(q, v)
    *batch, outer, inner, dim = out.shape
    for dout in (torch.randn(out.shape), torch.randn(*batch, inner, outer, dim).transpose(-3, -2)):
        read.clear()
        replace(BACKENDS[name], bwd=bwd).backward(dout, q, k, v, out, lse, causal=True, scale=0.3, **options)
        assert [x.data_ptr() for x in read] == [x.data_ptr() for x in (dout, q, k, v, out)]


@pytest.mark.parametrize("name", PACKAGES)
def test_determinism_is_asked_for(name, operators, packages):
    tensors, options = draw("tokens first", (1, 9), dims=(16, 16))
    options |= {"causal": True, "scale": 0.3}
    for strict in (False, True):
        torch.use_deterministic_algorithms(True, warn_only=not strict)
        out, lse = BACKENDS[name].forward(*tensors, **options)
        BACKENDS[name].backward(out, *tensors, out, lse, **options)
        assert seen.pop("deterministic") is strict


# --- PyTorch's own shapes ---


@pytest.mark.parametrize("layout", ["heads first", "tokens first", "sliced", "packed"])
@pytest.mark.parametrize("name", IN_TORCH)
def test_torch_takes_the_arguments(name, layout):
    if (name, layout) == ("cudnn", "packed"):
        pytest.skip("it takes dense batches only")
    backend, lengths = BACKENDS[name], (5, 0, 100, 1) if layout == "packed" else (2, 100)
    (q, k, v), options = draw(layout, lengths, grouped(name), dtype=torch.bfloat16, device="meta")
    options |= {"causal": True, "scale": 0.3}
    results = out, lse = backend.forward(q, k, v, **options)
    promised = empty_forward(q, v)
    if name != "efficient":  # PyTorch's meta kernel of that backward forgets an argument
        results += backend.backward(out, q, k, v, out, lse, **options)
        promised += empty_backward(q, k, v)
    for got, want in zip(results, promised, strict=True):
        expect_same_layout(got, want)


# --- lse of the memory-efficient attention ---


def test_lse_of_packed_sequences():
    lengths = (5, 0, 33, 1, 0)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    lse = torch.randn(3, sum(lengths))
    padded = _unpack_lse(lse, cu_seqlens, 64)
    assert padded.shape == (5, 3, 64) and padded.is_contiguous()
    for row, (start, stop) in zip(padded, pairwise(cu_seqlens.tolist()), strict=True):
        assert row[:, : stop - start].equal(lse[:, start:stop])
        assert (row[:, stop - start :] == math.inf).all()
    padded[padded == math.inf] = math.nan  # padding is not read
    assert _pack_lse(padded, cu_seqlens, sum(lengths)).equal(lse)


# --- Limits ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_simple_call_is_taken(dtype, operators, packages, cudnn):
    assert [backend.name for backend in supporting(call(dtype=dtype))] == list(BACKENDS)
    packed = call(dtype=dtype, packed=True)
    assert [backend.name for backend in supporting(packed)] == [name for name in BACKENDS if name != "cudnn"]


@pytest.mark.parametrize(
    "changes, takers",
    [
        ({"dtype": torch.float32}, ["efficient"]),
        ({"dtype": torch.float64}, []),
        ({"capability": (7, 5)}, ["efficient"]),
        ({"capability": (7, 5), "dtype": torch.bfloat16}, []),
        ({"capability": (8, 0)}, ["cudnn", "flash", "flash_attn_2", "efficient"]),
        ({"capability": (10, 0)}, ["flash_attn_4", "cudnn", "flash", "flash_attn_2", "efficient"]),
        ({"head_dim": 60, "value_dim": 60}, []),
        ({"head_dim": 60, "value_dim": 60, "dtype": torch.float32}, ["efficient"]),
        ({"head_dim": 256, "value_dim": 256}, ["flash_attn_3", "cudnn", "flash", "flash_attn_2", "efficient"]),
        ({"head_dim": 256, "value_dim": 256, "capability": (8, 0)}, ["flash", "flash_attn_2", "efficient"]),
        ({"head_dim": 256, "value_dim": 256, "deterministic": True}, ["flash", "flash_attn_2", "efficient"]),
        ({"head_dim": 224, "value_dim": 224, "capability": (8, 9)}, ["efficient"]),
        ({"head_dim": 264, "value_dim": 264}, ["efficient"]),
        ({"value_dim": 32}, ["cudnn", "efficient"]),
        ({"kv_heads": 2}, ["flash_attn_3", "flash_attn_4", "cudnn", "flash", "flash_attn_2"]),
        ({"deterministic": True}, ["flash_attn_3", "flash_attn_4", "flash", "flash_attn_2", "efficient"]),
        ({"max_seqlen": 1}, ["flash_attn_3", "flash_attn_4", "flash", "flash_attn_2", "efficient"]),
        ({"max_seqlen": None, "packed": True}, []),
        ({"scale": 0.0}, []),
        ({"scale": -0.1}, []),
        ({"batch": 65536}, []),
        ({"q_heads": 65536, "kv_heads": 65536}, []),
    ],
)
def test_limits(changes, takers, operators, packages, cudnn):
    assert [backend.name for backend in supporting(call(**changes))] == takers


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("flash", {"dtype": torch.float32}, "it needs float16 or bfloat16, got torch.float32"),
        ("flash", {"capability": (7, 5)}, "it needs compute capability 8.0 or newer, got 7.5"),
        ("flash", {"value_dim": 32}, "it needs one head dim for q, k and v, got 64 and 32"),
        ("flash", {"packed": True, "max_seqlen": None}, "it needs max_seqlen, a bound on the packed lengths, got None"),
        ("cudnn", {"packed": True}, "it needs a dense batch, got a packed one"),
        ("cudnn", {"deterministic": True}, "it needs torch.use_deterministic_algorithms(False), got True"),
        ("efficient", {"kv_heads": 2}, "it needs as many key heads as query heads, got 4 and 2"),
        ("flash_attn_3", {"capability": (8, 0)}, "it needs compute capability 9.0, got 8.0"),
        ("flash_attn_4", {"head_dim": 192, "value_dim": 192}, "it needs a head dim up to 128, got 192"),
        ("flash", {"scale": -0.5}, "it needs a positive scale, got -0.5"),
    ],
)
def test_reasons(name, changes, reason, operators, packages, cudnn):
    assert BACKENDS[name].unsupported_reason(call(**changes)) == reason


def test_switches_are_respected(cudnn, monkeypatch):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for name, switch in zip(IN_TORCH, ("flash", "cudnn", "mem_efficient"), strict=True):
            reason = f"it needs torch.backends.cuda.enable_{switch}_sdp(True), got False"
            assert BACKENDS[name].unsupported_reason(call()) == reason
    assert BACKENDS["cudnn"].unsupported_reason(call()) is None
    monkeypatch.setenv("TORCH_CUDNN_SDPA_AVOID_RECOMPILE", "1")
    assert BACKENDS["cudnn"].unsupported_reason(call()) == "it needs TORCH_CUDNN_SDPA_AVOID_RECOMPILE unset, got 1"
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: None)
    assert BACKENDS["cudnn"].unsupported_reason(call()) == "it needs cuDNN 9.5.1 or newer, got 0"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named(name, monkeypatch):
    for module in ("flash_attn", "flash_attn_3"):
        monkeypatch.setitem(sys.modules, module, None)
    package_unsupported_reason.cache_clear()
    assert BACKENDS[name].unsupported_reason(call()).startswith("it does not import: ")
    package_unsupported_reason.cache_clear()


@pytest.mark.parametrize(
    "name, module, function",
    [
        ("flash_attn_2", "flash_attn.flash_attn_interface", "_flash_attn_varlen_forward"),
        ("flash_attn_4", "flash_attn.cute.interface", "_flash_attn_bwd"),
    ],
)
def test_an_old_package_is_refused(name, module, function, packages, monkeypatch):
    monkeypatch.setattr(sys.modules[module], function, lambda q, k, v, window_size=(-1, -1): None)
    assert "or newer: its " + function in BACKENDS[name].unsupported_reason(call())


def test_call_of_tensors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    (q, k, v), _ = draw("tokens first", (8, 100), dtype=torch.float16)
    assert Call.of(q, k, v, scale=0.125) == call()
    (q, k, v), options = draw("packed", (5, 0, 9), (4, 2), (64, 32), torch.float16)
    packed = call(batch=3, max_seqlen=9, packed=True, kv_heads=2, value_dim=32)
    assert Call.of(q, k, v, scale=0.125, **options) == packed
    torch.use_deterministic_algorithms(True)
    assert Call.of(q, k, v, scale=0.125, cu_seqlens=options["cu_seqlens"]) == packed._replace(
        max_seqlen=None, deterministic=True
    )


def test_register(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", dict(BACKENDS))
    with pytest.raises(ValueError, match=r"name must be new to the registry, which has flash_attn_3, .*, got flash"):
        register(BACKENDS["flash"])
    mine = register(AttentionBackend("mine", lambda call: None, None, None, deterministic=False))
    assert supporting(call(dtype=torch.float64)) == [mine]

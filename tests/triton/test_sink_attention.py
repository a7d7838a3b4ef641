"""The fused path of sink_attention, on a GPU or by Triton's interpreter, against the reference in float64."""

import functools
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton
import triton.language as tl

import recattn
from recattn import reference
from recattn._options import SinkAttentionOptions
from recattn.testing import assert_matches_reference
from recattn.triton_kernels.common.dropout import dropout_weights
from recattn.triton_kernels.common.ragged import number_of_tiles, sequence_of_tile
from recattn.triton_kernels.sink_attention import (
    NO_LENGTHS,
    SinkAttentionConfig,
    SinkInputs,
    Streams,
    TileConfig,
    config,
    launch_sink_attention_bwd,
    launch_sink_attention_fwd,
    launch_sink_attention_streams,
)
from recattn.triton_kernels.sink_attention.config import TILES
from tests.compile_table.compilation import Compilation, recorded
from tests.helpers import philox
from tests.helpers.interpreted import DEVICE, with_dtypes
from tests.helpers.large_biases import any_dtype, assert_holds_beside_large_biases, large_biases
from tests.helpers.memory import LargestTensor
from tests.helpers.sink_inputs import draw, draw_packed

GRADS = ["q", "k", "v", "inter_sink_bias"]
fused = functools.partial(recattn.sink_attention, impl="triton")


def on_device(inputs: dict) -> dict:
    return {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in inputs.items()}


def small(**options) -> dict:
    """Few heads, because the interpreter runs one program after another."""
    return on_device(draw(**{"batch": 1, "heads": 2, "kv_heads": 1, "length": 63, "sinks": 20, **options}))


def assert_fused(inputs: dict, grads=GRADS) -> None:
    assert_matches_reference(fused, reference.sink_attention, inputs, grads=grads)


SHAPES = [
    {"length": 1, "sinks": 1},
    {"length": 1, "sinks": 0},
    {"length": 100, "sinks": 0},
    {"sinks": 63, "bias_scale": 30.0},
    {"length": 129, "sinks": 40, "bias_heads": 2},
    {"length": 192, "sinks": 30, "kv_heads": 2},
]


@pytest.mark.parametrize("shape, causal, dtype", with_dtypes(SHAPES, [False, True]), ids=str)
def test_dense(shape, causal, dtype):
    assert_fused({**small(**shape, dtype=dtype), "causal": causal})


@pytest.mark.parametrize("dim, value_dim", [(32, 32), (64, 64), (50, 20), (8, 24), (128, 128), (256, 256)])
def test_head_dims(dim, value_dim):
    assert_fused({**small(length=40, dim=dim, value_dim=value_dim, dtype=torch.float16), "causal": True})
    assert_fused(small(length=40, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("bias, causal, dtype", with_dtypes([-50.0, 200.0, -math.inf, 1e-6], [False, True]), ids=str)
def test_extreme_bias(bias, causal, dtype):
    """Every token a sink, rows that lose every key, overflow of exp(β), a tiny β."""
    inputs = small(sinks=63, dtype=dtype)
    chosen = torch.rand(inputs["inter_sink_bias"].shape, device=DEVICE) < 0.5
    inputs["inter_sink_bias"] = torch.where(chosen, bias, 0.0)
    inputs["inter_sink_bias"][:, :, 3] = bias
    assert_fused({**inputs, "causal": causal})


@large_biases
@any_dtype
def test_large_biases(bias, dtype):
    assert_holds_beside_large_biases(functools.partial(fused, scale=0.25), bias, dtype)


@pytest.mark.parametrize("scale, dtype", with_dtypes([-0.5, 0.0, 2.0]), ids=str)
def test_any_scale(scale, dtype):
    """Scores of ordinary size: the error of large ones is that of their dot products, summed in any order."""
    inputs = small(dtype=dtype)
    inputs["q"] *= 0.25
    assert_fused({**inputs, "scale": scale, "causal": True})


@pytest.mark.parametrize("layout, causal, dtype", with_dtypes(["right", "window"], [False, True]), ids=str)
def test_padded(layout, causal, dtype):
    inputs = small(batch=5, length=70, sinks=30, bias_scale=3.0, dtype=dtype)
    inputs["sink_positions"][1, 20:] = -1
    inputs["seq_lens"] = torch.tensor([70, 0, 37, 1, 64], device=DEVICE)
    if layout == "window":
        inputs["seq_starts"] = torch.tensor([0, 50, 20, 69, 5], device=DEVICE)
    assert_fused({**inputs, "causal": causal})


@pytest.mark.parametrize("causal, index_dtype", [(False, torch.int64), (True, torch.int32)], ids=str)
def test_packed(causal, index_dtype):
    inputs = on_device(draw_packed([70, 0, 33, 1, 40], [30, 0, 33, 1, 0], heads=2, kv_heads=1))
    for name in ("sink_positions", "cu_seqlens"):
        inputs[name] = inputs[name].to(index_dtype)
    assert_fused({**inputs, "causal": causal})


@pytest.mark.parametrize("form", ["dense", "padded", "packed"])
def test_sink_logits(form):
    if form == "packed":
        inputs = on_device(draw_packed([70, 0, 1], [30, 0, 1], heads=2, kv_heads=1, dtype=torch.float16))
    else:
        inputs = small(batch=2, bias_scale=3.0)
    if form == "padded":
        inputs["seq_lens"] = torch.tensor([41, 63], device=DEVICE)
    inputs |= {"sink_logits": torch.randn(2, device=DEVICE), "causal": True}
    assert_fused(inputs, [*GRADS, "sink_logits"])


def test_strided_sink_logits():
    inputs = small()
    inputs["sink_logits"] = torch.randn(2, 3, device=DEVICE)[:, 1]
    assert_fused(inputs, [*GRADS, "sink_logits"])


def test_sink_logits_of_rows_without_other_mass():
    inputs = small(sinks=63)
    inputs["inter_sink_bias"].fill_(-math.inf)
    assert_fused({**inputs, "sink_logits": torch.randn(2, device=DEVICE)}, [*GRADS, "sink_logits"])


@pytest.mark.parametrize("starts", [[0, 0], [4, 50]], ids=["right", "window"])
def test_padding_may_hold_anything(starts):
    inputs = {**small(batch=2, sinks=30), "seq_lens": torch.tensor([40, 13], device=DEVICE), "causal": True}
    inputs["seq_starts"] = torch.tensor(starts, device=DEVICE)
    dirty = {name: inputs[name].clone() for name in GRADS}
    for b, (start, n) in enumerate(zip(starts, (40, 13), strict=True)):
        for name in ("q", "k", "v"):
            dirty[name][b, :, :start] = dirty[name][b, :, start + n :] = math.nan
        sinks = inputs["sink_positions"][b]
        ignored = (sinks < start) | (sinks >= start + n)
        dirty["inter_sink_bias"][b].masked_fill_(ignored[:, None] | ignored, math.nan)
    results = []
    for values in ({}, dirty):
        leaves = {name: {**inputs, **values}[name].clone().requires_grad_() for name in GRADS}
        out = fused(**{**inputs, **leaves})
        results.append((out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))))
    assert all(map(torch.equal, *results))


def test_views_that_are_not_contiguous():
    inputs = small(heads=4, kv_heads=4, batch=2)
    views = {
        "q": inputs["q"].transpose(1, 2).contiguous().transpose(1, 2),
        "k": torch.randn(2, 4, 16, 63, device=DEVICE).transpose(2, 3),
        "v": torch.randn(2, 8, 63, 32, device=DEVICE)[:, ::2, :, ::2],
        "sink_positions": inputs["sink_positions"].t().contiguous().t(),
        "inter_sink_bias": torch.randn(2, 20, 20, 1, device=DEVICE).permute(0, 3, 2, 1),
    }
    assert_fused({**inputs, **views})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_bias_of_another_dtype(dtype):
    inputs = small()
    inputs["inter_sink_bias"] = inputs["inter_sink_bias"].to(dtype)
    assert_fused(inputs)


def test_log_sum_exp():
    inputs = {**small(batch=3, bias_scale=5.0), "seq_lens": torch.tensor([63, 0, 20], device=DEVICE)}
    out, lse = fused(**inputs, return_lse=True)
    _, expected = reference.sink_attention(**inputs, return_lse=True)
    assert lse.dtype == torch.float32 and not lse.requires_grad
    torch.testing.assert_close(lse, expected)
    assert torch.equal(out == 0, expected.isneginf().unsqueeze(-1).expand_as(out))


@pytest.mark.parametrize("batch, length", [(0, 5), (2, 0)])
def test_nothing_to_do(batch, length):
    inputs = {name: x[:batch] for name, x in small(batch=2, length=5, sinks=3).items()}
    inputs |= {name: inputs[name][:, :, :length] for name in ("q", "k", "v")}
    inputs["sink_positions"] = inputs["sink_positions"].where(inputs["sink_positions"] < length, -1)
    leaves = {name: inputs[name].requires_grad_() for name in GRADS}
    fused(**inputs).sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


def test_reruns_agree_to_the_bit():
    inputs = {**small(length=70, sinks=40, bias_scale=10.0), "causal": True}
    runs = []
    for _ in range(2):
        leaves = {name: inputs[name].clone().requires_grad_() for name in GRADS}
        out = fused(**{**inputs, **leaves})
        runs.append((out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))))
    assert all(map(torch.equal, *runs))


def test_no_tensor_of_n_squared_elements():
    inputs = small(heads=1, length=256, sinks=10)
    arguments = (*inputs.values(), *[None] * 5, True, 0.25, 0.0, None, "triton", None)
    with LargestTensor() as forward:
        results = torch.ops.recattn.sink_attention_fwd(*arguments)
    with LargestTensor() as backward:
        torch.ops.recattn.sink_attention_bwd(torch.ones_like(results[0]), *arguments[:3], *results, *arguments[3:])
    assert max(forward.elements, backward.elements) <= 256 * 16


# --- Dropout ---


@triton.jit
def store_dropout_weights_kernel(seed, out, bh, philox_stream, rows, dropped, COLUMNS: tl.constexpr):
    index = tl.arange(0, 16) + 16 * tl.program_id(0)
    weights = dropout_weights(tl.load(seed), bh, philox_stream, index, 0, dropped, COLUMNS)
    addresses = out + index[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(addresses, weights, mask=(index < rows)[:, None])


def dropout_mask(seed: Tensor, bh: int, philox_stream: int, size: int, dropped: int) -> Tensor:
    columns = triton.next_power_of_2(max(size, 16))
    out = torch.empty(size, columns, device=DEVICE)
    if size > 0:
        grid = (triton.cdiv(size, 16),)
        store_dropout_weights_kernel[grid](seed, out, bh, philox_stream, size, dropped, columns)
    return out[:, :size]


@pytest.mark.parametrize("philox_stream, bh", [(0, 0), (1, 5), (2, 70000)])
def test_dropout_weights_are_philoxs(philox_stream, bh):
    """Those of NumPy, which the CPU kernels are compared with: one seed drops the same weights on both devices."""
    seed = torch.tensor([0x123456789ABCDEF1], device=DEVICE)
    weights = dropout_mask(seed, bh, philox_stream, 70, 6554)
    expected = philox.dropout_weights(int(seed), bh, philox_stream, 70, 70, 6554 / 65536)
    torch.testing.assert_close(weights.cpu(), expected.float(), atol=0, rtol=1e-6)


def attention_with_mask(q, k, v, sink_positions, inter_sink_bias, keep, causal):
    """softmax(QKᵀ/√D + β) ∘ keep · V in full."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + reference.sink_attention.__globals__["dense_bias"](
        sink_positions, inter_sink_bias, q.shape[2]
    )
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) * keep).to(v.dtype) @ v


@pytest.mark.parametrize("causal, dtype", with_dtypes([False, True]), ids=str)
def test_dropout(causal, dtype):
    """Compared with an explicit mask: sink pairs are numbered by sink, all others by token."""
    inputs = small(batch=2, kv_heads=1, length=70, dtype=dtype)
    torch.manual_seed(7)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE)  # what the call draws
    keep = torch.empty(2, 2, 70, 70, device=DEVICE)
    for b in range(2):
        sinks = inputs["sink_positions"][b]
        for h in range(2):
            keep[b, h] = dropout_mask(seed, 2 * b + h, 0, 70, 19661)
            keep[b, h, sinks[:, None], sinks] = dropout_mask(seed, 2 * b + h, 1, 20, 19661)
    assert 0.25 < (keep == 0).float().mean() < 0.35

    def kernel(keep, **arguments):
        torch.manual_seed(7)
        return fused(**arguments, dropout_p=0.3)

    assert_matches_reference(kernel, attention_with_mask, {**inputs, "keep": keep, "causal": causal}, grads=GRADS)


def test_dropout_of_windows_is_that_of_packed_sequences():
    lengths, starts = [33, 0, 20], torch.tensor([7, 5, 40], device=DEVICE)
    packed = on_device(draw_packed(lengths, [9, 0, 4], heads=2, kv_heads=1))
    cu_seqlens, positions = packed["cu_seqlens"], packed["sink_positions"]
    windows = {name: x for name, x in packed.items() if name != "cu_seqlens"}
    windows |= {"seq_lens": cu_seqlens.diff(), "seq_starts": starts}
    windows["sink_positions"] = torch.where(positions < 0, -1, positions + starts[:, None])
    tokens = torch.cat([start + torch.arange(n, device=DEVICE) for start, n in zip(starts, lengths, strict=True)])
    sequence = torch.repeat_interleave(torch.arange(3, device=DEVICE), cu_seqlens.diff())
    for name in ("q", "k", "v"):
        windows[name] = torch.full((3, 63, *packed[name].shape[1:]), math.nan, device=DEVICE)
        windows[name] = windows[name].index_put((sequence, tokens), packed[name]).transpose(1, 2)
    results = []
    for inputs in (packed, windows):
        torch.manual_seed(7)
        leaves = {name: inputs[name].clone().requires_grad_() for name in GRADS}
        out = fused(**{**inputs, **leaves}, causal=True, dropout_p=0.3)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    results[1][:4] = (x.transpose(1, 2)[sequence, tokens] for x in results[1][:4])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean_and_follows_the_seed():
    inputs = small(heads=1, length=20, sinks=5, dim=8)
    mean = torch.stack([fused(**inputs, dropout_p=0.5) for _ in range(50)]).mean(0)
    assert (mean - fused(**inputs)).abs().mean() < 0.1
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(fused(**inputs, dropout_p=0.5))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_dropout_under_checkpointing():
    inputs = small()
    leaf = inputs["q"].requires_grad_()
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        call = functools.partial(fused, **{**inputs, "q": leaf}, dropout_p=0.4)
        out = torch.utils.checkpoint.checkpoint(call, use_reentrant=False) if checkpointed else call()
        gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    assert torch.equal(*gradients)


# --- Tiles of packed sequences ---


@triton.jit
def store_sequence_of_tile_kernel(cu_seqlens, out, B, T, BLOCK: tl.constexpr, SPARE: tl.constexpr):
    batch, tile = sequence_of_tile(tl.program_id(0), B, T, cu_seqlens, BLOCK, SPARE)
    tl.store(out + 2 * tl.program_id(0), batch)
    tl.store(out + 2 * tl.program_id(0) + 1, tile)


@pytest.mark.parametrize("first_token", [0, 100])
@pytest.mark.parametrize("sequences", [1, 100])
def test_every_tile_of_packed_sequences_is_found(sequences, first_token):
    """Once and in order, and never one of a later sequence. Tokens before the first sequence belong to none."""
    cu_seqlens = torch.cat([torch.tensor([first_token]), torch.randint(0, 40, (sequences,))]).cumsum(0)
    T = int(cu_seqlens[-1])
    tiles = number_of_tiles(sequences, T, cu_seqlens, 16, 1)
    found = torch.full((tiles, 2), -1, device=DEVICE)
    store_sequence_of_tile_kernel[(tiles,)](cu_seqlens.to(DEVICE), found, sequences, T, 16, 1)
    nobodys, found = found[: first_token // 16].cpu(), found[first_token // 16 :].cpu()
    assert (nobodys[:, 0] == 0).all() and (nobodys[:, 1] > T // 16).all()
    owned = torch.bincount(found[:, 0], minlength=sequences)
    assert len(owned) == sequences and (owned > cu_seqlens.diff() // 16).all()
    assert found.tolist() == [[b, tile] for b, count in enumerate(owned.tolist()) for tile in range(count)]


# --- The operator ---


@pytest.mark.parametrize("form", ["padded", "packed"])
def test_opcheck(form):
    packed = form == "packed"
    inputs = on_device(draw_packed([13, 0], [3, 0], heads=2, kv_heads=1)) if packed else small(length=20, sinks=5)
    heads = inputs["q"].shape[1]
    seq_lens = torch.tensor([7], device=DEVICE) if form == "padded" else None
    seq_starts = torch.tensor([4], device=DEVICE) if form == "padded" else None
    seed = torch.tensor([5], device=DEVICE)
    arguments = [inputs[name] for name in ("q", "k", "v", "sink_positions", "inter_sink_bias")]
    arguments += [torch.randn(heads, device=DEVICE), seq_lens, seq_starts, inputs.get("cu_seqlens"), seed]
    arguments += [True, 0.25, 0.1, None, "triton", None]
    torch.library.opcheck(torch.ops.recattn.sink_attention_fwd.default, arguments)
    results = torch.ops.recattn.sink_attention_fwd(*arguments)
    backward = [torch.ones_like(results[0]), *arguments[:3], *results, *arguments[3:]]
    torch.library.opcheck(torch.ops.recattn.sink_attention_bwd.default, backward)


def test_compiles_to_one_graph_without_recompiling():
    torch._dynamo.reset()
    call = functools.partial(fused, causal=True, dropout_p=0.2)
    compiled = torch.compile(lambda **inputs: call(**inputs), fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, length, sinks in ((3, 20, 5), (4, 40, 12)):
        inputs = small(batch=batch, length=length, sinks=sinks, heads=1, kv_heads=1)
        leaves = {name: inputs[name].requires_grad_() for name in GRADS}
        results = []
        for function in (compiled, call):
            torch.manual_seed(0)
            with torch.compiler.set_stance("fail_on_recompile" if batch > 3 else "default"):
                out = function(**inputs)
            results.append((out, *torch.autograd.grad(out.sum(), list(leaves.values()))))
        assert all(map(torch.equal, *results))


def test_functional_call():
    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.zeros(1, 1, 20, 20, device=DEVICE))

        def forward(self, q, k, v, sink_positions):
            return fused(q, k, v, sink_positions, self.bias)

    inputs = small()
    bias = inputs.pop("inter_sink_bias").requires_grad_()
    out = torch.func.functional_call(Attention(), {"bias": bias}, kwargs=inputs)
    expected = reference.sink_attention(**inputs, inter_sink_bias=bias)
    torch.testing.assert_close(out, expected)
    assert torch.autograd.grad(out.sum(), bias)[0].abs().max() > 0


def compilations(B: int, N: int, M: int) -> list[Compilation]:
    """What the launches on these sizes compile."""
    q, kv = (torch.empty(B, heads, N, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 4))
    lse, stats = torch.empty(B, 8, N, device="meta"), torch.empty(2, B, 8, M, device="meta")
    positions, bias = torch.empty(B, M, dtype=torch.int64, device="meta"), torch.empty(B, 1, M, M, device="meta")
    streams = Streams(
        torch.empty(B, N, dtype=torch.int8, device="meta"),
        torch.empty(B, N, dtype=torch.int32, device="meta"),
        torch.empty(B, 2, dtype=torch.int32, device="meta"),
    )
    rest = (SinkInputs(positions, bias), NO_LENGTHS, streams)
    options = SinkAttentionOptions(causal=N % 2 == 0, scale=1 / N)
    backward = (q, kv, kv, q, q, lse, stats, (q, kv, kv))
    return [
        *recorded("", 90, launch_sink_attention_streams, q, positions, NO_LENGTHS),
        *recorded("", 90, launch_sink_attention_fwd, q, kv, kv, q, lse, stats, *rest, options=options),
        *recorded("", 90, launch_sink_attention_bwd, *backward, *rest, options=options),
    ]


@pytest.mark.parametrize("name", ["streams", "fwd", "bwd_dq", "bwd_dkdv"])
def test_no_recompile_for_other_sizes(name):
    sizes = [(8, 4096, 400), (1, 512, 49), (16, 77, 16), (3, 1, 1)]
    made = [
        {made.kernel.__name__: made for made in compilations(*size)}[f"sink_attention_{name}_kernel"] for size in sizes
    ]
    assert all(other == made[0] for other in made[1:])


# --- Launch parameters ---


def test_autotuned_launches(monkeypatch):
    """With a single candidate, which is all that the interpreter can try."""
    monkeypatch.setenv("RECATTN_AUTOTUNE", "1")
    monkeypatch.setattr(config, "candidates", lambda name, kind: [TileConfig(32, 32, 4, 1)])
    config.autotuned.cache_clear()
    try:
        assert_fused({**small(length=70), "causal": True})
    finally:
        config.autotuned.cache_clear()


def test_every_head_dim_has_tiles():
    for (_, kind), tiles in TILES.items():
        assert sorted(tiles) == [32, 64, 128, 256], kind
    assert SinkAttentionConfig.heuristic(33, torch.bfloat16, 90) == TILES[90, "half"][64]
    assert SinkAttentionConfig.heuristic(8, torch.float32, 80, dropout=True) == TILES[80, "single dropout"][32]

"""Which implementation refined_attention selects on a GPU, tried by Triton's interpreter on a CPU."""

import math

import pytest
import torch

pytest.importorskip("triton")

import recattn
from recattn import reference
from recattn._options import RefinedAttentionOptions
from recattn.ops import refined_attention as ops
from recattn.ops.refined_attention import chunked
from recattn.ops.refined_attention import triton_long as long
from recattn.ops.refined_attention import triton_short as short
from recattn.reference.sink_attention import window_starts
from recattn.testing import assert_matches_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MECHANISMS = ("simple", "value", "additive", "stochastic")


def draw(mechanism="simple", n=20, r=8, dtype=torch.float32, device=DEVICE, **options) -> dict:
    """Two heads; scores stay moderate."""
    columns = {"w_q": r, "w_k": r} if mechanism != "stochastic" else {"w_q": 2 * r, "w_k": 2 * r}
    columns |= {"w_v": n} if mechanism in ("value", "additive") else {}
    tensors = {name: torch.randn(2, 2, n, 16) for name in ("q", "k", "v")}
    tensors |= {name: torch.randn(n, width) / (2 * n**0.5) for name, width in columns.items()}
    inputs = {name: x.to(device, dtype) for name, x in tensors.items()}
    return inputs | {"mechanism": mechanism, "seq_lens": torch.tensor([n, n // 2], device=device), **options}


def triton(**inputs):
    return recattn.refined_attention(**inputs, impl="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "mechanism, n, whole",
    [("simple", 20, True), ("additive", 20, True), ("stochastic", 20, False), ("simple", 130, False)],
)
def test_short_sequences_go_through_one_program(mechanism, n, whole, dtype, monkeypatch):
    taken = []
    for module, name in ((short, "refined_attention_fwd"), (long, "refined_attention")):
        function = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, module=module, function=function: taken.append(module) or function(*args)
        )
    inputs = draw(mechanism, n, dtype=dtype, padding_side="left")
    assert_matches_reference(
        triton, reference.refined_attention, inputs, grads=[name for name in inputs if name[0] in "qkvw"]
    )
    assert taken == [short if whole else long]


def test_dropout_is_drawn_anew_and_by_the_generator():
    inputs = draw(n=30) | {"dropout_p": 0.5}
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(triton(**inputs))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize(
    "mechanism, n, d, r, reason",
    [
        ("value", 129, 16, 8, "tokens in float16, and there are 129"),
        ("simple", 129, 16, 257, "257"),
        ("simple", 129, 257, 8, "257"),
        ("stochastic", 20, 16, 200, "400"),
    ],
)
def test_what_triton_refuses(mechanism, n, d, r, reason):
    """It says why, and does not fall back."""
    inputs = draw(mechanism, n, r, dtype=torch.float16)
    inputs["q"] = inputs["k"] = torch.zeros(2, 2, n, d, dtype=torch.float16, device=DEVICE)
    with pytest.raises(NotImplementedError, match=reason):
        triton(**inputs)


def test_what_a_gpu_runs_in_order():
    reasons = ops.unsupported_reasons("cuda")
    assert list(reasons) == ["triton", "chunked", "cpu", "reference"]
    assert reasons["chunked"] is None and reasons["reference"] is None
    assert "on cpu" in ops.unsupported_reasons("cpu")["chunked"]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_chunks_that_read_no_lengths(mechanism, padding_side, causal, monkeypatch):
    """On a GPU chunks are cut without reading the lengths, which would synchronize."""
    monkeypatch.setattr(chunked, "_CHUNK_ELEMENTS_ON_GPU", 3 * 20 * 20)
    cut = chunked.cut_chunks
    monkeypatch.setattr(chunked, "cut_chunks", lambda *args: cut(*args[:-1], torch.device("cuda")))

    class Chunked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            *tensors, ctx.options = inputs
            ctx.save_for_backward(*tensors)
            return chunked.refined_attention_fwd(*inputs)

        @staticmethod
        def backward(ctx, dout):
            gradients = chunked.refined_attention_bwd(dout, *ctx.saved_tensors, ctx.options)
            return *gradients, *[None] * (10 - len(gradients))

    def in_chunks(q, k, v, w_q, w_k, w_v=None, **inputs):
        options, seq_lens = RefinedAttentionOptions(mechanism, "logits", causal, 0.25), inputs["seq_lens"]
        seq_starts = window_starts(padding_side, q.shape[2], seq_lens)
        return Chunked.apply(q, k, v, w_q, w_k, w_v, seq_lens, seq_starts, None, options)

    inputs = draw(mechanism, device="cpu", padding_side=padding_side, causal=causal, scale=0.25)
    inputs["seq_lens"] = torch.tensor([20, 0])
    inputs["q"] = inputs["q"].masked_fill(torch.tensor([False, True])[:, None, None, None], math.nan)
    grads = [name for name in inputs if name[0] in "qkvw"]
    assert_matches_reference(in_chunks, reference.refined_attention, inputs, grads=grads)


@pytest.mark.parametrize("mechanism, dropout_p", [("simple", 0.2), ("additive", 0.0)])
def test_opcheck(mechanism, dropout_p):
    inputs = draw(mechanism)
    tensors = [inputs.get(name) for name in ("q", "k", "v", "w_q", "w_k", "w_v", "seq_lens")]
    seed = torch.tensor([3], device=DEVICE) if dropout_p else None
    starts = torch.tensor([0, 3], device=DEVICE)
    arguments = (*tensors, starts, None, seed, mechanism, "logits", True, 0.25, dropout_p, None, "triton")
    torch.library.opcheck(torch.ops.recattn.refined_attention_fwd.default, arguments)
    dout = torch.randn_like(inputs["v"])
    torch.library.opcheck(torch.ops.recattn.refined_attention_bwd.default, (dout, *arguments))


def test_compiles_whole_without_recompiling():
    torch.compiler.reset()
    compiled = torch.compile(triton, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, n in ((3, 9), (5, 20), (4, 31)):
        inputs = draw(n=n)
        inputs |= {name: x[:1].expand(b, -1, -1, -1).clone() for name, x in inputs.items() if name in ("q", "k", "v")}
        inputs |= {"seq_lens": torch.randint(n, (b,), device=DEVICE), "dropout_p": 0.0}
        leaves = {name: inputs[name].requires_grad_() for name in inputs if name[0] in "qkvw"}
        results = []
        with torch.compiler.set_stance("fail_on_recompile" if b > 3 else "default"):
            for function in (triton, compiled):
                out = function(**inputs)
                results.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)

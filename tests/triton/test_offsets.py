"""Every kernel in tensors of more than 2**31 elements: the last sequences get the same results as alone.

The interpreter runs the last programs only, so that little of the memory is touched, and fails where int32 overflows.
"""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from recattn._options import (
    InterSinkBiasOptions,
    RefinedAttentionOptions,
    SinkAttentionOptions,
    WassersteinAttentionOptions,
)
from recattn.triton_kernels.common import launch
from recattn.triton_kernels.common.ragged import NO_LENGTHS
from recattn.triton_kernels.inter_sink_bias import launch_inter_sink_bias_bwd, launch_inter_sink_bias_fwd
from recattn.triton_kernels.lrea import compress
from recattn.triton_kernels.lrea.attention import launch_lrea_attention_bwd, launch_lrea_attention_fwd
from recattn.triton_kernels.refined_attention import projection, short_backward
from recattn.triton_kernels.refined_attention.short import launch_refined_attention_fwd
from recattn.triton_kernels.sink_attention import (
    Lengths,
    SinkInputs,
    launch_sink_attention_bwd,
    launch_sink_attention_correction_delta,
    launch_sink_attention_correction_fwd,
    launch_sink_attention_fwd,
    launch_sink_attention_pairs_bwd,
    launch_sink_attention_streams,
)
from recattn.triton_kernels.wasserstein_attention import (
    Forward,
    launch_wasserstein_attention_bwd,
    launch_wasserstein_attention_fwd,
    launch_wasserstein_attention_vectors,
)
from tests.helpers.interpreted import run_outer_programs

LARGEST = 10 << 30  # bytes of one tensor, which the system grants where it has as many
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.skipif(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < LARGEST, reason="needs 10 GB"),
]

# More than 2**31 elements, and as far from an axis' first index to its last where that axis comes first in memory.
B, N, D, M = 540_000, 64, 64, 20
# By sequences, as nn.MultiheadAttention has them where not batch_first, and by features.
LAYOUTS = ["bhnd", "nbhd", "dbhn"]


@pytest.fixture
def programs(request):
    """How many of the last programs are run, so that those of the last sequence are among them."""
    return getattr(request, "param", 5)


@pytest.fixture(autouse=True)
def outer_programs(poisoned_allocations, monkeypatch, programs):
    torch.utils.deterministic.fill_uninitialized_memory = False
    zero_partial_results(monkeypatch)
    run_outer_programs(monkeypatch, programs)


def zero_partial_results(monkeypatch) -> None:
    """Sums over all programs count those that are not run as zeros.

    Tensors that no freed memory has room for are zeros as the system grants them.
    """
    new_empty = Tensor.new_empty

    def zeroed(*args, **kwargs):
        x = new_empty(*args, **kwargs)
        return x.zero_() if x.nbytes < 1 << 30 else x

    monkeypatch.setattr(Tensor, "new_empty", zeroed)


def empty(layout: str, dtype: torch.dtype = torch.float16, **sizes: int) -> Tensor:
    """[b, h, n, d] whose axes lie in memory as `layout` says."""
    sizes = {"b": B, "h": 1, "n": N, "d": D, **sizes}
    return torch.empty([sizes[axis] for axis in layout], dtype=dtype).permute([layout.index(axis) for axis in "bhnd"])


def draw(layout: str, dtype: torch.dtype = torch.float16, **sizes: int) -> Tensor:
    """The same with numbers in the last sequence."""
    x = empty(layout, dtype, **sizes)
    assert x.numel() > 2**31
    x[-1] = torch.randn(x.shape[1:])
    return x


def draw_rows(*sizes: int, drawn: int = N) -> Tensor:
    """float16 with numbers in the last rows."""
    x = torch.empty(sizes, dtype=torch.float16)
    assert x.numel() > 2**31
    x[-drawn:] = torch.randn(x[-drawn:].shape)
    return x


def draw_columns(rows: int, columns: int, numbers: Tensor) -> Tensor:
    """[rows, columns], its outer rows the given numbers, with more than 2**31 elements between outer columns."""
    x = torch.empty(columns, 2**31 // (columns - 1) + rows, dtype=numbers.dtype)[:, -rows:].t()
    x[:N] = x[-N:] = numbers
    return x


def assert_last_alone(operator, inputs: dict[str, Tensor], last: dict[str, Tensor] | None = None) -> None:
    """`operator` on all sequences gives the last one the same result as alone."""
    outs = operator(**inputs)
    last = last or {name: x[-1:] for name, x in inputs.items()}
    for name, alone in operator(**{name: x.contiguous() for name, x in last.items()}).items():
        assert alone.abs().max() > 0 and torch.equal(outs[name][-len(alone) :], alone), name


def sink_attention(q, k, v, dout, sink_positions, inter_sink_bias, cu_seqlens=None) -> dict[str, Tensor]:
    """The fused path, and the correction of its own unbiased output."""
    lengths, options = Lengths(cu_seqlens=cu_seqlens), SinkAttentionOptions(causal=False, scale=D**-0.5)
    streams = launch_sink_attention_streams(q, sink_positions, lengths)
    outs = {}
    for prefix, bias in (("", inter_sink_bias), ("corrected ", torch.zeros(()).expand_as(inter_sink_bias))):
        out, *grads = (torch.empty_like(x) for x in (q, q, k, v))
        dq, dk, dv = grads
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        stats = torch.zeros(2, sink_positions.shape[0], q.shape[1], M)
        fused = (SinkInputs(sink_positions, bias), lengths, streams)
        launch_sink_attention_fwd(q, k, v, out, lse, stats, *fused, options=options)
        delta = launch_sink_attention_bwd(q, k, v, out, dout, lse, stats, grads, *fused, options=options)
        sinks, of_pairs = SinkInputs(sink_positions, inter_sink_bias), (None, dk, dv)
        if prefix:
            stats = launch_sink_attention_correction_fwd(q, k, v, out, lse, sinks, lengths, options=options)
            delta = launch_sink_attention_correction_delta(out, dout, sink_positions, stats, lse, lengths)
            of_pairs = grads
        dbias = launch_sink_attention_pairs_bwd(
            q, k, v, dout, stats, delta, of_pairs, sinks, lengths, options=options, corrects=bool(prefix)
        )
        made = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias}
        outs |= {prefix + name: x for name, x in made.items()}
    return outs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sink_attention(layout):
    inputs = {name: draw(layout) for name in ("q", "k", "v", "dout")}
    inputs["sink_positions"] = draw_columns(B, M, 3 * torch.arange(M, dtype=torch.int8))
    inputs["inter_sink_bias"] = draw_columns(M, M, torch.randn(M).half()).expand(B, 1, M, M)
    assert_last_alone(sink_attention, inputs)


def test_packed_sink_attention():
    positions, bias = (3 * torch.arange(M)).expand(B, M), torch.randn(M, M).expand(B, 1, M, M)
    tokens = {name: draw_rows(B * N, 1, D) for name in ("q", "k", "v", "dout")}
    inputs = {**tokens, "sink_positions": positions, "inter_sink_bias": bias, "cu_seqlens": torch.arange(B + 1) * N}
    last = {name: x[-N:] for name, x in tokens.items()} | {"cu_seqlens": torch.tensor([0, N])}
    assert_last_alone(sink_attention, inputs, last | {"sink_positions": positions[:1], "inter_sink_bias": bias[:1]})


def inter_sink_bias(q_s, k_s, dout, sink_mask) -> dict[str, Tensor]:
    out, shares = torch.empty_like(dout), torch.empty(q_s.shape[:3])
    dq_s, dk_s = torch.empty_like(q_s), torch.empty_like(k_s)
    inputs, options = (q_s, k_s, sink_mask, None, None), InterSinkBiasOptions(1.0, False, 0.0, D**-0.5)
    launch_inter_sink_bias_fwd(*inputs, out, options)
    launch_inter_sink_bias_bwd(dout, *inputs, dq_s, dk_s, shares, options)
    return {"out": out, "dq_s": dq_s, "dk_s": dk_s, "shares": shares}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inter_sink_bias(layout):
    inputs = {name: draw(layout) for name in ("q_s", "k_s")}
    inputs["dout"] = draw("bhnd", torch.float32, d=N)
    inputs["sink_mask"] = draw_columns(B, N, torch.arange(N) % 5 > 0)
    assert_last_alone(inter_sink_bias, inputs)


def wasserstein_attention(mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, dmean, dcov) -> dict[str, Tensor]:
    inputs = (mean_q, cov_q, mean_k, cov_k, mean_v, cov_v)
    options = WassersteinAttentionOptions("logits", causal=True, scale=1 / D)
    made = {name: torch.empty_like(x) for name, x in zip(("mean", "cov"), (mean_v, cov_v), strict=True)}
    *sizes, head_dim = mean_q.shape
    vectors = mean_q.new_empty(2, *sizes, 2 * head_dim)
    forward = Forward(*inputs, *made.values(), vectors, torch.empty(2, *sizes))
    launch_wasserstein_attention_vectors(forward, NO_LENGTHS, options)
    launch_wasserstein_attention_fwd(forward, NO_LENGTHS, options)
    names = ("dmean_q", "dcov_q", "dmean_k", "dcov_k", "dmean_v", "dcov_v")
    gradients = {name: x.new_empty(x.shape) for name, x in zip(names, inputs, strict=True)}
    launch_wasserstein_attention_bwd(forward, dmean, dcov, tuple(gradients.values()), NO_LENGTHS, options)
    return made | gradients


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wasserstein_attention(layout):
    """The vectors have more than 2**31 elements too."""
    gaussians = {name: draw(layout)[..., :16] for name in ("mean_q", "cov_q", "mean_k", "cov_k")}
    for name in ("cov_q", "cov_k"):
        gaussians[name][-1].abs_()
    assert_last_alone(
        wasserstein_attention, gaussians | {name: draw("bhnd") for name in ("mean_v", "cov_v", "dmean", "dcov")}
    )


def refined_attention_of(w: Tensor):
    def operator(q, k, v, dout) -> dict[str, Tensor]:
        options = RefinedAttentionOptions("additive", "logits", causal=True, scale=D**-0.5)
        # As launch_weights_product, of which not all programs are interpreted here.
        g = (w.float() @ w.float().T / w.shape[1] ** 0.5).to(w.dtype)
        inputs = (q, k, v, torch.stack([g, w]), w, NO_LENGTHS, options)
        out = launch_refined_attention_fwd(*inputs)
        gradients = short_backward.launch_refined_attention_bwd(dout, *inputs)
        return {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=False))}

    return operator


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refined_attention(layout, monkeypatch):
    monkeypatch.setattr(short_backward, "pairs_per_launch", lambda q, N, groups: len(q))  # all in one launch
    sizes = {"b": 1_200_000, "n": 16, "d": 128}  # the sums that each pair then has of its own stay small
    inputs = {name: draw(layout, **sizes) for name in ("q", "k", "v", "dout")}
    assert_last_alone(refined_attention_of(torch.randn(16, 16).half() / 16), inputs)


def test_refined_attention_in_three_launches(monkeypatch):
    """The workspace between the launches has more than 2**31 elements."""
    monkeypatch.setattr(short_backward, "pairs_per_launch", lambda q, N, groups: len(q))
    batch, length = 15_000, 128
    assert batch * len(short_backward.Workspace._fields) * length**2 > 2**31
    names = ("q", "k", "v", "dout")
    inputs = {name: torch.randn(1, 1, length, 16).half().expand(batch, -1, -1, -1) for name in names}
    assert_last_alone(refined_attention_of(torch.randn(length, length).half() / length), inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refined_projection(layout, monkeypatch):
    """The states of the two segments before the last have more than 2**31 elements too."""
    batch, length, sequences_a_program = 270_000, 130, 16
    monkeypatch.setattr(projection, "FULL_GRID", 3 * batch // sequences_a_program)  # of three tiles each
    w = torch.randn(length, D).half()

    def operator(q, k, dx) -> dict[str, Tensor]:
        sequences = projection.Batch(len(q), length, NO_LENGTHS, causal=True)
        x = projection.launch_refined_projection_fwd(q, k, w, sequences, 1 / D)
        dq, dk, dw = projection.launch_refined_projection_bwd(dx, q, k, w, sequences, 1 / D)
        return {"x": x, "dq": dq, "dk": dk, "dw": dw}

    assert_last_alone(operator, {name: draw(layout, b=batch, n=length) for name in ("q", "k", "dx")})


def lrea_attention(targets, dout, keys, values, w, target_offsets) -> dict[str, Tensor]:
    tensors = (targets, keys, values, w, target_offsets, None)
    out, *saved = launch_lrea_attention_fwd(*tensors, 0.1, 1 / D)
    dtargets, dkeys, dvalues, dw = launch_lrea_attention_bwd(dout, *tensors, *saved, 0.1, 1 / D)
    return {"out": out, "dtargets": dtargets, "dkeys": dkeys, "dvalues": dvalues, "dw": dw.t()}


@pytest.mark.parametrize("programs", [2], indirect=True)
@pytest.mark.parametrize("by_features", [False, True])
def test_lrea_attention(by_features, monkeypatch):
    """N targets a user. The loop over all targets is split into many."""
    monkeypatch.setattr(launch, "FULL_GRID", 5000)
    targets, dout = (draw_rows(B * N, 1, D) for _ in range(2))
    if by_features:
        targets, dout = (draw_columns(B * N, D, torch.randn(D).half())[:, None] for _ in range(2))
    states = {name: draw(LAYOUTS[2 * by_features]) for name in ("keys", "values")}
    others = {"w": torch.randn(N, 16).half(), "target_offsets": torch.arange(B + 1) * N}
    last = {name: x[-1:] for name, x in states.items()}
    last |= {"targets": targets[-N:], "dout": dout[-N:], "w": others["w"], "target_offsets": torch.tensor([0, N])}
    assert_last_alone(lrea_attention, states | {"targets": targets, "dout": dout} | others, last)


@pytest.mark.parametrize("programs", [2], indirect=True)
def test_lrea_attention_of_long_histories(monkeypatch):
    """The loop over all columns of W is split into many."""
    monkeypatch.setattr(launch, "FULL_GRID", 2000)
    inputs = {name: torch.randn(16, 1, D).half() for name in ("targets", "dout")}
    inputs |= {name: torch.randn(1, 1, D, D).half() for name in ("keys", "values")}
    w = torch.empty(D, B * N, dtype=torch.float16)
    w[:, -256:] = torch.randn(D, 256)
    inputs["target_offsets"] = torch.tensor([0, 16])

    def dw(**inputs) -> dict[str, Tensor]:
        return {"dw": lrea_attention(**inputs)["dw"]}

    assert_last_alone(dw, inputs | {"w": w}, inputs | {"w": w[:, -256:]})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lrea_compress(layout, monkeypatch):
    monkeypatch.setattr(launch, "FULL_GRID", B)
    w_comp = torch.randn(N, D)

    def operator(behaviors, dcompressed) -> dict[str, Tensor]:
        return {
            "compressed": compress.launch_lrea_compress_fwd(behaviors, w_comp, NO_LENGTHS, None, None),
            "dbehaviors": compress.launch_lrea_compress_bwd_behaviors(dcompressed, w_comp, NO_LENGTHS, N, None),
            "dw_comp": compress.launch_lrea_compress_bwd_w_comp(dcompressed, behaviors, NO_LENGTHS, N, None),
        }

    behaviors, dcompressed = draw(layout, torch.float32), draw("bhnd", torch.float32)
    assert_last_alone(operator, {"behaviors": behaviors[:, 0], "dcompressed": dcompressed[:, 0]})


def compress_items(table, item_ids) -> dict[str, Tensor]:
    w_comp = torch.linspace(-1, 1, N * 8, dtype=table.dtype).view(N, 8)
    return {"compressed": compress.launch_lrea_compress_fwd(table, w_comp, NO_LENGTHS, item_ids, None)}


def test_lrea_compress_by_item_ids():
    table, item_ids = torch.randn(N, D), draw_columns(B, N, torch.arange(N, dtype=torch.int8))
    assert_last_alone(
        compress_items, {"table": table, "item_ids": item_ids}, {"table": table, "item_ids": item_ids[-1:]}
    )
    table, item_ids = draw_rows(B * N, D), torch.arange(N)[None]
    last = {"table": table[-N:], "item_ids": item_ids}
    assert_last_alone(compress_items, {"table": table, "item_ids": item_ids + (B - 1) * N}, last)

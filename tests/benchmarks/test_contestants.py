"""The suite's data and real operators: every contestant computes the same."""

import math
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import accumulate, pairwise
from types import ModuleType

import pytest
import torch

from benchmarks.data import movielens
from benchmarks.harness import correctness
from benchmarks.harness.registry import BACKWARD, FORWARD, TRAINING, load_operators
from benchmarks.harness.workloads import Draw, LreaWorkload, RefinedWorkload, SinkWorkload
from benchmarks.operators import lrea_attention, sink_attention
from tests.helpers.suite_runs import CPU

# MovieLens-100k


def test_the_histogram_is_that_of_movielens_100k():
    lengths = sorted(movielens.read_histogram().elements())
    assert len(lengths) == 943
    assert sum(lengths) == 100_000
    assert lengths[943 // 2] == 65
    assert lengths[-1] == 737


def test_without_the_data_the_lengths_are_real_and_the_items_drawn(histories):
    assert histories.source == "MovieLens-100k lengths, drawn items"
    assert Counter(map(len, histories.items)) == movielens.read_histogram()
    items = torch.cat(histories.items)
    assert items.min() >= 1 and items.max() <= movielens.ITEMS
    lengths = sorted(map(len, histories.sample(256)))
    assert (lengths[0], lengths[-1]) == (20, 737)
    assert max(map(len, histories.sample(256, longest=50))) == 50


@pytest.mark.skipif(not movielens.CACHED.exists(), reason="the data was never downloaded here")
def test_the_data_has_the_lengths_of_the_histogram():
    histories = movielens.load()
    assert histories.source == "MovieLens-100k"
    assert Counter(map(len, histories.items)) == movielens.read_histogram()


def test_tampered_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(movielens, "CACHED", tmp_path / "ml-100k.inter")
    movielens.CACHED.write_text("user_id:token\titem_id:token\n1\t1\n")
    with pytest.raises(ValueError, match="must have sha256 4edb74e2"):
        movielens.load()


# The real operators


FLEX = ("FlexAttention", "FlexAttention FLASH", "unbiased FlexAttention FLASH")
OF_HISTORIES = {"tokens_per_behavior": 4, "histories": True}
SMALL = {
    "bert_layer": (SinkWorkload(name="even", batch=2, heads=2, kv_heads=2, length=20, dim=8, sinks=5),),
    "sink_attention": (
        SinkWorkload(name="gqa", batch=2, heads=4, kv_heads=2, length=63, dim=8, sinks=9),
        SinkWorkload(name="causal", batch=2, heads=2, kv_heads=2, length=63, dim=8, sinks=9, causal=True),
        SinkWorkload(name="ragged", batch=3, heads=2, kv_heads=2, length=100, dim=8, sinks=25, **OF_HISTORIES),
        SinkWorkload(name="no sinks", batch=2, heads=2, kv_heads=2, length=64, dim=8, sinks=0),
        SinkWorkload(name="all sinks", batch=2, heads=2, kv_heads=2, length=64, dim=8, sinks=64),
        SinkWorkload(name="one long", batch=5, heads=2, kv_heads=2, length=70, dim=8, sinks=20, others=6, causal=True),
        SinkWorkload(name="zipf", batch=5, heads=2, kv_heads=2, length=70, dim=8, sinks=20, ragged=True, causal=True),
    ),
    "inter_sink_bias": (
        SinkWorkload(name="full", batch=5, heads=3, kv_heads=3, length=20, dim=8, sinks=7),
        SinkWorkload(name="causal", batch=5, heads=3, kv_heads=3, length=20, dim=8, sinks=7, causal=True),
    ),
    "wasserstein_attention": tuple(
        RefinedWorkload(name=mechanism, batch=3, length=30, dim=8, heads=2, mechanism=mechanism, histories=True)
        for mechanism in ("plain", "stochastic")
    ),
    "refined_attention": tuple(
        RefinedWorkload(
            name=f"{mechanism}-{source}", batch=3, length=30, dim=8, mechanism=mechanism, source=source, histories=True
        )
        for mechanism in ("simple", "value", "additive", "stochastic")
        for source in ("logits", "weights")
    ),
    "lrea_absorbed_attention": (
        LreaWorkload(name="even", batch=3, targets=5, rank=4, dim=8),
        LreaWorkload(name="ragged", batch=9, targets=40, rank=4, dim=8, ragged=True),
    ),
    "lrea_compress": (LreaWorkload(name="histories", batch=3, rank=4, dim=8, longest=40, histories=True),),
    "lrea_compress_items": (LreaWorkload(name="histories", batch=3, rank=4, dim=8, longest=40, histories=True),),
    "lrea_attention": (LreaWorkload(name="histories", batch=3, targets=5, rank=4, dim=8, longest=40, histories=True),),
}


def implementations_to_check():
    for operator in load_operators().values():
        for workload in SMALL[operator.name]:
            for name, implementation in operator.implementations.items():
                applies = implementation.applies(workload) and implementation.unsupported_reason(workload, CPU) is None
                compiles = "torch.compile" in name
                if applies and "cpu" in implementation.devices and not compiles:
                    yield pytest.param(operator, workload, name, id=f"{operator.name}-{workload.name}-{name}")


@pytest.mark.parametrize(("operator", "workload", "name"), list(implementations_to_check()))
def test_every_contestant_passes_the_gate(operator, workload, name, histories):
    implementation = operator.implementations[name]
    inputs = operator.inputs(workload, Draw(0, torch.float32, CPU, histories))
    errors = correctness.Gate(operator, inputs).check(implementation, operator.directions(implementation, CPU))
    assert correctness.passes(implementation, errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("name", FLEX)
@pytest.mark.parametrize("workload", SMALL["sink_attention"], ids=lambda workload: workload.name)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_the_same(workload, name, histories, monkeypatch):
    """Uncompiled, so that it needs no GPU."""
    monkeypatch.setattr(sink_attention, "compiled", lambda function: function)
    implementation = sink_attention.SINK_ATTENTION.implementations[name]
    if not implementation.applies(workload):
        pytest.skip("it captures no empty tensor")
    inputs = sink_attention.draw_inputs(workload, Draw(0, torch.float32, CPU, histories))
    errors = correctness.Gate(sink_attention.SINK_ATTENTION, inputs).check(implementation, (FORWARD,))
    assert correctness.passes(implementation, errors), "\n".join(map(str, errors))


@pytest.mark.parametrize("name", FLEX)
def test_flex_attention_asks_for_the_kernels_of_its_name(name, histories, monkeypatch):
    asked = []

    def spy(q, k, v, kernel_options=None, score_mod=None, **others):
        asked.append((kernel_options, score_mod is not None))
        return torch.zeros_like(q)

    monkeypatch.setattr(sink_attention, "compiled", lambda function: spy)
    operator = sink_attention.SINK_ATTENTION
    implementation = operator.implementations[name]
    inputs = operator.inputs(SMALL["sink_attention"][0], Draw(0, torch.float32, CPU, histories))
    implementation.run(**implementation.prepare(inputs))
    flash, biased = "FLASH" in name, "unbiased" not in name
    assert asked == [({"BACKEND": "FLASH"} if flash else None, biased)]
    # FlashAttention 4 gives a captured bias no gradient.
    directions = operator.directions(implementation, torch.device("cuda"))
    assert directions == ((FORWARD,) if flash and biased else (FORWARD, BACKWARD, TRAINING))


@pytest.mark.parametrize("name", FLEX[1:])
def test_flex_attention_says_what_its_flash_kernels_need(name, histories, monkeypatch):
    implementation, workload = sink_attention.SINK_ATTENTION.implementations[name], SMALL["sink_attention"][1]
    cuda = torch.device("cuda")
    assert implementation.unsupported_reason(workload, CPU) == "it needs a CUDA device"
    assert "flash_attn.cute cannot be imported" in implementation.unsupported_reason(workload, cuda)
    monkeypatch.setitem(sys.modules, "flash_attn.cute", ModuleType("flash_attn.cute"))
    for capability, wanted in {(8, 0): "got 8.0", (9, 0): None, (10, 0): None, (12, 0): "got 12.0"}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        reason = implementation.unsupported_reason(workload, cuda)
        assert reason is wanted or reason.endswith(wanted)


def test_block_masks_for_flash_kernels_have_their_tiles(histories):
    inputs = sink_attention.draw_inputs(SMALL["sink_attention"][1], Draw(0, torch.float32, CPU, histories))
    assert sink_attention.prepare_flex_flash(inputs)["block_mask"].BLOCK_SIZE == (128, 128)
    assert sink_attention.prepare_flex(inputs, 256)["block_mask"].BLOCK_SIZE == (256, 128)


@pytest.mark.parametrize(
    "operator, workload, name",
    [
        ("lrea_absorbed_attention", "even", lrea_attention.COMPILED),
        ("lrea_absorbed_attention", "even", lrea_attention.JAGGED),
        ("lrea_absorbed_attention", "ragged", lrea_attention.JAGGED),
        ("lrea_absorbed_attention", "even", lrea_attention.FULL_ATTENTION),
        ("lrea_attention", "histories", lrea_attention.COMPILED_FACTORED),
        ("lrea_compress", "histories", lrea_attention.COMPILED),
        ("lrea_compress_items", "histories", lrea_attention.COMPILED),
        ("refined_attention", "value-logits", "eager, torch.compile"),
        ("wasserstein_attention", "stochastic", "eager, torch.compile"),
        ("inter_sink_bias", "causal", "eager, torch.compile"),
        ("sink_attention", "ragged", "eager, torch.compile"),
    ],
)
def test_peers_that_are_not_for_here_compute_the_same(operator, workload, name, histories, monkeypatch):
    """Peers for other devices, run uncompiled on the CPU."""
    operator = load_operators()[operator]
    function = operator.implementations[name].run
    monkeypatch.setitem(function.__globals__, "compiled", lambda function: function)
    workload = next(w for w in SMALL[operator.name] if w.name == workload)
    inputs = operator.inputs(workload, Draw(0, torch.float32, CPU, histories))
    errors = correctness.Gate(operator, inputs).check(operator.implementations[name], (FORWARD,))
    assert correctness.passes(operator.implementations[name], errors), "\n".join(map(str, errors))


def test_histories_of_one_length(histories):
    workload = LreaWorkload(name="", batch=3, rank=4, dim=8, length=50)
    inputs = lrea_attention.draw_compress(workload, Draw(0, torch.float32, CPU, histories))
    assert inputs["behaviors"].shape == (3, 50, 8) and inputs["seq_lens"].tolist() == [50] * 3


PEERS_OF_OTHERS = [name for name in sink_attention.SINK_ATTENTION.implementations if re.search("FlashA|xFormers", name)]
WORKLOADS_OF_OTHERS = ("causal", "no sinks", "one long", "gqa")


def attention_of(q, k, v, causal):
    """Attention with tokens first, as GPU libraries lay them out. Grouped heads stay grouped."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def packed_attention_of(q, k, v, bounds, causal):
    own = [attention_of(*(x[a:b].unsqueeze(0) for x in (q, k, v)), causal)[0] for a, b in pairwise(bounds.tolist())]
    return torch.cat(own)


class FakeFlashAttention(ModuleType):
    @staticmethod
    def flash_attn_func(q, k, v, *, causal):
        return attention_of(q, k, v, causal), "log-sum-exp"

    @staticmethod
    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        return packed_attention_of(q, k, v, cu_seqlens_q, causal)


class FakeXformers(ModuleType):
    """xFormers' masks, and its attention with an optional tensor bias and without head groups."""

    class LowerTriangularMask: ...

    class BlockDiagonalMask:
        causal = False

        @classmethod
        def from_seqlens(cls, lengths, *, device):
            mask = cls()
            mask.bounds = torch.tensor([0, *accumulate(lengths)])
            return mask

        def make_causal(self):
            self.causal = True
            return self

    @classmethod
    def memory_efficient_attention(cls, q, k, v, *, attn_bias):
        assert q.shape == k.shape == v.shape and q.dim() == 4
        if isinstance(attn_bias, cls.BlockDiagonalMask):
            return packed_attention_of(q[0], k[0], v[0], attn_bias.bounds, attn_bias.causal).unsqueeze(0)
        if not isinstance(attn_bias, torch.Tensor):
            return attention_of(q, k, v, causal=attn_bias is not None)
        assert attn_bias.shape == (len(q), q.shape[2], q.shape[1], q.shape[1]) and attn_bias.dtype == q.dtype
        scores = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / math.sqrt(q.shape[-1]) + attn_bias
        return (scores.softmax(-1) @ v.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("name", PEERS_OF_OTHERS)
@pytest.mark.parametrize("workload", WORKLOADS_OF_OTHERS)
def test_libraries_for_gpus_are_called_as_they_want_it(name, workload, histories, monkeypatch):
    for module in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, FakeFlashAttention(module))
    xformers = FakeXformers("xformers.ops")
    xformers.fmha = xformers
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    operator = sink_attention.SINK_ATTENTION
    implementation = operator.implementations[name]
    workload = next(w for w in SMALL["sink_attention"] if w.name == workload)
    if not implementation.applies(workload):
        assert name == "xFormers, dense bias" and (workload.packed or workload.length % 8)
        return
    inputs = operator.inputs(workload, Draw(0, torch.float32, CPU, histories))
    errors = correctness.Gate(operator, inputs).check(implementation, (FORWARD, TRAINING))
    assert correctness.passes(implementation, errors), "\n".join(map(str, errors))
    assert len(errors) == 1 + len(correctness.gradients(operator, implementation, inputs))


@pytest.mark.parametrize("name", PEERS_OF_OTHERS)
def test_a_library_that_is_not_there_says_so(name):
    implementation = sink_attention.SINK_ATTENTION.implementations[name]
    workload = sink_attention.SINK_ATTENTION.workloads[0]
    assert implementation.unsupported_reason(workload, CPU) == "it needs a CUDA device"
    reason = implementation.unsupported_reason(workload, torch.device("cuda"))
    assert "cannot be imported: ModuleNotFoundError: No module named" in reason


def test_cudnn_never_runs_a_backward_with_a_mask(histories, monkeypatch):
    """torch 2.11's cuDNN backward returns NaN with a mask and N % 128 == 64."""
    masked = []

    def spy(q, k, v, mask=None, **options):
        masked.append(mask is not None)
        return torch.zeros_like(q)

    monkeypatch.setattr(sink_attention.F, "scaled_dot_product_attention", spy)
    operator, cuda = sink_attention.SINK_ATTENTION, torch.device("cuda")
    for name, implementation in operator.implementations.items():
        for workload in SMALL["sink_attention"]:
            if "cuDNN" in name and implementation.applies(workload):
                inputs = operator.inputs(workload, Draw(0, torch.float32, CPU, histories))
                implementation.run(**implementation.prepare(inputs))
                assert not masked.pop() or operator.directions(implementation, cuda) == (FORWARD,)
                assert not masked


@pytest.mark.parametrize("name", ["SDPA, dense bias", "SDPA efficient, dense bias", "SDPA cuDNN, dense bias"])
@pytest.mark.parametrize("workload", ["causal", "ragged"])
def test_a_mask_has_the_dtype_of_what_it_masks(name, workload, histories, monkeypatch):
    """torch 2.11 misreads a float32 mask beside bfloat16 inputs, without an error."""
    dtypes = []

    def spy(q, k, v, mask=None, **options):
        dtypes.append((q.dtype, mask.dtype))
        return torch.zeros_like(q)

    monkeypatch.setattr(sink_attention.F, "scaled_dot_product_attention", spy)
    operator = sink_attention.SINK_ATTENTION
    implementation = operator.implementations[name]
    workload = next(w for w in SMALL["sink_attention"] if w.name == workload)
    inputs = operator.inputs(workload, Draw(0, torch.bfloat16, CPU, histories))
    inputs["inter_sink_bias"] = inputs["inter_sink_bias"].float()  # as recattn.inter_sink_bias returns it
    implementation.run(**implementation.prepare(inputs))
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]


def test_one_long_sequence_among_short_ones(histories):
    workload = next(w for w in SMALL["sink_attention"] if w.name == "one long")
    inputs = sink_attention.draw_inputs(workload, Draw(0, torch.float32, CPU, histories))
    assert inputs["cu_seqlens"].diff().tolist() == [70, 6, 6, 6, 6]
    assert (inputs["sink_positions"] >= 0).sum(1).tolist() == [20, 1, 1, 1, 1]


@pytest.mark.parametrize("name", sink_attention.UNBIASED_PACKED)
def test_packed_unbiased_attention_is_called_as_declared(name, histories):
    inputs = sink_attention.draw_inputs(SMALL["sink_attention"][-1], Draw(0, torch.bfloat16, CPU, histories))
    inputs = {key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
    out = sink_attention.SINK_ATTENTION.implementations[name].run(**inputs, max_seqlen=70)
    assert out.shape == inputs["q"].shape and out.dtype == torch.bfloat16


def test_zipf_lengths(histories):
    workload = replace(SMALL["sink_attention"][-1], batch=400, length=100, sinks=10)
    inputs = sink_attention.draw_inputs(workload, Draw(0, torch.float32, CPU, histories))
    lengths = inputs["cu_seqlens"].diff()
    assert lengths.min() == 1 and lengths.max() == 100
    # With probability ∝ 1/n, 56% have at most 10 tokens.
    assert 0.5 < (lengths <= 10).float().mean() < 0.62
    positions = inputs["sink_positions"]
    assert torch.equal((positions >= 0).sum(1), lengths // 10)
    assert (positions < lengths[:, None]).all()


@pytest.mark.parametrize("operator", load_operators().values(), ids=load_operators())
def test_goals_name_what_exists(operator):
    workloads = {workload.name: workload for workload in operator.workloads}
    assert len(workloads) == len(operator.workloads)
    assert operator.baseline in operator.implementations
    for goal in operator.goals:
        workload = workloads[goal.workload]
        assert goal.device in workload.devices and workload.tier != "quick"
        for name in (goal.implementation, *goal.against):
            implementation = operator.implementations[name]
            assert implementation.applies(workload) and goal.device in implementation.devices
            assert goal.direction == FORWARD or not implementation.forward_only(torch.device(goal.device))

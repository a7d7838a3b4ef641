"""NaN and infinity: in padding they change nothing; elsewhere they show, and stay in their batch element."""

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import recattn
from recattn import reference
from tests.helpers.strategies import seeds

BATCH, HEADS, LENGTH, DIM, SINKS, RANK = 2, 2, 9, 4, 3, 3
BAD = (math.nan, math.inf, -math.inf)
# The first is what few examples begin with.
lengths_of_batch = st.lists(st.sampled_from((5, *range(LENGTH + 1))), min_size=BATCH, max_size=BATCH)


@dataclass
class Call:
    """One call: its function and inputs, and where its tensors hold padding.

    `own` are the tensors of which each batch element has its own, along the first axis.
    """

    function: Callable
    reference: Callable
    tensors: dict[str, Tensor]
    options: dict
    padding: dict[str, Tensor] = field(default_factory=dict)  # masks that broadcast against the tensor
    own: tuple[str, ...] = ()
    differentiable: bool = True

    def depends_on(self, where: tuple[int, ...], out: Tensor) -> Tensor:
        """Which outputs depend on the entry at `where`; in the others the reference multiplies it by zero."""
        looked_at = torch.ones(out.shape, dtype=torch.bool)
        padding = next(iter(self.padding.values()), None)
        if "causal" in self.options:
            looked_at &= ~padding
            if self.options["causal"]:
                looked_at[:, :, : where[2]] = False
        return looked_at

    def run(self, tensors: dict[str, Tensor], impl: str | None) -> dict[str, Tensor]:
        """Outputs, and the gradients of all tensors."""
        leaves = {name: x.clone().requires_grad_(self.differentiable) for name, x in tensors.items()}
        function = self.reference if impl == "reference" else functools.partial(self.function, impl=impl)
        outs = function(**leaves, **self.options)
        outs = outs if isinstance(outs, tuple) else (outs,)
        results = {f"output {i}": out.detach() for i, out in enumerate(outs)}
        if self.differentiable:
            generator = torch.Generator().manual_seed(3)
            incoming = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
            results |= dict(zip(leaves, torch.autograd.grad(outs, list(leaves.values()), incoming), strict=True))
        return results


# --- The calls ---


def attention_padding(lengths: Tensor, side: str) -> Tensor:
    """[B, 1, N, 1]"""
    positions = torch.arange(LENGTH)
    positions = positions if side == "right" else LENGTH - 1 - positions
    return (positions >= lengths[:, None])[:, None, :, None]


def attention_options(draw) -> tuple[dict, Tensor]:
    lengths = torch.tensor(draw(lengths_of_batch))
    options = {
        "causal": draw(st.booleans()),
        "seq_lens": lengths,
        "padding_side": draw(st.sampled_from(("right", "left"))),
    }
    return options, attention_padding(lengths, options["padding_side"])


def sink_attention(draw, dtype) -> Call:
    options, padding = attention_options(draw)
    tensors = {name: torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=dtype) for name in "qkv"}
    tensors["inter_sink_bias"] = torch.randn(BATCH, 1, SINKS, SINKS)
    sinks = torch.stack([torch.randperm(LENGTH)[:SINKS].sort().values for _ in range(BATCH)])
    ignored = padding[:, 0, :, 0].gather(1, sinks)
    masks = dict.fromkeys("qkv", padding)
    masks["inter_sink_bias"] = (ignored[:, :, None] | ignored[:, None, :])[:, None]
    options["sink_positions"] = sinks
    return Call(recattn.sink_attention, reference.sink_attention, tensors, options, masks, own=("q", "k", "v"))


def refined_attention(draw, dtype, mechanism) -> Call:
    options, padding = attention_options(draw)
    options |= {"mechanism": mechanism, "source": draw(st.sampled_from(("logits", "weights")))}
    tensors = {name: torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=dtype) for name in "qkv"}
    widths = {"w_q": 4, "w_k": 4} | ({"w_v": LENGTH} if mechanism in ("value", "additive") else {})
    tensors |= {name: torch.randn(LENGTH, width).to(dtype) / 4 for name, width in widths.items()}
    masks = dict.fromkeys("qkv", padding)
    return Call(recattn.refined_attention, reference.refined_attention, tensors, options, masks, own=("q", "k", "v"))


def wasserstein_attention(draw, dtype, refined) -> Call:
    options, padding = attention_options(draw)
    names = [f"{part}_{role}" for role in "qkv" for part in ("mean", "cov")]
    tensors = {name: torch.randn(BATCH, HEADS, LENGTH, DIM) for name in names}
    tensors = {name: (x.exp() if name.startswith("cov") else x).to(dtype) for name, x in tensors.items()}
    if refined:
        options["source"] = draw(st.sampled_from(("logits", "weights")))
        tensors |= {name: torch.randn(LENGTH, 4).to(dtype) / 4 for name in ("w_q", "w_k")}
    masks = dict.fromkeys(names, padding)
    return Call(
        recattn.wasserstein_attention, reference.wasserstein_attention, tensors, options, masks, own=tuple(names)
    )


def inter_sink_bias(draw, dtype) -> Call:
    mask = torch.rand(BATCH, LENGTH) > 0.3
    tensors = {name: torch.randn(BATCH, HEADS, LENGTH, DIM, dtype=dtype) for name in ("q_s", "k_s")}
    masks = dict.fromkeys(tensors, ~mask[:, None, :, None])
    options = {"sink_mask": mask, "causal": draw(st.booleans())}
    return Call(recattn.inter_sink_bias, reference.inter_sink_bias, tensors, options, masks, own=("q_s", "k_s"))


def lrea_compress(draw, dtype) -> Call:
    lengths = torch.tensor(draw(lengths_of_batch))
    tensors = {"behaviors": torch.randn(BATCH, LENGTH, DIM), "w_comp": torch.randn(LENGTH, RANK)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    masks = {"behaviors": (torch.arange(LENGTH) >= lengths[:, None])[:, :, None]}
    options = {"seq_lens": lengths}
    return Call(recattn.lrea_compress, reference.lrea_compress, tensors, options, masks, own=("behaviors",))


def lrea_attention(draw, dtype) -> Call:
    users = {name: torch.randn(BATCH, HEADS, RANK, DIM) for name in ("keys", "values")}
    tensors = {"targets": torch.randn(BATCH, HEADS, DIM), **users, "w_decomp": torch.randn(RANK, LENGTH)}
    tensors = {name: x.to(dtype) for name, x in tensors.items()}
    options = {"target_offsets": torch.arange(BATCH + 1)}  # a target each, so that its axis is that of the users
    own = ("targets", "keys", "values")
    return Call(recattn.lrea_attention, reference.lrea_attention, tensors, options, own=own)


def lrea_absorbed_attention(draw, dtype) -> Call:
    states = {name: torch.randn(BATCH, HEADS, RANK, DIM) for name in ("state_keys", "state_values")}
    tensors = {name: x.to(dtype) for name, x in {"targets": torch.randn(BATCH, HEADS, DIM), **states}.items()}
    options = {"slots": torch.arange(BATCH), "target_offsets": torch.arange(BATCH + 1)}
    functions = (recattn.lrea_absorbed_attention, reference.lrea_absorbed_attention)
    return Call(*functions, tensors, options, own=tuple(tensors), differentiable=False)


MECHANISMS = ("simple", "additive", "value", "stochastic")
CALLS = {
    "sink_attention": sink_attention,
    **{f"refined_attention {name}": functools.partial(refined_attention, mechanism=name) for name in MECHANISMS},
    "wasserstein_attention": functools.partial(wasserstein_attention, refined=False),
    "wasserstein_attention refined": functools.partial(wasserstein_attention, refined=True),
    "inter_sink_bias": inter_sink_bias,
    "lrea_compress": lrea_compress,
    "lrea_attention": lrea_attention,
    "lrea_absorbed_attention": lrea_absorbed_attention,
}
PADDED = [name for name in CALLS if name not in ("lrea_attention", "lrea_absorbed_attention")]
BY_TRITON = [name for name in CALLS if name != "lrea_absorbed_attention"]


# --- What holds of each ---


def drawn(draw, name, dtype) -> Call:
    torch.manual_seed(draw(seeds))
    return CALLS[name](draw, dtype)


def padding_changes_nothing(draw, name, impl, dtype):
    call = drawn(draw, name, dtype)
    filled = {"clean": {}, "dirty": {}}
    for tensor, x in call.tensors.items():
        padding = call.padding.get(tensor, torch.zeros(()).bool()).expand(x.shape)
        bad = torch.tensor(BAD)[torch.randint(3, x.shape)].to(x).where(torch.rand(x.shape) < 0.5, x)
        filled["clean"][tensor], filled["dirty"][tensor] = x.masked_fill(padding, 0), bad.where(padding, x)
    clean, dirty = (call.run(tensors, impl) for tensors in filled.values())
    for result, x in clean.items():
        assert torch.equal(x, dirty[result]), f"{result} depends on padding"


def shows_and_stays(draw, name, impl, dtype):
    call = drawn(draw, name, dtype)
    poisoned = draw(st.sampled_from(call.own))
    x = call.tensors[poisoned]
    valid = ~call.padding.get(poisoned, torch.zeros(()).bool()).expand(x.shape)
    if not valid.any():
        return
    where = tuple(valid.nonzero()[draw(st.integers(0, int(valid.sum()) - 1))].tolist())
    value = draw(st.sampled_from(BAD))
    tensors = {
        tensor: x.masked_fill(call.padding.get(tensor, torch.zeros(()).bool()), 0) for tensor, x in call.tensors.items()
    }
    clean = call.run(tensors, impl)
    tensors[poisoned] = tensors[poisoned].index_put(tuple(map(torch.tensor, where)), torch.tensor(value).to(x))
    dirty = call.run(tensors, impl)
    # Half precision overflows in the reference where no kernel does.
    expected = call.run({tensor: x.float() for tensor, x in tensors.items()}, "reference")

    for result in clean:
        if result in call.own or result.startswith("output"):
            others = torch.arange(BATCH) != where[0]
            assert torch.equal(clean[result][others], dirty[result][others]), f"{result} of another batch element"
        if not result.startswith("output"):
            continue
        lost = ~expected[result].isfinite() & dirty[result].isfinite() & call.depends_on(where, dirty[result])
        if math.isnan(value) or not name.startswith(("refined", "wasserstein")):
            assert not lost.any(), f"{result} hides {value} of {poisoned} at {where}"
        elif not expected[result].isfinite().all():
            # Which entries are infinite, which NaN and which zero depends on the order of products.
            assert not dirty[result].isfinite().all(), f"{result} hides {value} of {poisoned} at {where}"
    if math.isnan(value) and call.differentiable and poisoned in ("q", "mean_q"):
        row = where[:-1]
        assert not dirty[poisoned][row].isfinite().all(), f"the gradient of {poisoned} hides its NaN"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", PADDED)
def test_padding(name, dtype):
    @given(st.data())
    def holds(data):
        padding_changes_nothing(data.draw, name, None, dtype)

    holds()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_valid_entries(name, dtype):
    @given(st.data())
    def holds(data):
        shows_and_stays(data.draw, name, None, dtype)

    holds()


# --- Triton's kernels, by its interpreter where there is no GPU: an example takes seconds ---


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Give the interpreter a GPU's maximum, which ignores NaN, and one head: it runs one program after another."""
    monkeypatch.setattr(sys.modules[__name__], "HEADS", 1)
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    maximum = functools.partialmethod(interpreter.InterpreterBuilder.binary_op, op=np.fmax)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_maxnumf", maximum)


def for_drawn(examples, check):
    """Run a Hypothesis test inside a test that has a fixture."""
    settings(max_examples=examples)(given(st.data())(lambda data: check(data.draw)))()


@pytest.mark.parametrize("name", PADDED)
def test_padding_by_triton(name, as_on_a_gpu):
    for_drawn(1, lambda draw: padding_changes_nothing(draw, name, "triton", torch.float32))


@pytest.mark.parametrize("name", BY_TRITON)
def test_valid_entries_by_triton(name, as_on_a_gpu):
    for_drawn(2, lambda draw: shows_and_stays(draw, name, "triton", torch.float32))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_dropout_shows_nan(mechanism, as_on_a_gpu):
    q, k, v = torch.randn(3, 1, 1, LENGTH, DIM)
    w_q, w_k, w_v = torch.randn(LENGTH, 4), torch.randn(LENGTH, 4), torch.randn(LENGTH, LENGTH)
    q[:, :, 3] = math.nan
    values = (w_v,) if mechanism in ("value", "additive") else ()
    out = recattn.refined_attention(q, k, v, w_q, w_k, *values, mechanism=mechanism, dropout_p=0.1, impl="triton")
    assert out[:, :, 3].isnan().all()


def test_nan_of_a_weight_shows_in_all_gradients(as_on_a_gpu):
    """A NaN score makes every probability of its row NaN."""
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, LENGTH, DIM).unbind())
    w_q, w_k, w_v = torch.randn(LENGTH, 4), torch.randn(LENGTH, 4), torch.randn(LENGTH, LENGTH)
    w_v[:, 3] = math.nan
    out = recattn.refined_attention(q, k, v, w_q, w_k, w_v, mechanism="value", causal=False, impl="triton")
    assert torch.autograd.grad(out.sum(), v)[0].isnan().all()


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("name", ["targets", "keys", "values"])
def test_of_a_user_without_history_count_for_nothing(name, impl):
    seq_lens, target_offsets = torch.tensor([7, 0, 3]), torch.tensor([0, 2, 5, 6])
    tensors = {"targets": torch.randn(6, 2, DIM), "keys": torch.randn(3, 2, RANK, DIM)}
    tensors |= {"values": torch.randn(3, 2, RANK, DIM), "w_decomp": torch.randn(RANK, LENGTH)}
    tensors[name][2 if name == "targets" else 1] = math.nan
    leaves = [x.requires_grad_() for x in tensors.values()]
    out = recattn.lrea_attention(**tensors, target_offsets=target_offsets, seq_lens=seq_lens, impl=impl)
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert not out[2:5].any()
    for of_user in (gradients[0][2:5], gradients[1][1], gradients[2][1]):
        assert not of_user.any()
    assert all(x.isfinite().all() for x in (out, *gradients))


def test_infinite_scores_beside_one_of_nan():
    """PyTorch's CPU attention treats a few such scores as if there were no keys."""
    q, k, v = torch.randn(3, 1, 1, 5, DIM).bfloat16()
    q[..., 0, :] = torch.tensor([1.0, -math.inf, 1.0, 1.0])
    k[..., 1] = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0])
    sinks, bias = torch.tensor([[1, 3]]), torch.zeros(1, 1, 2, 2)
    assert recattn.sink_attention(q, k, v, sinks, bias)[..., 0, :].isnan().all()

"""Second gradients: under create_graph every operator differentiates its reference."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import grad, gradgradcheck
from torch.utils.checkpoint import checkpoint

import recattn
from recattn import reference
from recattn.testing import assert_matches_reference
from tests.helpers import sink_inputs, wasserstein_inputs
from tests.helpers.lrea_inputs import pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(DEVICE, dtype if x.is_floating_point() else x.dtype)


class Case(NamedTuple):
    operator: Callable
    draw: Callable[[], dict]
    grads: tuple[str, ...]
    impl: str

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict:
        """With leaves for `grads`."""
        drawn = {name: on_device(x, dtype) if isinstance(x, Tensor) else x for name, x in self.draw().items()}
        return drawn | {name: drawn[name].requires_grad_() for name in self.grads}

    def __call__(self, **inputs):
        return self.operator(**inputs, impl=self.impl)


def draw_sink(**options) -> dict:
    inputs = sink_inputs.draw(batch=2, heads=2, kv_heads=1, length=7, dim=4, value_dim=3, sinks=3)
    return inputs | {"sink_logits": torch.randn(2)} | options


def draw_packed() -> dict:
    inputs = sink_inputs.draw_packed([5, 0, 4], [2, 0, 3], heads=2, kv_heads=2, dim=4)
    return inputs | {"causal": True}


def draw_refined(mechanism="simple", source="logits", n=6, **options) -> dict:
    columns = 6 if mechanism == "stochastic" else 3
    size = 1 if source == "weights" else 1 / (2 * n**0.5)
    inputs = {name: torch.randn(2, 2, n, 4) for name in ("q", "k", "v")}
    inputs |= {name: size * torch.randn(n, columns) for name in ("w_q", "w_k")}
    if mechanism in ("value", "additive"):
        inputs["w_v"] = size * torch.randn(n, n)
    return inputs | {"mechanism": mechanism, "source": source} | options


def draw_wasserstein(source=None, **options) -> dict:
    if source is None:
        return wasserstein_inputs.draw() | options
    return wasserstein_inputs.draw(rank=4, source=source) | {"source": source} | options


def draw_bias(**options) -> dict:
    inputs = {name: torch.randn(2, 2, 5, 4) for name in ("q_s", "k_s")}
    return inputs | {"bias_scale": torch.tensor(1.5)} | options


def draw_compress() -> dict:
    tensors = {"behaviors": torch.randn(3, 6, 4), "w_comp": torch.randn(7, 2)}
    return tensors | {"seq_lens": torch.tensor([6, 0, 4])}


def draw_lrea(**options) -> dict:
    shapes = {"targets": (5, 2, 4), "keys": (2, 2, 3, 4), "values": (2, 2, 3, 2), "w_decomp": (3, 6)}
    inputs = {name: torch.randn(*shape) for name, shape in shapes.items()}
    return inputs | {"target_offsets": torch.tensor([0, 2, 5])} | options


SINK = (recattn.sink_attention, ("q", "k", "v", "inter_sink_bias"), "cpu", "triton")
REFINED = (recattn.refined_attention, ("q", "k", "v", "w_q", "w_k"), "cpu", "triton")
WASSERSTEIN = (recattn.wasserstein_attention, wasserstein_inputs.NAMES, "cpu", "triton")
BIAS = (recattn.inter_sink_bias, ("q_s", "k_s", "bias_scale"), "cpu", "triton")
COMPRESS = (recattn.lrea_compress, ("behaviors", "w_comp"), "cpu", "triton")
LREA = (recattn.lrea_attention, ("targets", "keys", "values", "w_decomp"), "cpu", "triton")
PADDED = {"seq_lens": torch.tensor([4, 5]), "padding_side": "left"}
CALLS = {
    "sink": (SINK, draw_sink),
    "sink padded": (SINK, functools.partial(draw_sink, causal=True, **PADDED)),
    "sink packed": (SINK, draw_packed),
    "refined padded": (REFINED, functools.partial(draw_refined, **PADDED)),
    "refined value": (REFINED, functools.partial(draw_refined, "value", "weights", causal=False)),
    "refined additive": (REFINED, functools.partial(draw_refined, "additive")),
    "refined stochastic": (REFINED, functools.partial(draw_refined, "stochastic")),
    "refined long": (REFINED, functools.partial(draw_refined, n=33)),
    "refined long stochastic": (REFINED, functools.partial(draw_refined, "stochastic", "weights", n=33)),
    "wasserstein": (WASSERSTEIN, draw_wasserstein),
    "wasserstein padded": (WASSERSTEIN, functools.partial(draw_wasserstein, **PADDED)),
    "wasserstein logits": (WASSERSTEIN, functools.partial(draw_wasserstein, "logits", **PADDED)),
    "wasserstein weights": (WASSERSTEIN, functools.partial(draw_wasserstein, "weights", causal=False)),
    "bias": (BIAS, functools.partial(draw_bias, sink_mask=torch.arange(5) < torch.tensor([[5], [3]]), causal=True)),
    "compress": (COMPRESS, draw_compress),
    "compress packed": (COMPRESS, lambda: pack(draw_compress())),
    "lrea": (LREA, draw_lrea),
    "lrea padded": (LREA, functools.partial(draw_lrea, seq_lens=torch.tensor([6, 3]))),
}


def cases(*, triton: bool = True, every_impl: bool = True) -> list:
    every = []
    for name, ((operator, grads, on_cpu, by_triton), draw) in CALLS.items():
        # The C++ kernels of these leave float64 to the reference.
        float64 = operator not in (recattn.inter_sink_bias, recattn.wasserstein_attention)
        runs_on_cpu = on_cpu is not None and DEVICE == "cpu" and "long" not in name and (triton or float64)
        impls = ([on_cpu] * runs_on_cpu + [by_triton] * triton)[: None if every_impl else 1]
        every += [pytest.param(Case(operator, draw, grads, impl), id=f"{name} {impl}") for impl in impls]
    return every


def first_gradients(function: Callable, names: tuple[str, ...], weigh: Callable) -> Callable:
    """The gradients of Σ weigh(output), as outputs to differentiate."""

    def gradients(**inputs):
        outs = function(**inputs)
        outs = outs if isinstance(outs, tuple) else (outs,)
        return grad([weigh(out).sum() for out in outs], [inputs[name] for name in names], create_graph=True)

    return gradients


def weighed(name: str, weigh: Callable, cases: list) -> list:
    return [pytest.param(*case.values, weigh, id=f"{case.id} {name}") for case in cases]


# Of a sum the incoming gradient needs no gradient itself, of squares it does: the same code for each implementation.
SUMS = weighed("sum", lambda out: out, cases(every_impl=False))


@pytest.mark.parametrize("case, weigh", SUMS + weighed("squares", torch.square, cases()))
def test_matches_the_reference(case, weigh):
    """Gradients, and those of a penalty on them. A missing term would be off by far more than √eps."""
    inputs = case.inputs()

    def run(function, dtype):
        converted = {name: on_device(x.detach(), dtype) if isinstance(x, Tensor) else x for name, x in inputs.items()}
        leaves = [converted[name].requires_grad_() for name in case.grads]
        gradients = first_gradients(function, case.grads, weigh)(**converted)
        return [*gradients, *grad(sum(gradient.square().sum() for gradient in gradients), leaves)]

    exact = run(functools.partial(case.operator, impl="reference"), torch.float64)
    for actual, expected in zip(run(case, torch.float32), exact, strict=True):
        largest = max(1.0, expected.abs().max().item())
        atol = torch.finfo(torch.float32).eps ** 0.5 * largest
        torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("case", cases(triton=False))
def test_gradgradcheck(case):
    if case.operator is recattn.sink_attention:
        pytest.skip("in float64, which its kernels do not have")
    inputs = case.inputs(torch.float64)
    leaves = [inputs[name] for name in case.grads]

    def function(*leaves):
        return case(**inputs | dict(zip(case.grads, leaves, strict=True)))

    assert gradgradcheck(function, leaves, fast_mode=True)


def test_third_derivatives():
    case = Case(recattn.refined_attention, draw_refined, REFINED[1], "cpu")
    inputs = case.inputs(torch.float64)
    gradient = first_gradients(case, ("q",), torch.square)
    assert gradgradcheck(lambda q: gradient(**inputs | {"q": q}), [inputs["q"]], fast_mode=True)


@pytest.mark.parametrize("names", [("q",), ("inter_sink_bias",), ("v", "sink_logits")], ids=str)
def test_some_inputs_need_gradients(names):
    case = Case(recattn.sink_attention, draw_sink, names, None)
    kernel = first_gradients(case, names, torch.square)
    low = first_gradients(functools.partial(recattn.sink_attention, impl="reference"), names, torch.square)
    assert_matches_reference(kernel, low, case.inputs(), grads=names)


@pytest.mark.parametrize("name", ["mean_q", "mean_v", "cov_v"])
def test_one_output_needs_no_gradient(name):
    case = Case(recattn.wasserstein_attention, draw_wasserstein, (name,), None)

    def squares(function):
        def gradient(**inputs):
            mean, cov = function(**inputs)
            out = mean if name == "mean_v" else cov
            return grad(out.square().sum(), inputs[name], create_graph=True)

        return gradient

    low = functools.partial(recattn.wasserstein_attention, impl="reference")
    assert_matches_reference(squares(case), squares(low), case.inputs(), grads=(name,))


def test_one_tensor_for_several_inputs():
    inputs = draw_sink()
    shared = torch.randn(2, 2, 7, 4, device=DEVICE, requires_grad=True)

    def penalty(impl):
        others = {name: on_device(inputs[name], torch.float32) for name in ("sink_positions", "inter_sink_bias")}
        out = recattn.sink_attention(shared, shared, shared, **others, impl=impl)
        # Its second derivative must not lose the operator's share beside another's.
        (gradient,) = grad(out.sum() + shared.pow(3).sum(), shared, create_graph=True)
        return grad(gradient.square().sum(), shared)[0]

    torch.testing.assert_close(penalty(None), penalty("reference"))


@pytest.mark.parametrize("name", ["lrea", "sink packed", "sink"])
def test_an_empty_batch(name):
    (operator, names, *_), draw = CALLS[name]
    inputs = {name: on_device(x, torch.float32) if isinstance(x, Tensor) else x for name, x in draw().items()}
    packed = "cu_seqlens" in inputs
    offsets = {"cu_seqlens", "target_offsets"} & inputs.keys()
    whole = {"w_decomp", "sink_logits"} | offsets
    inputs |= {key: x[:0] for key, x in inputs.items() if isinstance(x, Tensor) and key not in whole}
    inputs |= {key: inputs[key][:1] for key in offsets}
    leaves = [inputs[key].requires_grad_() for key in names]
    gradients = grad(operator(**inputs).sum(), leaves, create_graph=True)
    assert packed == (name == "sink packed")
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


# --- Beside other parts of autograd ---


def draw_for_training(dtype=torch.float32) -> tuple[dict, Tensor]:
    inputs = {name: on_device(x, dtype) if isinstance(x, Tensor) else x for name, x in draw_sink().items()}
    return inputs, inputs.pop("q").requires_grad_()


def penalised(function: Callable, q: Tensor) -> Tensor:
    (gradient,) = grad(function(q).square().sum(), q, create_graph=True)
    return grad(gradient.square().sum(), q)[0]


def test_checkpointing():
    inputs, q = draw_for_training()

    def attention(q, impl=None):
        return recattn.sink_attention(q.sin(), **inputs, impl=impl)

    actual = penalised(lambda q: checkpoint(attention, q, use_reentrant=False), q)
    torch.testing.assert_close(actual, penalised(lambda q: attention(q, "reference"), q))


def test_saved_tensor_hooks():
    inputs, q = draw_for_training()
    expected = penalised(lambda q: recattn.sink_attention(q, **inputs, impl="reference"), q)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        torch.testing.assert_close(penalised(lambda q: recattn.sink_attention(q, **inputs), q), expected)


def test_autocast_does_not_reach_the_reference():
    inputs, q = draw_for_training(torch.float64)
    inputs = {name: x for name, x in inputs.items() if name != "sink_logits"}
    (expected,) = grad(recattn.sink_attention(q, **inputs).sum(), q)
    out = recattn.sink_attention(q, **inputs).sum()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (gradient,) = grad(out, q, create_graph=True)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(gradient, expected)


# --- Where there is no create_graph, the kernels ---


def test_retain_graph_stays_with_the_kernels(monkeypatch):
    inputs, q = draw_for_training()
    out = recattn.sink_attention(q, **inputs).sum()
    monkeypatch.delattr(reference, "sink_attention")
    assert torch.equal(*(grad(out, q, retain_graph=True)[0] for _ in range(2)))


@pytest.mark.parametrize("case", cases(triton=False))
def test_compiled_backwards_hold_the_kernels(case):
    called = set()

    def compiler(graph, _):
        called.update(str(node.target).split(".")[1] for node in graph.graph.nodes if "recattn" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    inputs = case.inputs()
    function = functools.partial(case.operator, impl=case.impl)  # torch 2.10 traces no call of a NamedTuple
    outs = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=compiler))(**inputs)
    total = sum(out.sum() for out in outs) if isinstance(outs, tuple) else outs.sum()
    grad(total, [inputs[name] for name in case.grads], retain_graph=True)
    called = {name for name in called if not name.startswith(("checked_", "lrea_jagged_"))}
    forwards = {name.removesuffix("_fwd") for name in called if "_bwd" not in name}
    assert forwards and all(any(name.startswith(f"{forward}_bwd") for name in called) for forward in forwards)
    (gradient,) = grad(total, inputs[case.grads[0]], create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        gradient.sum().backward()


# --- Where the reference cannot repeat the call ---


@pytest.mark.parametrize(
    "name", ["sink", "refined padded", "refined long", "wasserstein", "wasserstein logits", "bias"]
)
def test_dropout_of_a_kernel_is_refused(name):
    (operator, names, _, impl), draw = CALLS[name]
    case = Case(functools.partial(operator, dropout_p=0.5), draw, names, impl)
    inputs = case.inputs()
    outs = case(**inputs)
    total = sum(out.sum() for out in outs) if isinstance(outs, tuple) else outs.sum()
    leaves = [inputs[name] for name in names]
    grad(total, leaves, retain_graph=True)
    with pytest.raises(NotImplementedError, match=r"dropout_p=0.5 has no second derivative .* impl='reference'"):
        grad(total, leaves, create_graph=True)

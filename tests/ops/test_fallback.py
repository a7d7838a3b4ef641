"""RECATTN_FALLBACK=reference: where a kernel fails to launch the reference computes the call, after one warning."""

import sys
import warnings

import pytest
import torch
import triton
from torch.utils.checkpoint import checkpoint
from triton.runtime.errors import OutOfResources

import recattn
from recattn.ops import _fallback, _support
from tests.helpers import operator_cases
from tests.helpers.operator_cases import draw_history, draw_items, draw_packed_history, draw_refined, draw_targets

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw_sink_queries() -> dict:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return {"q_s": torch.randn(2, 2, 3, 4), "k_s": torch.randn(2, 2, 3, 4), "sink_mask": mask}


def draw_learned_scale() -> dict:
    return draw_sink_queries() | {"bias_scale": torch.tensor(2.0)}


def draw_grouped_packed() -> dict:
    return operator_cases.draw_packed() | {"sink_logits": torch.randn(2), "causal": True}


def draw_refined_gaussians() -> dict:
    return operator_cases.draw_gaussians() | {name: torch.randn(7, 6) for name in ("w_q", "w_k")} | {"causal": True}


def draw_stochastic(**options: object) -> dict:
    return draw_refined(4) | {"mechanism": "stochastic", "causal": True} | options


CALLS = {
    "sink_attention": (recattn.sink_attention, operator_cases.draw_sink),
    "sink_attention packed": (recattn.sink_attention, draw_grouped_packed),
    "inter_sink_bias": (recattn.inter_sink_bias, draw_sink_queries),
    "inter_sink_bias learned": (recattn.inter_sink_bias, draw_learned_scale),
    "refined_attention": (recattn.refined_attention, lambda: draw_refined() | {"causal": False}),
    "refined_attention long": (recattn.refined_attention, lambda: draw_stochastic()),
    "refined_attention weights": (recattn.refined_attention, lambda: draw_stochastic(source="weights")),
    "wasserstein_attention": (
        recattn.wasserstein_attention,
        lambda: operator_cases.draw_gaussians() | {"causal": True},
    ),
    "wasserstein_attention refined": (recattn.wasserstein_attention, draw_refined_gaussians),
    "lrea_compress": (recattn.lrea_compress, draw_history),
    "lrea_compress packed": (recattn.lrea_compress, draw_packed_history),
    "lrea_attention": (recattn.lrea_attention, draw_targets),
}
LONG = ("refined_attention long", "refined_attention weights")


@triton.jit
def broken_kernel(x):
    undefined(x)  # noqa: F821


def launch_broken_kernel(_kernel, _grid, *arguments, **_constants):
    """What a Triton does that cannot compile: a CompilationError, by the interpreter an InterpreterError."""
    first = arguments[0][0] if isinstance(arguments[0], tuple) else arguments[0]
    broken_kernel[(1,)](first)


def launch_without_shared_memory(*_, **__):
    raise OutOfResources(229376, 101376, "shared memory")


def fail(monkeypatch, launch=launch_broken_kernel) -> None:
    """Every launch of a Triton kernel fails from now on."""
    for name, module in list(sys.modules.items()):
        if name.startswith("recattn.triton_kernels.") and "common" not in name and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", launch)


@pytest.fixture(autouse=True)
def no_failure_yet(monkeypatch, request):
    for name in ("_failed", "_reported", "_seeds"):
        monkeypatch.setattr(_fallback, name, type(getattr(_fallback, name))())
    for name in ("sink_attention", "inter_sink_bias", "refined_attention", "wasserstein_attention", "lrea.attention"):
        _support.triton_kernels(name)
    _support.triton_kernels("lrea.compress")
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in LONG:  # the kernels of longer sequences, on short ones
        monkeypatch.setattr("recattn.ops.refined_attention.triton_short.unsupported_reason", lambda *_: "too long")


@pytest.fixture
def enabled(monkeypatch):
    monkeypatch.setenv("RECATTN_FALLBACK", "reference")


def inputs_of(draw, device: str = DEVICE) -> dict:
    torch.manual_seed(0)
    drawn = {name: x for name, x in draw().items() if x is not None}
    for name, x in drawn.items():
        if isinstance(x, torch.Tensor):
            drawn[name] = x.detach().to(device).requires_grad_(x.is_floating_point())
    return drawn


def with_gradients(function, inputs: dict, before_backward=lambda: None, **options) -> list[torch.Tensor]:
    """The outputs of a call and the gradients of its inputs."""
    outs = function(**inputs, **options)
    outs = outs if isinstance(outs, tuple) else (outs,)
    leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    before_backward()
    return [*outs, *torch.autograd.grad([out.float().sin().sum() for out in outs], leaves)]


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "launch"),
    [*((name, launch_broken_kernel) for name in CALLS), ("sink_attention", launch_without_shared_memory)],
)
def test_a_kernel_that_cannot_be_launched_is_replaced_by_the_reference(name, launch, monkeypatch, enabled):
    function, draw = CALLS[name]
    expected = with_gradients(function, inputs_of(draw), impl="reference")
    fail(monkeypatch, launch)
    with pytest.warns(RuntimeWarning, match=r"runs the reference.*RECATTN_FALLBACK") as warned:
        actual = with_gradients(function, inputs_of(draw), impl="triton")
    assert_close(actual, expected)
    operators = {str(w.message).partition(" ")[0] for w in warned}
    assert len(operators) == len(warned)  # one each
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(with_gradients(function, inputs_of(draw), impl="triton"), expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_that_fails_in_the_backward_alone_is_replaced_there(name, monkeypatch, enabled):
    function, draw = CALLS[name]
    expected = with_gradients(function, inputs_of(draw), impl="reference")
    with pytest.warns(RuntimeWarning, match="runs the reference"):
        actual = with_gradients(function, inputs_of(draw), lambda: fail(monkeypatch), impl="triton")
    assert_close(actual, expected)


@pytest.mark.parametrize("name", CALLS)
def test_a_backward_after_a_forward_that_fell_back_never_reads_what_the_kernel_did_not_write(
    name, monkeypatch, enabled
):
    """The kernels work again before the backward: it must be the reference's all the same."""
    function, draw = CALLS[name]
    expected = with_gradients(function, inputs_of(draw), impl="reference")
    with monkeypatch.context() as context:
        fail(context)
        with pytest.warns(RuntimeWarning, match="runs the reference"):
            actual = with_gradients(function, inputs_of(draw), context.undo, impl="triton")
    assert_close(actual, expected)


@pytest.mark.parametrize("name", ["refined_attention", "lrea_attention", "wasserstein_attention"])
def test_a_compiled_function_falls_back(name, monkeypatch, enabled):
    function, draw = CALLS[name]
    expected = with_gradients(function, inputs_of(draw), impl="reference")
    compiled = torch.compile(function, backend="aot_eager")
    fail(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(with_gradients(compiled, inputs_of(draw), impl="triton"), expected)


def test_a_function_compiled_by_inductor_falls_back(monkeypatch, enabled):
    """Inductor relies on the strides that the fake kernel promises: q lies in memory as [B, N, H, D]."""
    inputs = inputs_of(operator_cases.draw_sink)
    inputs["q"] = inputs["q"].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    expected = with_gradients(recattn.sink_attention, inputs, impl="reference")
    compiled = torch.compile(lambda **inputs: recattn.sink_attention(**inputs) * 2 / 2)
    fail(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(with_gradients(compiled, inputs, impl="triton"), expected)


def test_the_default_implementation_falls_back_too(monkeypatch, enabled):
    def raise_it(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    expected = with_gradients(recattn.sink_attention, inputs_of(operator_cases.draw_sink), impl="reference")
    by = "cpu.sink_attention_fwd" if DEVICE == "cpu" else "triton.sink_attention_fwd"
    monkeypatch.setattr(f"recattn.ops.sink_attention.{by}", raise_it)
    with pytest.warns(RuntimeWarning, match="RuntimeError: no kernel image"):
        assert_close(with_gradients(recattn.sink_attention, inputs_of(operator_cases.draw_sink)), expected)


def test_other_widths_try_their_own_kernel(monkeypatch, enabled):
    function, draw = CALLS["sink_attention"]
    with monkeypatch.context() as context, pytest.warns(RuntimeWarning):
        fail(context)
        function(**inputs_of(draw), impl="triton")
    assert len(_fallback._failed) == 1
    wider = {name: torch.randn(1, 1, 4, 8, device=DEVICE) for name in ("q", "k", "v")}
    calls = []
    monkeypatch.setattr("recattn.reference.sink_attention", lambda *_, **__: calls.append(1))
    function(**wider, impl="triton")
    assert not calls


@pytest.mark.parametrize("value", [None, "0", "refrence"])
def test_it_is_off_by_default_and_the_error_names_the_variable(value, monkeypatch):
    if value is not None:
        monkeypatch.setenv("RECATTN_FALLBACK", value)
    fail(monkeypatch, launch_without_shared_memory)
    with pytest.raises(OutOfResources, match="out of resource: shared memory") as raised:
        recattn.sink_attention(**inputs_of(operator_cases.draw_sink), impl="triton")
    if sys.version_info >= (3, 11):
        assert any("RECATTN_FALLBACK" in note for note in raised.value.__notes__)
    assert not _fallback._failed


@pytest.mark.parametrize(
    "error",
    [
        ValueError("seq_lens must be between 0 and 8"),
        TypeError("an integer is required"),
        NotImplementedError("no backend supports it"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=repr,
)
def test_errors_of_the_caller_and_of_memory_are_raised(error, monkeypatch, enabled):
    def raise_it(*_, **__):
        raise error

    fail(monkeypatch, raise_it)
    with pytest.raises(type(error)) as raised:
        recattn.sink_attention(**inputs_of(operator_cases.draw_sink), impl="triton")
    assert raised.value is error
    assert not _fallback._failed


def test_bad_input_stays_an_error(monkeypatch, enabled):
    fail(monkeypatch)
    inputs = inputs_of(operator_cases.draw_sink)
    with pytest.raises(ValueError, match="must have the dtype of q"):
        recattn.sink_attention(**inputs | {"k": inputs["k"].double()}, impl="triton")


def test_a_device_that_is_lost_is_never_computed_with(monkeypatch, enabled):
    """After an illegal access every synchronisation raises."""
    fail(monkeypatch, launch_without_shared_memory)
    monkeypatch.setattr(_fallback, "_device_works", lambda inputs: False)
    with pytest.raises(OutOfResources):
        recattn.sink_attention(**inputs_of(operator_cases.draw_sink), impl="triton")
    assert not _fallback._failed


def test_a_device_is_asked_whether_it_works(monkeypatch):
    class OnGPU:
        is_cuda, device = True, "cuda:0"

    def raise_it(_device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    assert _fallback._device_works((torch.ones(1),))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    assert _fallback._device_works((OnGPU(),))
    monkeypatch.setattr(torch.cuda, "synchronize", raise_it)
    assert not _fallback._device_works((OnGPU(),))


# --- Dropout ---

DROPOUT = ["sink_attention", "sink_attention packed", "inter_sink_bias", "refined_attention", "wasserstein_attention"]


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_is_the_same_in_both_directions(name, monkeypatch, enabled):
    """By differences, as nothing else draws this dropout. The bias is float32, whatever its inputs are."""
    function, draw = CALLS[name]
    inputs = {
        key: x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for key, x in inputs_of(draw).items()
    }
    monkeypatch.setattr("recattn.ops.sink_attention._triton_call_reason", lambda *_: None)
    monkeypatch.setattr("recattn.ops.inter_sink_bias.unsupported_reasons", lambda *_: {"triton": None})
    monkeypatch.setattr("recattn.ops.refined_attention._triton_call_reason", lambda *_: None)
    monkeypatch.setattr("recattn.ops.refined_attention.triton_short.unsupported_reason", lambda *_: None)
    monkeypatch.setattr("recattn.ops.wasserstein_attention._triton_call_reason", lambda *_: None)
    fail(monkeypatch)
    first = next(key for key, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point())

    def computed(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        outs = function(**inputs | {first: x}, impl="triton", dropout_p=0.4)
        return (outs[0] if isinstance(outs, tuple) else outs).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = inputs[first].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(computed(x), x)
        direction = torch.randn_like(gradient)
        step, tolerance = (1e-2, 1e-2) if name == "inter_sink_bias" else (1e-6, 1e-5)
        difference = (computed(x + step * direction) - computed(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), difference.double(), rtol=tolerance, atol=1e-6)
    assert gradient.abs().sum() > 0


def test_dropout_drops_that_share_and_keeps_the_mean(monkeypatch, enabled):
    fail(monkeypatch)
    shape = (4, 4, 32, 16)
    q, v = torch.zeros(shape, device=DEVICE), torch.ones(shape, device=DEVICE)
    with pytest.warns(RuntimeWarning):
        out = recattn.sink_attention(q, q, v, dropout_p=0.25, impl="triton")
    kept = out[..., 0] * 0.75 * 32  # of the 32 weights of a row, how many are left
    assert (kept - kept.round()).abs().max() < 1e-3
    assert abs(kept.mean().item() / 32 - 0.75) < 0.02


def test_a_backward_never_guesses_the_dropout_of_a_kernel(monkeypatch, enabled):
    """The step that fails is lost; the next one runs the reference in both directions."""
    inputs = inputs_of(operator_cases.draw_sink)
    with pytest.warns(RuntimeWarning), pytest.raises(NotImplementedError, match="cannot repeat the dropout"):
        with_gradients(recattn.sink_attention, inputs, lambda: fail(monkeypatch), impl="triton", dropout_p=0.3)
    assert all(x.isfinite().all() for x in with_gradients(recattn.sink_attention, inputs, impl="triton", dropout_p=0.3))


def test_checkpointing_repeats_the_dropout(monkeypatch, enabled):
    fail(monkeypatch)
    inputs = inputs_of(operator_cases.draw_sink)
    q = inputs.pop("q")

    def attend(q):
        return recattn.sink_attention(q, **inputs, impl="triton", dropout_p=0.3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        (expected,) = torch.autograd.grad(attend(q).sum(), q)
        torch.manual_seed(5)
        (gradient,) = torch.autograd.grad(checkpoint(attend, q, use_reentrant=False).sum(), q)
    torch.testing.assert_close(gradient, expected)


def test_seeds_do_not_pile_up(monkeypatch, enabled):
    monkeypatch.setattr(_fallback, "MOST_SEEDS", 4)
    fail(monkeypatch)
    q = torch.ones(1, 1, 2, 4, device=DEVICE)
    with pytest.warns(RuntimeWarning):
        for _ in range(10):
            recattn.sink_attention(q, q, q, dropout_p=0.5, impl="triton")
    assert len(_fallback._seeds) == 4


def test_transforms_of_torch_func_fall_back(monkeypatch, enabled):
    fail(monkeypatch)
    inputs = inputs_of(operator_cases.draw_sink)
    q = inputs.pop("q").detach()

    def loss(q, impl):
        return recattn.sink_attention(q, **inputs, impl=impl).sin().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradient = torch.func.grad(loss)(q, "triton")
    torch.testing.assert_close(gradient, torch.func.grad(loss)(q, "reference"), rtol=1e-4, atol=1e-5)


def test_serving_by_item_ids_falls_back(monkeypatch, enabled):
    inputs = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in inputs_of(draw_items).items()}
    expected = recattn.lrea_compress(**inputs, impl="reference")
    fail(monkeypatch)
    with pytest.warns(RuntimeWarning, match="lrea_compress runs the reference"):
        torch.testing.assert_close(recattn.lrea_compress(**inputs, impl="triton"), expected)


@pytest.mark.parametrize("counts", [False, True])
def test_a_cuda_kernel_without_an_image_for_the_card_falls_back(counts, monkeypatch, enabled):
    class Operator:
        @staticmethod
        def default(*_):
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

        counting = default

    inputs = operator_cases.CASES["by item"].inputs() | {"impl": "cuda"}
    expected = recattn.lrea_absorbed_attention(**inputs | {"impl": "reference"})
    monkeypatch.setattr(
        "recattn.ops.lrea_attention.unsupported_reasons", lambda *_: {"cuda": None, "cpu": None, "reference": None}
    )
    monkeypatch.setattr(torch.ops.recattn, "lrea_absorbed_attention", Operator)
    if counts:
        inputs["invalid"] = torch.zeros(1, dtype=torch.int64)
        inputs["item_ids"][0] = 99
        expected[0] = 0
    with pytest.warns(RuntimeWarning, match="no kernel image"):
        out = recattn.lrea_absorbed_attention(**inputs)
    torch.testing.assert_close(out, expected)
    assert not counts or inputs["invalid"].item() == 1

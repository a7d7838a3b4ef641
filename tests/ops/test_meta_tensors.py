"""Meta tensors, which people use to size a model: every function returns the right shapes and dtypes."""

import pytest
import torch
from torch import Tensor

import recattn
from recattn._extension import MISSING
from tests.helpers.operator_cases import CASES

NAMES = ["sink", "sink dropout", "packed", "refined", "gaussian", "compress", "compress packed", "items"]
NAMES += ["restored", "absorb", "absorbed", "by item"]


def outputs(result) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def on_meta(inputs: dict) -> dict:
    return {name: x.detach().to("meta") if isinstance(x, Tensor) else x for name, x in inputs.items()}


@pytest.mark.skipif("cpu" in MISSING, reason=MISSING.get("cpu", ""))
@pytest.mark.parametrize("name", NAMES)
def test_shapes_and_dtypes(name):
    case = CASES[name]
    expected = outputs(case.function(**case.inputs()))
    inputs = on_meta(case.inputs())
    leaves = [x.requires_grad_() for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
    if "absorbed" in name or "item" in name:
        leaves = [x.requires_grad_(False) for x in leaves]
    actual = outputs(case.function(**inputs))
    for got, want in zip(actual, expected, strict=True):
        assert got.device.type == "meta" and got.shape == want.shape and got.dtype == want.dtype
    if leaves and leaves[0].requires_grad:
        gradients = torch.autograd.grad([x.sum() for x in actual], leaves, allow_unused=True)
        assert all(x is None or x.shape == leaf.shape for x, leaf in zip(gradients, leaves, strict=True))


@pytest.mark.skipif("cpu" in MISSING, reason=MISSING.get("cpu", ""))
def test_lrea_is_built_trained_and_served_on_meta():
    lrea = recattn.nn.LREA(8, 20, 4, num_heads=2, device="meta")
    behaviors, seq_lens = torch.empty(3, 20, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    targets = torch.empty(3, 5, 8, device="meta")
    out = lrea(targets, behaviors, seq_lens=seq_lens)
    out.sum().backward()
    assert out.shape == targets.shape and lrea.w_decomp.grad.shape == lrea.w_decomp.shape
    state = lrea.export_state(behaviors, seq_lens)
    assert state.keys.shape == (3, 2, 4, 8) and state.values.shape == (3, 2, 4, 4)
    with torch.no_grad():
        assert lrea.attend(targets, state).shape == targets.shape

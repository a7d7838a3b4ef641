"""Arguments of the wrong kind are refused by name: tensors in place of numbers, and tensors without strides."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import recattn
from tests.helpers.operator_cases import CASES

NUMBERS = [
    ("sink", "scale"),
    ("sink", "dropout_p"),
    ("refined", "scale"),
    ("refined", "dropout_p"),
    ("gaussian", "scale"),
    ("gaussian", "dropout_p"),
    ("restored", "scale"),
    ("restored", "negative_slope"),
    ("absorb", "scale"),
    ("absorb", "negative_slope"),
    ("absorbed", "negative_slope"),
    ("absorbed gradient", "negative_slope"),
]


@pytest.mark.parametrize("name, option", NUMBERS)
def test_a_tensor_for_a_number_is_refused_whatever_runs(name, option):
    case = CASES[name]
    learned = torch.tensor(0.5, requires_grad=True)
    message = f"{option} must be a number, got a torch.Tensor, which would get no gradient here"
    for impl in ({}, {"impl": "reference"}) if name != "absorb" else ({},):
        for value in (learned, learned.detach()):
            with pytest.raises(ValueError, match=re.escape(message)):
                case.function(**case.inputs(), **impl, **{option: value})


@pytest.mark.parametrize("name, option", NUMBERS)
@pytest.mark.parametrize("value", ["a", [0.5], 1j])
def test_what_is_no_number_is_refused(name, option, value):
    case = CASES[name]
    with pytest.raises(ValueError, match=re.escape(f"{option} must be a number, got {value!r}")):
        case.function(**case.inputs(), **{option: value})


@pytest.mark.parametrize("name, option", [pair for pair in NUMBERS if pair[1] != "dropout_p"])
def test_numbers_of_other_libraries_are_numbers(name, option):
    case = CASES[name]
    expected = case.function(**case.inputs(), **{option: 0.5})
    for half in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        torch.testing.assert_close(case.function(**case.inputs(), **{option: half}), expected, rtol=0, atol=0)


def test_inter_sink_bias_takes_a_learned_bias_scale_and_no_other_tensor():
    q = torch.randn(2, 1, 3, 4)
    scale = torch.tensor(2.0, requires_grad=True)
    recattn.inter_sink_bias(q, q, bias_scale=scale).sum().backward()
    assert scale.grad is not None
    for option in ("scale", "dropout_p"):
        with pytest.raises(ValueError, match=f"{option} must be a number, got a torch.Tensor"):
            recattn.inter_sink_bias(q, q, **{option: scale})


def test_max_seqlen_is_a_number():
    inputs = CASES["packed"].inputs()
    with pytest.raises(ValueError, match=r"max_seqlen must be an integer of at least 0, got a torch\.Tensor"):
        recattn.sink_attention(**inputs, max_seqlen=torch.tensor(5))


@pytest.mark.parametrize(
    "make, option",
    [
        (lambda value: recattn.nn.LREA(8, 10, 4, negative_slope=value), "negative_slope"),
        (lambda value: recattn.nn.SinkAttention(8, 2, dropout=value), "dropout"),
        (lambda value: recattn.nn.RefinedSelfAttention(8, 2, max_len=10, dropout=value), "dropout"),
        (lambda value: recattn.nn.StochasticRefinedSelfAttention(8, 2, max_len=10, dropout=value), "dropout"),
        (lambda value: recattn.nn.InterSinkBias(8, 2, dropout=value), "dropout"),
        (lambda value: recattn.nn.InterSinkBias(8, 2, bias_scale=value), "bias_scale"),
    ],
)
@pytest.mark.parametrize("value", [torch.tensor(0.5), nn.Parameter(torch.tensor(0.5)), "a"])
def test_modules_refuse_them_too(make, option, value):
    with pytest.raises(ValueError, match=f"{option} must be a number, got"):
        make(value)


# --- Tensors without strides ---


def nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x.detach(), x.detach()])


def jagged(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x.detach(), x.detach()], layout=torch.jagged)


def sparse(x: Tensor) -> Tensor:
    return x.detach().to_sparse()


# Arguments that may be nested.
NESTED = {
    "sink": ("q",),
    "packed": ("q",),
    "refined": ("q",),
    "gaussian": ("mean_q",),
    "items": ("behaviors", "item_ids"),
}


@pytest.mark.parametrize("name", ["sink", "packed", "refined", "gaussian", "items", "restored", "absorb", "by item"])
@pytest.mark.parametrize(
    "kind, got, remedy",
    [
        (sparse, "one of layout torch.sparse_coo", "call its to_dense()"),
        (nested, "a nested tensor", "pad it with to_padded_tensor and give the lengths"),
        (jagged, "a nested tensor", "pad it with to_padded_tensor and give the lengths"),
    ],
)
def test_tensors_that_are_not_dense_are_refused(name, kind, got, remedy):
    case = CASES[name]
    inputs = case.inputs()
    accepted = NESTED.get(name, ()) if kind is not sparse else ()
    for argument in (argument for argument, x in inputs.items() if isinstance(x, Tensor) and argument not in accepted):
        message = f"{argument} must be a dense torch.Tensor, got {got}: {remedy}"
        with pytest.raises(ValueError, match=re.escape(message)):
            case.function(**{**inputs, argument: kind(inputs[argument])})

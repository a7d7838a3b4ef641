"""Indices out of range or order are refused by one message everywhere: eager, compiled, exported, kernel, reference.

Indices that another thread writes during a call read nothing out of bounds.
"""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import recattn
from recattn._extension import MISSING
from tests.helpers.operator_cases import CASES, INDICES


@functools.cache
def compiled(name: str) -> Callable:
    torch._dynamo.reset()
    return torch.compile(CASES[name].function, backend="aot_eager")


def spoil(draw, name: str, indices: Tensor, sizes: dict[str, int]) -> Tensor:
    """The same with one invalid entry."""
    limit = {
        "sink_positions": sizes.get("seq_len", 5) - 1,
        "seq_lens": sizes.get("seq_len"),
        "cu_seqlens": sizes.get("num_tokens"),
        "target_offsets": sizes.get("num_targets"),
        "slots": sizes.get("num_slots", 0) - 1,
        "item_ids": sizes.get("num_items", 0) - 1,
    }[name]
    spoilt = indices.clone()
    # The first sequence or user is a full one.
    place = (0,) * (indices.dim() - 1) + (draw(st.integers(0, indices.shape[-1] - 1)),)
    largest = torch.iinfo(indices.dtype).max
    above, below = st.integers(limit + 1, largest), st.integers(-largest - 1, -2 if name == "sink_positions" else -1)
    spoilt[place] = draw(st.one_of(st.sampled_from([limit + 1, largest, -largest - 1, -2]), above, below))
    if name == "sink_positions" and draw(st.booleans()):  # in range, out of order
        spoilt = indices.clone()
        spoilt[0, :2] = draw(st.sampled_from([spoilt[0, :2].flip(0), spoilt[0, 0]]))
    return spoilt


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=8)
@given(data=st.data(), dtype=st.sampled_from([torch.int64, torch.int32]))
def test_every_way_refuses_with_the_words_of_validate(name, data, dtype):
    case = CASES[name]
    inputs = case.inputs()
    inputs |= {index: inputs[index].to(dtype) for index in INDICES if index in inputs}
    bad = data.draw(st.sampled_from([index for index in INDICES if index in inputs]))
    inputs[bad] = spoil(data.draw, bad, inputs[bad], case.sizes)
    with pytest.raises(ValueError) as expected:
        recattn.validate(**{index: inputs[index] for index in INDICES if index in inputs}, **case.sizes)
    assert str(expected.value).startswith(f"{bad} must be ")
    for function in (case.function, compiled(name)):
        with pytest.raises(ValueError) as error:
            function(**inputs)
        assert str(error.value) == str(expected.value)


# --- Exported ---


class Call(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, **inputs: Tensor):
        case = CASES[self.name]
        return case.function(**inputs, **case.options)


# The references of the others read offsets one by one, which no exported graph can.
EXPORTED = ["sink", "sink dropout", "refined", "refined dropout", "gaussian", "compress reference", "items gradient"]


@pytest.mark.parametrize("name", [*EXPORTED, "items", "restored", "absorb", "absorbed", "by item"])
def test_an_exported_graph_refuses_too(name):
    case = CASES[name]
    inputs = {name: x for name, x in case.inputs().items() if isinstance(x, Tensor)}
    exported = torch.export.export(Call(name), (), inputs).module()
    right = exported(**inputs)
    if "dropout" not in name:
        torch.testing.assert_close(right, case.function(**inputs, **case.options))
    for index in (index for index in INDICES if index in inputs):
        spoilt = inputs[index].clone()
        spoilt.flatten()[0] = 100
        with pytest.raises(ValueError, match=f"{index} must be .*100"):
            exported(**{**inputs, index: spoilt})


# --- Indices that another thread writes meanwhile ---

RACE = str(Path(__file__).parents[1] / "helpers" / "racing_indices.py")


@pytest.mark.skipif("cpu" in MISSING, reason=MISSING.get("cpu", ""))
def test_races_are_refused_or_served():
    """tests/cpu/sanitize.py repeats it under AddressSanitizer."""
    command = [sys.executable, RACE, "0.1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]


# --- Masks of modules, whose values a graph checks as it runs ---


HOLES = torch.tensor([[False, True, False, True], [False] * 4])
FUTURE, LATER_FUTURE = (torch.ones(4, 4, dtype=torch.bool).triu(diagonal) for diagonal in (1, 2))
HIDDEN = torch.zeros(4, 4).masked_fill(FUTURE, -torch.inf)


MASKS = [
    ("key_padding_mask", HOLES & False, HOLES, "key_padding_mask must be False at tokens without a gap"),
    ("attn_mask", FUTURE, LATER_FUTURE, "attn_mask must be the causal mask"),
    ("attn_mask", HIDDEN, FUTURE.float(), "attn_mask must be 0 where visible and -inf where hidden"),
]


# One function checks all of them: Inductor need compile one.
@pytest.mark.parametrize(
    "backend, name, right, wrong, message", [*(("aot_eager", *mask) for mask in MASKS), ("inductor", *MASKS[0])]
)
def test_compiled_modules_refuse_other_masks(backend, name, right, wrong, message):
    attention, x = recattn.nn.SinkAttention(8, 2), torch.randn(2, 4, 8)

    def attend(mask):
        return attention(x, x, x, **{name: mask})[0]

    with pytest.raises(ValueError, match=message):
        attend(wrong)
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(right), attend(right))
    with pytest.raises(RuntimeError, match=message):
        compiled(wrong)

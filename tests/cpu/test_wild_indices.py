"""The C++ operators, called with indices that no public function passes on: each refuses them, or stays inside.

Guarded memory is the witness: test_guarded_memory.py runs this file again.
"""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import recattn
from recattn._extension import MISSING
from recattn.ops.refined_attention import cpu as refined_on_cpu
from tests.helpers.operator_cases import CASES, INDICES, draw_gaussians, draw_refined

CSRC = Path(__file__).parents[2] / "csrc"
pytestmark = [
    pytest.mark.skipif("cpu" in MISSING, reason=MISSING.get("cpu", "")),
    pytest.mark.filterwarnings("ignore"),  # a reference reads a slice until 2^63
]
# Names of index arguments in schemas: those of the public functions, and of the operators that check them.
NAMES = {*INDICES, "lengths", "offsets", "rows"}
STARTS = {"seq_starts": torch.zeros(3, dtype=torch.int64)}


class Call(NamedTuple):
    operator: Any
    args: tuple
    places: dict[str, int]  # of the index tensors in args

    def again(self, name: str, indices: Tensor) -> None:
        args = [x.clone() if isinstance(x, Tensor) else x for x in self.args]
        args[self.places[name]] = indices
        self.operator(*args)


def index_arguments(operator: Any) -> list[str]:
    return [argument.name for argument in operator._schema.arguments if argument.name in NAMES]


def compiled_operators() -> Iterator[Any]:
    """The operators that csrc/cpu defines, each overload."""
    for path in CSRC.glob("cpu/*.cpp"):
        for name in re.findall(r'm\.def\(\s*"(\w+)', path.read_text()):
            packet = getattr(torch.ops.recattn, name)
            yield from (getattr(packet, overload) for overload in packet.overloads())


def packed(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same sequences [T, H, D] with offsets."""
    lengths = inputs.pop("seq_lens")
    kept = torch.arange(7) < lengths[:, None]
    tokens = {name: x.transpose(1, 2)[kept] if x.dim() == 4 else x for name, x in inputs.items()}
    return tokens | {"cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0))}


def calls() -> Iterator[tuple[Callable, dict[str, Any]]]:
    """Public calls that reach every index argument of every operator."""
    for case in CASES.values():
        if case.options.get("impl") not in ("triton", "reference"):
            yield case.function, case.inputs()
    for name in ("sink", "gaussian"):
        yield CASES[name].function, CASES[name].inputs() | STARTS
    for lengths in (draw_refined, lambda: draw_refined() | STARTS, lambda: packed(draw_refined())):
        for longest in (256, 2):  # longer ones have operators of their own
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(refined_on_cpu, "_LONGEST_IN_CPP", longest)
                yield recattn.refined_attention, lengths() | {"causal": True}
    yield recattn.wasserstein_attention, packed(draw_gaussians()) | {"causal": True}
    counted = {"invalid": torch.zeros(1, dtype=torch.int64)}
    yield CASES["by item"].function, CASES["by item"].inputs() | counted
    of_sinks = {"sink_positions": torch.tensor([[1, 3, -1]]), "cu_seqlens": torch.tensor([0, 7])}
    yield recattn.validate, {**of_sinks, "num_tokens": 7}


@functools.cache
def recorded() -> dict[tuple, Call]:
    """The first call of each compiled operator with each choice of index tensors, forward and backward."""
    compiled, found = set(compiled_operators()), {}
    real = torch._ops.OpOverload.__call__

    def record(self, /, *args, **kwargs):
        if self in compiled:
            named = {argument.name: i for i, argument in enumerate(self._schema.arguments) if argument.name in NAMES}
            places = {name: i for name, i in named.items() if isinstance(args[i], Tensor)}
            kept = tuple(x.detach().clone() if isinstance(x, Tensor) else x for x in args)
            found.setdefault((self, *places), Call(self, kept, places))
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._ops.OpOverload, "__call__", record)
        for function, inputs in calls():
            function(**inputs)
            floating = [x for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
            if "invalid" in inputs or not floating:  # which have no gradient
                continue
            for x in floating:
                x.requires_grad_()
            outs = function(**inputs)
            sum(x.sum() for x in (outs if isinstance(outs, tuple) else (outs,))).backward()
    return found


def wild(indices: Tensor) -> Iterator[Tensor]:
    """Copies whose first entry, last entry or all are just outside, far outside, or where there is no memory."""
    ends = torch.iinfo(indices.dtype)
    for value in (-1, -2, 6, 7, 8, 9, 12, 100, 10_000, 2**28, ends.max, ends.min):
        for entry in (0, -1, slice(None)):
            copy = indices.clone()
            copy.view(-1)[entry] = value
            yield copy


def test_no_index_argument_is_left_out():
    wanted = {(operator, name) for operator in compiled_operators() for name in index_arguments(operator)}
    assert wanted
    assert wanted - {(call.operator, name) for call in recorded().values() for name in call.places} == set()


def test_wild_indices_are_refused_or_stay_inside():
    refused = 0
    for call in recorded().values():
        for name, place in call.places.items():
            for indices in wild(call.args[place]):
                try:
                    call.again(name, indices)
                except (ValueError, RuntimeError):
                    refused += 1
    print(refused, "refused")
    assert refused > 1000

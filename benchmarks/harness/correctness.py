"""The correctness gate: what does not match the float64 reference is not timed."""

import math
from collections.abc import Callable

from benchmarks.harness.registry import FORWARD, Implementation, Inputs, Operator
from recattn.testing import Error, Oracle

# Only recattn is held to the bound. A peer must compute the same thing; PyTorch's kernels miss the bound now and then.
PEER_ALLOWANCE = 5.0


def gradients(operator: Operator, implementation: Implementation, inputs: Inputs) -> list[str]:
    """The inputs that the implementation gives a gradient to."""
    wanted = operator.grads if implementation.grads is None else implementation.grads
    return [name for name in wanted if name in inputs]


class Gate:
    """Holds implementations against float64 on one set of inputs. What a reference makes of them is computed once."""

    def __init__(self, operator: Operator, inputs: Inputs) -> None:
        self.operator, self.inputs = operator, inputs
        self.oracles: dict[tuple[Callable, tuple[str, ...]], Oracle] = {}

    def check(self, implementation: Implementation, directions: tuple[str, ...]) -> list[Error]:
        """Errors of the output, and of every gradient if there is a backward among the directions."""
        reference = implementation.reference or self.operator.reference
        grads = () if directions == (FORWARD,) else tuple(gradients(self.operator, implementation, self.inputs))
        if (reference, grads) not in self.oracles:
            self.oracles[reference, grads] = Oracle.of(reference, self.inputs, grads=grads)

        def contestant(**inputs):
            return implementation.restore(implementation.run(**implementation.prepare(inputs)), inputs)

        return self.oracles[reference, grads].errors(contestant)


def passes(implementation: Implementation, errors: list[Error]) -> bool:
    allowed = 1.0 if implementation.ours else PEER_ALLOWANCE
    return all(error.max_bound < math.inf and error.share <= allowed for error in errors)

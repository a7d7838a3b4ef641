"""The correctness gate: an implementation that does not match the float64 reference is not timed."""

import math
from collections.abc import Callable

from benchmarks.harness.registry import FORWARD, Implementation, Inputs, Operator
from recattn.testing import Error, Oracle

# Other implementations may exceed the bound by this factor, because PyTorch's kernels sometimes miss it.
PEER_ALLOWANCE = 5.0


def gradients(operator: Operator, implementation: Implementation, inputs: Inputs) -> list[str]:
    """The inputs for which the implementation computes a gradient."""
    wanted = operator.grads if implementation.grads is None else implementation.grads
    return [name for name in wanted if name in inputs]


class Gate:
    """Checks implementations against float64 on one set of inputs. Each reference is computed once."""

    def __init__(self, operator: Operator, inputs: Inputs) -> None:
        self.operator, self.inputs = operator, inputs
        self.oracles: dict[tuple[Callable, tuple[str, ...]], Oracle] = {}

    def check(self, implementation: Implementation, directions: tuple[str, ...]) -> list[Error]:
        """Errors of the output, and of every gradient if the directions include a backward."""
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

"""The correctness gate: what does not match the float64 reference is not timed."""

import math

from benchmarks.registry import FORWARD, Implementation, Inputs, Operator
from recattn.testing import Error, compare_with_reference

# Only recattn is held to the bound. A peer must compute the same thing; PyTorch's kernels miss the bound now and then.
PEER_ALLOWANCE = 5.0


def gradients(operator: Operator, implementation: Implementation, inputs: Inputs) -> list[str]:
    """The inputs that the implementation gives a gradient to."""
    wanted = operator.grads if implementation.grads is None else implementation.grads
    return [name for name in wanted if name in inputs]


def check(
    operator: Operator, implementation: Implementation, directions: tuple[str, ...], inputs: Inputs
) -> list[Error]:
    """Errors of the output, and of every gradient if the implementation has a backward, against float64."""

    def contestant(**inputs):
        return implementation.restore(implementation.run(**implementation.prepare(inputs)), inputs)

    return compare_with_reference(
        contestant,
        implementation.reference or operator.reference,
        inputs,
        grads=[] if directions == (FORWARD,) else gradients(operator, implementation, inputs),
    )


def passes(implementation: Implementation, errors: list[Error]) -> bool:
    allowed = 1.0 if implementation.ours else PEER_ALLOWANCE
    return all(share_of_bound(error) <= allowed for error in errors)


def share_of_bound(error: Error) -> float:
    """The error as a share of what it may be, the worse of its maximum and its mean."""
    parts = ((error.max, error.max_bound), (error.mean, error.mean_bound))
    return max(value / bound if bound else math.inf if value else 0.0 for value, bound in parts)

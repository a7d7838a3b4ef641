"""The error bound of every recattn kernel, relative to the float64 reference:

max|actual - ref64|  <=  factor · (max|low - ref64| + eps · max|ref64|)

and the same for the mean. `low` is the reference in the tested dtype.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Error:
    """The error of one output or gradient relative to float64, and its bound."""

    name: str
    max: float
    max_bound: float
    mean: float
    mean_bound: float

    @property
    def passed(self) -> bool:
        """False also for NaN, and where low overflowed, because then the bound is infinite."""
        return self.max <= self.max_bound < math.inf and self.mean <= self.mean_bound < math.inf

    @property
    def share(self) -> float:
        """error / bound, the larger one of maximum and mean; NaN if either is NaN."""
        parts = ((self.max, self.max_bound), (self.mean, self.mean_bound))
        return largest(value / bound if bound else math.inf if value else 0.0 for value, bound in parts)

    def __str__(self) -> str:
        verdict = "ok  " if self.passed else "FAIL"
        return (
            f"{verdict} {self.name}: max {self.max:.3e} (bound {self.max_bound:.3e}), "
            f"mean {self.mean:.3e} (bound {self.mean_bound:.3e})"
        )


def measure_error(
    name: str, actual: Tensor, low: Tensor, ref64: Tensor, eps: float, factor: float = 2.0, zero_scale: float = 0.0
) -> Error:
    """max and mean of |actual - ref64|, with the bounds factor · (the same of |low - ref64| + eps · max|ref64|).

    If ref64 is all zero (dq, if a softmax has one term), `zero_scale` replaces max|ref64|.
    """
    if actual.shape != ref64.shape:
        raise AssertionError(f"{name}: shape {list(actual.shape)}, reference has {list(ref64.shape)}")
    if actual.numel() == 0:
        return Error(name, 0.0, 0.0, 0.0, 0.0)
    error, low_error = ((tensor.detach().double() - ref64).abs() for tensor in (actual, low))
    slack = eps * (ref64.abs().max().item() or zero_scale)
    return Error(
        name,
        error.max().item(),
        factor * (low_error.max().item() + slack),
        error.mean().item(),
        factor * (low_error.mean().item() + slack),
    )


class Draw(NamedTuple):
    """Outputs and gradients of a reference, in the dtype of its inputs and in float64."""

    low: Mapping[str, Tensor]
    ref64: Mapping[str, Tensor]


@dataclass(frozen=True)
class Oracle:
    """The results of a reference in float64 and in the inputs' dtype, to compare kernels with."""

    reference: Callable[..., Tensor | Sequence[Tensor]]
    inputs: Mapping[str, Any]
    grads: Sequence[str]
    seed: int
    draw: Draw

    @classmethod
    def of(
        cls,
        reference: Callable[..., Tensor | Sequence[Tensor]],
        inputs: Mapping[str, Any],
        *,
        grads: Sequence[str] = (),
        seed: int = 0,
    ) -> "Oracle":
        """The Oracle of `reference(**inputs)` and of the gradients of the inputs named in `grads`."""
        return cls(reference, inputs, grads, seed, _draw(reference, inputs, grads, seed))

    @cached_property
    def redrawn(self) -> list[Draw]:
        """The same problem with other roundings of low: all floating inputs 1/128, 2/128, 3/128 or 4/128 smaller.

        Zeros, infinities, signs, ties and the order of entries stay; errors change by a few percent at most.
        """
        scales = [1 - i / 128 for i in range(1, 5)]  # each changes every entry, also in bfloat16
        return [_draw(self.reference, _scaled(self.inputs, scale), self.grads, self.seed) for scale in scales]

    def errors(self, kernel: Callable[..., Tensor | Sequence[Tensor]], *, factor: float = 2.0) -> list[Error]:
        """Errors of the kernel's outputs and gradients; see `compare_with_reference`."""
        actual = _run(kernel, self.inputs, self.grads, self.seed)
        errors = self._errors(actual, self.draw, factor)
        if all(error.passed for error in errors):
            return errors
        others = [self._errors(draw.low, draw, factor) for draw in self.redrawn]
        return [_largest_bounds(*draws) for draws in zip(errors, *others, strict=True)]

    def _errors(self, actual: Mapping[str, Tensor], draw: Draw, factor: float) -> list[Error]:
        floating = [x for x in self.inputs.values() if isinstance(x, Tensor) and x.is_floating_point()]
        eps = max(torch.finfo(x.dtype).eps for x in floating)
        finite = [x[x.isfinite()].abs() for x in floating]  # -inf only masks
        scale = max((x.max().item() for x in finite if x.numel()), default=0.0)
        return [
            measure_error(name, actual[name], draw.low[name], ref64, eps, factor, scale**2)
            for name, ref64 in draw.ref64.items()
        ]


def _largest_bounds(error: Error, *others: Error) -> Error:
    """The error, with the largest bounds of all."""
    errors = (error, *others)
    bounds = {name: largest(getattr(e, name) for e in errors) for name in ("max_bound", "mean_bound")}
    return replace(error, **bounds)


def largest(values: Iterable[float]) -> float:
    """The maximum, NaN if any value is NaN (the result of max() would depend on their order)."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def compare_with_reference(
    kernel: Callable[..., Tensor | Sequence[Tensor]],
    reference: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Mapping[str, Any],
    *,
    grads: Sequence[str] = (),
    seed: int = 0,
    factor: float = 2.0,
) -> list[Error]:
    """Errors of `kernel(**inputs)`, and of the gradients of the inputs named in `grads`, relative to float64.

    The inputs have the tested dtype. `ref64` is the reference on the inputs promoted to float64, `low` the reference in
    the tested dtype; eps is that of the coarsest floating dtype among the inputs. Outputs may be one tensor or several.
    The incoming gradients are standard normal, drawn once and shared. The largest error of low depends on the luck of
    one entry: if the kernel is over a bound, the largest of five draws of low counts (`Oracle.redrawn`).
    """
    return Oracle.of(reference, inputs, grads=grads, seed=seed).errors(kernel, factor=factor)


def assert_matches_reference(*args, **kwargs) -> None:
    """`compare_with_reference`; if an error is over its bound, an AssertionError that lists every error."""
    errors = compare_with_reference(*args, **kwargs)
    if not all(error.passed for error in errors):
        raise AssertionError("\n".join(map(str, ["error bound exceeded", *errors])))


def _draw(reference: Callable, inputs: Mapping[str, Any], grads: Sequence[str], seed: int) -> Draw:
    promoted = {name: _promoted(value) for name, value in inputs.items()}
    return Draw(*(_run(reference, values, grads, seed) for values in (inputs, promoted)))


def _scaled(inputs: Mapping[str, Any], scale: float) -> dict[str, Any]:
    return {
        name: value.detach() * scale if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _promoted(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _run(function: Callable, inputs: Mapping[str, Any], grads: Sequence[str], seed: int) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in grads}
    outputs = function(**{**inputs, **leaves})
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    results = {f"output {i}" if len(outputs) > 1 else "output": output for i, output in enumerate(outputs)}
    if grads:
        differentiable = [output for output in outputs if output.requires_grad]
        incoming = [_incoming_gradient(output, seed + i) for i, output in enumerate(differentiable)]
        gradients = torch.autograd.grad(differentiable, list(leaves.values()), incoming)
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results


def _incoming_gradient(output: Tensor, seed: int) -> Tensor:
    # Rounded to bfloat16, which every tested dtype represents (float16 except tiny values), so all runs get the same.
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(output.shape, generator=generator).bfloat16()
    return gradient.to(device=output.device, dtype=output.dtype)

"""Inputs of wasserstein_attention."""

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from tests.helpers.memory import LargestTensor

NAMES = ("mean_q", "cov_q", "mean_k", "cov_k", "mean_v", "cov_v")


def draw(
    b=2, h=2, n=5, d=3, dv=2, rank=None, n_max=None, per_head=(), source="logits", dtype=torch.float64
) -> dict[str, Tensor]:
    """Normal means, covariances as STOSA makes them, and with a `rank` matrices that keep M of the order of 1.

    Distances and M stay moderate: in a row that gives all weight to one key, gradients are rounding alone. So do
    covariances: the root of a tiny one has such a slope that a single entry would decide the largest error.
    `per_head` names the matrices of which each head has its own.
    """
    sizes = dict.fromkeys(NAMES, d) | {"mean_v": dv, "cov_v": dv}
    inputs = {name: torch.randn(b, h, n, size) for name, size in sizes.items()}
    inputs = {name: F.elu(x / 2) + 1 if name.startswith("cov") else x / 2 for name, x in inputs.items()}
    if rank is not None:
        squares = 1 if source == "weights" else max(n, 1) * d
        for name in ("w_q", "w_k"):
            heads = [h] if name in per_head else []
            matrix = torch.randn(*heads, n if n_max is None else n_max, 2 * rank)
            inputs[name] = matrix * (rank**0.5 * squares) ** -0.5
    return {name: x.to(dtype) for name, x in inputs.items()}


def with_offset(inputs: dict[str, Tensor], part: str, offset: float) -> dict[str, Tensor]:
    """The same with `offset` added to every mean of queries and keys (`part` "mean"), or to every √Σ ("cov")."""
    moved = {name: inputs[name].double() for name in (f"{part}_q", f"{part}_k")}
    moved = {name: x + offset if part == "mean" else (x.sqrt() + offset).square() for name, x in moved.items()}
    return inputs | {name: x.to(inputs[name].dtype) for name, x in moved.items()}


def gradients(function, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """Both outputs, and the gradients of all inputs for fixed incoming gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outs = function(**leaves, **options)
    torch.manual_seed(7)
    incoming = [torch.randn(out.shape).to(out) for out in outs]
    grads = torch.autograd.grad(outs, list(leaves.values()), incoming)
    outs = {"mean": outs[0].detach(), "cov": outs[1].detach()}
    return outs | {f"d{name}": gradient for name, gradient in zip(leaves, grads, strict=True)}


def assert_reruns_agree(function, inputs: dict[str, Tensor]) -> None:
    """Two runs give the same bits."""
    first, second = (gradients(function, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def largest_tensor(function, inputs: dict[str, Tensor], **options) -> int:
    """The number of elements of the largest tensor that a forward and backward make."""
    with LargestTensor() as watched:
        gradients(function, inputs, **options)
    return watched.elements

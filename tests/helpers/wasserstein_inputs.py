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


def pack(x: Tensor, lengths: list[int]) -> Tensor:
    """The first tokens of each sequence of [B, H, N, D], packed [T, H, D]."""
    return torch.cat([x[b, :, :length].transpose(0, 1) for b, length in enumerate(lengths)])


def packed(inputs: dict[str, Tensor], lengths: list[int]) -> dict[str, Tensor]:
    """Padded inputs, packed; w_q and w_k as they are."""
    return {name: pack(x, lengths) if name in NAMES else x for name, x in inputs.items()}


def offsets_of(lengths: list[int], device="cpu") -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)


def assert_packed_equals_padded(function, inputs: dict[str, Tensor], lengths: list[int], **tolerances) -> None:
    """Both outputs and every gradient of a packed batch are those of the same sequences padded on the right."""
    device, shape = inputs["mean_v"].device, inputs["mean_v"].shape
    incoming = [torch.randn(shape).to(inputs["mean_v"]) for _ in range(2)]
    torch.manual_seed(3)  # of dropout
    expected = gradients(function, inputs, incoming, seq_lens=torch.tensor(lengths, device=device))
    torch.manual_seed(3)
    options = {"cu_seqlens": offsets_of(lengths, device), "max_seqlen": max(lengths)}
    actual = gradients(function, packed(inputs, lengths), [pack(x, lengths) for x in incoming], **options)
    for name, x in expected.items():
        x = pack(x, lengths) if x.dim() == 4 else x
        torch.testing.assert_close(actual[name], x, msg=lambda text, name=name: f"{name}: {text}", **tolerances)


def gradients(function, inputs: dict[str, Tensor], incoming: list[Tensor] | None = None, **options):
    """Both outputs, and the gradients of all inputs for fixed incoming gradients, by their names."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outs = function(**leaves, **options)
    if incoming is None:
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

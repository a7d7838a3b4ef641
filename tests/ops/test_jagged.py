"""A padded, a packed and a nested batch of the same MovieLens users give the same outputs and gradients."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

import recattn
from benchmarks.data import movielens

HISTORIES = movielens.load(offline=True).sample(8, longest=60)
LENGTHS = torch.tensor([*map(len, HISTORIES), 0])  # and a user without history
OFFSETS = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
ITEMS = torch.cat(HISTORIES)
LONGEST, USERS, HEADS, DIM = int(LENGTHS.max()), len(LENGTHS), 2, 8


def per_item(generator: torch.Generator, *shape: int) -> Tensor:
    """[T, *shape]: a row of a table for each item of the histories."""
    return torch.randn(movielens.ITEMS + 1, *shape, generator=generator)[ITEMS]


def draw(op: str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """What each token has, what all users share, and other arguments."""
    g = torch.Generator().manual_seed(0)
    heads = (HEADS, DIM)
    matrices = {name: torch.randn(70, 6, generator=g) / 10 for name in ("w_q", "w_k")}
    if op == "sink_attention":
        positions = torch.tensor([[0, 4, 9, 17]]).repeat(USERS, 1)
        positions = positions.where(positions < LENGTHS[:, None], -1)
        shared = {"inter_sink_bias": torch.randn(USERS, 1, 4, 4, generator=g)}
        return {name: per_item(g, *heads) for name in "qkv"}, shared, {"sink_positions": positions, "causal": True}
    if op == "refined_attention":
        return {name: per_item(g, *heads) for name in "qkv"}, matrices, {"causal": True}
    if op == "wasserstein_attention":
        means = {f"mean_{x}": per_item(g, *heads) for x in "qkv"}
        covariances = {f"cov_{x}": per_item(g, *heads).exp() for x in "qkv"}
        return means | covariances, matrices, {"causal": True}
    return {"behaviors": per_item(g, DIM)}, {"w_comp": torch.randn(70, 4, generator=g) / 10}, {}


def pad(x: Tensor) -> Tensor:
    """[T, H, D] -> [B, H, N, D], [T, d] -> [B, N, d], with NaN at padding."""
    valid = torch.arange(LONGEST) < LENGTHS[:, None]
    padded = x.new_full((USERS, LONGEST, *x.shape[1:]), float("nan")).index_put((valid,), x)
    return padded.transpose(1, 2) if x.dim() == 3 else padded


def unpad(x: Tensor) -> Tensor:
    return x.transpose(1, 2)[torch.arange(LONGEST) < LENGTHS[:, None]]


def nest(x: Tensor) -> Tensor:
    nested = torch.nested.nested_tensor_from_jagged(x, OFFSETS)
    return nested.transpose(1, 2) if x.dim() == 3 else nested


def outputs(out: Tensor | tuple[Tensor, ...], back: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Packed. The compressed histories of lrea_compress have no tokens."""
    outs = out if isinstance(out, tuple) else (out,)
    return [back(x) if x.is_nested or x.dim() == 4 else x for x in outs]


def run(op: str, layout: str, compiled: bool) -> tuple[list[Tensor], Mapping[str, Tensor]]:
    """The outputs as packed tensors, and the gradients."""
    tokens, shared, options = draw(op)
    leaves = {name: x.requires_grad_() for name, x in (tokens | shared).items()}

    def function(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(leaves, tensors, strict=True))
        convert = {"padded": pad, "packed": lambda x: x, "nested": nest}[layout]
        lengths = {"padded": {"seq_lens": LENGTHS}, "packed": {"cu_seqlens": OFFSETS}, "nested": {}}[layout]
        arguments = {name: convert(x) if name in tokens else x for name, x in given.items()}
        back = {"padded": unpad, "packed": lambda x: x, "nested": lambda x: x.transpose(1, 2).values()}[layout]
        return outputs(getattr(recattn, op)(**arguments, **options, **lengths), back)

    outs = (torch.compile(function, fullgraph=True) if compiled else function)(*leaves.values())
    g = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=g)).sum() for x in outs)
    return outs, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


OPS = ("sink_attention", "refined_attention", "wasserstein_attention", "lrea_compress")


@pytest.mark.parametrize("op", OPS)
def test_layouts_agree(op):
    expected, gradients = run(op, "padded", compiled=False)
    packed, packed_gradients = run(op, "packed", compiled=False)
    torch.testing.assert_close(packed, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-5)
    for layout, compiled in (("packed", True), ("nested", False), ("nested", True)):
        outs, layout_gradients = run(op, layout, compiled)
        assert all(map(torch.equal, outs, packed)), (layout, compiled)
        for name, gradient in layout_gradients.items():
            assert torch.equal(gradient, packed_gradients[name]), (name, layout, compiled)


def nested_call(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    w_q, w_k = (draw("refined_attention")[1][name] for name in ("w_q", "w_k"))
    return recattn.refined_attention(q, k, v, w_q, w_k, causal=True, **options)


def nested_inputs() -> list[Tensor]:
    return [nest(x).detach() for x in draw("refined_attention")[0].values()]


def kernel_of(out: Tensor) -> torch.autograd.graph.Node:
    """The kernel's node in the graph of a nested output."""
    node = out.grad_fn
    while not hasattr(node, "needs_input_grad"):
        node = node.next_functions[0][0]
    return node


def test_gradients_of_nested_leaves():
    """A nested leaf gets a nested gradient; for one that needs none the kernel computes none."""
    q, k, v = nested_inputs()
    out = nested_call(q, k.requires_grad_(), v)
    assert kernel_of(out).needs_input_grad[:3] == (False, True, False)
    out.values().sum().backward()
    assert k.grad.is_nested and k.grad.shape == k.shape and q.grad is None

    packed = [x.values().transpose(0, 1).detach().requires_grad_() for x in (q, k, v)]
    nested_call(*packed, cu_seqlens=OFFSETS).sum().backward()
    assert k.grad.values().transpose(0, 1).equal(packed[1].grad)


def test_nested_without_gradients():
    q, k, v = nested_inputs()
    assert not nested_call(q, k, v).requires_grad
    q.requires_grad_()
    with torch.no_grad():
        assert not nested_call(q, k, v).requires_grad
    with torch.inference_mode():
        assert nested_call(q, k, v).is_nested


@pytest.mark.parametrize("changed", ["q", "k", "out"])
def test_nested_tensors_changed_in_place(changed):
    """The backward reads what the forward read and wrote, or raises."""
    q, k, v = nested_inputs()
    k.requires_grad_()
    out = recattn.sink_attention(q, k, v, causal=True)
    with torch.no_grad():
        {"q": q, "k": k, "out": out}[changed].mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.values().sum().backward()

"""Inputs of LREA's operators, and checks that their tests share."""

import pytest
import torch
from torch import Tensor

from recattn._extension import MISSING

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RESTORED_GRADS = ["targets", "keys", "values", "w_decomp"]
compiled_kernels = pytest.mark.skipif("cpu" in MISSING, reason=MISSING.get("cpu", ""))


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def draw_compress(users=3, length=100, dim=17, rank=8, longest=None, seq_lens=None, dtype=torch.float32):
    return {
        "behaviors": torch.randn(users, length, dim, dtype=dtype),
        "w_comp": torch.randn(longest or length, rank, dtype=dtype),
        "seq_lens": None if seq_lens is None else torch.tensor(seq_lens),
    }


def pack(inputs: dict) -> dict:
    """Padded inputs of lrea_compress with the histories, or their item ids, packed."""
    lengths = inputs["seq_lens"].tolist()
    name = "item_ids" if "item_ids" in inputs else "behaviors"
    packed = torch.cat([history[:length] for history, length in zip(inputs[name], lengths, strict=True)])
    rest = {other: x for other, x in inputs.items() if other != "seq_lens"}
    return {**rest, name: packed, "cu_seqlens": offsets_of(lengths)}


def draw_restored(counts=(3, 0, 1, 63), heads=2, rank=8, dim=16, value_dim=12, length=100, seq_lens=None, **options):
    dtype = options.get("dtype", torch.float32)
    users = len(counts)
    return {
        "targets": torch.randn(sum(counts), heads, dim, dtype=dtype),
        "keys": torch.randn(users, heads, rank, dim, dtype=dtype),
        "values": torch.randn(users, heads, rank, value_dim, dtype=dtype),
        "w_decomp": torch.randn(rank, length, dtype=dtype),
        "target_offsets": offsets_of(list(counts)),
        "seq_lens": None if seq_lens is None else torch.tensor(seq_lens),
    }


def draw_absorbed(counts=(3, 0, 1, 63), heads=2, rank=8, dim=16, value_dim=12, table=7, dtype=torch.float32):
    return {
        "targets": torch.randn(sum(counts), heads, dim, dtype=dtype),
        "state_keys": torch.randn(table, heads, rank, dim, dtype=dtype),
        "state_values": torch.randn(table, heads, rank, value_dim, dtype=dtype),
        "slots": torch.randint(table, (len(counts),)),
        "target_offsets": offsets_of(list(counts)),
    }


def strided(tensor: Tensor) -> Tensor:
    """The same values with every axis strided."""
    wide = tensor.new_full([2 * size for size in tensor.shape], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def assert_close_float64(actual: Tensor, expected: Tensor):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


# --- Embeddings by item id, states in int8 ---


def by_item_id(inputs: dict, name: str, items: int = 11) -> dict:
    """The inputs with `name` replaced by a table of items, and the ids."""
    x = inputs[name]
    ids = torch.randint(items, x.shape[: 1 if name == "targets" else 2])
    return {**inputs, name: torch.randn(items, *x.shape[ids.dim() :], dtype=x.dtype), "item_ids": ids}


def assert_compiles(function, draws, grads):
    """One graph, and one compilation for all sizes but the first."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, inputs in enumerate(draws):
        leaves = [inputs[name].requires_grad_() for name in grads]
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            out = compiled(**inputs)
        expected = function(**inputs)
        assert out.equal(expected)
        if grads:
            got, want = (torch.autograd.grad(result.square().sum(), leaves) for result in (out, expected))
            assert all(a.equal(b) for a, b in zip(got, want, strict=True))


# --- Bad input ---


def assert_refuses(function, inputs, name, value, message):
    with pytest.raises(ValueError) as error:
        function(**{**inputs, name: value})
    assert message in str(error.value)

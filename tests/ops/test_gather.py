"""Rows that are read many times: their gradients are summed in float32 everywhere in the package."""

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

import recattn
from recattn._gather import gather_rows
from recattn.nn import SinkTokenEmbedding, TargetAttention

USES = 4000  # times 1: bfloat16 stays at 256, float16 at 2048; both have 4000 itself
HALVES = [torch.bfloat16, torch.float16]


def ones(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.ones(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3), (5, 2, 3), (5, 0)])
def test_rows_and_their_gradient(shape, dtype):
    table = torch.randn(shape).to(dtype).requires_grad_()
    for rows in (
        torch.tensor([[0, 4, 0], [2, 0, 4]]),
        torch.tensor([3, 3], dtype=torch.int32),
        torch.zeros(2, 0).int(),
    ):
        out = gather_rows(table, rows)
        assert torch.equal(out, table[rows.long()]) and out.dtype == dtype
        incoming = torch.randn(out.shape).to(dtype)
        (gradient,) = grad(out, table, incoming)
        exact = torch.zeros(shape, dtype=torch.float64).index_put_((rows.long(),), incoming.double(), accumulate=True)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-6)


def test_derivatives():
    table, rows = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 2, 0])

    def function(table):
        return gather_rows(table, rows).sin()

    assert gradcheck(function, table) and gradgradcheck(function, table)
    by_func = torch.func.grad(lambda x: function(x).sum())(table)
    assert torch.equal(by_func, grad(function(table).sum(), table)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiles_in_one_graph(dtype):
    compiled = torch.compile(lambda table, rows: gather_rows(table, rows).square(), fullgraph=True, backend="aot_eager")
    table = torch.randn(4, 3).to(dtype).requires_grad_()
    for n in (2, 3, 7):
        rows = torch.arange(n) % 3
        (gradient,) = grad(compiled(table, rows).sum(), table)
        torch.testing.assert_close(gradient, grad(gather_rows(table, rows).square().sum(), table)[0])


# --- Wherever rows are read ---


@pytest.mark.parametrize("dtype", HALVES)
def test_items_of_a_compression(dtype):
    table, w_comp = ones(3, 2, dtype=dtype), ones(1, 1, dtype=dtype)
    out = recattn.lrea_compress(table, w_comp, item_ids=torch.ones(USES, 1, dtype=torch.int64))
    assert grad(out.sum(), table)[0].tolist() == [[0, 0], [USES, USES], [0, 0]]


@pytest.mark.parametrize("dtype", HALVES)
def test_targets_and_states_of_absorbed_attention(dtype):
    targets, keys, values = (ones(2, *shape, dtype=dtype) for shape in ((1, 1), (1, 1, 1), (1, 1, 1)))
    rows = torch.ones(USES, dtype=torch.int64)
    out = recattn.lrea_absorbed_attention(targets, keys, values, rows, torch.arange(USES + 1), item_ids=rows)
    for gradient in grad(out.sum(), [targets, keys, values]):
        assert gradient.flatten().tolist() == [0, USES]


@pytest.mark.parametrize("impl", [None, "reference"])
@pytest.mark.parametrize("dtype", HALVES)
def test_matrices_that_all_users_share(dtype, impl):
    """W_decomp and W_comp of an LREA that any implementation trains."""
    targets, keys, values = (ones(USES, 1, *shape, dtype=dtype) for shape in ((1,), (1, 1), (1, 1)))
    for seq_lens in (None, torch.ones(USES, dtype=torch.int64)):
        w_decomp = ones(1, 1, dtype=dtype)
        offsets = torch.arange(USES + 1)
        out = recattn.lrea_attention(targets, keys, values, w_decomp, offsets, seq_lens=seq_lens, impl=impl)
        assert grad(out.sum(), w_decomp)[0].item() == 2 * USES
    behaviors, w_comp = ones(USES, 1, 1, dtype=dtype), ones(1, 1, dtype=dtype)
    assert grad(recattn.lrea_compress(behaviors, w_comp, impl=impl).sum(), w_comp)[0].item() == USES


@pytest.mark.parametrize("dtype", HALVES)
def test_histories_of_packed_targets(dtype):
    """Every target belongs to user 1 and weighs each behaviour equally."""
    module = TargetAttention(1, (1,), dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.layers[-1].bias.fill_(1)
    behaviors = ones(2, 1, 1, dtype=dtype)
    out = module(torch.ones(USES, 1, dtype=dtype), behaviors, torch.tensor([0, 0, USES]))
    assert grad(out.sum(), behaviors)[0].flatten().tolist() == [0, USES]


@pytest.mark.parametrize("dtype", HALVES)
def test_embeddings_of_sinks(dtype):
    module = SinkTokenEmbedding(1, num_ids=3, embedding_dim=1, dtype=dtype)
    with torch.no_grad():
        module.mlp[0].weight.fill_(1)
    ids = torch.ones(USES // 2, 2, dtype=torch.int64)
    assert grad(module(ids).sum(), module.tables["temporal"].weight)[0].flatten().tolist() == [0, USES, 0]

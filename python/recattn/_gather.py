"""Gathers rows of a table, with an exact gradient."""

import torch
from torch import Tensor

from recattn._dispatch import is_transformed


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """table[rows] of a table [I, d, ...]. The gradient of a row sums its uses in float32 and rounds once.

    PyTorch sums in the table's dtype: in bfloat16 a sum of ones stops growing at 256.
    """
    if is_transformed():
        return table[rows.long()]
    return _GatherRows.apply(table, rows.flatten()).unflatten(0, rows.shape)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = table.shape
        return table.index_select(0, rows)

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        uses = dout.flatten(1).to(torch.promote_types(dout.dtype, torch.float32))
        dtable = torch.ops.aten.embedding_dense_backward(uses, rows, ctx.shape[0], -1, False)
        return dtable.to(dout.dtype).view(ctx.shape), None

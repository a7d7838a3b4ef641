"""The checks of index values in C++: the same results and the same words as in Python."""

import pytest
import torch

from recattn import _check
from recattn._extension import MISSING

pytestmark = pytest.mark.skipif("cpu" in MISSING, reason="needs the compiled extension")

LENGTHS = ("checked_lengths", "seq_lens")
OFFSETS = ("checked_offsets", "cu_seqlens")
ROWS = ("checked_rows", "item_ids")


def positions(*rows, seq_len=10, cu_seqlens=None):
    cu_seqlens = None if cu_seqlens is None else torch.tensor(cu_seqlens)
    return "checked_sink_positions", torch.tensor(rows), None if cu_seqlens is not None else seq_len, cu_seqlens


@pytest.mark.parametrize(
    "case",
    [
        (*LENGTHS, torch.tensor([3, 0, 7]), 7),
        (*LENGTHS, torch.tensor([3, 8, 9]), 7),
        (*LENGTHS, torch.tensor([3, 0, -1]), 7),
        (*LENGTHS, torch.zeros(0, dtype=torch.int64), 7),
        (*OFFSETS, torch.tensor([0, 3, 3, 7]), 7),
        (*OFFSETS, torch.tensor([0]), 0),
        (*OFFSETS, torch.tensor([0, 5, 4, 3, 7]), 7),
        (*OFFSETS, torch.tensor([0, 3, 6]), 7),
        (*OFFSETS, torch.tensor([1, 3, 7]), 7),
        (*ROWS, torch.tensor([0, 4, 2]), 5, None),
        (*ROWS, torch.tensor([0, 5, 2]), 5, None),
        (*ROWS, torch.tensor([0, 4, -2]), 5, torch.tensor([1])),
        (*ROWS, torch.tensor([[0, 1], [4, 3]]), 5, None),
        (*ROWS, torch.tensor([[0, 9], [-4, 3]]), 5, torch.tensor([1, 0])),
        (*ROWS, torch.tensor([[0, 9], [4, 9]]), 5, torch.tensor([1, 2])),
        (*ROWS, torch.zeros(2, 0, dtype=torch.int64), 5, torch.tensor([0, 0])),
        positions([0, 3, -1], [-1, -1, -1], [7, 8, 9]),
        positions([0, 3, -1], [4, 10, 11]),
        positions([0, 3, -1], [4, -2, 5]),
        positions([0, 3, -1], [4, 4, 5]),
        positions([0, 3, -1], [4, -1, 5]),
        positions([5, 3, -1], [4, -1, 12]),
        positions([0, 3, -1], [1, 2, 3], cu_seqlens=[0, 4, 8]),
        positions([0, 3, -1], [1, 2, 4], cu_seqlens=[0, 4, 8]),
        ("checked_sink_positions", torch.zeros(2, 0, dtype=torch.int64), 10, None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("strided", [False, True])
def test_results_and_words(case, dtype, strided, monkeypatch):
    name, *arguments = case
    arguments = [prepare(x, dtype, strided) if isinstance(x, torch.Tensor) else x for x in arguments]
    compiled = outcome(name, arguments)
    monkeypatch.setitem(MISSING, "cpu", "not compiled")
    assert outcome(name, arguments) == compiled


def prepare(x, dtype, strided):
    x = x.to(dtype)
    return torch.stack([x, x], -1)[..., 0] if strided else x


def outcome(name, arguments):
    """The error, or the values, dtype and shape of the copy."""
    given = next(x for x in arguments if isinstance(x, torch.Tensor))
    try:
        copy = getattr(_check, name)(*arguments)
    except ValueError as error:
        return str(error)
    assert copy.data_ptr() != given.data_ptr() or copy.numel() == 0
    return copy.tolist(), copy.dtype, copy.shape


def test_offsets_whose_differences_overflow_are_refused():
    """By the operator itself: UndefinedBehaviorSanitizer saw it subtract them."""
    offsets = torch.tensor([0, 7, torch.iinfo(torch.int64).min])
    with pytest.raises((ValueError, RuntimeError), match=r"cu_seqlens must be ascending, got -9223372036854775808"):
        torch.ops.recattn.checked_sink_positions_cpu(torch.tensor([[0, 1], [0, 1]]), None, offsets)

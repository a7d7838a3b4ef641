"""The checks of index values as operators, so that compiled and exported graphs make them too.

Each returns a copy of what it checked. Computing with the copy keeps the check in the graph, and another thread of the
caller cannot change it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from recattn import _check
from recattn._extension import MISSING
from recattn.ops._library import define, is_traced
from recattn.ops._transforms import map_elements


def _define(schema: str, check: Callable[..., Tensor]) -> Callable[..., Tensor]:
    operator = define(schema, cpu=check, cuda=check, fake=_like_first_tensor)

    def checked(*args: object) -> Tensor:
        return operator(*args) if is_traced(*(x for x in args if isinstance(x, Tensor))) else check(*args)

    return checked


def _like_first_tensor(*args):
    return next(torch.empty_like(x) for x in args if isinstance(x, Tensor))


checked_sink_positions = _define(
    "checked_sink_positions(Tensor sink_positions, SymInt? seq_len, Tensor? cu_seqlens) -> Tensor",
    _check.checked_sink_positions,
)
checked_lengths = _define("checked_lengths(str name, Tensor lengths, SymInt longest) -> Tensor", _check.checked_lengths)
checked_offsets = _define("checked_offsets(str name, Tensor offsets, SymInt total) -> Tensor", _check.checked_offsets)
checked_rows = _define(
    "checked_rows(str name, Tensor rows, SymInt table_size, Tensor? seq_lens) -> Tensor", _check.checked_rows
)


def checked_starts(seq_starts: Tensor, seq_lens: Tensor, longest: int) -> Tensor:
    """Where windows of `seq_lens` tokens, checked already, begin: at 0 or later, and they end by `longest`."""
    ends = checked_lengths("seq_starts + seq_lens", seq_starts + seq_lens, longest)
    return checked_lengths("seq_starts", ends - seq_lens, longest)


def _map_in_vmap(operator: torch._ops.OpOverload) -> None:
    def rule(info, in_dims, *args):
        (checked,), (axis,) = map_elements(lambda *element: (operator(*element),), info, in_dims, *args)
        return checked, axis

    torch.library.register_vmap(operator, rule)


if "cpu" not in MISSING:
    for _name in ("checked_sink_positions", "checked_lengths", "checked_offsets", "checked_rows"):
        _map_in_vmap(getattr(torch.ops.recattn, f"{_name}_cpu").default)

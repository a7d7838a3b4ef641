"""Where the tensors of one user lie in a row of bytes: one after the other, each padded to 16 bytes."""

import math

import torch
from torch import Tensor

ALIGNMENT = 16

Fields = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape, without users


class RowLayout:
    """Rows of `nbytes`, of which the first `start` bytes are somebody else's."""

    def __init__(self, fields: Fields, start: int = 0) -> None:
        self._fields = fields
        self._slices = {}
        self.nbytes = start
        for name, (dtype, shape) in fields.items():
            width = dtype.itemsize * math.prod(shape)
            self._slices[name] = slice(self.nbytes, self.nbytes + width)
            self.nbytes += -(-width // ALIGNMENT) * ALIGNMENT

    def views(self, rows: Tensor) -> dict[str, Tensor]:
        """The tensors in rows [U, nbytes] of uint8, each [U, ...], without a copy."""
        users = rows.shape[0]  # not len, which torch.export takes for a constant
        return {
            name: rows[:, self._slices[name]].view(dtype).view(users, *shape)
            for name, (dtype, shape) in self._fields.items()
        }

"""What the states of a store are: format version, sizes, dtype and the model that they belong to."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from recattn._check import expect, expect_dtype, expect_shape, expect_tensors
from recattn.nn.lrea import LREA, LREAState
from recattn.serving.state_table import StateTable
from recattn.serving.state_values import STATE_DTYPES, as_stored, invalid_positions
from recattn.serving.stores.layout import RowLayout

FORMAT_VERSION = 1
MODEL_BYTES = 16
STATE_TENSORS = ("keys", "values", "key_scales", "value_scales")
ROW_DTYPES = (torch.float32, torch.int32)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(STATE_DTYPES)}


@dataclass(frozen=True)
class StateSchema:
    """Sizes, dtype and model of the states in a store:

        keys [U, H, r, d],  values [U, H, r, dv],  int8 also key_scales, value_scales [U, H, r] float32
        histories: compressed [U, r, embed_dim] float32,  lengths [U] int64

    Every record of a store carries it, and a record of another schema is refused by name, never computed with.

    Source: our own.

    Args:
        heads, rank, dim, value_dim: H, r, d, dv.
        dtype: float32, bfloat16, float16 or int8.
        model: names the model that the states belong to, at most 16 ASCII characters. A state of one model is noise to
            another, so change it whenever weights or item embeddings do.
        embed_dim: width of the compressed histories that `append_events` needs. 0: histories are not stored.

    Raises:
        ValueError: a size, dtype or model is not supported.
    """

    heads: int
    rank: int
    dim: int
    value_dim: int
    dtype: torch.dtype
    model: str
    embed_dim: int = 0

    def __post_init__(self) -> None:
        for name in ("heads", "rank", "dim", "value_dim"):
            size = getattr(self, name)
            expect(isinstance(size, int) and 0 < size < 1 << 16, name, "between 1 and 65535", size)
        embed_dim = self.embed_dim
        expect(isinstance(embed_dim, int) and 0 <= embed_dim < 1 << 16, "embed_dim", "between 0 and 65535", embed_dim)
        expect(self.dtype in STATE_DTYPES, "dtype", f"one of {', '.join(map(str, STATE_DTYPES))}", self.dtype)
        fits = isinstance(self.model, str) and self.model.isascii() and 0 < len(self.model) <= MODEL_BYTES
        expect(fits, "model", f"1 to {MODEL_BYTES} ASCII characters", repr(self.model))

    @classmethod
    def of(
        cls,
        lrea: LREA,
        dtype: torch.dtype | None = None,
        *,
        items: Tensor | None = None,
        model: str | None = None,
        appendable: bool = False,
    ) -> "StateSchema":
        """The schema of the states that `lrea.export_state` makes.

        Args:
            dtype: of the states, that of the parameters by default.
            items: the embedding table of the items. If given, it is part of the fingerprint.
            model: a name of your own. By default a fingerprint: 16 hexadecimal digits of the SHA-256 of options,
                parameters and `items`, which takes a second per GB.
            appendable: also store histories, 4·r·embed_dim + 16 bytes per user, so that `append_events` works.
        """
        return cls(
            heads=lrea.num_heads,
            rank=lrea.rank,
            dim=lrea.target_dim,
            value_dim=lrea.head_dim,
            dtype=lrea.w_comp.dtype if dtype is None else dtype,
            model=_fingerprint(lrea, items) if model is None else model,
            embed_dim=lrea.embed_dim if appendable else 0,
        )

    @cached_property
    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape, without users, of each tensor of a state, in the order of a record."""
        rows = (self.heads, self.rank)
        fields = {"keys": (self.dtype, (*rows, self.dim)), "values": (self.dtype, (*rows, self.value_dim))}
        if self.dtype == torch.int8:
            fields |= {"key_scales": (torch.float32, rows), "value_scales": (torch.float32, rows)}
        return fields

    @cached_property
    def _row_layout(self) -> RowLayout:
        return RowLayout(self.fields)

    @property
    def row_width(self) -> int:
        """W, the float32 lanes of a state's row: `embedding_dim` of a table that holds states."""
        return self._row_layout.nbytes // ROW_DTYPES[0].itemsize

    def to_rows(self, state: LREAState) -> Tensor:
        """States as rows of an embedding table, [U, W] float32. A row of zeros is a user without a state.

        The rows hold the bytes of the state, not numbers: copy and exchange them, never add to them or cast them. Where
        rows are added to zeros, as when a DTensor's `embedding` is reduced, pass `rows.view(torch.int32)` instead.

        Args:
            state: as from `LREA.export_state` or `get_many`, on any device; floating keys and values are cast to the
                schema's dtype, or quantized.

        Raises:
            ValueError: a shape or dtype does not fit, or the schema's dtype cannot hold a state.
        """
        expect(isinstance(state, LREAState), "state", "an LREAState", type(state).__name__)
        given = {name: getattr(state, name) for name in STATE_TENSORS}
        expect_tensors(keys=state.keys)
        tensors = as_stored(given, dict(self.sizes), self.dtype, state.keys.device)
        invalid = invalid_positions(tensors, self.dtype)
        expect(not invalid, "state", f"finite in {self.dtype}", f"entries that are not, of the users at {invalid[:3]}")
        rows = state.keys.new_zeros((len(state.keys), self._row_layout.nbytes), dtype=torch.uint8)
        for name, view in self._row_layout.views(rows).items():
            view.copy_(tensors[name])
        return rows.view(ROW_DTYPES[0])

    def from_rows(self, rows: Tensor) -> LREAState:
        """The states in rows that `to_rows` made, as views: nothing is copied.

        Args:
            rows: [U, W] float32 or int32, each row contiguous, on any device.

        Raises:
            ValueError: rows are of another dtype or width.
        """
        expect_tensors(rows=rows)
        expect_dtype("rows", rows, ROW_DTYPES)
        expect_shape({"W": self.row_width}, "rows", rows, "U W")
        return as_state(self._row_layout.views(rows.detach().view(torch.uint8)))

    @property
    def appendable(self) -> bool:
        return self.embed_dim > 0

    @property
    def sizes(self) -> dict[str, int]:
        return {"H": self.heads, "r": self.rank, "d": self.dim, "dv": self.value_dim}

    def make_table(self, capacity: int, device: torch.device | str = "cpu") -> StateTable:
        """A StateTable for states of this schema."""
        sizes = {"heads": self.heads, "rank": self.rank, "dim": self.dim, "value_dim": self.value_dim}
        return StateTable(capacity, **sizes, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        embed_dim = f", embed_dim {self.embed_dim}" if self.appendable else ""
        return (
            f"model {self.model!r}, {str(self.dtype).removeprefix('torch.')}, heads {self.heads}, rank {self.rank}, "
            f"dim {self.dim}, value_dim {self.value_dim}{embed_dim}, format version {FORMAT_VERSION}"
        )


def as_state(tensors: dict[str, Tensor]) -> LREAState:
    """A state that is only served, from its tensors by name."""
    return LREAState(tensors["keys"], tensors["values"], tensors.get("key_scales"), tensors.get("value_scales"))


def _fingerprint(lrea: LREA, items: Tensor | None) -> str:
    digest = hashlib.sha256(lrea.extra_repr().encode())
    tensors = dict(lrea.state_dict()) | ({} if items is None else {"items": items})
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:MODEL_BYTES]

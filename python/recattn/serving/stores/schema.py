"""What the states of a store are: format version, sizes, dtype and the model that they belong to."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from recattn._check import expect
from recattn.nn.lrea import LREA, LREAState
from recattn.serving.state_table import StateTable
from recattn.serving.state_values import STATE_DTYPES

FORMAT_VERSION = 1
MODEL_BYTES = 16
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

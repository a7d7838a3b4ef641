"""LREA as a replacement for the activation units of torch-rechub's DIN."""

from typing import Any

from torch import Tensor, nn

from recattn._check import expect, expect_shape, expect_tensors
from recattn._imports import importing
from recattn.integrations._behaviors import move_to_front
from recattn.integrations.patching import PatchHandle, patch
from recattn.nn import LREA


class LREAActivationUnit(nn.Module):
    """`recattn.nn.LREA.forward` with the call of torch-rechub's ActivationUnit: unit(history [B, N, D], target [B, D]).

    The call has no lengths, so a history row that is all zeros counts as padding at any position: it is the embedding
    of a feature's `padding_idx`. (Without `padding_idx`, id 0 is a behaviour like any other, as in torch-rechub.) The
    other rows, the oldest first, move to the front; see `without_padding`.

    Source: our own.

    Args:
        embed_dim: D.
        max_len: the longest N.
        rank, options: as in `recattn.nn.LREA`; num_heads · head_dim must be D.
    """

    def __init__(self, embed_dim: int, max_len: int, rank: int, **options: Any) -> None:
        super().__init__()
        self.lrea = LREA(embed_dim, max_len, rank, **options)
        width = self.lrea.num_heads * self.lrea.head_dim
        expect(width == embed_dim, "num_heads · head_dim", f"embed_dim, {embed_dim}", width)

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        """[B, N, D], [B, D] -> [B, D]; zeros if the whole history is padding.

        Raises:
            ValueError: a shape, dtype or device does not match, or N > max_len.
        """
        behaviors, seq_lens = without_padding(history)
        n = history.shape[1]
        expect(n <= self.lrea.max_len, "N of history", f"at most max_len, {self.lrea.max_len}", n)
        return self.lrea(target, behaviors, seq_lens=seq_lens)


def without_padding(history: Tensor) -> tuple[Tensor, Tensor]:
    """Move the nonzero rows of history [B, N, D] to the front; returns behaviors [B, N, D] and seq_lens [B].

    The result is what `LREA` takes: train with the term
    `unit.lrea.loss(unit.lrea.compress(*without_padding(history)), "mean")`, serve from
    `unit.lrea.export_state(*without_padding(history))`.
    """
    expect_tensors(history=history)
    expect_shape({}, "history", history, "B N D")
    return move_to_front(history, (history != 0).any(dim=-1))


def replace_attention(model: nn.Module, max_len: int, rank: int, **options: Any) -> PatchHandle:
    """Replace every ActivationUnit of a torch-rechub model with an `LREAActivationUnit`.

    Call it before building the optimizer: an existing one does not know the new parameters, `handle.added_parameters`.

    Args:
        model: a `torch_rechub.models.ranking.DIN`, or a module that contains one.
        max_len: the longest history, padding included.
        rank, options: as in `recattn.nn.LREA`; device and dtype are those of the replaced units.

    Returns:
        A handle whose `restore()`, or the end of whose `with` block, puts the old units back.

    Raises:
        ImportError: torch-rechub is not installed, or a module that it imports.
        ValueError: the model has no ActivationUnit, or an option is not supported.
    """
    with importing("torch-rechub", module="torch_rechub", extra="torch-rechub"):
        from torch_rechub.models.ranking.din import ActivationUnit

    def replacement(unit: Any, name: str) -> LREAActivationUnit:
        weight = next(unit.parameters())
        own = {"device": weight.device, "dtype": weight.dtype}
        return LREAActivationUnit(unit.emb_dim, max_len, rank, **own, **options).train(unit.training)

    return patch(model, {ActivationUnit: replacement})

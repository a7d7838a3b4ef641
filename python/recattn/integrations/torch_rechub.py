"""LREA in the place of the activation units of torch-rechub's DIN."""

from torch import Tensor, nn

from recattn._check import expect, expect_shape, expect_tensors
from recattn.integrations.patching import PatchHandle, patch
from recattn.nn import LREA


class LREAActivationUnit(nn.Module):
    """`recattn.nn.LREA.forward` called as torch-rechub's ActivationUnit is: unit(history [B, N, D], target [B, D]).

    No lengths are given, so a row of the history that is zero throughout is padding, wherever it stands: the embedding
    of the `padding_idx` of a feature. (A table without `padding_idx` has none; id 0 then is a behaviour like any other,
    as it is to the units of torch-rechub.) The others, the oldest first, move to the front: see `without_padding`.

    Source: our own.

    Args:
        embed_dim: D.
        max_len: the longest N.
        rank, options: as of `recattn.nn.LREA`, with heads that together have D columns.
    """

    def __init__(self, embed_dim: int, max_len: int, rank: int, **options: object) -> None:
        super().__init__()
        self.lrea = LREA(embed_dim, max_len, rank, **options)
        width = self.lrea.num_heads * self.lrea.head_dim
        expect(width == embed_dim, "num_heads · head_dim", f"embed_dim, {embed_dim}", width)

    def forward(self, history: Tensor, target: Tensor) -> Tensor:
        """[B, N, D], [B, D] -> [B, D]; zeros where all of a history is padding.

        Raises:
            ValueError: shapes, dtypes and devices that do not fit, among them N > max_len.
        """
        behaviors, seq_lens = without_padding(history)
        n = history.shape[1]
        expect(n <= self.lrea.max_len, "N of history", f"at most max_len, {self.lrea.max_len}", n)
        return self.lrea(target, behaviors, seq_lens=seq_lens)


def without_padding(history: Tensor) -> tuple[Tensor, Tensor]:
    """behaviors [B, N, D], seq_lens [B]: the rows of history [B, N, D] that are not all zeros, in their order, first.

    As `LREA` takes them: `unit.lrea.loss(unit.lrea.compress(*without_padding(history)))` is the term to train with,
    `unit.lrea.export_state(*without_padding(history))` what to serve from.
    """
    expect_tensors(history=history)
    expect_shape({}, "history", history, "B N D")
    padding = (history == 0).all(dim=-1)  # [B, N]
    order = padding.byte().argsort(dim=1, stable=True)
    return history.gather(1, order.unsqueeze(-1).expand_as(history)), (~padding).sum(dim=1)


def replace_attention(model: nn.Module, max_len: int, rank: int, **options: object) -> PatchHandle:
    """Put an `LREAActivationUnit` in the place of every ActivationUnit of a torch-rechub model.

    Do it before an optimizer is made: an older one does not know the new parameters, `handle.added_parameters`.

    Args:
        model: a `torch_rechub.models.ranking.DIN`, or what holds one.
        max_len: the longest history, padding included.
        rank, options: as of `recattn.nn.LREA`; device and dtype are the units' own.

    Returns:
        A handle whose `restore()`, or the end of whose `with` block, puts the very same units back.

    Raises:
        ImportError: torch-rechub is not installed.
        ValueError: no ActivationUnit in the model, or options that do not fit.
    """

    def replacement(unit: nn.Module, name: str) -> LREAActivationUnit:
        weight = next(unit.parameters())
        own = {"device": weight.device, "dtype": weight.dtype}
        return LREAActivationUnit(unit.emb_dim, max_len, rank, **own, **options).train(unit.training)

    return patch(model, {_activation_unit(): replacement})


def _activation_unit() -> type[nn.Module]:
    try:
        from torch_rechub.models.ranking.din import ActivationUnit
    except ImportError as error:
        raise ImportError("recattn.integrations.torch_rechub needs torch-rechub: pip install torch-rechub") from error
    return ActivationUnit

"""Target attention over a whole history by DIN's activation unit (arXiv 1706.06978)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recattn._check import (
    expect,
    expect_choice,
    expect_index,
    expect_same_device,
    expect_same_dtype,
    expect_shape,
    expect_tensors,
)
from recattn._gather import gather_rows
from recattn.functional._autocast import autocast_inputs
from recattn.functional.validation import checked_indices


class TargetAttention(nn.Module):
    """DIN's attention: a behaviour k_l weighs for a target q what an MLP of the two says, called as `LREA` is:

        a(q, k) = MLP [q, k, q − k, q∘k]        the activation unit: linear layers, a PReLU between any two
        h = Σ_l a(q, k_l) k_l                   pooling="sum", DIN's, or "mean", the same over the number of behaviours
        h = Σ_l softmax_l(a(q, k_l)) k_l        pooling="softmax"

    The first layer is linear in k for a given q, so that nothing of width 4·embed_dim is computed for any pair:

        A q + B k + C (q − k) + D (q∘k) = (B − C + D diag(q)) k + (A + C) q

    For T targets of histories of length L this takes O(T·L·hidden) memory; where that is too much, call it with some of
    the targets at a time, which are independent of one another.

    Source: DIN (arXiv 1706.06978), whose sum without a softmax the default is; q∘k for its outer product is that of its
    public implementations.

    Args:
        embed_dim: of a target and of a behaviour.
        hidden: the widths of the MLP's hidden layers, at least one.
        pooling: "sum", "mean" or "softmax".
    """

    def __init__(
        self,
        embed_dim: int,
        hidden: Sequence[int] = (36,),
        *,
        pooling: str = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect(embed_dim > 0, "embed_dim", "at least 1", embed_dim)
        are_widths = isinstance(hidden, Sequence) and len(hidden) > 0 and min(hidden) > 0
        expect(are_widths, "hidden", "a sequence of widths, each at least 1, of one or more layers", hidden)
        expect_choice("pooling", pooling, ("sum", "mean", "softmax"))
        self.embed_dim, self.hidden, self.pooling = embed_dim, tuple(hidden), pooling

        options = {"device": device, "dtype": dtype}
        widths = pairwise((4 * embed_dim, *hidden, 1))
        self.layers = nn.ModuleList(nn.Linear(*pair, **options) for pair in widths)
        self.activations = nn.ModuleList(nn.PReLU(width, **options) for width in hidden)

    def forward(
        self,
        targets: Tensor,
        behaviors: Tensor,
        target_offsets: Tensor | None = None,
        *,
        seq_lens: Tensor | None = None,
    ) -> Tensor:
        """h of each target over the behaviours of its user, differentiable in all it takes.

        Args:
            targets: q [T, embed_dim] with target_offsets; without, [U, embed_dim], one a user, or [U, n, embed_dim]. In
                the dtype of the parameters, or autocast's.
            behaviors: k [U, L, embed_dim].
            target_offsets: [U + 1] integer, from 0 to T, never descending; user u owns the rows between two of them.
                Every target then gets a copy of its user's behaviours, in O(T·L·embed_dim) memory.
            seq_lens: [U] integer, how many behaviours of each user count; the rest is padding, where anything may
                stand. L by default.

        Returns:
            Of the targets' shape; zeros for a user without behaviours.

        Raises:
            ValueError: shapes, dtypes and devices that do not fit; on a CPU also offsets and lengths out of range.
        """
        target_offsets, seq_lens = self._checked_indices(targets, behaviors, target_offsets, seq_lens)
        targets, behaviors = autocast_inputs(targets, behaviors)
        expect_same_dtype("the parameters", self._first_layer()[0], targets=targets, behaviors=behaviors)
        if target_offsets is None:
            rows = targets if targets.dim() == 3 else targets.unsqueeze(1)
            return self._attend(rows, behaviors, seq_lens).view_as(targets)
        row = torch.arange(len(targets), device=targets.device)
        users = torch.searchsorted(target_offsets[1:].to(row.dtype), row, right=True)
        lengths = None if seq_lens is None else seq_lens[users]
        return self._attend(targets.unsqueeze(1), gather_rows(behaviors, users), lengths).squeeze(1)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, hidden={self.hidden}, pooling={self.pooling!r}"

    def _checked_indices(
        self, targets: Tensor, behaviors: Tensor, target_offsets: Tensor | None, seq_lens: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The offsets and lengths, of inputs that fit."""
        sizes = {"embed_dim": self.embed_dim}
        expect_tensors(targets=targets, behaviors=behaviors)
        expect_shape(sizes, "behaviors", behaviors, "U L embed_dim")
        if target_offsets is not None:
            expect_shape(sizes, "targets", targets, "T embed_dim")
            expect_index({"U+1": sizes["U"] + 1}, "target_offsets", target_offsets, "U+1")
        else:
            expect_shape(sizes, "targets", targets, "U n embed_dim" if targets.dim() == 3 else "U embed_dim")
        if seq_lens is not None:
            expect_index(sizes, "seq_lens", seq_lens, "U")
        others = {"targets": targets, "behaviors": behaviors, "target_offsets": target_offsets, "seq_lens": seq_lens}
        expect_same_device("the parameters", self.layers[0].weight, **others)
        indices = checked_indices(
            behaviors.device,
            target_offsets=target_offsets,
            num_targets=len(targets),
            seq_lens=seq_lens,
            seq_len=sizes["L"],
        )
        return indices.target_offsets, indices.seq_lens

    def _attend(self, targets: Tensor, behaviors: Tensor, seq_lens: Tensor | None) -> Tensor:
        """[U, n, d] targets, [U, L, d] behaviours -> [U, n, d]"""
        padding, lengths = None, behaviors.shape[1]
        if seq_lens is not None:
            lengths = seq_lens[:, None, None].clamp(min=1)
            padding = torch.arange(behaviors.shape[1], device=behaviors.device)[:, None] >= seq_lens[:, None, None]
            behaviors = behaviors.masked_fill(padding, 0)  # which adds nothing, whatever it weighs
        weights = self._activations(targets, behaviors)
        if self.pooling == "mean":
            weights = weights / lengths
        elif self.pooling == "softmax":
            if padding is not None:
                # Not -inf: of a user without behaviours that would be NaN, in the gradient too.
                weights = weights.masked_fill(padding, torch.finfo(weights.dtype).min)
            weights = weights.softmax(dim=1)
        return weights.mT @ behaviors  # [U, L, n]ᵀ [U, L, d]

    def _activations(self, targets: Tensor, behaviors: Tensor) -> Tensor:
        """a [U, L, n] of every behaviour and target."""
        weight, bias = self._first_layer()
        of_q, of_k, of_difference, of_product = weight.chunk(4, dim=1)  # [units, d] each
        matrices = (of_k - of_difference) + of_product * targets[:, :, None]  # [U, n, units, d]
        offsets = F.linear(targets, of_q + of_difference, bias)  # [U, n, units]
        x = (behaviors @ matrices.flatten(1, 2).mT).unflatten(-1, offsets.shape[1:]) + offsets[:, None]
        shape = x.shape[:-1]  # [U, L, n], x [U, L, n, units]
        x = x.flatten(0, -2)
        for activation, layer in zip(self.activations, self.layers[1:], strict=True):
            x = layer(F.prelu(x, activation.weight.to(x.dtype)))
        return x.view(shape)

    def _first_layer(self) -> tuple[Tensor, Tensor]:
        return autocast_inputs(self.layers[0].weight, self.layers[0].bias)

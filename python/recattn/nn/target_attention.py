"""Target attention over a whole history with DIN's activation unit (arXiv 1706.06978)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

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
from recattn._typing import Pooling
from recattn.functional._autocast import autocast_inputs
from recattn.functional.validation import checked_indices
from recattn.nn._constructor_checks import expect_positive


class TargetAttention(nn.Module):
    """DIN's attention: an MLP of target q and behaviour k_l gives the weight of the behaviour. Called like `LREA`:

        a(q, k) = MLP [q, k, q − k, q∘k]        the activation unit: linear layers with PReLU between them
        h = Σ_l a(q, k_l) k_l                   pooling="sum" (DIN's); "mean" divides by the number of behaviours
        h = Σ_l softmax_l(a(q, k_l)) k_l        pooling="softmax"

    For a given q the first layer is linear in k, so the concatenation of width 4·embed_dim is never formed:

        A q + B k + C (q − k) + D (q∘k) = (B − C + D diag(q)) k + (A + C) q

    T targets with histories of length L take O(T·L·hidden) memory. If that is too much, pass fewer targets per call:
    targets do not depend on each other.

    Source: DIN (arXiv 1706.06978), which sums without a softmax. q∘k in place of the paper's outer product is what its
    public implementations compute.

    Args:
        embed_dim: width of a target and of a behaviour.
        hidden: widths of the MLP's hidden layers, at least one.
        pooling: "sum", "mean" or "softmax".
    """

    def __init__(
        self,
        embed_dim: int,
        hidden: Sequence[int] = (36,),
        *,
        pooling: Pooling = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_positive(embed_dim=embed_dim)
        are_widths = isinstance(hidden, Sequence) and len(hidden) > 0 and min(hidden) > 0
        expect(are_widths, "hidden", "a sequence of widths, each at least 1, of one or more layers", hidden)
        expect_choice("pooling", pooling, ("sum", "mean", "softmax"))
        self.embed_dim, self.hidden = embed_dim, tuple(hidden)
        self.pooling: Pooling = pooling

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
        """h of each target over the behaviours of its user, differentiable in every input and parameter.

        Args:
            targets: q [T, embed_dim] with target_offsets; without them [U, embed_dim], one per user, or
                [U, n, embed_dim]. In the dtype of the parameters, unless autocast casts both.
            behaviors: k [U, L, embed_dim].
            target_offsets: [U + 1] integer, from 0 to T, never descending; user u has the rows
                target_offsets[u]:target_offsets[u + 1] of `targets`. Each target then gets a copy of its user's
                behaviours, in O(T·L·embed_dim) memory.
            seq_lens: [U] integer, the number of behaviours per user; the rest is padding and may hold anything. L by
                default.

        Returns:
            h, in the shape of `targets`; zeros for a user without behaviours.

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU also offsets or lengths out of range.
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
        """Check all inputs; return the offsets and lengths."""
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
        expect_same_device("the parameters", self._layer(0).weight, **others)
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
            behaviors = behaviors.masked_fill(padding, 0)  # adds 0 to h for any weight
        weights = self._activations(targets, behaviors)
        if self.pooling == "mean":
            weights = weights / lengths
        elif self.pooling == "softmax":
            if padding is not None:
                # Not -inf: for a user without behaviours the softmax and its gradient would be NaN.
                weights = weights.masked_fill(padding, torch.finfo(weights.dtype).min)
            weights = weights.softmax(dim=1)
        return weights.mT @ behaviors  # [U, L, n]ᵀ [U, L, d]

    def _activations(self, targets: Tensor, behaviors: Tensor) -> Tensor:
        """a(q, k) for every behaviour and target, [U, L, n]."""
        weight, bias = self._first_layer()
        a, b, c, d = weight.chunk(4, dim=1)  # [units, d] each, as in the class docstring
        matrices = (b - c) + d * targets[:, :, None]  # [U, n, units, d]
        offsets = F.linear(targets, a + c, bias)  # [U, n, units]
        x = (behaviors @ matrices.flatten(1, 2).mT).unflatten(-1, offsets.shape[1:]) + offsets[:, None]
        shape = x.shape[:-1]  # [U, L, n], x [U, L, n, units]
        x = x.flatten(0, -2)
        for activation, layer in zip(self.activations, self.layers[1:], strict=True):
            x = layer(F.prelu(x, cast("nn.PReLU", activation).weight.to(x.dtype)))
        return x.view(shape)

    def _first_layer(self) -> tuple[Tensor, Tensor]:
        return autocast_inputs(self._layer(0).weight, self._layer(0).bias)

    def _layer(self, index: int) -> nn.Linear:
        return cast("nn.Linear", self.layers[index])

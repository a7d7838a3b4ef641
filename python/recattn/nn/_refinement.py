"""The learned matrices of `refined_attention`, as a mixin for modules."""

from typing import Any

import torch
from torch import Tensor, nn

from recattn import reference
from recattn._check import expect, expect_choice
from recattn._typing import Mechanism, RefinedAttentionImpl, Source
from recattn.functional import refined_attention
from recattn.functional._autocast import autocast_inputs
from recattn.nn._constructor_checks import expect_positive
from recattn.nn._projections import identity_values


class Refinement:
    """Mixin that gives an nn.Module the parameters `w_q`, `w_k` and, for "value" and "additive", `w_v`."""

    def _add_refinement(
        self,
        num_heads: int,
        max_len: int,
        *,
        mechanism: Mechanism,
        source: Source,
        rank: int | None,
        per_head: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        expect_choice("mechanism", mechanism, ("simple", "value", "additive", "stochastic"))
        expect_choice("source", source, ("logits", "weights"))
        expect(isinstance(max_len, int) and max_len > 0, "max_len", "an integer of at least 1", max_len)
        rank = max_len if rank is None else rank
        expect_positive(rank=rank)
        self.max_len, self.rank, self.per_head = max_len, rank, per_head
        self.mechanism: Mechanism = mechanism
        self.source: Source = source

        options = {"device": device, "dtype": dtype}
        heads = (num_heads,) if per_head else ()
        columns = 2 * rank if mechanism == "stochastic" else rank
        self.w_q = nn.Parameter(torch.empty(*heads, max_len, columns, **options))
        self.w_k = nn.Parameter(torch.empty(*heads, max_len, columns, **options))
        has_values = mechanism in ("value", "additive")
        self.w_v = nn.Parameter(torch.empty(*heads, max_len, max_len, **options)) if has_values else None

    def _reset_refinement(self) -> None:
        """Draw normal matrices with which M starts about as flat as in plain attention, whatever R is.

        A row of A W sums about N rows of W for source="logits", and averages them for source="weights".
        """
        std = self.max_len**-0.5 if self.source == "logits" else 1.0
        for matrix in self._matrices():
            nn.init.normal_(matrix, std=std)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        masks: dict[str, Any],
        dropout_p: float,
        impl: RefinedAttentionImpl | None,
    ) -> Tensor:
        options = {**self._mechanism_options, **masks, "dropout_p": dropout_p, "impl": impl}
        return refined_attention(q, k, v, *self._matrices(), **options)

    def _attention_weights(self, q: Tensor, k: Tensor, masks: dict[str, Any]) -> Tensor:
        """softmax(mask(M)), [B, H, N, N], before dropout."""
        q, k, *matrices = autocast_inputs(q, k, *self._matrices())
        return reference.refined_attention(q, k, identity_values(k), *matrices, **self._mechanism_options, **masks)

    @property
    def _mechanism_options(self) -> dict[str, Any]:
        return {"mechanism": self.mechanism, "source": self.source}

    def _matrices(self) -> list[Tensor]:
        return [w for w in (self.w_q, self.w_k, self.w_v) if w is not None]

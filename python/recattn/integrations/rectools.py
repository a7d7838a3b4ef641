"""Refined attention in RecTools' SASRec, through its own `transformer_layers_type`."""

import functools
from typing import Any

from torch import Tensor, nn

from recattn._check import expect
from recattn.integrations.patching import patch
from recattn.nn import RefinedSelfAttention

try:
    from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers
except ImportError as error:
    raise ImportError(
        f"recattn.integrations.rectools needs RecTools (pip install 'rectools[torch]'): {error}"
    ) from error


class RefinedSASRecLayers(SASRecTransformerLayers):
    """RecTools' SASRecTransformerLayers with `recattn.nn.RefinedSelfAttention` for nn.MultiheadAttention:

        SASRecModel(
            session_max_len=50,
            transformer_layers_type=RefinedSASRecLayers,
            transformer_layers_kwargs={"max_len": 50, "mechanism": "simple"},
        )

    Padding, which RecTools puts on the left, is always hidden; its own layers let every token attend to it unless
    `use_key_padding_mask` is set, which here it must not be. At the start of a training RecTools draws every matrix
    anew (Xavier, normal), those of the refinement among them. Tried with RecTools 0.19.0.

    Args:
        n_blocks, n_factors, n_heads, dropout_rate: as RecTools gives them.
        max_len: the most tokens of a sequence, the model's `session_max_len`.
        refinement: `mechanism`, `source`, `rank`, `per_head` and `impl` of `recattn.nn.RefinedSelfAttention`.
    """

    def __init__(
        self, n_blocks: int, n_factors: int, n_heads: int, dropout_rate: float, *, max_len: int, **refinement: Any
    ) -> None:
        super().__init__(n_blocks, n_factors, n_heads, dropout_rate)
        refined = functools.partial(RefinedSelfAttention, max_len=max_len, padding_side="left", **refinement)
        patch(self, {nn.MultiheadAttention: refined})

    def forward(
        self,
        seqs: Tensor,
        timeline_mask: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        **kwargs: Any,
    ) -> Tensor:
        """
        Args:
            seqs: [B, N, n_factors].
            timeline_mask: [B, N, 1] bool, False at padding.
            attn_mask: None, or the causal mask [N, N].
            key_padding_mask: not looked at, for `timeline_mask` says it.

        Raises:
            ValueError: a model with use_key_padding_mask, whose masks are merged into one; shapes that do not fit.
        """
        merged = attn_mask is not None and attn_mask.dim() == 3
        expect(not merged, "use_key_padding_mask", "False: the padding is hidden without it", True)
        seqs = seqs.where(timeline_mask, 0)  # RecTools multiplies by the mask, which leaves NaN
        return super().forward(seqs, timeline_mask, attn_mask, ~timeline_mask.squeeze(-1), **kwargs)

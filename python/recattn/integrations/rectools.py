"""Refined attention in RecTools' SASRec, as a `transformer_layers_type`."""

import functools
from typing import Any

from torch import Tensor, nn

from recattn._check import expect
from recattn._imports import importing
from recattn.integrations.patching import patch
from recattn.nn import RefinedSelfAttention
from recattn.nn._masks import read_windows

with importing("RecTools", module="rectools", extra="rectools"):
    from rectools.models.nn.transformers.sasrec import (  # pyright: ignore[reportMissingImports] (not in dev.txt)
        SASRecTransformerLayers,
    )


class _BlockAttention(RefinedSelfAttention):
    """Takes padding as `seq_lens`: the query of RecTools' blocks is a norm of the keys, which would count as a
    cross-attention in a model without a causal mask."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor, **kwargs: Any) -> Any:
        batch, length, _ = query.shape
        windows = read_windows(key_padding_mask, batch, length)
        lengths = {"seq_lens": windows.seq_lens, "seq_starts": windows.seq_starts}
        return super().forward(query, key, value, **lengths, **kwargs)


class RefinedSASRecLayers(SASRecTransformerLayers):
    """RecTools' SASRecTransformerLayers with `recattn.nn.RefinedSelfAttention` in place of nn.MultiheadAttention:

        SASRecModel(
            session_max_len=50,
            transformer_layers_type=RefinedSASRecLayers,
            transformer_layers_kwargs={"max_len": 50, "mechanism": "simple"},
        )

    Padding is always hidden; RecTools puts it on the left. (RecTools' own layers hide it only with
    `use_key_padding_mask`, which must not be set here.) When training starts, RecTools draws all matrices anew (Xavier,
    normal), including those of the refinement. Tested with RecTools 0.19.0.

    Args:
        n_blocks, n_factors, n_heads, dropout_rate: passed by RecTools.
        max_len: the longest sequence, `session_max_len` of the model.
        refinement: `mechanism`, `source`, `rank`, `per_head` and `impl` of `recattn.nn.RefinedSelfAttention`.
    """

    def __init__(
        self, n_blocks: int, n_factors: int, n_heads: int, dropout_rate: float, *, max_len: int, **refinement: Any
    ) -> None:
        super().__init__(n_blocks, n_factors, n_heads, dropout_rate)
        refined = functools.partial(_BlockAttention, max_len=max_len, **refinement)
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
            key_padding_mask: ignored, `timeline_mask` is used.

        Raises:
            ValueError: the model has use_key_padding_mask (its masks are merged into one), or a shape does not match.
        """
        merged = attn_mask is not None and attn_mask.dim() == 3
        expect(not merged, "use_key_padding_mask", "False: the padding is hidden without it", True)
        seqs = seqs.where(timeline_mask, 0)  # RecTools multiplies by the mask, which keeps NaN
        return super().forward(seqs, timeline_mask, attn_mask, ~timeline_mask.squeeze(-1), **kwargs)

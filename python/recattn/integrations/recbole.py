"""Refined attention in RecBole's sequential models: SASRec, BERT4Rec and others with its TransformerEncoder."""

from typing import Any

from torch import Tensor, nn

from recattn._check import expect_same_device, expect_shape, expect_tensors
from recattn._imports import importing
from recattn._typing import Mechanism, PaddingSide, RefinedAttentionImpl, Source
from recattn._warnings import warn_of_change
from recattn.functional.validation import expect_values, values_are_checked
from recattn.integrations.patching import PatchHandle, patch
from recattn.nn._masks import find_windows
from recattn.nn._refinement import Refinement
from recattn.reference.sink_attention import valid_tokens

_HIDDEN = -10000.0  # RecBole's value for hidden keys, where others use -inf


def patch_recbole(
    model: nn.Module,
    *,
    max_len: int | None = None,
    **options: Any,
) -> PatchHandle:
    """Replace every recbole.model.layers.MultiHeadAttention in a model with a `RefinedMultiHeadAttention`.

    Call it between building the model and building its trainer, so that the optimizer gets the new matrices. RecBole's
    classes are not changed, and the handle undoes the replacement. Tested with SASRec and BERT4Rec of RecBole 1.2.1.

    Args:
        model: a RecBole model, or any module with its TransformerEncoder.
        max_len: the longest sequence; the model's `max_seq_length` by default.
        options: `mechanism`, `source`, `rank`, `per_head` and `impl` of `RefinedMultiHeadAttention`.

    Raises:
        ImportError: RecBole is not installed, or a module that it imports.
        ValueError: the model has no such module or no `max_len`, or an option is not supported.
    """
    with importing("RecBole", module="recbole", extra="recbole"):
        from recbole.model.layers import MultiHeadAttention
    max_len = getattr(model, "max_seq_length", None) if max_len is None else max_len
    if max_len is None:
        raise ValueError("max_len must be given for a model without max_seq_length, got None")
    longest = max_len

    def refined(old: nn.Module, name: str) -> nn.Module:
        return RefinedMultiHeadAttention(old, longest, **options)

    return patch(model, {MultiHeadAttention: refined})


class RefinedMultiHeadAttention(Refinement, nn.Module):
    """RecBole's MultiHeadAttention with the weights of `recattn.refined_attention`:

        Q, K, V = heads of query(X), key(X), value(X)
        output  = LayerNorm(X + dropout(dense(concat over heads of softmax(mask(M)) V)))

    M is Q Kᵀ/√D refined by the learned matrices `w_q`, `w_k` and, for "value" and "additive", `w_v`; see
    `recattn.nn.RefinedSelfAttention`.

    Args:
        attention: the recbole.model.layers.MultiHeadAttention to replace. Its layers, with their parameters and dropout
            probabilities, are shared.
        max_len: the longest sequence.
        mechanism, source, rank, per_head, impl: as in `recattn.nn.RefinedSelfAttention`.
        padding_side: deprecated; the mask says where the padding is.
    """

    def __init__(
        self,
        attention: Any,
        max_len: int,
        *,
        mechanism: Mechanism = "simple",
        source: Source = "logits",
        rank: int | None = None,
        per_head: bool = False,
        padding_side: PaddingSide | None = None,
        impl: RefinedAttentionImpl | None = None,
    ) -> None:
        super().__init__()
        if padding_side is not None:
            warn_of_change("padding_side goes in the next release: the mask says where the padding is; leave it out")
        self.num_heads: int = attention.num_attention_heads
        self.impl: RefinedAttentionImpl | None = impl
        self.query, self.key, self.value = attention.query, attention.key, attention.value
        self.attn_dropout: nn.Dropout = attention.attn_dropout
        self.dense: nn.Linear = attention.dense
        self.out_dropout, self.LayerNorm = attention.out_dropout, attention.LayerNorm
        refinement: dict[str, Any] = {"mechanism": mechanism, "source": source, "rank": rank, "per_head": per_head}
        weight = attention.dense.weight
        self._add_refinement(self.num_heads, max_len, **refinement, device=weight.device, dtype=weight.dtype)
        self._reset_refinement()
        self.train(attention.training)

    def forward(self, input_tensor: Tensor, attention_mask: Tensor) -> Tensor:
        """
        Args:
            input_tensor: X, [B, N, E].
            attention_mask: RecBole's mask, 0 where visible and -10000 where hidden: [B, 1, N, N] if causal,
                [B, 1, 1, N] if every token sees all others. Both hide padding.

        Returns:
            [B, N, E]; at padding, where X may hold anything, LayerNorm(dropout(dense.bias)).

        Raises:
            ValueError: a shape does not match; on a CPU (elsewhere under RECATTN_CHECK=1) also another kind of mask.
        """
        expect_tensors(input_tensor=input_tensor)
        expect_shape({"E": self.dense.in_features}, "input_tensor", input_tensor, "B N E")
        masks, valid = read_attention_mask(attention_mask, input_tensor)
        input_tensor = input_tensor.where(valid[..., None], 0)  # NaN would reach gradients, also through the residual
        q, k, v = (self._split_heads(project(input_tensor)) for project in (self.query, self.key, self.value))
        dropout_p = self.attn_dropout.p if self.training else 0.0
        heads = self._attend(q, k, v, masks, dropout_p, self.impl)
        out = self.dense(heads.transpose(1, 2).flatten(-2))
        return self.LayerNorm(self.out_dropout(out) + input_tensor)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, max_len={self.max_len}, rank={self.rank}, mechanism={self.mechanism!r}, "
            f"source={self.source!r}, per_head={self.per_head}"
        )

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, N, E] -> [B, H, N, D]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def read_attention_mask(attention_mask: Tensor, x: Tensor) -> tuple[dict[str, Any], Tensor]:
    """RecBole's mask over the tokens x [B, N, E] as the operator's arguments, and the valid tokens [B, N]."""
    batch, length, _ = x.shape
    expect_tensors(attention_mask=attention_mask)
    expect_shape({"B": batch, "N": length}, "attention_mask", attention_mask, "B 1 1|N N")
    expect_same_device("input_tensor", x, attention_mask=attention_mask)
    hidden = attention_mask[:, 0] != 0  # [B, 1 or N, N]
    causal = length > 1 and hidden.shape[1] == length
    windows = find_windows(~hidden[:, -1])  # the last query sees all but the padding
    if values_are_checked(x.device):
        expect_values(
            ~hidden | (attention_mask[:, 0] == _HIDDEN),
            f"attention_mask must be 0 where visible and {_HIDDEN:.0f} where hidden",
            lambda row, i, j: attention_mask[row, 0, i, j].item(),
        )
        expected = ~valid_tokens(batch, length, windows.seq_lens, windows.seq_starts, x.device)[:, None]  # [B, 1, N]
        if causal:
            expected = expected | hidden.new_ones(length, length).triu(diagonal=1)
        hideable = f"{'later keys and ' if causal else ''}padding before and after the tokens"
        expect_values(
            hidden == expected,
            f"attention_mask must hide {hideable} and no other key",
            lambda row, i, j: (
                f"one that {'hides' if hidden[row, i, j] else 'shows'} key {j} "
                f"{'from' if hidden[row, i, j] else 'to'} query {i} of sequence {row}"
            ),
        )
    return {"causal": causal, "seq_lens": windows.seq_lens, "seq_starts": windows.seq_starts}, windows.valid

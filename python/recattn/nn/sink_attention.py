"""Attention with a bias between sink tokens (CTR-Sink), in the place of nn.MultiheadAttention."""

import functools

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn import reference
from recattn._check import expect
from recattn.functional import sink_attention
from recattn.nn._masks import padded_keys
from recattn.nn._projections import MultiheadProjections, identity_values
from recattn.ops.sink_attention import no_sinks


class SinkAttention(MultiheadProjections):
    """`recattn.sink_attention` between the projections of nn.MultiheadAttention, whose place it takes:

        Q, K, V = heads of (query W_Qᵀ + b_Q), (key W_Kᵀ + b_K), (value W_Vᵀ + b_V)
        output  = concat over heads of softmax(mask(Q Kᵀ/√D) + β) V, times W_Oᵀ, + b_O

    with β the bias between sink tokens that a call brings, 0 without one; see `recattn.sink_attention`, and
    `recattn.inter_sink_bias` for the bias of CTR-Sink (arXiv 2508.03668).

    The state_dict is that of nn.MultiheadAttention. With `num_kv_heads` W_K and W_V, the last rows of
    `in_proj_weight`, have num_kv_heads · D rows each.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first, device, dtype: as of nn.MultiheadAttention, but that
            `batch_first` defaults to True.
        num_kv_heads: heads of keys and values, each shared by num_heads / num_kv_heads of the queries'.
        padding_side: where `key_padding_mask` and `seq_lens` have the padding of a self-attention.
        impl: as of `recattn.sink_attention`.
    """

    cross_attends = True

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        padding_side: str = "right",
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
            padding_side=padding_side,
            impl=impl,
            device=device,
            dtype=dtype,
        )
        self.reset_parameters()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        sink_positions: Tensor | None = None,
        inter_sink_bias: Tensor | None = None,
        seq_lens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """nn.MultiheadAttention's arguments and results.

        Args:
            query, key, value: [B, Nq, E] and twice [B, Nk, E], or [Nq, B, E] ... with batch_first=False. It is a
                self-attention, with Nq = Nk = N, where key is query itself, or sinks or `seq_lens` are given; else
                queries and keys may be other tokens.
            key_padding_mask: [B, Nk], True (or -inf, else 0) at padding. In a self-attention it is on one side, and
                the queries' too; `seq_lens` without it spares the conversion. Else it is the keys' alone. Padding may
                hold anything, NaN too: it reaches neither the output nor a gradient, and its own gradients are zero.
            need_weights: also return the softmax, through the reference, before dropout.
            attn_mask: None, or the causal mask [Nq, Nk], True (or -inf, else 0) above the diagonal. Without it, and
                without `is_causal`, every query sees every token.
            average_attn_weights: the mean of the weights over the heads.
            is_causal: query i sees the tokens j ≤ i; an `attn_mask` besides is then taken for that without a look.
            sink_positions: [B, M] integer, where the sinks stand on the N axis, of queries as of keys, ascending,
                padded with -1 at the end.
            inter_sink_bias: [B, 1 or H, M, M], added to the scores between them. Both, or neither: plain attention.
            seq_lens: [B] integer, the valid tokens of each sequence, of queries as of keys.

        Returns:
            The output, of query's shape, `out_proj.bias` at queries that are padding or see no key; and None, or the
            weights, [B, Nq, Nk] or [B, H, Nq, Nk], zero there.

        Raises:
            ValueError: shapes, dtypes and devices that do not fit; on a CPU (elsewhere under RECATTN_CHECK=1) also a
                mask that is neither causal nor padding on `padding_side`, and positions out of order or range.
            NotImplementedError: an `impl` that cannot serve the call. Keys of another length, or padded beside a query
                that is another tensor, go through PyTorch's own attention: `impl` must be None.
        """
        given = sink_positions is not None
        expect((inter_sink_bias is not None) == given, "inter_sink_bias", "given with sink_positions", "one of them")
        same_tokens = key is query or given or seq_lens is not None
        batch, queries, keys = self._expect_inputs(query, key, value, same_tokens)
        if not same_tokens and (queries != keys or key_padding_mask is not None):
            valid = None if key_padding_mask is None else ~padded_keys(key_padding_mask, batch, keys)
            masks = self._read_cross_masks(queries, keys, valid, attn_mask, is_causal)
            if valid is not None:
                key, value = self._zero_padding(valid, key, value)
            return self._cross_attend(*self._project(query, key, value), masks, need_weights, average_attn_weights)
        visible = self._read_masks(batch, queries, key_padding_mask, attn_mask, is_causal, seq_lens)
        q, k, v = self._project(*self._without_padding(visible, query, key, value))
        if not given:
            sink_positions, inter_sink_bias = no_sinks(q)
        heads = sink_attention(
            q, k, v, sink_positions, inter_sink_bias, **visible, dropout_p=self._dropout_p, impl=self.impl
        )
        out = self._output(heads)
        if not need_weights:
            return out, None
        weights = reference.sink_attention(q, k, identity_values(k), sink_positions, inter_sink_bias, **visible)
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def _cross_attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: dict[str, object], need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """By PyTorch: the operators have one length and one padding for queries and keys."""
        if self.impl is not None:
            raise NotImplementedError(
                f"SinkAttention cannot run impl={self.impl!r} here: PyTorch attends where keys have another length, or "
                "padding beside a query that is another tensor (of the same tokens: give seq_lens)"
            )
        attend = functools.partial(F.scaled_dot_product_attention, q, k, enable_gqa=True, **masks)
        out = self._output(attend(v, dropout_p=self._dropout_p))
        if not need_weights:
            return out, None
        weights = attend(identity_values(k))
        return out, weights.mean(dim=1) if average else weights

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"padding_side={self.padding_side!r}, dropout={self.dropout}, batch_first={self.batch_first}"
        )

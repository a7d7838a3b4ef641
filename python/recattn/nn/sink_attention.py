"""Attention with a bias between sink tokens (CTR-Sink), as a replacement for nn.MultiheadAttention."""

import functools
from typing import Any

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn import reference
from recattn._check import expect
from recattn.functional import sink_attention
from recattn.functional._nested import accepts_nested
from recattn.nn._masks import read_padding_mask
from recattn.nn._projections import MultiheadProjections, identity_values, nest_output
from recattn.nn._sequences import Sequences


class SinkAttention(MultiheadProjections):
    """nn.MultiheadAttention with `recattn.sink_attention` as its attention:

        Q, K, V = heads of (query W_Qᵀ + b_Q), (key W_Kᵀ + b_K), (value W_Vᵀ + b_V)
        output  = concat over heads of softmax(mask(Q Kᵀ/√D) + β) V, times W_Oᵀ, + b_O

    β is the bias between sink tokens, an argument of each call; without it β is 0. See `recattn.sink_attention` for the
    attention and `recattn.inter_sink_bias` for the bias of CTR-Sink (arXiv 2508.03668).

    The state_dict is that of nn.MultiheadAttention. With `num_kv_heads`, W_K and W_V (the last rows of
    `in_proj_weight`) have num_kv_heads · D rows each.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first, device, dtype: as in nn.MultiheadAttention, except that
            `batch_first` is True by default.
        num_kv_heads: heads of keys and values, each shared by num_heads / num_kv_heads query heads. num_heads by
            default.
        padding_side: "right" (default) or "left", the side of the padding where only `seq_lens` says how long the
            sequences are.
        impl: as in `recattn.sink_attention`.
    """

    cross_attends = True

    @accepts_nested("query", "key", "value", ragged_axis=1, nest=nest_output)
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
        seq_starts: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward, with sinks.

        Args:
            query, key, value: [B, Nq, E], [B, Nk, E] and [B, Nk, E], or [Nq, B, E] ... with batch_first=False; packed
                [T, E]; or nested. The call is a self-attention, with Nq = Nk = N, if key is query itself, or if sinks,
                `seq_lens` or `cu_seqlens` are given; otherwise the keys may be other tokens than the queries.
            key_padding_mask: [B, Nk], True (or -inf, else 0) at padding. In a self-attention the tokens of a row have
                no gap, wherever they begin, and the mask applies to the queries too; `seq_lens` instead of it saves the
                conversion. In a cross-attention it applies to the keys only. Padding may hold anything, NaN included:
                it changes neither the output nor a gradient, and its own gradients are zero.
            need_weights: also return the softmax before dropout, computed by the reference; not if packed.
            attn_mask: None, or the causal mask [Nq, Nk], True (or -inf, else 0) above the diagonal. Without it and
                without `is_causal`, every query sees every token.
            average_attn_weights: average the returned weights over the heads.
            is_causal: query i sees the tokens j ≤ i. An `attn_mask` is then assumed to be causal and not checked.
            sink_positions: [B, M] integer, positions of the sinks on the N axis (packed: within their sequence), for
                queries and keys alike, ascending, padded with -1 at the end.
            inter_sink_bias: [B, 1 or H, M, M], added to the scores between sinks. Give both or neither; without them
                it is plain attention.
            seq_lens: [B] integer, the number of valid tokens per sequence, for queries and keys alike.
            seq_starts: [B] integer, the position of the first valid token of each; without it the padding is on the
                `padding_side` of the module.
            cu_seqlens: [B + 1] integer, offsets of packed sequences in inputs [T, E]; excludes masks and `seq_lens`.
                Nested inputs [B, j, E] (layout torch.jagged) need none of these, and the output is nested.
            max_seqlen: upper bound on the lengths of packed sequences, known on the host.

        Returns:
            The output, in query's shape, equal to `out_proj.bias` at queries that are padding or see no key; and None
            or the weights, [B, Nq, Nk] or [B, H, Nq, Nk], zero at those queries.

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU (elsewhere under RECATTN_CHECK=1) also a mask
                that is neither causal nor padding around the tokens, or positions out of order or range.
            NotImplementedError: `impl` does not support the call. PyTorch's attention runs, and `impl` must be None,
                if the keys have another length than the queries, or have padding and query is another tensor.
        """
        given = sink_positions is not None
        expect((inter_sink_bias is not None) == given, "inter_sink_bias", "given with sink_positions", "one of them")
        packed = cu_seqlens is not None
        expect(not (packed and need_weights), "need_weights", "False with packed sequences", need_weights)
        same_tokens = key is query or given or seq_lens is not None or packed
        sizes = self._expect_inputs(query, key, value, same_tokens=same_tokens, packed=packed)
        if not same_tokens:
            queries, keys = sizes["Nq"], sizes["Nk"]
            if queries != keys or key_padding_mask is not None:
                valid = None if key_padding_mask is None else ~read_padding_mask(key_padding_mask, sizes["B"], keys)
                masks = self._read_cross_masks(queries, keys, valid, attn_mask, is_causal)
                key, value = self._zero_padding(valid, key, value)
                heads = self._project_inputs(query, key, value)
                return self._cross_attend(*heads, masks, need_weights, average_attn_weights)
            sizes["N"] = queries
        sequences = Sequences(seq_lens, seq_starts, cu_seqlens, max_seqlen)
        masks, valid = self._read_masks(sizes, key_padding_mask, attn_mask, is_causal, sequences)
        query, key, value = self._zero_padding(valid, query, key, value)
        q, k, v = self._project_inputs(query, key, value)
        sinks = sink_positions, inter_sink_bias
        heads = sink_attention(q, k, v, *sinks, **masks, dropout_p=self._dropout_p, impl=self.impl)
        out = self._project_output(heads)
        if not need_weights:
            return out, None
        weights = reference.sink_attention(q, k, identity_values(k), *sinks, **masks)
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def _cross_attend(
        self, q: Tensor, k: Tensor, v: Tensor, masks: dict[str, Any], need_weights: bool, average: bool
    ) -> tuple[Tensor, Tensor | None]:
        """PyTorch's attention: the operators need the same length and padding for queries and keys."""
        if self.impl is not None:
            raise NotImplementedError(
                f"SinkAttention cannot run impl={self.impl!r} here: PyTorch attends where keys have another length, or "
                "padding beside a query that is another tensor (of the same tokens: give seq_lens)"
            )
        attend = functools.partial(F.scaled_dot_product_attention, q, k, enable_gqa=True, **masks)
        out = self._project_output(attend(v, dropout_p=self._dropout_p))
        if not need_weights:
            return out, None
        weights = attend(identity_values(k))
        return out, weights.mean(dim=1) if average else weights

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, "
            f"padding_side={self.padding_side!r}, dropout={self.dropout}, batch_first={self.batch_first}"
        )

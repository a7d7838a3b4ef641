"""Self-attention with refined weights (AWRSR, arXiv 2410.21048), as a replacement for nn.MultiheadAttention."""

import torch
from torch import Tensor

from recattn._check import expect
from recattn._typing import Mechanism, PaddingSide, RefinedAttentionImpl, Source
from recattn.functional._keywords import explain_keywords
from recattn.functional._nested import accepts_nested
from recattn.nn._constructor_checks import takes_max_len_by_name
from recattn.nn._projections import MultiheadProjections, nest_output
from recattn.nn._refinement import Refinement
from recattn.nn._sequences import Sequences


class RefinedSelfAttention(Refinement, MultiheadProjections):
    """nn.MultiheadAttention with `recattn.refined_attention` as its attention:

        Q, K, V = heads of (query W_Qᵀ + b_Q), (key W_Kᵀ + b_K), (value W_Vᵀ + b_V)
        output  = concat over heads of softmax(mask(M)) V, times W_Oᵀ, + b_O

    M is A = Q Kᵀ/√D refined by the learned matrices `w_q`, `w_k` and, for "value" and "additive", `w_v`. See
    `recattn.refined_attention` for the formula of M and for which parts are our reading of AWRSR (arXiv 2410.21048).

    `in_proj_weight`, `in_proj_bias` and `out_proj` are those of nn.MultiheadAttention. Its state_dict loads with
    `strict=False`, which then reports only the refinement's matrices as missing.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first, device, dtype: as in nn.MultiheadAttention, except that
            `batch_first` is True by default.
        max_len: the longest sequence. A row of a matrix belongs to a position on the N axis.
        mechanism: "simple", "value", "additive" or "stochastic".
        source: "logits", or "weights" to refine softmax(mask(Q Kᵀ/√D)) instead.
        rank: R, the columns of `w_q` and `w_k` (half of them for "stochastic"); `max_len` by default, as in the paper.
        per_head: one set of matrices per head instead of one shared by all.
        padding_side: "left" (as in SASRec) or "right", the side of the padding where only `seq_lens` says how long the
            sequences are. Without it that is "left", with a warning, and "right" from the next release on.
        impl: as in `recattn.refined_attention`.
    """

    cross_attends = False

    @takes_max_len_by_name
    @explain_keywords
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        max_len: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        mechanism: Mechanism = "simple",
        source: Source = "logits",
        rank: int | None = None,
        per_head: bool = False,
        padding_side: PaddingSide | None = None,
        impl: RefinedAttentionImpl | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            bias=bias,
            batch_first=batch_first,
            padding_side=padding_side,
            impl=impl,
            **options,
        )
        refinement = {"mechanism": mechanism, "source": source, "rank": rank, "per_head": per_head}
        self._add_refinement(num_heads, max_len, **refinement, **options)
        self._reset_refinement()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._reset_refinement()

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
        seq_lens: Tensor | None = None,
        seq_starts: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward, for self-attention.

        Args:
            query, key, value: [B, N, E], or [N, B, E] with batch_first=False; packed [T, E]; or nested: computed from
                the same tokens. If key is not query itself, give a causal mask, `seq_lens` or `cu_seqlens`; without one
                the call counts as a cross-attention and is an error, because a row of A is both a query and a key of
                the refinement.
            key_padding_mask: [B, N], True (or -inf, else 0) at padding. The tokens of a row have no gap, wherever they
                begin: their position on the N axis chooses the rows of the matrices. `seq_lens` instead of it saves the
                conversion. Padding may hold anything, NaN included: it changes neither the output nor a gradient, and
                its own gradients are zero.
            need_weights: also return softmax(mask(M)) before dropout, computed by the reference; not if packed.
            attn_mask: None, or the causal mask [N, N], True (or -inf, else 0) above the diagonal. Without it and
                without `is_causal`, every query sees every token.
            average_attn_weights: average the returned weights over the heads.
            is_causal: query i sees the tokens j ≤ i. An `attn_mask` is then assumed to be causal and not checked.
            seq_lens: [B] integer, the number of valid tokens per sequence.
            seq_starts: [B] integer, the position of the first valid token of each; without it the padding is on the
                `padding_side` of the module.
            cu_seqlens: [B + 1] integer, offsets of packed sequences in inputs [T, E]; excludes masks and `seq_lens`.
                Nested inputs [B, j, E] (layout torch.jagged) need none of these, and the output is nested.
            max_seqlen: upper bound on the lengths of packed sequences, known on the host.

        Returns:
            The output, in query's shape, equal to `out_proj.bias` at padding; and None or the weights, [B, N, N] or
            [B, H, N, N], zero at padding.

        Raises:
            ValueError: a cross-attention; a shape, dtype or device does not match; on a CPU (elsewhere under
                RECATTN_CHECK=1) also a mask that is neither causal nor padding around the tokens.
        """
        packed = cu_seqlens is not None
        expect(not (packed and need_weights), "need_weights", "False with packed sequences", need_weights)
        is_self_attention = key is query or is_causal or attn_mask is not None or seq_lens is not None or packed
        expected = "query itself, or a causal mask or seq_lens be given (refined attention is no cross-attention)"
        expect(is_self_attention, "key", expected, "another tensor")
        sizes = self._expect_inputs(query, key, value, packed=packed)
        sequences = Sequences(seq_lens, seq_starts, cu_seqlens, max_seqlen)
        masks, valid = self._read_masks(sizes, key_padding_mask, attn_mask, is_causal, sequences)
        query, key, value = self._zero_padding(valid, query, key, value)
        q, k, v = self._project_inputs(query, key, value)
        out = self._project_output(self._attend(q, k, v, masks, self._dropout_p, self.impl))
        if not need_weights:
            return out, None
        weights = self._attention_weights(q, k, masks)
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, max_len={self.max_len}, rank={self.rank}, "
            f"mechanism={self.mechanism!r}, source={self.source!r}, per_head={self.per_head}, "
            f"padding_side={self.padding_side!r}, dropout={self.dropout}, batch_first={self.batch_first}"
        )

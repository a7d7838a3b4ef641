"""Self-attention with refined weights (AWRSR, arXiv 2410.21048), in the place of nn.MultiheadAttention."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recattn import reference
from recattn._check import expect, expect_choice, expect_shape, expect_tensors
from recattn.functional import refined_attention
from recattn.functional._autocast import autocast_inputs
from recattn.nn._masks import is_causal_mask, lengths_of_padding


class RefinedSelfAttention(nn.Module):
    """`recattn.refined_attention` between the projections of nn.MultiheadAttention, whose place it takes:

        Q, K, V = heads of (query W_Qᵀ + b_Q), (key W_Kᵀ + b_K), (value W_Vᵀ + b_V)
        output  = concat over heads of softmax(mask(M)) V, times W_Oᵀ, + b_O

    with M refined from A = Q Kᵀ/√D by the learned matrices `w_q`, `w_k` and, for "value" and "additive", `w_v`; see
    `recattn.refined_attention` for M, and for what of it is our reading of AWRSR (arXiv 2410.21048).

    `in_proj_weight`, `in_proj_bias` and `out_proj` are those of nn.MultiheadAttention, so that its state_dict loads
    with `strict=False`, which then reports nothing but the refinement's matrices missing.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first, device, dtype: as of nn.MultiheadAttention, but that
            `batch_first` defaults to True.
        max_len: the most tokens of a sequence; the rows of the matrices are positions on the N axis.
        mechanism: "simple", "value", "additive" or "stochastic".
        source: "logits", or "weights" to refine softmax(mask(Q Kᵀ/√D)) instead.
        rank: R, the columns of `w_q` and `w_k` ("stochastic": half of them), `max_len` by default as in the paper.
        per_head: matrices for each head, rather than shared by all.
        padding_side: where `key_padding_mask` and `seq_lens` have the padding; "left" is SASRec's.
        impl: as of `recattn.refined_attention`.
    """

    # nn.TransformerEncoderLayer reads it, and would else compute plain attention from our weights in inference.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_len: int,
        *,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        mechanism: str = "simple",
        source: str = "logits",
        rank: int | None = None,
        per_head: bool = False,
        padding_side: str = "left",
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_choice("mechanism", mechanism, ("simple", "value", "additive", "stochastic"))
        expect_choice("source", source, ("logits", "weights"))
        expect_choice("padding_side", padding_side, ("right", "left"))
        expect(num_heads > 0, "num_heads", "at least 1", num_heads)
        expect(embed_dim > 0 and embed_dim % num_heads == 0, "embed_dim", f"a multiple of {num_heads} heads", embed_dim)
        # nn.MultiheadAttention has its dropout in this place.
        expect(isinstance(max_len, int) and max_len > 0, "max_len", "an integer of at least 1", max_len)
        expect(0 <= dropout < 1, "dropout", "at least 0 and below 1", dropout)
        rank = max_len if rank is None else rank
        expect(rank > 0, "rank", "at least 1", rank)
        self.embed_dim, self.num_heads, self.max_len, self.rank = embed_dim, num_heads, max_len, rank
        self.dropout, self.batch_first, self.per_head = dropout, batch_first, per_head
        self.mechanism, self.source, self.padding_side, self.impl = mechanism, source, padding_side, impl

        options = {"device": device, "dtype": dtype}
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, **options))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, **options)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        heads = (num_heads,) if per_head else ()
        columns = 2 * rank if mechanism == "stochastic" else rank
        self.w_q = nn.Parameter(torch.empty(*heads, max_len, columns, **options))
        self.w_k = nn.Parameter(torch.empty(*heads, max_len, columns, **options))
        has_values = mechanism in ("value", "additive")
        self.w_v = nn.Parameter(torch.empty(*heads, max_len, max_len, **options)) if has_values else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        # M then starts about as flat as plain attention does, whatever R is: a row of logits adds up some N rows of W,
        # a row of weights takes their mean.
        std = self.max_len**-0.5 if self.source == "logits" else 1.0
        for matrix in (self.w_q, self.w_k, self.w_v):
            if matrix is not None:
                nn.init.normal_(matrix, std=std)

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
    ) -> tuple[Tensor, Tensor | None]:
        """nn.MultiheadAttention's arguments and results.

        Args:
            query, key, value: [B, N, E], or [N, B, E] with batch_first=False; of the same tokens, in any form.
            key_padding_mask: [B, N], True (or -inf, else 0) at padding, which is on one side. `seq_lens` without it
                spares the conversion.
            need_weights: also return softmax(mask(M)), through the reference, before dropout.
            attn_mask: None, or the causal mask [N, N], True (or -inf, else 0) above the diagonal. Without it, and
                without `is_causal`, every query sees every token.
            average_attn_weights: the mean of the weights over the heads.
            is_causal: query i sees the tokens j ≤ i; an `attn_mask` besides is then taken for that without a look.
            seq_lens: [B] integer, the valid tokens of each sequence.

        Returns:
            The output, of query's shape, `out_proj.bias` at padding; and None, or the weights, [B, N, N] or
            [B, H, N, N], zero at padding.

        Raises:
            ValueError: shapes, dtypes and devices that do not fit; on a CPU (elsewhere under RECATTN_CHECK=1) also a
                mask that is neither causal nor padding on `padding_side`.
        """
        batch, length = self._expect_inputs(query, key, value)
        if key_padding_mask is not None:
            expect(seq_lens is None, "seq_lens", "None beside a key_padding_mask", "both")
            seq_lens = lengths_of_padding(key_padding_mask, batch, length, self.padding_side)
        causal = is_causal or (attn_mask is not None and is_causal_mask(attn_mask, length))
        q, k, v = (self._heads(x) for x in self._project(query, key, value))
        q, k, v, w_q, w_k, *w_v = autocast_inputs(q, k, v, *self._matrices())
        options = {
            "mechanism": self.mechanism,
            "source": self.source,
            "causal": causal,
            "seq_lens": seq_lens,
            "padding_side": self.padding_side,
        }
        dropout_p = self.dropout if self.training else 0.0
        out = refined_attention(q, k, v, w_q, w_k, *w_v, **options, dropout_p=dropout_p, impl=self.impl)
        out = self.out_proj(self._merged(out))
        if not need_weights:
            return out, None
        identity = torch.eye(length, dtype=q.dtype, device=q.device).expand(*q.shape[:2], length, length)
        weights = reference.refined_attention(q, k, identity, w_q, w_k, *w_v, **options)
        return out, weights.mean(dim=1) if average_attn_weights else weights

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, max_len={self.max_len}, rank={self.rank}, "
            f"mechanism={self.mechanism!r}, source={self.source!r}, per_head={self.per_head}, "
            f"padding_side={self.padding_side!r}, dropout={self.dropout}, batch_first={self.batch_first}"
        )

    def _expect_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int]:
        """B and N."""
        expect_tensors(query=query, key=key, value=value)
        sizes = {"embed_dim": self.embed_dim}
        for name, x in (("query", query), ("key", key), ("value", value)):
            expect_shape(sizes, name, x, "B N embed_dim" if self.batch_first else "N B embed_dim")
        return sizes["B"], sizes["N"]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Inputs that are one tensor share a product: all three, or as in SASRec the key and the value."""
        weight, bias, e = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        if key is not value:
            biases = (None, None, None) if bias is None else bias.chunk(3)
            return tuple(map(F.linear, (query, key, value), weight.chunk(3), biases))
        if query is key:
            return F.linear(query, weight, bias).chunk(3, dim=-1)
        of_query, of_key = (None, None) if bias is None else (bias[:e], bias[e:])
        return F.linear(query, weight[:e], of_query), *F.linear(key, weight[e:], of_key).chunk(2, dim=-1)

    def _heads(self, x: Tensor) -> Tensor:
        """A view [B, H, N, D]."""
        x = x.unflatten(-1, (self.num_heads, -1))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merged(self, x: Tensor) -> Tensor:
        """[B, H, N, D] in query's layout."""
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)

    def _matrices(self) -> list[Tensor]:
        return [w for w in (self.w_q, self.w_k, self.w_v) if w is not None]

"""STOSA's self-attention between Gaussians (WWW 2022), refined as AWRSR (arXiv 2410.21048) refines attention."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recattn import reference
from recattn._check import expect, expect_choice, expect_same_device, expect_shape, expect_tensors
from recattn._typing import PaddingSide, Source, WassersteinAttentionImpl
from recattn._warnings import causal_or_old_default
from recattn.functional import wasserstein_attention
from recattn.functional._autocast import autocast_inputs
from recattn.functional._keywords import explain_keywords
from recattn.functional._nested import accepts_nested
from recattn.nn._constructor_checks import (
    expect_attention_options,
    expect_heads,
    expect_positive,
    takes_max_len_by_name,
)
from recattn.nn._masks import zero_padding
from recattn.nn._sequences import Sequences, read_sequences


class StochasticRefinedSelfAttention(nn.Module):
    """Self-attention between Gaussians: `recattn.wasserstein_attention` between linear maps:

        μ_q, μ_k, μ_v = heads of three linear maps of `mean`
        Σ_q, Σ_k, Σ_v = heads of elu(three linear maps of `cov`) + 1
        mean, covariance = linear maps of the concatenated heads of P μ_v and (P∘P) Σ_v

    P is refined by the learned matrices `w_q` and `w_k`; with refine=False it is STOSA's own. The maps are those of
    STOSA's code (DistSelfAttention). Its output dropout, residual and layer norm are left to the caller, and so is
    elu + 1 if the returned covariance must be positive. The refinement is our reading of AWRSR; see
    `recattn.wasserstein_attention`.

    Args:
        embed_dim: width of `mean` and `cov`, a multiple of num_heads.
        num_heads: H.
        max_len: the longest sequence. A row of a matrix belongs to a position on the N axis.
        rank: R, half the columns of `w_q` and `w_k`; `max_len` by default.
        refine: whether P is refined.
        source: "logits", or "weights" to refine the softmax of the distances.
        dropout: dropout probability of the weights P, in training.
        causal: token i sees the tokens j ≤ i. The default is True in this release, with a warning, and False from the
            next on, as everywhere else.
        padding_side: "left" (as in SASRec and STOSA) or "right", the side of the padding where only `seq_lens` says how
            long the sequences are. Without it that is "left", with a warning, and "right" from the next release on.
        bias: whether the linear maps have a bias.
        impl: as in `recattn.wasserstein_attention`.
    """

    @takes_max_len_by_name
    @explain_keywords
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        max_len: int,
        rank: int | None = None,
        refine: bool = True,
        source: Source = "logits",
        dropout: float = 0.0,
        causal: bool | None = None,
        padding_side: PaddingSide | None = None,
        bias: bool = True,
        impl: WassersteinAttentionImpl | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_choice("source", source, ("logits", "weights"))
        expect_attention_options(dropout, padding_side)
        expect_heads("embed_dim", embed_dim, num_heads)
        rank = max_len if rank is None else rank
        expect_positive(max_len=max_len, rank=rank)
        self.embed_dim, self.num_heads, self.max_len, self.rank = embed_dim, num_heads, max_len, rank
        self.refine, self.dropout = refine, dropout
        self.causal = causal_or_old_default("StochasticRefinedSelfAttention", causal)
        self.source: Source = source
        self.padding_side: PaddingSide | None = padding_side
        self.impl: WassersteinAttentionImpl | None = impl

        options = {"device": device, "dtype": dtype}
        # The rows of W_q, W_k and W_v, one below the other.
        self.mean_in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, **options)
        self.cov_in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, **options)
        self.mean_out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self.cov_out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self.w_q = nn.Parameter(torch.empty(max_len, 2 * rank, **options)) if refine else None
        self.w_k = nn.Parameter(torch.empty(max_len, 2 * rank, **options)) if refine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's defaults for the linear maps; normal matrices that do not saturate the softmax.

        If the entries of W have variance s², an entry of A W has variance s² ΣA², summed over a row of A, and M is of
        the order of √R s² ΣA². Scaled distances are of the order of √D, so ΣA² ≲ max_len · D for source="logits"; for
        source="weights" ΣA² ≤ 1. Hence s² = 1 / (√R · max_len · D) or 1 / √R, with which M starts at the order of 1.
        """
        for module in (self.mean_in_proj, self.cov_in_proj, self.mean_out_proj, self.cov_out_proj):
            module.reset_parameters()
        if self.refine:
            squares = self.max_len * self.embed_dim // self.num_heads if self.source == "logits" else 1
            for matrix in self._matrices():
                nn.init.normal_(matrix, std=(math.sqrt(self.rank) * squares) ** -0.5)

    @accepts_nested("mean", "cov", ragged_axis=1, nest=lambda packed, results: tuple(map(packed.nest, results)))
    def forward(
        self,
        mean: Tensor,
        cov: Tensor,
        *,
        key_padding_mask: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_starts: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            mean, cov: [B, N, E], packed [T, E], or nested, the inputs of the linear maps, so `cov` need not be
                positive. Padding may hold anything, NaN included: it changes neither the output nor a gradient, and its
                own gradients are zero.
            key_padding_mask: [B, N], True (or -inf, else 0) at padding. The tokens of a row have no gap, wherever they
                begin: their position on the N axis chooses the rows of the matrices.
            seq_lens: [B] integer, the number of valid tokens per sequence.
            seq_starts: [B] integer, the position of the first valid token of each; without it the padding is on the
                `padding_side` of the module.
            cu_seqlens: [B + 1] integer, offsets of packed sequences in inputs [T, E]; excludes masks and `seq_lens`.
                Nested inputs [B, j, E] (layout torch.jagged) need none of these, and the output is nested.
            max_seqlen: upper bound on the lengths of packed sequences, known on the host.
            need_weights: also return P before dropout, computed by the reference; not if packed.

        Returns:
            Mean and covariance, in the shape of the inputs, equal to the biases of the output maps at padding; and with
            need_weights P, [B, H, N, N], zero at padding.

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU (elsewhere under RECATTN_CHECK=1) also a mask
                whose tokens have a gap.
        """
        packed = cu_seqlens is not None
        expect(not (packed and need_weights), "need_weights", "False with packed sequences", need_weights)
        expect_tensors(mean=mean, cov=cov)
        sizes = {"E": self.embed_dim}
        for name, x in (("mean", mean), ("cov", cov)):
            expect_shape(sizes, name, x, "T E" if packed else "B N E")
        sequences = Sequences(seq_lens, seq_starts, cu_seqlens, max_seqlen)
        masks, valid = read_sequences(sizes, key_padding_mask, sequences, self.padding_side)
        expect_same_device("mean", mean, cov=cov, key_padding_mask=key_padding_mask, **sequences.tensors())
        if valid is not None:
            mean, cov = zero_padding(valid, mean, cov)
        means = self._split_heads(self.mean_in_proj(mean))
        covs = [F.elu(x) + 1 for x in self._split_heads(self.cov_in_proj(cov))]
        tensors = [*(x for pair in zip(means, covs, strict=True) for x in pair), *self._matrices()]
        mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, *matrices = autocast_inputs(*tensors)
        options: dict[str, Any] = {
            **dict(zip(("w_q", "w_k"), matrices, strict=False)),
            "source": self.source,
            "causal": self.causal,
            **masks,
        }
        dropout_p = self.dropout if self.training else 0.0
        mean, cov = wasserstein_attention(
            mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, **options, dropout_p=dropout_p, impl=self.impl
        )
        mean, cov = self.mean_out_proj(self._merge_heads(mean)), self.cov_out_proj(self._merge_heads(cov))
        if not need_weights:
            return mean, cov
        n = sizes["N"]
        identity = torch.eye(n, dtype=mean_q.dtype, device=mean_q.device).expand(*mean_q.shape[:2], n, n)
        weights, _ = reference.wasserstein_attention(mean_q, cov_q, mean_k, cov_k, identity, identity, **options)
        return mean, cov, weights

    def extra_repr(self) -> str:
        refinement = f"rank={self.rank}, source={self.source!r}" if self.refine else "refine=False"
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, max_len={self.max_len}, {refinement}, "
            f"causal={self.causal}, padding_side={self.padding_side!r}, dropout={self.dropout}"
        )

    def _split_heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, N, 3E] -> three of [B, H, N, D]; packed [T, 3E] -> three of [T, H, D]."""
        x = x.unflatten(-1, (3, self.num_heads, -1))
        return x.unbind(1) if x.dim() == 4 else x.transpose(1, 3).unbind(2)

    def _merge_heads(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, N, E]; packed [T, H, D] -> [T, E]."""
        return (x if x.dim() == 3 else x.transpose(1, 2)).flatten(-2)

    def _matrices(self) -> list[Tensor]:
        return [w for w in (self.w_q, self.w_k) if w is not None]

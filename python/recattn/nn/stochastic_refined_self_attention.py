"""STOSA's self-attention between Gaussians (WWW 2022), refined as AWRSR (arXiv 2410.21048) refines attention."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recattn import reference
from recattn._check import (
    expect,
    expect_choice,
    expect_index,
    expect_probability,
    expect_same_device,
    expect_shape,
    expect_tensors,
)
from recattn.functional import wasserstein_attention
from recattn.functional._autocast import autocast_inputs
from recattn.nn._masks import zero_padding
from recattn.reference.sink_attention import valid_tokens


class StochasticRefinedSelfAttention(nn.Module):
    """`recattn.wasserstein_attention` of a sequence of Gaussians over itself, between linear maps:

        μ_q, μ_k, μ_v = heads of three linear maps of `mean`
        Σ_q, Σ_k, Σ_v = heads of elu(three linear maps of `cov`) + 1
        mean, covariance = linear maps of the concatenated heads of P μ_v and (P∘P) Σ_v

    where P is refined by the learned matrices `w_q` and `w_k`, or with refine=False is that of STOSA itself.
    The maps are those of STOSA's code (DistSelfAttention), whose dropout of the outputs, residual and layer norm are
    left to the caller, as is elu + 1 where the returned covariance must be positive. The refinement is our reading of
    AWRSR; see `recattn.wasserstein_attention`.

    Args:
        embed_dim: of `mean` and `cov`, a multiple of num_heads.
        num_heads: H.
        max_len: the most tokens of a sequence; the rows of the matrices are positions on the N axis.
        rank: R, half the columns of `w_q` and `w_k`, `max_len` by default.
        refine: whether P is refined.
        source: "logits", or "weights" to refine the softmax of the distances.
        dropout: probability of dropping one of the weights P in training.
        causal: token i sees the tokens j ≤ i.
        padding_side: where `seq_lens` has the padding; "left" is SASRec's and STOSA's.
        bias: whether the linear maps have one.
        impl: as of `recattn.wasserstein_attention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        max_len: int,
        *,
        rank: int | None = None,
        refine: bool = True,
        source: str = "logits",
        dropout: float = 0.0,
        causal: bool = True,
        padding_side: str = "left",
        bias: bool = True,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_choice("source", source, ("logits", "weights"))
        expect_choice("padding_side", padding_side, ("right", "left"))
        expect(num_heads > 0, "num_heads", "at least 1", num_heads)
        expect(embed_dim > 0 and embed_dim % num_heads == 0, "embed_dim", f"a multiple of {num_heads} heads", embed_dim)
        expect(max_len > 0, "max_len", "at least 1", max_len)
        rank = max_len if rank is None else rank
        expect(rank > 0, "rank", "at least 1", rank)
        expect_probability("dropout", dropout)
        self.embed_dim, self.num_heads, self.max_len, self.rank = embed_dim, num_heads, max_len, rank
        self.refine, self.source, self.dropout, self.causal = refine, source, dropout, causal
        self.padding_side, self.impl = padding_side, impl

        options = {"device": device, "dtype": dtype}
        # Queries, keys and values, one below the other.
        self.mean_in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, **options)
        self.cov_in_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, **options)
        self.mean_out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self.cov_out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self.w_q = nn.Parameter(torch.empty(max_len, 2 * rank, **options)) if refine else None
        self.w_k = nn.Parameter(torch.empty(max_len, 2 * rank, **options)) if refine else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's own values; of the matrices, normal ones that leave the softmax unsaturated.

        With entries of variance s², A W has variance s² ΣA² in each column, a row's entries squared, and M one of the
        order of √R s² ΣA². Distances are of the order of √D beyond the scale, so that ΣA² ≲ max_len · D for raw ones;
        of weights it is 1 at most. Hence s² = 1 / (√R · max_len · D), or 1 / √R, and M starts of the order of 1.
        """
        for module in (self.mean_in_proj, self.cov_in_proj, self.mean_out_proj, self.cov_out_proj):
            module.reset_parameters()
        if self.refine:
            squares = self.max_len * self.embed_dim // self.num_heads if self.source == "logits" else 1
            for matrix in (self.w_q, self.w_k):
                nn.init.normal_(matrix, std=(math.sqrt(self.rank) * squares) ** -0.5)

    def forward(
        self, mean: Tensor, cov: Tensor, *, seq_lens: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            mean, cov: [B, N, E], what the linear maps take: a covariance need not be positive yet. Padding may hold
                anything, NaN too: it reaches neither the output nor a gradient, and its own gradients are zero.
            seq_lens: [B] integer, the valid tokens of each sequence.
            need_weights: also return P, through the reference, before dropout.

        Returns:
            Mean and covariance, [B, N, E], the output maps' biases at padding; and P, [B, H, N, N], zero at padding.

        Raises:
            ValueError: shapes, dtypes or devices that do not fit.
        """
        expect_tensors(mean=mean, cov=cov)
        sizes = {"E": self.embed_dim}
        expect_shape(sizes, "mean", mean, "B N E")
        expect_shape(sizes, "cov", cov, "B N E")
        expect_same_device("mean", mean, cov=cov, seq_lens=seq_lens)
        if seq_lens is not None:
            expect_index(sizes, "seq_lens", seq_lens, "B")
            mean, cov = zero_padding(
                valid_tokens(sizes["B"], sizes["N"], seq_lens, self.padding_side, mean.device), mean, cov
            )
        means = self._heads(self.mean_in_proj(mean))
        covs = [F.elu(x) + 1 for x in self._heads(self.cov_in_proj(cov))]
        mean_q, cov_q, mean_k, cov_k, mean_v, cov_v, *matrices = autocast_inputs(
            *(x for pair in zip(means, covs, strict=True) for x in pair), *self._matrices()
        )
        options = {
            **dict(zip(("w_q", "w_k"), matrices, strict=False)),
            "source": self.source,
            "causal": self.causal,
            "seq_lens": seq_lens,
            "padding_side": self.padding_side,
        }
        dropout_p = self.dropout if self.training else 0.0
        gaussians = mean_q, cov_q, mean_k, cov_k
        mean, cov = wasserstein_attention(*gaussians, mean_v, cov_v, **options, dropout_p=dropout_p, impl=self.impl)
        mean, cov = self.mean_out_proj(self._merged(mean)), self.cov_out_proj(self._merged(cov))
        if not need_weights:
            return mean, cov
        n = sizes["N"]
        identity = torch.eye(n, dtype=mean_q.dtype, device=mean_q.device).expand(*mean_q.shape[:2], n, n)
        weights, _ = reference.wasserstein_attention(*gaussians, identity, identity, **options)
        return mean, cov, weights

    def extra_repr(self) -> str:
        refinement = f"rank={self.rank}, source={self.source!r}" if self.refine else "refine=False"
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, max_len={self.max_len}, {refinement}, "
            f"causal={self.causal}, padding_side={self.padding_side!r}, dropout={self.dropout}"
        )

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, N, 3E] -> three of [B, H, N, D]."""
        return x.unflatten(-1, (3, self.num_heads, -1)).transpose(1, 3).unbind(2)

    def _merged(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, N, E]."""
        return x.transpose(1, 2).flatten(-2)

    def _matrices(self) -> list[Tensor]:
        return [self.w_q, self.w_k] if self.refine else []

"""The learned bias between the sinks of a layer (CTR-Sink, arXiv 2508.03668)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recattn._check import (
    expect,
    expect_index,
    expect_numbers,
    expect_probability,
    expect_same_device,
    expect_shape,
    expect_tensors,
)
from recattn.functional import inter_sink_bias
from recattn.functional.inter_sink_bias import expect_sink_mask
from recattn.functional.validation import checked_indices
from recattn.nn._masks import zero_padding


class InterSinkBias(nn.Module):
    """The bias that `recattn.sink_attention` takes, from the hidden states that the attention itself reads:

        X = LayerNorm(H at the sinks)       Q = heads of X W_Qᵀ + b_Q,   K = heads of X W_Kᵀ + b_K
        β = scale · mean over heads of dropout(softmax(Q Kᵀ/√d))           d = hidden_size / num_heads

    The formula and the names of `norm`, `query_proj` and `key_proj` are those of CTR-Sink's official code (arXiv
    2508.03668); `scale` is a scalar `sink_scale` beside the module there. Unlike there, sinks of padding have no share
    of the softmax, and `causal` hides later ones.

    Args:
        hidden_size: of the hidden states.
        num_heads: a divisor of it.
        dropout: of the weights, while training.
        bias_scale: the initial `scale`. The official code begins at 1 in decoders and at 10 in BERT.
        causal: sink i sees the sinks j ≤ i, for a causal attention.
        impl: as of `recattn.inter_sink_bias`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias_scale: float = 1.0,
        causal: bool = False,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect(num_heads > 0, "num_heads", "at least 1", num_heads)
        multiple = f"a multiple of {num_heads} heads"
        expect(hidden_size > 0 and hidden_size % num_heads == 0, "hidden_size", multiple, hidden_size)
        expect_probability("dropout", dropout)
        expect_numbers(bias_scale=bias_scale)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.dropout, self.bias_scale, self.causal, self.impl = dropout, bias_scale, causal, impl
        options = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(hidden_size, **options)
        self.query_proj = nn.Linear(hidden_size, hidden_size, **options)
        self.key_proj = nn.Linear(hidden_size, hidden_size, **options)
        # One entry, not a scalar: FSDP shards no scalars.
        self.scale = nn.Parameter(torch.full((1,), float(bias_scale), **options))

    def reset_parameters(self) -> None:
        for module in (self.norm, self.query_proj, self.key_proj):
            module.reset_parameters()
        nn.init.constant_(self.scale, self.bias_scale)

    def forward(self, hidden_states: Tensor, sink_positions: Tensor, sink_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: H [B, N, hidden_size].
            sink_positions: [B, M] integer, as of `recattn.sink_attention`.
            sink_mask: [B, M] bool, False at sinks that do not count, those of padding, where the hidden states may hold
                anything; by default all but -1 count.

        Returns:
            β [B, 1, M, M], float32 (float64 for float64 hidden states).

        Raises:
            ValueError: shapes, dtypes and devices that do not fit; on a CPU (elsewhere under RECATTN_CHECK=1) also
                positions out of range or order.
        """
        expect_tensors(hidden_states=hidden_states)
        sizes = {"hidden_size": self.hidden_size}
        expect_shape(sizes, "hidden_states", hidden_states, "B N hidden_size")
        expect_index(sizes, "sink_positions", sink_positions, "B M")
        expect_same_device("hidden_states", hidden_states, sink_positions=sink_positions)
        device, length = hidden_states.device, sizes["N"]
        sink_positions = checked_indices(device, sink_positions=sink_positions, seq_len=length).sink_positions
        valid = sink_positions >= 0
        if sink_mask is not None:
            expect_sink_mask(sizes, sink_mask, "hidden_states", hidden_states)
            valid = valid & sink_mask
        if length == 0:
            hidden_states = F.pad(hidden_states, (0, 0, 0, 1))  # a row for gather to read, which no sink is at
        rows = sink_positions.long().clamp(min=0)[..., None].expand(-1, -1, self.hidden_size)
        (sinks,) = zero_padding(valid, hidden_states.gather(1, rows))  # [B, M, hidden_size]
        sinks = self.norm(sinks)
        projected = self.query_proj(sinks), self.key_proj(sinks)
        return inter_sink_bias(
            *(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in projected),
            sink_mask=valid,
            bias_scale=self.scale,
            causal=self.causal,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, num_heads={self.num_heads}, dropout={self.dropout}, causal={self.causal}"
        )

"""The learned bias between the sinks of a layer (CTR-Sink, arXiv 2508.03668)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recattn._check import (
    expect_index,
    expect_numbers,
    expect_probability,
    expect_same_device,
    expect_shape,
    expect_tensors,
)
from recattn._typing import InterSinkBiasImpl
from recattn.functional import inter_sink_bias
from recattn.functional.inter_sink_bias import expect_sink_mask
from recattn.functional.validation import checked_indices
from recattn.nn._constructor_checks import expect_heads
from recattn.nn._masks import zero_padding


class InterSinkBias(nn.Module):
    """The bias of `recattn.sink_attention`, computed from the input H of the attention layer:

        X = LayerNorm(H at the sinks)       Q = heads of X W_Qᵀ + b_Q,   K = heads of X W_Kᵀ + b_K
        β = scale · mean over heads of dropout(softmax(Q Kᵀ/√d))           d = hidden_size / num_heads

    The formula and the names `norm`, `query_proj` and `key_proj` are those of CTR-Sink's official code (arXiv
    2508.03668); its `sink_scale`, a scalar outside the module, is `scale` here. Two things differ: padded sinks are
    masked out of the softmax, and `causal` hides later sinks.

    Args:
        hidden_size: width of the hidden states.
        num_heads: a divisor of hidden_size.
        dropout: dropout probability of the softmax weights, in training.
        bias_scale: initial value of `scale`. The official code uses 1 in decoders and 10 in BERT.
        causal: sink i sees the sinks j ≤ i. Use it with causal attention.
        impl: as in `recattn.inter_sink_bias`.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        bias_scale: float = 1.0,
        causal: bool = False,
        impl: InterSinkBiasImpl | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_heads("hidden_size", hidden_size, num_heads)
        expect_probability("dropout", dropout)
        expect_numbers(bias_scale=bias_scale)
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.dropout, self.bias_scale, self.causal = dropout, bias_scale, causal
        self.impl: InterSinkBiasImpl | None = impl
        options = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(hidden_size, **options)
        self.query_proj = nn.Linear(hidden_size, hidden_size, **options)
        self.key_proj = nn.Linear(hidden_size, hidden_size, **options)
        # One entry, not a scalar: FSDP cannot shard scalars.
        self.scale = nn.Parameter(torch.full((1,), float(bias_scale), **options))

    def reset_parameters(self) -> None:
        for module in (self.norm, self.query_proj, self.key_proj):
            module.reset_parameters()
        nn.init.constant_(self.scale, self.bias_scale)

    def forward(self, hidden_states: Tensor, sink_positions: Tensor, sink_mask: Tensor | None = None) -> Tensor:
        """
        Args:
            hidden_states: H [B, N, hidden_size].
            sink_positions: [B, M] integer, as in `recattn.sink_attention`.
            sink_mask: [B, M] bool, False at sinks to ignore, such as those in padding; the hidden states there may hold
                anything. By default only positions of -1 are ignored.

        Returns:
            β [B, 1, M, M], float32 (float64 for float64 hidden states).

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU (elsewhere under RECATTN_CHECK=1) also
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
            hidden_states = F.pad(hidden_states, (0, 0, 0, 1))  # gather needs a row to read
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

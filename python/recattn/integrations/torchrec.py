"""LREA and sink attention over TorchRec's JaggedTensors: no user is padded to the longest."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recattn import functional
from recattn._check import expect, expect_same_device, expect_shape, expect_tensors
from recattn._imports import importing
from recattn.nn import LREA, SinkAttention
from recattn.nn.lrea import LREAState

with importing("TorchRec", module="torchrec", extra="torchrec"):
    from torchrec import JaggedTensor


class JaggedLREA(nn.Module):
    """`recattn.nn.LREA` over histories in a JaggedTensor, as an EmbeddingCollection returns them:

        embeddings = embedding_collection(features)      features: a KeyedJaggedTensor
        h = JaggedLREA(LREA(64, max_len=500, rank=16))(embeddings["candidates"], embeddings["history"])

    The numbers are those of the LREA with padded histories. Histories stay packed: nothing is padded or copied.

    Weights of a JaggedTensor are ignored: an EmbeddingCollection with `need_indices` has ids there.

    Args:
        lrea: the module that attends. Its `loss`, `attend` and `append` take what `compress` and `export_state` return.
    """

    def __init__(self, lrea: LREA) -> None:
        super().__init__()
        expect(isinstance(lrea, LREA), "lrea", "a recattn.nn.LREA", type(lrea).__name__)
        self.lrea = lrea

    def forward(
        self, targets: Tensor | JaggedTensor, history: JaggedTensor, *, compressed: Tensor | None = None
    ) -> Tensor | JaggedTensor:
        """h of each target over the behaviours of its user, differentiable in every value and parameter.

        Args:
            targets: a JaggedTensor of the candidates of each user, values [T, target_dim]; or a tensor, [U, target_dim]
                or [U, n, target_dim].
            history: values [sum of lengths, embed_dim], each user's behaviours, the oldest first.
            compressed: C [U, r, embed_dim], if `compress(history)` was already called.

        Returns:
            A JaggedTensor with the lengths of `targets` and values [T, H·D]; or a tensor, [U, H·D] or [U, n, H·D].
            Zeros for a user without behaviours.

        Raises:
            ValueError: a shape, dtype or device does not match, or a history is longer than max_len.
        """
        if compressed is None:
            compressed = self.compress(history)
        lengths = history.lengths()
        if not isinstance(targets, JaggedTensor):
            return self.lrea(targets, None, seq_lens=lengths, compressed=compressed)
        values, offsets = targets.values(), targets.offsets()
        out = self.lrea(values, None, offsets, seq_lens=lengths, compressed=compressed)
        return JaggedTensor(out, lengths=targets.lengths(), offsets=offsets)

    def compress(self, history: JaggedTensor) -> Tensor:
        """C = W_compᵀ E of each user, [U, r, embed_dim], for `lrea.loss` and `forward`.

        Raises:
            ValueError: a shape, dtype or device does not match, or a history is longer than max_len.
        """
        values, longest = self._expect_history(history)
        return self.lrea.compress(values, cu_seqlens=history.offsets(), max_seqlen=longest)

    def export_state(self, history: JaggedTensor, *, dtype: torch.dtype | None = None) -> LREAState:
        """`recattn.nn.LREA.export_state` of each user. The embeddings are read in place.

        Raises:
            ValueError: a shape, dtype or device does not match, or a history is longer than max_len.
        """
        values, longest = self._expect_history(history)
        return self.lrea.export_state(values, dtype=dtype, cu_seqlens=history.offsets(), max_seqlen=longest)

    def _expect_history(self, history: JaggedTensor) -> tuple[Tensor, int]:
        """Its values and the length of the longest, which a GPU is waited for."""
        values = _expect_values("history", history, "embed_dim", self.lrea.embed_dim, self.lrea.w_comp)
        lengths = history.lengths()
        longest = int(lengths.max()) if len(lengths) else 0
        expect(longest <= self.lrea.max_len, "lengths of history", f"at most max_len, {self.lrea.max_len}", longest)
        return values, longest


class JaggedSinkAttention(nn.Module):
    """`recattn.nn.SinkAttention` as a self-attention over the sequences of a JaggedTensor, which stay packed:

        attention = JaggedSinkAttention(SinkAttention(64, num_heads=4))
        attended = attention(embeddings["history"], is_causal=True)

    Args:
        attention: the module whose parameters and dropout are used.
    """

    def __init__(self, attention: SinkAttention) -> None:
        super().__init__()
        expect(isinstance(attention, SinkAttention), "attention", "a SinkAttention", type(attention).__name__)
        self.attention = attention

    def forward(
        self,
        sequences: JaggedTensor,
        *,
        sink_positions: Tensor | None = None,
        inter_sink_bias: Tensor | None = None,
        is_causal: bool = False,
    ) -> JaggedTensor:
        """
        Args:
            sequences: values [sum of lengths, E], of B sequences.
            sink_positions: [B, M] integer, positions of the sinks within their sequence, ascending, padded with -1 at
                the end.
            inter_sink_bias: [B, 1 or H, M, M], added to the scores between sinks. Give both or neither; without them it
                is plain attention.
            is_causal: token i sees the tokens j ≤ i of its sequence.

        Returns:
            A JaggedTensor with the lengths of `sequences` and values [sum of lengths, E].

        Raises:
            ValueError: a shape, dtype or device does not match; on a CPU also positions out of order or range.
            NotImplementedError: the `impl` of `attention` does not support packed sequences.
        """
        own = self.attention
        given = sink_positions is not None
        expect((inter_sink_bias is not None) == given, "inter_sink_bias", "given with sink_positions", "one of them")
        values = _expect_values("sequences", sequences, "E", own.embed_dim, own.in_proj_weight)
        lengths, offsets = sequences.lengths(), sequences.offsets()
        projected = F.linear(values, own.in_proj_weight, own.in_proj_bias).split(own._widths, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, own.head_dim)) for x in projected)  # [T, H, D]
        if sink_positions is None or inter_sink_bias is None:
            sink_positions, inter_sink_bias = lengths.new_empty(len(lengths), 0), q.new_empty(len(lengths), 1, 0, 0)
        heads = functional.sink_attention(
            q,
            k,
            v,
            sink_positions,
            inter_sink_bias,
            causal=is_causal,
            cu_seqlens=offsets,
            dropout_p=own._dropout_p,
            impl=own.impl,
        )
        return JaggedTensor(own.out_proj(heads.flatten(-2)), lengths=lengths, offsets=offsets)


def _expect_values(name: str, jagged: JaggedTensor, width_name: str, width: int, parameter: Tensor) -> Tensor:
    expect(isinstance(jagged, JaggedTensor), name, "a JaggedTensor", type(jagged).__name__)
    values, label = jagged.values(), f"values of {name}"
    expect_tensors(**{label: values})
    expect_shape({width_name: width}, label, values, f"T {width_name}")
    expect_same_device("the parameters", parameter, **{label: values})
    return values

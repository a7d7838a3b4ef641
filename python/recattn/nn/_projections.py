"""Projections and masks of nn.MultiheadAttention, for the modules that replace it."""

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recattn._check import expect, expect_same_device, expect_shape, expect_tensors
from recattn._typing import PaddingSide, RefinedAttentionImpl, SinkAttentionImpl
from recattn.functional._keywords import explain_keywords
from recattn.functional._nested import Packed
from recattn.nn._constructor_checks import expect_attention_options, expect_heads
from recattn.nn._masks import is_causal_mask, zero_padding
from recattn.nn._sequences import Sequences, read_sequences

Module = TypeVar("Module", bound="MultiheadProjections")


class MultiheadProjections(nn.Module):
    """Parameters, projections and mask handling of nn.MultiheadAttention, without its attention.

    A subclass computes the attention between `_project_inputs` and `_project_output`. `in_proj_weight`, `in_proj_bias`
    and `out_proj` are those of nn.MultiheadAttention; with fewer key/value heads, W_K and W_V have fewer rows.
    """

    # If True, nn.TransformerEncoderLayer computes plain attention from our weights in inference, without calling us.
    _qkv_same_embed_dim = False

    # Whether the module accepts keys that are other tokens than the queries.
    cross_attends: ClassVar[bool]

    @explain_keywords
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        padding_side: PaddingSide | None = "right",
        impl: SinkAttentionImpl | RefinedAttentionImpl | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect_heads("embed_dim", embed_dim, num_heads)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        divides = num_kv_heads > 0 and num_heads % num_kv_heads == 0
        expect(divides, "num_kv_heads", f"a divisor of {num_heads} heads", num_kv_heads)
        expect_attention_options(dropout, padding_side)
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.dropout, self.batch_first = dropout, batch_first
        self.padding_side: PaddingSide | None = padding_side
        self.impl: Any = impl  # of the operator of a subclass

        options = {"device": device, "dtype": dtype}
        rows = sum(self._widths)
        self.in_proj_weight = nn.Parameter(torch.empty(rows, embed_dim, **options))
        self.in_proj_bias = nn.Parameter(torch.empty(rows, **options)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        self._reset_projections()

    @classmethod
    def from_multihead_attention(cls: type[Module], attention: nn.MultiheadAttention, **options: Any) -> Module:
        """Build a replacement for `attention` with its sizes, dropout and mode, sharing its parameters.

        The parameters are shared, not copied, so an existing optimizer goes on training them. `options` are the other
        arguments of the constructor; a `dropout` among them replaces that of `attention`.

        Raises:
            ValueError: `attention` has kdim, vdim, add_bias_kv or add_zero_attn.
        """
        kind = type(attention).__name__
        expect(isinstance(attention, nn.MultiheadAttention), "attention", "an nn.MultiheadAttention", kind)
        embed_dim, weight = attention.embed_dim, attention.out_proj.weight
        for name, expected, got in (
            ("kdim", embed_dim, attention.kdim),
            ("vdim", embed_dim, attention.vdim),
            ("add_bias_kv", False, attention.bias_k is not None),
            ("add_zero_attn", False, attention.add_zero_attn),
        ):
            expect(got == expected, f"{name} of an nn.MultiheadAttention to be replaced", str(expected), got)
        module = cls(
            embed_dim,
            attention.num_heads,
            bias=attention.in_proj_bias is not None,
            batch_first=attention.batch_first,
            device=weight.device,
            dtype=weight.dtype,
            **{"dropout": attention.dropout, **options},
        )
        fits = module.num_kv_heads == module.num_heads
        expect(fits, "num_kv_heads", "None, as nn.MultiheadAttention's heads all have keys", module.num_kv_heads)
        module.in_proj_weight, module.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        module.out_proj = attention.out_proj
        return module.train(attention.training)

    def reset_parameters(self) -> None:
        self._reset_projections()

    def _reset_projections(self) -> None:
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Rows of W_Q, W_K and W_V."""
        kv_width = self.num_kv_heads * self.head_dim
        return self.embed_dim, kv_width, kv_width

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _expect_inputs(
        self, query: Tensor, key: Tensor, value: Tensor, *, same_tokens: bool = True, packed: bool = False
    ) -> dict[str, int]:
        """Check the inputs; return their sizes B and N, or Nq and Nk without `same_tokens`, or T if packed."""
        expect_tensors(query=query, key=key, value=value)
        sizes = {"embed_dim": self.embed_dim}
        nq, nk = ("N", "N") if same_tokens else ("Nq", "Nk")
        for name, x, n in (("query", query, nq), ("key", key, nk), ("value", value, nk)):
            dense = f"B {n} embed_dim" if self.batch_first else f"{n} B embed_dim"
            expect_shape(sizes, name, x, "T embed_dim" if packed else dense)
        return sizes

    def _read_masks(
        self,
        sizes: dict[str, int],
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        sequences: Sequences,
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The masks of a self-attention as the operators' arguments, and the valid tokens as of `read_sequences`."""
        masks, valid = read_sequences(sizes, key_padding_mask, sequences, self.padding_side)
        tensors = {"key_padding_mask": key_padding_mask, **sequences.tensors()}
        expect_same_device("the parameters", self.in_proj_weight, **tensors)
        if attn_mask is not None and not is_causal:
            expect("N" in sizes, "attn_mask", "None beside packed sequences: give is_causal", "both")
            is_causal = is_causal_mask(attn_mask, sizes["N"], sizes["N"])
        return {"causal": is_causal, **masks}, valid

    def _zero_padding(self, valid: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs with zeros where `valid` [B, N] is False."""
        return inputs if valid is None else zero_padding(self._like_inputs(valid), *inputs)

    def _like_inputs(self, valid: Tensor) -> Tensor:
        """A mask [B, N] in the layout of the inputs."""
        return valid if self.batch_first else valid.T

    @staticmethod
    def _read_cross_masks(
        queries: int, keys: int, valid_keys: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> dict[str, Any]:
        """The masks of a cross-attention as arguments of scaled_dot_product_attention. Only keys have padding."""
        causal = is_causal or (attn_mask is not None and is_causal_mask(attn_mask, queries, keys))
        if valid_keys is None:
            return {"is_causal": causal}
        visible = valid_keys[:, None, None]  # [B, 1, 1, Nk]
        if causal:
            visible = visible & visible.new_ones(queries, keys).tril()
        return {"attn_mask": visible}

    def _project_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, projected and split into heads [B, H, N, D], packed [T, H, D].

        Inputs that are the same tensor share one matmul: all three, or key and value as in SASRec.
        """
        weight, bias, widths, e = self.in_proj_weight, self.in_proj_bias, self._widths, self.embed_dim
        if key is not value:
            biases = (None, None, None) if bias is None else bias.split(widths)
            projected = tuple(map(F.linear, (query, key, value), weight.split(widths), biases))
        elif query is key:
            projected = F.linear(query, weight, bias).split(widths, dim=-1)
        else:
            q_bias, kv_bias = (None, None) if bias is None else (bias[:e], bias[e:])
            keys_and_values = F.linear(key, weight[e:], kv_bias).split(widths[1:], dim=-1)
            projected = F.linear(query, weight[:e], q_bias), *keys_and_values
        q, k, v = map(self._split_heads, projected)
        return q, k, v

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, N, H·D] or [N, B, H·D] -> [B, H, N, D]; packed [T, H·D] -> [T, H, D]. A view."""
        x = x.unflatten(-1, (-1, self.head_dim))
        if x.dim() == 3:
            return x
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _project_output(self, x: Tensor) -> Tensor:
        """[B, H, N, D] or [T, H, D] -> the output projection, in the layout of the query."""
        if x.dim() == 4:
            x = x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)
        return self.out_proj(x.flatten(-2))


def nest_output(packed: Packed, results: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """The output of a module, nested; its weights are None."""
    out, weights = results
    return packed.nest(out), weights


def identity_values(k: Tensor) -> Tensor:
    """Identity matrices [B, H, N, N] for keys k [B, H, N, D]: with these as values an attention returns its weights."""
    batch, heads, length, _ = k.shape
    return torch.eye(length, dtype=k.dtype, device=k.device).expand(batch, heads, length, length)

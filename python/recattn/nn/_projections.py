"""nn.MultiheadAttention's projections and masks, for the modules that take its place."""

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from recattn._check import (
    expect,
    expect_choice,
    expect_index,
    expect_probability,
    expect_same_device,
    expect_shape,
    expect_tensors,
)
from recattn.nn._masks import is_causal_mask, lengths_of_padding, zero_padding
from recattn.reference.sink_attention import valid_tokens

Module = TypeVar("Module", bound="MultiheadProjections")


class MultiheadProjections(nn.Module):
    """What surrounds the attention in nn.MultiheadAttention; a subclass attends between `_project` and `_output`.

    `in_proj_weight`, `in_proj_bias` and `out_proj` are those of nn.MultiheadAttention; with fewer key/value heads the
    rows of W_K and W_V are fewer.
    """

    # nn.TransformerEncoderLayer reads it, and would else compute plain attention from our weights in inference.
    _qkv_same_embed_dim = False

    # Whether queries may be other tokens than the keys.
    cross_attends: ClassVar[bool]

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        dropout: float,
        bias: bool,
        batch_first: bool,
        padding_side: str,
        impl: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        expect(num_heads > 0, "num_heads", "at least 1", num_heads)
        expect(embed_dim > 0 and embed_dim % num_heads == 0, "embed_dim", f"a multiple of {num_heads} heads", embed_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        divides = num_kv_heads > 0 and num_heads % num_kv_heads == 0
        expect(divides, "num_kv_heads", f"a divisor of {num_heads} heads", num_kv_heads)
        expect_probability("dropout", dropout)
        expect_choice("padding_side", padding_side, ("right", "left"))
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads
        self.dropout, self.batch_first, self.padding_side, self.impl = dropout, batch_first, padding_side, impl

        options = {"device": device, "dtype": dtype}
        rows = sum(self._widths)
        self.in_proj_weight = nn.Parameter(torch.empty(rows, embed_dim, **options))
        self.in_proj_bias = nn.Parameter(torch.empty(rows, **options)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)

    @classmethod
    def from_multihead_attention(cls: type[Module], attention: nn.MultiheadAttention, **options: Any) -> Module:
        """What takes the place of `attention`, with its sizes, dropout, mode and very parameters.

        The parameters are shared, not copied: an optimizer that has them trains them on. `options` are the
        constructor's others; a `dropout` among them replaces attention's.

        Raises:
            ValueError: an nn.MultiheadAttention with kdim, vdim, add_bias_kv or add_zero_attn.
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
        nn.init.xavier_uniform_(self.in_proj_weight)
        self.out_proj.reset_parameters()
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Rows of W_Q, W_K and W_V."""
        of_keys = self.num_kv_heads * self.head_dim
        return self.embed_dim, of_keys, of_keys

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _expect_inputs(self, query: Tensor, key: Tensor, value: Tensor, same_tokens: bool = True) -> tuple[int, ...]:
        """B, and the lengths of the queries and of the keys; with `same_tokens` these are one."""
        dense = "a dense tensor (nn.TransformerEncoder: set use_nested_tensor to False)"
        expect(not (isinstance(query, Tensor) and query.is_nested), "query", dense, "a nested one")
        expect_tensors(query=query, key=key, value=value)
        sizes = {"embed_dim": self.embed_dim}
        of_queries, of_keys = ("N", "N") if same_tokens else ("Nq", "Nk")
        for name, x, n in (("query", query, of_queries), ("key", key, of_keys), ("value", value, of_keys)):
            expect_shape(sizes, name, x, f"B {n} embed_dim" if self.batch_first else f"{n} B embed_dim")
        return sizes["B"], sizes[of_queries], sizes[of_keys]

    def _read_masks(
        self,
        batch: int,
        length: int,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
        seq_lens: Tensor | None,
    ) -> dict[str, Any]:
        """`causal`, `seq_lens` and `padding_side` as the operators take them, of a self-attention."""
        if key_padding_mask is not None:
            expect(seq_lens is None, "seq_lens", "None beside a key_padding_mask", "both")
            seq_lens = lengths_of_padding(key_padding_mask, batch, length, self.padding_side)
        elif seq_lens is not None:
            expect_index({"B": batch}, "seq_lens", seq_lens, "B")
        masks = {"key_padding_mask": key_padding_mask, "seq_lens": seq_lens}
        expect_same_device("the parameters", self.in_proj_weight, **masks)
        causal = is_causal or (attn_mask is not None and is_causal_mask(attn_mask, length, length))
        return {"causal": causal, "seq_lens": seq_lens, "padding_side": self.padding_side}

    def _without_padding(self, visible: dict[str, Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        """The inputs of a self-attention, with zeros at padding."""
        seq_lens = visible["seq_lens"]
        if seq_lens is None or not torch.is_grad_enabled():  # the operators read no padding; only gradients would
            return inputs
        batch, length = inputs[0].shape[:2] if self.batch_first else inputs[0].shape[1::-1]
        return self._zero_padding(valid_tokens(batch, length, seq_lens, self.padding_side, seq_lens.device), *inputs)

    def _zero_padding(self, valid: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return zero_padding(valid if self.batch_first else valid.T, *inputs)

    @staticmethod
    def _read_cross_masks(
        queries: int, keys: int, valid_keys: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> dict[str, Any]:
        """`is_causal` and `attn_mask` as scaled_dot_product_attention takes them; padding is the keys' alone."""
        causal = is_causal or (attn_mask is not None and is_causal_mask(attn_mask, queries, keys))
        if valid_keys is None:
            return {"is_causal": causal}
        visible = valid_keys[:, None, None]  # [B, 1, 1, Nk]
        if causal:
            visible = visible & visible.new_ones(queries, keys).tril()
        return {"attn_mask": visible}

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Heads of queries, keys and values.

        Inputs that are one tensor share a product: all three, or as in SASRec the key and the value.
        """
        weight, bias, widths, e = self.in_proj_weight, self.in_proj_bias, self._widths, self.embed_dim
        if key is not value:
            biases = (None, None, None) if bias is None else bias.split(widths)
            projected = tuple(map(F.linear, (query, key, value), weight.split(widths), biases))
        elif query is key:
            projected = F.linear(query, weight, bias).split(widths, dim=-1)
        else:
            of_query, of_key = (None, None) if bias is None else (bias[:e], bias[e:])
            keys_and_values = F.linear(key, weight[e:], of_key).split(widths[1:], dim=-1)
            projected = F.linear(query, weight[:e], of_query), *keys_and_values
        return tuple(map(self._heads, projected))

    def _heads(self, x: Tensor) -> Tensor:
        """A view [B, H, N, D]."""
        x = x.unflatten(-1, (-1, self.head_dim))
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _output(self, x: Tensor) -> Tensor:
        """[B, H, N, D] projected, in query's layout."""
        return self.out_proj((x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2))


def identity_values(k: Tensor) -> Tensor:
    """[B, H, N, N]: the values of which an attention over the keys k [B, H, N, D] returns its weights."""
    batch, heads, length, _ = k.shape
    return torch.eye(length, dtype=k.dtype, device=k.device).expand(batch, heads, length, length)

"""LREA and refined attention in FuxiCTR's models, of its model zoo or your own."""

import functools
from typing import Any

import torch
from torch import Tensor, nn

from recattn._check import expect, expect_same_device, expect_shape, expect_tensors
from recattn._imports import importing
from recattn._typing import PaddingSide
from recattn.functional.validation import expect_values, values_are_checked
from recattn.integrations._behaviors import move_to_front, valid_first
from recattn.integrations.patching import PatchHandle, patch
from recattn.nn import LREA, RefinedSelfAttention


class LREATargetAttention(nn.Module):
    """`recattn.nn.LREA.forward` with the call of FuxiCTR's DIN_Attention and MultiHeadTargetAttention:

        attention(target_item [B, D], history_sequence [B, N, D], mask [B, N] or None) -> [B, D]

    FuxiCTR pads on either side. Behaviours, the oldest first, move to the front before they are compressed, so the side
    does not matter.

    Args:
        embed_dim: D.
        max_len: the longest N.
        rank, options: as in `recattn.nn.LREA`.
        out_proj: maps LREA's output, num_heads · head_dim wide, to D. None where that is D.
    """

    def __init__(
        self, embed_dim: int, max_len: int, rank: int, *, out_proj: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.lrea, self.out_proj = LREA(embed_dim, max_len, rank, **options), out_proj
        width = self.lrea.num_heads * self.lrea.head_dim
        expected = f"embed_dim, {embed_dim}, where out_proj is not given"
        expect(out_proj is not None or width == embed_dim, "num_heads · head_dim", expected, width)

    def forward(self, target_item: Tensor, history_sequence: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            target_item: [B, D].
            history_sequence: [B, N, D], the oldest behaviour first. Padding may hold anything, NaN included.
            mask: [B, N], of any dtype, 0 at padding, which may be at any position. None: there is no padding.

        Returns:
            [B, D]; of a user without behaviours LREA's zeros, which out_proj maps.

        Raises:
            ValueError: a shape, dtype or device does not match, or N > max_len.
        """
        expect_tensors(target_item=target_item)
        behaviors, seq_lens = self.without_padding(history_sequence, mask)
        length, longest = history_sequence.shape[1], self.lrea.max_len
        expect(length <= longest, "N of history_sequence", f"at most max_len, {longest}", length)
        out = self.lrea(target_item, behaviors, seq_lens=seq_lens)
        return out if self.out_proj is None else self.out_proj(out)

    def without_padding(self, history_sequence: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Behaviors [B, N, D] and seq_lens [B] as `self.lrea` takes them, in `compress` and `export_state` too."""
        expect_tensors(history_sequence=history_sequence)
        sizes = {"D": self.lrea.embed_dim}
        expect_shape(sizes, "history_sequence", history_sequence, "B N D")
        if mask is None:
            return history_sequence, None
        expect_tensors(mask=mask)
        expect_shape(sizes, "mask", mask, "B N")
        expect_same_device("history_sequence", history_sequence, mask=mask)
        return move_to_front(history_sequence, mask != 0)


def replace_target_attention(model: nn.Module, max_len: int, rank: int, **options: Any) -> PatchHandle:
    """Replace every DIN_Attention and MultiHeadTargetAttention of a FuxiCTR model with an `LREATargetAttention`.

    FuxiCTR's models build their optimizer in the constructor. The new parameters are added to `model.optimizer`, as a
    group with its options, so `model.fit` trains them; `restore()` leaves that group, which then gets no gradient. The
    projection `W_o` of a MultiHeadTargetAttention is kept. Tested with FuxiCTR 2.3.10: DIN and SIM of its
    model_zoo.LongCTR.

    Args:
        model: a FuxiCTR BaseModel, or any module with its layers.
        max_len: the longest history, padding included.
        rank, options: as in `recattn.nn.LREA`. Device and dtype are the model's; num_heads and head_dim are those of a
            MultiHeadTargetAttention, and 1 and D in place of a DIN_Attention.

    Returns:
        A handle whose `restore()`, or the end of whose `with` block, puts the old layers back.

    Raises:
        ImportError: FuxiCTR is not installed, or a module that it imports.
        ValueError: the model has no such layer, or an option is not supported.
    """
    with importing("FuxiCTR", module="fuxictr", extra="fuxictr"):
        from fuxictr.pytorch.layers import (  # pyright: ignore[reportMissingImports] (not in dev.txt)
            DIN_Attention,
            MultiHeadTargetAttention,
        )
    weight = next(model.parameters(), None)
    own = {} if weight is None else {"device": weight.device, "dtype": weight.dtype}

    def replace_din(old: Any, name: str) -> nn.Module:
        return LREATargetAttention(old.embedding_dim, max_len, rank, **own, **options).train(old.training)

    def replace_multi_head(old: Any, name: str) -> nn.Module:
        heads = {"num_heads": old.num_heads, "head_dim": old.head_dim}
        embed_dim = old.W_q.in_features if old.use_qkvo else old.num_heads * old.head_dim
        heads["out_proj"] = old.W_o if old.use_qkvo else None
        return LREATargetAttention(embed_dim, max_len, rank, **own, **heads, **options).train(old.training)

    handle = patch(model, {DIN_Attention: replace_din, MultiHeadTargetAttention: replace_multi_head})
    return _optimized(model, handle)


class MaskedSelfAttention(RefinedSelfAttention):
    """`recattn.nn.RefinedSelfAttention` that also takes a mask per user and head, as FuxiCTR's BST passes it:

        attn_mask [B·H, N, N]: True where key j is hidden from query i, (j is padding, or causal and j > i) and j ≠ i

    Padding may be anywhere. Before the attention it moves to `padding_side`, and the output moves back: with "left" the
    last row of the refinement's matrices belongs to the last token, BST's target.

    Args:
        causal: whether such masks are causal. None: such a mask is an error.
        padding_side: "left" or "right", the side that padding moves to, and where it is if only `seq_lens` is given.
        arguments, options: as in `recattn.nn.RefinedSelfAttention`.
    """

    def __init__(
        self, *arguments: Any, causal: bool | None = None, padding_side: PaddingSide = "left", **options: Any
    ) -> None:
        super().__init__(*arguments, padding_side=padding_side, **options)
        self.causal = causal

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As `RefinedSelfAttention.forward`, or with attn_mask [B·H, N, N], bool, as the only option.

        Its last token always counts as valid.

        Raises:
            ValueError: as in `RefinedSelfAttention.forward`; a mask per user and head that is not bool, or beside other
                options, or without `causal`; on a CPU (elsewhere under RECATTN_CHECK=1) also one that hides anything
                but padding and, if causal, the keys after a query.
        """
        if not isinstance(attn_mask, Tensor) or attn_mask.dim() != 3:
            return super().forward(query, key, value, key_padding_mask, need_weights, attn_mask, **options)
        options |= {"key_padding_mask": key_padding_mask, "need_weights": need_weights}
        others = sorted(name for name, given in options.items() if given is not None and given is not False)
        expect(not others, "attn_mask [B·H, N, N]", "the only option", others)
        expect(query is key is value, "key and value", "query itself, with attn_mask [B·H, N, N]", "other tensors")
        expect(self.batch_first, "batch_first", "True, with attn_mask [B·H, N, N]", self.batch_first)
        sizes = self._expect_inputs(query, key, value)
        valid = self._read_valid(attn_mask, sizes["B"], sizes["N"])
        order = valid_first(valid if self.padding_side == "right" else ~valid)
        x = query.take_along_dim(order, dim=1)
        out, _ = super().forward(x, x, x, seq_lens=valid.sum(dim=1), is_causal=bool(self.causal))
        return out.take_along_dim(order.argsort(dim=1), dim=1), None

    def _read_valid(self, attn_mask: Tensor, batch: int, length: int) -> Tensor:
        """The valid tokens, [B, N] bool: those that the last one, which is valid, sees."""
        expect_shape({"B·H": batch * self.num_heads, "N": length}, "attn_mask", attn_mask, "B·H N N")
        expect_same_device("the parameters", self.in_proj_weight, attn_mask=attn_mask)
        boolean = (
            "bool, True where hidden (nn.MultiheadAttention adds others to the scores: the 1 of DMIN hides nothing)"
        )
        expect(attn_mask.dtype == torch.bool, "attn_mask [B·H, N, N]", boolean, attn_mask.dtype)
        expect(self.causal is not None, "causal", "given with attn_mask [B·H, N, N]", self.causal)
        hidden = attn_mask.unflatten(0, (batch, self.num_heads))
        valid = ~hidden[:, 0, -1]
        if values_are_checked(hidden.device):
            _expect_mask(hidden, valid, self.causal)
        return valid


def _expect_mask(hidden: Tensor, valid: Tensor, causal: bool | None) -> None:
    """Check that hidden [B, H, N, N] is the mask of the tokens valid [B, N]."""
    pairs = hidden.new_ones(hidden.shape[2:])
    expected, keys = ~valid[:, None, None], "padding"
    if causal:
        expected, keys = expected | pairs.triu(1), "padding and the keys after a query"
    expect_values(
        hidden == expected & (pairs.triu(1) | pairs.tril(-1)),
        f"attn_mask [B·H, N, N] must hide {keys} only, and no token from itself (causal={causal})",
        lambda b, h, i, j: (
            f"one that {'hides' if hidden[b, h, i, j] else 'shows'} key {j} "
            f"{'from' if hidden[b, h, i, j] else 'to'} query {i} in head {h} of user {b}"
        ),
    )


def refine_self_attention(
    model: nn.Module,
    max_len: int,
    *,
    padding_side: PaddingSide = "left",
    causal: bool | None = None,
    **refinement: Any,
) -> PatchHandle:
    """Replace every nn.MultiheadAttention of a FuxiCTR model with a `MaskedSelfAttention`.

    The parameters of the old modules are shared. Those of the refinement are added to `model.optimizer`, as in
    `replace_target_attention`. Tested with FuxiCTR 2.3.10: TransAct of its model_zoo.LongCTR, BST of its repository.

    DMIN is refused: its floating mask hides nothing. With `attn_mask = ~attn_mask` in its BehaviorRefinerLayer, and
    `causal=True`, it trains.

    Args:
        model: a FuxiCTR BaseModel, or any module with PyTorch's attention.
        max_len: the longest sequence; for BST FuxiCTR's max_len + 1, as the target is part of it.
        padding_side: for BST, the side that the padding of its sequences moves to; leave it at "left", wherever its
            behaviours are padded. The masks of the others say where the padding is.
        causal: whether a mask per user and head is causal; None: `model.use_causal_mask`, which BST has.
        refinement: `mechanism`, `source`, `rank`, `per_head` and `impl` of `recattn.nn.RefinedSelfAttention`.

    Returns:
        A handle whose `restore()`, or the end of whose `with` block, puts the old modules back.

    Raises:
        ValueError: the model has no such module, or an option is not supported.
    """
    causal = getattr(model, "use_causal_mask", None) if causal is None else causal
    options = {"max_len": max_len, "padding_side": padding_side, "causal": causal, **refinement}
    return _optimized(model, patch(model, {nn.MultiheadAttention: functools.partial(MaskedSelfAttention, **options)}))


def _optimized(model: nn.Module, handle: PatchHandle) -> PatchHandle:
    """Let the optimizer that FuxiCTR's constructor has built train the new parameters too."""
    optimizer = getattr(model, "optimizer", None)
    if optimizer is not None:
        optimizer.add_param_group({"params": handle.added_parameters})
    return handle

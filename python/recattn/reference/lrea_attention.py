"""LREA: target attention over a long history compressed to rank r (arXiv 2503.02542), φ = leaky ReLU.

    compress          c = w_compᵀ behaviors                                [L, d] -> [r, d]
    attention         h = φ(scale · q (Wᵀ keys)ᵀ) (Wᵀ values)              W = w_decomp [r, L]
    absorb            state_keys = scale · keys,   state_values = W Wᵀ values
    absorbed          h = φ(q state_keysᵀ) state_values

With orientation="weights", state_values = φ(W) Wᵀ values.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, pad, relu

from recattn._gather import gather_rows
from recattn._typing import Orientation


def lrea_compress(
    behaviors: Tensor, w_comp: Tensor, seq_lens: Tensor | None = None, *,
    item_ids: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """c = w_compᵀ behaviors, [U, r, d]; see `recattn.lrea_compress`."""
    if item_ids is not None:
        behaviors = gather_rows(behaviors, _without_padding(item_ids, seq_lens))
    if cu_seqlens is not None:
        histories = behaviors.split(cu_seqlens.diff().tolist())
        # `expand` sums the users' gradients at once, which rounds less than one by one.
        copies = w_comp.expand(len(histories), -1, -1).unbind()
        compressed = [w[: len(e)].T @ e for w, e in zip(copies, histories, strict=True)]
        return torch.stack(compressed) if compressed else behaviors.new_zeros(0, w_comp.shape[1], behaviors.shape[1])
    _, length, _ = behaviors.shape
    if seq_lens is not None:
        padding = torch.arange(length, device=behaviors.device) >= seq_lens[:, None]  # [U, L]
        behaviors = behaviors.masked_fill(padding[..., None], 0)
    return w_comp[:length].T @ behaviors  # [U, r, d]


def lrea_attention(
    targets: Tensor, keys: Tensor, values: Tensor, w_decomp: Tensor, target_offsets: Tensor, *,
    seq_lens: Tensor | None = None, negative_slope: float = 0.01, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """h = φ(scale · q (Wᵀ keys)ᵀ) (Wᵀ values), [T, H, dv]; see `recattn.lrea_attention`."""
    scale = 1 / math.sqrt(targets.shape[-1]) if scale is None else scale
    outputs = []
    users = (_decompressions(w_decomp, seq_lens, len(keys)), keys, values, _by_user(targets, target_offsets))
    for w, k, v, q in zip(*users, strict=True):  # [r, L], [H, r, d], [H, r, dv], [H, n, d]
        restored_keys, restored_values = w.T @ k, w.T @ v  # [H, L, d], [H, L, dv]
        scores = leaky_relu(scale * q @ restored_keys.mT, negative_slope)  # [H, n, L]
        outputs.append(scores @ restored_values)
    return _join(outputs, targets, values)


def lrea_absorb(
    keys: Tensor, values: Tensor, w_decomp: Tensor, *, seq_lens: Tensor | None = None, scale: float | None = None,
    orientation: Orientation = "scores", negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scale · keys, W Wᵀ values): the state that serves a user; see `recattn.lrea_absorb`."""
    scale = 1 / math.sqrt(keys.shape[-1]) if scale is None else scale
    state_values = []
    for w, v in zip(_decompressions(w_decomp, seq_lens, len(keys)), values, strict=True):
        weights = leaky_relu(w, negative_slope) if orientation == "weights" else w
        state_values.append(weights @ w.T @ v)
    return scale * keys, torch.stack(state_values) if state_values else values


def lrea_absorbed_attention(
    targets: Tensor, state_keys: Tensor, state_values: Tensor, slots: Tensor, target_offsets: Tensor, *,
    item_ids: Tensor | None = None, key_scales: Tensor | None = None, value_scales: Tensor | None = None,
    negative_slope: float = 0.01, invalid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """h = φ(q state_keysᵀ) state_values, [T, H, dv]; see `recattn.lrea_absorbed_attention`."""
    if key_scales is not None and value_scales is not None:
        state_keys = _dequantized(state_keys, key_scales, targets.dtype)
        state_values = _dequantized(state_values, value_scales, targets.dtype)
    if invalid is not None:
        if item_ids is not None:
            targets, item_ids = _with_row_of_zeros(targets), _counted_rows(item_ids, len(targets), invalid)
        slots = _counted_rows(slots, len(state_keys), invalid)
        target_offsets = _counted_offsets(target_offsets, len(targets if item_ids is None else item_ids), invalid)
        # Rows before the first user's and after the last user's get zeros.
        slots = pad(slots, (1, 1), value=len(state_keys))
        state_keys, state_values = _with_row_of_zeros(state_keys), _with_row_of_zeros(state_values)
    if item_ids is not None:
        targets = gather_rows(targets, item_ids)
    outputs = []
    states = (gather_rows(table, slots).to(targets.dtype).unbind() for table in (state_keys, state_values))
    for keys, values, q in zip(*states, _by_user(targets, target_offsets), strict=True):
        scores = leaky_relu(q @ keys.mT, negative_slope)  # [H, n, r]
        outputs.append(scores @ values)
    return _join(outputs, targets, state_values)


def lrea_nonnegativity_loss(w_decomp: Tensor, compressed: Tensor, *, reduction: str = "mean") -> Tensor:
    """Σ relu(-w_decomp)² + Σ relu(-compressed)², or its mean over users; see `recattn.lrea_nonnegativity_loss`."""
    of_users = relu(-compressed).square().sum()
    if reduction == "mean":
        of_users = of_users / max(len(compressed), 1)
    return relu(-w_decomp).square().sum() + of_users


def _without_padding(item_ids: Tensor, seq_lens: Tensor | None) -> Tensor:
    """The ids, with 0 at padding, which may hold any number."""
    if seq_lens is None:
        return item_ids.long()
    padding = torch.arange(item_ids.shape[1], device=item_ids.device) >= seq_lens[:, None]
    return item_ids.long().masked_fill(padding, 0)


def _with_row_of_zeros(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros(1, *table.shape[1:])])


def _counted_rows(rows: Tensor, table_size: int, invalid: Tensor) -> Tensor:
    """Replace rows out of range by table_size, and add their number to `invalid`."""
    valid = (rows >= 0) & (rows < table_size)
    invalid += (~valid).sum()
    return rows.where(valid, table_size)


def _counted_offsets(offsets: Tensor, total: int, invalid: Tensor) -> Tensor:
    """[0, *offsets clamped to 0 .. total and made ascending, total]. Adds the number of users with wrong offsets to
    `invalid`."""
    wrong = offsets[:-1] > offsets[1:]
    wrong[:1] |= offsets[0] != 0
    wrong[-1:] |= offsets[-1] != total
    invalid += wrong.sum()
    return pad(pad(offsets.clamp(0, total).cummax(0).values, (1, 0)), (0, 1), value=total)


def _dequantized(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return (rows * scales[..., None]).to(dtype)


def _by_user(targets: Tensor, target_offsets: Tensor) -> list[Tensor]:
    """[T, H, d] -> [H, n, d] for each user."""
    return [q.transpose(0, 1) for q in targets.split(target_offsets.diff().tolist())]


def _decompressions(w_decomp: Tensor, seq_lens: Tensor | None, users: int) -> Sequence[Tensor]:
    """W_decomp [r, L] of each user. `expand` sums the users' gradients at once, which rounds less than one by one."""
    copies = w_decomp.expand(users, -1, -1).unbind()
    return copies if seq_lens is None else [w[:, : int(length)] for w, length in zip(copies, seq_lens, strict=True)]


def _join(outputs: list[Tensor], targets: Tensor, values: Tensor) -> Tensor:
    """[H, n, dv] of each user -> [T, H, dv]"""
    if not outputs:
        return targets @ targets.new_zeros(targets.shape[-1], values.shape[-1])  # [0, H, dv]
    return torch.cat(outputs, dim=1).transpose(0, 1)

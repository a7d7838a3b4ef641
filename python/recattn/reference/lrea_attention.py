"""LREA: target attention over a long history compressed to rank r. Equations as in the public functions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu, pad, relu

from recattn._gather import gather_rows


def lrea_compress(
    behaviors: Tensor, w_comp: Tensor, seq_lens: Tensor | None = None, *, item_ids: Tensor | None = None
) -> Tensor:
    if item_ids is not None:
        behaviors = gather_rows(behaviors, _without_padding(item_ids, seq_lens))
    _, length, _ = behaviors.shape
    if seq_lens is not None:
        padding = torch.arange(length, device=behaviors.device) >= seq_lens[:, None]  # [U, L]
        behaviors = behaviors.masked_fill(padding[..., None], 0)
    return w_comp[:length].T @ behaviors  # [U, r, d]


def lrea_attention(
    targets: Tensor,
    keys: Tensor,
    values: Tensor,
    w_decomp: Tensor,
    target_offsets: Tensor,
    *,
    seq_lens: Tensor | None = None,
    negative_slope: float = 0.01,
    scale: float | None = None,
) -> Tensor:
    scale = targets.shape[-1] ** -0.5 if scale is None else scale
    outputs = []
    users = (_decompressions(w_decomp, seq_lens, len(keys)), keys, values, _by_user(targets, target_offsets))
    for w, k, v, q in zip(*users, strict=True):  # [r, L], [H, r, d], [H, r, dv], [H, n, d]
        restored_keys, restored_values = w.T @ k, w.T @ v  # [H, L, d], [H, L, dv]
        scores = leaky_relu(scale * q @ restored_keys.mT, negative_slope)  # [H, n, L]
        outputs.append(scores @ restored_values)
    return _join(outputs, targets, values)


def lrea_absorb(
    keys: Tensor,
    values: Tensor,
    w_decomp: Tensor,
    *,
    seq_lens: Tensor | None = None,
    scale: float | None = None,
    orientation: str = "scores",
    negative_slope: float = 0.01,
) -> tuple[Tensor, Tensor]:
    scale = keys.shape[-1] ** -0.5 if scale is None else scale
    state_values = []
    for w, v in zip(_decompressions(w_decomp, seq_lens, len(keys)), values, strict=True):
        weights = leaky_relu(w, negative_slope) if orientation == "weights" else w
        state_values.append(weights @ w.T @ v)
    return scale * keys, torch.stack(state_values) if state_values else values


def lrea_absorbed_attention(
    targets: Tensor,
    state_keys: Tensor,
    state_values: Tensor,
    slots: Tensor,
    target_offsets: Tensor,
    *,
    item_ids: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    negative_slope: float = 0.01,
    invalid: Tensor | None = None,
) -> Tensor:
    if key_scales is not None:
        state_keys = _dequantized(state_keys, key_scales, targets.dtype)
        state_values = _dequantized(state_values, value_scales, targets.dtype)
    if invalid is not None:
        if item_ids is not None:
            targets, item_ids = _with_row_of_zeros(targets), _counted_rows(item_ids, len(targets), invalid)
        slots = _counted_rows(slots, len(state_keys), invalid)
        target_offsets = _counted_offsets(target_offsets, len(targets if item_ids is None else item_ids), invalid)
        slots = pad(slots, (1, 1), value=len(state_keys))  # of nobody, before the first user and behind the last
        state_keys, state_values = _with_row_of_zeros(state_keys), _with_row_of_zeros(state_values)
    if item_ids is not None:
        targets = gather_rows(targets, item_ids)
    outputs = []
    states = (gather_rows(table, slots).unbind() for table in (state_keys, state_values))
    for keys, values, q in zip(*states, _by_user(targets, target_offsets), strict=True):
        scores = leaky_relu(q @ keys.mT, negative_slope)  # [H, n, r]
        outputs.append(scores @ values)
    return _join(outputs, targets, state_values)


def lrea_nonnegativity_loss(w_decomp: Tensor, compressed: Tensor) -> Tensor:
    return relu(-w_decomp).square().sum() + relu(-compressed).square().sum()


def _without_padding(item_ids: Tensor, seq_lens: Tensor | None) -> Tensor:
    """The ids, 0 at padding, where any number may stand."""
    if seq_lens is None:
        return item_ids.long()
    padding = torch.arange(item_ids.shape[1], device=item_ids.device) >= seq_lens[:, None]
    return item_ids.long().masked_fill(padding, 0)


def _with_row_of_zeros(table: Tensor) -> Tensor:
    return torch.cat([table, table.new_zeros(1, *table.shape[1:])])


def _counted_rows(rows: Tensor, table_size: int, invalid: Tensor) -> Tensor:
    """The rows, table_size for those out of range, whose number is added to `invalid`."""
    valid = (rows >= 0) & (rows < table_size)
    invalid += (~valid).sum()
    return rows.where(valid, table_size)


def _counted_offsets(offsets: Tensor, total: int, invalid: Tensor) -> Tensor:
    """0, the offsets in order and within 0 .. total, and total; the users that they were wrong for are counted."""
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
    """W_decomp [r, L] of each user; `expand` adds up their gradients in float32, while one by one they would round."""
    copies = w_decomp.expand(users, -1, -1).unbind()
    return copies if seq_lens is None else [w[:, : int(length)] for w, length in zip(copies, seq_lens, strict=True)]


def _join(outputs: list[Tensor], targets: Tensor, values: Tensor) -> Tensor:
    """[H, n, dv] of each user -> [T, H, dv]"""
    if not outputs:
        return targets @ targets.new_zeros(targets.shape[-1], values.shape[-1])  # [0, H, dv]
    return torch.cat(outputs, dim=1).transpose(0, 1)

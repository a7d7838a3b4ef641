"""Figures that compare LREA's absorbed form with the restored one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from recattn._check import expect_index, expect_same_device, expect_shape

if TYPE_CHECKING:
    from recattn.nn.lrea import LREA, LREAState

Score = Callable[[Tensor, Tensor], Tensor]


class Fidelity(NamedTuple):
    """The absorbed form compared with the restored one, at one rank; `LREA.fidelity` has the formulas."""

    rank: int
    dtype: torch.dtype  # of the states
    relative_error: float
    rank_correlation: float
    truncation_error: float
    rare_loss: float
    common_loss: float


def measure_fidelity(
    lrea: LREA,
    targets: Tensor,
    behaviors: Tensor,
    target_offsets: Tensor,
    seq_lens: Tensor | None,
    *,
    lengths: Tensor,
    ranks: Sequence[int],
    dtype: torch.dtype | None,
    score: Score,
    rare: Tensor | None,
    probes: Tensor | None,
) -> list[Fidelity]:
    """The body of `LREA.fidelity`, for targets [T, target_dim] and histories of `lengths` [U] behaviours."""
    own = lrea(targets, behaviors, target_offsets, seq_lens=seq_lens)
    rarest, commonest = _rarest_and_commonest(behaviors, lengths)
    if rare is not None:
        _expect_in_history(rare, lengths)
        rarest = rare.long()
    report = []
    for rank in ranks:
        module = lrea if rank == lrea.rank else lrea.truncated(rank)
        restored = module(targets, behaviors, target_offsets, seq_lens=seq_lens)
        state = module.export_state(behaviors, seq_lens, dtype=dtype)
        absorbed = module.attend(targets, state, target_offsets=target_offsets)
        scores = score(absorbed, targets), score(restored, targets)
        for given in scores:
            expect_shape({"T": len(targets)}, "score(outputs, targets)", given, "T")
        report.append(
            Fidelity(
                rank,
                state.keys.dtype,
                _relative_error(absorbed, restored),
                _mean_rank_correlation(*scores, target_offsets),
                _relative_error(restored, own),
                _lost_share(module, behaviors, state, rarest, probes),
                _lost_share(module, behaviors, state, commonest, probes),
            )
        )
    return report


def _lost_share(lrea: LREA, behaviors: Tensor, state: LREAState, positions: Tensor, probes: Tensor | None) -> float:
    """1 − restored score / score of one behaviour per user, by least squares over the users."""
    if probes is None and lrea.target_dim != lrea.embed_dim:
        return math.nan
    users, length, _ = behaviors.shape
    padding = torch.arange(length, device=behaviors.device) >= state.lengths[:, None]  # [U, L]
    history = behaviors.masked_fill(padding[..., None], 0).to(state.compressed.dtype)
    chosen = torch.arange(users, device=behaviors.device), positions
    w_q, w_k, w_decomp = (weight.to(history.dtype) for weight in (lrea.w_q, lrea.w_k, lrea.w_decomp[:, :length]))
    query = (history[chosen] if probes is None else probes.to(history.dtype)) @ w_q @ w_k.T  # [U, embed_dim]
    scores = (history @ query[..., None]).squeeze(-1)  # [U, L]
    restored = (state.compressed @ query[..., None]).squeeze(-1) @ w_decomp
    scores, restored = (x.double().masked_fill(padding, 0) for x in (scores, restored))
    if not are_finite(scores, restored):  # scaling a list with an infinite entry would set the others to 0
        return math.nan
    score, restored = (F.normalize(x, dim=1)[chosen] for x in (scores, restored))
    size = score.square().sum()
    return (1 - restored @ score / size).item() if size > 0 else math.nan


def _rarest_and_commonest(behaviors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Positions [U] of the behaviours least and most similar to the mean of their history; 0 if it is empty."""
    padding = torch.arange(behaviors.shape[1], device=behaviors.device) >= lengths[:, None]  # [U, L]
    history = behaviors.double().masked_fill(padding[..., None], 0)
    similarity = F.cosine_similarity(history, history.sum(1, keepdim=True), dim=-1)
    rarest, commonest = (similarity.masked_fill(padding, sign * math.inf).mul(sign).argmin(1) for sign in (1, -1))
    return rarest, commonest


def _expect_in_history(rare: Tensor, lengths: Tensor) -> None:
    expect_index({"U": len(lengths)}, "rare", rare, "U")
    expect_same_device("behaviors", lengths, rare=rare)
    limits = lengths.clamp(min=1)
    outside = ((rare < 0) | (rare >= limits)).nonzero().flatten().tolist()
    if outside:
        user = outside[0]
        expected = f"a position in the history of each user, below {limits[user].item()} for user {user}"
        raise ValueError(f"rare must be {expected}, got {rare[user].item()}")


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; 0 if they are equal, NaN if they are empty."""
    if expected.numel() == 0:
        return math.nan
    error, size = (actual.double() - expected.double()).norm(), expected.double().norm()
    return 0.0 if error == 0 else (error / size).item()


def _mean_rank_correlation(absorbed: Tensor, restored: Tensor, target_offsets: Tensor) -> float:
    """Mean of Spearman's correlation over the users whose restored scores are not all equal."""
    if not are_finite(absorbed, restored):  # overflowed scores would look like ties
        return math.nan
    pairs = zip(*(x.double().split(target_offsets.diff().tolist()) for x in (absorbed, restored)), strict=True)
    correlations = [_rank_correlation(x, y) for x, y in pairs if len(y) > 1 and (y != y[0]).any()]
    return sum(correlations) / len(correlations) if correlations else math.nan


def _rank_correlation(scores: Tensor, expected: Tensor) -> float:
    """Pearson's correlation of the ranks; 0 if the scores of one side are all equal."""
    x, y = (ranks - ranks.mean() for ranks in map(_ranks, (scores, expected)))
    norm = (x.norm() * y.norm()).item()
    return ((x @ y) / norm).clamp(-1, 1).item() if norm > 0 else 0.0  # clamped against rounding


def are_finite(*tensors: Tensor) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors)


def _ranks(scores: Tensor) -> Tensor:
    """Ranks from 1, ties at their mean rank."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]

"""Histories of recommender libraries, padded anywhere, as LREA takes them: the oldest behaviour first, padding last."""

from torch import Tensor


def valid_first(valid: Tensor) -> Tensor:
    """The order [B, N, 1], for take_along_dim, in which valid rows come before others and each kind stays in order.

    Args:
        valid: [B, N] bool.
    """
    return (~valid).byte().argsort(dim=1, stable=True).unsqueeze(-1)


def move_to_front(history: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Move the valid rows of history [B, N, D] to the front, in order; returns behaviors [B, N, D] and seq_lens [B].

    Args:
        history: [B, N, D].
        valid: [B, N] bool.
    """
    return history.take_along_dim(valid_first(valid), dim=1), valid.sum(dim=1)

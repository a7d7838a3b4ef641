"""Histories of recommender libraries, padded anywhere, as LREA takes them: the oldest behaviour first, padding last."""

from torch import Tensor


def move_to_front(history: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Move the valid rows of history [B, N, D] to the front, in order; returns behaviors [B, N, D] and seq_lens [B].

    Args:
        history: [B, N, D].
        valid: [B, N] bool.
    """
    order = (~valid).byte().argsort(dim=1, stable=True)
    return history.gather(1, order.unsqueeze(-1).expand_as(history)), valid.sum(dim=1)

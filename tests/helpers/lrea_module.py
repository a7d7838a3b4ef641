"""An LREA module, inputs for it, and both of its forms written by hand."""

import math
from itertools import pairwise

import torch

from recattn.nn import LREA

E, T_DIM, LMAX, R = 12, 10, 20, 4
LENGTHS = torch.tensor([20, 0, 7, 1])
COUNTS = [3, 2, 0, 5]
OFFSETS = torch.tensor([0, 3, 5, 5, 10])
USERS, TARGETS = len(COUNTS), sum(COUNTS)


def module(heads=2, **options):
    """An LREA with compression and decompression of either sign."""
    options = {"target_dim": T_DIM, "head_dim": 5, "dtype": torch.float64} | options
    lrea = LREA(E, LMAX, R, heads, **options)
    with torch.no_grad():
        lrea.w_comp.normal_(std=0.5)
        lrea.w_decomp.normal_(std=0.5)
    return lrea


def positive(**options):
    lrea = module(**options)
    with torch.no_grad():
        lrea.w_comp.abs_()
        lrea.w_decomp.abs_()
    return lrea


def inputs(dtype=torch.float64, target_dim=T_DIM, length=LMAX):
    """Targets and behaviours; padding is NaN."""
    behaviors = torch.randn(USERS, length, E, dtype=dtype)
    behaviors[torch.arange(length) >= LENGTHS[:, None]] = torch.nan
    return torch.randn(TARGETS, target_dim, dtype=dtype), behaviors


def leaky(x, slope):
    return x.clamp(min=0) + slope * x.clamp(max=0)


def parts(lrea, behaviors, user):
    """W [r, L] and C [r, E] of one user, and a function that gives each head's columns of a matrix."""
    n = int(LENGTHS[user])
    return lrea.w_decomp[:, :n], lrea.w_comp[:n].T @ behaviors[user, :n]


def by_hand(lrea, targets, behaviors, absorbed=False):
    """Both forms, one user and one head at a time."""
    width, slope, rows = lrea.head_dim, lrea.negative_slope, []
    for user, (start, stop) in enumerate(pairwise(OFFSETS)):
        w, c = parts(lrea, behaviors, user)
        heads = []
        for h in range(lrea.num_heads):
            columns = slice(h * width, (h + 1) * width)
            q = targets[start:stop] @ lrea.w_q[:, columns] / math.sqrt(width)
            k, v = c @ lrea.w_k[:, columns], c @ lrea.w_v[:, columns]
            if not absorbed:
                heads.append(leaky(q @ (w.T @ k).T, slope) @ (w.T @ v))
            elif lrea.orientation == "scores":
                heads.append(leaky(q @ k.T, slope) @ (w @ w.T @ v))
            else:
                heads.append(q @ k.T @ (leaky(w, slope) @ w.T @ v))
        rows.append(torch.cat(heads, dim=1))
    return torch.cat(rows)

"""torch.compile, as the peers that use it want it."""

from collections.abc import Callable
from functools import cache

import torch


@cache
def compiled(function: Callable) -> Callable:
    """Compiled anew for every shape. (One shape too many would run uncompiled, in silence but for fullgraph.)"""
    torch._dynamo.config.recompile_limit = 128
    return torch.compile(function, dynamic=False, fullgraph=True)

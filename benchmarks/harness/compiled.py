"""torch.compile with the settings that all compiled implementations share."""

from collections.abc import Callable
from functools import cache

import torch


@cache
def compiled(function: Callable) -> Callable:
    """Compile anew for every shape. Past the recompile limit torch would run eager; fullgraph makes that an error."""
    torch._dynamo.config.recompile_limit = 128
    return torch.compile(function, dynamic=False, fullgraph=True)

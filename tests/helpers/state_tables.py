"""Tables and states for the tests of StateTable."""

import torch

from recattn.serving import StateTable

H, R, D, DV = 2, 4, 8, 12
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def make_table(capacity: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu") -> StateTable:
    return StateTable(capacity, heads=H, rank=R, dim=D, value_dim=DV, dtype=dtype, device=device)


def random_states(users: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(users, H, R, D).to(dtype), torch.randn(users, H, R, DV).to(dtype)


def ids(*user_ids: int) -> torch.Tensor:
    return torch.tensor(user_ids, dtype=torch.int64)


def stamped(stamps: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """States filled with their user's stamp."""
    stamp = torch.tensor(stamps, dtype=torch.float32)[:, None, None, None]
    return stamp.expand(-1, H, R, D), -stamp.expand(-1, H, R, DV)


def stamps_of(request) -> list[int]:
    """The stamp of each user's row, 0 for no user. Fails if a row mixes two states."""
    keys, values, *scales = (table[request.slots].float() for table in request.tables.named().values())
    if scales:
        keys, values = ((x * scale[..., None]).round() for x, scale in zip((keys, values), scales, strict=True))
    rows = torch.cat([keys.flatten(1), -values.flatten(1)], 1)
    assert bool((rows == rows[:, :1]).all()), "a row holds parts of two states"
    return rows[:, 0].long().tolist()


NAN, INF = float("nan"), float("inf")
# What no table can hold, or not in its dtype.
INVALID = {
    torch.float32: [NAN, INF, -INF, 1e39, -1e300],
    torch.bfloat16: [NAN, INF, -INF, 3.4e38, 1e39],
    torch.float16: [NAN, INF, -INF, 65520.0, -1e5],
    torch.int8: [NAN, INF, -INF, 1e39, -1e300],
}

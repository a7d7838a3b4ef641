"""States as they are stored: in the shapes, dtype and on the device of a table, finite, int8 with valid scales."""

import math
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from recattn._check import FLOATING, expect, expect_dtype, expect_index, expect_shape, expect_tensors
from recattn.functional import lrea_quantize
from recattn.functional.lrea_attention import INT8_MAX

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
LARGEST_SCALE = torch.finfo(torch.float32).max / INT8_MAX  # with a larger scale, scale · entry may overflow


def user_ids_on_host(user_ids: Tensor) -> np.ndarray:
    """An array that shares the tensor's memory, as the slot map and the stores read it."""
    expect_index({}, "user_ids", user_ids, "U")
    expect(user_ids.device.type == "cpu", "user_ids", "on the CPU", user_ids.device)
    return user_ids.numpy()


def event_ids_on_host(event_ids: Tensor, axis: str, size: int) -> np.ndarray:
    """Event ids [axis] as int64, none of them negative."""
    expect_index({axis: size}, "event_ids", event_ids, axis)
    events = event_ids.cpu().numpy().astype(np.int64)
    expect(events.min(initial=0) >= 0, "event_ids", "at least 0", events.min(initial=0))
    return events


def as_stored(
    given: dict[str, Any], sizes: dict[str, int], dtype: torch.dtype, device: torch.device
) -> dict[str, Tensor]:
    """Keys, values and, for int8, their scales in the dtype and on the device of a table. Quantizes for int8.

    Args:
        given: keys, values, key_scales, value_scales.
        sizes: U, H, r, d and dv.

    Raises:
        ValueError: a shape or dtype does not match.
    """
    keys, values = given["keys"], given["values"]
    expect_tensors(keys=keys, values=values)
    expect_shape(sizes, "keys", keys, "U H r d")
    expect_shape(sizes, "values", values, "U H r dv")
    states = dict(given)
    if dtype == torch.int8 and keys.dtype == torch.int8:
        expect_dtype("values", values, (torch.int8,))
        for name in ("key_scales", "value_scales"):
            expect_tensors(**{name: states[name]})
            expect_shape(sizes, name, states[name], "U H r")
            expect_dtype(name, states[name], (torch.float32,))
    else:
        expect_dtype("keys", keys, FLOATING)
        expect_dtype("values", values, FLOATING)
        for name in ("key_scales", "value_scales"):
            expect(states[name] is None, name, "None: they belong to int8 states in an int8 table", states[name])
        if dtype == torch.int8:
            states["keys"], states["key_scales"] = lrea_quantize(keys)
            states["values"], states["value_scales"] = lrea_quantize(values)
    dtypes = {"keys": dtype, "values": dtype}
    if dtype == torch.int8:
        dtypes |= {"key_scales": torch.float32, "value_scales": torch.float32}
    return {name: states[name].detach().to(device, dtype) for name, dtype in dtypes.items()}


def invalid_positions(states: dict[str, Tensor], dtype: torch.dtype) -> list[int]:
    """Positions of the users whose state a table of this dtype cannot hold."""
    if dtype == torch.int8:
        scales = torch.stack((states["key_scales"], states["value_scales"]), 1)  # [U, 2, H, r]
        low, high = scales.aminmax() if scales.numel() else (0.0, 0.0)
        if low >= 0 and high <= LARGEST_SCALE:  # False for NaN
            return []
        return (~_valid_scales(scales).all((1, 2, 3))).nonzero()[:, 0].tolist()
    keys, values = states["keys"], states["values"]
    # The cheapest check: a finite sum means finite entries. A sum that overflows only leads to the full check.
    if all(math.isfinite(x.sum(dtype=torch.float32)) for x in (keys, values)):
        return []
    valid = keys.isfinite().all((1, 2, 3)) & values.isfinite().all((1, 2, 3))
    return (~valid).nonzero()[:, 0].tolist()


def raise_invalid(
    user: int, position: int, given: dict[str, Any], states: dict[str, Tensor], dtype: torch.dtype, count: int
) -> NoReturn:
    """Raise a ValueError that names the worst entry of an invalid state, in the tensor that the caller gave."""
    for name, scales_name in (("keys", "key_scales"), ("values", "value_scales")):
        if dtype == torch.int8:
            valid = _valid_scales(states[scales_name][position])
        else:
            valid = states[name][position].isfinite()
        if not valid.all():
            break
    largest = torch.finfo(torch.float32 if dtype == torch.int8 else dtype).max
    expected = f"finite in the table's {dtype}, so at most {largest:g}"
    if given[scales_name] is not None:
        name, expected = scales_name, f"between 0 and {LARGEST_SCALE:g}"
    entries = given[name][position].detach()
    entries = entries[~valid.to(entries.device)].flatten()
    worst = entries[entries.abs().argmax()].item()
    raise ValueError(
        f"{name} of user {user} must be {expected}, got {worst:g} (invalid states: {count}); mend them, or store "
        'such users as missing by put(..., on_invalid="missing")'
    )


def _valid_scales(scales: Tensor) -> Tensor:
    return scales.clamp(0, LARGEST_SCALE).eq(scales)  # False for NaN

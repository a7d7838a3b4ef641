"""The saved form of a StateTable: a dict of tensors, two of which are a format version and a checksum."""

import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from recattn._check import expect, expect_tensors

FORMAT_VERSION = 1


def add_checksum(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """The states with `format_version` and `checksum` added."""
    versioned = {"format_version": torch.tensor(FORMAT_VERSION), **states}
    return {**versioned, "checksum": torch.tensor(_checksum(versioned))}


def select(saved: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Any]:
    """The states of these names, without `format_version` and `checksum`.

    Raises:
        ValueError: another version or other names.
    """
    expect(isinstance(saved, Mapping), "state", "a dict of StateTable.state_dict", type(saved).__name__)
    version = saved.get("format_version")
    known = _number(version) == FORMAT_VERSION
    advice = "save it anew with the recattn that wrote it, or put its states without a check"
    expect(known, "format_version of state", f"{FORMAT_VERSION} ({advice})", _printable(version))
    needed = ("format_version", *names, "checksum")
    expected = f"a dict of {', '.join(needed)} (load it into a table of the dtype that it was saved from)"
    expect(set(saved) == set(needed), "state", expected, ", ".join(map(str, saved)))
    expect_tensors(**saved)
    for name, x in saved.items():
        expect(not x.is_meta, f"{name} of state", "a tensor with entries", "one on the meta device")
    return {name: saved[name] for name in names}


def verify_checksum(saved: Mapping[str, Tensor]) -> None:
    """Raise a ValueError if the checksum does not match."""
    states = dict(saved)
    checksum = states.pop("checksum")
    computed = _checksum(states)
    expected = f"{computed}, that of its tensors (the state is damaged: load another copy)"
    expect(_number(checksum) == computed, "checksum of state", expected, _printable(checksum))


def _number(x: object) -> object:
    """What a tensor of one number holds, None for anything else."""
    return x.item() if isinstance(x, Tensor) and x.numel() == 1 and not x.is_meta else None


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of all names, dtypes, shapes and bytes."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        entries = tensor.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(entries.view(torch.uint8).numpy().data, checksum)
    return checksum


def _printable(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.tolist() if value.numel() < 10 and not value.is_meta else f"a tensor of shape {list(value.shape)}"

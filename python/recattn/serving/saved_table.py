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


def verify_checksum(saved: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Any]:
    """The states of these names, without `format_version` and `checksum`.

    Raises:
        ValueError: another version or other names, or the checksum does not match.
    """
    expect(isinstance(saved, Mapping), "state", "a dict of StateTable.state_dict", type(saved).__name__)
    version = saved.get("format_version")
    known = isinstance(version, Tensor) and version.numel() == 1 and version.item() == FORMAT_VERSION
    advice = "save it anew with the recattn that wrote it, or put its states without a check"
    expect(known, "format_version of state", f"{FORMAT_VERSION} ({advice})", _printable(version))
    needed = ("format_version", *names, "checksum")
    expected = f"a dict of {', '.join(needed)} (load it into a table of the dtype that it was saved from)"
    expect(set(saved) == set(needed), "state", expected, ", ".join(map(str, saved)))
    expect_tensors(**saved)
    states = dict(saved)
    checksum = states.pop("checksum")
    computed = _checksum(states)
    intact = checksum.numel() == 1 and checksum.item() == computed
    expected = f"{computed}, that of its tensors (the state is damaged: load another copy)"
    expect(intact, "checksum of state", expected, _printable(checksum))
    del states["format_version"]
    return states


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of all names, dtypes, shapes and bytes."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        entries = tensor.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(entries.view(torch.uint8).numpy().data, checksum)
    return checksum


def _printable(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else value

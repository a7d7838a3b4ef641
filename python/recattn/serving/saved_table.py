"""A saved StateTable: a dict of tensors alone, among them the version of the format and a checksum of all others."""

import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from recattn._check import expect, expect_tensors

FORMAT_VERSION = 1


def seal(states: dict[str, Tensor]) -> dict[str, Tensor]:
    """The states, with `format_version` and `checksum`."""
    versioned = {"format_version": torch.tensor(FORMAT_VERSION), **states}
    return {**versioned, "checksum": torch.tensor(_checksum(versioned))}


def unseal(saved: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The states of these names, as they were sealed.

    Raises:
        ValueError: another version, other names, or not what was sealed.
    """
    expect(isinstance(saved, Mapping), "state", "a dict of StateTable.state_dict", type(saved).__name__)
    version = saved.get("format_version")
    known = isinstance(version, Tensor) and version.numel() == 1 and version.item() == FORMAT_VERSION
    advice = "save it anew with the recattn that wrote it, or put its states without a check"
    expect(known, "format_version of state", f"{FORMAT_VERSION} ({advice})", _brief(version))
    needed = ("format_version", *names, "checksum")
    expected = f"a dict of {', '.join(needed)} (load it into a table of the dtype that it was saved from)"
    expect(set(saved) == set(needed), "state", expected, ", ".join(map(str, saved)))
    expect_tensors(**saved)
    states = dict(saved)
    checksum = states.pop("checksum")
    computed = _checksum(states)
    intact = checksum.numel() == 1 and checksum.item() == computed
    expected = f"{computed}, that of its tensors (the state is damaged: load another copy)"
    expect(intact, "checksum of state", expected, _brief(checksum))
    del states["format_version"]
    return states


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of every name, dtype, shape and byte."""
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        entries = tensor.detach().cpu().contiguous().flatten()
        checksum = zlib.crc32(entries.view(torch.uint8).numpy(), checksum)
    return checksum


def _brief(value: object) -> object:
    return value.tolist() if isinstance(value, Tensor) else value

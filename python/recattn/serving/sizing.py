"""`python -m recattn lrea-size`: memory and bandwidth needed to serve LREA."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from recattn._arguments import positive
from recattn.serving.state_values import STATE_DTYPES

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STATE_DTYPES}
TARGET_DTYPES = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
SCALE_BYTES = 4
# Per user in SlotMap: 1.5 index entries (id, row) and one row (id, pins, reference bit, state), 16 bytes each.
SLOT_MAP_BYTES = 40


@dataclass(frozen=True)
class LreaSize:
    """Bytes held by a StateTable of `users`, and bytes moved by a request of one user with `candidates`."""

    users: int
    rank: int
    dim: int
    value_dim: int
    heads: int
    dtype: str
    target_dtype: str
    candidates: int

    @property
    def state_bytes(self) -> int:
        """Per user: keys [H, r, d] and values [H, r, dv]."""
        return self.heads * self.rank * (self.dim + self.value_dim) * DTYPES[self.dtype].itemsize

    @property
    def scale_bytes(self) -> int:
        """Per user: one float32 per row of an int8 state."""
        return 2 * self.heads * self.rank * SCALE_BYTES if DTYPES[self.dtype] == torch.int8 else 0

    @property
    def row_bytes(self) -> int:
        return self.state_bytes + self.scale_bytes

    @property
    def candidate_bytes(self) -> int:
        """Per request: targets read [H, d] and outputs written [H, dv]."""
        return self.candidates * self.heads * (self.dim + self.value_dim) * DTYPES[self.target_dtype].itemsize

    @property
    def request_bytes(self) -> int:
        return self.row_bytes + self.candidate_bytes

    def users_in(self, memory: float) -> int:
        """Users that fit into a table of `memory` bytes, besides its row of zeros."""
        return max(int(memory // self.row_bytes) - 1, 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--users", type=positive(int), required=True)
    parser.add_argument("--rank", type=positive(int), required=True, help="r, rows of a state")
    parser.add_argument("--dim", type=positive(int), required=True, help="d, width of targets and keys")
    parser.add_argument("--value-dim", type=positive(int), help="dv, width of values and outputs (default: --dim)")
    parser.add_argument("--heads", type=positive(int), default=1)
    parser.add_argument("--dtype", choices=DTYPES, required=True, help="of the states; int8 has one scale per row")
    parser.add_argument(
        "--target-dtype", choices=TARGET_DTYPES, help="of the candidates (default: --dtype, bfloat16 for int8)"
    )
    parser.add_argument(
        "--candidates", type=positive(int), default=200, help="per request, for one user (default: 200)"
    )
    parser.add_argument(
        "--gpu-memory", type=positive(float), default=141, help="GB per GPU available for states (default: 141)"
    )
    parser.add_argument("--requests-per-second", type=positive(int), help="also print the bandwidth needed")


def report(arguments: argparse.Namespace) -> str:
    """The text of `python -m recattn lrea-size`. GB are 10⁹ bytes."""
    size = LreaSize(
        users=arguments.users,
        rank=arguments.rank,
        dim=arguments.dim,
        value_dim=arguments.value_dim or arguments.dim,
        heads=arguments.heads,
        dtype=arguments.dtype,
        target_dtype=arguments.target_dtype or (arguments.dtype if arguments.dtype in TARGET_DTYPES else "bfloat16"),
        candidates=arguments.candidates,
    )
    lines = list(_lines(size, arguments.gpu_memory, arguments.requests_per_second))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _lines(size: LreaSize, gpu_memory: float, requests_per_second: int | None) -> Iterator[tuple[str, str]]:
    yield "states of a user", f"{size.state_bytes:,} B"
    yield "scales of a user", f"{size.scale_bytes:,} B"
    yield "slot map of a user", f"{SLOT_MAP_BYTES} B, on the host"
    yield f"table of {size.users:,} users", f"{_gb(size.users * size.row_bytes)} GB"
    yield "slot map of all users", f"{_gb(size.users * SLOT_MAP_BYTES)} GB, on the host"
    yield "read from the table, a request", f"{size.row_bytes:,} B"
    yield "read from the table, 1000 requests", f"{_mb(1000 * size.row_bytes)} MB"
    yield (
        f"moved in all, 1000 requests of {size.candidates:,} candidates",
        f"{_mb(1000 * size.request_bytes)} MB, targets and outputs in {size.target_dtype}",
    )
    if requests_per_second is not None:
        bandwidth = requests_per_second * size.request_bytes
        yield f"bandwidth at {requests_per_second:,} requests/s", f"{_gb(bandwidth)} GB/s"
    fit = size.users_in(gpu_memory * 1e9)
    yield f"users in {gpu_memory:g} GB of one GPU", f"{fit:,}"
    yield "GPUs for all users", f"{-(-size.users // fit):,}" if fit else "none is large enough for one"


def _gb(count: float) -> str:
    return f"{count / 1e9:,.3f}"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.3f}"

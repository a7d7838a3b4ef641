"""A row of results and the file it is written to: JSON lines, one a row."""

import json
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.goals import Outcome

TIMED, NOT_RUN, REFUSED, FAILED = "timed", "not run", "refused: wrong", "failed"


@dataclass(kw_only=True)
class Row:
    """One implementation of one operator on one workload in one direction. None: not measured."""

    op: str
    workload: str
    shape: dict[str, object]
    dtype: str
    impl: str
    direction: str
    data: str  # where lengths and items come from
    status: str = TIMED
    reason: str | None = None  # of any other status
    p10_ms: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    host_ms: float | None = None  # until a call on an idle GPU returns, before its results are there
    samples: int = 0
    spread: float | None = None  # half the 95% confidence interval of the median time, relative to it
    waiting: float | None = None  # share of the time that threads waited for a core taken by other programs
    tflops: float | None = None
    gbs: float | None = None
    ceiling_fraction: float | None = None
    peak_bytes: int | None = None  # held at one time beyond the inputs
    max_error: float | None = None  # of the output against float64
    error_share: float | None = None  # the worst error of output and gradients as a share of its bound
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    gate_shape: dict[str, object] | None = None
    goals: list[Outcome] = field(default_factory=list)


def environment(device: torch.device) -> dict[str, object]:
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def append(rows: Iterable[Row], common: dict[str, object], path: Path) -> None:
    """One JSON object a row; what the rows of a run have in common stands in each of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps({**asdict(row), **common}, allow_nan=False) + "\n" for row in rows)


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

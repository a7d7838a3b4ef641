"""Versions and device, for reports and benchmark results."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]  # the repository, if recattn is an editable install


def describe(device: torch.device) -> dict[str, object]:
    """What a bug report needs. None means absent or unknown."""
    on_cuda = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_cuda else None
    return {
        "recattn": version("recattn"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver() if on_cuda else None,
        "device": device_name(device),
        "compute_capability": None if capability is None else "{}.{}".format(*capability),
        "threads": torch.get_num_threads(),
        "cpu_capability": cpu_capability(),
        "platform": platform.platform(),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def cpu_capability() -> str | None:
    """The instruction set that the C++ kernels use; None without them."""
    return torch.ops.recattn.cpu_capability() if hasattr(torch.ops.recattn, "cpu_capability") else None


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that recattn is installed from, or of the repository that pip installed from."""
    if (ROOT / ".git").exists():
        return git("rev-parse", "HEAD")
    origin = json.loads(distribution("recattn").read_text("direct_url.json") or "{}")
    return origin.get("vcs_info", {}).get("commit_id")


def git(*arguments: str) -> str | None:
    return _printed("git", *arguments)


def _driver() -> str | None:
    return _printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _printed(*command: str) -> str | None:
    """What a command prints (None if it is missing or fails)."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

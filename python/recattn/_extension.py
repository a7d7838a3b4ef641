"""Loads the compiled kernels. recattn also imports without them; `MISSING` says why a build is missing."""

from pathlib import Path

import torch

from recattn import _versions

if reason := _versions.unsupported_reason("torch", torch.__version__):
    raise ImportError(reason)

MISSING: dict[str, str] = {}


def reinstall_command(build: str) -> str:
    """How to get the parts that are compiled for `build`, "cpu" or "cuda"."""
    return f"with torch and a compiler installed, reinstall: RECATTN_BUILD={build} pip install --no-build-isolation ."


def _load(name: str, build: str) -> None:
    found = sorted(Path(__file__).parent.glob(f"{name}.*so"))
    if not found:
        MISSING[build] = f"recattn was installed without its {build} kernels; {reinstall_command(build)}"
        return
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        MISSING[build] = f"{found[0].name} does not load with torch {torch.__version__}: {error}"


_load("_C", "cpu")
if torch.version.cuda is None:
    MISSING["cuda"] = f"torch {torch.__version__} is a CPU build"
else:
    _load("_C_cuda", "cuda")

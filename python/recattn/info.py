"""What was built, what each operator runs on here, and how to get what is missing."""

import platform
from collections.abc import Iterator

import torch

import recattn
from recattn import _environment, _native
from recattn._dispatch import first_supported
from recattn._extension import MISSING, reinstall_command
from recattn.ops import UNSUPPORTED_REASONS
from recattn.ops._support import installation_unsupported_reason


def report() -> str:
    """The text of `python -m recattn info`."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    return "\n".join([*_versions(), "", *_builds(devices), "", *_operators(devices)])


def _versions() -> Iterator[str]:
    yield f"recattn {recattn.__version__}"
    packages = ", ".join(f"{name} {_environment.installed(name) or 'missing'}" for name in ("torch", "triton", "numpy"))
    yield f"Python {platform.python_version()}, {packages}"
    yield f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    none = "none" if torch.version.cuda else f"none, and torch {torch.__version__} is a CPU build"
    yield f"GPU: {', '.join(gpus) or none}"


def _builds(devices: tuple[str, ...]) -> Iterator[str]:
    """One line per part that a device here uses: built, or what is missing and how to get it."""
    yield f"C++ kernels: {MISSING.get('cpu') or _build()}"
    slower = f"missing, so that every call costs the host more; {reinstall_command('cpu')} ({_native.MISSING})"
    yield f"C++ host code: {slower if _native.MISSING else 'built'}"
    if "cuda" in devices:
        yield f"CUDA kernels: {MISSING.get('cuda') or 'built'}"
        yield f"Triton kernels: {installation_unsupported_reason() or 'there'}"


def _operators(devices: tuple[str, ...]) -> Iterator[str]:
    """One line per operator: what runs on each device without `impl`."""
    width = max(map(len, UNSUPPORTED_REASONS))
    yield f"{'runs on':{width}}  " + "  ".join(f"{device:12}" for device in devices).rstrip()
    for op, unsupported_reasons in UNSUPPORTED_REASONS.items():
        chosen = (first_supported(unsupported_reasons(device)) for device in devices)
        yield f"{op:{width}}  " + "  ".join(f"{impl:12}" for impl in chosen).rstrip()


def _build() -> str:
    try:
        from recattn._slot_map import build_info
    except ImportError:  # left out of an installation that has the kernels
        return "built"
    return f"built with {build_info()['compiler']}"

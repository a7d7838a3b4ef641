"""What was built, what each operator runs on here, and why something is missing."""

import platform
from collections.abc import Iterator

import torch

import recattn
from recattn import _environment
from recattn._dispatch import select
from recattn._extension import MISSING
from recattn.ops import UNSUPPORTED_REASONS
from recattn.ops._support import installation_unsupported_reason

DEVICES = ("cpu", "cuda")


def report() -> str:
    """The text of `python -m recattn info`."""
    return "\n".join([*_versions(), "", *_builds(), "", *_operators(), "", *_reasons()])


def _versions() -> Iterator[str]:
    yield f"recattn {recattn.__version__}"
    packages = ", ".join(f"{name} {_environment.installed(name) or 'missing'}" for name in ("torch", "triton", "numpy"))
    yield f"Python {platform.python_version()}, {packages}"
    yield f"CPU: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield f"GPU: {', '.join(gpus) or 'none'}"


def _builds() -> Iterator[str]:
    yield f"C++ kernels: {MISSING.get('cpu') or 'built with ' + _compiler()}"
    yield f"CUDA kernels: {MISSING.get('cuda') or 'built'}"
    yield f"Triton kernels: {installation_unsupported_reason() or 'there'}"


def _operators() -> Iterator[str]:
    """One line per operator: what runs on each device without `impl`."""
    width = max(map(len, UNSUPPORTED_REASONS))
    yield f"{'runs on':{width}}  " + "  ".join(f"{device:12}" for device in DEVICES).rstrip()
    for op, unsupported_reasons in UNSUPPORTED_REASONS.items():
        chosen = (select(op, None, unsupported_reasons(device)) for device in DEVICES)
        yield f"{op:{width}}  " + "  ".join(f"{impl:12}" for impl in chosen).rstrip()


def _reasons() -> Iterator[str]:
    yield "not available:"
    for op, unsupported_reasons in UNSUPPORTED_REASONS.items():
        for device in DEVICES:
            for impl, why in unsupported_reasons(device).items():
                if why is not None:
                    yield f"  {op} impl={impl!r} on {device}: {why}"


def _compiler() -> str:
    from recattn._slot_map import build_info  # exists only if something was built

    return build_info()["compiler"]

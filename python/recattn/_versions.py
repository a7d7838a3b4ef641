"""The oldest supported torch and Triton, the same as in pyproject.toml."""

import re

OLDEST = {"torch": "2.10", "triton": "3.6.0"}


def unsupported_reason(package: str, installed: str) -> str | None:
    """Why recattn cannot run with the installed version (None: it can)."""
    oldest = OLDEST[package]
    if _release(installed) >= _release(oldest):
        return None
    return (
        f"recattn needs {package} {oldest} or newer, and this is {package} {installed}: pip install --upgrade {package}"
    )


def _release(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release[0].split("."))) if release else ()

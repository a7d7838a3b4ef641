"""setuptools' build backend, which also asks for torch if the environment that recattn is installed into has none.

pip shows a backend that environment; `python -m build` and uv do not. Any torch from 2.10 does, because the libraries
use its stable ABI.
"""

import os
import shutil
import sys
import sysconfig
from importlib.machinery import PathFinder

from setuptools.build_meta import *  # noqa: F403


def get_requires_for_build_wheel(config_settings=None):
    compiles = os.environ.get("RECATTN_BUILD") != "none" and has_compiler()
    return ["torch>=2.10"] if compiles and not has_torch() else []


get_requires_for_build_editable = get_requires_for_build_wheel


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None


def has_torch() -> bool:
    return PathFinder.find_spec("torch", [*sys.path, sysconfig.get_path("purelib")]) is not None

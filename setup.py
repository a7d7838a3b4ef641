"""Build recattn. The Python package always installs; its C++ and CUDA kernels are compiled where that is possible.

RECATTN_BUILD=auto   (default) compile what this machine can; say once what is left out
RECATTN_BUILD=cpu    compile the C++ kernels, or fail
RECATTN_BUILD=cuda   compile the C++ and CUDA kernels, or fail
RECATTN_BUILD=none   compile nothing
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

ROOT = Path(__file__).parent
MODE = os.environ.get("RECATTN_BUILD", "auto")
# The oldest torch whose stable ABI the sources use: one binary serves it and everything newer.
TORCH_TARGET_VERSION = "0x020a000000000000"
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden"]
# sm_80 also carries PTX for architectures that came later. Decided without a GPU in sight.
DEFAULT_CUDA_ARCHITECTURES = "8.0+PTX;9.0a;10.0"

if int(setuptools.__version__.partition(".")[0]) < 77:  # it would refuse pyproject.toml without saying this
    needed = f"recattn is built by setuptools 77 or newer, and this is {setuptools.__version__}"
    raise SystemExit(f"{needed}: pip install --upgrade setuptools, or leave out --no-build-isolation")


class CannotBuildError(Exception):
    """Says what is missing and what to do about it."""


def locate_cuda():
    """Have torch take CUDA from where nvcc says it lives: the one on the PATH may be a wrapper."""
    if "CUDA_HOME" not in os.environ and shutil.which("nvcc"):
        said = subprocess.run(["nvcc", "--dryrun", "-v", "x.cu"], capture_output=True, text=True).stderr
        if folder := re.search(r"_HERE_=(\S+)", said):
            os.environ["CUDA_HOME"] = str(Path(folder[1]).parent)


def import_cpp_extension():
    locate_cuda()  # torch looks when it is imported
    # Build isolation hides the environment that is being installed into: compile against its torch.
    sys.path.append(sysconfig.get_path("purelib"))
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        raise CannotBuildError("torch is not installed here: install torch first, then recattn") from error
    return cpp_extension


def sources(*folders):
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / "csrc" / folder).glob("*.c*"))


def cpu_extensions(cpp_extension):
    import pybind11

    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        raise CannotBuildError("no c++ on the PATH: install a C++20 compiler (g++ 10 or newer)")
    kernels = cpp_extension.CppExtension(
        "recattn._C",
        sources("cpu"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": [*CXX_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]},
        py_limited_api=True,
    )
    slot_map = cpp_extension.CppExtension(
        "recattn._slot_map",
        sources("slot_map"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args={"cxx": CXX_FLAGS},
    )
    host = cpp_extension.CppExtension(
        "recattn._host", sources("host"), include_dirs=[str(ROOT / "csrc")], extra_compile_args={"cxx": CXX_FLAGS}
    )
    return [kernels, slot_map, host]


def cuda_extensions(cpp_extension):
    import torch

    if torch.version.cuda is None:
        raise CannotBuildError(f"torch {torch.__version__} is a CPU build: install a CUDA build of torch")
    if cpp_extension.CUDA_HOME is None:
        raise CannotBuildError("no nvcc found: install the CUDA toolkit or set CUDA_HOME")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DUSE_CUDA"]
    kernels = cpp_extension.CUDAExtension(
        "recattn._C_cuda",
        sources("cuda"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": [*CXX_FLAGS, *flags], "nvcc": ["-O3", "-std=c++20", *flags]},
        py_limited_api=True,
    )
    return [kernels]


def build_command(cpp_extension):
    class BuildKernels(cpp_extension.BuildExtension):
        """In auto mode an extension that does not compile is left out instead of failing the installation."""

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                if MODE != "auto":
                    raise
                leave_out(f"{extension.name} did not compile ({error})")

    return BuildKernels


def leave_out(why):
    warnings.warn(f"recattn is installed without some compiled kernels: {why}", stacklevel=2)


def extensions():
    """The extensions to build and the command that builds them, as RECATTN_BUILD asks."""
    if MODE not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"RECATTN_BUILD must be auto, cuda, cpu or none, got {MODE!r}")
    if MODE == "none":
        return [], {}
    found = []
    try:
        cpp_extension = import_cpp_extension()
        found += cpu_extensions(cpp_extension)
        if MODE != "cpu":
            found += cuda_extensions(cpp_extension)
    except CannotBuildError as error:
        if MODE != "auto":
            raise SystemExit(f"RECATTN_BUILD={MODE} cannot be met: {error}") from error
        leave_out(str(error))
    for extension in found:
        extension.optional = MODE == "auto"
    return found, {"build_ext": build_command(cpp_extension)} if found else {}


ext_modules, cmdclass = extensions()
setup(
    packages=[
        *find_packages("python"),
        "recattn.triton_kernels",
        *(f"recattn.triton_kernels.{name}" for name in find_packages("triton_kernels")),
    ],
    package_dir={"": "python", "recattn.triton_kernels": "triton_kernels"},
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)

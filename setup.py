"""Build recattn. The Python package always installs; its C++ and CUDA kernels are compiled where that is possible.

RECATTN_BUILD=auto   (default) compile what this machine can; say once what is left out
RECATTN_BUILD=cpu    compile the C++ kernels, or fail
RECATTN_BUILD=cuda   compile the C++ and CUDA kernels, or fail
RECATTN_BUILD=none   compile nothing
RECATTN_BUILD=manylinux   as cpu, for every Linux whose glibc is 2.28 or newer: what `make wheel` builds
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

if int(setuptools.__version__.partition(".")[0]) < 77:  # it would refuse pyproject.toml without saying this
    needed = f"recattn is built by setuptools 77 or newer, and this is {setuptools.__version__}"
    raise SystemExit(f"{needed}: pip install --upgrade setuptools, or leave out --no-build-isolation")

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

from build_backend import has_compiler

ROOT = Path(__file__).parent
MODES = ("auto", "cpu", "cuda", "none", "manylinux")
MODE = os.environ.get("RECATTN_BUILD", "auto")
# The oldest torch whose stable ABI the sources use: one binary serves it and everything newer.
TORCH_TARGET_VERSION = "0x020a000000000000"
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden"]
# sm_80 also carries PTX for architectures that came later. Decided without a GPU in sight.
DEFAULT_CUDA_ARCHITECTURES = "8.0+PTX;9.0a;10.0"
# What csrc/manylinux has in place of symbols that a glibc or libstdc++ newer than manylinux_2_28's would give.
WRAPPED_SYMBOLS = (
    "__libc_single_threaded",
    "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv",
    "_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv",
    "_ZSt28__throw_bad_array_new_lengthv",
    "pthread_once",
    "pthread_rwlock_rdlock",
    "pthread_rwlock_unlock",
    "pthread_rwlock_wrlock",
)


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


def manylinux_options():
    """Sources and linker flags of a library that must load with glibc 2.28. A manylinux image needs none."""
    _, _, version = os.confstr("CS_GNU_LIBC_VERSION").partition(" ")
    if tuple(map(int, version.split("."))) <= (2, 28):
        return [], []
    return sources("manylinux"), [f"-Wl,--wrap={symbol}" for symbol in WRAPPED_SYMBOLS]


def cpu_extensions(cpp_extension):
    if not has_compiler():
        raise CannotBuildError("no c++ on the PATH: install a C++20 compiler (g++ 10 or newer)")
    import pybind11

    more_sources, link_args = manylinux_options() if MODE == "manylinux" else ([], [])
    kernels = cpp_extension.CppExtension(
        "recattn._C",
        sources("cpu") + more_sources,
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": [*CXX_FLAGS, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}"]},
        extra_link_args=link_args,
        py_limited_api=True,
    )
    # These two neither include nor link PyTorch.
    slot_map, host = (
        Extension(
            f"recattn._{name}",
            sources(name) + more_sources,
            include_dirs=[str(ROOT / "csrc"), *include_dirs],
            extra_compile_args=CXX_FLAGS,
            extra_link_args=link_args,
            language="c++",
        )
        for name, include_dirs in (("slot_map", [pybind11.get_include()]), ("host", []))
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

        def finalize_options(self):
            super().finalize_options()
            # An editable installation would compile in a folder that it deletes, and a wheel then from the start.
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                if MODE != "auto":
                    raise
                build = "cuda" if extension.name == "recattn._C_cuda" else "cpu"
                leave_out(build, f"{extension.name} did not compile ({error})")

    return BuildKernels


class Wheel(bdist_wheel):
    """pip hides warnings but prints a wheel's name, so that a build tag in it tells what is missing."""

    @property
    def wheel_dist_name(self):
        if "cpu" in left_out:
            self.build_number = "0.without_compiled_kernels"
        return super().wheel_dist_name


left_out = set()  # of "cpu" and "cuda"


def leave_out(build, why):
    left_out.add(build)
    warnings.warn(f"recattn is installed without some compiled kernels: {why}", stacklevel=2)


def extensions():
    """The extensions to build and the command that builds them, as RECATTN_BUILD asks."""
    if MODE not in MODES:
        raise SystemExit(f"RECATTN_BUILD must be {', '.join(MODES[:-1])} or {MODES[-1]}, got {MODE!r}")
    if MODE == "none":
        return [], {}
    found = []
    try:
        cpp_extension = import_cpp_extension()
        found += cpu_extensions(cpp_extension)
        if MODE in ("auto", "cuda"):
            found += cuda_extensions(cpp_extension)
    except CannotBuildError as error:
        if MODE != "auto":
            raise SystemExit(f"RECATTN_BUILD={MODE} cannot be met: {error}") from error
        leave_out("cuda" if found else "cpu", str(error))
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
    cmdclass={"bdist_wheel": Wheel, **cmdclass},
)

"""`python -m benchmarks.serving.build_scorer PROGRAM`: compile scorer.cpp against this environment's PyTorch.

It takes a C++20 compiler and the headers of LMDB and xxHash: on Debian, liblmdb-dev and libxxhash-dev.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("scorer.cpp")


def command(program: Path) -> list[str]:
    includes = [f"-isystem{path}" for path in include_paths()]
    libraries = [option for path in library_paths() for option in (f"-L{path}", f"-Wl,-rpath,{path}")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    linked = ["-ltorch", "-ltorch_cpu", "-lc10", "-llmdb", "-ldl"]
    options = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", abi]
    return [os.environ.get("CXX", "g++"), *options, *includes, str(SOURCE), "-o", str(program), *libraries, *linked]


if __name__ == "__main__":
    subprocess.run(command(Path(sys.argv[1])), check=True)

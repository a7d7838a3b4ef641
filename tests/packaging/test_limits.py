"""Sizes that keep the code readable: lines of a file, parameters of a function, arguments of a kernel."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = ("python", "triton_kernels", "csrc", "benchmarks", "tests")
FILES = sorted(
    path
    for folder in CODE
    for path in (ROOT / folder).rglob("*")
    if path.suffix in {".py", ".cpp", ".h", ".cu"} and "__pycache__" not in path.parts
)
KERNEL_FILES = ("triton_kernels", "csrc")


def functions_of(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def count_parameters(function: ast.FunctionDef) -> int:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


@pytest.mark.parametrize("folder", CODE)
def test_lines(folder):
    limit = 450 if folder in KERNEL_FILES else 600
    own = [path for path in FILES if path.relative_to(ROOT).parts[0] == folder]
    assert own
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in own}
    assert {name: length for name, length in lengths.items() if length > limit} == {}


def most_parameters(path: Path, function: ast.FunctionDef) -> int:
    if function.name.endswith("_kernel"):
        return 32
    # The public functions' arguments have names; of the others, too many are by position.
    is_public = path.parent.name in ("functional", "reference") and bool(function.args.kwonlyargs)
    return 18 if is_public else 15


@pytest.mark.parametrize("folder", ["python", "triton_kernels", "benchmarks", "tests"])
def test_parameters(folder):
    """At most 15, 18 for a public function, and 32 for a Triton kernel, where a tuple of a pointer and its strides is
    one."""
    over = [
        f"{path.relative_to(ROOT)}: {function.name} has {count_parameters(function)}"
        for path in FILES
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] == folder
        for function in functions_of(path)
        if count_parameters(function) > most_parameters(path, function)
    ]
    assert over == []

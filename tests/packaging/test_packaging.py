"""recattn imports without a compiler, without triton and without its compiled kernels, and says what is missing."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import recattn
from recattn import _versions, info

ROOT = Path(__file__).parents[2]
CALL = """
import torch, recattn
q = torch.randn(1, 2, 5, 4)
recattn.sink_attention(q, q, q, torch.tensor([[1, 3]]), torch.zeros(1, 1, 2, 2))
"""
BLOCK_TRITON = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def python(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, check=True, capture_output=True, text=True
    ).stdout


def test_without_triton():
    python(BLOCK_TRITON + CALL)


IMPORT_LIMIT = 0.05  # of the time that importing torch takes, which other processes slow too
IMPORT = """
import gc, sys, time
start = time.thread_time()
import torch
before, torch_seconds = {*sys.modules}, time.thread_time() - start
gc.collect()  # a full collection, of all that torch has made, takes 0.1 s and would fall into either import
print("torch is imported", file=sys.stderr)
start = time.thread_time()
import recattn
seconds = time.thread_time() - start
"""


def import_cost() -> tuple[float, str, list[str]]:
    """CPU time of `import recattn` after `import torch`, as a share of torch's own, its slowest modules, and all."""
    # With bytecode, as an installed package has it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-c",
        IMPORT + "print(seconds / torch_seconds, *{*sys.modules} - before)",
    ]
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    _, _, report = run.stderr.partition("torch is imported")
    times = re.findall(r"import time: +\d+ \| +(\d+) \| +(\S+)", report)
    slowest = sorted(((int(microseconds), name) for microseconds, name in times), reverse=True)[:15]
    share, *loaded = run.stdout.split()
    return float(share), "\n".join(f"{micro / 1000:8.1f} ms  {name}" for micro, name in slowest), loaded


def test_import_costs_little_more_than_torch_and_loads_no_other_package():
    lazy = ("torch._dynamo", "torch._inductor")
    expected = {"recattn", "torch", *sys.stdlib_module_names}
    for _ in range(8):  # another process may slow one import and not the other
        share, slowest, loaded = import_cost()
        assert "recattn" in loaded
        assert [x for x in sorted(loaded) if x.partition(".")[0] not in expected or x.startswith(lazy)] == []
        if share <= IMPORT_LIMIT:
            return
    pytest.fail(f"import recattn takes {share:.1%} of the time of import torch:\n{slowest}")


def test_constant_in_graphs_is_assume_constant_result():
    from recattn._graphs import constant_in_graphs

    def marked(mark):
        return vars(mark(lambda: None))

    assert marked(constant_in_graphs) == marked(torch.compiler.assume_constant_result) != {}


def test_without_compiled_kernels(tmp_path):
    """Attention, what `info` says without Triton as well, and the messages of what needs compiled code."""
    shutil.copytree(ROOT / "python" / "recattn", tmp_path / "recattn", ignore=shutil.ignore_patterns("*.so"))
    # An editable installation would find the module that it was built from.
    block = BLOCK_TRITON + 'sys.modules["recattn._slot_map"] = None\n'
    code = """
print(recattn.__file__)
x = torch.zeros(1, 1, 4, 8)
arguments = (torch.zeros(2, 1, 8), x, x, torch.tensor([0]), torch.tensor([0, 2]))
assert recattn.lrea_absorbed_attention(*arguments).shape == (2, 1, 8)
from recattn.serving import StateTable
for call in (
    lambda: recattn.lrea_absorbed_attention(*arguments, impl="cpu"),
    lambda: StateTable(4, heads=1, rank=4, dim=8),
):
    try:
        call()
    except NotImplementedError as error:
        print(error)
from recattn import info
print(info.report())
"""
    where, kernel, slot_map, said = python(block + CALL + code, PYTHONPATH=str(tmp_path)).split("\n", 3)
    assert str(tmp_path) in where
    assert "RECATTN_BUILD=cpu pip install --no-build-isolation ." in kernel
    assert slot_map.startswith("SlotMap is not available") and "pip install --no-build-isolation ." in slot_map
    assert "installed without its cpu kernels" in said


def test_a_version_that_is_too_old_is_named_with_the_oldest():
    code = """
import torch, triton
own, torch.__version__ = torch.__version__, "2.9.1+cpu"
try:
    import recattn
except ImportError as error:
    print(error)
torch.__version__, triton.__version__ = own, "3.4.0"
import recattn
q = torch.zeros(1, 1, 4, 8)
try:
    recattn.refined_attention(q, q, q, torch.zeros(4, 4), torch.zeros(4, 4), impl="triton")
except NotImplementedError as error:
    print(error)
"""
    said = python(code, TRITON_INTERPRET="1").splitlines()
    for (package, older), message in zip((("torch", "2.9.1+cpu"), ("triton", "3.4.0")), said, strict=True):
        oldest = _versions.OLDEST[package]
        assert f"recattn needs {package} {oldest} or newer, and this is {package} {older}: pip install" in message
        assert f'"{package}>={oldest}' in (ROOT / "pyproject.toml").read_text()


def test_versions_compare_by_their_numbers():
    assert [
        _versions.unsupported_reason("torch", version) for version in ("2.10.0a0+git", "2.10", "2.14.1+cu130", "3.0")
    ] == [None] * 4
    assert all(_versions.unsupported_reason("triton", version) for version in ("3.5.0", "3.4.2", "2.10.9"))


def test_info():
    text = info.report()
    assert "sink_attention" in text and "triton" in text and "C++ kernels: built with" in text


def setup_py(tmp_path: Path, *command: str, without: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run a copy of the project's setup.py."""
    project = tmp_path / "project"
    ignored = shutil.ignore_patterns(".venv", ".git", ".cache", "build", "dist", "*.so", without)
    shutil.copytree(ROOT, project, ignore=ignored, dirs_exist_ok=True)
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=project,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RECATTN_BUILD": "fast"}, "RECATTN_BUILD must be auto, cpu, cuda, none or manylinux, got 'fast'"),
        ({"RECATTN_BUILD": "cpu", "CXX": "no-such-compiler"}, "install a C++20 compiler"),
        ({"RECATTN_BUILD": "cuda"}, "install a CUDA build of torch"),
    ],
)
def test_a_build_that_cannot_be_met_says_the_remedy(tmp_path, environment, message):
    if environment == {"RECATTN_BUILD": "cuda"} and torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build here")
    result = setup_py(tmp_path, "build", **environment)
    assert result.returncode != 0 and message in result.stderr


def test_an_old_setuptools_is_refused_with_the_remedy(tmp_path):
    """A venv of Python 3.11 has 65.5.0, whose own message only names a field of pyproject.toml."""
    (tmp_path / "setuptools.py").write_text('__version__ = "65.5.0"\nfind_packages = setup = None\n')
    result = setup_py(tmp_path, "build", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert result.stderr == (
        "recattn is built by setuptools 77 or newer, and this is 65.5.0: pip install --upgrade setuptools, "
        "or leave out --no-build-isolation\n"
    )


@pytest.mark.parametrize(
    "environment, build_tag",
    [({"RECATTN_BUILD": "none"}, ""), ({"CXX": "no-such-compiler"}, "0.without_compiled_kernels-")],
)
def test_builds_without_a_compiler(tmp_path, environment, build_tag):
    """What is missing unasked is told in the wheel's name, which pip prints."""
    result = setup_py(tmp_path, "bdist_wheel", "--dist-dir", str(tmp_path), **environment)
    assert result.returncode == 0, result.stderr
    assert ("no c++ on the PATH" in result.stderr) == ("CXX" in environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"recattn-{recattn.__version__}-{build_tag}py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {"recattn/functional/sink_attention.py", "recattn/triton_kernels/__init__.py"} <= {*names}
    assert [name for name in names if name.endswith(".so")] == []


def test_auto_leaves_out_what_does_not_compile(tmp_path):
    """Of sources of one line each, which take less time than the project's own."""
    for name, source in (("cpu", "this is no C++"), ("slot_map", "int slot_map;"), ("host", "int host;")):
        folder = tmp_path / "project" / "csrc" / name
        folder.mkdir(parents=True)
        (folder / "planted.cpp").write_text(f"{source}\n")
    build = tmp_path / "build"
    result = setup_py(tmp_path, "build", "--build-base", str(build), without="csrc", RECATTN_BUILD="auto")
    assert result.returncode == 0, result.stderr
    assert "installed without some compiled kernels: recattn._C did not compile" in result.stderr
    assert {path.name.partition(".")[0] for path in build.rglob("*.so")} == {"_slot_map", "_host"}


def test_torch_is_a_build_requirement_where_the_environment_has_none():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import build_backend
for has_torch in (build_backend.has_torch, lambda: False):
    build_backend.has_torch = has_torch
    print(*build_backend.get_requires_for_build_wheel())
"""
    assert python(code, CXX="sh", RECATTN_BUILD="auto").split("\n") == ["", "torch>=2.10", ""]
    assert python(code, CXX="sh", RECATTN_BUILD="none").split("\n") == ["", "", ""]
    assert python(code, CXX="no-such-compiler", RECATTN_BUILD="auto").split("\n") == ["", "", ""]


def test_sdist_has_every_file_of_the_repository(tmp_path):
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    result = setup_py(tmp_path, "sdist", "--formats=tar", "--dist-dir", str(tmp_path), RECATTN_BUILD="none")
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as opened:
        packed = {name.partition("/")[2] for name in opened.getnames()}
    tracked = [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]
    assert {name for name in tracked if name not in packed and not name.startswith(".git")} == {
        ".pre-commit-config.yaml"
    }
    assert [name for name in packed if name.endswith((".so", ".pyc"))] == []


def test_metadata_agrees_with_the_citation():
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {project['version']}\n" in citation
    assert all(f"name: {author['name']}\n" in citation for author in project["authors"])
    for url in project["urls"].values():
        assert f"arXiv {url.removeprefix('https://arxiv.org/abs/')}" in citation

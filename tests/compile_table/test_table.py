"""Every shipped kernel configuration compiles within its limits, as the committed table of each Triton says."""

import ast
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks.report import instructions
from benchmarks.tools import counts
from tests.compile_table import table

pytest.importorskip("triton")

SCRIPT = Path(table.__file__)
TRITON = importlib.metadata.version("triton")
TRITON_OF_TORCH_2_11 = Path(sys.prefix) / "triton-3.6.0"
PLANTED = """
    import torch
    import triton
    import triton.language as tl

    from tests.compile_table.compilation import Compilation


    @triton.jit
    def normalize_kernel(x, BLOCK: tl.constexpr):
        index = tl.arange(0, BLOCK)
        values = tl.load(x + index)
        tl.store(x + index, values / tl.sum(values))


    @triton.jit
    def matmul_kernel(a, b, c, K, BLOCK: tl.constexpr):
        index = tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for start in range(0, K, BLOCK):
            a_block = tl.load(a + index[:, None] * K + start + index[None, :])
            b_block = tl.load(b + (start + index[:, None]) * BLOCK + index[None, :])
            acc = tl.dot(a_block, b_block, acc)
        tl.store(c + index[:, None] * BLOCK + index[None, :], acc)


    @triton.jit
    def rounded_kernel(a, BLOCK: tl.constexpr):
        index = tl.arange(0, BLOCK)
        block = tl.load(a + index[:, None] * BLOCK + index[None, :])
        tl.store(a + index[:, None] * BLOCK + index[None, :], tl.dot(block, block, input_precision="tf32"))


    @triton.jit
    def forgotten_kernel(x):
        tl.store(x, 0.0)


    def shipped_configurations():
        half, single = (torch.empty(1, dtype=dtype, device="meta") for dtype in (torch.float16, torch.float32))
        yield Compilation.of(normalize_kernel, "8192", 90, {"x": single, "BLOCK": 8192}, 1, 1)
        arguments = {"a": half, "b": half, "c": single, "K": 4096, "BLOCK": 128}
        for architecture, num_stages in [(80, 4), (90, 3)]:
            yield Compilation.of(matmul_kernel, "128x128", architecture, arguments, 8, num_stages)
        yield Compilation.of(rounded_kernel, "float32", 80, {"a": single, "BLOCK": 32}, 4, 1)
"""


PLANTED_LOOPS = """
    import torch
    import triton
    import triton.language as tl

    from tests.compile_table.compilation import Compilation


    @triton.jit
    def loops_kernel(a, b, c, n, guard, BLOCK: tl.constexpr, GUARDED: tl.constexpr, SCALED: tl.constexpr):
        index = tl.arange(0, BLOCK)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        if GUARDED:
            if guard:
                for start in range(0, n, BLOCK):
                    x = tl.load(a + index[:, None] * BLOCK + start + index[None, :])
                    y = tl.load(b + (start + index[:, None]) * BLOCK + index[None, :])
                    acc = tl.dot(x, y, acc)
        for start in range(0, n, BLOCK):
            x = tl.load(a + index[:, None] * BLOCK + start + index[None, :])
            y = tl.load(b + (start + index[:, None]) * BLOCK + index[None, :])
            product = tl.dot(x, y)
            if SCALED:
                product *= tl.load(c + start)
            acc = tl.dot(product.to(tl.float16), y, acc)
        tl.store(c + index[:, None] * BLOCK + index[None, :], acc)


    def shipped_configurations():
        half, single = (torch.empty(1, dtype=dtype, device="meta") for dtype in (torch.float16, torch.float32))
        arguments = {"a": half, "b": half, "c": single, "n": 4096, "guard": 7, "BLOCK": 64}
        for architecture, label in [(80, "scaled"), (90, "plain"), (90, "scaled"), (90, "guarded"), (100, "scaled")]:
            options = {"GUARDED": label == "guarded", "SCALED": label == "scaled"}
            yield Compilation.of(loops_kernel, label, architecture, arguments | options, 4, 2)
"""
GOOD = (
    PLANTED.partition("    @triton.jit\n    def rounded_kernel")[0]
    + """
    def shipped_configurations():
        single = torch.empty(1, dtype=torch.float32, device="meta")
        for size in (256, 512):
            yield Compilation.of(normalize_kernel, str(size), 90, {"x": single, "BLOCK": size}, 4, 1)
        half = torch.empty(1, dtype=torch.float16, device="meta")
        arguments = {"a": half, "b": half, "c": single, "K": 64, "BLOCK": 16}
        yield Compilation.of(matmul_kernel, "16", 90, arguments, 4, 1)
    """
)


# Imports and the hash of Triton's own files take seconds. Each line is a run of the tool, in a fork: the folder of its
# output, and its arguments.
FORKS = """
import json, os, sys
from triton.runtime.cache import triton_key
from tests.compile_table import compilation, table

triton_key()
sys.dont_write_bytecode = True  # of a planted module that is soon another
for line in sys.stdin:
    folder, *sys.argv[1:] = json.loads(line)
    if (run := os.fork()) == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/{stream}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
        os.environ["TRITON_CACHE_DIR"] = folder
        sys.path.insert(0, folder)
        sys.exit(table.main())
    print(os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]), flush=True)
"""


@contextlib.contextmanager
def tool(path: Sequence[Path] = ()) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """Runs the tool in another process, because kernels in this process may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, SCRIPT.parents[2])))
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FORKS], env=environment, **streams) as process:

        def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
            print(json.dumps([str(folder), *map(str, arguments)]), file=process.stdin, flush=True)
            returncode = int(process.stdout.readline())
            said = ((folder / stream).read_text() for stream in ("1", "2"))
            return subprocess.CompletedProcess(arguments, returncode, *said)

        yield run


@pytest.fixture(scope="module")
def run():
    with tool() as run:
        yield run


def assert_shipped(run: Callable, folder: Path, version: str) -> None:
    check = run(folder, "--check", "--sampled", "4")
    assert check.returncode == 0, check.stdout + check.stderr
    assert check.stdout.splitlines()[-1].endswith(f" configurations, 0 problems by triton {version}")


def test_shipped_configurations(run, tmp_path):
    assert_shipped(run, tmp_path, TRITON)


def test_shipped_configurations_by_the_triton_of_torch_2_11(tmp_path):
    if not TRITON_OF_TORCH_2_11.exists():
        pytest.skip(f"{TRITON_OF_TORCH_2_11} is not there: `make test` installs it")
    with tool([TRITON_OF_TORCH_2_11]) as run:
        assert_shipped(run, tmp_path, "3.6.0")


def test_one_of_each_kind():
    keys = [
        f"{kernel}_kernel sm_{architecture} {dtype} D={size} {size}x16 stage {stage} warps=4 stages=1"
        for kernel in "ab"
        for architecture in (80, 90, 100)
        for dtype in ("float32", "bfloat16")
        for size in (32, 64)
        for stage in range(2)
    ]
    chosen = [keys[i].split() for i in table.one_of_each_kind(keys)]
    assert len(chosen) == 2 * 4
    for of in (lambda words: (words[0], words[1]), lambda words: (words[0], words[2], words[6])):
        assert {of(words) for words in chosen} == {of(name.split()) for name in keys}


def test_one_of_each_kind_tells_what_does_not_compile(run, tmp_path):
    """Spills are only notes there."""
    unreadable = PLANTED.replace("acc = tl.dot(a_block", "acc = undefined(a_block")
    (tmp_path / "planted.py").write_text(textwrap.dedent(unreadable))
    said = run(tmp_path, "--one-of-each-kind", "--module", "planted")
    assert said.returncode == 1
    spill, *_, rounded, _unlisted, summary = said.stdout.splitlines()
    assert re.match(r"normalize_kernel sm_90 .*: spills ", spill)
    for architecture in (80, 90):
        assert re.search(rf"^matmul_kernel sm_{architecture} .*: does not compile: Compil", said.stdout, re.MULTILINE)
    assert "round float32 to tf32" in rounded
    assert summary.startswith("4 configurations, 4 problems by triton ")


def test_kernels_that_changed_are_compiled_again(run, tmp_path):
    planted, planted_table = tmp_path / "planted.py", tmp_path / "planted.json"
    options = ("--module", "planted", "--table", planted_table)
    planted.write_text(textwrap.dedent(GOOD))
    assert run(tmp_path, "--write", *options).stdout == f"3 configurations, 0 problems by triton {TRITON}\n"
    sampled = run(tmp_path, "--check", "--sampled", "1", *options).stdout
    assert sampled == f"1 configurations, 0 problems by triton {TRITON}\n"

    planted.write_text(textwrap.dedent(GOOD).replace("values / tl.sum(values)", "values - tl.sum(values)"))
    *differ, summary = run(tmp_path, "--check", "--sampled", "1", *options).stdout.splitlines()
    assert [problem.split()[0] for problem in differ if ", the table says " in problem] == ["normalize_kernel"] * 2
    assert summary == f"3 configurations, 2 problems by triton {TRITON}"
    assert run(tmp_path, "--write", *options).stdout == f"2 configurations, 0 problems by triton {TRITON}\n"
    written = planted_table.read_bytes()
    planted_table.unlink()
    assert run(tmp_path, "--write", *options).stdout == f"3 configurations, 0 problems by triton {TRITON}\n"
    assert planted_table.read_bytes() == written


def test_other_rows_are_sampled_after_a_change():
    rows = {f"a_kernel {i}": row(8) for i in range(100)}
    samples = [table.sample(rows, 10, {"a_kernel": fingerprint}) for fingerprint in ("one", "one", "other")]
    assert samples[0] == samples[1] != samples[2]
    assert len({*samples[0]}) == len({*samples[2]}) == 10


def test_refuses_too_much_tensor_memory():
    row = {"registers": 4, "spilled_bytes": 0, "shared_bytes": 0, "tf32": 0, "misread": 0, "tensor_columns": 512}
    assert table.refusals({"a_kernel sm_100": row}) == []
    (problem,) = table.refusals({"a_kernel sm_100": row | {"tensor_columns": 1024}})
    assert problem == "a_kernel sm_100: 1024 columns of tensor memory, there are 512"


def test_refuses_spills_oversize_and_unlisted_kernels(run, tmp_path):
    (tmp_path / "planted.py").write_text(textwrap.dedent(PLANTED))
    planted_table = tmp_path / "planted.json"
    write = run(tmp_path, "--write", "--module", "planted", "--table", planted_table)
    assert write.returncode == 1
    # The table has them, and is held to the same limits: of the four it compiles one.
    check = run(tmp_path, "--check", "--sampled", "1", "--module", "planted", "--table", planted_table)
    assert check.returncode == 1
    assert check.stdout.splitlines()[:-1] == write.stdout.splitlines()[:-1]
    assert check.stdout.splitlines()[-1].startswith("1 configurations, 4 problems by triton ")
    spill, oversize, rounded, unlisted, summary = write.stdout.splitlines()
    assert re.fullmatch(r"normalize_kernel sm_90 8192 warps=1 stages=1: spills [1-9]\d* bytes at \d+ registers", spill)
    assert (
        oversize == "matmul_kernel sm_80 128x128 warps=8 stages=4: 196608 bytes of shared memory, the budget is 166912"
    )
    assert re.fullmatch(r"rounded_kernel sm_80 .*: [1-9]\d* instructions round float32 to tf32", rounded)
    assert unlisted == "planted.forgotten_kernel: in no shipped_configurations()"
    assert summary.startswith("4 configurations, 4 problems by triton ")


def test_sees_serialized_products_and_the_main_loop(run, tmp_path):
    (tmp_path / "planted.py").write_text(textwrap.dedent(PLANTED_LOOPS))
    planted_table = tmp_path / "planted.json"
    write = run(tmp_path, "--write", "--module", "planted", "--table", planted_table)
    assert write.returncode == 1
    problem, summary = write.stdout.splitlines()
    assert problem == "loops_kernel sm_90 guarded warps=4 stages=2: ptxas serializes its wgmma, C7515"
    assert summary.startswith("5 configurations, 1 problems by triton ")

    columns = ("serialized", "mma", "loop_mma", "loop_fmul")
    rows = json.loads(planted_table.read_text())["rows"]
    shown = {" ".join(name.split()[1:3]): tuple(row[column] for column in columns) for name, row in rows.items()}
    # The loop has two products of 64x64x64, and on sm_100 its first rounds stand before it too.
    # Each of 128 threads scales 32 values of 64x64: on sm_100 by two at once.
    assert shown == {
        "sm_80 scaled": ([], 64, 64, 32),
        "sm_90 plain": ([], 8, 8, 0),
        "sm_90 scaled": ([], 8, 8, 32),
        "sm_90 guarded": (["C7515"], 12, 8, 0),
        "sm_100 scaled": ([], 20, 8, 16),
    }


def test_the_cost_model_counts_what_the_table_says():
    written = counts.counts(json.loads(counts.TABLE.read_text()))
    assert instructions.COUNTS.read_text() == written, "run python -m benchmarks.tools.counts"


def row(registers: int, spilled_bytes: int = 0, serialized: Sequence[str] = ()) -> table.Row:
    return {"registers": registers, "spilled_bytes": spilled_bytes, "serialized": list(serialized)}


def test_accepts_what_is_slow_only_where_it_says_why():
    rows = {
        "a_kernel sm_90 float32": row(255, spilled_bytes=8),
        "a_kernel sm_90 float16": row(255, spilled_bytes=8, serialized=["C7515"]),
        "b_kernel sm_90 float16": row(128, serialized=["C7514", "C7515"]),
        "c_kernel sm_90 float16": row(128),
    }
    assert table.slow(rows, []) == [
        "a_kernel sm_90 float16: ptxas serializes its wgmma, C7515",
        "a_kernel sm_90 float16: spills 8 bytes at 255 registers",
        "a_kernel sm_90 float32: spills 8 bytes at 255 registers",
        "b_kernel sm_90 float16: ptxas serializes its wgmma, C7514",
        "b_kernel sm_90 float16: ptxas serializes its wgmma, C7515",
    ]
    accepted = [
        table.Accepted("spills", "a_kernel", ("3.7.1",), "why"),
        table.Accepted("C7515", "[ab]_kernel sm_90 float16", ("3.7.1",), "why"),
        table.Accepted("C7514", "b_kernel", ("3.7.1",), "why"),
    ]
    assert table.slow(rows, accepted) == []
    assert table.slow(rows, accepted[:2]) == ["b_kernel sm_90 float16: ptxas serializes its wgmma, C7514"]
    mended = rows | {"b_kernel sm_90 float16": row(128)}
    assert table.slow(mended, accepted) == ["C7514 of 'b_kernel': accepted, but none needs it"]


def test_compares_with_the_table():
    problems = table.compare({"kept": row(72)}, ["kept", "added"], {"kept": row(64), "dropped": row(64)})
    assert problems == [
        "added: not in the table",
        "dropped: in the table, but no longer shipped",
        f"kept: {row(72)}, the table says {row(64)}",
    ]


def test_says_where_a_triton_has_no_table(run, tmp_path):
    (tmp_path / "planted.json").write_text(json.dumps({"triton": "3.4.0", "rows": {}}))
    check = run(tmp_path, "--check", "--table", tmp_path / "planted.json")
    assert check.returncode == 2
    assert check.stderr.splitlines()[-1].endswith(
        f"planted.json is no table of triton {TRITON}: --write makes one, --one-of-each-kind needs none"
    )


def test_every_launch_fuses_multiplication_and_addition():
    """Triton 3.10 fuses only if a launch asks for it, so every launch passes enable_fp_fusion."""
    package = Path(importlib.util.find_spec("recattn.triton_kernels").submodule_search_locations[0])
    launches = [
        (str(file.relative_to(package)), call.lineno, [keyword.arg for keyword in call.keywords])
        for file in package.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript)
    ]
    assert launches
    assert [launch for launch in launches if "enable_fp_fusion" not in launch[-1]] == []

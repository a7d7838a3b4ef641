"""Slow tests of `make sanitize`: the CUDA kernels compiled for every architecture, and emulated under sanitizers.

Planted mistakes are to be found. Each CUDA thread is a thread of its own for ThreadSanitizer.
"""

import re
import subprocess
from pathlib import Path

import pytest

from tests.cuda.test_compile import assert_compiles_without_spills, each_source, needs_nvcc
from tests.helpers.emulated_cuda import CSRC, altered, compile_program

KERNELS = ("absorbed_fma.h", "absorbed_mma.h")
BARRIERS = [
    (name, barrier, i)
    for name in KERNELS
    for barrier in ("__syncthreads();", "__syncwarp();")
    for i in range((CSRC / "cuda" / name).read_text().count(barrier))
]
# For each file of csrc/cuda: the name of a mistake, what the file says, and the mistake in its place.
MISTAKES = {
    "absorbed_fma.h": (
        ("rows outside", "if (column < columns && begin >= 0)", "if (column < columns)"),
        ("columns outside", "if (column < columns && begin >= 0)", "if (begin >= 0)"),
        ("rows outside a tile", "if (first_row + m + i * kRowLanes < tile.rows) {", "if (true) {"),
        ("columns outside the output", "if (column < columns) store_quad", "if (true) store_quad"),
        ("numbers outside the output", "if (column + l < columns) store", "if (true) store"),
        ("scales of another row", "scales[m * table.scale_row]", "scales[0]"),
        ("scores of another row of lanes", "lane / 16 * 2, n", "lane / 16, n"),
    ),
    "absorbed_mma.h": (
        ("state rows outside", "row < rank && column < width", "column < width"),
        ("state columns outside", "row < rank && column < width", "row < rank"),
        ("target columns outside", "const bool inside = column < width", "const bool inside = true"),
        ("low rows outside a tile", "if (inside && row < rows)", "if (inside)"),
        ("high rows outside a tile", "if (inside && high_row < rows)", "if (inside)"),
        ("output columns outside", "const bool inside = mine < op.value_dim", "const bool inside = true"),
        ("too little shared memory", "sizeof(Header<kRank>)) + kRank", "sizeof(Header<kRank>)) - 32 + kRank"),
        ("scales outside", "mine[i] = k < rank ?", "mine[i] = true ?"),
        ("halves swapped", "0x5410", "0x1054"),
    ),
    "absorbed_operands.h": (
        ("slots unchecked", "is_row(slot, op.table_size) ? slot : -1", "slot"),
        ("item ids unchecked", "if (!is_row(target, op.items)) {", "if (false) {"),
        ("offsets outside", "max(int64_t{0}, min(op.offsets[user], op.rows))", "op.offsets[user]"),
        ("rows of no user", "    store_zeros(op, end, op.rows - end, block.head);\n", ""),
        ("users outside", "user >= op.users || block.head > 0", "block.head > 0"),
        ("the wrong user", "log2_tile_rows) + probe <=", "log2_tile_rows) + probe <"),
    ),
}


# Where offsets are wild, rows of nobody may be a user's too: each number is then of one of the two.
ALLOWED_RACE = "race:store_unowned_rows\n"


@needs_nvcc
@each_source
def test_compiles_for_every_architecture_without_spills(source, tmp_path):
    assert_compiles_without_spills(source, tmp_path, ("80", "90a", "100"))


def outcome(program: Path) -> tuple[int, str]:
    suppressions = program.with_name("suppressions")
    suppressions.write_text(ALLOWED_RACE)
    environment = {"TSAN_OPTIONS": f"halt_on_error=1 print_suppressions=0 suppressions={suppressions}"}
    result = subprocess.run([program], capture_output=True, text=True, timeout=600, env=environment)
    return result.returncode, result.stdout + result.stderr[:5000]


def test_no_two_threads_of_a_kernel_race(tmp_path):
    code, said = outcome(compile_program("stress.cpp", tmp_path, sanitizer="thread"))
    assert code == 0 and said == "right\n", said


def test_kernels_touch_nothing_outside(tmp_path):
    """Slots, item ids and offsets may hold anything."""
    code, said = outcome(compile_program("stress.cpp", tmp_path, sanitizer="address,undefined"))
    assert code == 0 and said == "right\n", said


@pytest.mark.parametrize("name, barrier, occurrence", BARRIERS)
def test_a_missing_barrier_is_a_race(name, barrier, occurrence, tmp_path):
    csrc = altered(tmp_path, name, barrier, ";", occurrence)
    code, said = outcome(compile_program("stress.cpp", tmp_path, sanitizer="thread", csrc=csrc))
    # Or a pointer is read before it is written.
    assert code != 0 and re.search("ThreadSanitizer: (data race|SEGV)", said), said


@pytest.mark.parametrize(
    "file, said, mistake",
    [pytest.param(file, *texts, id=name) for file, mistakes in MISTAKES.items() for name, *texts in mistakes],
)
def test_a_mistake_is_seen(file, said, mistake, tmp_path):
    csrc = altered(tmp_path, file, said, mistake)
    code, said = outcome(compile_program("stress.cpp", tmp_path, sanitizer="address,undefined", csrc=csrc))
    found = re.search(r"wrong: .*|AddressSanitizer: .*|runtime error: .*", said)
    assert code != 0 and found, said
    print(found[0])

"""The tiles that wgmma read are those of the PTX, and a ptxas that takes others is found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compile_table import wgmma_operands

pytest.importorskip("triton")

# Compiles one kernel for Hopper: this process has Triton's interpreter. Prints, for each ptxas of Triton's package, its
# version, the wgmma of the kernel and those that read another tile.
PROGRAM = """
import subprocess, tempfile
from pathlib import Path
from triton import knobs
from recattn.triton_kernels.common import assembler
from tests.compile_table import refined_attention, wgmma_operands
from tests.compile_table.compiled_kernel import compile_with_log, cuobjdump

of_hopper = "refined_attention_bwd_kernel", 90, "bfloat16 simple D=64 128x128 stage 0 logits no dropout"
(kernel,) = (
    c for c in refined_attention.shipped_configurations() if (c.kernel.__name__, c.architecture, c.label) == of_hopper
)
compiled, _ = compile_with_log(kernel)
ptx = compiled.asm["ptx"]
for tool in (knobs.nvidia.ptxas, knobs.nvidia.ptxas_blackwell):
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx.replace(".version 9.1", ".version 8.7").replace(".version 8.8", ".version 8.7"))
        subprocess.run([tool.path, "-arch=sm_90a", source, "-o", cubin], check=True)
        sass = cuobjdump("-sass", cubin.read_bytes())
    wrong = wgmma_operands.misread(ptx, sass)
    print(tool.version, len(wgmma_operands.of_ptx(ptx)), len(wrong), tool.path == assembler.path())
"""


def test_the_assembler_that_is_used_takes_the_tiles_of_the_ptx():
    root = Path(__file__).parents[2]
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=root, env=compiled, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    assert [used for *_, used in found].count("True") == 1
    for version, count, wrong, used in found:
        assert int(count) > 50
        assert wrong == "0" or used == "False"
        assert wrong != "0" or version != "12.8"  # its mistake is seen


ADDRESS = """
    mov.b32 %r1, global_smem;
    add.s32 %r2, %r1, 8192;
    bfe.u32 %r3, %r2, 4, 14;
    cvt.u64.u32 %rd1, %r3;
    or.b64 %rd2, %rd1, 4611686293305294848;
    add.s64 %rd3, %rd1, 4611686293305294850;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r8,%r9}, {%r4,%r5,%r6,%r7}, %rd2, 0, 1, 1, 1;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r8,%r9}, %rd2, %rd3, 1, 1, 1, 0, 0;
"""
MACHINE_CODE = """
    /*0000*/ UMOV UR10, 0x400 ;
    /*0010*/ UIADD3 UR4, UR10, 0x2000, URZ ;
    /*0020*/ USHF.R.U32.HI UR4, URZ, 0x4, UR4 ;
    /*0030*/ USGXT.U32 UR6, UR4, 0xe ;
    /*0040*/ UMOV UR7, 0x40000040 ;
    /*0050*/ HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4].tnspB, RZ, !UPT ;
    /*0060*/ UMOV UR4, UR6 ;
    /*0070*/ UMOV UR5, UR7 ;
    /*0080*/ UIADD3 UR6, UP0, UR6, 0x2, URZ ;
    /*0090*/ UIADD3.X UR7, URZ, 0x40000040, URZ, UP0, !UPT ;
    /*00a0*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
"""


def test_descriptors_of_both_texts_are_computed():
    first = 0x40000040_00000240
    assert wgmma_operands.of_ptx(ADDRESS) == [(first,), (first, first + 2)]
    assert wgmma_operands.of_sass(MACHINE_CODE) == [(first,), (first, first + 2)]
    assert not wgmma_operands.misread(ADDRESS, MACHINE_CODE)


def test_a_half_of_another_register_is_found():
    wrong = MACHINE_CODE.replace("UIADD3 UR6, UP0, UR6,", "UIADD3 UR6, UP0, UR10,")
    assert wgmma_operands.misread(ADDRESS, wrong) == [(0x40000040_00000240, 0x40000040_00000402)]


def test_what_is_not_known_is_no_mistake():
    unknown = MACHINE_CODE.replace("UMOV UR10, 0x400", "ULDC UR10, c[0x0][0x20]")
    assert not wgmma_operands.misread(ADDRESS, unknown)

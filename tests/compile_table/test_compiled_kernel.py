"""What is read from a kernel's SASS and from ptxas' output."""

import pytest

from tests.compile_table import compiled_kernel

# A loop of two products, a masked one of two, and a wait behind the end from which the second returns.
SASS = """
	code for sm_90a
		Function : a_kernel
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                    /* 0x00000a00ff017b82 */
                                                                             /* 0x000fe20000000800 */
        /*0010*/              @!P0 EXIT ;                                    /* 0x000000000000794d */
        /*0020*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], !UPT ;/* 0x00000000041879f0 */
        /*0030*/                   LDG.E R2, desc[UR54][R4.64] ;             /* 0x0000003604027981 */
        /*0040*/                   FMUL R3, R2, R2 ;                         /* 0x0000000202037220 */
        /*0050*/               @P1 BRA 0x40 ;                                /* 0xfffffffc00f01947 */
        /*0060*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ; /* 0x00000000041879f0 */
        /*0070*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ; /* 0x00000000041879f0 */
        /*0080*/                   HFMA2.MMA R5, -RZ, RZ, 0, 0 ;             /* 0x00000000ff057435 */
        /*0090*/          @P3 BRA 0x30 ;                                     /* 0xfffffffc00f01947 */
        /*00a0*/                   ISETP.GT.AND P2, PT, R2, R3, PT ;         /* 0x000000030200720c */
        /*00b0*/              @!P2 EXIT ;                                    /* 0x000000000000794d */
        /*00c0*/              @!P4 BRA 0x130 ;                               /* 0x0000000000f04947 */
        /*00d0*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24 ; /* 0x00000000041879f0 */
        /*00e0*/                   FMUL R3, R2, R2 ;                         /* 0x0000000202037220 */
        /*00f0*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], R24 ; /* 0x00000000041879f0 */
        /*0100*/              @!P4 BRA 0xa0 ;                                /* 0xfffffffc00f01947 */
        /*0110*/                   STG.E desc[UR54][R4.64], R24 ;            /* 0x0000001804007986 */
        /*0120*/                   EXIT ;                                    /* 0x000000000000794d */
        /*0130*/                   SYNCS.PHASECHK.TRANS64 P4, [UR4], R0 ;    /* 0x00000000ff0475a7 */
        /*0140*/              @!P4 BRA 0x130 ;                               /* 0xfffffffc00f04947 */
        /*0150*/                   BRA 0xd0 ;                                /* 0xfffffffc00f07947 */
        /*0160*/                   BRA 0x160;                                /* 0xfffffffc00fc7947 */
"""


def main_loop(sass: str) -> list[int]:
    return [i.address for i in compiled_kernel.main_loop(compiled_kernel.instructions(sass))]


def test_finds_the_loops():
    found = compiled_kernel.loops(compiled_kernel.instructions(SASS))
    assert [(loop.start, loop[-1]) for loop in found] == [(0x40, 0x50), (0x130, 0x140), (0x30, 0x90), (0xA0, 0x100)]


def test_a_loop_ends_with_its_last_branch():
    twice = compiled_kernel.instructions(SASS.replace("FMUL R3, R2, R2", "BRA 0xa0"))
    assert range(0xA0, 0x101) in compiled_kernel.loops(twice)


MASKED_LOOP = list(range(0xA0, 0x110, 0x10))


def test_the_main_loop_has_most_products():
    """On a tie the shorter loop, without the loop inside it."""
    assert main_loop(SASS) == [0x30, 0x60, 0x70, 0x80, 0x90]
    assert main_loop(SASS.replace("FMUL R3, R2, R2", "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24")) == MASKED_LOOP


def test_the_main_loop_of_a_kernel_without_tensor_cores():
    scalar = SASS.replace("HGMMA.64x64x16.F32 R24, gdesc[UR4],", "FFMA R24, R25,")
    scalar = scalar.replace("HGMMA.64x64x16.F32 R24, gdesc[UR8],", "FADD R24,").replace("FMUL", "FFMA2")
    assert main_loop(scalar) == MASKED_LOOP


def test_without_products_in_a_loop_what_is_in_none():
    straight = SASS.replace("HGMMA.64x64x16.F32 R24, gdesc[UR4], R24", "NOP")
    straight = straight.replace("HGMMA.64x64x16.F32 R24, gdesc[UR8], R24", "NOP")
    assert main_loop(straight) == [0x00, 0x10, 0x20, 0x110, 0x120, 0x150, 0x160]


@pytest.mark.parametrize(
    ("opcode", "on_tensor_cores"),
    [("HMMA.16816.F32", True), ("HGMMA.64x64x16.F32", True), ("UTCHMMA", True), ("HFMA2.MMA", False), ("FFMA", False)],
)
def test_instructions_on_tensor_cores(opcode, on_tensor_cores):
    (instruction,) = compiled_kernel.instructions(
        f"        /*12340*/         @P0  {opcode} R24, R25, R26 ;   /* 0x0 */"
    )
    assert instruction.address == 0x12340 and instruction.predicated
    assert instruction.on_tensor_cores == on_tensor_cores


@pytest.mark.parametrize(
    ("opcode", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16", 2 * 64 * 128 * 16 // 4),
        ("HGMMA.64x8x8.F32.TF32", 2 * 64 * 8 * 8 // 4),
        ("HMMA.16816.F32.BF16", 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
        ("IMMA.16832.S8.S8", 2 * 16 * 8 * 32),
        ("UTCHMMA", 0),
        ("FFMA", 0),
    ],
)
def test_flops_of_a_warp(opcode, flops):
    (instruction,) = compiled_kernel.instructions(f"        /*0010*/         {opcode} R24, R25, R26 ;   /* 0x0 */")
    assert instruction.flops == flops


@pytest.mark.parametrize(
    ("opcode", "accesses"),
    [
        ("LDS R2, [R3]", 1),
        ("LDS.U8 R2, [R3]", 1),
        ("LDS.64 R2, [R3]", 2),
        ("STS.128 [R3+0x64], R4", 4),
        ("LDSM.16.M88.4 R4, [R3]", 4),
        ("LDSM.16.MT88.2 R4, [R3]", 2),
        ("STSM.16.M88 [R3], R4", 1),
        ("SHFL.BFLY PT, R2, R3, 0x2, 0x1f", 1),
        ("LDG.E.128 R4, desc[UR6][R2.64]", 0),
    ],
)
def test_accesses_of_shared_memory(opcode, accesses):
    (instruction,) = compiled_kernel.instructions(f"        /*0010*/         {opcode} ;   /* 0x0 */")
    assert instruction.shared_accesses == accesses


def test_uses_of_a_processor():
    code = compiled_kernel.instructions(SASS.replace("HFMA2.MMA R5", "MUFU.EX2 R5"))
    flops = 2 * 64 * 64 * 16 // 4
    assert compiled_kernel.uses(code) == {"flops": 5 * flops, "mufu": 1, "fma": 2, "alu": 1, "shared": 0, "loads": 1}
    loop = compiled_kernel.uses(compiled_kernel.main_loop(code))
    assert loop == {"flops": 2 * flops, "mufu": 1, "fma": 0, "alu": 0, "shared": 0, "loads": 1}


LOG = """
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in 'a_kernel'
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to something else
ptxas info    : (C7519) warpgroup.arrive is injected in around line 2247 by compiler to allow use of registers in GMMA
ptxas info    : Compiling entry function 'a_kernel' for 'sm_90a'
ptxas info    : Used 230 registers, used 1 barriers
"""


def test_reads_what_ptxas_says():
    assert compiled_kernel.advisories(LOG) == {"serialized": ["C7515"], "advisories": ["C7519"]}
    quiet = LOG.partition("in GMMA")[2]
    assert compiled_kernel.advisories(quiet) == {"serialized": [], "advisories": []}


def test_refuses_a_log_that_is_not_there():
    with pytest.raises(ValueError, match="expected what `ptxas -v` says of a kernel, got ''"):
        compiled_kernel.advisories("")

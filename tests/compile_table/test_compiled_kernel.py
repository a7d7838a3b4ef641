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

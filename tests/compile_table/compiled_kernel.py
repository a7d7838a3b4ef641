"""Compile one kernel configuration, and read its resources and instructions."""

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.compile_table import wgmma_operands

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?\w+\s+)?([A-Z]\w*)([^;]*);")
_TARGET = re.compile(r"0x([0-9a-f]+)\s*$")
# HGMMA.64x128x16, by four warps together; HMMA.16816, by one.
_SHAPE = re.compile(r"\.(?:(\d+)x(\d+)x(\d+)|(16)(8)(4|8|16|32))\b")
_BITS = re.compile(r"\.(64|128)\b")
_MATRICES = re.compile(r"\.MT?88\.(2|4)\b")

# Units of a processor that take an instruction of a warp more than a clock, or that are shared by all of its warps.
FMA = ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "IMAD")
ALU = ("FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "SEL", "ISETP", "IADD3", "VIADD", "VIMNMX", "VIADDMNMX", "IABS")
ALU += ("LOP3", "PLOP3", "SHF", "PRMT", "LEA", "SGXT", "P2R", "R2P", "F2FP", "I2FP")
MUFU = ("MUFU", "F2F", "F2I", "I2F")
SHARED = ("LDS", "LDSM", "STS", "STSM", "ATOMS", "SHFL")
LOADS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP")

Row = dict[str, int | list[str]]


def measure(compilation: object) -> Row:
    """The table's row for a `tests.compile_table.compilation.Compilation`."""
    compiled, ptxas = compile_with_log(compilation)
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", cuobjdump("-res-usage", compiled.asm["cubin"])))
    sass = cuobjdump("-sass", compiled.asm["cubin"])
    code = instructions(sass)
    loop = main_loop(code)
    in_loop = Counter(i.opcode for i in loop)
    counts = {"": uses(code), "loop_": uses(loop)}
    return {
        "registers": int(used["REG"]),
        "spilled_bytes": int(used["STACK"]) + int(used["LOCAL"]),
        "shared_bytes": compiled.metadata.shared,
        # Some tiles get tf32 for a product in full precision: on sm_100, those of 64 rows.
        "tf32": compiled.asm["ptx"].count("tf32"),
        "tensor_columns": compiled.metadata.tmem_size,
        **advisories(ptxas),
        "misread": len(wgmma_operands.misread(compiled.asm["ptx"], sass)),
        "mma": sum(i.on_tensor_cores for i in code),
        "loop_instructions": len(loop),
        "loop_mma": sum(i.on_tensor_cores for i in loop),
        "loop_fmul": in_loop["FMUL"] + in_loop["FMUL2"],
        "loop_isetp": in_loop["ISETP"],
        "loop_fsel": in_loop["FSEL"],
        "instructions": len(code),
        "loop_wgmma": in_loop["HGMMA"],
        **{f"{where}{unit}": count for where, used in counts.items() for unit, count in used.items()},
    }


def uses(code: Sequence["Instruction"]) -> dict[str, int]:
    """What one warp that runs each of these instructions once asks of a processor's units."""
    return {
        "flops": sum(i.flops for i in code),
        "mufu": sum(i.opcode in MUFU for i in code),
        "fma": sum(i.opcode in FMA for i in code),
        "alu": sum(i.opcode in ALU for i in code),
        "shared": sum(i.shared_accesses for i in code),
        "loads": sum(i.opcode in LOADS for i in code),
    }


def compile_with_log(compilation: object) -> tuple[object, str]:
    """Compile the kernel. Returns it and the output of ptxas."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from recattn.triton_kernels.common import assembler
    from recattn.triton_kernels.common.launch import ENABLE_FP_FUSION

    names = list(compilation.signature)
    attributes = {}

    def without_divisor(kind: str | tuple, path: tuple[int, ...]) -> str | tuple:
        if isinstance(kind, tuple):
            fields = [without_divisor(field, (*path, i)) for i, field in enumerate(kind)]
            return type(kind)(*fields) if hasattr(kind, "_fields") else tuple(fields)
        base, _, divisor = kind.partition(":")
        if divisor:
            attributes[path] = [["tt.divisibility", int(divisor)]]
        return base

    source = ASTSource(
        compilation.kernel,
        signature={name: without_divisor(kind, (i,)) for i, (name, kind) in enumerate(compilation.signature.items())},
        constexprs={
            path if isinstance(path[0], int) or isinstance(path, str) else (names.index(path[0]), path[1]): value
            for path, value in compilation.constexprs.items()
        },
        attrs=attributes,
    )
    options = {name: getattr(compilation, name) for name in ("num_warps", "num_stages", "maxnreg")}
    # Triton prints the log where it runs ptxas: not where its cache has the kernel.
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    with (
        contextlib.redirect_stdout(io.StringIO()) as log,
        assembler.for_architecture(compilation.architecture),
    ):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", compilation.architecture, 32),
            options=options | {"enable_fp_fusion": ENABLE_FP_FUSION},
        )
    return compiled, log.getvalue()


def cuobjdump(what: str, cubin: bytes) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, what, file.name], capture_output=True, text=True, check=True).stdout


def advisories(ptxas: str) -> dict[str, list[str]]:
    """ptxas' advisory codes: those that say it serializes wgmma, and all others."""
    if "Compiling entry function" not in ptxas:
        raise ValueError(f"expected what `ptxas -v` says of a kernel, got {ptxas!r}")
    said = re.findall(r"\((C75\d\d)\) (.*)", ptxas)
    serialized = {code for code, text in said if "instructions are serialized" in text}
    return {"serialized": sorted(serialized), "advisories": sorted({code for code, _ in said} - serialized)}


@dataclass(frozen=True)
class Instruction:
    """A line of SASS. `modifiers` follow the opcode: ".E.128". `target` is the address that a branch jumps to."""

    address: int
    predicated: bool
    opcode: str
    modifiers: str
    target: int | None

    @property
    def on_tensor_cores(self) -> bool:
        """HMMA; HGMMA on sm_90; UTCHMMA on sm_100. HFMA2.MMA has the opcode HFMA2 and does not count."""
        return self.opcode.endswith("MMA")

    @property
    def flops(self) -> int:
        """Of one warp on tensor cores, a quarter of an HGMMA's. 0 for UTCHMMA: its shape is in no modifier."""
        shape = _SHAPE.match(self.modifiers) if self.on_tensor_cores else None
        if shape is None:
            return 0
        m, n, k = (int(size) for size in shape.groups() if size)
        return 2 * m * n * k // (1 if shape[4] else 4)

    @property
    def shared_accesses(self) -> int:
        """Clocks of shared memory, 128 bytes each, without bank conflicts. Shuffles take its way too."""
        if self.opcode not in SHARED:
            return 0
        if self.opcode in ("LDSM", "STSM"):
            return int(found[1]) if (found := _MATRICES.search(self.modifiers)) else 1
        return int(found[1]) // 32 if (found := _BITS.search(self.modifiers)) else 1


def instructions(sass: str) -> list[Instruction]:
    return [
        Instruction(
            address=int(address, 16),
            predicated=bool(predicate),
            opcode=opcode,
            modifiers=operands.split()[0] if operands.startswith(".") else "",
            target=int(found[1], 16) if opcode == "BRA" and (found := _TARGET.search(operands)) else None,
        )
        for address, predicate, opcode, operands in _LINE.findall(sass)
    ]


def loops(code: Sequence[Instruction]) -> list[range]:
    """Address ranges of the loops, innermost first: from a backward branch's target to the last branch to it.

    A branch back across an EXIT is no loop: it returns from a wait that is placed behind the kernel's end.
    """
    exits = [i.address for i in code if i.opcode in ("EXIT", "RET") and not i.predicated]
    ends: dict[int, int] = {}
    for i in code:
        if i.target is not None and i.target < i.address and not any(i.target <= end < i.address for end in exits):
            ends[i.target] = i.address
    return sorted((range(start, end + 1) for start, end in ends.items()), key=len)


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The instructions of the loop that does most of the kernel's matrix products.

    An instruction belongs to the innermost loop around it. The main loop has the most tensor core instructions, or the
    most FFMA in a kernel without tensor cores. On a tie the shorter loop counts: it has no masks. For a kernel without
    products in a loop, it is all the code outside loops.
    """
    on_tensor_cores = any(i.on_tensor_cores for i in code)

    def products(body: Sequence[Instruction]) -> int:
        return sum(i.on_tensor_cores if on_tensor_cores else i.opcode in ("FFMA", "FFMA2") for i in body)

    nested, bodies = loops(code), defaultdict(list)
    for i in code:
        bodies[next((loop for loop in nested if i.address in loop), None)].append(i)
    straight = bodies.pop(None, [])
    most = max(bodies.values(), key=lambda body: (products(body), -len(body)), default=straight)
    return most if products(most) else straight

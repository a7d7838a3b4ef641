"""What every shipped kernel configuration compiles to, without a GPU: resources, and instructions that cost speed.

python tests/compile_table/table.py --write      writes triton_VERSION.json for the installed Triton; rows stay whose
                                                 kernel, with all that it calls, did not change
python tests/compile_table/table.py --check      fails if a configuration spills, has its wgmma serialized or misread,
                                                 rounds float32 to tf32, exceeds its architecture's shared or tensor
                                                 memory, or differs from the table
    --sampled N      compiles what changed since the table was written, and N configurations of the rest
    --only REGEX     compiles the configurations whose name matches, such as "fwd_kernel sm_90 bfloat16"
python tests/compile_table/table.py --one-of-each-kind    checks under any Triton, without a table: each kernel once for
                                                 each architecture, and once for each dtype and option; spills and
                                                 serialized wgmma are notes

To use another Triton, put it first on PYTHONPATH. ACCEPTED lists the spills and serialized wgmma that are accepted, and
why. Columns:

registers, spilled_bytes    per thread
shared_bytes, tensor_columns    per block
tf32             instructions that round to tf32
serialized       codes by which ptxas says that each wgmma waits for the one before: C7514, C7515, ...
misread          wgmma that read another tile than the PTX says (`wgmma_operands`)
advisories       ptxas' other codes: C7519 if it adds a warpgroup.arrive
mma              tensor core instructions: HMMA, HGMMA (sm_90), UTCHMMA (sm_100)
loop_*           instructions of the main loop (`compiled_kernel.main_loop`): all, on tensor cores, FMUL, ISETP, FSEL
instructions     all of the kernel
loop_wgmma       HGMMA in the main loop
The rest is for one warp that runs every instruction once, in the kernel and (loop_*) in its main loop:
flops            on tensor cores, by the shapes in the SASS; an HGMMA's are its four warps'; unknown (0) on sm_100
mufu, fma, alu   instructions of the units of special functions, of FP32 (with IMAD), and of integers and comparisons
shared           clocks of shared memory, 128 bytes each, with shuffles and without bank conflicts
loads            from global memory, asynchronous ones too

A module of this folder adds configurations by its `shipped_configurations()`, which yields a
`compilation.Compilation` for each.
"""

import argparse
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.*, where this file is run as a script

from tests.compile_table import compiled_kernel
from tests.compile_table.compiled_kernel import Row

# Shared memory per thread block, bytes.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Tensor memory of sm_100. Triton was seen to compile a kernel that exceeds it to nothing.
TENSOR_COLUMNS = 512
UNNEEDED = "accepted, but none needs it"
# Modules of this folder that ship no configurations.
TOOLS = ("compilation", "compiled_kernel", "table", "wgmma_operands")


@dataclass(frozen=True)
class Accepted:
    """Configurations that may spill or serialize wgmma for now."""

    what: str  # "spills", or the code by which ptxas says that it serializes wgmma
    where: str  # a regular expression, found in their names
    tritons: tuple[str, ...]
    why: str


OLDER, NEWER, EITHER = ("3.6.0",), ("3.7.1",), ("3.6.0", "3.7.1")
FEW_BYTES = "8 to 24 bytes a thread, which the other Triton keeps in registers"
FEW_AMPERE_BYTES = "8 to 72 bytes a thread, on sm_80 alone"
FEW_PADDED_BYTES = "8 to 40 bytes a thread, with seq_lens and dropout together alone"
OF_A_LATER_PTXAS = "8 to 104 bytes a thread, float32 264, that ptxas 12.8 keeps in registers; but it computes wrongly"
# An entry that no configuration needs any more fails the check.
ACCEPTED = (
    Accepted(
        "spills",
        r"^sink_attention_bwd_dq_kernel sm_90 float32 D=(32 32x32|64 32x16|128 16x16) dropout padded ",
        OLDER,
        FEW_PADDED_BYTES,
    ),
    Accepted(
        "spills",
        r"^sink_attention_bwd_dq_kernel sm_80 float32 D=(32 32x32|64 32x16) dropout padded ",
        OLDER,
        FEW_PADDED_BYTES,
    ),
    Accepted(
        "spills", r"^sink_attention_fwd_kernel sm_100 float32 D=128 16x16 dropout padded ", OLDER, FEW_PADDED_BYTES
    ),
    Accepted(
        "spills", r"^sink_attention_bwd_dq_kernel sm_100 float32 D=32 32x32 dropout padded ", OLDER, FEW_PADDED_BYTES
    ),
    Accepted("spills", r"^sink_attention_fwd_kernel sm_80 float32 D=256 32x32 warps", OLDER, FEW_BYTES),
    Accepted("spills", r"^sink_attention_fwd_kernel sm_100 bfloat16 D=32 128x64 warps", NEWER, FEW_BYTES),
    Accepted("spills", r"^sink_attention_fwd_kernel sm_100 bfloat16 D=64 128x64 warps", NEWER, FEW_BYTES),
    Accepted("spills", r"^sink_attention_bwd_dq_kernel sm_100 bfloat16 D=256 64x32 ", OLDER, FEW_BYTES),
    Accepted("spills", r"^sink_attention_bwd_dq_kernel sm_80 float32 D=256 32x16 warps", OLDER, FEW_AMPERE_BYTES),
    Accepted(
        "spills", r"^sink_attention_pairs_bwd_kernel sm_80 bfloat16 D=(128|256) dropout ", EITHER, FEW_AMPERE_BYTES
    ),
    Accepted(
        "spills",
        r"^sink_attention_pairs_bwd_kernel sm_90 bfloat16 D=64 corrects ",
        OLDER,
        "8 bytes a thread, by either Triton",
    ),
    Accepted("spills", r"^sink_attention_pairs_bwd_kernel sm_100 bfloat16 D=(128|256) dropout ", NEWER, FEW_BYTES),
    Accepted("spills", r"^wasserstein_attention_bwd_dq_kernel sm_80 bfloat16 W=128 Dv=64 ", EITHER, FEW_AMPERE_BYTES),
    Accepted(
        "spills", r"^wasserstein_attention_bwd_dq_kernel sm_80 bfloat16 W=256 .* dropout ", EITHER, FEW_AMPERE_BYTES
    ),
    Accepted("spills", r"^wasserstein_attention_short_bwd_kernel sm_90 bfloat16 N=128 D=32 dropout ", OLDER, FEW_BYTES),
    Accepted("spills", r"^wasserstein_attention_fwd_kernel sm_80 bfloat16 W=256 .* dropout ", OLDER, FEW_BYTES),
    Accepted("spills", r"^wasserstein_attention_fwd_kernel sm_100 float32 W=64 .* dropout ", NEWER, FEW_BYTES),
    Accepted("spills", r"^sink_attention_bwd_dq_kernel sm_90 float32 D=128 32x32 warps", EITHER, OF_A_LATER_PTXAS),
    Accepted("spills", r"^inter_sink_bias_fwd_kernel sm_90 bfloat16 D=64 16x128x64 ", NEWER, OF_A_LATER_PTXAS),
    Accepted("spills", r"^refined_attention_bwd_kernel sm_90 .* additive .* 64x128 stage 1 ", NEWER, OF_A_LATER_PTXAS),
    Accepted("spills", r"^refined_attention_fwd_kernel sm_90 .* additive .* 128x128 warps", NEWER, OF_A_LATER_PTXAS),
    Accepted("spills", r"^sink_attention_bwd_dkdv_kernel sm_90 bfloat16 D=64 64x128 warps", NEWER, OF_A_LATER_PTXAS),
    Accepted("spills", r"^sink_attention_correction_fwd_kernel sm_90 bfloat16 D=256 ", NEWER, OF_A_LATER_PTXAS),
    Accepted("spills", r"^sink_attention_pairs_bwd_kernel sm_90 bfloat16 D=(64|128|256) ", NEWER, OF_A_LATER_PTXAS),
    Accepted("spills", r"^wasserstein_attention_bwd_dq_kernel sm_90 bfloat16 W=(128|256) ", NEWER, OF_A_LATER_PTXAS),
    Accepted("spills", r"^wasserstein_attention_fwd_kernel sm_90 .* dropout ", NEWER, OF_A_LATER_PTXAS),
    Accepted("spills", r"^wasserstein_attention_short_\w+_kernel sm_90 .* N=128 D=32 ", NEWER, OF_A_LATER_PTXAS),
)


def kernel_modules() -> tuple[str, ...]:
    import recattn.triton_kernels as package

    kernels = [module.name for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]
    # Configurations are in the modules beside this one; kernel modules are searched for kernels that none compiles.
    beside = [f"tests.compile_table.{path.stem}" for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))]
    return (*kernels, *(name for name in beside if "test_" not in name and name.rpartition(".")[2] not in TOOLS))


def fingerprints(modules: tuple[str, ...]) -> dict[str, str]:
    """For each kernel, a hash of its source, of all functions it calls, and of its configurations."""
    configurations = defaultdict(list)
    for compilation in compilations(modules):
        configurations[compilation.kernel].append(repr(compilation))
    measured = hashlib.sha256(Path(compiled_kernel.__file__).read_bytes()).hexdigest()
    return {
        kernel.__name__: hashlib.sha256("".join([measured, kernel.cache_key, *shipped]).encode()).hexdigest()
        for kernel, shipped in configurations.items()
    }


@functools.cache
def compilations(modules: tuple[str, ...]) -> list:
    found = [importlib.import_module(name) for name in modules]
    return [c for module in found if hasattr(module, "shipped_configurations") for c in module.shipped_configurations()]


def unlisted_kernels(modules: tuple[str, ...]) -> list[str]:
    """Names of the kernels (`*_kernel`) that no configuration compiles."""
    from triton import JITFunction

    listed = {compilation.kernel for compilation in compilations(modules)}
    return [
        f"{module}.{name}"
        for module in modules
        for name, value in vars(importlib.import_module(module)).items()
        if name.endswith("_kernel") and isinstance(value, JITFunction) and value not in listed
    ]


def key(compilation) -> str:
    return (
        f"{compilation.kernel.__name__} sm_{compilation.architecture} {compilation.label} "
        f"warps={compilation.num_warps} stages={compilation.num_stages}"
    )


def all_keys(modules: tuple[str, ...]) -> list[str]:
    keys = [key(compilation) for compilation in compilations(modules)]
    if len(set(keys)) < len(keys):
        raise ValueError(f"labels must tell configurations apart, got {[k for k in keys if keys.count(k) > 1]}")
    return keys


def one_of_each_kind(keys: list[str]) -> list[int]:
    """Indices of few keys that cover each kernel with each architecture, and with each dtype and option."""
    chosen, shown = [], set()
    for at_once in (2, 1):
        for i, name in enumerate(keys):
            kernel, architecture, *words = name.split()
            kind = " ".join(word for word in words if not re.fullmatch(r"\w+=\d+|\d+(x\d+)+", word))
            new = {(kernel, architecture), (kernel, kind)} - shown
            if len(new) >= at_once:
                chosen.append(i)
                shown |= new
    return sorted(chosen)


def measure_or_say_why(modules: tuple[str, ...], index: int) -> Row | str:
    try:
        return compiled_kernel.measure(compilations(modules)[index])
    except Exception as error:  # of Triton's, of whichever part of it
        while error.__cause__:
            error = error.__cause__
        return f"does not compile: {type(error).__name__}: {error}"


def measure_each(modules: tuple[str, ...], jobs: int, indices: Sequence[int]) -> tuple[dict[str, Row], list[str]]:
    """The rows, and the reasons why others could not be compiled."""
    keys = all_keys(modules)
    # Forked workers inherit the imported kernels.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        measured = pool.map(functools.partial(measure_or_say_why, modules), indices)
        results = dict(sorted(zip((keys[i] for i in indices), measured, strict=True)))
    rows = {name: row for name, row in results.items() if isinstance(row, dict)}
    return rows, [f"{name}: {why}" for name, why in results.items() if isinstance(why, str)]


def refusals(rows: dict[str, Row]) -> list[str]:
    """What no configuration may do under any Triton: wrong tiles, float32 as tf32, too much shared or tensor memory."""
    problems = []
    for name, row in rows.items():
        budget = SHARED_MEMORY[int(re.search(r"sm_(\d+)", name)[1])]
        if row["tf32"] and "float32" in name:
            problems.append(f"{name}: {row['tf32']} instructions round float32 to tf32")
        if row["misread"]:
            problems.append(f"{name}: {row['misread']} wgmma read another tile than the PTX says")
        if row["tensor_columns"] > TENSOR_COLUMNS:
            problems.append(f"{name}: {row['tensor_columns']} columns of tensor memory, there are {TENSOR_COLUMNS}")
        if row["shared_bytes"] > budget:
            problems.append(f"{name}: {row['shared_bytes']} bytes of shared memory, the budget is {budget}")
    return problems


def slow(rows: dict[str, Row], accepted: Sequence[Accepted]) -> list[str]:
    """Spills and serialized wgmma that ACCEPTED does not list, and entries of ACCEPTED that no row needs."""
    found = [
        (name, "spills", f"spills {row['spilled_bytes']} bytes at {row['registers']} registers")
        for name, row in rows.items()
        if row["spilled_bytes"]
    ]
    found += [
        (name, code, f"ptxas serializes its wgmma, {code}") for name, row in rows.items() for code in row["serialized"]
    ]
    problems, needed = [], set()
    for name, what, said in sorted(found):
        covering = [entry for entry in accepted if entry.what == what and re.search(entry.where, name)]
        needed.update(covering)
        if not covering:
            problems.append(f"{name}: {said}")
    unneeded = [entry for entry in accepted if entry not in needed]
    return problems + [f"{entry.what} of {entry.where!r}: {UNNEEDED}" for entry in unneeded]


def compare(rows: dict[str, Row], shipped: Sequence[str], recorded: dict[str, Row]) -> list[str]:
    problems = [f"{name}: not in the table" for name in shipped if name not in recorded]
    problems += [f"{name}: in the table, but no longer shipped" for name in recorded if name not in shipped]
    return problems + [
        f"{name}: {row}, the table says {recorded[name]}"
        for name, row in rows.items()
        if recorded.get(name, row) != row
    ]


def unchanged_rows(table: dict, keys: list[str], kernels: dict[str, str]) -> dict[str, Row]:
    same = {kernel for kernel, fingerprint in kernels.items() if table["kernels"].get(kernel) == fingerprint}
    return {name: row for name, row in table["rows"].items() if name in keys and name.split()[0] in same}


def sample(rows: dict[str, Row], count: int, kernels: dict[str, str]) -> list[str]:
    """Names of some rows, and of others after each change of a kernel."""
    return sorted(rows, key=lambda name: hashlib.sha256(f"{kernels} {name}".encode()).digest())[:count]


def to_json(triton_version: str, kernels: dict[str, str], rows: dict[str, Row]) -> str:
    """One line for each kernel and each row."""

    def lines(items: dict) -> str:
        return ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(items.items()))

    return (
        f'{{\n  "triton": "{triton_version}",\n'
        f'  "kernels": {{\n{lines(kernels)}\n  }},\n  "rows": {{\n{lines(rows)}\n  }}\n}}\n'
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    action.add_argument("--one-of-each-kind", action="store_true")
    parser.add_argument("--sampled", type=int, default=0, metavar="N")
    parser.add_argument("--module", action="append", help="these modules instead of all kernels and all of this folder")
    parser.add_argument("--only", help="a regular expression: only the configurations in whose names it is found")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()

    # Interpreted kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    from triton import __version__ as triton_version

    path = options.table or Path(__file__).with_name(f"triton_{triton_version}.json")
    table = json.loads(path.read_text()) if path.exists() else {}
    if options.check and table.get("triton") != triton_version:
        parser.error(f"{path} is no table of triton {triton_version}: --write makes one, --one-of-each-kind needs none")

    modules = tuple(options.module or kernel_modules())
    keys, kernels = all_keys(modules), fingerprints(modules)
    # Rows that are taken from the table are checked too.
    kept, indices = {}, range(len(keys))
    if options.one_of_each_kind:
        indices = one_of_each_kind(keys)
    elif (options.write or options.sampled) and table.get("triton") == triton_version:
        kept = unchanged_rows(table, keys, kernels)
        again = sample(kept, options.sampled, kernels)
        indices = [i for i in indices if keys[i] not in kept or keys[i] in again]
    if options.only:
        indices = [i for i in indices if re.search(options.only, keys[i])]

    partial = options.module or options.only
    rows, problems = measure_each(modules, options.jobs, indices)
    held, notes = dict(sorted({**kept, **rows}.items())), []
    if options.one_of_each_kind:
        notes = slow(held, [])
    else:
        found = slow(held, [a for a in ACCEPTED if triton_version in a.tritons])
        # An entry that this part does not need may be needed by another.
        problems += [p for p in found if not (partial and p.endswith(UNNEEDED))]
    problems += refusals(held)
    problems += [f"{name}: in no shipped_configurations()" for name in unlisted_kernels(modules)]
    if options.check:
        # Compare with the table's rows of these modules' kernels only.
        own = {name.split()[0] for name in keys} if options.module and not options.table else None
        recorded = {name: row for name, row in table["rows"].items() if own is None or name.split()[0] in own}
        problems += compare(rows, keys, recorded)
    elif options.write and len(held) == len(keys):
        # Written even with problems: --check reports them, and a fixed kernel is then compiled alone.
        path.write_text(to_json(triton_version, kernels, held))
    summary = f"{len(indices)} configurations, {len(problems)} problems by triton {triton_version}"
    print(*notes, *problems, summary, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

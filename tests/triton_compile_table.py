"""Registers, spills, shared memory and precision of every shipped kernel configuration, compiled without a GPU.

python tests/triton_compile_table.py --write    records them in triton_compile_table.json
python tests/triton_compile_table.py --check    fails if one spills, rounds float32 to tf32, is over its architecture's
                                                shared or tensor memory, or is not what the table says
python tests/triton_compile_table.py --check --sampled    compiles only one configuration in eight where the kernels'
                                                sources and Triton are those that the whole table was written from
python tests/triton_compile_table.py --one-of-each-kind    fails as --check does, by whatever Triton this is and without
                                                the table, but for spills: each kernel once for each
                                                architecture, and once for each dtype and option

A kernel module takes part by its `shipped_configurations()`, which yields a
`recattn.triton_kernels.compilation.Compilation` for each.
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
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TABLE = Path(__file__).with_suffix(".json")
# What one thread block may use, bytes.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Of tensor memory, which sm_100 has. Beyond it Triton was seen to compile a kernel to nothing.
TENSOR_COLUMNS = 512
SAMPLED = 8


def kernel_modules() -> tuple[str, ...]:
    import recattn.triton_kernels as package

    return tuple(f"{package.__name__}.{module.name}" for module in pkgutil.iter_modules(package.__path__))


def sources_of(modules: tuple[str, ...]) -> str:
    """What the rows depend on, beside Triton."""
    files = [importlib.import_module(name).__file__ for name in modules]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


@functools.cache
def compilations(modules: tuple[str, ...]) -> list:
    found = [importlib.import_module(name) for name in modules]
    return [c for module in found if hasattr(module, "shipped_configurations") for c in module.shipped_configurations()]


def unlisted_kernels(modules: tuple[str, ...]) -> list[str]:
    """Kernels, by the suffix of their names, that no configuration compiles."""
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


def measure(modules: tuple[str, ...], index: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from recattn.triton_kernels.compilation import ENABLE_FP_FUSION

    compilation = compilations(modules)[index]
    types = {name: kind.partition(":") for name, kind in compilation.signature.items()}
    source = ASTSource(
        compilation.kernel,
        signature={name: base for name, (base, _, _) in types.items()},
        constexprs=dict(compilation.constexprs),
        attrs={
            (i,): [["tt.divisibility", int(divisor)]] for i, (_, _, divisor) in enumerate(types.values()) if divisor
        },
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", compilation.architecture, 32),
        options={
            **{name: getattr(compilation, name) for name in ("num_warps", "num_stages", "maxnreg")},
            "enable_fp_fusion": ENABLE_FP_FUSION,
        },
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(amount) for name, amount in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": used["REG"],
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        # Some tiles get tf32 for a product in full precision: on sm_100, those of 64 rows.
        "tf32": compiled.asm["ptx"].count("tf32"),
        "tensor_columns": compiled.metadata.tmem_size,
    }


def all_keys(modules: tuple[str, ...]) -> list[str]:
    keys = [key(compilation) for compilation in compilations(modules)]
    if len(set(keys)) < len(keys):
        raise ValueError(f"labels must tell configurations apart, got {[k for k in keys if keys.count(k) > 1]}")
    return keys


def one_of_each_kind(keys: list[str]) -> list[int]:
    """Indices of few keys that have each kernel with each of its architectures and with each dtype and option."""
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


def measure_or_say_why(modules: tuple[str, ...], index: int) -> dict[str, int] | str:
    try:
        return measure(modules, index)
    except Exception as error:  # of Triton's, of whichever part of it
        while error.__cause__:
            error = error.__cause__
        return f"does not compile: {type(error).__name__}: {error}"


def measure_each(
    modules: tuple[str, ...], jobs: int, indices: Sequence[int]
) -> tuple[dict[str, dict[str, int]], list[str]]:
    """The rows, and why others could not be made."""
    keys = all_keys(modules)
    # Forked, the workers have the kernels already.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        measured = pool.map(functools.partial(measure_or_say_why, modules), indices)
        results = dict(sorted(zip((keys[i] for i in indices), measured, strict=True)))
    rows = {name: row for name, row in results.items() if isinstance(row, dict)}
    return rows, [f"{name}: {why}" for name, why in results.items() if isinstance(why, str)]


def refusals(rows: dict[str, dict[str, int]]) -> list[str]:
    """What no configuration may do, whatever compiles it."""
    problems = []
    for name, row in rows.items():
        budget = SHARED_MEMORY[int(re.search(r"sm_(\d+)", name)[1])]
        if row["tf32"] and "float32" in name:
            problems.append(f"{name}: {row['tf32']} instructions round float32 to tf32")
        if row["tensor_columns"] > TENSOR_COLUMNS:
            problems.append(f"{name}: {row['tensor_columns']} columns of tensor memory, there are {TENSOR_COLUMNS}")
        if row["shared_bytes"] > budget:
            problems.append(f"{name}: {row['shared_bytes']} bytes of shared memory, the budget is {budget}")
    return problems


def spills(rows: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"{name}: spills {row['spilled_bytes']} bytes at {row['registers']} registers"
        for name, row in rows.items()
        if row["spilled_bytes"]
    ]


def compare(
    rows: dict[str, dict[str, int]], shipped: Sequence[str], triton_version: str, table: dict
) -> tuple[list[str], list[str]]:
    """Problems and notes: another Triton may use other resources, but the configurations must be those of the table."""
    recorded = table["rows"]
    problems = [f"{name}: not in the table" for name in shipped if name not in recorded]
    problems += [f"{name}: in the table, but no longer shipped" for name in recorded if name not in shipped]
    changed = [
        f"{name}: {row}, the table says {recorded[name]}"
        for name, row in rows.items()
        if recorded.get(name, row) != row
    ]
    if triton_version == table["triton"]:
        return problems + changed, []
    return problems, [f"this is triton {triton_version}, the table is of {table['triton']}", *changed]


def to_json(triton_version: str, sources: str, rows: dict[str, dict[str, int]]) -> str:
    """One line a row."""
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    return f'{{\n  "triton": "{triton_version}",\n  "sources": "{sources}",\n  "rows": {{\n{lines}\n  }}\n}}\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true")
    action.add_argument("--check", action="store_true")
    action.add_argument("--one-of-each-kind", action="store_true")
    parser.add_argument("--sampled", action="store_true")
    parser.add_argument("--module", action="append", help="kernel modules instead of all of recattn.triton_kernels")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()

    # What the interpreter runs cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    from triton import __version__ as triton_version

    modules = tuple(options.module or kernel_modules())
    sources = sources_of(modules)
    table = json.loads(options.table.read_text()) if options.check else {}
    known = (table.get("triton"), table.get("sources")) == (triton_version, sources)
    keys = all_keys(modules)
    every = SAMPLED if options.sampled and known else 1
    indices = one_of_each_kind(keys) if options.one_of_each_kind else range(0, len(keys), every)
    rows, problems = measure_each(modules, options.jobs, indices)
    # What the table says of those that are not compiled is held to the same limits.
    held = {**table["rows"], **rows} if known else rows
    notes = spills(held)
    if not options.one_of_each_kind:
        problems, notes = problems + notes, []
    problems += refusals(held)
    problems += [f"{name}: in no shipped_configurations()" for name in unlisted_kernels(modules)]
    if options.check:
        differences, notes = compare(rows, keys, triton_version, table)
        problems += differences
    elif options.write and not problems:
        options.table.write_text(to_json(triton_version, sources, rows))
    summary = f"{len(indices)} configurations, {len(problems)} problems by triton {triton_version}"
    print(*notes, *problems, summary, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

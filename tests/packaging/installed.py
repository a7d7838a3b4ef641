"""Quick tests of an installed recattn where no compiler can be found: `make wheel-test` and cibuildwheel run them.

python tests/packaging/installed.py    with the interpreter of the environment that has it
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")
TESTS = ("cpu/test_index_checks.py", "cpu/test_inter_sink_bias.py", "nn/test_patch.py", "serving/test_slot_map.py")
SELECTED = "not instruction_set and not compiles"  # these start processes and compilers
IMPORTED = """
import recattn
from recattn import _extension, _native, _slot_map
print(recattn.__file__)
assert "cpu" not in _extension.MISSING and _native.signature is not None
"""


def main() -> None:
    # pip has compiled no bytecode: what the first run writes, the others read.
    unwanted = ("CC", "CXX", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    variables = {name: value for name, value in os.environ.items() if name not in unwanted}
    variables["PATH"] = str(Path(sys.executable).parent)
    found = [name for name in COMPILERS if shutil.which(name, path=variables["PATH"])]
    if found:
        raise SystemExit(f"this environment has compilers: {', '.join(found)}")
    with tempfile.TemporaryDirectory() as folder:

        def run(*arguments: str | Path) -> str:
            command = [sys.executable, *arguments]
            said = subprocess.run(command, cwd=folder, env=variables, stdout=subprocess.PIPE, text=True)
            print(said.stdout, flush=True)
            if said.returncode != 0:
                raise SystemExit(said.returncode)
            return said.stdout

        if ROOT in Path(run("-c", IMPORTED).strip()).parents:
            raise SystemExit("recattn is imported from the checkout, not from the environment")
        run("-m", "recattn", "info")
        run("-m", "recattn", "check", "--quick")
        options = ("-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "-k", SELECTED)
        run("-m", "pytest", *options, *(ROOT / "tests" / name for name in TESTS))


if __name__ == "__main__":
    main()

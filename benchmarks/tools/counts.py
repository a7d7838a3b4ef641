"""`python -m benchmarks.tools.counts`: write what the cost model reads from the compile table.

Run it after `python tests/compile_table/table.py --write`, and `python -m benchmarks.plot` after it.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.report.instructions import COUNTS, UNITS

TABLE = ROOT / "tests" / "compile_table" / "triton_3.7.1.json"
ARCHITECTURES = ("sm_80", "sm_90")
COLUMNS = ("loop_wgmma", *(f"{where}{unit}" for where in ("", "loop_") for unit in ("mma", "flops", *UNITS)))


def counts(table: dict) -> str:
    """One line for each configuration, but for float32."""
    lines = []
    for name, row in table["rows"].items():
        if name.split()[1] in ARCHITECTURES and "float32" not in name:
            values = [len(row["serialized"]), *(row[column] for column in COLUMNS)]
            lines.append(f"    {json.dumps(name)}: {json.dumps(values)}")
    columns, rows = json.dumps(["serialized", *COLUMNS]), ",\n".join(lines)
    return f'{{\n  "columns": {columns},\n  "rows": {{\n{rows}\n  }}\n}}\n'


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    COUNTS.write_text(counts(json.loads(parser.parse_args(arguments).table.read_text())))


if __name__ == "__main__":
    main()

"""The benchmark suite: `python -m benchmarks.run` from the repository root.

Here are the programs `run` and `plot`. `operators/` has a file for each operator measured, with its peers; `harness/`
how they are measured; `report/` what is said about it; `quality/` models trained on real data; `tools/` what runs and
tunes on a device; `data/` what is downloaded; `examples/` programs to read. README.md says how to add to them.
"""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository
DISPATCH_TABLE = ROOT / "python" / "recattn" / "ops" / "sink_attention" / "dispatch.json"

# The profiler, which measures peak memory, logs every start and stop; torch reads this when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

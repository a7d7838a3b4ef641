"""The benchmark suite: `python -m benchmarks.run` from the repository root.

A new operator is a new file `<stem>_attention.py` here; a new peer or workload is a few lines in an operator's file.
"""

import os

# The profiler, which measures peak memory, logs every start and stop; torch reads this when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

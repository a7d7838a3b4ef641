"""SIGINT, as Ctrl-C sends it, while a program writes results: it ends at once, and its file has whole rows."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Of all operators, so that much is left to do after the first rows.
BENCHMARK = ["benchmarks.run", "--quick", "--offline", "--seconds", "0.02"]
CHECK = ["recattn", "check", "--device", "cpu", "--quick"]


def interrupt(command: list[str], has_rows) -> int:
    """Its exit status, interrupted when it has written rows. Fails if it or a process that it started goes on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
    command, pipe = [sys.executable, "-m", *command], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=pipe, stderr=subprocess.STDOUT) as process:
        try:
            while not has_rows():
                assert process.poll() is None, "it ended before it was interrupted"
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=20)  # until nobody can write to the pipe
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode


def test_a_benchmark_leaves_whole_rows(tmp_path):
    def rows():
        return [line for path in tmp_path.iterdir() for line in path.read_text().splitlines()]

    assert interrupt([*BENCHMARK, "--results", str(tmp_path)], rows) == -signal.SIGINT
    assert len({json.loads(row)["op"] for row in rows()}) == 1


def test_a_check_leaves_the_rows_so_far(tmp_path):
    path = tmp_path / "check.json"

    def found():
        return json.loads(path.read_text())

    assert interrupt([*CHECK, "--json", str(path)], lambda: path.exists() and found()["rows"]) == 130
    assert not found()["finished"] and found()["rows"]
    assert list(tmp_path.iterdir()) == [path]

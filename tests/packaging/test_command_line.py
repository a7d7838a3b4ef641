"""`python -m recattn`: help, and `info`."""

import os
import subprocess
import sys

import pytest
import torch

from recattn import __main__, _native, info
from recattn._extension import MISSING
from recattn.ops import UNSUPPORTED_REASONS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what a CPU is told")


def lines() -> dict[str, str]:
    """What `info` says of each thing."""
    named = (line.replace(": ", "  ", 1).partition("  ") for line in info.report().splitlines())
    return {name: said.strip() for name, _, said in named}


def test_alone_it_prints_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recattn"])
    assert __main__.main() == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("check", "info", "lrea-size"))


def test_a_reader_that_leaves_is_no_traceback():
    """As with `python -m recattn info | head -1`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "recattn", "info"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif("cpu" in MISSING, reason="needs the compiled extension")
def test_info_lists_what_runs_here():
    said = lines()
    assert {said[op] for op in UNSUPPORTED_REASONS} == {"cpu"}
    assert said["C++ kernels"].startswith("built with") and said["C++ host code"] == "built"
    assert "cuda" not in said["runs on"] and "CUDA kernels" not in said  # no GPU here could use them


def test_info_without_compiled_parts_says_what_runs_instead(monkeypatch):
    monkeypatch.setitem(MISSING, "cpu", "not compiled")
    monkeypatch.setattr(_native, "MISSING", "No module named 'recattn._host'")
    said = lines()
    assert said["refined_attention"] == "chunked"
    assert {said[op] for op in UNSUPPORTED_REASONS if op != "refined_attention"} == {"reference"}
    assert said["C++ kernels"] == "not compiled"
    assert "RECATTN_BUILD=cpu pip install" in said["C++ host code"] and "recattn._host" in said["C++ host code"]
